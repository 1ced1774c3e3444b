"""What was measured of a model and of the road: plain data, no torch, kept as JSON.

nodes    n0   n1   n2   n3   n4   n5        what computes, in order; a position indexes it
seconds  t0   t1   t2   t3   t4   t5        per device and batch size; after a pause, too, and
                                            while another device computes
cuts                ▲         ▲             positions behind which a stage may end, by layer
peak     p0   p1   p2   p3   p4   p5        bytes of activations alive while a node runs, per row
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = [
    "FOLDER",
    "CutPoint",
    "DeviceProfile",
    "Encoding",
    "Link",
    "NodeProfile",
    "Profile",
    "Timing",
    "kept",
]

FOLDER = Path(".streaminfer") / "profiles"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NodeProfile(_Frozen):
    """An operator of the captured graph, and the weights that it is the first to read."""

    name: str
    operator: str
    layer: str  # the innermost module it came from
    weight_bytes: int
    peak_bytes: int  # of activations alive while it runs, for one row


class CutPoint(_Frozen):
    """A legal cut behind a layer. `row_bytes`: what crosses it for one sample, uncast."""

    position: int
    layer: str
    tensors: int
    row_bytes: int


class Encoding(_Frozen):
    """A dtype and a codec on the activations of one cut; costs are per uncast byte."""

    position: int
    dtype: Literal["native", "float16", "bfloat16", "int8"]
    codec: Literal["none", "zstd", "lz4"]
    ratio: float  # bytes as sent ÷ bytes uncast
    encode: float  # seconds
    decode: float


class Link(_Frozen):
    """A hop between two workers: `alpha + bytes * per_byte` seconds, half charged to each side."""

    name: str
    alpha: float
    per_byte: float
    source: str  # "measured here", or where the figures are from

    def seconds(self, nbytes: float) -> float:
        """Return the seconds that one message of so many bytes costs."""
        return self.alpha + nbytes * self.per_byte


class Timing(_Frozen):
    """One batch size on one device. The node times sum to `whole`."""

    batch: int
    seconds: tuple[float, ...]
    whole: float
    spread: float  # upper ÷ lower quartile of the whole model's repeats, minus 1
    single: tuple[tuple[float, ...], ...] = ()  # by node, of each pass that came after a pause
    beside: tuple[float, ...] = ()  # by node, while another device computed the other half

    def span(self, first: int, last: int) -> Timing:
        """Return the same of some of the nodes alone."""
        seconds = self.seconds[first : last + 1]
        return Timing(
            batch=self.batch,
            seconds=seconds,
            whole=sum(seconds),
            spread=self.spread,
            single=tuple(nodes[first : last + 1] for nodes in self.single),
            beside=self.beside[first : last + 1],
        )


class DeviceProfile(_Frozen):
    """One kind of device with a number of threads."""

    device: str  # as a stage names it: "cpu", "cuda:0"
    hardware: str
    threads: int
    memory: int  # bytes
    timings: tuple[Timing, ...]

    def timing(self, batch: int) -> Timing | None:
        """Return the timing of a batch size, if it was measured."""
        return next((t for t in self.timings if t.batch == batch), None)


class Profile(_Frozen):
    """All that the planner and the simulator know of a model on these devices."""

    version: Literal[6] = 6
    model: str
    key: str  # of the model's files, its arguments and torch: what the figures depend on
    nodes: tuple[NodeProfile, ...]
    ties: tuple[tuple[int, int, int], ...] = ()  # two reads of one weight, and its bytes
    cuts: tuple[CutPoint, ...]
    input_bytes: int  # of one row, as the model takes it
    output_bytes: int
    devices: tuple[DeviceProfile, ...]
    encodings: tuple[Encoding, ...] = ()
    links: tuple[Link, ...] = ()
    ingest: float = 0.0  # seconds to decode one input record
    sample: tuple[int, ...] = ()  # what was measured, where samples have many sizes: the largest

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, tied ones once."""
        return sum(node.weight_bytes for node in self.nodes)

    def batches(self) -> tuple[int, ...]:
        """Return the batch sizes that every device was measured at."""
        found = [{t.batch for t in device.timings} for device in self.devices]
        return tuple(sorted(set.intersection(*found))) if found else ()

    def link(self, name: str) -> Link:
        """Return a link by name. Raises KeyError."""
        for link in self.links:
            if link.name == name:
                return link
        raise KeyError(name)

    def encoding(self, position: int, dtype: str, codec: str) -> Encoding:
        """Return what a dtype and codec do at a cut, by the nearest cut that was measured."""
        found = [e for e in self.encodings if (e.dtype, e.codec) == (dtype, codec)]
        if not found:
            return Encoding(
                position=position, dtype="native", codec="none", ratio=1, encode=0, decode=0
            )
        return min(found, key=lambda e: abs(e.position - position))

    def layers(self) -> Iterator[tuple[str, int, int]]:
        """Yield the parts between cuts: the layer that ends each, its first and last position."""
        first = 0
        for cut in self.cuts:
            yield cut.layer, first, cut.position
            first = cut.position + 1
        yield "output", first, len(self.nodes) - 1

    def save(self, file: Path) -> None:
        """Write it in one step."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.part")
        part.write_text(self.model_dump_json() + "\n")
        part.replace(file)

    @classmethod
    def load(cls, file: Path) -> Profile | None:
        """Read one; None if there is none of this version."""
        try:
            return cls.model_validate_json(file.read_bytes())
        except (OSError, ValidationError):
            return None


def kept(key: str, folder: Path = FOLDER) -> list[Profile]:
    """Return the profiles of a model that were kept, one for each kind of device; newest first.

    Args:
        key: of the model (`planning/source.py`).
        folder: where they are.
    """
    files = sorted(folder.glob("*.json"), key=lambda file: -file.stat().st_mtime)
    found = [Profile.load(file) for file in files]
    return [profile for profile in found if profile is not None and profile.key == key]


def quartile(values: Sequence[float], q: float) -> float:
    """Return a quantile of a few values, the nearest one below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.floor(q * len(ordered)))]
