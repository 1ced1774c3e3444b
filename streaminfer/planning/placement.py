"""A candidate → the pipeline file that runs it, with the reasons as comments."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from streaminfer.planning.planner import Edge
from streaminfer.planning.predict import LOAD, Candidate, PlacedStage
from streaminfer.planning.source import file_of_factory
from streaminfer.planning.subject import Subject

__all__ = ["pipeline_file"]

OVERHEAD = 256  # bytes of a sample beside its tensors
DEFAULT_MEMORY = 512_000_000
DEFAULT_PARTITIONS = 8
WIDTH = 10_000  # lines of flow style are not broken


def pipeline_file(
    subject: Subject,
    candidate: Candidate,
    edges: Mapping[int, Edge],
    why: Sequence[str],
    folder: Path,
    *,
    outputs: int = 0,
) -> str:
    """Return the text of a pipeline file.

    Args:
        subject: what was planned; all that is not the plan's is kept as it was.
        candidate: how to run it.
        edges: what travels between stages, by the position of the cut.
        why: lines for the head of the file.
        folder: where the file will lie; relative paths are made to start there.
        outputs: classes of a model that was named without a file; 0: its outputs are published raw.
    """
    document = _moved(subject, folder)
    document.pop("stages", None)
    document.pop("edges", None)
    named = "batch" in document and isinstance(document["batch"], dict)
    document["batch"] = {**(document["batch"] if named else {}), "max": candidate.batch}
    if "output" not in subject.document and subject.spec.path is None:
        document["output"] = {"top_k": min(5, outputs)}
    document |= _room(subject, candidate)
    lines = [*_head(candidate, why)]
    for key, value in document.items():
        lines.append(_flow({key: value}) if not isinstance(value, dict) else _section(key, value))
    lines.append("stages:")
    for stage in candidate.stages:
        lines += [f"  # {_says(stage, candidate)}", f"  - {_flow(_stage(stage), braces=True)}"]
    lines += _edges(candidate, edges)
    return "\n".join(lines) + "\n"


def _head(candidate: Candidate, why: Sequence[str]) -> Iterator[str]:
    yield (
        f"# Planned: {candidate.form}. Predicted {candidate.throughput:,.1f} samples a second; "
        f"at {LOAD:.0%} of that, p50 {candidate.p50 * 1000:,.0f} ms, "
        f"p99 {candidate.p99 * 1000:,.0f} ms."
    )
    for line in why:
        yield f"# {line}."


def _stage(stage: PlacedStage) -> dict[str, Any]:
    found: dict[str, Any] = {"name": stage.name}
    if stage.until is not None:
        found["until"] = stage.until
    alike = set(stage.devices)
    found["device"] = stage.devices[0] if len(alike) == 1 else list(stage.devices)
    if stage.split:
        how = stage.split.how
        found["split"] = (
            {"by": "tiles", "grid": list(how.grid)}
            if how.grid
            else {"by": "channels", "parts": how.parts}
        )
    if stage.replicas > 1:
        found["replicas"] = stage.replicas
    if stage.shares:
        found["shares"] = list(stage.shares)
    if "cpu" in alike:
        found["threads"] = stage.threads
    return found


def _says(stage: PlacedStage, candidate: Candidate) -> str:
    share = candidate.busy()[stage.name]
    crossing = f", {stage.row_bytes:,} bytes per sample leave it" if stage.until else ""
    each = f"each of {len(stage.devices)} parts " if stage.split else ""
    return (
        f"{each}{stage.compute * 1000:.1f} ms per micro-batch, busy {share:.0%}, "
        f"weights {stage.weight_bytes / 1e6:.1f} MB{crossing}"
    )


def _edges(candidate: Candidate, edges: Mapping[int, Edge]) -> Iterator[str]:
    declared: dict[str, dict[str, str]] = {}
    for before, after in zip(candidate.stages, candidate.stages[1:], strict=False):
        edge = edges.get(before.last, Edge())
        found = {"dtype": str(edge.dtype), "compress": str(edge.codec)}
        plain = {"dtype": "native", "compress": "none"}
        if changed := {key: value for key, value in found.items() if value != plain[key]}:
            declared[after.name] = changed
    if declared:
        yield "edges:"
        for name, edge_of in declared.items():
            yield f"  {name}: {_flow(edge_of, braces=True)}"


def _room(subject: Subject, candidate: Candidate) -> dict[str, Any]:
    """Return what the plan needs beyond the file's or the default memory and partitions."""
    spec = subject.spec
    found: dict[str, Any] = {}
    partitions = spec.kafka.partitions
    replicas = max(stage.replicas for stage in candidate.stages)
    if replicas > partitions:  # a consumer group has no more members at work than partitions
        partitions = replicas
        given = subject.document.get("kafka") or {}
        found["kafka"] = {**given, "partitions": replicas}
    rows = [s.split.row_bytes if s.split else s.row_bytes for s in candidate.stages]
    widest = OVERHEAD + max(rows)
    if (least := candidate.batch * partitions * widest) > spec.memory:
        found["memory"] = least
    return found


def _moved(subject: Subject, folder: Path) -> dict[str, Any]:
    """Return the document with its relative paths made to start at another folder."""
    document: dict[str, Any] = {**subject.document}

    def moved(name: str) -> str:
        if Path(name).is_absolute():
            return name
        return os.path.relpath(subject.folder / name, folder)

    model = {**document["model"]}
    if name := file_of_factory(model["factory"]):
        model["factory"] = f"{moved(name)}:{model['factory'].rpartition(':')[2]}"
    if model.get("weights"):
        model["weights"] = moved(model["weights"])
    document["model"] = model
    output = document.get("output") or {}
    if isinstance(output.get("labels"), str) and output["labels"] != "imagenet":
        document["output"] = {**output, "labels": moved(output["labels"])}
    kafka = document.get("kafka") or {}
    files = {k: moved(v) for k, v in kafka.items() if k.startswith("ssl_") and k.endswith("file")}
    if files:
        document["kafka"] = {**kafka, **files}
    return document


def _section(key: str, value: Mapping[str, Any]) -> str:
    """Write a section on one line if it is short, else a key per line."""
    line = f"{key}: {_flow(value, braces=True)}"
    if len(line) <= 100:
        return line
    text: str = yaml.safe_dump(
        {key: dict(value)}, sort_keys=False, default_flow_style=None, width=WIDTH
    )
    return text.rstrip()


def _flow(value: Any, braces: bool = False) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, default_flow_style=braces, width=WIDTH)
    return text.rstrip().removesuffix("\n...").rstrip()
