"""A broker's first minute: its user must not be shown an error that is none."""

from __future__ import annotations

import asyncio
import logging

import pytest

from streaminfer.transport import TopicSpec
from streaminfer.transport.kafka import KafkaSettings, KafkaTransport
from streaminfer.transport.kafka.noise import LOGGER, LOOKUP, quiet_start_up
from tests.broker import Broker

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(120)]


async def test_the_first_group_of_a_fresh_broker_logs_no_error(
    own_broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger(LOGGER)
    before = list(log.filters)
    caplog.set_level(logging.DEBUG, LOGGER)
    quiet_start_up()
    try:
        transport = KafkaTransport(KafkaSettings(own_broker.address))
        async with transport.admin() as admin:
            await admin.create([TopicSpec("first", 1)])
        async with asyncio.timeout(60), transport.consumer(["first"], "first") as consumer:
            await consumer.poll(5.0)
    finally:
        log.filters[:] = before
    asked = [record for record in caplog.records if record.msg == LOOKUP]
    assert asked, "the broker had its coordinator at once: this test saw nothing"
    assert {record.levelno for record in asked} == {logging.DEBUG}
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
