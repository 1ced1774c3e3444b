"""Seeded input records as a client would send them: what profiling, trials and checks feed."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from streaminfer.plan import Plan
from streaminfer.planning.example import example_inputs
from streaminfer.runtime.rows import NAMES, as_bytes
from streaminfer.spec import PipelineSpec
from streaminfer.wire import TENSOR_INPUT, Tensor, TensorInput, encode_tensor_input

__all__ = ["Input", "example_rows", "images", "inputs_of"]

DISTINCT = 64  # inputs that are made; they come again


class Input(NamedTuple):
    """A record as a client would send it."""

    value: bytes
    headers: tuple[tuple[str, bytes], ...] = ()


def inputs_of(spec: PipelineSpec, plan: Plan, count: int = DISTINCT) -> list[Input]:
    """Return inputs of a plan: JPEGs of soft noise, or messages with its tensors by name."""
    if plan.input.decode == "image":
        return [Input(value) for value in images(spec, count)]
    rows = example_rows(spec, plan, count)
    headers = (("content-type", TENSOR_INPUT.encode()),)
    found = []
    for k in range(count):
        message = TensorInput(tensors={name: _row(tensor, k) for name, tensor in rows.items()})
        found.append(Input(encode_tensor_input(message), headers))
    return found


def images(spec: PipelineSpec, count: int = DISTINCT) -> list[bytes]:
    """Return JPEGs of soft noise: of the size that ingest resizes or crops to, or the largest."""
    random = np.random.default_rng(0)
    side = spec.input.resize or spec.input.crop
    (_, *sizes), *_ = (one.sizes() for one in spec.first_model.examples().values())
    height, width = (side, side) if side else sizes
    return [_image(random, height, width, spec.input.channels) for _ in range(count)]


def example_rows(spec: PipelineSpec, plan: Plan, count: int) -> dict[str, Tensor]:
    """Return rows of what the model's example describes, by the first cell's inputs."""
    given = example_inputs(spec.first_model, count).named([s.name for s in plan.stages[0].inputs])
    return {
        name: Tensor(NAMES[value.dtype], tuple(value.shape), as_bytes(value.contiguous()))
        for name, value in given.items()
    }


def _row(tensor: Tensor, k: int) -> Tensor:
    size = len(tensor.data) // tensor.shape[0]
    return Tensor(tensor.dtype, tensor.shape[1:], tensor.data[k * size : (k + 1) * size])


def _image(random: np.random.Generator, height: int, width: int, channels: int) -> bytes:
    coarse = random.integers(0, 255, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.convert("L" if channels == 1 else "RGB").save(file, "JPEG", quality=90)
    return file.getvalue()
