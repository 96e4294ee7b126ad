"""What every job does alike: arguments, the resolved config, and errors without a stack trace."""

import argparse
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from distrl.config import C, dump_config, load_config
from distrl.errors import DistrlError

USER_ERROR = 2
"""Exit status of a mistake that the user can mend."""


def arguments(doc: str | None, *, config_optional: bool = False) -> argparse.ArgumentParser:
    """A parser with the arguments that every job takes."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    nargs = "?" if config_optional else None
    parser.add_argument("config", nargs=nargs, help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the file's values"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    return parser


def resolve(cls: type[C], args: argparse.Namespace) -> C:
    """The job's config; with --dry-run it is printed and the job ends.

    Raises:
        ConfigError: If the file or an override is wrong.
    """
    path, overrides = args.config, list(args.overrides)
    if path is not None and "=" in path:
        # An override in the file's place; as a Path, s3:// in it would become s3:/.
        path, overrides = None, [path, *overrides]
    config = load_config(cls, None if path is None else Path(path), overrides)
    if args.dry_run:
        print(dump_config(config), end="")
        sys.exit(0)
    return config


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a job's main; a mistake of the user's is one line on stderr and status 2.

    Ctrl-C and SIGTERM, which schedulers send, end it in good order, with the status that shells
    give them: 130 and 143.
    """
    terminated = False

    def end(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal terminated
        # An exception of its own class would not come through ray.get, which raises a plain one.
        terminated = True
        raise KeyboardInterrupt

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, end)
    try:
        sys.exit(main() or 0)
    except DistrlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        print("terminated" if terminated else "interrupted", file=sys.stderr)
        sys.exit(128 + (signal.SIGTERM if terminated else signal.SIGINT))
