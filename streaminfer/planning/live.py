"""What a running pipeline measures → whether a change is worth it. Pure: readings in, advice out.

    looks at /metrics    │◀── first half ──▶│◀── second half ──▶│
    of each cell         seconds a sample, samples, queue, bytes
    capacity             the least of: replicas ÷ seconds of a cell; cores ÷ seconds of all

Advice is given only where the limit is loaded, the same in both halves, and where in both of them
the gain is above what the user calls worth it: else a pipeline would be turned over for noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from streaminfer.errors import ConfigError
from streaminfer.metrics import Reading

__all__ = ["Advice", "CellRate", "Change", "Layer", "Live", "Look", "Place", "advise", "between"]

HOT = 0.7  # 0-1 of the time: below it what limits a pipeline is the load, not a cell
SAMPLES = 200  # that have to come through while it is measured
BATCHES = 20  # of the cell that limits
NEAR = 0.75  # of the best change's gain: as good, so that what it asks for decides
COSTS = ("cut", "whole", "replica")  # nothing, memory for the whole model, one more device
STAGE = "streaminfer_stage_"
Verdict = Literal["change", "leave", "measure longer"]


class Look(NamedTuple):
    """What all workers said at a time."""

    at: float  # seconds of a monotonic clock
    readings: Sequence[Reading]


class Place(NamedTuple):
    """Where a cell of the plan runs."""

    name: str
    path: str  # as declared; of what joins parts, that of its worker
    worker: str
    replicas: int
    threads: int = 1
    on_cpu: bool = True
    plain: bool = True  # layers in a row, that may be cut elsewhere
    layers: tuple[str, ...] = ()
    fixed: bool = False  # of one replica always: a worker that only joins parts


class Layer(NamedTuple):
    """What lies between two legal cuts: `until` ends it ("": the model's end)."""

    until: str
    seconds: float  # of a sample, as it was profiled


@dataclass(frozen=True)
class CellRate:
    """A cell between two looks, all its replicas together."""

    samples: float
    batches: float
    seconds: float  # of its device threads: decode, compute, encode
    queue: float  # samples that wait for it, at the second look
    bytes_in: float = 0.0  # of its worker, where it is the first there
    bytes_out: float = 0.0

    @property
    def each(self) -> float:
        """Seconds of a sample; nan if none came."""
        return self.seconds / self.samples if self.samples else math.nan


@dataclass(frozen=True)
class Live:
    """What happened between two looks."""

    span: float  # seconds
    answered: float  # samples
    lag: float  # records behind, of all workers, at the second look
    growth: float  # of it
    cells: Mapping[str, CellRate]


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


# ---- from looks to rates -------------------------------------------------------------------------


def between(before: Look, after: Look, pipeline: str, places: Sequence[Place]) -> Live:
    """Return what happened between two looks.

    Raises:
        ConfigError: a cell of the plan is missing, the metrics are another pipeline's, or a worker
            was started anew meanwhile.
    """
    old, new = _sums(before.readings, pipeline), _sums(after.readings, pipeline)
    if missing := [p.name for p in places if (p.name, "batches_total") not in new]:
        raise ConfigError(
            f"nobody measures {', '.join(missing)}",
            where="--from-metrics",
            hint="name every worker's address, or the file that `streaminfer run` wrote of them",
        )

    def gain(stage: str, *names: str) -> float:
        found = sum(new.get((stage, n), 0.0) - old.get((stage, n), 0.0) for n in names)
        if found < 0:
            raise ConfigError(
                f"{stage} was started anew while it was measured",
                where="--from-metrics",
                hint="measure again once it runs",
            )
        return found

    cells = {
        p.name: CellRate(
            samples=gain(p.name, "batch_size_samples_sum"),
            batches=gain(p.name, "batches_total"),
            seconds=gain(p.name, "busy_seconds_total"),
            queue=new.get((p.name, "queue_samples"), 0.0),
            bytes_in=gain(p.name, "received_bytes_total") if p.name == p.worker else 0.0,
            bytes_out=gain(p.name, "sent_bytes_total") if p.name == p.worker else 0.0,
        )
        for p in places
    }
    lag = sum(value for (_, name), value in new.items() if name == "lag")
    behind = sum(value for (_, name), value in old.items() if name == "lag")
    span = max(1e-9, after.at - before.at)
    return Live(span, gain("sink", "samples_total"), lag, lag - behind, cells)


def _sums(readings: Iterable[Reading], pipeline: str) -> dict[tuple[str, str], float]:
    """Return each stage's numbers, summed over its replicas."""
    found: dict[tuple[str, str], float] = {}
    others: set[str] = set()
    for name, labels, value in readings:
        if labels.get("pipeline", pipeline) != pipeline:
            others.add(labels["pipeline"])
            continue
        if name == "streaminfer_consumer_lag_records":
            short = "lag"
        elif name.startswith(STAGE) and "le" not in labels:
            short = name.removeprefix(STAGE)
        else:
            continue
        if short == "busy_seconds_total" and labels["activity"] == "produce":
            continue  # the event loop's, not the device's
        key = labels["stage"], short
        found[key] = found.get(key, 0.0) + value
    if others and not found:
        raise ConfigError(
            f"these are the metrics of {', '.join(sorted(others))}, not of {pipeline}",
            where="--from-metrics",
        )
    return found


# ---- from rates to advice ------------------------------------------------------------------------


class _Load(NamedTuple):
    """A cell and the seconds that it spends for each sample of the input."""

    place: Place
    seconds: float

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
    whole = _together(halves)
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
        grows = whole.growth > 0.05 * samples
        why = (
            f"the lag grows, but {name}, the slowest, works {busy:.0%} of the time: it is no "
            "device that limits; look at the event loop, the window and the link"
            if grows
            else f"{name} is the slowest and works {busy:.0%} of the time: it can carry "
            f"{capacity:,.1f} samples a second, and {rate:,.1f} come"
        )
        return said("leave", why, notes=tuple(notes))
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


def _together(halves: Sequence[Live]) -> Live:
    cells = {
        name: CellRate(
            samples=sum(half.cells[name].samples for half in halves),
            batches=sum(half.cells[name].batches for half in halves),
            seconds=sum(half.cells[name].seconds for half in halves),
            queue=halves[-1].cells[name].queue,
            bytes_in=sum(half.cells[name].bytes_in for half in halves),
            bytes_out=sum(half.cells[name].bytes_out for half in halves),
        )
        for name in halves[0].cells
    }
    return Live(
        sum(half.span for half in halves),
        sum(half.answered for half in halves),
        halves[-1].lag,
        sum(half.growth for half in halves),
        cells,
    )


def _loads(live: Live, places: Sequence[Place]) -> list[_Load]:
    """Return what each cell spends for a sample of the input: those behind an exit, for fewer."""
    came, plain = live.cells[places[0].name].samples, all(p.plain for p in places)
    rows = {p.name: live.cells[p.name].samples if plain else came for p in places}
    return [_Load(p, live.cells[p.name].seconds / max(1.0, rows[p.name])) for p in places]


def _capacity(loads: Sequence[_Load], cores: float | None) -> float:
    """Return the most samples a second: the bottleneck law, and the cores that all share."""
    least = min(load.capacity for load in loads)
    work = _cpu_work(loads)
    return min(least, cores / work) if cores and work else least


def _cpu_work(loads: Sequence[_Load]) -> float:
    return sum(load.seconds * load.place.threads for load in loads if load.place.on_cpu)


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
        then = _capacity([_Load(one, sum(load.seconds for load in loads))], cores)
        text = f"one stage with {devices} replicas, if the whole model fits on each device"
        yield Change("whole", "", text, then, then / now - 1, devices)


def _replica(loads: Sequence[_Load], cores: float | None, now: float) -> Iterator[Change]:
    """One more replica of what limits: of its whole worker, and of all parts of a split stage."""
    slow = min(loads, key=lambda load: load.capacity).place
    if slow.fixed:
        return
    workers = {load.place.worker for load in loads if load.place.path == slow.path}
    more = [_Load(p._replace(replicas=p.replicas + (p.worker in workers)), s) for p, s in loads]
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
            moved[k] = _Load(a.place, sum(parts[: at + 1]))
            moved[k + 1] = _Load(b.place, sum(parts[at + 1 :]))
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
