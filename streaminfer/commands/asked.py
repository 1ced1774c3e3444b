"""What the command line asks of a plan, and its flags as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streaminfer.commands.road import KAFKA
from streaminfer.errors import ConfigError
from streaminfer.planning.codecs import DTYPE_NAMES
from streaminfer.planning.planner import Edge
from streaminfer.planning.profile import Link
from streaminfer.spec import parse_duration, parse_size

__all__ = ["Asked", "bound_of", "caps_of", "edge_of", "link_of", "share_of"]


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    model: str
    devices: Sequence[str]
    kwargs: str = "{}"
    example: str = ""
    random_weights: bool = False
    stages: int | None = None
    batch: int | None = None
    memory: str | None = None
    slo: str | None = None
    link: str | None = None  # memory, kafka, or a rate: 100MB/s
    kafka: str | None = None
    codec: str | None = None  # auto, or a dtype
    max_drop: str = "0.1%"
    calibrate: str | None = None
    tries: bool = False
    fresh: bool = False  # measure again, whatever was measured before


def link_of(asked: Asked) -> Link | None:
    """Return a link that the user describes by its rate. Raises ConfigError."""
    if asked.link in (None, "memory", "kafka", "local"):
        return None
    text = str(asked.link)
    try:
        rate = parse_size(text.removesuffix("/s"))
        if not text.endswith("/s") or rate <= 0:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{text!r} is no link", where="--link", hint="memory, kafka, or a rate: 100MB/s"
        ) from None
    return Link(name=text, alpha=KAFKA.alpha, per_byte=1 / rate, source="as asked")


def caps_of(text: str | None, names: Sequence[str]) -> dict[str, float]:
    """Read "4GB" or "cuda:0=16GB,cpu=2GB". Raises ConfigError."""
    caps: dict[str, float] = {}
    for part in (text or "").split(",") if text else []:
        name, _, size = part.rpartition("=")
        try:
            nbytes = parse_size(size.strip())
        except ValueError as error:
            raise ConfigError(
                str(error), where="--memory", hint="4GB, or cuda:0=16GB,cpu=2GB"
            ) from None
        if name and name not in names:
            raise ConfigError(
                f"{name!r} is none of the devices",
                where="--memory",
                hint=", ".join(sorted(set(names))),
            )
        caps |= dict.fromkeys([name] if name else names, float(nbytes))
    return caps


def bound_of(text: str | None) -> float | None:
    """Read "p99=50ms" as seconds. Raises ConfigError."""
    if text is None:
        return None
    name, _, value = text.partition("=")
    try:
        if name != "p99":
            raise ValueError
        return parse_duration(value)
    except ValueError:
        raise ConfigError(f"{text!r} is no bound", where="--slo", hint="p99=50ms") from None


def share_of(text: str) -> float:
    """Read "0.1%" or 0.001. Raises ConfigError."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if not 0 <= share <= 1:
            raise ValueError
    except ValueError:
        raise ConfigError(f"{text!r} is no share", where="--max-drop", hint="0.1%") from None
    return share


def edge_of(codec: str | None) -> Edge:
    """Return the edge that a codec names; `auto` starts as native. Raises ConfigError."""
    if codec in (None, "auto"):
        return Edge()
    for dtype in DTYPE_NAMES:
        if codec == dtype:
            return Edge(dtype)
    raise ConfigError(
        f"no codec {codec!r}", where="--codec", hint=f"auto, or {', '.join(DTYPE_NAMES)}"
    )
