"""What a measure gives: a row of the table, and rounds that alternate what they compare.

round 0   ours  raw   plain       each system is up alone while it is measured, and the
round 1   raw   plain ours        order rotates: a machine that slows down or speeds up
round 2   plain ours  raw         does not favour one of them
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Rate", "Rounds", "Row", "alternate", "load_average", "spread", "update"]


@dataclass(frozen=True)
class Row:
    """One measure. `goal` is "≥ 1.0" or "≤ 1.0"; None: only reported.

    `value` None: it could not be measured, `note` says why, and no goal holds.
    """

    name: str
    value: float | None
    unit: str
    goal: str | None = None
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether it was measured and reaches its goal."""
        if self.value is None or not math.isfinite(self.value):
            return False
        if self.goal is None:
            return True
        sign, _, number = self.goal.partition(" ")
        if sign not in ("≥", "≤"):
            raise ValueError(f"{self.name}: goal {self.goal!r} is neither ≥ nor ≤ a number")
        bound = float(number)
        return self.value >= bound if sign == "≥" else self.value <= bound

    @property
    def command(self) -> str:
        """What measures it again."""
        return f"make bench ONLY={self.name}"

    def to_json(self) -> dict[str, object]:
        """Return the row as it stands in build/bench.json."""
        return {**asdict(self), "holds": self.holds, "command": self.command}


@dataclass(frozen=True)
class Rate:
    """One round of one system."""

    per_second: float  # samples
    cpu_ms: float = math.nan  # CPU time of its own processes per sample


@dataclass(frozen=True)
class Rounds:
    """What the systems reached, round by round."""

    rates: Mapping[str, Sequence[Rate]]

    def ratios(self, one: str, other: str) -> list[float]:
        """Return one system's rate by another's, within each round."""
        pairs = zip(self.rates[one], self.rates[other], strict=True)
        return [a.per_second / b.per_second for a, b in pairs]

    def ratio(self, one: str, other: str) -> float:
        """Return the median of the rounds' ratios."""
        return statistics.median(self.ratios(one, other))

    def note(self, one: str, other: str) -> str:
        """Say how far the rounds were apart."""
        return "; ".join(
            [
                f"rounds {spread(self.ratios(one, other))}",
                *[
                    f"{name} {spread([r.per_second for r in self.rates[name]], 1)}/s, "
                    f"{statistics.median(r.cpu_ms for r in self.rates[name]):.2f} CPU ms each"
                    for name in (one, other)
                ],
                load_average(),
            ]
        )


async def alternate(
    systems: Mapping[str, Callable[[], Awaitable[Rate]]],
    rounds: int,
    say: Callable[[str], None] = print,
) -> Rounds:
    """Measure every system once a round, first another one each time."""
    names = list(systems)
    found: dict[str, list[Rate]] = {name: [] for name in names}
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            before = load_average()
            rate = await systems[name]()
            found[name].append(rate)
            say(
                f"  round {k}  {name:<8} {rate.per_second:9.1f}/s  "
                f"{rate.cpu_ms:7.2f} CPU ms each  ({before})"
            )
    return Rounds(found)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return minimum, median and maximum."""
    found = (min(values), statistics.median(values), max(values))
    return "/".join(f"{value:.{digits}f}" for value in found)


def load_average() -> str:
    """Return what else the machine was doing, over the last minute."""
    return f"load {os.getloadavg()[0]:.1f}"


def update(file: Path, rows: Sequence[Row], order: Sequence[str]) -> list[dict[str, object]]:
    """Put rows into the list in `file`, keep those of other measures, return all in `order`."""
    known: dict[str, dict[str, object]] = {}
    if file.exists():
        known = {str(row["name"]): row for row in json.loads(file.read_text())}
    known |= {row.name: row.to_json() for row in rows}
    merged = [known[name] for name in order if name in known]
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(merged, indent=1, ensure_ascii=False) + "\n")
    part.replace(file)
    return merged
