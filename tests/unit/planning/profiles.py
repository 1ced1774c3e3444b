"""Profiles made by hand: round numbers, so that what the planner should say is plain."""

from __future__ import annotations

from collections.abc import Sequence

from streaminfer.planning.planner import Pool, Request
from streaminfer.planning.predict import Machine
from streaminfer.planning.profile import (
    CutPoint,
    DeviceProfile,
    Encoding,
    Link,
    NodeProfile,
    Profile,
    Timing,
)

__all__ = ["FREE", "made", "request"]

FREE = Link(name="free", alpha=0.0, per_byte=0.0, source="made up")
MB = 1_000_000


def made(
    ms: Sequence[float],
    weights: Sequence[int] | None = None,
    row_bytes: Sequence[int] | None = None,
    devices: Sequence[tuple[str, float]] = (("cpu", 1.0),),
    batches: Sequence[int] = (1,),
    single: float = 0.0,
    beside: float = 0.0,
) -> Profile:
    """Make a profile of layers a, b, c, …: one node each, a cut behind each but the last.

    Args:
        ms: of each layer at batch 1; larger batches take in proportion.
        weights: megabytes of each layer.
        row_bytes: what crosses each cut.
        devices: names and speeds.
        batches: the sizes that were measured.
        single: times that a layer takes as long after a pause; 0: not measured.
        beside: times that it takes as long while another device computes; 0: not measured.
    """
    names = "abcdefghij"[: len(ms)]
    crossing = list(row_bytes or [1000] * (len(ms) - 1))
    nodes = [
        NodeProfile(name=n, operator="aten.relu", layer=n, weight_bytes=w * MB, peak_bytes=0)
        for n, w in zip(names, weights or [0] * len(ms), strict=True)
    ]
    half = [
        Encoding(position=0, dtype=dtype, codec="none", ratio=0.5, encode=0, decode=0)
        for dtype in ("float16", "bfloat16")
    ]
    whole = Profile(
        model="made:up",
        key="0",
        nodes=tuple(nodes),
        cuts=tuple(
            CutPoint(position=k, layer=names[k], tensors=1, row_bytes=crossing[k])
            for k in range(len(ms) - 1)
        ),
        input_bytes=0,
        output_bytes=0,
        devices=tuple(_device(name, speed, ms, batches) for name, speed in devices),
        encodings=tuple(half),
    )
    return _slowed(whole, single, beside) if single or beside else whole


def _slowed(found: Profile, single: float, beside: float) -> Profile:
    def timing(one: Timing) -> Timing:
        slow = {by: tuple(by * t for t in one.seconds) for by in (single, beside)}
        more = {
            "single": (slow[single],) if single else (),
            "beside": slow[beside] if beside else (),
        }
        return one.model_copy(update=more)

    devices = tuple(
        one.model_copy(update={"timings": tuple(map(timing, one.timings))}) for one in found.devices
    )
    return found.model_copy(update={"devices": devices})


def _device(name: str, speed: float, ms: Sequence[float], batches: Sequence[int]) -> DeviceProfile:
    timings = []
    for batch in batches:
        seconds = tuple(t / 1000 / speed * batch for t in ms)
        timings.append(Timing(batch=batch, seconds=seconds, whole=sum(seconds), spread=0.0))
    return DeviceProfile(
        device=name, hardware=name, threads=1, memory=8 << 30, timings=tuple(timings)
    )


def request(profile: Profile, *names: Sequence[str], **options: object) -> Request:
    """Ask for a plan on devices with free links, and as many cores as it takes."""
    memory = float(options.pop("memory", 8e9))  # type: ignore[arg-type]
    pools = [Pool(d, tuple(n), memory) for d, n in zip(profile.devices, names, strict=True)]
    given = {"link": FREE, "machine": Machine(64), **options}
    return Request(tuple(pools), **given)  # type: ignore[arg-type]
