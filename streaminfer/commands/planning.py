"""The commands `profile` and `plan`: measure, cut, place, predict, try, write."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from streaminfer.commands.asked import Asked, bound_of, caps_of, edge_of, link_of, share_of
from streaminfer.commands.engine import Engine, apart, measure_engine
from streaminfer.commands.messages import files
from streaminfer.commands.plans import warn
from streaminfer.commands.records import Input, images
from streaminfer.commands.road import KAFKA, LOCAL, hop
from streaminfer.commands.simulate import KAFKA as TRANSIT
from streaminfer.commands.timing import time_decode
from streaminfer.commands.tryout import try_out
from streaminfer.errors import ConfigError
from streaminfer.planning.codecs import (
    CODECS,
    Codec,
    Drift,
    Dtype,
    EdgeChoice,
    best_codec,
    choose_dtypes,
)
from streaminfer.planning.finalists import choose
from streaminfer.planning.forecast import scenario
from streaminfer.planning.placement import pipeline_file
from streaminfer.planning.planner import Answer, Edge, Pool, Request, plan
from streaminfer.planning.predict import Candidate, Machine, Measured
from streaminfer.planning.profile import Link, Profile
from streaminfer.planning.profiler import (
    BATCHES,
    Captured,
    Place,
    capture_model,
    example_tensors,
    places,
    profile,
)
from streaminfer.planning.report import Page
from streaminfer.planning.simulation.scenario import Link as Transit
from streaminfer.planning.splitting.parts import Parts
from streaminfer.planning.subject import Subject, subject
from streaminfer.planning.timing import Runner, available_memory, cores
from streaminfer.runtime.postprocess import batches_of
from streaminfer.spec import PipelineSpec

__all__ = ["Outcome", "make_plan", "make_profile", "write"]

CALIBRATION = 64  # seeded rows where no images are given
TRIED = 4  # candidates
BATCH = 16  # rows of calibration in one pass
SHARED = ("memory", "local")  # links of one process: its workers share an event loop


@dataclass(frozen=True)
class Outcome:
    """What was planned, and all that it rests on."""

    subject: Subject
    profile: Profile
    request: Request
    answer: Answer
    edges: dict[int, Edge]
    choices: Sequence[EdgeChoice] = ()
    drift: Drift | None = None
    measured: dict[int, Measured] = field(default_factory=dict)  # by place in `candidates`
    outputs: int = 0
    random_weights: bool = False

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The best, then the others."""
        return (self.answer.best, *self.answer.others)

    def text(self, folder: Path) -> str:
        """Return the pipeline file, for a folder."""
        return pipeline_file(
            self.subject,
            self.answer.best,
            self.edges,
            self.answer.why,
            folder,
            outputs=self.outputs,
        )


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """Give `say(what, done, total)`, which draws a bar on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task("capturing the model", total=None)

        def say(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield say


def make_profile(asked: Asked, *, quiet: bool = False) -> tuple[Subject, Profile, list[Place]]:
    """Measure a model on devices, the links and the decoding of its input."""
    with _progress(quiet) as say:
        known, _, found, where = _measured(asked, say)
    return known, found, where


def _measured(asked: Asked, say: Any) -> tuple[Subject, Captured, Profile, list[Place]]:
    known = subject(asked.model, asked.kwargs, asked.example)
    where = places(asked.devices)
    link = link_of(asked)
    captured = capture_model(known.spec, random_weights=asked.random_weights)
    wide = [_wide(place) for place in where if place.names.count("cpu") > 1]
    found = profile(
        captured,
        [*where, *(w for w in wide if w.threads > 1)],
        batches=BATCHES,
        also=(asked.batch,) if asked.batch else (),
        cached=not asked.fresh,
        say=say,
        warn=warn,
    )
    say("links", 1, 1)
    links = [LOCAL, asyncio.run(hop(known.spec))]
    links.append(asyncio.run(hop(known.spec, asked.kafka)) if asked.kafka else KAFKA)
    if link:
        links.append(link)
    found = found.model_copy(update={"links": tuple(links), "ingest": _ingest(known.spec)})
    return known, captured, found, where


def _ingest(spec: PipelineSpec) -> float:
    """Return the seconds that decoding one input record takes, in one thread."""
    decoded = images(spec) if spec.input.decode == "image" else ()
    return time_decode(spec.input, [Input(one) for one in decoded])


def _machine(known: Subject, found: Profile, outputs: int, link: Link) -> Machine:
    """Measure what stands around the model on this machine."""
    spec = known.spec
    named = "output" in known.document or spec.path is not None
    top_k = spec.output.top_k if named else min(5, outputs)
    values = found.output_bytes // 4
    engine: Engine = asyncio.run(
        measure_engine(
            spec, found.batches(), outputs=outputs or values, top_k=top_k, cores=float(cores())
        )
    )
    host, transit = engine.host, Transit()
    if link.name in SHARED:
        host = replace(host, nbyte=link.per_byte / 2)
    else:
        host, transit = apart(host), replace(TRANSIT, beta=link.per_byte)
    return Machine(
        cores(),
        spec.batch.wait,
        host=host,
        calls=engine.calls,
        after=engine.after,
        transit=transit,
        partitions=spec.kafka.partitions,
        memory=spec.memory,
        top_k=top_k,
    )


def _wide(place: Place) -> Place:
    """One CPU worker that has all the cores, beside several that share them."""
    return Place(("cpu",), place.hardware, cores())


def make_plan(asked: Asked, *, quiet: bool = False) -> Outcome:
    """Profile, cut, place, predict; choose dtypes and codecs and try if asked.

    Raises:
        ConfigError: a flag is wrong, or no plan is possible; says why.
    """
    slo, drop = bound_of(asked.slo), share_of(asked.max_drop)
    edge = edge_of(asked.codec)
    with _progress(quiet) as say:
        known, captured, found, where = _measured(asked, say)
        kafka = bool(known.spec.kafka.bootstrap or asked.kafka)
        name = asked.link or ("kafka" if kafka else "memory")
        say("the engine around it", 0, 1)
        outputs = _classes(captured)
        request = Request(
            pools=_pools(found, where, asked.memory),
            link=found.link(name),
            machine=_machine(known, found, outputs, found.link(name)),
            stages=asked.stages,
            batch=asked.batch,
            slo_p99=slo,
            edge=edge,
            wide=found.devices[len(where)] if len(found.devices) > len(where) else None,
            splitter=Parts(captured),
        )
        outcome = Outcome(
            known,
            found,
            request,
            plan(found, request),
            {},
            outputs=outputs,
            random_weights=asked.random_weights,
        )
        outcome = replace(outcome, edges=dict.fromkeys(_cuts(outcome.answer.best), edge))
        if asked.codec == "auto":
            say("drift of dtypes", 0, 1)
            outcome = _with_dtypes(outcome, captured, drop, asked.calibrate)
        if asked.tries:
            outcome = _tried(outcome, say)
    return outcome


def _cuts(candidate: Candidate, *, by_split: bool = True) -> list[int]:
    """Return where it is cut; or but for the cuts beside a split: parts are not what crosses it."""
    pairs = zip(candidate.stages, candidate.stages[1:], strict=False)
    return [a.last for a, b in pairs if by_split or not (a.split or b.split)]


def _with_dtypes(outcome: Outcome, captured: Captured, drop: float, folder: str | None) -> Outcome:
    """Choose each edge's dtype by drift, its codec by the link, and plan again with them.

    Dtypes change what crossing costs and so perhaps the cut; it is planned again once.
    """
    runner = Runner(captured.cutter, torch.device("cpu"))
    rows = _calibration(captured, folder)
    link = outcome.request.link

    def hop(cut: int, dtype: Dtype) -> tuple[Codec, float]:
        point = next(c for c in outcome.profile.cuts if c.position == cut)
        found = {codec: outcome.profile.encoding(cut, dtype, codec) for codec in CODECS}
        return best_codec(found, link, outcome.answer.best.batch * point.row_bytes)

    def chosen(cuts: list[int]) -> tuple[dict[int, Edge], list[EdgeChoice], Drift | None]:
        if not cuts:
            return {}, [], None
        choices, together = choose_dtypes(
            runner, captured.cutter, cuts, rows, drop, lambda cut, dtype: hop(cut, dtype)[1]
        )
        edges = {c.position: Edge(c.dtype, hop(c.position, c.dtype)[0]) for c in choices}
        return edges, choices, together

    def native(candidate: Candidate) -> dict[int, Edge]:
        return dict.fromkeys(set(_cuts(candidate)) - set(_cuts(candidate, by_split=False)), Edge())

    first, _, _ = chosen(_cuts(outcome.answer.best, by_split=False))
    first |= native(outcome.answer.best)
    common = min(first.values(), key=lambda e: e.dtype == "native", default=Edge())
    request = replace(outcome.request, edge=common, edges=first)
    answer = plan(outcome.profile, request)
    edges, choices, together = chosen(_cuts(answer.best, by_split=False))
    edges |= native(answer.best)
    request = replace(request, edges=edges)
    why = (*answer.why, *_drift_lines(choices, edges, together, folder))
    if native(answer.best):
        why = (*why, "edges beside a split stay native: drift is measured on what crosses a cut")
    return replace(
        outcome,
        request=request,
        answer=replace(answer, why=why),
        edges=edges,
        choices=choices,
        drift=together,
    )


def _drift_lines(
    choices: Sequence[EdgeChoice],
    edges: dict[int, Edge],
    together: Drift | None,
    folder: str | None,
) -> Iterator[str]:
    if together is None:
        return
    source = f"images of {folder}" if folder else "rows of seeded input (--calibrate takes images)"
    measure = "of the top-1 answers change" if together.classes else "RMS error in deviations"
    kinds = ", ".join(
        f"{edges[c.position].dtype}"
        + (f" + {edges[c.position].codec}" if edges[c.position].codec != "none" else "")
        for c in choices
    )
    yield (
        f"edges as {kinds}: {together.drop:.2%} {measure}, largest error {together.max_abs:.1e}, "
        f"on {together.samples} {source}"
    )


def _calibration(captured: Captured, folder: str | None) -> list[list[torch.Tensor]]:
    """Return batches of every input of the model."""
    source = captured.spec.input
    if folder is None:
        rows = example_tensors(captured, CALIBRATION)
    else:
        if source.decode != "image":
            raise ConfigError("the pipeline takes tensors, not images", where="--calibrate")
        values = [value for _, value in files([folder])]
        ranges = captured.spec.first_model.examples()["0"].ranges
        found = batches_of(values, source, ranges)
        return [[t[k : k + BATCH]] for t in found for k in range(0, len(t), BATCH)]
    return [[t[k : k + BATCH] for t in rows] for k in range(0, len(rows[0]), BATCH)]


def _tried(outcome: Outcome, say: Any) -> Outcome:
    """Run the best few and rank them by what was measured."""
    candidates = list(outcome.candidates)[:TRIED]
    here = outcome.request  # its loads are tried on the memory bus, whatever the link
    results = try_out(
        outcome.subject,
        candidates,
        [scenario(one, outcome.profile, here) for one in candidates],
        outcome.edges,
        outputs=outcome.outputs,
        random_weights=outcome.random_weights,
        say=say,
    )
    by = dict(zip(map(id, candidates), results, strict=True))
    real = [
        replace(c, throughput=by[id(c)].throughput, p50=by[id(c)].p50, p99=by[id(c)].p99)
        for c in candidates
    ]
    allowed = [
        k
        for k, c in enumerate(real)
        if outcome.request.stages in (None, len(c.stages))
        and (outcome.request.slo_p99 is None or c.p99 <= outcome.request.slo_p99)
    ] or [0]
    chosen = choose([real[k] for k in allowed])
    first = next(k for k in allowed if real[k] is chosen)
    order = [
        first,
        *sorted((k for k in range(len(real)) if k != first), key=lambda k: -real[k].throughput),
    ]
    ranked = [candidates[k] for k in order] + list(outcome.candidates)[TRIED:]
    said = (
        f"tried on this machine: {real[first].throughput:,.1f} samples a second measured, "
        f"{candidates[first].throughput:,.1f} predicted"
    )
    why = outcome.answer.why
    if first != 0:
        why = (f"chosen by trial over {candidates[0].form}, which was predicted to be better",)
    return replace(
        outcome,
        answer=Answer(ranked[0], tuple(ranked[1:]), (*why, said)),
        measured={place: results[k] for place, k in enumerate(order)},
    )


def _pools(found: Profile, where: Sequence[Place], memory: str | None) -> tuple[Pool, ...]:
    caps = caps_of(memory, [name for place in where for name in place.names])
    pools = []
    for place, device in zip(where, found.devices, strict=False):
        share = len(place.names) if place.names[0] == "cpu" else 1  # workers of one memory
        free = available_memory(place.device) / share
        asked = [caps[name] for name in place.names if name in caps]
        pools.append(Pool(device, place.names, min(asked, default=free)))
    return tuple(pools)


def _classes(captured: Captured) -> int:
    """Return the classes of a model with one output [batch, classes]; 0 for raw outputs."""
    outputs = [node.meta["val"] for node in captured.graph.outputs.values()]
    if len(outputs) == 1 and outputs[0].dim() == 2 and outputs[0].is_floating_point():
        return int(outputs[0].shape[1])
    return 0


def write(outcome: Outcome, file: Path | None, report: Path | None) -> None:
    """Write the pipeline file and the report, where they are asked for."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(outcome.text(file.parent.resolve()), encoding="utf-8")
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        page = Page(
            title=outcome.subject.spec.pipeline,
            profile=outcome.profile,
            request=outcome.request,
            answer=outcome.answer,
            edges=outcome.edges,
            choices=outcome.choices,
            measured=outcome.measured,
        )
        report.write_text(page.html(), encoding="utf-8")
