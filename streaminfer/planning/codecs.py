"""What travels, and as what: encodings measured on real activations, dtypes chosen by drift."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch

from streaminfer.cast import cast, uncast
from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.program import Values
from streaminfer.parallel.signature import dtype_name
from streaminfer.planning.profile import CutPoint, Encoding, Link
from streaminfer.planning.timing import Runner
from streaminfer.wire import Compression, Tensor, compress, decompress

__all__ = ["DTYPE_NAMES", "Drift", "EdgeChoice", "best_codec", "choose_dtypes", "encodings"]

SAMPLED = 10  # cuts whose activations are encoded
REPEATS = 3
SAME = 1.1  # times a cost: about equal
Dtype = Literal["native", "float16", "bfloat16", "int8"]
T = TypeVar("T")
DTYPE_NAMES: tuple[Dtype, ...] = ("native", "float16", "bfloat16", "int8")
Codec = Literal["none", "zstd", "lz4"]
CODECS: tuple[Codec, ...] = ("none", "zstd", "lz4")


def encodings(
    runner: Runner, cutter: Cutter, points: Sequence[CutPoint], inputs: Sequence[torch.Tensor]
) -> tuple[Encoding, ...]:
    """Encode what crosses a few cuts in every way an edge can; on the CPU, in one thread."""
    chosen = _spread(points)
    found: list[Encoding] = []

    def watch(position: int, values: Values) -> None:
        if position in chosen:
            live = {n.name: values[runner.here(n)].contiguous() for n in cutter.valued(position)}
            found.extend(_encoded(position, live))

    runner.run(inputs, watch=watch)
    return tuple(found)


def _spread(points: Sequence[CutPoint]) -> set[int]:
    """Take the cut with the fewest bytes out of each of equal ranges of positions."""
    if not points:
        return set()
    size = (points[-1].position + 1) / SAMPLED
    best: dict[int, CutPoint] = {}
    for point in points:
        known = best.setdefault(int(point.position / size), point)
        if point.row_bytes < known.row_bytes:
            best[int(point.position / size)] = point
    return {point.position for point in best.values()}


def _encoded(position: int, live: Mapping[str, torch.Tensor]) -> Iterator[Encoding]:
    total = sum(t.nbytes for t in live.values())
    for dtype in DTYPE_NAMES:
        there, sent = _least(partial(cast, live, dtype))
        back, _ = _least(partial(_cast_back, sent, live))
        if dtype == "native":
            there = back = 0.0
        packed = [_packed(t) for t in sent.values()]
        yield _row(position, dtype, "none", total, packed, there, back)
        for codec in ("zstd", "lz4"):
            encode, small = _least(partial(_compress_all, packed, codec))
            decode, _ = _least(partial(_decompress_all, small))
            yield _row(position, dtype, codec, total, small, there + encode, back + decode)


def _cast_back(
    sent: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    return [uncast(name, sent, tensor.dtype) for name, tensor in like.items()]


def _compress_all(packed: Sequence[Tensor], codec: Compression) -> list[Tensor]:
    return [compress(t, codec) for t in packed]


def _decompress_all(small: Sequence[Tensor]) -> list[Tensor]:
    return [decompress(t) for t in small]


def _row(
    position: int,
    dtype: Dtype,
    codec: Codec,
    total: int,
    sent: Sequence[Tensor],
    encode: float,
    decode: float,
) -> Encoding:
    return Encoding(
        position=position,
        dtype=dtype,
        codec=codec,
        ratio=sum(t.data.nbytes for t in sent) / total,
        encode=encode / total,
        decode=decode / total,
    )


def _least(work: Callable[[], T]) -> tuple[float, T]:
    """Return the least seconds of a few runs, and the result."""
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
    return min(seconds), result


def _packed(tensor: torch.Tensor) -> Tensor:
    name = dtype_name(tensor.dtype) or ""
    return Tensor(name, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().data)


def best_codec(
    encoding: Mapping[Codec, Encoding], link: Link, nbytes: float
) -> tuple[Codec, float]:
    """Return the codec that costs a hop the least, and the seconds: encode, link, decode.

    Lossless codecs pay only where the link is slower than they are.
    """
    costs = {
        codec: nbytes * (e.encode + e.decode) + link.seconds(nbytes * e.ratio)
        for codec, e in encoding.items()
    }
    codec = min(costs, key=lambda name: (costs[name], name != "none"))
    return codec, costs[codec]


@dataclass(frozen=True)
class Drift:
    """How far casting moves a model's answers."""

    drop: float  # share of samples whose top-1 changes; without classes: RMS error ÷ deviation
    max_abs: float
    samples: int
    classes: bool  # whether `drop` is of top-1


@dataclass(frozen=True)
class EdgeChoice:
    """The dtype of one edge, and what it alone does to the answers."""

    position: int
    dtype: Dtype
    alone: Mapping[Dtype, Drift]


def choose_dtypes(
    runner: Runner,
    cutter: Cutter,
    cuts: Sequence[int],
    batches: Sequence[Sequence[torch.Tensor]],
    max_drop: float,
    cost: Callable[[int, Dtype], float],
) -> tuple[list[EdgeChoice], Drift]:
    """Choose each edge's dtype: the cheapest hop whose drift, of all edges together, is allowed.

    Args:
        runner: the whole model, on the CPU.
        cutter: the same, as cut.
        cuts: positions of the edges.
        batches: calibration input, every input of the model.
        max_drop: share of samples whose top-1 may change; of raw outputs, RMS error ÷ deviation.
        cost: seconds of a hop at a cut with a dtype; of about equal ones, the error decides.

    Returns:
        The choices, and the drift of all of them together.
    """
    exact = [_outputs(runner, cutter, batch, {}) for batch in batches]

    def drift(casts: Mapping[int, Dtype]) -> Drift:
        return _drift(exact, [_outputs(runner, cutter, batch, casts) for batch in batches])

    alone: dict[int, dict[Dtype, Drift]] = {
        cut: {dtype: drift({cut: dtype}) for dtype in DTYPE_NAMES[1:]} for cut in cuts
    }
    allowed: dict[int, list[Dtype]] = {}  # from the cheapest to native, which is always allowed
    for cut, found in alone.items():
        good = {
            d: (cost(cut, d), r.drop, r.max_abs) for d, r in found.items() if r.drop <= max_drop
        }
        allowed[cut] = [*_worth(good), "native"]
    chosen = {cut: kinds[0] for cut, kinds in allowed.items()}
    together = drift(chosen)
    while together.drop > max_drop:
        worst = max(
            (c for c in chosen if chosen[c] != "native"), key=lambda c: alone[c][chosen[c]].max_abs
        )
        chosen[worst] = allowed[worst][allowed[worst].index(chosen[worst]) + 1]
        together = drift(chosen)
    return [EdgeChoice(cut, chosen[cut], alone[cut]) for cut in cuts], together


def _worth(known: Mapping[Dtype, tuple[float, float, float]]) -> list[Dtype]:
    """Order dtypes by cost, without those that another one beats in error at about their cost.

    So each has a smaller error than the one before it. Values are (cost, drop, largest error).
    """
    kept = [
        dtype
        for dtype, (cost, *error) in known.items()
        if not any(c <= SAME * cost and other < error for c, *other in known.values())
    ]
    return sorted(kept, key=known.__getitem__)


def _outputs(
    runner: Runner, cutter: Cutter, batch: Sequence[torch.Tensor], casts: Mapping[int, Dtype]
) -> list[torch.Tensor]:
    def watch(position: int, values: Values) -> None:
        if position in casts:
            names = {runner.here(node): node.name for node in cutter.valued(position)}
            sent = cast({name: values[here] for here, name in names.items()}, casts[position])
            for here, name in names.items():
                values[here] = uncast(name, sent, values[here].dtype)

    return list(runner.run(batch, watch=watch if casts else None))


def _drift(exact: Sequence[list[torch.Tensor]], sent: Sequence[list[torch.Tensor]]) -> Drift:
    """Compare answers, batch by batch. What is no longer a number counts as infinitely wrong."""
    classes = len(exact[0]) == 1 and exact[0][0].dim() == 2 and exact[0][0].shape[1] > 1
    changed = samples = 0
    max_abs = squares = spread = 0.0
    for a, b in zip(exact, sent, strict=True):
        samples += len(a[0])
        if classes:
            changed += int((a[0].argmax(1) != b[0].argmax(1)).sum())
        for x, y in zip(a, b, strict=True):
            gap = (x.double() - y.double()).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
            max_abs = max(max_abs, float(gap.max()))
            squares += float(gap.square().mean())
            spread += float(x.double().var()) if x.numel() > 1 else 1.0
    drop = changed / samples if classes else (squares / max(spread, 1e-30)) ** 0.5
    return Drift(drop if max_abs < float("inf") else 1.0, max_abs, samples, classes)
