"""Profile + devices → the best way to run a model, the runners-up, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from streaminfer.errors import ConfigError
from streaminfer.planning.codecs import Codec, Dtype
from streaminfer.planning.figures import duration, size
from streaminfer.planning.finalists import CLOSE, Foresee, choose, finalists, in_time, is_asked
from streaminfer.planning.forecast import forecast
from streaminfer.planning.partitioner import (
    Kind,
    Partition,
    Problem,
    Share,
    ideal,
    least_memory,
    solve,
)
from streaminfer.planning.predict import BUFFERS, Candidate, Machine, PlacedStage, predict
from streaminfer.planning.profile import DeviceProfile, Link, Profile
from streaminfer.planning.splitting.choice import Setting, reasons, refusal, remedy, split_plans
from streaminfer.planning.splitting.fans import Splitter

__all__ = ["Answer", "Edge", "Pool", "Request", "plan"]

MANY = 100  # states of devices used, from which on only the best number of stages is looked at
MOST_STAGES = 4  # beyond the best, each number of stages up to this is looked at
NAMES = {1: ("all",), 2: ("stem", "head"), 3: ("stem", "trunk", "head")}


@dataclass(frozen=True)
class Pool:
    """Devices that are alike, their profile and the memory that may be used on each."""

    profile: DeviceProfile
    names: tuple[str, ...]
    memory: float


@dataclass(frozen=True)
class Edge:
    """How activations travel."""

    dtype: Dtype = "native"
    codec: Codec = "none"


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    pools: tuple[Pool, ...]
    link: Link
    machine: Machine
    stages: int | None = None
    batch: int | None = None
    slo_p99: float | None = None  # seconds
    edge: Edge = Edge()
    edges: Mapping[int, Edge] = field(default_factory=dict)  # by position, over `edge`
    wide: DeviceProfile | None = None  # one CPU worker that has all the cores
    splitter: Splitter | None = None  # knows the model's graph; None: no stage is split


@dataclass(frozen=True)
class Answer:
    """The best candidate, and others in the order of their throughput."""

    best: Candidate
    others: tuple[Candidate, ...]
    why: tuple[str, ...]


def plan(profile: Profile, request: Request, foresee: Foresee = forecast) -> Answer:
    """Find the best way to run a model.

    Args:
        profile: of the model.
        request: what is asked.
        foresee: says what the finalists will do; by default they are simulated.

    Raises:
        ConfigError: no plan fits the memory, the latency or the number of stages asked for.
    """
    shown, tried = finalists(list(_candidates(profile, request)), profile, request, foresee)
    split = split_plans(tried, profile, request, lambda: _settings(profile, request))
    more = finalists(split, profile, request, foresee)
    shown, tried = shown + more[0], tried + more[1]
    if not tried:
        raise _too_little(profile, request)
    if not any(is_asked(c, request) for c in tried):
        raise _no_such_split(profile, request)
    within = [c for c in shown if is_asked(c, request) and in_time(c, request)]
    if not within:
        least = min((c for c in tried if is_asked(c, request)), key=lambda c: c.p99)
        raise ConfigError(
            f"no plan answers within {duration(request.slo_p99 or 0)} at p99; the least predicted "
            f"is {duration(least.p99)}: {least.form}, batch {least.batch}",
            where="--slo",
            hint="a longer bound, a faster device, or a smaller model",
        )
    best = choose(within)
    others = tuple(sorted((c for c in shown if c is not best), key=lambda c: -c.throughput))
    return Answer(best, others, tuple(_why(best, others, profile, request)))


def _settings(profile: Profile, request: Request) -> list[Setting]:
    """Return, for each batch size, what it takes to look for stages that are split."""

    def crossing(position: int | None, nbytes: float) -> tuple[float, float]:
        half = request.link.seconds(nbytes) / 2  # of the input, which travels as it is
        return (half, half) if position is None else _crossing(profile, request, position, nbytes)

    def setting(batch: int) -> Setting:
        problem = _problem(profile, request, request.pools, batch)

        def place(found: Partition) -> list[PlacedStage]:
            return _placed(found, problem, request.pools, profile, request)

        return Setting(batch, problem, crossing, place)

    return [setting(batch) for batch in profile.batches() if request.batch in (None, batch)]


def _candidates(profile: Profile, request: Request) -> Iterator[Candidate]:
    sizes = [b for b in profile.batches() if request.batch in (None, b)]
    if not sizes:
        known = ", ".join(map(str, profile.batches()))
        raise ConfigError(
            f"batch {request.batch} was not profiled", where="--batch", hint=f"profiled: {known}"
        )
    problems = {batch: _problem(profile, request, request.pools, batch) for batch in sizes}
    # No batch size whose work, ideally divided, is slower than what was found can be the best one.
    bounds = {batch: batch / ideal(problem) for batch, problem in problems.items()}
    most = 0.0
    for batch in sorted(sizes, key=lambda b: -bounds[b]):
        if request.slo_p99 is None and bounds[batch] < CLOSE * most:
            continue
        for candidate in _of_batch(problems[batch], profile, request, batch):
            if request.stages in (None, len(candidate.stages)):
                most = max(most, candidate.throughput)
            yield candidate


def _of_batch(
    problem: Problem, profile: Profile, request: Request, batch: int
) -> Iterator[Candidate]:
    """Yield the best partition, the best of each small number of stages, and one device alone."""
    total = sum(len(pool.names) for pool in request.pools)
    states = math.prod(len(pool.names) + 1 for pool in request.pools)
    few = range(1, min(total, MOST_STAGES) + 1) if states <= MANY else (1,)
    counts = [None, *few]
    if request.stages and request.stages not in counts:
        counts.append(request.stages)
    seen: set[object] = set()
    for stages in counts:
        found = solve(problem, stages=stages)
        if found and found.stages not in seen:
            seen.add(found.stages)
            yield _candidate(found, problem, request.pools, profile, request, batch)
    for pool in request.pools:  # a device that has the machine for itself
        one = (replace(pool, names=pool.names[:1]),)
        problem = _problem(profile, request, one, batch)
        if found := solve(problem, stages=1):
            yield _candidate(found, problem, one, profile, request, batch)
    yield from _wide(profile, request, batch)


def _wide(profile: Profile, request: Request, batch: int) -> Iterator[Candidate]:
    """One CPU worker with all the cores: the simplest answer of all."""
    wide = request.wide
    if wide is None or wide.timing(batch) is None:
        return
    pool = Pool(wide, ("cpu",), next(p.memory for p in request.pools if p.names[0] == "cpu"))
    problem = _problem(profile, request, (pool,), batch)
    if found := solve(problem, stages=1):
        yield _candidate(found, problem, (pool,), profile, request, batch)


def _problem(profile: Profile, request: Request, pools: Sequence[Pool], batch: int) -> Problem:
    kinds = []
    near = sum(len(pool.names) for pool in pools if pool.profile.device == "cpu") > 1
    for pool in pools:
        timing = pool.profile.timing(batch)
        if timing is None:
            raise ConfigError(f"{pool.profile.device} was not profiled at batch {batch}")
        fixed = request.machine.calls.seconds(batch)
        seconds = (timing.beside if near else ()) or timing.seconds
        kinds.append(Kind(len(pool.names), np.array(seconds), pool.memory, fixed))
    rows = np.array(
        [profile.input_bytes, *(c.row_bytes for c in profile.cuts), profile.output_bytes]
    )
    costs = [
        _crossing(profile, request, cut.position, batch * cut.row_bytes) for cut in profile.cuts
    ]
    return Problem(
        kinds=tuple(kinds),
        ends=np.array([-1, *(c.position for c in profile.cuts), len(profile.nodes) - 1]),
        receive=np.array([0.0, *(receive for receive, _ in costs), 0.0]),
        send=np.array([0.0, *(send for _, send in costs), 0.0]),
        held=BUFFERS * batch * rows.astype(float),
        weights=np.array([float(n.weight_bytes) for n in profile.nodes]),
        peaks=batch * np.array([float(n.peak_bytes) for n in profile.nodes]),
        ties=profile.ties,
    )


def _crossing(
    profile: Profile, request: Request, position: int, nbytes: float
) -> tuple[float, float]:
    """Return seconds to receive and to send a micro-batch at a cut: codec, half the link each."""
    edge = request.edges.get(position, request.edge)
    encoding = profile.encoding(position, edge.dtype, edge.codec)
    half = request.link.seconds(nbytes * encoding.ratio) / 2
    return half + nbytes * encoding.decode, half + nbytes * encoding.encode


def _candidate(
    found: Partition,
    problem: Problem,
    pools: Sequence[Pool],
    profile: Profile,
    request: Request,
    batch: int,
) -> Candidate:
    stages = _placed(found, problem, pools, profile, request)
    return predict(stages, batch, profile, request.link, request.machine)


def _placed(
    found: Partition,
    problem: Problem,
    pools: Sequence[Pool],
    profile: Profile,
    request: Request,
) -> list[PlacedStage]:
    free = [list(pool.names) for pool in pools]
    names = NAMES.get(len(found.stages)) or (
        "stem", *(f"trunk{k}" for k in range(1, len(found.stages) - 1)), "head",
    )  # fmt: skip
    stages = []
    for name, share in zip(names, found.stages, strict=True):
        devices = [free[kind].pop(0) for kind, n in enumerate(share.group) for _ in range(n)]
        used = [kind for kind, n in enumerate(share.group) if n]
        first, last = int(problem.ends[share.first]) + 1, int(problem.ends[share.last])
        end = share.last - 1  # index of its cut
        inner = end < len(profile.cuts)
        edge = request.edges.get(last, request.edge)
        ratio = profile.encoding(last, edge.dtype, edge.codec).ratio if inner else 1.0
        row = profile.cuts[end].row_bytes if inner else profile.output_bytes
        stages.append(
            PlacedStage(
                name=name,
                first=first,
                last=last,
                until=profile.cuts[end].layer if inner else None,
                devices=tuple(devices),
                threads=max(pools[kind].profile.threads for kind in used),
                compute=max(
                    float(problem.kinds[kind].seconds[first : last + 1].sum()) for kind in used
                ),
                receive=float(problem.receive[share.first]),
                send=float(problem.send[share.last]),
                period=share.seconds,
                weight_bytes=sum(n.weight_bytes for n in profile.nodes[first : last + 1]),
                memory=float(problem.memory[share.first, share.last]),
                row_bytes=round(row * ratio),
                shares=_speeds(problem, share, first, last) if len(used) > 1 else (),
            )
        )
    return stages


def _speeds(problem: Problem, share: Share, first: int, last: int) -> tuple[float, ...]:
    """Return how fast each replica of a stage is, the slowest 1, in the order of its devices."""
    hops = float(problem.receive[share.first] + problem.send[share.last])
    seconds = [
        float(problem.kinds[kind].seconds[first : last + 1].sum()) + hops
        for kind, n in enumerate(share.group)
        for _ in range(n)
    ]
    return tuple(round(max(seconds) / each, 2) for each in seconds)


def _why(
    best: Candidate, others: Sequence[Candidate], profile: Profile, request: Request
) -> Iterator[str]:
    if best.limit == "cores":
        cores = request.machine.cores
        yield f"the CPU limits: all stages and hops together keep its {cores} cores busy"
    elif best.limit == "event loop":
        yield "the event loop limits: the stages are quicker than what stands between them"
    else:
        stage = next(s for s in best.stages if s.name == best.limit)
        copies = f", on {len(stage.devices)} devices" if len(stage.devices) > 1 else ""
        service = f"{duration(stage.service)} per micro-batch of {best.batch}"
        yield f"stage {stage.name} limits: {service}{copies}"
    whole = [c for c in others if len(c.stages) == 1]
    if any(stage.split for stage in best.stages):
        yield from reasons(best, others, request)
    elif len(best.stages) == 1:
        yield "the model fits on each device: cutting it wins nothing, and no bytes cross a link"
    elif not whole:
        need = size(profile.weight_bytes)
        yield f"whole, the model does not fit on a device (its weights are {need}), so it is cut"
    else:
        ratio = best.throughput / whole[0].throughput
        better = f"{ratio:.2f} x" if ratio >= 1 else f"only {ratio:.2f} x"
        yield f"predicted to do {better} what the best way without a cut does ({whole[0].form})"
    for stage in best.stages[:-1]:
        link = f"{request.link.name}, {request.link.source}"
        yield (
            f"behind {stage.until} {stage.row_bytes:,} bytes per sample cross; a micro-batch of "
            f"them costs {duration(stage.send)} on each side ({link})"
        )


def _too_little(profile: Profile, request: Request) -> ConfigError:
    """Say by how much the memory is too little, and for which layer."""
    batch = min(b for b in profile.batches() if request.batch in (None, b))
    problem = _problem(profile, request, request.pools, batch)
    total = sum(len(pool.names) for pool in request.pools)
    factor, first, last = least_memory(problem, min(total, request.stages or total))
    need = float(problem.memory[first, last])
    most = max(pool.memory for pool in request.pools)
    start, end = int(problem.ends[first]) + 1, int(problem.ends[last])
    heavy = max(range(start, end + 1), key=lambda p: profile.nodes[p].weight_bytes)
    layer = profile.nodes[heavy].layer or profile.nodes[heavy].name
    own = profile.nodes[heavy].weight_bytes
    alone = last == first + 1
    what = f"layer {layer!r} alone" if alone else f"the stage with layer {layer!r}"
    return ConfigError(
        f"no plan fits: even cut best over {total} device(s), {what} needs {size(need)} "
        f"at batch {batch} ({size(own)} of it are weights of {layer!r}); the devices allow "
        f"{size(most)} each: {size(need - most)} too little",
        where="--memory",
        hint="; ".join(
            filter(
                None,
                (
                    remedy(profile, request, _settings(profile, request)[0]),
                    refusal(request.splitter, start, end) if alone and request.splitter else "",
                    f"{factor:.2f} x the memory" + (" or a smaller --batch" if batch > 1 else ""),
                ),
            )
        ),
    )


def _no_such_split(profile: Profile, request: Request) -> ConfigError:
    total = sum(len(pool.names) for pool in request.pools)
    wanted = request.stages or 1
    if wanted > total:
        return ConfigError(
            f"{wanted} stages need {wanted} devices; {total} are named",
            where="--stages",
            hint="name more devices (cpu,cpu,cpu are three workers that share the cores)",
        )
    return ConfigError(
        f"no cut into {wanted} stages fits: the model has {len(profile.cuts)} places to cut it "
        "behind a layer, and the memory allows none of their combinations",
        where="--stages",
    )
