"""A commit that runs ahead of an ack loses images; one that lags repeats them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streaminfer.runtime.steps import Settled
from streaminfer.runtime.tracker import Tracker
from streaminfer.transport import Commit, Position, TopicPartition

TP = TopicPartition("t", 0)


def positions(*offsets: int) -> list[Position]:
    return [Position(*TP, offset) for offset in offsets]


def tracker(*delivered: int, begin: Commit | None = None) -> Tracker:
    made = Tracker(clock=lambda: 5.0)
    made.assign({TP: begin})
    made.deliver(positions(*delivered))
    return made


def settle(made: Tracker, *offsets: int, note: str = "") -> None:
    made.settle([Settled(p, note or f"n{p.offset}") for p in positions(*offsets)], {})


def test_only_the_contiguous_prefix_may_be_committed() -> None:
    made = tracker(10, 11, 12, 13)
    settle(made, 11, 13)
    assert made.commits() == {}
    settle(made, 10)
    assert made.commits() == {TP: Commit(12, "n11")}
    assert made.outstanding() == 1


def test_gaps_in_the_log_do_not_hold_the_prefix() -> None:
    made = tracker(3, 7, 20)
    settle(made, 3, 7)
    assert made.commits() == {TP: Commit(8, "n7")}


def test_what_went_through_is_not_committed_again() -> None:
    made = tracker(1)
    settle(made, 1)
    made.committed(made.commits())
    assert made.commits() == {}


def test_a_watermark_is_committed_though_the_prefix_stands() -> None:
    """The sink's note must not wait for a held record, or a new owner answers twice."""
    made = tracker(5, 6, begin=Commit(5, "w=0"))
    made.settle([Settled(Position(*TP, 6))], {TP: "w=20"})
    assert made.commits() == {TP: Commit(5, "w=20")}


def test_a_new_owner_keeps_the_note_it_began_with() -> None:
    made = tracker(5, begin=Commit(5, "from=4"))
    made.settle([Settled(Position(*TP, 5), "")], {})
    assert made.commits() == {TP: Commit(6, "from=4")}


def test_a_late_call_of_an_earlier_assignment_changes_nothing() -> None:
    made = tracker(10, begin=Commit(10))
    settle(made, 8)
    assert made.commits() == {}
    made.forget([TP])
    settle(made, 10)
    assert made.commits() == {}


def test_the_oldest_unsettled_record_says_how_late_we_are() -> None:
    made = tracker(1, 2)
    assert made.oldest(TP) == 5.0
    settle(made, 1, 2)
    assert made.oldest(TP) is None


@given(st.permutations(range(12)))
def test_in_whatever_order_calls_end_all_is_committed_at_last(order: list[int]) -> None:
    made = tracker(*range(12))
    done: set[int] = set()
    for offset in order:
        settle(made, offset)
        done.add(offset)
        commit = made.commits().get(TP)
        prefix = next(i for i in range(13) if i not in done)
        assert (commit.offset if commit else 0) == prefix
    assert made.commits()[TP] == Commit(12, "n11")
