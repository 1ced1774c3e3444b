"""What a person sees of a profile and of a plan."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from streaminfer.commands.planning import Outcome
from streaminfer.planning.figures import duration, size
from streaminfer.planning.planner import Edge
from streaminfer.planning.predict import LOAD, Candidate
from streaminfer.planning.profile import Profile

__all__ = ["show_plan", "show_profile", "to_json"]

ROWS = 24  # of the profile's table: parts between cuts, joined where there are more
FORM = 14  # characters of a candidate's form that stay on one line
LOOK: dict[str, Any] = {"title_justify": "left", "box": box.SIMPLE_HEAD, "pad_edge": False}
BLOCKS = " ▏▎▍▌▋▊▉█"


def show_profile(found: Profile, console: Console) -> None:
    """Print times by batch, then the model part by part, then the links."""
    speed = Table(title=f"{found.model}: whole model{_measured_at(found)}", **LOOK)
    for name in ("device", "threads", "batch", "ms", "samples/s", "spread"):
        speed.add_column(name, justify="left" if name == "device" else "right")
    for device in found.devices:
        for timing in device.timings:
            speed.add_row(
                f"{device.device} ({device.hardware})",
                str(device.threads),
                str(timing.batch),
                f"{timing.whole * 1000:,.1f}",
                f"{timing.batch / timing.whole:,.1f}",
                f"{timing.spread:.0%}",
            )
    console.print(speed)
    console.print(_parts(found))
    for link in found.links:
        rate = f"{1 / link.per_byte / 1e6:,.0f} MB/s" if link.per_byte else "no bytes copied"
        console.print(f"link {link.name}: {link.alpha * 1e3:.2f} ms a hop, {rate} ({link.source})")
    console.print(
        f"input {found.ingest * 1e3:.2f} ms to decode; weights {size(found.weight_bytes)}"
    )


def _parts(found: Profile) -> Table:
    timing = found.devices[0].timings[0]
    table = Table(
        title=f"layer by layer on {found.devices[0].device}, batch {timing.batch}",
        **LOOK,
    )
    table.add_column("up to layer")
    for name in ("ms", "share"):
        table.add_column(name, justify="right")
    table.add_column("", width=16)
    for name in ("weights", "most alive", "bytes behind it", "as fp16", "int8", "zstd", "lz4"):
        table.add_column(name, justify="right")
    total = sum(timing.seconds)
    rows = _joined(found, total / ROWS, timing.seconds)
    for layer, first, last in rows:
        seconds = sum(timing.seconds[first : last + 1])
        nodes = found.nodes[first : last + 1]
        cut = next((c for c in found.cuts if c.position == last), None)
        encoded = [
            f"{found.encoding(last, dtype, codec).ratio:.2f}"
            for dtype, codec in (
                ("float16", "none"),
                ("int8", "none"),
                ("native", "zstd"),
                ("native", "lz4"),
            )
        ]
        table.add_row(
            layer,
            f"{seconds * 1000:,.2f}",
            f"{seconds / total:.0%}",
            bar(seconds / total * 4, 16),
            size(sum(n.weight_bytes for n in nodes)),
            size(max(n.peak_bytes for n in nodes)),
            f"{cut.row_bytes:,}" if cut else "",
            *(encoded if cut else [""] * 4),
        )
    return table


def _measured_at(found: Profile) -> str:
    return f", samples of {list(found.sample)}, the largest" if found.sample else ""


def _joined(found: Profile, least: float, seconds: Sequence[float]) -> list[tuple[str, int, int]]:
    """Join parts until each takes a fair share of the time."""
    rows: list[tuple[str, int, int]] = []
    start, spent = 0, 0.0
    for layer, first, last in found.layers():
        spent += sum(seconds[first : last + 1])
        if spent >= least or last == len(found.nodes) - 1:
            rows.append((layer, start, last))
            start, spent = last + 1, 0.0
    return rows


def bar(share: float, width: int) -> str:
    """Draw a share of 0 to 1 in eighths of a character."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return "█" * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")


def show_plan(outcome: Outcome, console: Console, written: Path | None) -> None:
    """Print the answer, why, its stages and the runners-up."""
    best = outcome.answer.best
    console.print(
        Text.assemble(
            (best.form, "bold green"),
            f"  batch {best.batch}  predicted {best.throughput:,.1f} samples/s",
            f"  (at {LOAD:.0%} of it p50 {duration(best.p50)}, p99 {duration(best.p99)})",
            _measured_at(outcome.profile),
        )
    )
    for line in outcome.answer.why:
        console.print(Padding(line, (0, 0, 0, 2)), highlight=False)
    console.print()
    console.print(
        Group(_stages(best), *([_edges(outcome)] if outcome.choices else []), _others(outcome))
    )
    if written:
        random = " --random-weights" if outcome.random_weights else ""
        console.print(f"written: {written}", highlight=False)
        console.print(f"next     streaminfer verify {written}{random}", highlight=False)
        console.print(f"         streaminfer run {written}{random}", highlight=False)


def _stages(best: Candidate) -> Table:
    table = Table(title="stages", **LOOK)
    for name in ("stage", "until", "on"):
        table.add_column(name, overflow="fold")
    for name in ("compute", "hops", "busy", "weights", "memory", "bytes out"):
        table.add_column(name, justify="right", no_wrap=True)
    busy = best.busy()
    for stage in best.stages:
        devices = ", ".join(dict.fromkeys(stage.devices))
        copies = f" x{stage.replicas}" if stage.replicas > 1 else ""
        copies += f" ÷{stage.split.how.parts}" if stage.split else ""
        threads = f", {stage.threads} threads" if stage.threads > 1 else ""
        table.add_row(
            stage.name,
            stage.until or "end",
            devices + copies + threads,
            duration(stage.compute),
            duration(stage.receive + stage.send),
            f"{busy[stage.name]:.0%}",
            size(stage.weight_bytes),
            size(stage.memory),
            f"{stage.row_bytes:,}",
        )
    return table


def _edge_rows(outcome: Outcome) -> Iterator[dict[str, Any]]:
    """Yield what each dtype alone saves and changes at each cut: bytes a sample, drift."""
    for choice in outcome.choices:
        point = next(c for c in outcome.profile.cuts if c.position == choice.position)
        for dtype, drift in choice.alone.items():
            ratio = outcome.profile.encoding(choice.position, dtype, "none").ratio
            yield {
                "until": point.layer,
                "dtype": dtype,
                "chosen": dtype == choice.dtype,
                "row_bytes": round(point.row_bytes * ratio),
                "saved": 1 / ratio,
                "drift": asdict(drift),
            }


def _edges(outcome: Outcome) -> Table:
    table = Table(title="what casting one edge alone saves and changes", **LOOK)
    for name in ("cut behind", "as"):
        table.add_column(name)
    for name in ("bytes/sample", "fewer", "answers changed", "largest error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in _edge_rows(outcome):
        drift = row["drift"]
        table.add_row(
            row["until"],
            row["dtype"] + (" (chosen)" if row["chosen"] else ""),
            f"{row['row_bytes']:,}",
            f"{row['saved']:.2f} x",
            f"{drift['drop']:.2%}" if drift["classes"] else f"{drift['drop']:.1e}",
            f"{drift['max_abs']:.1e}",
        )
    return table


def _others(outcome: Outcome) -> Table:
    tried = bool(outcome.measured)
    table = Table(title="candidates", **LOOK)
    longest = max(len(candidate.form) for candidate in outcome.candidates)
    table.add_column("form", min_width=min(FORM, longest + 2), max_width=2 * FORM)
    table.add_column("cut behind", overflow="ellipsis", no_wrap=True, max_width=14)
    names = ["batch", "predicted/s", "p50/p99 ms"]
    names += ["measured/s", "p50/p99 ms"] if tried else []
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for place, candidate in enumerate(outcome.candidates):
        measured = outcome.measured.get(place)
        row = [
            ("→ " if place == 0 else "  ") + candidate.form,
            ", ".join(s.until for s in candidate.stages if s.until) or "-",
            str(candidate.batch),
            f"{candidate.throughput:,.1f}",
            f"{candidate.p50 * 1000:,.0f}/{candidate.p99 * 1000:,.0f}",
        ]
        if tried and measured:
            row += [
                f"{measured.throughput:,.1f}",
                f"{measured.p50 * 1000:,.0f}/{measured.p99 * 1000:,.0f}",
            ]
        table.add_row(*row, style="bold" if place == 0 else "")
    return table


def to_json(outcome: Outcome) -> str:
    """Return the outcome for programs."""
    return json.dumps(_document(outcome))


def _document(outcome: Outcome) -> dict[str, Any]:
    rows = []
    for place, candidate in enumerate(outcome.candidates):
        measured = outcome.measured.get(place)
        rows.append(
            {
                "form": candidate.form,
                "batch": candidate.batch,
                "limit": candidate.limit,
                "stages": [asdict(stage) for stage in candidate.stages],
                "hop_bytes": candidate.hop_bytes,
                "predicted": {
                    "throughput": candidate.throughput,
                    "p50": candidate.p50,
                    "p99": candidate.p99,
                    "busy": candidate.busy(),
                },
                "measured": asdict(measured) if measured else None,
            }
        )
    drift = outcome.drift
    return {
        "pipeline": outcome.subject.spec.pipeline,
        "model": outcome.profile.model,
        "best": rows[0],
        "others": rows[1:],
        "why": list(outcome.answer.why),
        "link": outcome.request.link.model_dump(),
        "edges": {
            stage.name: {"dtype": edge.dtype, "compress": edge.codec}
            for before, stage in zip(
                outcome.answer.best.stages, outcome.answer.best.stages[1:], strict=False
            )
            for edge in [outcome.edges.get(before.last, Edge())]
        },
        "dtypes": list(_edge_rows(outcome)),
        "drift": asdict(drift) if drift else None,
    }
