"""A set of offsets as few rising spans: what is done of a partition fits into a commit's note."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

__all__ = ["Spans"]


class Spans:
    """Offsets that only ever get more; `[4, 9]` and `[10, 12]` become `[4, 12]`."""

    def __init__(self, spans: Iterable[tuple[int, int]] = ()) -> None:
        self._lows: list[int] = []
        self._highs: list[int] = []
        for low, high in spans:
            self.add(low, high)

    def __contains__(self, offset: object) -> bool:
        if not isinstance(offset, int):
            return False
        at = bisect_right(self._lows, offset) - 1
        return at >= 0 and offset <= self._highs[at]

    def add(self, low: int, high: int) -> None:
        """Add all offsets from `low` to `high`, both inclusive."""
        at = bisect_right(self._lows, low)
        first = at - 1 if at and self._highs[at - 1] >= low - 1 else at
        last = first
        while last < len(self._lows) and self._lows[last] <= high + 1:
            low, high = min(low, self._lows[last]), max(high, self._highs[last])
            last += 1
        self._lows[first:last], self._highs[first:last] = [low], [high]

    def last(self, count: int) -> list[tuple[int, int]]:
        """Return the highest spans, rising; at most so many."""
        return list(zip(self._lows[-count:], self._highs[-count:], strict=True))
