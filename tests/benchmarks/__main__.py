"""Run the measures, print the table, keep the rows in build/bench.json.

`python -m tests.benchmarks [NAME…]`; exit code 1 if a goal does not hold.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.benchmarks import (
    bounded,
    digits,
    edges,
    loading,
    memory,
    planning,
    replicas,
    resnet50,
    scripts,
    shards,
    simulated,
    simulated_kafka,
    sizes,
    speedup,
    tiles,
    zoo,
)
from tests.benchmarks.processes import ROOT
from tests.benchmarks.rows import Row, update

FILE = ROOT / "build" / "bench.json"
Measure = Callable[[Mapping[str, str | None]], Awaitable[list[Row]]]
# What shares its rounds stands together. Without a goal: only reported.
MEASURES: Sequence[tuple[Measure, Mapping[str, str | None]]] = (
    (memory.hop, {memory.HOP: None}),
    (memory.efficiency, {memory.EFFICIENCY: None}),
    (digits.measure, {digits.CHAIN: "≥ 0.5"}),
    (replicas.weighted, {replicas.WEIGHTED: "≥ 1.4"}),
    (replicas.balance, {replicas.BALANCE: "≥ 2.0"}),
    (scripts.measure, {scripts.TIME: None} | dict.fromkeys(scripts.RATES)),
    (simulated.by_wall, {simulated.WALL: "≥ 12"}),
    (simulated.by_cpu, {simulated.CPU: None}),
    (simulated_kafka.measure, {simulated_kafka.NAME: None}),
    (bounded.on_memory, {bounded.MEMORY: "≤ 1.0"}),
    (bounded.on_kafka, {bounded.KAFKA: "≤ 1.0"}),
    (tiles.measure, {tiles.TIME: "≤ 0.55", tiles.MEMORY: "≤ 0.55"}),
    (edges.measure, {edges.FP16: "≥ 2.0", edges.INT8: "≥ 3.8"}),
    (planning.plan_time, {planning.TIME: "≤ 5"}),
    (planning.brute, {planning.BRUTE: "≤ 1.05"}),
    (planning.equal, dict.fromkeys(planning.EQUAL.values(), "≥ 1.0") | {planning.WINS: "≥ 3"}),
    (resnet50.measure, {resnet50.RAW: "≥ 1.0", resnet50.PLAIN: None}),
    (shards.measure, {shards.EQUAL: "≥ 1.0", shards.PAIRS: "≤ 1e-6"}),
    (speedup.measure, {speedup.MEMORY: "≥ 1.85", speedup.KAFKA: "≥ 1.7"}),
    (sizes.measure, {sizes.ROUNDED: None, sizes.OWN: None}),
    (loading.measure, {loading.TIME: "≤ 20", loading.BYTES: "≤ 1.01"}),
    (zoo.measure, {zoo.EQUAL: "≥ 1.0"}),
)
NAMES = [name for _, goals in MEASURES for name in goals]


async def run(only: Sequence[str]) -> list[Row]:
    """Run these measures; all if none is named."""
    rows: list[Row] = []
    for measure, goals in MEASURES:
        wanted = {name: goal for name, goal in goals.items() if not only or name in only}
        if not wanted:
            continue
        print(f"{' '.join(wanted)}", flush=True)
        began = time.monotonic()
        try:
            rows += await measure(wanted)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            rows += [Row(name, None, "", goal, reason) for name, goal in wanted.items()]
        print(f"  {time.monotonic() - began:.0f} s", flush=True)
    return rows


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the table, and below it how each value came about."""
    drawn = Table("measure", "value", "unit", "goal", "holds")
    for row in rows:
        mark = "[green]yes[/]" if row.holds else "[red]NO[/]"
        drawn.add_row(row.name, _value(row.value), row.unit, row.goal or "report", mark)
    console.print(drawn)
    for row in rows:
        console.print(f"[bold]{row.name}[/]: {escape(row.note)}", highlight=False, soft_wrap=True)


def _value(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 100 else f"{value:,.0f}"


def main(arguments: Sequence[str]) -> int:
    """Measure; 0 if every goal holds, 1 if not, 2 if there is no such measure."""
    console = Console()
    for name in arguments:
        if name not in NAMES:
            console.print(f"no measure {name!r}; there are: {', '.join(NAMES)}")
            return 2
    rows = asyncio.run(run(arguments))
    update(FILE, rows, NAMES)
    show(rows, console)
    console.print(f"all rows: {FILE.relative_to(ROOT)}")
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
