"""A plan as one HTML page, with figures: what was chosen and why. It loads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from streaminfer.planning.codecs import EdgeChoice
from streaminfer.planning.drawing import graph, timeline
from streaminfer.planning.figures import duration, size
from streaminfer.planning.planner import Answer, Edge, Request
from streaminfer.planning.predict import LOAD, Candidate, Measured
from streaminfer.planning.profile import Profile

__all__ = ["Page"]

STYLE = """
:root { color-scheme: light dark;
  --ground: #fcfcfa; --text: #1d2126; --soft: #69717c; --line: #d9dce0; --bubble: #eceeef;
  --hop: #9aa3ae; --bytes: #b9a26a; --good: #17745a;
  --s0: #3f7cc4; --s1: #cf7432; --s2: #3c9a74; --s3: #a45bb0; --s4: #b8902a; --s5: #c8506a }
@media (prefers-color-scheme: dark) { :root {
  --ground: #14171b; --text: #e4e6e9; --soft: #98a1ac; --line: #343a42; --bubble: #23282e;
  --hop: #6f7985; --bytes: #8f7d4f; --good: #5cc5a4;
  --s0: #5b97de; --s1: #d98a50; --s2: #54b48d; --s3: #bb7cc6; --s4: #c9a347; --s5: #da6f88 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1000px; padding: 40px 24px 80px; background: var(--ground);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 15px; font-weight: 600; color: var(--soft); margin: 0 }
.answer { font-size: 30px; font-weight: 650; letter-spacing: -.01em; margin: 2px 0 18px }
h2 { font-size: 18px; margin: 44px 0 4px } p { margin: 4px 0 } .note { color: var(--soft) }
.facts { display: flex; flex-wrap: wrap; gap: 12px 36px; margin: 0 0 20px }
.facts div { font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums }
.facts span { display: block; font-size: 13px; font-weight: 400; color: var(--soft) }
ul { margin: 0; padding-left: 20px } .wide { overflow-x: auto; margin-top: 12px }
svg { display: block; width: 100%; min-width: 720px; height: auto;
  font: 12px system-ui, sans-serif; fill: var(--text) }
.s0 { fill: var(--s0) } .s1 { fill: var(--s1) } .s2 { fill: var(--s2) }
.s3 { fill: var(--s3) } .s4 { fill: var(--s4) } .s5 { fill: var(--s5) }
.box { fill-opacity: .22; stroke-width: 1 } .name { fill: var(--text) }
.figure, .head, .tickname { fill: var(--soft); font-variant-numeric: tabular-nums }
.bytes { fill: var(--bytes) } .hop { fill: var(--hop) } .bubble { fill: var(--bubble) }
.cut { stroke: var(--text); stroke-width: 1.5; stroke-dasharray: 5 4 }
.label { fill: var(--ground) } .cuttext { font-weight: 600 }
.tick { stroke: var(--soft) } .tickname { text-anchor: middle }
.edge { stroke: var(--ground); stroke-width: 1.5 }
.batch { text-anchor: middle; fill: #fff; font-size: 11px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: right; font-size: 13px; font-weight: 500; color: var(--soft) }
td { text-align: right } th, td { padding: 5px 10px; border-bottom: 1px solid var(--line);
  white-space: nowrap }
th:first-child, td:first-child { text-align: left } tr.best td { font-weight: 650 }
.words th:nth-child(2), .words td:nth-child(2) { text-align: left; white-space: normal;
  overflow-wrap: anywhere }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 2px;
  margin: 0 5px -1px 14px }
.key i:first-child { margin-left: 0 }
"""


@dataclass(frozen=True)
class Page:
    """All that the report shows."""

    title: str
    profile: Profile
    request: Request
    answer: Answer
    edges: Mapping[int, Edge] = field(default_factory=dict)
    choices: Sequence[EdgeChoice] = ()
    measured: Mapping[int, Measured] = field(default_factory=dict)

    def html(self) -> str:
        """Return the page."""
        best = self.answer.best
        body = [
            f"<h1>{escape(self.title)} · {escape(self.profile.model)}</h1>",
            f'<div class="answer">{escape(best.form)}</div>',
            f'<div class="facts">{"".join(self._facts())}</div>',
            "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in self.answer.why) + "</ul>",
            "<h2>The model and its cuts</h2>",
            f'<p class="note">{self._measured_on()} Point at a box for its figures.</p>',
            f'<div class="wide">{graph(self.profile, best)}</div>',
            "<h2>The stages over time</h2>",
            f'<p class="note">{self._timeline_note()}</p>',
            f'<p class="key note">{self._key()}</p>',
            f'<div class="wide">{timeline(best)}</div>',
            "<h2>Stages</h2>",
            _table(_STAGE_HEADS, self._stages()),
            "<h2>Candidates</h2>",
            _table(self._candidate_heads(), self._candidates()),
            *self._edges(),
            "<h2>What it rests on</h2>",
            _table(
                ("device", "threads", "batch", "ms", "samples/s", "spread of repeats"),
                self._timings(),
            ),
            f'<p class="note">{escape(self._link())}</p>',
        ]
        head = f"<meta charset=utf-8><title>{escape(self.title)}: plan</title>"
        view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
        return "\n".join(
            ["<!doctype html>", '<html lang="en">', f"<head>{head}{view}",
             f"<style>{STYLE}</style></head>", "<body>", *body, "</body></html>", ""]
        )  # fmt: skip

    def _facts(self) -> Iterator[str]:
        best, real = self.answer.best, self.measured.get(0)
        yield _fact(f"{best.throughput:,.1f}/s", "samples, predicted")
        if real:
            yield _fact(f"{real.throughput:,.1f}/s", "samples, measured here")
        yield _fact(
            f"{duration(best.p50)} / {duration(best.p99)}", f"p50 / p99 at {LOAD:.0%} of it"
        )
        yield _fact(str(best.batch), "samples in a micro-batch")
        yield _fact(size(self.profile.weight_bytes), "weights")
        if best.travels:
            yield _fact(size(best.travels), "per sample over hops")

    def _measured_on(self) -> str:
        device = self.profile.devices[0]
        threads = f"{device.threads} thread" + ("s" if device.threads > 1 else "")
        where = escape(f"{device.device} ({device.hardware}, {threads})")
        return (
            f"Times of a micro-batch of {self.answer.best.batch} on {where}; one colour per stage."
        )

    def _timeline_note(self) -> str:
        best = self.answer.best
        text = "At full load, as predicted; grey gaps are bubbles, in which a device waits."
        if best.limit == "cores":
            text += " The cores are shared, so every step is drawn as much longer as they delay it."
        elif best.limit == "event loop":
            text += (
                " One event loop serves all hops; every step is drawn as much longer as it delays."
            )
        return text

    def _key(self) -> str:
        names = [
            (f"{s.name}, {s.split.how.short}" if s.split else s.name, f"s{k % 6}")
            for k, s in enumerate(self.answer.best.stages)
        ]
        marks = [*names, ("receive and send", "hop"), ("bubble", "bubble")]
        return "".join(f'<i style="background: var(--{c})"></i>{escape(n)}' for n, c in marks)

    def _stages(self) -> Iterator[Sequence[str]]:
        best = self.answer.best
        for stage in best.stages:
            yield (
                stage.name,
                stage.until or "the model's end",
                f"{', '.join(dict.fromkeys(stage.devices))} x{len(stage.devices)}"
                + (f", {stage.split.how.short}" if stage.split else ""),
                duration(stage.compute),
                duration(stage.receive + stage.send),
                f"{best.busy()[stage.name]:.0%}",
                size(stage.weight_bytes),
                size(stage.memory),
            )

    def _candidate_heads(self) -> tuple[str, ...]:
        heads = ("form", "cut behind", "batch", "bytes/sample", "predicted/s", "p50", "p99")
        return (*heads, "measured/s", "p50", "p99") if self.measured else heads

    def _candidates(self) -> Iterator[Sequence[str]]:
        for place, candidate in enumerate((self.answer.best, *self.answer.others)):
            row = _row(candidate)
            if self.measured:
                real = self.measured.get(place)
                row += (
                    [f"{real.throughput:,.1f}", duration(real.p50), duration(real.p99)]
                    if real
                    else ["-"] * 3
                )
            yield row

    def _edges(self) -> Iterator[str]:
        if not self.choices:
            return
        yield "<h2>What travels</h2>"
        yield '<p class="note">What casting one edge alone does to the answers.</p>'
        rows = []
        for choice in self.choices:
            point = next(c for c in self.profile.cuts if c.position == choice.position)
            for dtype, drift in choice.alone.items():
                ratio = self.profile.encoding(choice.position, dtype, "none").ratio
                changed = f"{drift.drop:.2%}" if drift.classes else f"{drift.drop:.1e}"
                rows.append(
                    (
                        point.layer,
                        dtype + (" (chosen)" if dtype == choice.dtype else ""),
                        size(point.row_bytes),
                        size(point.row_bytes * ratio),
                        f"{1 / ratio:.2f} x",
                        changed,
                        f"{drift.max_abs:.1e}",
                    )
                )
        yield _table(
            (
                "cut behind",
                "dtype",
                "native",
                "as cast",
                "fewer",
                "answers changed",
                "largest error",
            ),
            rows,
        )

    def _timings(self) -> Iterator[Sequence[str]]:
        for device in self.profile.devices:
            for timing in device.timings:
                yield (
                    f"{device.device} ({device.hardware})",
                    str(device.threads),
                    str(timing.batch),
                    f"{timing.whole * 1000:,.1f}",
                    f"{timing.batch / timing.whole:,.1f}",
                    f"{timing.spread:.0%}",
                )

    def _link(self) -> str:
        link = self.request.link
        rate = f"{1 / link.per_byte / 1e6:,.0f} MB/s" if link.per_byte else "no copy of bytes"
        return (
            f"Link {link.name}: {link.alpha * 1000:.2f} ms a hop and {rate} ({link.source}); half "
            "of it is charged to each side. "
            f"Decoding an input takes {self.profile.ingest * 1000:.2f} ms."
        )


_STAGE_HEADS = ("stage", "until", "devices", "compute", "hops", "busy", "weights", "memory")


def _row(candidate: Candidate) -> list[str]:
    return [
        candidate.form,
        ", ".join(s.until for s in candidate.stages if s.until) or "-",
        str(candidate.batch),
        f"{candidate.travels:,}" if candidate.travels else "-",
        f"{candidate.throughput:,.1f}",
        duration(candidate.p50),
        duration(candidate.p99),
    ]


def _measured(real: Measured) -> list[str]:
    return [f"{real.throughput:,.1f}", duration(real.p50), duration(real.p99)]


def _table(heads: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    cells = [
        f"<tr{_best(k, heads)}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for k, row in enumerate(rows)
    ]
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    kind = ' class="words"' if heads[1] in ("until", "cut behind") else ""
    return f'<div class="wide"><table{kind}><tr>{head}</tr>{"".join(cells)}</table></div>'


def _best(place: int, heads: Sequence[str]) -> str:
    return ' class="best"' if place == 0 and heads[0] == "form" else ""


def _fact(value: str, what: str) -> str:
    return f"<div>{escape(value)}<span>{escape(what)}</span></div>"
