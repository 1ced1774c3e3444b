"""Writes the Grafana dashboard: `python docker/grafana/dashboard.py`.

    panels.yaml (what is shown) ─▶ Panel ─▶ dashboards/streaminfer.json

It is Grafana's classic model, schemaVersion 39. The JSON is as small as it loads:
what is left out is Grafana's default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

__all__ = ["Panel", "Row", "dashboard", "read", "text"]

HERE = Path(__file__).resolve().parent
WIDTH = 24  # columns of Grafana's grid
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
LABELS = {
    "PIPELINE": 'pipeline=~"$pipeline"',
    "STAGE": 'pipeline=~"$pipeline", stage=~"$stage"',
    "COMPUTES": 'pipeline=~"$pipeline", stage=~"$stage", stage!="sink"',
    "SINK": 'pipeline=~"$pipeline", stage="sink"',
}

Json = Mapping[str, object]


@dataclass(frozen=True)
class Panel:
    """One panel; panels.yaml says what the fields mean."""

    title: str
    unit: str
    description: str
    queries: Mapping[str, str]
    kind: Literal["timeseries", "stat", "heatmap"] = "timeseries"
    width: int = 8
    stacked: bool = False
    per_stage: bool = False
    top: float | None = None
    warn: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    """A titled group of panels."""

    title: str
    panels: tuple[Panel, ...]


def read(file: Path = HERE / "panels.yaml") -> tuple[Row, ...]:
    """Read what is to be shown."""
    rows = yaml.safe_load(file.read_text(encoding="utf-8"))
    return tuple(Row(r["row"], tuple(Panel(**panel) for panel in r["panels"])) for r in rows)


def dashboard(rows: Iterable[Row]) -> Json:
    """Return the dashboard as Grafana reads it."""
    return {
        "id": None,
        "uid": "streaminfer",
        "title": "streaminfer",
        "tags": ["streaminfer", "kafka", "inference"],
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "annotations": {"list": [_alerts()]},
        "panels": list(_placed(rows)),
    }


def text() -> str:
    """Return the content of the dashboard's file."""
    return json.dumps(dashboard(read()), indent=1, ensure_ascii=False) + "\n"


def _variables() -> list[Json]:
    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
        },
        _choice("pipeline", "label_values(streaminfer_stage_ready, pipeline)"),
        _choice(
            "stage", _labelled("label_values(streaminfer_stage_batches_total{PIPELINE}, stage)")
        ),
    ]


def _choice(name: str, query: str) -> Json:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # whenever the time range changes: stages come and go
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _alerts() -> Json:
    """Mark on every panel when an alert fired."""
    return {
        "name": "Alerts",
        "datasource": DATASOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertstate="firing", severity!="info"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{pipeline}} {{stage}} {{worker}}",
    }


def _placed(rows: Iterable[Row]) -> Iterator[Json]:
    """Lay the panels out from left to right and number them."""
    y = number = 0
    for row in rows:
        number += 1
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        head = {"type": "row", "title": row.title, "collapsed": False, "panels": []}
        yield {"id": number, "gridPos": place, **head}
        y, x, height = y + 1, 0, 0
        for panel in row.panels:
            width = WIDTH if panel.per_stage else panel.width
            if x + width > WIDTH:
                y, x = y + height, 0
            height = 4 if panel.kind == "stat" else 8
            number += 1
            place = {"x": x, "y": y, "w": width, "h": height}
            yield {"id": number, "gridPos": place, **_panel(panel)}
            x += width
        y += height


def _panel(panel: Panel) -> Json:
    targets = [_target(k, panel, *query) for k, query in enumerate(panel.queries.items())]
    repeat = {"repeat": "stage", "repeatDirection": "h", "maxPerRow": 4} if panel.per_stage else {}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
        **repeat,
    }


def _target(number: int, panel: Panel, legend: str, expression: str) -> Json:
    at_once = panel.kind == "stat"
    return {
        "refId": chr(ord("A") + number),
        "datasource": DATASOURCE,
        "expr": _labelled(expression),
        "legendFormat": legend,
        "format": "heatmap" if panel.kind == "heatmap" else "time_series",
        "instant": at_once,
        "range": not at_once,
        "exemplar": False,
    }


def _labelled(expression: str) -> str:
    """Put the labels where their words stand."""
    return re.sub(rf"\b({'|'.join(LABELS)})\b", lambda word: LABELS[word[0]], expression)


def _defaults(panel: Panel) -> Json:
    steps: list[Json] = [{"color": "green", "value": None}]
    steps += [
        {"color": color, "value": value}
        for color, value in zip(("yellow", "red"), panel.warn, strict=False)
    ]
    most = {} if panel.top is None else {"max": panel.top}
    return {
        "unit": panel.unit,
        "min": 0,
        **most,
        "thresholds": {"mode": "absolute", "steps": steps},
        "custom": _lines(panel.stacked) if panel.kind == "timeseries" else {},
    }


def _lines(stacked: bool) -> Json:
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 40 if stacked else 8,
        "showPoints": "never",
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
    }


def _options(panel: Panel) -> Json:
    if panel.kind == "stat":
        return {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "value_and_name",
            "colorMode": "value",
            "graphMode": "none",
        }
    if panel.kind == "heatmap":
        return {
            "calculate": False,
            "color": {"mode": "scheme", "scheme": "Blues"},
            "yAxis": {"axisPlacement": "left", "unit": panel.unit},
            "tooltip": {"mode": "single"},
        }
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


if __name__ == "__main__":
    (HERE / "dashboards" / "streaminfer.json").write_text(text(), encoding="utf-8")
