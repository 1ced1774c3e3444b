"""A model and devices → a Profile: times, memory, what crosses each cut and its encodings."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import fx

from streaminfer.errors import ConfigError
from streaminfer.malloc import tune_malloc
from streaminfer.parallel.capture import Capture, capture, is_batched
from streaminfer.parallel.layers import path_of
from streaminfer.parallel.operators import name_of
from streaminfer.parallel.pipeline import Cutter, port
from streaminfer.parallel.weights import same_memory
from streaminfer.planning.codecs import DTYPE_NAMES, encodings
from streaminfer.planning.example import example_inputs
from streaminfer.planning.factory import make_model
from streaminfer.planning.profile import (
    FOLDER,
    CutPoint,
    DeviceProfile,
    NodeProfile,
    Profile,
    Timing,
)
from streaminfer.planning.source import model_key
from streaminfer.planning.timing import (
    BUSY,
    Runner,
    available_memory,
    cores,
    measure,
    threads_set,
)
from streaminfer.spec import PipelineSpec

__all__ = ["BATCHES", "Captured", "Place", "capture_model", "example_tensors", "places", "profile"]

BATCHES = (1, 2, 4, 8, 16)
LONGEST = 1.0  # seconds of one pass beyond which no larger batch is tried
SHARE = 0.5  # of the device's memory that activations may take while profiling
Say = Callable[[str, int, int], None]  # what, done, of how many


@dataclass(frozen=True)
class Captured:
    """A model, its graph, and what its figures depend on."""

    spec: PipelineSpec
    cutter: Cutter
    key: str

    @property
    def graph(self) -> Capture:
        """The graph of the whole model."""
        return self.cutter.captured


@dataclass(frozen=True)
class Place:
    """A kind of device, the threads that a worker has there, and how many of it there are."""

    names: tuple[str, ...]  # as stages name them, one for each: ("cpu", "cpu"), ("cuda:0", …)
    hardware: str
    threads: int

    @property
    def device(self) -> torch.device:
        """The first of them: the others are alike."""
        return torch.device(self.names[0])


def places(names: Sequence[str]) -> list[Place]:
    """Group devices that are alike; CPU workers share the cores.

    Raises:
        ConfigError: a device that this machine does not have, or a GPU named twice.
    """
    there = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    there += ["mps"] * torch.backends.mps.is_available()
    wanted = ["cuda:0" if name == "cuda" else name for name in names]
    counts = Counter(wanted)
    for name, count in counts.items():
        if name not in there:
            raise ConfigError(
                f"no device {name!r} on this machine; it has: {', '.join(there)}",
                where="--devices",
                hint="name some of those; cpu,cpu is two workers that share the cores",
            )
        if count > 1 and name != "cpu":
            raise ConfigError(
                f"{name} is named {count} times", where="--devices", hint="one worker each"
            )
    found: dict[tuple[str, int], list[str]] = {}
    for name in wanted:
        threads = max(1, cores() // counts["cpu"]) if name == "cpu" else 1
        found.setdefault((_hardware(name), threads), []).append(name)
    return [Place(tuple(same), hardware, t) for (hardware, t), same in found.items()]


def _hardware(name: str) -> str:
    if name.startswith("cuda"):
        return str(torch.cuda.get_device_name(name))
    if name == "mps":
        return "mps"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def capture_model(spec: PipelineSpec, *, random_weights: bool = False) -> Captured:
    """Make the model of a pipeline and capture it. Raises ConfigError, CaptureError."""
    base = spec.path.parent if spec.path else None
    declared = spec.first_model
    model = make_model(declared, base, random_weights=random_weights, trust=spec.trust)
    given = example_inputs(declared)
    return Captured(
        spec,
        Cutter(capture(model, given.args, given.kwargs, given.ranges)),
        model_key(spec, random_weights),
    )


def example_tensors(captured: Captured, rows: int = 2) -> list[torch.Tensor]:
    """Return seeded input of a model, a tensor [rows, …] for each of its inputs, in order."""
    ports = tuple(port(node, "", captured.graph) for node in captured.graph.inputs)
    return example_inputs(captured.spec.first_model, rows).ports(ports)


def profile(
    captured: Captured,
    where: Sequence[Place],
    *,
    batches: Sequence[int] = BATCHES,
    also: Sequence[int] = (),
    cached: bool = True,
    say: Say = lambda what, done, total: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Measure a model on devices, or read what was measured before.

    Args:
        captured: the model.
        where: the devices; each kind is measured once.
        batches: sizes of micro-batches; larger ones are left out where memory or time ends.
        also: sizes that are measured whatever time they take.
        cached: read and write `.streaminfer/profiles`.
        say: told of progress.
        warn: told that the machine was busy; such a profile is not kept.

    Raises:
        ConfigError: a size of `also` does not fit in a device's memory.
    """
    tune_malloc()  # as in a worker
    profiles: list[Profile] = []
    for place in where:
        file = FOLDER / f"{_key(captured, place, batches)}.json"
        kept = known = Profile.load(file) if cached else None
        if known is None:
            known = _fresh(captured, place, batches, say)
        if missing := [n for n in sorted(set(also)) if known.devices[0].timing(n) is None]:
            known = _with_batches(known, captured, place, missing, say)
        if known is not kept:
            if noise := _noise(known.devices[0].timings):
                warn(
                    f"the machine was busy while {place.names[0]} was profiled: repeats of the "
                    f"same batch differ by {noise:.0%} (quartiles); not kept, "
                    "profile again when idle"
                )
            elif cached:
                known.save(file)
        profiles.append(known)
    devices = tuple(device for known in profiles for device in known.devices)
    return profiles[0].model_copy(update={"devices": devices})


def _key(captured: Captured, place: Place, batches: Sequence[int]) -> str:
    declared = [
        captured.key,
        torch.__version__,
        place.hardware,
        place.threads,
        list(batches),
        list(DTYPE_NAMES),
    ]
    return hashlib.sha256(json.dumps(declared).encode()).hexdigest()[:32]


def _noise(timings: Sequence[Timing]) -> float:
    """Return the spread of the repeats if it says that something else was running; else 0."""
    spreads = sorted(timing.spread for timing in timings)
    middle = spreads[len(spreads) // 2]
    return middle if middle > BUSY else 0.0


def _fresh(captured: Captured, place: Place, batches: Sequence[int], say: Say) -> Profile:
    graph, cutter, model = captured.graph, captured.cutter, captured.spec.first_model
    nodes = _nodes(graph)
    peak = max(node.peak_bytes for node in nodes)
    timings: list[Timing] = []
    memory = available_memory(place.device)
    with threads_set(place.threads):
        runner = Runner(captured.cutter, place.device)
        for k, batch in enumerate(batches):
            say(f"{place.names[0]} batch {batch}", k, len(batches))
            if timings and (batch * peak > SHARE * memory or _too_long(timings[-1], batch)):
                break
            try:
                timings.append(measure(runner, _inputs(captured, place, batch)))
            except torch.OutOfMemoryError:
                break
        say("encodings", len(batches), len(batches))
        sample = example_tensors(captured, min(4, max(t.batch for t in timings)))
        encoded = encodings(Runner(cutter, torch.device("cpu")), cutter, _points(cutter), sample)
    device = DeviceProfile(
        device=place.names[0],
        hardware=place.hardware,
        threads=place.threads,
        memory=memory,
        timings=tuple(timings),
    )
    return Profile(
        model=model.factory,
        key=captured.key,
        nodes=nodes,
        ties=_ties(graph),
        cuts=_points(cutter),
        input_bytes=sum(_row_bytes(graph, node) for node in graph.inputs),
        output_bytes=sum(_row_bytes(graph, node) for node in graph.outputs.values()),
        devices=(device,),
        encodings=encoded,
        sample=next(iter(model.examples().values())).sizes() if model.varies else (),
    )


def _with_batches(
    known: Profile, captured: Captured, place: Place, batches: Sequence[int], say: Say
) -> Profile:
    """Measure more batch sizes, however long they take."""
    (device,) = known.devices
    peak = max(node.peak_bytes for node in known.nodes)
    timings = list(device.timings)
    with threads_set(place.threads):
        runner = Runner(captured.cutter, place.device)
        for k, batch in enumerate(batches):
            say(f"{place.names[0]} batch {batch}", k, len(batches))
            free = available_memory(place.device)
            try:
                if batch * peak > free:
                    raise torch.OutOfMemoryError
                timings.append(measure(runner, _inputs(captured, place, batch)))
            except torch.OutOfMemoryError:
                raise ConfigError(
                    f"batch {batch} does not fit on {place.names[0]}: its activations alone are "
                    f"{batch * peak / 1e9:.2f} GB, and {free / 1e9:.2f} GB are there",
                    where="--batch",
                    hint="a smaller one",
                ) from None
    timings.sort(key=lambda timing: timing.batch)
    measured = device.model_copy(update={"timings": tuple(timings)})
    return known.model_copy(update={"devices": (measured,)})


def _inputs(captured: Captured, place: Place, batch: int) -> list[torch.Tensor]:
    return [tensor.to(place.device) for tensor in example_tensors(captured, batch)]


def _too_long(last: Timing, batch: int) -> bool:
    return last.whole * batch / last.batch > LONGEST


def _points(cutter: Cutter) -> tuple[CutPoint, ...]:
    """Return the legal cuts behind layers, named by the outermost layer that ends there."""
    outermost: dict[int, str] = {}
    for layer in cutter.captured.layers:
        known = outermost.setdefault(layer.last, layer.path)
        outermost[layer.last] = min(known, layer.path, key=len)
    return tuple(
        CutPoint(
            position=cut,
            layer=outermost[cut],
            tensors=len(cutter.live(cut)),
            row_bytes=cutter.row_bytes(cut),
        )
        for cut in cutter.legal
        if cut in outermost
    )


def _row_bytes(graph: Capture, node: fx.Node) -> int:
    val = node.meta["val"]
    return math.prod(graph.row(val.shape)) * int(val.element_size())


def _nodes(graph: Capture) -> tuple[NodeProfile, ...]:
    peaks, reads = _peaks(graph), _reads(graph)
    first = Counter[int]()
    for positions, nbytes in reads:
        first[positions[0]] += nbytes
    return tuple(
        NodeProfile(
            name=node.name,
            operator=name_of(node.target) or str(node.target),
            layer=path_of(node),
            weight_bytes=first[i],
            peak_bytes=peaks[i],
        )
        for i, node in enumerate(graph.nodes)
    )


def _reads(graph: Capture) -> list[tuple[list[int], int]]:
    """Return, per weight, the positions that read it and its bytes; tied weights are one."""
    found: dict[tuple[object, ...], tuple[list[int], int]] = {}
    for i, node in enumerate(graph.nodes):
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                tensor = graph.tensors[str(source.target)]
                positions, _ = found.setdefault(same_memory(tensor), ([], tensor.nbytes))
                if i not in positions:
                    positions.append(i)
    return list(found.values())


def _ties(graph: Capture) -> tuple[tuple[int, int, int], ...]:
    pairs = []
    for positions, nbytes in _reads(graph):
        pairs += [(a, b, nbytes) for a, b in pairwise(positions)]
    return tuple(pairs)


def _peaks(graph: Capture) -> list[int]:
    """Return the bytes of activations alive while each node runs, for one row.

    Values that share memory count once, from the first that is made to the last that is read.
    """
    end = len(graph.nodes) - 1
    position = {node: i for i, node in enumerate(graph.nodes)} | dict.fromkeys(graph.inputs, 0)
    spans: dict[fx.Node, tuple[int, int, int]] = {}
    outputs = set(graph.outputs.values())
    for node in (*graph.inputs, *graph.nodes):
        if not is_batched(node, graph.batch):
            continue
        root = graph.aliases.root(node)
        used = max((position.get(user, end) for user in node.users), default=position[node])
        used = end if node in outputs else used
        first, last, size = spans.get(root, (position[node], used, 0))
        spans[root] = (first, max(last, used), max(size, _row_bytes(graph, node)))
    change = [0] * (end + 2)
    for first, last, size in spans.values():
        change[first] += size
        change[last + 1] -= size
    peaks, alive = [], 0
    for delta in change[:-1]:
        alive += delta
        peaks.append(alive)
    return peaks
