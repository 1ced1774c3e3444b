"""A split stage's measured parts → what it costs beside its neighbours, and the placed stages.

before ──▶ scatter ──▶ part 0 ──▶ gather ──▶ behind      the scatter runs with what is before, the
                  └──▶ part 1 ──┘                        gather with what is behind; where nothing
                                                         (or another split) is, in a worker alone
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from streaminfer.planning.partitioner import Kind, Problem
from streaminfer.planning.predict import BUFFERS, How, PlacedStage, Split
from streaminfer.planning.profile import DeviceProfile

__all__ = ["Crossing", "Figures", "PlacedFan", "Splitter", "evenly", "fan_of", "joined"]

# position of a cut (None: the model's input), bytes → seconds to receive, to send
Crossing = Callable[[int | None, float], tuple[float, float]]


@dataclass(frozen=True)
class Figures:
    """What was measured of a split on one kind of device. Seconds are of one micro-batch."""

    whole: float  # the stage unsplit, at the same time
    scatter: float
    part: float  # the one with the most to do
    gather: float
    takes: tuple[int, ...]  # bytes of one row, to each part
    gives: tuple[int, ...]  # and from it
    shared: bool  # all parts take the same tensors, sent once
    weights: int  # bytes, of the largest part
    peak: int  # bytes of activations alive in it, for one row
    gather_weights: int
    gather_peak: int


class Splitter(Protocol):
    """Knows a model's graph."""

    @property
    def images(self) -> bool:
        """Whether an input has rows and columns, so that tiles may be tried."""

    def problem(self, first: int, last: int, how: How) -> str:
        """Say why the nodes first to last may not be split so; "" if they may."""

    def figures(
        self, first: int, last: int, how: How, batch: int, device: DeviceProfile
    ) -> Figures | None:
        """Build and time what may be split so; None if even a part is too large to be timed."""


@dataclass(frozen=True)
class PlacedFan:
    """A split stage on its devices. Seconds are of one micro-batch, bytes of one row."""

    how: How
    compute: float  # the slowest part
    receive: float
    send: float
    into: float  # to scatter, and to send each part its own
    join: float  # to receive of all parts, and to gather
    period: float
    latency: float  # of the stage, with what it adds to its neighbours
    memory: float  # bytes on each device
    gather_memory: float  # bytes where the parts are joined
    gather_weights: int
    sent: int  # all messages to parts, as if nothing were cast
    given: int
    row_in: float  # what the stage takes whole
    row_out: float


def fan_of(
    problem: Problem,
    cuts: tuple[int, int],
    how: How,
    kinds: Sequence[Kind],
    figures: Sequence[Figures],
    batch: int,
    crossing: Crossing,
) -> PlacedFan:
    """Price a split stage between two cuts, with figures for each kind of its devices."""
    a, b = cuts
    first, last = int(problem.ends[a]) + 1, int(problem.ends[b])
    end = b == problem.size - 1
    one = figures[0]
    before = first - 1 if a else None
    behind = before if end else last  # a gather that nothing follows takes its edge from the parts
    scales = [
        float(kind.seconds[first : last + 1].sum()) / max(f.whole, 1e-12)
        for kind, f in zip(kinds, figures, strict=True)
    ]
    pairs = list(zip(figures, scales, strict=True))
    messages = one.takes[:1] if one.shared else one.takes
    into = sum(crossing(before, batch * n)[1] for n in messages)
    into += max(f.scatter * scale for f, scale in pairs)
    join = sum(crossing(behind, batch * n)[0] for n in one.gives)
    join += max(f.gather * scale for f, scale in pairs)
    compute = max(f.part * scale for f, scale in pairs)
    receive = crossing(before, batch * max(one.takes))[0]
    send = crossing(behind, batch * max(one.gives))[1]
    service = compute + receive + send
    held = BUFFERS * batch
    return PlacedFan(
        how=how,
        compute=compute,
        receive=receive,
        send=send,
        into=into,
        join=join,
        period=max(service, 0.0 if a else into, join if end else 0.0),
        latency=service + into + join - float(problem.send[a] + problem.receive[b]),
        memory=one.weights + batch * one.peak + held * (max(one.takes) + max(one.gives)),
        gather_memory=one.gather_weights + batch * one.gather_peak + held * sum(one.gives),
        gather_weights=one.gather_weights,
        sent=sum(messages),
        given=sum(one.gives),
        row_in=float(problem.held[a]) / held,
        row_out=float(problem.held[b]) / held,
    )


def evenly(stage: PlacedStage, how: How) -> PlacedStage:
    """Return a stage split at no cost: no split is better."""
    return replace(
        stage,
        compute=stage.compute / how.parts,
        send=stage.send / how.parts,
        memory=stage.memory / how.parts,
        shares=(),
        split=Split(how, 0.0, 0.0, stage.row_bytes, 0.0, stage.memory),
    )


def joined(
    stages: Sequence[PlacedStage], fans: Mapping[int, PlacedFan], batch: int
) -> list[PlacedStage]:
    """Put splits in the places of whole stages, and their ends into the stages beside them.

    Args:
        stages: all of a plan, as if none were split.
        fans: by place in `stages`.
        batch: rows of a micro-batch.
    """
    found = list(stages)
    for at, fan in fans.items():
        found[at] = _fanned(stages[at], fan, fans.get(at + 1), at, len(stages), batch)
        if at and at - 1 not in fans:
            found[at - 1] = _scattering(found[at - 1], fan, batch)
        if at + 1 < len(stages) and at + 1 not in fans:
            found[at + 1] = _gathering(found[at + 1], fan, stages[at].devices, batch)
    return found


def _fanned(
    stage: PlacedStage, fan: PlacedFan, following: PlacedFan | None, at: int, count: int, batch: int
) -> PlacedStage:
    scatter = 0.0 if at else fan.into
    alone = at + 1 == count or following is not None
    gather = fan.join + (following.into if following else 0.0) if alone else 0.0
    ratio = stage.row_bytes / fan.row_out if fan.row_out and at + 1 < count else 1.0
    elsewhere = not alone and stage.devices[0] != "cpu"  # it is joined where the first part is
    held = BUFFERS * batch * (fan.row_in + fan.sent)
    return replace(
        stage,
        compute=fan.compute,
        receive=fan.receive,
        send=fan.send,
        period=max(fan.period, scatter, gather),
        memory=fan.memory + (fan.gather_memory if elsewhere else 0.0),
        row_bytes=round(fan.given * ratio),
        shares=(),
        split=Split(
            fan.how,
            scatter=scatter,
            gather=gather,
            row_bytes=fan.sent + fan.given,
            memory=max(0.0 if at else held, fan.gather_memory if alone else 0.0),
            whole=stage.memory,
        ),
    )


def _scattering(stage: PlacedStage, fan: PlacedFan, batch: int) -> PlacedStage:
    """Let the stage before the parts send each its own."""
    return replace(
        stage,
        send=fan.into,
        period=stage.period + (fan.into - stage.send) / stage.replicas,
        memory=stage.memory + BUFFERS * batch * max(0.0, fan.sent - fan.row_in),
        row_bytes=round(stage.row_bytes * fan.sent / fan.row_in) if fan.row_in else fan.sent,
    )


def _gathering(
    stage: PlacedStage, fan: PlacedFan, devices: Sequence[str], batch: int
) -> PlacedStage:
    """Let the stage behind the parts join what they give."""
    more = fan.gather_weights + BUFFERS * batch * max(0.0, fan.given - fan.row_out)
    memory = max(stage.memory + more, fan.gather_memory)
    return replace(
        stage,
        receive=fan.join,
        period=stage.period + (fan.join - stage.receive) / stage.replicas,
        memory=memory if devices[0] == "cpu" else stage.memory,
    )
