"""The transport of a Kafka cluster: aiokafka behind the protocol of `transport/base.py`.

    settings     how to reach the cluster      border      aiokafka's errors become ours
    consumer ─┬─ membership   rebalances       lifecycle   connect, look up topics, stop: in time
              └─ offsets      what a group committed, read and written with own requests
    producer     admin                         noise       a fresh broker's start is no error

Only this folder imports aiokafka.
"""

from __future__ import annotations

from collections.abc import Sequence

from streaminfer.transport.base import Listener
from streaminfer.transport.kafka.admin import KafkaAdmin
from streaminfer.transport.kafka.consumer import KafkaConsumer
from streaminfer.transport.kafka.membership import Subscription
from streaminfer.transport.kafka.noise import quiet_start_up
from streaminfer.transport.kafka.producer import KafkaProducer
from streaminfer.transport.kafka.settings import KafkaSettings

__all__ = [
    "KafkaAdmin",
    "KafkaConsumer",
    "KafkaProducer",
    "KafkaSettings",
    "KafkaTransport",
    "quiet_start_up",
]


class KafkaTransport:
    """A Kafka cluster. `client_id` names this process in the broker's logs and quotas."""

    def __init__(self, settings: KafkaSettings, client_id: str = "streaminfer") -> None:
        self.settings, self.client_id = settings, client_id

    def consumer(
        self,
        topics: Sequence[str],
        group: str | None,
        listener: Listener | None = None,
        *,
        weight: float = 1.0,
        from_end: bool = False,
    ) -> KafkaConsumer:
        """Make a member of `group`, or (None) a reader of all partitions of the topics."""
        subscription = Subscription(tuple(topics), group, listener, weight, from_end)
        return KafkaConsumer(self.settings, self.client_id, subscription)

    def producer(self) -> KafkaProducer:
        """Make a producer; records may have up to `settings.max_record_bytes`."""
        return KafkaProducer(self.settings, self.client_id)

    def admin(self) -> KafkaAdmin:
        """Make an admin."""
        return KafkaAdmin(self.settings, self.client_id)
