"""What went wrong, inside what Ray raises of it."""

from ray.exceptions import RayTaskError

from distrl.errors import DistrlError


def cause(error: BaseException) -> BaseException:
    """The user's mistake inside what Ray raised, or what Ray raised."""
    pending: list[BaseException | None] = [error]
    while pending:
        inner = pending.pop()
        if inner is None:
            continue
        # What a task raises comes back as a class of both kinds, whose text is a trace.
        if isinstance(inner, DistrlError) and not isinstance(inner, RayTaskError):
            return inner
        pending += [inner.__cause__, getattr(inner, "cause", None)]
        pending += [getattr(inner, "controller_failure", None)]
        pending += list(getattr(inner, "worker_failures", {}).values())
    return error


def in_a_line(error: BaseException) -> str:
    """What went wrong, in one line for the user."""
    found = cause(error)
    lines = str(found).strip().splitlines() or [type(found).__name__]
    # Of other errors Ray gives a trace, which ends with what went wrong.
    return lines[0] if isinstance(found, DistrlError) else lines[-1]
