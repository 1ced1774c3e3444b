"""What a person sees while a pipeline runs: one row per stage, and the progress of the images."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from streaminfer.metrics import Reading

__all__ = ["Progressing", "Row", "Rows", "table"]

PREFIX = "streaminfer_stage_"


@dataclass(frozen=True, slots=True)
class Row:
    """One stage between two looks. Rates per second, times in seconds, busy 0-1."""

    stage: str
    rate_in: float = 0.0
    rate_out: float = 0.0
    batch: float = 0.0
    queue_p99: float = 0.0
    compute_p99: float = 0.0
    busy: float = 0.0
    lag: int = 0


@dataclass
class _Sums:
    """A stage's readings, summed over its replicas."""

    values: dict[str, float] = field(default_factory=dict)
    buckets: dict[str, dict[float, float]] = field(default_factory=dict)


class Rows:
    """Turns readings into rows: rates over the last `span` seconds, quantiles over the run."""

    def __init__(self, stages: Sequence[str], span: float = 3.0) -> None:
        self._stages, self._span = stages, span
        self._past: list[tuple[float, dict[str, _Sums]]] = []

    def look(self, readings: Iterable[Reading], now: float | None = None) -> list[Row]:
        """Take the readings of now and return the rows."""
        now = time.monotonic() if now is None else now
        sums = _sum(readings)
        self._past = [p for p in self._past if now - p[0] <= self._span] or self._past[-1:]
        before, old = self._past[0] if self._past else (now, sums)
        self._past.append((now, sums))
        seconds = max(now - before, 1e-9)
        return [
            self._row(s, sums.get(s, _Sums()), old.get(s, _Sums()), seconds) for s in self._stages
        ]

    def totals(self, readings: Iterable[Reading], seconds: float) -> list[Row]:
        """Return the rows of a whole run that took `seconds`."""
        sums = _sum(readings)
        return [
            self._row(s, sums.get(s, _Sums()), _Sums(), max(seconds, 1e-9)) for s in self._stages
        ]

    def _row(self, stage: str, new: _Sums, old: _Sums, seconds: float) -> Row:
        def gain(name: str) -> float:
            return new.values.get(name, 0.0) - old.values.get(name, 0.0)

        samples, waiting = gain("samples_total"), gain("inflight_samples")
        batches = new.values.get("batch_size_samples_count", 0.0)
        return Row(
            stage,
            rate_in=max(0.0, samples + waiting) / seconds,
            rate_out=samples / seconds,
            batch=new.values.get("batch_size_samples_sum", 0.0) / batches if batches else 0.0,
            queue_p99=_quantile(new.buckets.get("queue_duration_seconds_bucket", {}), 0.99),
            compute_p99=_quantile(new.buckets.get("compute_duration_seconds_bucket", {}), 0.99),
            busy=min(1.0, gain("busy_seconds_total") / seconds),
            lag=int(new.values.get("lag", 0)),
        )


def _sum(readings: Iterable[Reading]) -> dict[str, _Sums]:
    stages: dict[str, _Sums] = {}
    for name, labels, value in readings:
        stage = labels.get("stage")
        if stage is None:
            continue
        sums = stages.setdefault(stage, _Sums())
        if name == "streaminfer_consumer_lag_records":
            sums.values["lag"] = sums.values.get("lag", 0) + value
        elif name.startswith(PREFIX):
            short = name.removeprefix(PREFIX)
            if "le" in labels:
                buckets = sums.buckets.setdefault(short, {})
                bound = float(labels["le"])
                buckets[bound] = buckets.get(bound, 0) + value
            elif short != "busy_seconds_total" or labels["activity"] == "compute":
                sums.values[short] = sums.values.get(short, 0) + value
    return stages


def _quantile(buckets: dict[float, float], q: float) -> float:
    """Estimate a quantile from cumulative buckets, linear within a bucket as Prometheus does."""
    if not buckets or not (total := max(buckets.values())):
        return 0.0
    below, low = 0.0, 0.0
    for bound in sorted(buckets):
        count = buckets[bound]
        if count >= q * total:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (q * total - below) / max(count - below, 1e-9)
        below, low = count, bound
    return low


def table(rows: Sequence[Row], title: str = "") -> Table:
    """Draw the rows; the busiest stage, which limits the pipeline, is bold."""
    drawn = Table(title=title or None, box=None, pad_edge=False, header_style="dim")
    drawn.add_column("stage")
    for name in ("in/s", "out/s", "batch", "queue p99", "compute p99", "busy", "lag"):
        drawn.add_column(name, justify="right")
    drawn.add_column("")
    most = max((row.busy for row in rows), default=0.0)
    for row in rows:
        limits = row.busy == most and most > 0.5
        computes = row.stage != "sink"
        drawn.add_row(
            row.stage,
            f"{row.rate_in:,.0f}",
            f"{row.rate_out:,.0f}",
            f"{row.batch:.1f}" if computes else "",
            _time(row.queue_p99) if computes else "",
            _time(row.compute_p99) if computes else "",
            f"{row.busy:.0%}" if computes else "",
            f"{row.lag:,}",
            "█" * round(8 * row.busy),
            style="bold" if limits else None,
        )
    return drawn


def _time(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms" if seconds < 1 else f"{seconds:,.1f} s"


class Progressing:
    """The progress bar of a run with a known number of images."""

    def __init__(self, total: int) -> None:
        self._progress = Progress(
            TextColumn("images"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task: TaskID = self._progress.add_task("images", total=total)

    def done(self, count: int) -> None:
        """Say how many are answered."""
        self._progress.update(self._task, completed=count)

    def draw(self, rows: Sequence[Row]) -> RenderableType:
        """Draw the table and the bar beneath it."""
        return Group(table(rows), self._progress)
