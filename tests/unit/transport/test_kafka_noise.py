"""What the log shows of Kafka: an error that is none teaches its reader to overlook the others."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from aiokafka import errors as kafka

from streaminfer.transport.kafka.noise import LOGGER, LOOKUP, PATIENCE, StartUp, quiet_start_up

LOG = logging.getLogger(LOGGER)
NOT_YET = kafka.GroupCoordinatorNotAvailableError()


class Hand:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Hand]:
    hand = Hand()
    before = list(LOG.filters)
    LOG.filters[:] = [StartUp(hand)]
    yield hand
    LOG.filters[:] = before


@pytest.fixture
def shown(clock: Hand, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.ERROR, LOGGER)  # as `streaminfer run` has it
    return caplog


def test_a_fresh_broker_without_a_coordinator_is_no_error(
    clock: Hand, shown: pytest.LogCaptureFixture
) -> None:
    for error in (NOT_YET, kafka.GroupLoadInProgressError()):
        LOG.error(LOOKUP, error)
        clock.now += PATIENCE / 4
    assert not shown.records


def test_who_debugs_sees_it(clock: Hand, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, LOGGER)
    LOG.error(LOOKUP, NOT_YET)
    (record,) = caplog.records
    assert (record.levelno, record.levelname) == (logging.DEBUG, "DEBUG")


def test_a_coordinator_that_never_comes_is_shown_but_not_ten_times_a_second(
    clock: Hand, shown: pytest.LogCaptureFixture
) -> None:
    for _ in range(int(35 * PATIENCE)):
        LOG.error(LOOKUP, NOT_YET)
        clock.now += 0.1
    seen = [record.levelno for record in shown.records]
    assert seen == [logging.ERROR] * 3  # 35 s: after 10, 20 and 30


def test_a_later_start_is_quiet_again(clock: Hand, shown: pytest.LogCaptureFixture) -> None:
    LOG.error(LOOKUP, NOT_YET)
    clock.now += 100 * PATIENCE
    LOG.error(LOOKUP, NOT_YET)
    assert not shown.records


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (LOOKUP, kafka.GroupAuthorizationFailedError("digits")),
        (LOOKUP, kafka.KafkaConnectionError("no route")),
        ("Heartbeat failed: %r", NOT_YET),
        ("OffsetCommit failed before join, ignoring: %s", NOT_YET),
    ],
)
def test_every_other_error_is_shown(
    shown: pytest.LogCaptureFixture, message: str, error: Exception
) -> None:
    LOG.error(message, error)
    assert [record.levelname for record in shown.records] == ["ERROR"]


def test_it_is_put_up_once() -> None:
    before = list(LOG.filters)
    try:
        quiet_start_up()
        quiet_start_up()
        assert sum(isinstance(one, StartUp) for one in LOG.filters) == 1
    finally:
        LOG.filters[:] = before
