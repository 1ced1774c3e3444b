"""A pipeline file → a plan directory: capture the model, cut it, write what workers read."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from streaminfer.errors import ConfigError
from streaminfer.parallel import Port, weights
from streaminfer.parallel.pipeline import StageGraph
from streaminfer.parallel.program import dump
from streaminfer.plan import Exit, Plan, StagePlan, TensorSpec, exit_files, stage_files
from streaminfer.planning.factory import make_model
from streaminfer.planning.lower import Draft, lower
from streaminfer.planning.source import source_key
from streaminfer.spec import PipelineSpec, did_you_mean

__all__ = ["build"]

USUAL = ("logits", "out")  # what models with several outputs call the one to rank
FLOATS = ("F64", "F32", "F16", "BF16")


def build(spec: PipelineSpec, folder: Path, *, random_weights: bool = False) -> Plan:
    """Build a plan directory; an older one in its place is replaced at the end, in one step.

    Raises:
        ConfigError: the model, the weights, the labels or the folder are not as the spec says.
        CaptureError: the model cannot be captured, or not be cut where the spec says.
    """
    key = source_key(spec, random_weights)
    base = spec.path.parent if spec.path else None
    drafts = lower(
        spec,
        lambda model: make_model(model, base, random_weights=random_weights, trust=spec.trust),
    )
    logits = _logits(spec, drafts[-1].graph.outputs)
    classes = logits.shape[1] if logits else None
    _same_classes(drafts, classes)
    labels = _labels(spec, classes)
    with _replacing(folder) as part:
        digest, plans = hashlib.sha256(_declared(spec)), []
        for draft in drafts:
            plan = _write(part, draft)
            digest.update(_digest(part, draft, plan))
            plans.append(plan)
        whole = Plan(
            pipeline=spec.pipeline,
            digest=digest.hexdigest(),
            source=key,
            model=spec.pipeline,
            model_version="random" if random_weights else spec.first_model.version,
            input=spec.input,
            stages=tuple(plans),
            top_k=spec.output.top_k,
            logits=logits.name if logits and len(drafts[-1].graph.outputs) > 1 else "",
            labels=labels,
            random_weights=random_weights,
        )
        whole.save(part)
    return whole


def _declared(spec: PipelineSpec) -> bytes:
    numbers: dict[str, object] = {"input": spec.input.numbers(), "top_k": spec.output.top_k}
    if spec.output.logits:
        numbers["logits"] = spec.output.logits
    return json.dumps(numbers, sort_keys=True).encode()


def _write(folder: Path, draft: Draft) -> StagePlan:
    nbytes = _write_graph(stage_files(folder, draft.name), draft.graph)
    if draft.exit is not None:
        nbytes += _write_graph(exit_files(folder, draft.name), draft.exit)
    return StagePlan(
        name=draft.name,
        path=draft.path,
        kind=draft.kind,
        part=draft.part,
        layers=draft.graph.layers,
        inputs=_specs(draft.graph.inputs),
        outputs=_specs(draft.graph.outputs),
        sources=draft.sources,
        gather=draft.gather,
        pixels=draft.pixels,
        exit=Exit(threshold=draft.threshold) if draft.exit is not None else None,
        edge=draft.edge,
        weight_bytes=nbytes,
    )


def _write_graph(files: tuple[Path, Path], stage: StageGraph) -> int:
    graph, file = files
    graph.parent.mkdir(exist_ok=True)
    graph.write_bytes(dump(stage))
    return weights.write(file, stage.weights)


def _specs(ports: Sequence[Port]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=p.name, dtype=p.dtype, shape=p.shape, ranges=p.ranges) for p in ports
    )


def _digest(folder: Path, draft: Draft, plan: StagePlan) -> bytes:
    """Return what changes the numbers of one stage."""
    total = hashlib.sha256(plan.model_dump_json().encode())
    total.update(stage_files(folder, plan.name)[0].read_bytes())
    total.update(weights.digest(draft.graph.weights).encode())
    if draft.exit is not None:
        total.update(exit_files(folder, plan.name)[0].read_bytes())
        total.update(weights.digest(draft.exit.weights).encode())
    return total.digest()


def _same_classes(drafts: Sequence[Draft], classes: int | None) -> None:
    for draft in drafts:
        if draft.exit is not None and (found := draft.exit.outputs[0].shape[1]) != classes:
            raise ConfigError(
                f"the exit of {draft.path!r} has {found} classes, the model "
                f"{'no row of them' if classes is None else classes}",
                where=f"stages.{draft.path}.exit",
                hint="an exit answers in the model's place: give it the model's classes"
                if classes is not None
                else "an exit needs a model that gives [batch, classes]",
            )


def _logits(spec: PipelineSpec, outputs: Sequence[Port]) -> Port | None:
    """Return the output [batch, classes] that is ranked; None where the outputs are raw."""
    ranked = [p for p in outputs if len(p.shape) == 2 and p.dtype in FLOATS]
    found = ", ".join(f"{p.name} {list(p.shape)}" for p in outputs)
    key = "output.logits" if spec.output.logits else "output.top_k"
    where = f"{spec.path}: {key}" if spec.path else key
    if spec.output.logits:
        for port in ranked:
            if port.name == spec.output.logits:
                return port
        raise ConfigError(
            f"{spec.output.logits!r} is no output [batch, classes]; the model gives {found}",
            where=where,
            hint=did_you_mean(spec.output.logits, (p.name for p in ranked)),
        )
    usual = [p for p in ranked if p.name in USUAL]
    for chosen in (outputs if ranked else (), usual):
        if len(chosen) == 1:
            return chosen[0]
    if spec.output.top_k:
        hint = f"output.logits: {ranked[0].name}; or " if ranked else ""
        raise ConfigError(
            f"output.top_k ranks one output [batch, classes]; the model gives {found}",
            where=where,
            hint=f"{hint}top_k: 0, which publishes raw outputs",
        )
    return None


def _labels(spec: PipelineSpec, width: int | None) -> tuple[str, ...]:
    declared = spec.output.labels
    if declared is None:
        return ()
    if isinstance(declared, tuple):
        labels = declared
    elif declared == "imagenet":
        labels = _imagenet()
    else:
        labels = tuple(spec.resolve(declared).read_text(encoding="utf-8").splitlines())
    if width is not None and len(labels) != width:
        raise ConfigError(
            f"{len(labels)} labels for {width} outputs of the model",
            where=f"{spec.path}: output.labels" if spec.path else "output.labels",
            hint="one label per output, in the order of the outputs",
        )
    return labels


def _imagenet() -> tuple[str, ...]:
    try:
        meta = importlib.import_module("torchvision.models._meta")
    except ModuleNotFoundError:
        raise ConfigError(
            "the labels of ImageNet come with torchvision, which is not installed",
            where="output.labels",
            hint="pip install torchvision; or name a file with one label per line",
        ) from None
    return tuple(cast(list[str], meta._IMAGENET_CATEGORIES))


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder`; put it in its place if all went well."""
    if folder.exists() and not (folder / "plan.json").is_file() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} is not empty and no plan directory",
            where="--plan",
            hint="name a new folder: building would replace all that is in it",
        )
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if folder.exists():
            folder.replace(old)  # a rename onto a folder needs it empty
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
