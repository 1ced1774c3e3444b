"""What travels, and what it costs: a profile's encodings as bytes and seconds of one sample."""

from __future__ import annotations

from streaminfer.planning.profile import Profile
from streaminfer.planning.simulation.scenario import Encoded

__all__ = ["edge_name", "encoded"]


def edge_name(dtype: str, codec: str) -> str:
    """Return what an edge is called: "native", "zstd", "float16", "int8+lz4"."""
    parts = [name for name, nothing in ((dtype, "native"), (codec, "none")) if name != nothing]
    return "+".join(parts) or "native"


def encoded(profile: Profile, layer: str) -> dict[str, Encoded]:
    """Return what each edge that was measured costs behind a layer, by name.

    Args:
        profile: of the model; the encodings of the nearest cut that was measured count.
        layer: the last one before the edge; {} if no stage may end there.
    """
    point = next((cut for cut in profile.cuts if cut.layer == layer), None)
    if point is None:
        return {}
    found = {}
    for dtype, codec in dict.fromkeys((e.dtype, e.codec) for e in profile.encodings):
        e, row = profile.encoding(point.position, dtype, codec), point.row_bytes
        found[edge_name(dtype, codec)] = Encoded(row * e.ratio, row * e.encode, row * e.decode)
    return found
