"""Commands about the plan: build, verify, list cuts, create and check topics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from streaminfer.client import connect
from streaminfer.commands.messages import files
from streaminfer.errors import ConfigError
from streaminfer.plan import Plan
from streaminfer.planning.source import ensure
from streaminfer.ranges import Range, describe
from streaminfer.topics import Difference, diff, topic_specs
from streaminfer.topology import build

if TYPE_CHECKING:
    from streaminfer.planning.cuts import CutRow
    from streaminfer.planning.verify import VerifyReport
    from streaminfer.spec import ModelSpec, PipelineSpec

__all__ = [
    "console",
    "cuts",
    "plan_of",
    "print_cuts",
    "print_plan",
    "print_verified",
    "topics_apply",
    "topics_diff",
    "verify",
]

console = Console()


def plan_of(spec: PipelineSpec, folder: Path | None, random_weights: bool) -> tuple[Path, Plan]:
    """Return the plan's directory and the plan, built now if there is none of this spec."""
    where = folder or Path(".streaminfer") / "plans" / spec.pipeline
    plan = ensure(spec, where, random_weights=random_weights)
    if plan.random_weights:
        warn(f"RANDOM WEIGHTS: the predictions of {spec.pipeline} mean nothing (--random-weights)")
    return where, plan


def warn(text: str) -> None:
    Console(stderr=True).print(f"[bold yellow]warning[/] {text}", highlight=False)


def verify(
    spec: PipelineSpec,
    images: Sequence[str],
    folder: Path | None,
    random_weights: bool,
    device: str = "cpu",
) -> VerifyReport:
    """Compare the cut model with the whole one, on real images or random input."""
    from streaminfer.planning.verify import verify as compare
    from streaminfer.runtime.compute import device_of
    from streaminfer.runtime.postprocess import batches_of

    there = device_of(device, "--device")
    where, plan = plan_of(spec, folder, random_weights)
    values = [value for _, value in files(images)]
    ranges = plan.stages[0].inputs[0].ranges
    batches = batches_of(values, spec.input, ranges) if values else None
    return compare(spec, where, images=batches, device=there)


def print_verified(report: VerifyReport) -> None:
    """Say what was compared and what came out."""
    verdict = "[bold green]holds[/]" if report.holds else "[bold red]does not hold[/]"
    how = "bit for bit" if report.equal else f"within {report.max_abs:.1e}"
    allowed = f" (tolerance {report.tolerance:.1e})" if report.tolerance else ""
    console.print(
        f"{verdict}  {report.stages} stages give what the whole model gives, {how}{allowed}, "
        f"at batch sizes {', '.join(map(str, report.batch_sizes))}; {report.samples} samples"
        + (f" of {', '.join(map(str, map(list, report.sizes)))}" if report.sizes else "")
    )
    if report.top1_agreement is not None:
        console.print(
            f"top-1 agreement {report.top1_agreement:.4f}   max |Δ| {report.max_abs:.1e}   "
            f"relative {report.max_rel:.1e}   digest {report.digest[:8]}"
        )
    if not report.rows_independent:
        console.print("a row in a batch is not what it is alone: this model mixes its samples")


def cuts(
    model: str, example: str, kwargs: str, random_weights: bool, trust: bool = False
) -> list[CutRow]:
    """List the legal cuts of a pipeline file's model, or of a factory's; a bar tells how far."""
    from streaminfer.planning.cuts import list_cuts

    found, path = _model(model, example, kwargs)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("looking at cuts", total=None)
        return list_cuts(
            found,
            path,
            random_weights=random_weights,
            trust=trust,
            seen=lambda done, total: progress.update(task, completed=done, total=total),
        )


def _model(model: str, example: str, kwargs: str) -> tuple[ModelSpec, Path | None]:
    """Return the model of a pipeline file, or one made of a factory and an example's shape."""
    from streaminfer.spec import ModelSpec
    from streaminfer.spec.file import load

    if model.endswith((".yaml", ".yml")):
        spec = load(Path(model))
        return spec.first_model, spec.path
    try:
        sizes = [n.strip() for n in example.split(",")]
        shape = tuple(int(n) if n.isdecimal() else Range.parse(n) for n in sizes)
        options = json.loads(kwargs)
    except ValueError as error:
        raise ConfigError(
            str(error), hint="--example 3,224,224 --kwargs '{\"weights\": null}'"
        ) from None
    return ModelSpec(factory=model, kwargs=options, example=shape), None


def print_plan(folder: Path, plan: Plan) -> None:
    """Show a plan: its stages, what they hold and what travels between them."""
    table = Table(
        title=f"{plan.pipeline}  {plan.model}@{plan.model_version}  digest {plan.digest[:8]}"
    )
    for name in ("stage", "layers", "weights", "in, per image", "as"):
        table.add_column(name, justify="left" if name in ("stage", "layers", "as") else "right")
    for stage in plan.stages:
        layers = (
            stage.layers[0] if len(stage.layers) == 1 else f"{stage.layers[0]} … {stage.layers[-1]}"
        )
        size = sum(t.row_bytes(stage.edge.dtype) for t in stage.inputs)
        how = f"{stage.edge.dtype} {stage.edge.compress}"
        table.add_row(stage.name, layers, f"{stage.weight_bytes:,} B", f"{size:,} B", how)
    console.print(table)
    for one in plan.stages[0].inputs:
        if one.ranges:
            console.print(
                f"{one.name} {describe(one.shape[1:], one.ranges)}: bytes are of the largest"
            )
    console.print(f"plan directory: {folder}")


def print_cuts(rows: Sequence[CutRow]) -> None:
    """Show where a model may be cut, and how the stage up to there may be split."""
    table = Table(
        title="a stage may end with (until:)"
        + (f"; bytes of {list(rows[0].sample)}, the largest" if rows and rows[0].sample else ""),
        caption="split, of the layers since the row above: C by channels, T in exact tiles; "
        "…C of the whole layer, …T from the model's beginning to here",
    )
    table.add_column("layer")
    for name in ("tensors", "bytes per image", "weights before"):
        table.add_column(name, justify="right")
    table.add_column("split")
    for row in rows:
        marks = (
            ("C", row.channels),
            ("…C", row.channels_of_layer),
            ("T", row.tiles),
            ("…T", row.tiles_up_to_here),
        )
        split = " ".join(mark if works else " " * len(mark) for mark, works in marks)
        table.add_row(
            row.layer, str(row.tensors), f"{row.nbytes:,}", f"{row.weights_before:.0%}", split
        )
    console.print(table)


async def topics_diff(
    spec: PipelineSpec, folder: Path | None, random_weights: bool
) -> list[Difference]:
    """Compare the topics as they are with what the plan needs."""
    _, plan = plan_of(spec, folder, random_weights)
    topology = build(spec, plan)
    async with connect(spec, replication=spec.kafka.replication).admin() as admin:
        existing = await admin.topics(topology.topics())
    known = existing.get(topology.input_topic)
    partitions = known.partitions if known else spec.kafka.partitions
    return diff(topic_specs(topology, spec, partitions), existing)


async def topics_apply(spec: PipelineSpec, folder: Path | None, random_weights: bool) -> list[str]:
    """Create missing topics and set what differs; returns a line per change."""
    found = await topics_diff(spec, folder, random_weights)
    if stuck := [d for d in found if not d.fixable]:
        raise ConfigError(
            "; ".join(str(d) for d in stuck),
            where="kafka",
            hint="delete the topic while nothing runs, or build the plan anew for other partitions",
        )
    async with connect(spec, replication=spec.kafka.replication).admin() as admin:
        await admin.create([d.wanted for d in found if d.missing])
        for d in found:
            if not d.missing:
                await admin.configure(d.wanted.name, d.wanted.config)
    return [f"topic {d.wanted.name}: {'created' if d.missing else 'configured'}" for d in found]
