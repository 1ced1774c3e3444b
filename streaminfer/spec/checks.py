"""What may not stand together in a pipeline file, though each value alone is fine.

A check yields `Problem`s: the path of the key to blame, so that the loader can name its line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from streaminfer.spec.models import InputSpec, KafkaSpec, ModelSpec, PipelineSpec, TensorExample

__all__ = [
    "Problem",
    "bound_problems",
    "credential_problems",
    "did_you_mean",
    "edge_problems",
    "example_problems",
    "file_problems",
    "input_problems",
    "nearest",
    "refuse",
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
    """Stages have names of their own, and all but the last one an end."""
    last = len(spec.stages) - 1
    names: set[str] = set()
    untils: set[str] = set()
    for i, stage in enumerate(spec.stages):
        if stage.name in RESERVED:
            yield Problem(("stages", i, "name"), f"{stage.name!r} is reserved", "choose another")
        if stage.name in names:
            yield Problem(("stages", i, "name"), f"two stages are called {stage.name!r}")
        names.add(stage.name)
        if i < last and stage.until is None:
            yield Problem(
                ("stages", i, "until"), "is missing", f"the last layer of stage {stage.name!r}"
            )
        elif i == last and stage.until is not None:
            yield Problem(
                ("stages", i, "until"), "the last stage goes to the model's end", "leave it out"
            )
        elif stage.until is not None and stage.until in untils:
            yield Problem(("stages", i, "until"), f"another stage ends at {stage.until!r}")
        untils.add(stage.until or "")


def edge_problems(spec: PipelineSpec) -> Iterator[Problem]:
    """Edges lead into stages, and what a local edge joins is one worker."""
    names = [stage.name for stage in spec.stages]
    for key in spec.edges:
        if key == names[0]:
            yield Problem(
                ("edges", key), "the first stage has no edge: it reads the input topic", "drop it"
            )
        elif key != "default" and key not in names:
            hint = did_you_mean(key, ["default", *names[1:]])
            yield Problem(("edges", key), f"no stage is called {key!r}", hint)
    if len(set(names)) < len(names):
        return
    for i, (before, stage) in enumerate(zip(spec.stages, spec.stages[1:], strict=False), 1):
        if spec.edge(stage.name).transport == "local" and stage.replicas != before.replicas:
            yield Problem(
                ("stages", i, "replicas"),
                f"{stage.replicas}, but {before.name!r} in the same worker has {before.replicas}",
                "stages joined by a local edge run together: give them the same number",
            )


def example_problems(spec: PipelineSpec) -> Iterator[Problem]:
    """The example is what the input gives."""
    if spec.input.decode == "tensor":
        return
    examples, crop = list(spec.model.examples().values()), spec.input.crop
    shape = examples[0].shape
    if len(examples) > 1:
        yield Problem(
            ("model", "example"),
            f"{len(examples)} inputs, but an image is one",
            "input.decode: tensor, and send them as tensors",
        )
    elif len(shape) != 3 or shape[0] != spec.input.channels:
        yield Problem(
            ("model", "example"),
            f"{list(shape)} is not an image of {spec.input.channels} channel(s)",
            "[channels, height, width]; or input.decode: tensor",
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
            f"[{shape[0]}, {crop}, {crop}]",
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
