"""Is the plan directory current? Answered in milliseconds, without torch and without the model."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streaminfer.errors import ConfigError, PlanError
from streaminfer.openmp import release_team
from streaminfer.plan import VERSION, Plan, stage_files
from streaminfer.spec import ModelSpec, PipelineSpec, StageSpec

__all__ = ["ensure", "file_of_factory", "model_key", "source_key"]

PLACED = dict.fromkeys(("device", "replicas", "threads", "batch", "deadline", "shares"), True)
PLACEMENT: Any = {
    **PLACED,
    "quorum": True,
    "branches": {"__all__": {**PLACED, "stages": {"__all__": PLACED}}},
}  # of a stage: what changes no number
WHOLE_BYTES = 64_000_000  # a larger weights file is told by its size and time, not by its bytes


def ensure(spec: PipelineSpec, folder: Path, *, random_weights: bool = False) -> Plan:
    """Return the plan in `folder`, built anew only if it is not of this spec and these files.

    Several workers may start at once on one folder: one of them builds, the others wait.

    Raises:
        ConfigError: what `source_key` and `build` raise.
    """
    key = source_key(spec, random_weights)
    if plan := _current(folder, key):
        return plan
    with _alone(folder):
        if plan := _current(folder, key):
            return plan
        from streaminfer.planning.build import build

        try:
            return build(spec, folder, random_weights=random_weights)
        finally:
            release_team()  # a worker begins in this process, perhaps from another thread


def _current(folder: Path, key: str) -> Plan | None:
    try:
        plan = Plan.load(folder)
    except PlanError:
        return None
    files = [file for stage in plan.stages for file in stage_files(folder, stage.name)]
    return plan if plan.source == key and all(file.is_file() for file in files) else None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def source_key(spec: PipelineSpec, random_weights: bool = False) -> str:
    """Return a key of all that a plan is built from.

    That is the part of the spec that goes into it, the code and the weights of the model, and the
    versions of torch and of the package that the model comes from.

    Raises:
        ConfigError: a file that the spec names does not exist.
    """
    total = hashlib.sha256()
    total.update(json.dumps(_declared(spec, random_weights), sort_keys=True).encode())
    for file in _files(spec, random_weights):
        total.update(f"\0{file.name}\0".encode())
        total.update(_content(file))
    return total.hexdigest()


def model_key(spec: PipelineSpec, random_weights: bool = False) -> str:
    """Return the key of a pipeline's model uncut: what its profile is kept under.

    Raises:
        ConfigError: a file that the spec names does not exist.
    """
    whole = spec.model_copy(update={"stages": (StageSpec(name="all"),), "edges": {}})
    return source_key(whole, random_weights)


def _declared(spec: PipelineSpec, random_weights: bool) -> dict[str, object]:
    return {
        "plan": VERSION,
        "pipeline": spec.pipeline,
        "models": [model.model_dump(mode="json") for model in _models(spec)],
        "input": spec.input.model_dump(mode="json"),
        "stages": [stage.model_dump(mode="json", exclude=PLACEMENT) for stage in spec.stages],
        "edges": {path: _edge(spec, path) for path in spec.placed()},
        "output": (spec.output.top_k, spec.output.labels, spec.output.logits),
        "random_weights": random_weights,
        "packages": sorted({text for model in _models(spec) for text in _packages(model)}),
    }


def _edge(spec: PipelineSpec, path: str) -> tuple[str, ...]:
    edge = spec.edge(path)
    return edge.transport, edge.dtype, edge.compress


def _models(spec: PipelineSpec) -> list[ModelSpec]:
    """Return all models of a pipeline: its own, its branches', its exits', a module that fuses."""
    found = [spec.model] if spec.model else []
    for stage in spec.stages:
        found += [branch.model for branch in stage.branches]
        if stage.fuse not in ("mean", "max", "vote"):
            found.append(ModelSpec(factory=stage.fuse, example=(1,)))
        if stage.exit:
            factory, files = stage.exit.factory, stage.exit.weights
            found.append(ModelSpec(factory=factory, weights=files, example=(1,)))
    return found


def _packages(model: ModelSpec) -> list[str]:
    """Return the versions of torch and of the model's package; a package in work by its files."""
    found = [f"torch {importlib.metadata.version('torch')}"]
    top = model.factory.partition(":")[0].partition(".")[0]
    if model.file or file_of_factory(model.factory) is not None:
        return found
    try:
        found.append(f"{top} {importlib.metadata.version(top)}")
    except importlib.metadata.PackageNotFoundError:
        module = importlib.util.find_spec(top)
        origin = Path(module.origin) if module and module.origin else None
        package = origin.parent.rglob("*.py") if origin and origin.stem == "__init__" else [origin]
        found += [_stamp(file) for file in sorted(filter(None, package))]
    return found


def file_of_factory(factory: str) -> str | None:
    """Return the .py file that a factory names; None if it is an import string."""
    name = factory.rpartition(":")[0]
    return name if name.endswith(".py") else None


def _files(spec: PipelineSpec, random_weights: bool) -> Iterator[Path]:
    for model in _models(spec):
        if model.file:
            yield _existing(spec, model.file, "model.file")
        if name := file_of_factory(model.factory):
            file = _existing(spec, name, "model.factory")
            yield from sorted(file.parent.glob("*.py"))
        if model.weights and not random_weights:
            yield _existing(spec, model.weights, "model.weights")
    labels = spec.output.labels
    if isinstance(labels, str) and labels != "imagenet":
        yield _existing(spec, labels, "output.labels")


def _existing(spec: PipelineSpec, name: str, key: str) -> Path:
    path = spec.resolve(name)
    if not path.is_file():
        place = f"{spec.path}: {key}" if spec.path else key
        raise ConfigError(
            f"no such file: {path}",
            where=place,
            hint="relative paths start at the pipeline file's folder",
        )
    return path


def _content(file: Path) -> bytes:
    if file.stat().st_size > WHOLE_BYTES:
        return _stamp(file).encode()
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _stamp(file: Path) -> str:
    stat = file.stat()
    return f"{file} {stat.st_size} {stat.st_mtime_ns}"
