"""What may not stand together in a pipeline file, though each value alone is fine.

A check yields `Problem`s: the path of the key to blame, so that the loader can name its line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pydantic_core import PydanticCustomError

from streaminfer.ranges import Range

if TYPE_CHECKING:
    from streaminfer.spec.models import InputSpec, KafkaSpec, PipelineSpec
    from streaminfer.spec.stages import (
        BranchSpec,
        ModelSpec,
        PartSpec,
        SplitSpec,
        StageSpec,
        TensorExample,
    )

__all__ = [
    "Problem",
    "bound_problems",
    "credential_problems",
    "did_you_mean",
    "edge_problems",
    "example_problems",
    "fan_problems",
    "file_problems",
    "input_problems",
    "nearest",
    "range_problems",
    "refuse",
    "replica_problems",
    "split_problems",
    "stage_problems",
    "topic_problems",
]

INTEGERS = {"int64": 2**63 - 1, "int32": 2**31, "int16": 2**15, "int8": 128, "uint8": 256}
RESERVED = ("sink", "input", "default")  # they mean something else where stages are named


class Problem(NamedTuple):
    """What cannot stand together: the key to blame (below the model that says so), the remedy."""

    path: tuple[str | int, ...]
    message: str
    hint: str = ""


def refuse(problems: Iterable[Problem]) -> None:
    """Raise one pydantic error that holds all problems; return if there is none."""
    if problems := list(problems):
        text = "; ".join(".".join(map(str, p.path)) + ": " + p.message for p in problems)
        raise PydanticCustomError("refused", "{text}", {"text": text, "problems": problems})


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "did you mean …?" with the nearest known word, or "" if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint: the nearest known word, or all of them."""
    names = list(known)
    return nearest(word, names) or (f"known are: {', '.join(names)}" if names else "")


def stage_problems(spec: PipelineSpec) -> Iterator[Problem]:
    """Stages have names of their own, and all but the last one of a model an end."""
    for i, stage in enumerate(spec.stages):
        if stage.name in RESERVED:
            yield Problem(("stages", i, "name"), f"{stage.name!r} is reserved", "choose another")
    yield from _road_problems(("stages",), spec.stages)
    for i, stage in enumerate(spec.stages):
        for k, branch in enumerate(stage.branches):
            if branch.stages:
                yield from _road_problems(("stages", i, "branches", k, "stages"), branch.stages)


def _road_problems(
    where: tuple[str | int, ...], stages: Sequence[PartSpec | StageSpec]
) -> Iterator[Problem]:
    """Check the stages of one model; an ensemble is not of it."""
    layered = [stage for stage in stages if not getattr(stage, "branches", ())]
    names: set[str] = set()
    untils: set[str] = set()
    for i, stage in enumerate(stages):
        key = (*where, i, "until")
        if stage.name in names:
            yield Problem((*where, i, "name"), f"two stages are called {stage.name!r}")
        names.add(stage.name)
        if stage not in layered:
            continue
        if stage is not layered[-1] and stage.until is None:
            yield Problem(key, "is missing", f"the last layer of stage {stage.name!r}")
        elif stage is layered[-1] and stage.until is not None:
            yield Problem(key, "the last stage goes to the model's end", "leave it out")
        elif stage.until is not None and stage.until in untils:
            yield Problem(key, f"another stage ends at {stage.until!r}")
        untils.add(stage.until or "")


def split_problems(spec: SplitSpec) -> Iterator[Problem]:
    """Channels have parts, tiles have a grid."""
    other, own = ("grid", "parts") if spec.by == "channels" else ("parts", "grid")
    if getattr(spec, own) is None:
        example = "parts: 2" if own == "parts" else "grid: [2, 2]"
        yield Problem((own,), "is missing", f"by: {spec.by} needs {example}")
    if getattr(spec, other) is not None:
        yield Problem((other,), f"is not for by: {spec.by}", f"drop it; {own} says how many")
    if spec.by == "channels" and spec.reduce != "exact":
        yield Problem(("reduce",), "is for tiles: shards of channels are always exact", "drop it")
    if spec.by == "tiles" and spec.form != "auto":
        yield Problem(("form",), "is for by: channels", "drop it")
    if spec.grid and not 2 <= spec.grid[0] * spec.grid[1] <= 64:
        yield Problem(("grid",), f"{spec.grid[0]} x {spec.grid[1]} tiles", "2 to 64 tiles")


def fan_problems(spec: PipelineSpec) -> Iterator[Problem]:
    """What runs side by side: branches are the last stage, parts have their devices."""
    last = len(spec.stages) - 1
    for i, stage in enumerate(spec.stages):
        where = ("stages", i)
        if stage.branches:
            yield from _branch_problems(where, stage, is_last=i == last)
        elif stage.quorum is not None or stage.fuse != "mean":
            key = "quorum" if stage.quorum is not None else "fuse"
            yield Problem((*where, key), "is for a stage with branches", "drop it")
        yield from _part_problems(where, stage)
        for k, branch in enumerate(stage.branches):
            for j, part in enumerate(branch.stages):
                yield from _part_problems((*where, "branches", k, "stages", j), part)
    if spec.model is None and not (last == 0 and spec.stages[0].branches):
        yield Problem(("model",), "is missing", "the model whose layers the stages are")


def _branch_problems(
    where: tuple[str | int, ...], stage: StageSpec, *, is_last: bool
) -> Iterator[Problem]:
    names = [branch.name for branch in stage.branches]
    if not is_last:
        yield Problem((*where, "branches"), "only the last stage may have branches", "move it")
    if len(names) < 2:
        yield Problem((*where, "branches"), "one branch is no ensemble", "two or more")
    if twice := {name for name in names if names.count(name) > 1}:
        yield Problem((*where, "branches"), f"two branches are called {min(twice)!r}")
    for key in ("until", "split", "exit"):
        if getattr(stage, key) is not None:
            yield Problem((*where, key), "a stage with branches has no layers", f"drop {key}")
    if stage.quorum is not None and stage.quorum > len(names):
        yield Problem(
            (*where, "quorum"), f"{stage.quorum} of {len(names)} branches", f"at most {len(names)}"
        )
    if stage.fuse not in ("mean", "max", "vote") and (stage.quorum or len(names)) < len(names):
        hint = "leave quorum out, or fuse: mean, max or vote"
        yield Problem((*where, "quorum"), "a module of yours needs the outputs of all", hint)


def _part_problems(where: tuple[str | int, ...], stage: PartSpec) -> Iterator[Problem]:
    if stage.split and stage.exit:
        yield Problem((*where, "exit"), "a split stage has no exit", "put it on the stage before")


def edge_problems(spec: PipelineSpec) -> Iterator[Problem]:
    """Edges lead into stages, and what a local edge joins is one worker."""
    known = {path for path in spec.placed() if path.count(".") != 1}  # a branch has its stage's
    first = spec.stages[0]
    for key in spec.edges:
        if key == first.name and not first.fans:
            yield Problem(
                ("edges", key), "the first stage has no edge: it reads the input topic", "drop it"
            )
        elif key != "default" and key not in known:
            hint = did_you_mean(key, ["default", *sorted(known - {first.name})])
            yield Problem(("edges", key), f"no stage is called {key!r}", hint)
    if len({stage.name for stage in spec.stages}) < len(spec.stages):
        return
    for i, (before, stage) in enumerate(zip(spec.stages, spec.stages[1:], strict=False), 1):
        if spec.edge(stage.name).transport != "local":
            continue
        if stage.replicas != before.replicas:
            yield Problem(
                ("stages", i, "replicas"),
                f"{stage.replicas}, but {before.name!r} in the same worker has {before.replicas}",
                "stages joined by a local edge run together: give them the same number",
            )
    for stage in spec.stages:
        for branch in stage.branches:
            yield from _branch_edges(spec, f"{stage.name}.{branch.name}", branch.stages)


def _branch_edges(spec: PipelineSpec, path: str, stages: Sequence[PartSpec]) -> Iterator[Problem]:
    local = spec.edge(path).transport == "local"
    for stage in stages[1:]:
        key = f"{path}.{stage.name}"
        if local and spec.edge(key).transport != "local":
            yield Problem(
                ("edges", key),
                f"kafka within {path!r}, whose branches share a worker",
                "transport: local here, or kafka into the branches",
            )


def replica_problems(spec: PipelineSpec) -> Iterator[Problem]:
    """Lists have one entry for each replica or part, and a worker has one share in its group."""
    for i, stage in enumerate(spec.stages):
        yield from _list_problems(("stages", i), stage)
        for k, branch in enumerate(stage.branches):
            yield from _list_problems(("stages", i, "branches", k), branch)
            for j, part in enumerate(branch.stages):
                yield from _list_problems(("stages", i, "branches", k, "stages", j), part)
        if i and stage.shares is not None and spec.edge(stage.name).transport == "local":
            yield Problem(
                ("stages", i, "shares"),
                f"{stage.name!r} shares a worker with the stage before it, and that has a share",
                "say it at the worker's first stage",
            )


def _list_problems(where: tuple[str | int, ...], stage: PartSpec | BranchSpec) -> Iterator[Problem]:
    split = stage.places != stage.replicas or bool(getattr(stage, "split", None))
    for key, value, count in (
        ("device", stage.device, stage.places),
        ("shares", stage.shares, stage.replicas),
    ):
        if not isinstance(value, tuple) or len(value) == count:
            continue
        parts = split and key == "device"
        other = "" if parts else f"; or replicas: {len(value)}"
        yield Problem(
            (*where, key),
            f"{len(value)} in the list for {count} {'part' if parts else 'replica'}(s) of "
            f"{stage.name!r}",
            f"list {count}" + (", or name one device for all" if key == "device" else "") + other,
        )


def example_problems(spec: PipelineSpec) -> Iterator[Problem]:
    """The example is what the input gives."""
    if spec.model is None and not spec.stages[0].branches:
        return
    if spec.input.decode == "tensor":
        return
    examples, crop = list(spec.first_model.examples().values()), spec.input.crop
    shape = examples[0].shape
    if len(examples) > 1:
        yield Problem(
            ("model", "example"),
            f"{len(examples)} inputs, but an image is one",
            "input.decode: tensor, and send them as tensors",
        )
    elif isinstance(shape[0], Range):
        yield Problem(
            ("model", "example"),
            f"{list(shape)}: an image has a fixed number of channels, not {shape[0]}",
            f"[{spec.input.channels}, height, width]; height and width may be ranges",
        )
    elif len(shape) != 3 or shape[0] != spec.input.channels:
        yield Problem(
            ("model", "example"),
            f"{list(shape)} is not an image of {spec.input.channels} channel(s)",
            "[channels, height, width]; or input.decode: tensor",
        )
    elif examples[0].ranges and spec.input.resize and not _reached(spec.input.resize, shape[1:]):
        yield Problem(
            ("input", "resize"),
            f"{spec.input.resize}, but model.example takes no such side: {list(shape)}",
            "resize is of the shorter side: a size within both ranges",
        )
    elif examples[0].dtype != "float32":
        yield Problem(
            ("model", "example"),
            f"an image is float32, not {examples[0].dtype}",
            "leave dtype out; or input.decode: tensor",
        )
    elif crop and shape[1:] != (crop, crop):
        yield Problem(
            ("model", "example"),
            f"{list(shape)} is not what input.crop gives",
            f"[{shape[0]}, {crop}, {crop}]"
            + ("; or drop input.crop, and images keep their sizes" * bool(examples[0].ranges)),
        )


def _reached(side: int, sizes: Sequence[int | Range]) -> bool:
    """Tell whether the shorter side of an image may have this size."""
    return all(n.nearest(side) in n if isinstance(n, Range) else n >= side for n in sizes)


def range_problems(spec: PipelineSpec) -> Iterator[Problem]:
    """Samples of many sizes are not cut into tiles, and branches on the input take the same."""
    for i, stage in enumerate(spec.stages):
        if spec.model and spec.model.varies:
            yield from _tile_problems(("stages", i), stage)
        shapes = [list(b.model.examples().values()) for b in stage.branches]
        for k, branch in enumerate(stage.branches):
            where = ("stages", i, "branches", k)
            if branch.model.varies:
                for j, part in enumerate(branch.stages):
                    yield from _tile_problems((*where, "stages", j), part)
            alike = [e.shape for e in shapes[k]] == [e.shape for e in shapes[0]]
            if spec.model is None and not alike and any(e.ranges for e in (*shapes[k], *shapes[0])):
                yield Problem(
                    (*where, "model", "example"),
                    f"{branch.name!r} takes other sizes than {stage.branches[0].name!r}",
                    "all branches take the same input: give them the same ranges",
                )


def _tile_problems(where: tuple[str | int, ...], stage: PartSpec) -> Iterator[Problem]:
    if stage.split and stage.split.by == "tiles":
        yield Problem(
            (*where, "split"),
            "tiles are cut of images of one size, and model.example has a range: where a tile's "
            "border lies is settled when the plan is built",
            "by: channels takes every size; or one size: input.resize and input.crop",
        )


def file_problems(spec: ModelSpec) -> Iterator[Problem]:
    """An exported model has its arguments and weights in it."""
    for key in ("kwargs", "weights"):
        if spec.file and getattr(spec, key):
            yield Problem((key,), "is for a factory: model.file has all in it", f"drop {key}")


def bound_problems(spec: TensorExample) -> Iterator[Problem]:
    """Whole numbers have a bound: an index beyond an embedding's end ends the capture."""
    whole = spec.dtype.startswith(("int", "uint"))
    if whole and spec.max is None:
        yield Problem(
            ("max",),
            "is missing",
            f"{spec.dtype} values are drawn from 0 to below it: the size of the vocabulary, say",
        )
    elif spec.max is not None and not whole:
        yield Problem(("max",), f"is for whole numbers, not for {spec.dtype}", "drop max")
    elif spec.max is not None and spec.max > (limit := INTEGERS[spec.dtype]):
        yield Problem(("max",), f"{spec.max} is beyond {spec.dtype}", f"at most {limit}")


def topic_problems(spec: PipelineSpec) -> Iterator[Problem]:
    """No topic has two uses."""
    sink = f"{spec.kafka.prefix}.{spec.pipeline}.sink"
    if spec.output.topic == spec.input.topic:
        yield Problem(("output", "topic"), "is the input topic: predictions would be decoded")
    for section, topic in (("input", spec.input.topic), ("output", spec.output.topic)):
        if topic == sink:
            yield Problem((section, "topic"), f"{sink!r} is the pipeline's own sink topic")


def input_problems(spec: InputSpec) -> Iterator[Problem]:
    """Normalisation fits the channels, the crop fits the size, and tensors need neither."""
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        if values and len(values) != spec.channels:
            yield Problem((name,), f"{len(values)} numbers for {spec.channels} channel(s)")
    if bool(spec.mean) != bool(spec.std):
        yield Problem(("mean" if spec.mean else "std",), "mean and std go together", "give both")
    if any(value <= 0 for value in spec.std):
        yield Problem(("std",), "expected numbers above 0")
    if spec.resize and spec.crop and spec.crop > spec.resize:
        yield Problem(("crop",), f"{spec.crop} is more than resize, {spec.resize}")
    if spec.decode == "tensor" and (spec.resize or spec.crop or spec.mean):
        yield Problem(("decode",), "resize, crop, mean and std are for decode: image")


def credential_problems(spec: KafkaSpec) -> Iterator[Problem]:
    """Credentials are there if the protocol wants them, and only then."""
    sasl = spec.security_protocol.startswith("SASL")
    for key in ("sasl_username", "sasl_password"):
        given = getattr(spec, key) is not None
        if sasl and not given:
            yield Problem((key,), "is missing", f"{spec.security_protocol} needs it")
        elif given and not sasl:
            yield Problem((key,), "is unused", "set security_protocol to SASL_SSL, or drop it")
    if spec.ssl_keyfile and not spec.ssl_certfile:
        yield Problem(("ssl_certfile",), "is missing", "ssl_keyfile needs it")
