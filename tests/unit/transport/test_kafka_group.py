"""A group's answers are read to the letter: a misread one publishes a whole log again."""

from __future__ import annotations

import pytest
from aiokafka import errors as kafka
from aiokafka.cluster import ClusterMetadata
from aiokafka.coordinator.protocol import ConsumerProtocolMemberMetadata
from aiokafka.protocol.commit import OffsetFetchResponse_v3
from hypothesis import given
from hypothesis import strategies as st

from streaminfer.errors import Action, NotOwner, RecordTooLarge, TopicError, TransportError
from streaminfer.transport.base import Commit, TopicPartition
from streaminfer.transport.kafka.border import translate, translated
from streaminfer.transport.kafka.membership import Claim, divide
from streaminfer.transport.kafka.offsets import parse_fetch

A0, A1 = TopicPartition("a", 0), TopicPartition("a", 1)


def reply(rows: list[tuple[int, int, str | None, int]], code: int = 0) -> OffsetFetchResponse_v3:
    """What a broker sends, through the bytes it sends it in."""
    sent = OffsetFetchResponse_v3(0, [("a", rows)] if rows else [], code).encode()
    return OffsetFetchResponse_v3.decode(sent)


def test_only_minus_one_without_error_means_never_committed() -> None:
    answer = reply([(0, 17, "watermark=3", 0), (1, -1, None, 0)])
    assert parse_fetch(answer) == {A0: Commit(17, "watermark=3"), A1: None}


def test_loading_coordinator_is_not_an_empty_group() -> None:
    loading = kafka.GroupLoadInProgressError
    with pytest.raises(loading):  # what aiokafka takes for "nothing committed"
        parse_fetch(reply([], loading.errno))
    with pytest.raises(loading):
        parse_fetch(reply([(0, 17, "", 0), (1, -1, "", loading.errno)]))
    assert loading.retriable


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        (kafka.MessageSizeTooLargeError(), RecordTooLarge),
        (kafka.CommitFailedError(), NotOwner),
        (kafka.RebalanceInProgressError(), NotOwner),
        (kafka.UnknownTopicOrPartitionError(), TopicError),
        (kafka.TopicAuthorizationFailedError("t"), TopicError),
        (kafka.KafkaConnectionError("gone"), TransportError),
        (kafka.ConsumerStoppedError(), TransportError),
        (TimeoutError(), TransportError),
        (ConnectionResetError("reset"), TransportError),
    ],
)
def test_no_foreign_error_gets_out(foreign: Exception, ours: type[TransportError]) -> None:
    with (
        pytest.raises(TransportError, match="cannot read images") as caught,
        translated("read images"),
    ):
        raise foreign
    assert type(caught.value) is ours
    assert caught.value.__cause__ is foreign


def test_our_own_error_is_not_wrapped_twice() -> None:
    error = NotOwner("once")
    assert translate(error, "commit") is error
    assert error.action is Action.DROP


partitions = st.frozensets(
    st.builds(TopicPartition, st.text(min_size=1, max_size=3), st.integers(0, 40)), max_size=8
)


@given(st.builds(Claim, st.floats(0, 64), st.integers(-1, 1 << 31), partitions))
def test_claim_survives_the_wire(claim: Claim) -> None:
    assert Claim.decode(claim.encode()) == claim


@given(st.binary(max_size=40) | st.sampled_from([b"[]", b'{"owned": 3}', b"null"]))
def test_unreadable_claim_does_not_stop_the_group(data: bytes) -> None:
    assert isinstance(Claim.decode(data), Claim)


def shares(claims: dict[str, Claim], count: int) -> dict[str, set[TopicPartition]]:
    """Let the group's leader divide a topic."""
    cluster = ClusterMetadata()
    cluster._partitions = {"a": dict.fromkeys(range(count))}
    members = {
        name: ConsumerProtocolMemberMetadata(0, ["a"], claim.encode())
        for name, claim in claims.items()
    }
    given = divide(cluster, members)
    return {
        name: {TopicPartition(*tp) for tp in share.partitions()} for name, share in given.items()
    }


def test_weights_reach_the_leader() -> None:
    given = shares({"cpu": Claim(1.0), "gpu": Claim(3.0)}, 8)
    assert {name: len(share) for name, share in given.items()} == {"cpu": 2, "gpu": 6}


def test_member_that_was_away_does_not_take_its_partitions_back() -> None:
    old = Claim(generation=3, owned=frozenset({A0}))
    now = Claim(generation=4, owned=frozenset({A0}))
    assert shares({"a-returns": old, "b-works": now}, 2)["b-works"] == {A0}
