"""aiokafka's errors that are none: a fresh broker that has no group coordinator yet."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from aiokafka import errors as kafka

__all__ = ["StartUp", "quiet_start_up"]

LOGGER = "aiokafka.consumer.group_coordinator"
LOOKUP = "Group Coordinator Request failed: %s"
NOT_YET = (
    kafka.GroupCoordinatorNotAvailableError,  # 15: the topic of the commits is being made
    kafka.GroupLoadInProgressError,  # 14: it is being read
)
PATIENCE = 10.0  # seconds of asking again before it is worth an error, and between two of them


class StartUp(logging.Filter):
    """Lets "no coordinator yet" through as debug only, for as long as a start takes.

    aiokafka asks again by itself, ten times a second, and logs each time as an error. A broker that
    never gets a coordinator (its commits' topic wants more replicas than there are brokers) does
    matter: the error is shown once it has lasted for `PATIENCE`, and then as often as that.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._quiet = -math.inf  # until when
        self._last = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether to log it; what is asked again soon is logged as debug."""
        args = record.args if isinstance(record.args, tuple) else ()
        if record.msg != LOOKUP or not args or not isinstance(args[0], NOT_YET):
            return True
        now = self._clock()
        if now - self._last > PATIENCE:  # of another start
            self._quiet = now + PATIENCE
        self._last = now
        if now >= self._quiet:
            self._quiet = now + PATIENCE
            return True
        record.levelno, record.levelname = logging.DEBUG, logging.getLevelName(logging.DEBUG)
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


def quiet_start_up() -> None:
    """Keep a fresh broker's start out of the log, once for this process."""
    logger = logging.getLogger(LOGGER)
    if not any(isinstance(one, StartUp) for one in logger.filters):
        logger.addFilter(StartUp())
