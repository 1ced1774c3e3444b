"""What every test may ask for: a real Kafka, once per run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import pytest

from tests.broker import Broker, Unavailable


@pytest.fixture(scope="session")
def kafka_address() -> Iterator[str]:
    """Address of a real Kafka: STREAMINFER_TEST_KAFKA, or a broker of our own for this run."""
    if address := os.environ.get("STREAMINFER_TEST_KAFKA"):
        yield address
        return
    with a_broker() as broker:
        yield broker.address


@pytest.fixture
def own_broker() -> Iterator[Broker]:
    """A broker that this test alone may kill, freeze and start again."""
    with a_broker() as broker:
        yield broker


@contextmanager
def a_broker(properties: Mapping[str, str] | None = None) -> Iterator[Broker]:
    """Run a broker; without one skip, or fail where CI should have had one."""
    with ExitStack() as stack:
        try:
            broker = stack.enter_context(Broker.running(properties))
        except Unavailable as error:
            if os.environ.get("CI") == "true":
                pytest.fail(f"CI has no Kafka: {error}")
            pytest.skip(f"needs a real Kafka: {error}")
        yield broker
