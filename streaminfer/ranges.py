"""Sizes that a dimension may have: "64..512", or every 32nd of them, "64..512/32"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PATTERN", "Range", "describe"]

PATTERN = r"^\s*(\d+)\s*\.\.\s*(\d+)\s*(?:/\s*(\d+)\s*)?$"
LEAST = 2  # torch.export takes a size of 1 for a constant


@dataclass(frozen=True, slots=True)
class Range:
    """The sizes low, low + step, … high. Dimensions of one `name` have the same size in a sample.

    A name is given by capture, where a model takes such samples only: the tokens and their mask.
    """

    low: int
    high: int
    step: int = 1
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Range:
        """Read "LOW..HIGH" or "LOW..HIGH/STEP". Raises ValueError with the remedy."""
        match = re.match(PATTERN, text)
        if not match:
            raise ValueError('expected a whole number, or a range as "64..512" or "64..512/32"')
        low, high, step = int(match[1]), int(match[2]), int(match[3] or 1)
        if low < LEAST:
            raise ValueError(f"{text}: a range begins at {LEAST} or above; 1 can only be fixed")
        if low >= high:
            remedy = f"write {low}" if low == high else f'"{high}..{low}"'
            raise ValueError(f"{text}: the lower end is not below the upper one: {remedy}")
        if step < 1 or step > high - low:
            raise ValueError(f"{text}: a step is 1 or more, and at most {high - low} here")
        if rest := (high - low) % step:
            ends = f'"{low}..{high - rest}/{step}" or "{low}..{high - rest + step}/{step}"'
            raise ValueError(f"{text}: steps of {step} from {low} do not end at {high}: {ends}")
        return cls(low, high, step)

    def __str__(self) -> str:
        """Return it as it is written."""
        return f"{self.low}..{self.high}" + (f"/{self.step}" if self.step > 1 else "")

    __repr__ = __str__

    def __contains__(self, size: int) -> bool:
        return self.low <= size <= self.high and (size - self.low) % self.step == 0

    def nearest(self, size: int) -> int:
        """Return the nearest of … low - step, low, low + step, …; in the middle, the larger."""
        return self.low + (2 * (size - self.low) + self.step) // (2 * self.step) * self.step

    def between(self, share: float) -> int:
        """Return the size at a share of the way from low (0) to high (1)."""
        return self.low + round((self.high - self.low) / self.step * share) * self.step


def describe(shape: Sequence[int | None], ranges: Sequence[Range | None]) -> str:
    """Return a sample's shape as an example in the file says it: "[3, 64..512, 64..512]"."""
    sizes = [str(given or size or "any") for size, given in _pairs(shape, ranges)]
    return f"[{', '.join(sizes)}]"


def _pairs(
    shape: Sequence[int | None], ranges: Sequence[Range | None]
) -> list[tuple[int | None, Range | None]]:
    return list(zip(shape, ranges or (None,) * len(shape), strict=True))
