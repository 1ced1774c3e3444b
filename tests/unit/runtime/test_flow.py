"""What bounds memory and disk: lose it and a dead sink fills both."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from streaminfer.runtime.flow import Budget, Trimmer, Window
from streaminfer.transport import Commit, TopicPartition

TP = TopicPartition("in", 3)


def test_the_window_closes_at_its_size_and_opens_at_half() -> None:
    window = Window(4)
    window.assign(TP, begin=0, watermark=0)
    for end in range(1, 5):
        assert window.room(TP) == 5 - end
        window.enter(TP, end)
    assert window.closed() == {TP}
    window.answered(TP, 1)
    assert window.room(TP) == 0, "one answer opens nothing: no flutter"
    window.answered(TP, 2)
    assert window.room(TP) == 2
    assert window.closed() == frozenset()


def test_a_stale_watermark_takes_nothing_back() -> None:
    window = Window(4)
    window.assign(TP, 0, 0)
    for end in (1, 2, 3):
        window.enter(TP, end)
    window.answered(TP, 3)
    window.answered(TP, 1)
    assert window.inflight() == 0


def test_a_new_owner_counts_what_the_last_one_left_in_flight() -> None:
    window = Window(4)
    window.assign(TP, begin=10, watermark=4)
    assert window.room(TP) == 0
    window.answered(TP, 10)
    assert window.room(TP) == 4


def test_the_watermark_is_read_while_the_window_may_close() -> None:
    """Never read, a window closes for good; read at all times, it costs a request each."""
    window = Window(8)
    window.assign(TP, 0, 0)
    for end in (1, 2):
        window.enter(TP, end)
    assert window.near() == frozenset()
    window.enter(TP, 3)
    assert window.near() == {TP}
    least = Window(1)
    least.assign(TP, 0, 0)
    least.enter(TP, 1)
    assert least.closed() == least.near() == {TP}


def test_offsets_without_samples_do_not_count() -> None:
    """Transaction markers and tombstones widen intervals; they are no load."""
    window = Window(3)
    window.assign(TP, 0, 0)
    window.enter(TP, 100)
    window.enter(TP, 200)
    assert window.inflight() == 2


@given(st.lists(st.booleans(), max_size=200))
def test_never_more_in_flight_than_the_window(enters: list[bool]) -> None:
    window, end, done = Window(8), 0, 0
    window.assign(TP, 0, 0)
    for enter in enters:
        if enter and window.room(TP):
            end += 1
            window.enter(TP, end)
        elif done < end:
            done += 1
            window.answered(TP, done)
        assert window.inflight() == end - done <= 8


async def test_a_full_budget_waits_and_a_freed_one_goes_on() -> None:
    budget = Budget(nbytes=100, samples=10)
    budget.take(100, 1)
    assert not await budget.wait(0.01)
    waiting = asyncio.create_task(budget.wait(5))
    await asyncio.sleep(0)
    budget.give(100, 1)
    assert await waiting


async def test_what_is_larger_than_the_whole_budget_still_fits_alone() -> None:
    budget = Budget(nbytes=100, samples=10)
    assert await budget.wait(0)
    budget.take(5000, 1)
    assert budget.full()
    budget.give(5000, 1)
    assert not budget.full()


class Trimmed:
    """The one call of an Admin that a trimmer makes."""

    def __init__(self) -> None:
        self.calls: list[dict[TopicPartition, int]] = []

    async def trim(self, offsets: dict[TopicPartition, int]) -> None:
        self.calls.append(dict(offsets))


async def test_read_records_go_when_the_history_has_passed() -> None:
    admin, now = Trimmed(), [0.0]
    trimmer = Trimmer(admin, history=10.0, history_bytes=1000, clock=lambda: now[0])  # type: ignore[arg-type]
    await trimmer.committed({TP: Commit(5)})
    assert admin.calls == []
    now[0] = 10.0
    await trimmer.committed({TP: Commit(9)})
    assert admin.calls == [{TP: 5}]


async def test_read_records_go_when_they_are_too_many_bytes() -> None:
    admin = Trimmed()
    trimmer = Trimmer(admin, history=1e9, history_bytes=1000, clock=lambda: 0.0)  # type: ignore[arg-type]
    trimmer.received(TP, 400)
    await trimmer.committed({TP: Commit(5)})
    trimmer.received(TP, 1000)
    await trimmer.committed({TP: Commit(9)})
    assert admin.calls == [{TP: 5}]


async def test_in_memory_nothing_is_kept() -> None:
    admin = Trimmed()
    trimmer = Trimmer(admin, history=0.0, history_bytes=0)  # type: ignore[arg-type]
    await trimmer.committed({TP: Commit(5)})
    assert admin.calls == [{TP: 5}]
