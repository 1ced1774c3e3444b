"""Messages over 900 kB: none is lost, and no position is kept for ever."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaminfer.errors import Action, WireError
from streaminfer.wire import (
    Assembler,
    BrokenMessage,
    Envelope,
    Message,
    Patience,
    decode,
    encode,
    records,
    split,
)
from streaminfer.wire.headers import Headers
from tests.envelopes import envelope

Place = tuple[str, int, int]
Sent = tuple[Headers, bytes]

ROW = bytes(range(100))


class Log:
    """One topic partition and its reader."""

    def __init__(
        self, max_bytes: int = 10_000, max_sets: int = 64, patience: Patience | None = None
    ) -> None:
        self.now = 0.0
        self.reader = Assembler[Place](
            max_bytes, max_sets, patience=patience, clock=lambda: self.now
        )
        self.given_up: list[BrokenMessage[Place]] = []
        self.offsets = count()
        self.messages: list[Message[Place]] = []
        self.settled: list[int] = []
        self.sent: list[int] = []

    def send(self, *sent: Sent) -> None:
        for heads, value in sent:
            self.sent.append(next(self.offsets))
            message, settled, given_up = self.reader.add(("t", 0, self.sent[-1]), heads, value)
            self.given_up += given_up
            self.settled += [offset for _, _, offset in settled]
            if message:
                self.messages.append(message)

    @property
    def held(self) -> list[int]:
        return [offset for _, _, offset in self.reader.held_positions("t", 0)]

    def envelopes(self) -> list[Envelope]:
        return [decode(m.buffer, max_bytes=10_000) for m in self.messages]


@given(st.lists(st.binary(max_size=50), max_size=6), st.integers(1, 60))
def test_chunks_are_the_message_cut_at_equal_lengths(buffers: list[bytes], size: int) -> None:
    whole = b"".join(buffers)
    values = split(buffers, size)
    assert values == [whole[i : i + size] for i in range(0, len(whole), size)] or values == [b""]
    assert b"".join(values) == whole


def test_a_small_message_is_one_record_without_a_chunk_header() -> None:
    sent = envelope(0, 4, ROW)
    ((heads, value),) = records(sent)
    assert "si-chunk" not in dict(heads)
    assert value == b"".join(encode(sent))


def test_each_sending_has_its_own_id() -> None:
    """Chunks of two sendings must never be put together."""
    ids = {dict(records(envelope(0, 9, ROW), 300)[0][0])["si-chunk"][:16] for _ in range(50)}
    assert len(ids) == 50


@settings(deadline=None)
@given(st.data())
def test_messages_survive_any_interleaving_order_and_repetition(data: st.DataObject) -> None:
    """Chunks after the first may come in any order, and every record more than once."""
    dice = random.Random(data.draw(st.integers()))
    sent = [envelope(10 * i, 9, ROW[: data.draw(st.integers(1, 100))]) for i in range(4)]
    queues = []
    for message in sent:
        first, *rest = records(message, data.draw(st.integers(1, 40)) * 30)
        dice.shuffle(rest)
        queues.append([first, *rest])
    log = Log()
    past: list[Sent] = []
    while queues:
        queue = dice.choice(queues)
        past.append(queue.pop(0))
        log.send(past[-1])
        if dice.random() < 0.3 and "si-chunk" in dict((again := dice.choice(past))[0]):
            log.send(again)
        queues = [q for q in queues if q]
    read = log.envelopes()
    assert sorted(read, key=lambda e: e.first) == sent
    positions = [offset for m in log.messages for _, _, offset in m.positions]
    assert sorted(positions + log.settled) == log.sent
    assert (log.held, log.reader.held_bytes) == ([], 0)


@settings(deadline=None)
@given(st.data())
def test_readers_and_senders_may_die_at_any_time(data: st.DataObject) -> None:
    """Nothing is lost, and in the end every record may be committed.

    Senders die after some chunks and an heir sends again; the reader commits the settled prefix,
    dies and starts there again.
    """
    dice = random.Random(data.draw(st.integers()))
    sent = [envelope(10 * i, 9, ROW) for i in range(5)]
    log = [record for queue in interleaved(sent, dice) for record in queue]
    read: set[int] = set()
    committed = 0
    for life in range(6):
        reader = Assembler[Place](10_000)
        done: set[int] = set()
        end = len(log) if life == 5 else dice.randint(committed, len(log))
        for offset in range(committed, end):
            message, settled, _ = reader.add(("t", 0, offset), *log[offset])
            done |= {place[2] for place in settled}
            if message:
                read.add(message.origin.first)
                done |= {place[2] for place in message.positions}
            while committed in done:
                committed += 1
    assert read == {e.first for e in sent}
    assert committed == len(log)


def interleaved(sent: Sequence[Envelope], dice: random.Random) -> Iterator[list[Sent]]:
    """Every envelope's sendings: some die after a few chunks, then a whole one."""
    queues = []
    for message in sent:
        tries = [records(message, 300) for _ in range(dice.randint(1, 3))]
        dead = [chunks[: dice.randint(1, len(chunks) - 1)] for chunks in tries[1:]]
        # the dead have sent their first chunk before the heir is through, the rest at any time
        queues += [chunks[1:] for chunks in dead]
        queues.append([*(chunks[0] for chunks in dead), *tries[0]])
    dice.shuffle(queues)
    started: set[bytes] = set()
    while queues := [q for q in queues if q]:
        queue = dice.choice(queues)
        chunk = dict(queue[0][0])["si-chunk"].split(b":")
        if chunk[1] == b"0":
            started.add(chunk[0])
        if chunk[0] in started:
            yield [queue.pop(0)]


def test_the_rest_of_a_message_done_in_an_earlier_life_is_settled_at_once() -> None:
    log = Log()
    log.send(*records(envelope(0, 9, ROW), 300)[1:])
    assert log.settled == log.sent
    assert not log.messages


def test_a_set_of_a_dead_sender_goes_when_its_heir_has_sent_the_same() -> None:
    """Or the partition's commits stop for good."""
    log = Log()
    log.send(*records(envelope(10, 9, ROW), 300)[:2])
    log.send(*records(envelope(30, 9, ROW), 300))
    assert log.held == [0, 1]
    log.send(*records(envelope(10, 9, ROW), 300))
    assert log.settled == [0, 1]
    assert log.held == []


def test_a_set_goes_when_others_together_have_brought_its_samples() -> None:
    """After a crash ingest may form other batches of the same images."""
    log = Log()
    log.send(*records(envelope(10, 9, ROW), 300)[:2])
    log.send(*records(envelope(5, 10)))
    assert log.held == [0, 1]
    log.send(*records(envelope(18, 1)), *records(envelope(15, 1)))
    assert log.held == [0, 1]
    log.send(*records(envelope(16, 9)))
    assert log.held == []


@pytest.mark.parametrize(
    "other",
    [
        envelope(10, 9, ROW, partition=4),
        replace(envelope(10, 9, ROW), part=(1, 2)),
        envelope(10, 8, ROW),
        envelope(11, 8, ROW),
        replace(envelope(10, 9), samples=(envelope(10, 9).samples[0], envelope(10, 9).samples[8])),
    ],
    ids=["other partition", "other part", "begins", "ends", "outcomes at both ends"],
)
def test_a_set_stays_while_one_of_its_samples_has_not_come(other: Envelope) -> None:
    """Its sender may be alive, and its last chunks would be taken for a done message's: lost."""
    log = Log()
    first, *rest = records(envelope(10, 9, ROW), 300)
    log.send(first, *records(other))
    assert log.held == [0]
    log.send(*rest)
    assert log.envelopes()[-1] == envelope(10, 9, ROW)


def test_late_chunks_of_a_covered_set_are_settled() -> None:
    log = Log()
    late = records(envelope(10, 9, ROW), 300)
    log.send(late[0], *records(envelope(10, 9, ROW)), *late[1:], late[0])
    assert len(log.messages) == 1
    assert sorted((*log.settled, 1)) == log.sent


def broken(log: Log, *sent: Sent) -> BrokenMessage[Place]:
    with pytest.raises(BrokenMessage) as caught:
        log.send(*sent)
    return caught.value


def test_a_damaged_message_names_its_origin_and_all_its_positions() -> None:
    """So that its samples get an error outcome, and its records are committed."""
    log = Log()
    *chunks, (heads, value) = records(envelope(10, 9, ROW), 300)
    error = broken(log, *chunks, (heads, value[:-1] + b"\xff"))
    assert isinstance(error, WireError)
    assert error.action is Action.DEAD_LETTER
    assert "checksum" in str(error)
    assert error.origin is not None
    assert error.origin[:4] == (3, 10, 18, "a1b2")
    assert [place[2] for place in error.positions] == log.sent
    assert log.held == []


def test_damage_is_found_in_any_order_of_chunks() -> None:
    log = Log()
    first, second, *rest = records(envelope(10, 9, ROW), 300)
    bad = (second[0], b"\xff" + second[1][1:])
    assert "checksum" in str(broken(log, first, *rest, bad))


def test_a_chunk_with_a_broken_header_takes_its_set_along() -> None:
    """The set would wait for it for ever."""
    log = Log()
    first, (heads, value), *rest = records(envelope(10, 9, ROW), 300)
    error = broken(log, first, ((*heads[:-1], ("si-chunk", b"?")), value))
    assert [place[2] for place in error.positions] == [0, 1]
    log.send(*rest)
    assert (log.held, log.messages) == ([], [])


def test_a_record_of_nobody_has_no_origin() -> None:
    log = Log()
    error = broken(log, ((), b"anything"))
    assert (error.origin, error.positions) == (None, (("t", 0, 0),))


def test_a_tombstone_is_broken() -> None:
    heads, _ = records(envelope(0, 1))[0]
    with pytest.raises(BrokenMessage, match="without a value"):
        Assembler[Place](100).add(("t", 0, 0), heads, None)


@pytest.mark.parametrize(
    ("chunk", "says"),
    [
        (b"a:0:3:99999999:0000000000000000", "over the limit"),
        (b"a:0:3:600:0000000000000000", "3 chunks of 300 bytes are no 600"),
        (b"a:0:3:901:0000000000000000", "3 chunks of 300 bytes are no 901"),
        (b"a:0:9999999999:900:0000000000000000", "chunks of 300 bytes"),
    ],
)
def test_a_claim_is_checked_before_memory_is_taken(chunk: bytes, says: str) -> None:
    log = Log()
    heads, value = records(envelope(10, 9, ROW), 300)[0]
    assert says in str(broken(log, ((*heads[:-1], ("si-chunk", chunk)), value)))
    assert log.reader.held_bytes == 0


@pytest.mark.parametrize("at", [1, -1])
def test_a_chunk_of_another_length_is_broken(at: int) -> None:
    """It would be written over its neighbour."""
    chunks = records(envelope(10, 9, ROW), 300)
    heads, value = chunks[at]
    for bad in (value[:-1], value + b"\0", b""):
        assert f"chunk {len(chunks) - 1 if at == -1 else 1} of {len(bad)}" in str(
            broken(Log(), chunks[0], (heads, bad))
        )


def test_a_message_over_the_limit_is_broken_even_if_whole() -> None:
    assert "over the limit of 100" in str(broken(Log(max_bytes=100), *records(envelope(0, 9, ROW))))


def test_open_sets_are_bounded_and_the_oldest_gets_its_outcome() -> None:
    """Senders that die and have no heir must not fill the memory."""
    log = Log(max_sets=2)
    chunks = [records(envelope(10 * i, 9, ROW), 300) for i in range(3)]
    error = broken(log, *(c[0] for c in chunks))
    assert error.origin is not None
    assert (error.origin.first, error.positions) == (0, (("t", 0, 0),))
    log.send(*chunks[2][1:], *chunks[1][1:], *chunks[0][1:])
    assert [e.first for e in log.envelopes()] == [20, 10]
    assert log.held == []


def test_a_half_message_whose_heir_sent_elsewhere_is_given_up() -> None:
    """Where edges balance; or the partition's commits stop, and its log grows for ever."""
    log = Log(patience=Patience(messages=3, seconds=90))
    log.send(*records(envelope(10, 9, ROW), 300)[:2])
    log.now = 100
    log.send(*records(envelope(30, 9)), *records(envelope(10, 9, partition=4)))
    assert (log.given_up, log.held) == ([], [0, 1])
    log.send(*records(envelope(40, 9, ROW), 300))  # whole, in chunks
    (error,) = log.given_up
    assert error.origin is not None
    assert error.origin[:3] == (3, 10, 18)
    assert "2 of" in str(error)
    assert [offset for _, _, offset in error.positions] == [0, 1]
    assert log.held == []
    assert [e.first for e in log.envelopes()] == [30, 10, 40], "the one that came is not lost"
    late = records(envelope(10, 9, ROW), 300)
    log.send(*late)  # in the end it comes here as well: a message like any other
    assert log.envelopes()[-1].first == 10


@pytest.mark.parametrize("patience", [Patience(3, 90), None])
def test_a_slow_sender_is_not_given_up(patience: Patience | None) -> None:
    """Whoever is given up costs its samples an error: many messages are no death, nor is time."""
    log = Log(patience=patience)
    first, second, *rest = records(envelope(10, 9, ROW), 300)
    log.send(first)
    log.send(*(record for k in range(50) for record in records(envelope(100 + k, 1))))
    log.now = 89  # it is heard of again: it waits anew
    log.send(second)
    log.now = 170
    log.send(*(record for k in range(50) for record in records(envelope(200 + k, 1))))
    log.now = 10_000
    log.send(*rest)
    assert log.given_up == []
    assert log.envelopes()[-1].first == 10


def test_time_alone_gives_nothing_up() -> None:
    """A reader that was away for an hour finds the rest in the log."""
    log = Log(patience=Patience(3, 90))
    first, *rest = records(envelope(10, 9, ROW), 300)
    log.send(first)
    log.now = 3600
    log.send(*records(envelope(30, 1)), *rest)
    assert log.given_up == []
    assert log.envelopes()[-1].first == 10


def test_late_chunks_of_a_message_given_up_are_settled() -> None:
    log = Log(patience=Patience(1, 0))
    first, *rest = records(envelope(10, 9, ROW), 300)
    log.send(first, *records(envelope(30, 1)), *rest)
    assert len(log.given_up) == 1
    assert sorted([*log.settled, 0, 1]) == log.sent


def test_a_forgotten_partition_is_read_again_from_its_start() -> None:
    """After a rebalance or a seek back; other partitions keep what they have."""
    reader = Assembler[Place](10_000)
    chunks = records(envelope(10, 9, ROW), 300)
    for offset, record in enumerate(chunks):
        reader.add(("t", 0, offset), *record)
    reader.add(("t", 1, 0), *chunks[0])
    reader.forget("t", 0)
    reader.forget("t", 7)
    again = [reader.add(("t", 0, offset), *record) for offset, record in enumerate(chunks)]
    assert again[-1].message is not None
    assert reader.held_positions("t", 1) == (("t", 1, 0),)
    assert reader.held_positions("t", 0) == ()


def test_held_bytes_are_what_came_of_the_open_sets() -> None:
    log = Log()
    *chunks, last = records(envelope(10, 9, ROW), 300)
    for k, chunk in enumerate(chunks):
        log.send(chunk)
        assert log.reader.held_bytes == sum(len(value) for _, value in chunks[: k + 1])
    log.send(last)
    assert log.reader.held_bytes == 0
