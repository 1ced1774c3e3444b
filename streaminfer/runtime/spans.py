"""A set of offsets as few rising spans: what is done of a partition fits into a commit's note.

offsets    4 5 6 7 8 9 · · 12 13            spans     [4, 9] [12, 13]
note       base85(zlib(4 5 3 1))            each number less the one before it
"""

from __future__ import annotations

import zlib
from base64 import b85decode, b85encode
from bisect import bisect_right
from collections.abc import Iterable

import numpy as np

__all__ = ["MOST", "Spans"]

MOST = 8192  # spans that are kept: more samples than a pipeline has in flight per partition


class Spans:
    """Offsets that only ever get more; `[4, 9]` and `[10, 12]` become `[4, 12]`.

    A hole with as many spans above it as can be in flight is no longer waited for (its sample ended
    before it came here): beyond MOST spans, the lowest ones are taken together.
    """

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

    def __len__(self) -> int:
        return len(self._lows)

    def add(self, low: int, high: int) -> None:
        """Add all offsets from `low` to `high`, both inclusive."""
        at = bisect_right(self._lows, low)
        first = at - 1 if at and self._highs[at - 1] >= low - 1 else at
        last = first
        while last < len(self._lows) and self._lows[last] <= high + 1:
            low, high = min(low, self._lows[last]), max(high, self._highs[last])
            last += 1
        self._lows[first:last], self._highs[first:last] = [low], [high]
        if len(self._lows) > MOST:
            del self._lows[1], self._highs[0]

    def last(self, count: int) -> list[tuple[int, int]]:
        """Return the highest spans, rising; at most so many."""
        return list(zip(self._lows[-count:], self._highs[-count:], strict=True))

    def pack(self, most: int) -> str:
        """Return the spans as ASCII text of at most so many bytes: the highest ones that fit."""
        count = len(self._lows)
        while True:
            bounds = np.array([self._lows[-count:], self._highs[-count:]], "<i8").T.reshape(-1)
            deltas = np.diff(bounds, prepend=0)
            planes = np.ascontiguousarray(deltas.view(np.uint8).reshape(-1, 8).T)
            text = b85encode(zlib.compress(planes.tobytes(), 6)).decode("ascii")
            if len(text) <= most or count <= 1:
                return text
            count = max(1, min(count - 1, count * most // len(text)))

    @classmethod
    def unpack(cls, text: str) -> Spans:
        """Read what `pack` wrote; "" is the empty set."""
        spans = cls()
        if text:
            planes = np.frombuffer(zlib.decompress(b85decode(text)), np.uint8).reshape(8, -1)
            bounds = np.cumsum(np.ascontiguousarray(planes.T).view("<i8").reshape(-1))
            spans._lows, spans._highs = bounds[0::2].tolist(), bounds[1::2].tolist()
        return spans
