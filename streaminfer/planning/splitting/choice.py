"""Plans in which a stage is split over devices, where no plan of whole stages will do as well.

    plain    the planner's candidates: stages on one device each, or on replicas
    memory   a layer that fits nowhere, or a cut that fits nowhere: its parts may
    latency  a bound that no plain plan keeps: the parts of a stage answer one micro-batch sooner
    speed    where memory keeps the devices from sharing the work: rare, and worth it from GAIN on

A split is legal or not by what its layers do, and costs what its parts were measured to take. Both
are asked for few stages only (search).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from streaminfer.planning.figures import duration, size
from streaminfer.planning.predict import Candidate, How
from streaminfer.planning.splitting.cheapest import MANY
from streaminfer.planning.splitting.fans import Splitter
from streaminfer.planning.splitting.search import Known, Search, Setting

if TYPE_CHECKING:
    from streaminfer.planning.planner import Request
    from streaminfer.planning.profile import Profile

__all__ = ["GAIN", "Setting", "reasons", "refusal", "remedy", "split_plans"]

GAIN = 1.1  # x the throughput of the best plain plan, that a split has to be worth
MORE = 6  # devices, that a remedy asks for at most


def split_plans(
    plain: Sequence[Candidate],
    profile: Profile,
    request: Request,
    settings: Callable[[], Sequence[Setting]],
) -> list[Candidate]:
    """Return plans with a split stage, if they win; [] where plain plans do as well.

    Args:
        plain: the planner's candidates without a split.
        profile: of the model.
        request: what is asked; its `splitter` knows the model's graph.
        settings: one per batch size; only made where a split may win.
    """
    devices = sum(len(pool.names) for pool in request.pools)
    if request.splitter is None or devices < 2:
        return []
    asked = [c for c in plain if request.stages in (None, len(c.stages))]
    bound = request.slo_p99
    within = [c for c in asked if bound is None or c.p99 <= bound]
    best = max((c.throughput for c in within), default=0.0)
    most = max((c.throughput for c in asked), default=0.0)
    if within and best * GAIN > most and not _short_of_memory(request, profile):
        return []  # whole models side by side do as much, and need no gather
    if asked and math.prod(len(pool.names) + 1 for pool in request.pools) > MANY:
        return []  # of so many kinds of devices, the search is long: only where nothing else runs
    known = Known(request, profile, request.splitter)
    found: list[Candidate] = []
    for setting in sorted(settings(), key=lambda s: -s.batch / max(_period(s), 1e-12)):
        search = Search(setting, known)
        for quickest in (False, True) if bound is not None else (False,):
            found += search.plans(quickest, GAIN * best, bound)
    return [
        c for c in found if c.throughput >= GAIN * best and (bound is None or c.p99 <= bound)
    ] or ([] if within else found)


def reasons(best: Candidate, others: Sequence[Candidate], request: Request) -> Iterator[str]:
    """Say why stages are split: what they need whole, or what plans of whole stages do."""
    caps = {name: pool.memory for pool in request.pools for name in pool.names}
    too_large = False
    for stage in best.stages:
        if stage.split is None:
            continue
        allowed = min(caps[device] for device in stage.devices)
        each = f"each of its {len(stage.devices)} parts needs {size(stage.memory)}"
        if stage.split.whole > allowed:
            too_large = True
            yield (
                f"stage {stage.name} needs {size(stage.split.whole)} whole, a device allows "
                f"{size(allowed)}: {stage.split.how}, {each}"
            )
        else:
            yield f"stage {stage.name} is {stage.split.how}: {each}"
        yield f"to its parts and from them {stage.split.row_bytes:,} bytes per sample travel"
    plain = [c for c in others if not any(stage.split for stage in c.stages)]
    within = [c for c in plain if request.slo_p99 is None or c.p99 <= request.slo_p99]
    if within:
        rival = max(within, key=lambda c: c.throughput)
        ratio = best.throughput / rival.throughput
        yield f"predicted to do {ratio:.2f} x what the best without a split does ({rival.form})"
    elif plain and request.slo_p99 is not None:
        least = min(plain, key=lambda c: c.p99)
        yield (
            f"without a split no plan answers within {duration(request.slo_p99)} at p99; the least "
            f"predicted is {duration(least.p99)} ({least.form})"
        )
    elif not too_large:
        yield "no plan without a split fits the memory"


def remedy(profile: Profile, request: Request, setting: Setting) -> str:
    """Say how many devices a model may fit on that does not fit on those asked for; "" if none.

    Args:
        profile: of the model.
        request: what was asked, and has no plan.
        setting: of its smallest batch.
    """
    if request.splitter is None:
        return "a layer can be split over devices: split: {by: channels} in the pipeline file"
    known = Known(request, profile, request.splitter)
    problem, have = setting.problem, sum(kind.count for kind in setting.problem.kinds)
    widest = max(problem.kinds, key=lambda kind: kind.memory)
    for more in range(1, MORE + 1):
        kinds = tuple(
            replace(kind, count=kind.count + more) if kind is widest else kind
            for kind in problem.kinds
        )
        ways = Search(replace(setting, problem=replace(problem, kinds=kinds)), known).outline()
        if ways is not None:
            some = f", with a stage {' and one '.join(map(str, ways))}" if ways else ""
            return f"{have + more} devices like these may do{some}"
    return ""


def refusal(splitter: Splitter, first: int, last: int) -> str:
    """Say why the nodes of a layer cannot be split; "" if they can."""
    ways = {"by channels": How(2)} | ({"in tiles": How(2, (2, 1))} if splitter.images else {})
    found = {way: splitter.problem(first, last, how) for way, how in ways.items()}
    if not all(found.values()):
        return ""
    return "it cannot be split " + "; nor ".join(f"{way}: {why}" for way, why in found.items())


def _short_of_memory(request: Request, profile: Profile) -> bool:
    """Tell whether the whole model is too large for a device, at the largest batch."""
    most = max(node.peak_bytes for node in profile.nodes) * max(profile.batches(), default=1)
    return any(pool.memory < profile.weight_bytes + most for pool in request.pools)


def _period(setting: Setting) -> float:
    return float(min(kind.seconds.sum() for kind in setting.problem.kinds))
