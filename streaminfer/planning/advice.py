"""Whether a change of a running pipeline is worth it, and which. Pure: measurements in, advice out.

    capacity             the least of: replicas ÷ seconds of a cell; cores ÷ seconds of all

Advice is given only where the limit is loaded, the same in both halves, and where in both of them
the gain is above what the user calls worth it: else a pipeline would be turned over for noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from streaminfer.planning.live import CellRate, Live, Place, together

__all__ = ["Advice", "Change", "Layer", "advise"]

HOT = 0.7  # 0-1 of the time: below it what limits a pipeline is the load, not a cell
SAMPLES = 200  # that have to come through while it is measured
BATCHES = 20  # of the cell that limits
GROWS = 0.05  # of the samples that came: more of them wait at the end than at the beginning
NEAR = 0.75  # of the best change's gain: as good, so that what it asks for decides
COSTS = ("cut", "whole", "replica")  # nothing, memory for the whole model, one more device
Verdict = Literal["change", "leave", "measure longer"]


class Layer(NamedTuple):
    """What lies between two legal cuts: `until` ends it ("": the model's end)."""

    until: str
    seconds: float  # of a sample, as it was profiled


@dataclass(frozen=True)
class Change:
    """One thing that could be changed, and what the bottleneck law says of it."""

    kind: Literal["replica", "cut", "whole"]
    stage: str
    text: str
    capacity: float  # samples a second
    gain: float  # of the capacity: 0.2 is a fifth more
    replicas: int = 1
    until: str = ""


@dataclass(frozen=True)
class Advice:
    """The verdict, and what it is from."""

    verdict: Verdict
    why: str
    bottleneck: str
    busy: float  # 0-1, of its devices
    rate: float  # samples a second that were answered
    capacity: float
    change: Change | None = None
    others: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    stages: Mapping[str, CellRate] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it for programs; what is not known is null."""
        found = asdict(self)
        for name in ("busy", "rate", "capacity"):
            found[name] = found[name] if math.isfinite(found[name]) else None
        return found


class _Load(NamedTuple):
    """A cell and the seconds that it spends for each sample of the input."""

    place: Place
    seconds: float  # of its devices
    beside: float = 0.0  # of its decoders and event loop

    @property
    def capacity(self) -> float:
        return self.place.replicas / self.seconds if self.seconds else math.inf


def advise(
    halves: Sequence[Live],
    places: Sequence[Place],
    *,
    cores: float | None = None,
    worth: float = 0.15,
    layers: Sequence[Layer] = (),
) -> Advice:
    """Say whether to change a running pipeline.

    Args:
        halves: consecutive measurements of it, of about the same length.
        places: every stage of its plan, in order.
        cores: of the one machine that all its CPU stages share; None: they do not.
        worth: the least gain for which a change is worth it; 0.15 is 15 %.
        layers: the model's, as profiled, in order; without them no cut is moved.
    """
    whole = together(halves)
    loads, samples = _loads(whole, places), whole.cells[places[0].name].samples
    rate = whole.answered / whole.span
    slow = min(loads, key=lambda load: load.capacity)
    name = slow.place.name
    busy = whole.cells[name].seconds / whole.span / slow.place.replicas
    capacity = _capacity(loads, cores)

    def said(verdict: Verdict, why: str, **more: Any) -> Advice:
        return Advice(verdict, why, name, busy, rate, capacity, stages=whole.cells, **more)

    batches = whole.cells[name].batches
    if samples < SAMPLES or batches < BATCHES:
        return said(
            "measure longer",
            f"{samples:,.0f} samples and {batches:,.0f} batches of {name} in {whole.span:,.0f} s "
            f"are too few: {SAMPLES} and {BATCHES} are needed",
        )
    limit = _cores_limit(loads, cores, whole)
    notes = [] if layers else ["`streaminfer profile PIPELINE` makes advice about cuts possible"]
    notes += [limit] if limit else []
    if busy < HOT and not limit:
        return said(
            "leave", _no_device_limits(whole, samples, loads, busy, capacity), notes=tuple(notes)
        )
    changes = list(_changes(loads, cores, layers))
    near = NEAR * max((c.gain for c in changes), default=0.0)
    changes.sort(key=lambda c: (c.gain < near, COSTS.index(c.kind), -c.gain))
    good = [c for c in changes if c.gain >= worth]
    for change in good:
        if all(_again(change, half, places, cores, layers) >= worth for half in halves):
            why = f"{name} works {busy:.0%} of the time and limits the pipeline"
            others = tuple(c for c in changes if c is not change)
            return said("change", why, change=change, others=others, notes=tuple(notes))
    best = f"the best change brings {near / NEAR:.0%}" if changes else "nothing can be changed"
    why = f"{best}, less than {worth:.0%}"
    if good:
        why = f"{good[0].text} would bring {good[0].gain:.0%}, but not in all of the measurement"
    return said("leave", why, others=tuple(changes), notes=tuple(notes))


def _no_device_limits(
    live: Live, samples: float, loads: Sequence[_Load], busy: float, capacity: float
) -> str:
    name = min(loads, key=lambda load: load.capacity).place.name
    places = [load.place for load in loads]
    decoded, where = max((live.cells[p.name].beside / p.replicas, p.name) for p in places)
    if decoded >= HOT * live.span:
        return (
            f"{name} is the slowest and works {busy:.0%} of the time, but the decoders and the "
            f"event loop of {where} {decoded / live.span:.0%} of a thread's: smaller inputs, or a "
            f"replica of {where}, if they limit"
        )
    if live.growth > GROWS * samples:
        return (
            f"the lag grows, but {name}, the slowest, works {busy:.0%} of the time: it is no "
            "device that limits; look at the event loop, the window and the link"
        )
    return (
        f"{name} is the slowest and works {busy:.0%} of the time: it can carry "
        f"{capacity:,.1f} samples a second, and {live.answered / live.span:,.1f} come"
    )


def _loads(live: Live, places: Sequence[Place]) -> list[_Load]:
    """Return what each cell spends for a sample of the input: those behind an exit, for fewer."""
    came, plain = live.cells[places[0].name].samples, all(p.plain for p in places)
    rows = {p.name: live.cells[p.name].samples if plain else came for p in places}
    return [
        _Load(p, cell.seconds / max(1.0, rows[p.name]), cell.beside / max(1.0, rows[p.name]))
        for p, cell in ((p, live.cells[p.name]) for p in places)
    ]


def _capacity(loads: Sequence[_Load], cores: float | None) -> float:
    """Return the most samples a second: the bottleneck law, and the cores that all share."""
    least = min(load.capacity for load in loads)
    work = _cpu_work(loads)
    return min(least, cores / work) if cores and work else least


def _cpu_work(loads: Sequence[_Load]) -> float:
    computing = sum(load.seconds * load.place.threads for load in loads if load.place.on_cpu)
    return computing + sum(load.beside for load in loads)


def _cores_limit(loads: Sequence[_Load], cores: float | None, live: Live) -> str:
    """Say that the cores are the limit, if they are; else ""."""
    came = max(live.cells[load.place.name].samples for load in loads)
    used = _cpu_work(loads) * came / live.span
    if not cores or used < HOT * cores:
        return ""
    return f"its cells keep {used:.1f} of {cores:.0f} cores busy: more of them need more cores"


def _again(
    change: Change,
    half: Live,
    places: Sequence[Place],
    cores: float | None,
    layers: Sequence[Layer],
) -> float:
    """Return the gain of the same change, by one half of the measurement alone."""
    found = _changes(_loads(half, places), cores, layers, change.until)
    same = (change.kind, change.stage, change.until)
    return max((c.gain for c in found if (c.kind, c.stage, c.until) == same), default=0.0)


def _changes(
    loads: Sequence[_Load], cores: float | None, layers: Sequence[Layer], only: str = ""
) -> Iterator[Change]:
    now = _capacity(loads, cores)
    if not math.isfinite(now):
        return
    yield from _replica(loads, cores, now)
    yield from _cuts(loads, cores, layers, now, only)
    devices = sum({load.place.worker: load.place.replicas for load in loads}.values())
    if len({load.place.worker for load in loads}) > 1 and all(load.place.plain for load in loads):
        one = loads[0].place._replace(replicas=devices)
        both = [sum(load.seconds for load in loads), sum(load.beside for load in loads)]
        then = _capacity([_Load(one, *both)], cores)
        text = f"one stage with {devices} replicas, if the whole model fits on each device"
        yield Change("whole", "", text, then, then / now - 1, devices)


def _replica(loads: Sequence[_Load], cores: float | None, now: float) -> Iterator[Change]:
    """One more replica of what limits: of its whole worker, and of all parts of a split stage."""
    slow = min(loads, key=lambda load: load.capacity).place
    if slow.fixed:
        return
    workers = {load.place.worker for load in loads if load.place.path == slow.path}
    more = [
        load._replace(place=load.place._replace(replicas=load.place.replicas + 1))
        if load.place.worker in workers
        else load
        for load in loads
    ]
    then, count = _capacity(more, cores), slow.replicas + 1
    yield Change(
        "replica", slow.path, f"{count} replicas of {slow.path}", then, then / now - 1, count
    )


def _cuts(
    loads: Sequence[_Load], cores: float | None, layers: Sequence[Layer], now: float, only: str
) -> Iterator[Change]:
    """Yield, for each cut between two plain stages, the best place for it (`only`: that one)."""
    ends = {layer.until: k for k, layer in enumerate(layers)}
    first = 0  # layer of the stage
    for k, (a, b) in enumerate(pairwise(loads)):
        if not (a.place.plain and b.place.plain and a.place.layers and b.place.layers):
            return  # behind a fan nobody knows which layers are whose
        cut = ends.get(a.place.layers[-1])
        last = ends.get(b.place.layers[-1], len(layers) - 1 if k + 2 == len(loads) else None)
        if cut is None or last is None or not first <= cut < last:
            return
        parts = [*_scaled(layers[first : cut + 1], a), *_scaled(layers[cut + 1 : last + 1], b)]
        best: Change | None = None
        for at in range(len(parts) - 1):
            until = layers[first + at].until
            if first + at == cut or (only and until != only):
                continue
            moved = list(loads)
            moved[k] = a._replace(seconds=sum(parts[: at + 1]))
            moved[k + 1] = b._replace(seconds=sum(parts[at + 1 :]))
            then = _capacity(moved, cores)
            if best is None or then > best.capacity:
                text = f"{a.place.path} until {until} (now {layers[cut].until})"
                best = Change("cut", a.place.path, text, then, then / now - 1, until=until)
        if best:
            yield best
        first = cut + 1


def _scaled(layers: Sequence[Layer], load: _Load) -> list[float]:
    """Return what each layer takes, so that together they are what was measured of the stage."""
    total = sum(layer.seconds for layer in layers)
    if not total:
        return [load.seconds / len(layers)] * len(layers)
    return [layer.seconds * load.seconds / total for layer in layers]
