"""How far a pass over the users of a store is, said now and then."""

import logging
import time

logger = logging.getLogger(__name__)

EVERY_S = 5.0


class Progress:
    """Rate and time left of a pass, once it has taken a few seconds."""

    def __init__(self, num_users: int) -> None:
        self._num_users, self._done = num_users, 0
        self._started = self._said = time.perf_counter()

    def add(self, num_users: int) -> None:
        """Takes note of users done."""
        self._done += num_users
        now = time.perf_counter()
        if now - self._said < EVERY_S or self._done == 0:
            return
        self._said = now
        rate = self._done / (now - self._started)
        left_s = (self._num_users - self._done) / rate
        logger.info(
            "ranked %d of %d users, %.0f users/s, %.0f s left",
            self._done,
            self._num_users,
            rate,
            left_s,
        )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._started
