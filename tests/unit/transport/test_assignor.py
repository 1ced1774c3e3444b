"""A partition given to nobody is never answered; one given to two is answered twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import ceil, floor, inf, nan

from hypothesis import given, settings
from hypothesis import strategies as st

from streaminfer.transport.assignor import Member, assign
from streaminfer.transport.base import TopicPartition

TOPICS = ("a", "b", "c")
quick = settings(max_examples=50, deadline=None)


def shares(
    weights: Mapping[str, float], partitions: int, owned: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Assign one topic of fewer than ten partitions; partition numbers as a string, "013"."""
    members = {
        name: Member(
            weight, {"t"}, [TopicPartition("t", int(n)) for n in (owned or {}).get(name, "")]
        )
        for name, weight in weights.items()
    }
    return {
        name: "".join(str(tp.partition) for tp in tps)
        for name, tps in assign(members, {"t": partitions}).items()
    }


@st.composite
def groups(draw: st.DrawFn) -> tuple[dict[str, Member], dict[str, int]]:
    partitions = draw(st.dictionaries(st.sampled_from(TOPICS), st.integers(1, 9)))
    names = draw(st.sets(st.sampled_from("uvwxyz"), min_size=1))
    anywhere = st.builds(TopicPartition, st.sampled_from((*TOPICS, "gone")), st.integers(0, 12))
    weight = st.sampled_from([0.0, 0.1, 0.3, 1.0, 1.0, 2.0, 7.5, -1.0, nan, inf])
    topics = st.sets(st.sampled_from((*TOPICS, "missing")), max_size=4)
    members = {
        name: Member(draw(weight), draw(topics), draw(st.lists(anywhere, max_size=9)))
        for name in sorted(names)
    }
    return members, partitions


@quick
@given(groups())
def test_every_partition_goes_to_exactly_one_of_its_readers(
    group: tuple[dict[str, Member], dict[str, int]],
) -> None:
    members, partitions = group
    given_out = assign(members, partitions)
    assert set(given_out) == set(members)
    for name, tps in given_out.items():
        assert {tp.topic for tp in tps} <= set(members[name].topics)
        assert tps == sorted(tps)
    read = {topic for member in members.values() for topic in member.topics} & set(partitions)
    every = {TopicPartition(topic, n) for topic in read for n in range(partitions[topic])}
    assert Counter(tp for tps in given_out.values() for tp in tps) == Counter(every)


@quick
@given(groups())
def test_whoever_leads_the_group_computes_the_same(
    group: tuple[dict[str, Member], dict[str, int]],
) -> None:
    members, partitions = group
    backwards = {
        name: member._replace(owned=list(reversed(list(member.owned))))
        for name, member in reversed(members.items())
    }
    assert assign(backwards, dict(reversed(partitions.items()))) == assign(members, partitions)


@quick
@given(
    st.dictionaries(st.text(max_size=3), st.floats(0.1, 10), min_size=1, max_size=9),
    st.integers(1, 64),
)
def test_share_is_the_weights_rounded_up_or_down(
    weights: dict[str, float], partitions: int
) -> None:
    members = {name: Member(weight, {"t"}) for name, weight in weights.items()}
    total = sum(weights.values())
    for name, tps in assign(members, {"t": partitions}).items():
        exact = partitions * weights[name] / total
        assert floor(exact - 1e-6) <= len(tps) <= ceil(exact + 1e-6)


@quick
@given(groups())
def test_nothing_moves_without_a_reason(group: tuple[dict[str, Member], dict[str, int]]) -> None:
    """Each move costs a drain and a re-read: the second answer must be the first."""
    members, partitions = group
    first = assign(members, partitions)
    owning = {name: member._replace(owned=first[name]) for name, member in members.items()}
    assert assign(owning, partitions) == first


@quick
@given(
    st.integers(1, 40),
    st.dictionaries(st.sampled_from("uvwxyz"), st.integers(1, 4), min_size=2),
    st.data(),
)
def test_who_must_give_up_gives_up_only_what_is_over_the_share(
    partitions: int, weights: dict[str, int], data: st.DataObject
) -> None:
    owners = data.draw(st.lists(st.sampled_from([*weights, ""]), max_size=partitions))
    members = {
        name: Member(
            weight,
            {"t"},
            [TopicPartition("t", n) for n, owner in enumerate(owners) if owner == name],
        )
        for name, weight in weights.items()
    }
    for name, tps in assign(members, {"t": partitions}).items():
        kept = set(tps) & set(members[name].owned)
        assert len(kept) == min(len(tps), len(members[name].owned))


@quick
@given(groups())
def test_topics_alike_are_shared_alike(group: tuple[dict[str, Member], dict[str, int]]) -> None:
    members, partitions = group
    same = {name: member._replace(topics={"a", "b"}) for name, member in members.items()}
    for tps in assign(same, {**partitions, "a": 6, "b": 6}).values():
        by_topic = {t: {tp.partition for tp in tps if tp.topic == t} for t in ("a", "b")}
        assert by_topic["a"] == by_topic["b"]


def test_double_weight_gets_double_share() -> None:
    assert shares({"slow": 1, "fast": 2}, 9) == {"fast": "012345", "slow": "678"}
    assert shares({"slow": 1, "fast": 3}, 8) == {"fast": "012345", "slow": "67"}


def test_join_and_leave_move_little() -> None:
    assert shares({"a": 1, "b": 1}, 6, {"a": "012345"}) == {"a": "012", "b": "345"}
    assert shares({"a": 1, "b": 1, "c": 1}, 6, {"a": "012", "b": "345"}) == {
        "a": "01",
        "b": "34",
        "c": "25",
    }
    assert shares({"a": 1, "c": 1}, 6, {"a": "01", "c": "25"}) == {"a": "013", "c": "245"}


def test_odd_partition_stays_where_it_is() -> None:
    assert shares({"a": 1, "b": 1}, 3, {"a": "0", "b": "12"}) == {"a": "0", "b": "12"}
    assert shares({"a": 1, "b": 1}, 3, {"a": "02", "b": "1"}) == {"a": "02", "b": "1"}


def test_weight_zero_asks_for_nothing_unless_all_do() -> None:
    assert shares({"a": 0, "b": 1}, 3, {"a": "012"}) == {"a": "", "b": "012"}
    assert shares({"a": 0, "b": 0}, 4) == {"a": "01", "b": "23"}


def test_several_small_topics_do_not_all_go_to_the_first() -> None:
    members = {name: Member(1, {"a", "b", "c", "d"}) for name in ("x", "y")}
    given_out = assign(members, {"a": 1, "b": 3, "c": 5, "d": 7})
    assert {name: len(tps) for name, tps in given_out.items()} == {"x": 8, "y": 8}
