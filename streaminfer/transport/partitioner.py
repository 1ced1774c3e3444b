"""Which partition a key goes to: murmur2, bit for bit as Kafka's Java client does it.

Source: `org.apache.kafka.common.utils.Utils.murmur2` and `BuiltInPartitioner.partitionForKey`.
librdkafka agrees only with `partitioner=murmur2_random` (kcat: `-X partitioner=murmur2_random`).
"""

from __future__ import annotations

import struct

__all__ = ["murmur2", "partition_for"]

_MASK = 0xFFFFFFFF
_M = 0x5BD1E995
_SEED = 0x9747B28C


def murmur2(data: bytes) -> int:
    """Return the 32-bit hash of `data` as Java's signed int."""
    whole = len(data) & ~3
    h = _SEED ^ len(data)
    for (k,) in struct.iter_unpack("<I", data[:whole]):
        k = k * _M & _MASK
        k = (k ^ k >> 24) * _M & _MASK
        h = h * _M & _MASK ^ k
    if whole < len(data):
        h = (h ^ int.from_bytes(data[whole:], "little")) * _M & _MASK
    h = (h ^ h >> 13) * _M & _MASK
    h ^= h >> 15
    return h - (1 << 32) if h >> 31 else h


def partition_for(key: bytes, partitions: int) -> int:
    """Return the partition of 0 … `partitions` - 1 that every record of this key goes to."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions
