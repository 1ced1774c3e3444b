"""Every error of streaminfer, and what each asks of whoever meets it.

    StreaminferError
    ├── ConfigError            FATAL        the pipeline file, a flag, the environment
    │   ├── PlanError          FATAL        a plan directory missing, foreign or damaged
    │   └── CaptureError       FATAL        a model torch.export refuses, no such layer
    ├── SampleError            DEAD_LETTER  one sample can never work
    │   ├── DecodeError          kind=decode    bytes that are no image (or too large a one)
    │   └── SchemaError          kind=schema    a tensor, header or key not as planned
    ├── WireError              DEAD_LETTER  kind=decode  bytes on an inner topic, no envelope
    │   └── ForeignDigest        kind=schema    of another plan
    ├── ComputeError           SPLIT        kind=compute the model raised
    │   └── OutOfMemory          kind=oom       the device's memory was not enough for this batch
    ├── Expired                DEAD_LETTER  kind=timeout the sample's deadline has passed
    └── TransportError         RETRY        kind=produce the broker, the network
        ├── RecordTooLarge     DEAD_LETTER  one record over the topic's limit
        ├── NotOwner           DROP         the partition belongs to another member now
        └── TopicError         FATAL        a topic is missing, or not as the plan needs it

What a class asks for is its `action`; what the metrics and the answer call it is its `kind`.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar, Literal

__all__ = [
    "Action",
    "CaptureError",
    "ComputeError",
    "ConfigError",
    "DecodeError",
    "Expired",
    "ForeignDigest",
    "Kind",
    "NotOwner",
    "OutOfMemory",
    "PlanError",
    "RecordTooLarge",
    "SampleError",
    "SchemaError",
    "StreaminferError",
    "TopicError",
    "TransportError",
    "WireError",
]

Kind = Literal["decode", "schema", "oom", "compute", "produce", "timeout"]
KINDS: tuple[Kind, ...] = ("decode", "schema", "oom", "compute", "produce", "timeout")


class Action(Enum):
    """What the worker does with a failure."""

    RETRY = "retry"  # the same again, with back-off, up to the bound
    SPLIT = "split"  # smaller batches, until the poison sample stands alone
    DEAD_LETTER = "dead_letter"  # an outcome `error` for the sample; never again
    DROP = "drop"  # somebody else has it
    FATAL = "fatal"  # the worker cannot go on


class StreaminferError(Exception):
    """Root of all errors that streaminfer raises on purpose."""

    action: ClassVar[Action] = Action.FATAL
    kind: ClassVar[Kind] = "compute"


class ConfigError(StreaminferError):
    """What the user declared is wrong; `where` is file:line or key path, `hint` the remedy."""

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        self.message, self.where, self.hint = message, where, hint
        place = f"{where}: " if where else ""
        remedy = f"\n  hint: {hint}" if hint else ""
        super().__init__(f"{place}{message}{remedy}")


class PlanError(ConfigError):
    """A plan directory is missing, foreign or damaged."""


class CaptureError(ConfigError):
    """The model cannot be captured, or cannot be cut where it was asked."""


class SampleError(StreaminferError):
    """One sample can never work, whoever computes it."""

    action = Action.DEAD_LETTER
    kind: ClassVar[Kind] = "schema"


class DecodeError(SampleError):
    """The value is not an image of an accepted format within the limits."""

    kind: ClassVar[Kind] = "decode"


class SchemaError(SampleError):
    """A tensor, a header or a key is not what the plan says."""


class WireError(StreaminferError):
    """Bytes on an inner topic are not a whole, undamaged envelope."""

    action = Action.DEAD_LETTER
    kind: ClassVar[Kind] = "decode"


class ForeignDigest(WireError):
    """The envelope was made under another plan."""

    kind: ClassVar[Kind] = "schema"


class ComputeError(StreaminferError):
    """The model raised while it computed a batch."""

    action = Action.SPLIT
    kind: ClassVar[Kind] = "compute"


class OutOfMemory(ComputeError):
    """The device's memory was not enough for this batch."""

    kind: ClassVar[Kind] = "oom"


class Expired(StreaminferError):
    """The sample's deadline has passed; no compute is spent on it."""

    action = Action.DEAD_LETTER
    kind: ClassVar[Kind] = "timeout"


class TransportError(StreaminferError):
    """The broker or the network failed; the same again may work."""

    action = Action.RETRY
    kind: ClassVar[Kind] = "produce"


class RecordTooLarge(TransportError):
    """A record is over the topic's limit; no retry makes it smaller."""

    action = Action.DEAD_LETTER


class NotOwner(TransportError):
    """The partition belongs to another member of the group now."""

    action = Action.DROP


class TopicError(TransportError):
    """A topic is missing, or not as the plan needs it."""

    action = Action.FATAL
