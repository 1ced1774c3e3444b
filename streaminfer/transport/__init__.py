"""HOW it travels: one small protocol, two carriers, one contract suite for both."""

from streaminfer.transport.base import (
    Admin,
    Commit,
    Consumer,
    Headers,
    Listener,
    Outgoing,
    Position,
    Producer,
    Record,
    TopicInfo,
    TopicPartition,
    TopicSpec,
    Transport,
)

__all__ = [
    "Admin",
    "Commit",
    "Consumer",
    "Headers",
    "Listener",
    "Outgoing",
    "Position",
    "Producer",
    "Record",
    "TopicInfo",
    "TopicPartition",
    "TopicSpec",
    "Transport",
]
