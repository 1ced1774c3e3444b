"""The report's figures as SVG: the model with its cuts, and the stages over time.

layers                 time            bytes behind
┌ features.0 ┐  ████ 2.1 ms     ██████████ 3.2 MB         one colour per stage
│ features.1 │  ██ 1.0 ms       ████ 1.6 MB
╞════════════╡ ── cut: stem | head, 62,720 bytes per sample ──
│ features.2 │  ███ 1.4 ms      ██ 0.8 MB
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from streaminfer.planning.figures import duration, size
from streaminfer.planning.predict import Candidate
from streaminfer.planning.profile import Profile

__all__ = ["graph", "timeline"]

ROWS = 34  # boxes in the model's column; smaller parts are joined
ROW, GAP, CUT = 20, 3, 26  # pixels: a row, the space below it, the space of a cut
NAMES, TIMES, BYTES = 190, 300, 250  # widths of the three columns
LEFT, SPAN = 110, 810  # of the timeline: names, then time
LANE = 30
PERIODS = 7  # of the slowest stage, that the timeline shows
COLOURS = 6


class Part(NamedTuple):
    """Consecutive nodes that are drawn as one box."""

    layer: str
    first: int
    last: int
    seconds: float
    row_bytes: int | None  # behind it; None: no cut there


def parts_of(profile: Profile, seconds: Sequence[float], keep: Sequence[int]) -> list[Part]:
    """Join the parts between cuts to at most ROWS boxes; a box never reaches over `keep`."""
    total, found = sum(seconds), []
    start, spent = 0, 0.0
    known = {cut.position: cut.row_bytes for cut in profile.cuts}
    for layer, first, last in profile.layers():
        spent += sum(seconds[first : last + 1])
        if spent >= total / ROWS or last in keep or last == len(profile.nodes) - 1:
            found.append(Part(layer, start, last, spent, known.get(last)))
            start, spent = last + 1, 0.0
    return found


def graph(profile: Profile, candidate: Candidate) -> str:
    """Draw the model from top to bottom: boxes, time, bytes behind each, and the cuts."""
    timing = profile.devices[0].timing(candidate.batch) or profile.devices[0].timings[0]
    ends = [stage.last for stage in candidate.stages]
    parts = parts_of(profile, timing.seconds, ends)
    slowest = max(part.seconds for part in parts)
    largest = max((part.row_bytes or 0 for part in parts), default=0) or 1
    lines: list[str] = []
    y, stage = 24, 0
    for part in parts:
        lines += _row(part, y, stage, slowest, largest)
        y += ROW + GAP
        if part.last == ends[stage] and stage < len(ends) - 1:
            lines.append(_cut(candidate, stage, y))
            y += CUT
            stage += 1
    width = NAMES + TIMES + BYTES + 180
    heads = zip((0, NAMES + 16, NAMES + TIMES + 96), _HEADS, strict=True)
    titles = [f'<text class="head" x="{x}" y="12">{text}</text>' for x, text in heads]
    return _svg(width, y + 6, [*titles, *lines], "the model's layers, top to bottom, and its cuts")


_HEADS = ("layers", "time of a micro-batch", "bytes per sample behind it")


def _row(part: Part, y: int, stage: int, slowest: float, largest: int) -> Iterator[str]:
    colour = f"s{stage % COLOURS}"
    middle = y + ROW / 2 + 4
    title = f"<title>{escape(part.layer)}: {part.seconds * 1000:.3f} ms</title>"
    name = part.layer if len(part.layer) <= 27 else "…" + part.layer[-26:]
    yield f"<g>{title}" + _bar(f"box {colour}", 0, y, NAMES, ROW)
    yield f'<text class="name" x="8" y="{middle}">{escape(name)}</text></g>'
    width = max(1.0, part.seconds / slowest * TIMES)
    x = NAMES + 16
    yield _bar(colour, x, y + 3, width, ROW - 6)
    yield _figure(duration(part.seconds), x + width + 6, middle)
    if part.row_bytes is None:
        return
    x = NAMES + TIMES + 96
    width = max(1.0, part.row_bytes / largest * BYTES)
    yield _bar("bytes", x, y + 3, width, ROW - 6)
    yield _figure(size(part.row_bytes), x + width + 6, middle)


def _bar(kind: str, x: float, y: float, width: float, height: float) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" '
        'rx="3"/>'
    )


def _figure(text: str, x: float, y: float) -> str:
    return f'<text class="figure" x="{x:.1f}" y="{y:.1f}">{text}</text>'


def _cut(candidate: Candidate, stage: int, y: int) -> str:
    before, after = candidate.stages[stage], candidate.stages[stage + 1]
    width = NAMES + TIMES + BYTES + 180
    middle = y + CUT / 2 - 2
    text = f"{before.name} ✂ {after.name}: {size(before.row_bytes)} per sample as sent"
    return (
        f'<line class="cut" x1="0" x2="{width}" y1="{middle}" y2="{middle}"/>'
        + _bar("label", NAMES + 14, middle - 10, 7.6 * len(text), 20)
        + f'<text class="cuttext" x="{NAMES + 18}" y="{middle + 4}">{escape(text)}</text>'
    )


class Turn(NamedTuple):
    """One micro-batch on one device."""

    lane: int
    stage: int
    batch: int
    start: float
    received: float
    computed: float
    end: float


def schedule(candidate: Candidate) -> list[Turn]:
    """Let micro-batches flow through the stages at full load, as the predicted times say.

    The first stage takes the next one while no more are under way than two for each device. Where
    shared cores or the event loop limit, every step is stretched by what they delay.
    """
    own = max(stage.period for stage in candidate.stages)
    stretch = max(1.0, candidate.period / own)
    free = [[0.0] * len(stage.devices) for stage in candidate.stages]
    lanes = [sum(len(s.devices) for s in candidate.stages[:k]) for k in range(len(free))]
    window = 2 * sum(stage.replicas for stage in candidate.stages)
    ended: list[float] = []
    turns: list[Turn] = []
    for batch in range(6 * window + 4 * PERIODS):
        at = ended[batch - window] if batch >= window else 0.0
        for k, stage in enumerate(candidate.stages):
            device = min(range(len(free[k])), key=free[k].__getitem__)
            at += stretch * stage.split.scatter if stage.split else 0.0
            start = max(at, free[k][device])
            received = start + stretch * stage.receive
            computed = received + stretch * stage.compute
            at = computed + stretch * stage.send
            for side in range(len(free[k])) if stage.split else (device,):
                free[k][side] = at  # the parts of a split are at work together
                turns.append(Turn(lanes[k] + side, k, batch, start, received, computed, at))
            at += stretch * stage.split.gather if stage.split else 0.0
        ended.append(at)
    return turns


def timeline(candidate: Candidate) -> str:
    """Draw the steady state: a lane per device, a block per micro-batch, bubbles in between."""
    turns = schedule(candidate)
    period = candidate.period
    begin = sorted(turn.start for turn in turns)[len(turns) // 2]
    end = begin + PERIODS * period
    scale = SPAN / (end - begin)
    lanes = [
        f"{stage.name} {device}" + (f" #{k}" if stage.devices.count(device) > 1 else "")
        for stage in candidate.stages
        for k, device in enumerate(stage.devices)
    ]
    lines = []
    for lane, name in enumerate(lanes):
        y = 8 + lane * (LANE + 8)
        lines.append(f'<text class="name" x="0" y="{y + LANE / 2 + 4}">{escape(name)}</text>')
        lines.append(
            f'<rect class="bubble" x="{LEFT}" y="{y}" width="{SPAN}" height="{LANE}" rx="3"/>'
        )
    for turn in turns:
        if turn.end > begin and turn.start < end:
            lines += _block(turn, begin, end, scale)
    bottom = 8 + len(lanes) * (LANE + 8)
    step = _nice((end - begin) / 6)
    ticks = int((end - begin) / step)
    for k in range(ticks + 1):
        x = LEFT + k * step * scale
        ends = f'y1="{bottom}" y2="{bottom + 4}"'
        lines.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" {ends}/>')
        lines.append(
            f'<text class="tickname" x="{x:.1f}" y="{bottom + 17}">{k * step * 1000:g} ms</text>'
        )
    return _svg(LEFT + SPAN + 30, bottom + 24, lines, "stages over time")


def _block(turn: Turn, begin: float, end: float, scale: float) -> Iterator[str]:
    y = 8 + turn.lane * (LANE + 8)

    def x(at: float) -> float:
        return LEFT + (min(max(at, begin), end) - begin) * scale

    colour = f"s{turn.stage % COLOURS}"
    for kind, a, b in (
        ("hop", turn.start, turn.received),
        (colour, turn.received, turn.computed),
        ("hop", turn.computed, turn.end),
    ):
        if x(b) > x(a):
            yield (
                f'<rect class="{kind}" x="{x(a):.1f}" y="{y}" width="{x(b) - x(a):.1f}" '
                f'height="{LANE}"/>'
            )
    left, right = x(turn.start), x(turn.end)
    yield f'<line class="edge" x1="{right:.1f}" x2="{right:.1f}" y1="{y}" y2="{y + LANE}"/>'
    if right - left > 26:
        yield (
            f'<text class="batch" x="{(left + right) / 2:.1f}" y="{y + LANE / 2 + 4}">'
            f"{turn.batch}</text>"
        )


def _nice(span: float) -> float:
    """Return 1, 2 or 5 times a power of ten, at or above the span."""
    power = 10.0 ** int(f"{span:e}".partition("e")[2])
    return next(step * power for step in (1, 2, 5, 10) if step * power >= span * (1 - 1e-9))


def _svg(width: float, height: float, lines: Sequence[str], label: str) -> str:
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return "\n".join([head, *lines, "</svg>"])
