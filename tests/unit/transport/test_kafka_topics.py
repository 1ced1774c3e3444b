"""If these fail, a deleted topic is waited for for ever, or a silent broker ends its readers."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from streaminfer.errors import TopicError
from streaminfer.transport.kafka.consumer import _GONE, KafkaConsumer
from streaminfer.transport.kafka.membership import Subscription
from streaminfer.transport.kafka.settings import KafkaSettings


class Broker:
    """What a client was told of its topics, and when; it only counts how often it is asked."""

    def __init__(self, told: float) -> None:
        self.asked = 0
        cluster = SimpleNamespace(_last_successful_refresh_ms=told * 1000)
        self._client = SimpleNamespace(cluster=cluster, force_metadata_update=self._ask)

    def partitions_for_topic(self, topic: str) -> None:
        """No topic is known."""

    def _ask(self) -> None:
        self.asked += 1


def _consumer(broker: Broker) -> KafkaConsumer:
    consumer = KafkaConsumer(KafkaSettings("nowhere:9092"), "c", Subscription(("t",), "g"))
    consumer._kafka = broker
    return consumer


def test_a_topic_is_gone_if_the_broker_says_so_again() -> None:
    broker = Broker(told=time.time())
    consumer = _consumer(broker)
    now = time.monotonic()
    consumer._watch_topics(now + 0.9 * _GONE)  # it may be one that just started
    broker._client.cluster._last_successful_refresh_ms = time.time() * 1000
    with pytest.raises(TopicError, match="t was deleted"):
        consumer._watch_topics(now + 1.1 * _GONE)


def test_a_broker_that_says_nothing_is_asked_and_not_believed() -> None:
    """aiokafka stops asking for a topic that nobody has; what it knew then is old."""
    broker = Broker(told=time.time() - 100)
    consumer = _consumer(broker)
    for later in (1.1, 2.0, 5.0):
        consumer._watch_topics(time.monotonic() + later * _GONE)
    assert broker.asked == 3
