"""WHAT travels: pure bytes. No asyncio, no torch, no Kafka."""

from streaminfer.wire.envelope import Envelope, Failure, Hop, Sample, Tensor

__all__ = ["Envelope", "Failure", "Hop", "Sample", "Tensor"]
