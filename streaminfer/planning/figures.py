"""Sizes and durations as a person reads them, in tables and in drawings."""

from __future__ import annotations

__all__ = ["duration", "size"]


def duration(seconds: float) -> str:
    """Return seconds as "0.24 ms", "12.5 ms" or "1.50 s"."""
    if seconds < 0.01:
        return f"{seconds * 1000:.2f} ms"
    return f"{seconds * 1000:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def size(nbytes: float) -> str:
    """Return bytes as "384 B", "3.1 kB" or "102.2 MB" (powers of 1000)."""
    for unit, unit_bytes in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= unit_bytes:
            return f"{nbytes / unit_bytes:,.1f} {unit}"
    return f"{nbytes:,.0f} B"
