"""The one border where aiokafka's errors become ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aiokafka import errors as kafka

from streaminfer.errors import NotOwner, RecordTooLarge, TopicError, TransportError

__all__ = ["translate", "translated"]

_TOO_LARGE = (
    kafka.MessageSizeTooLargeError,
    kafka.RecordListTooLargeError,
    kafka.RecordTooLargeError,
)
_NOT_OWNER = (
    kafka.CommitFailedError,
    kafka.IllegalGenerationError,
    kafka.IllegalStateError,
    kafka.RebalanceInProgressError,
    kafka.UnknownMemberIdError,
)
_TOPIC = (
    kafka.InvalidConfigurationError,
    kafka.InvalidPartitionsError,
    kafka.InvalidReplicationFactorError,
    kafka.InvalidTopicError,
    kafka.PolicyViolationError,
    kafka.TopicAuthorizationFailedError,
    kafka.UnknownTopicOrPartitionError,
)
_FOREIGN = (
    kafka.KafkaError,
    kafka.ConsumerStoppedError,
    kafka.IllegalOperation,
    OSError,
    TimeoutError,
)


def translate(error: BaseException, doing: str) -> TransportError:
    """Return our error for one of aiokafka's; `doing` says what went wrong: "send to images"."""
    if isinstance(error, TransportError):
        return error
    text = f"cannot {doing}: {str(error) or type(error).__name__}"
    if isinstance(error, _TOO_LARGE):
        return RecordTooLarge(f"{text}; raise max.message.bytes of the topic, or send less")
    if isinstance(error, _NOT_OWNER):
        return NotOwner(f"{text}; drop this work, the partition's owner reads it again")
    if isinstance(error, _TOPIC):
        return TopicError(f"{text}; see: streaminfer topics apply, and the topic's permissions")
    return TransportError(text)


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Let only our errors out."""
    try:
        yield
    except _FOREIGN as error:
        raise translate(error, doing) from error
