"""Another partition than Java's for one key, and two clients tear one key's records apart."""

from __future__ import annotations

import pytest
from aiokafka.partitioner import murmur2 as reference
from hypothesis import given
from hypothesis import strategies as st

from streaminfer.transport.partitioner import murmur2, partition_for


@pytest.mark.parametrize(
    ("key", "expected"),
    [  # org.apache.kafka.common.utils.UtilsTest.testMurmur2
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_hash_is_javas(key: bytes, expected: int) -> None:
    assert murmur2(key) == expected


@given(st.binary(max_size=40), st.integers(1, 1000))
def test_every_key_agrees_with_the_other_python_client(key: bytes, partitions: int) -> None:
    assert murmur2(key) & 0xFFFFFFFF == reference(key)
    assert partition_for(key, partitions) == (reference(key) & 0x7FFFFFFF) % partitions
