"""The command that reads a running pipeline's /metrics and says whether a change is worth it."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml
from rich.table import Table

from streaminfer.commands.plans import console, plan_of
from streaminfer.commands.scraped import look
from streaminfer.errors import ConfigError
from streaminfer.plan import Plan
from streaminfer.planning.advice import Advice, Change, Layer, advise
from streaminfer.planning.live import Place, between
from streaminfer.planning.profile import Profile, kept
from streaminfer.planning.source import model_key
from streaminfer.spec.file import load
from streaminfer.spec.units import parse_duration
from streaminfer.topology import build

if TYPE_CHECKING:
    from streaminfer.spec import PipelineSpec

__all__ = ["print_advice", "replan"]

FLAG = "--from-metrics"


async def replan(
    spec: PipelineSpec,
    sources: Sequence[str],
    *,
    worth: str = "15%",
    over: str | float = 10.0,
    folder: Path | None = None,
    out: Path | None = None,
    random_weights: bool = False,
) -> Advice:
    """Measure a running pipeline for a while and advise.

    Args:
        spec: the file that it runs.
        sources: addresses of workers, or files of them as `streaminfer run` writes.
        worth: the least gain for which a change is worth it: "15%" or 0.15.
        over: how long to measure, in two halves that have to agree: seconds, or "10s".
        folder: the plan directory.
        out: where to write the changed pipeline file, if a change is advised.
        random_weights: as it was built.

    Raises:
        ConfigError: an address that doesn't answer or isn't a worker's; workers that are missing;
            `worth`, `over` or `out` that cannot be.
    """
    least = _share(worth)
    seconds = _seconds(over)
    _check_out(spec, out)
    urls = addresses(sources)
    await look(urls, FLAG)  # who does not answer is named before a plan is built
    _, plan = plan_of(spec, folder, random_weights)
    places = _places(spec, plan)
    looks = [await look(urls, FLAG)]
    for _ in range(2):
        await asyncio.sleep(seconds / 2)
        looks.append(await look(urls, FLAG))
    halves = [between(a, b, spec.pipeline, places) for a, b in pairwise(looks)]
    cores = float(os.cpu_count() or 1) if all(map(_is_here, urls)) else None
    advice = advise(halves, places, cores=cores, worth=least, layers=_layers(spec, plan))
    if out is not None and advice.change is not None:
        _write(out, _changed(spec, plan, advice.change))
    return advice


def _write(out: Path, text: str) -> None:
    out.write_text(text, encoding="utf-8")
    load(out)  # what cannot run is said now


# ---- what runs where -----------------------------------------------------------------------------


def addresses(sources: Sequence[str]) -> list[str]:
    """Return the URL of every /metrics that is named, once. Raises ConfigError."""
    found: list[str] = []
    for source in sources:
        names = [source]
        if "://" not in source and Path(source).suffix == ".json":
            names = _targets(Path(source))
        for name in names:
            url = name if "://" in name else f"http://{name}"
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ConfigError(
                    f"{name!r} is no address of a worker",
                    where=FLAG,
                    hint="http://HOST:PORT, HOST:PORT, or a targets.json",
                )
            found.append(url if parts.path.strip("/") else f"{url.rstrip('/')}/metrics")
    if not found:
        raise ConfigError("no worker is named", where=FLAG, hint="http://HOST:PORT")
    return list(dict.fromkeys(found))


def _targets(file: Path) -> list[str]:
    try:
        groups = json.loads(file.read_text(encoding="utf-8"))
        return [str(target) for group in groups for target in group["targets"]]
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}",
            where=FLAG,
            hint="`streaminfer run` writes it: .streaminfer/PIPELINE.targets.json",
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{file} is no list of targets", where=FLAG, hint="streaminfer targets"
        ) from None


def _is_here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _places(spec: PipelineSpec, plan: Plan) -> list[Place]:
    from streaminfer.runtime.compute import share

    roles = {name: role for role in build(spec, plan).workers for name in role.stages}
    found = []
    for stage in plan.stages:
        role = roles[stage.name]
        real = [s.path for s in map(plan.stage, role.stages) if s.kind in ("stage", "part")]
        joins = stage.kind in ("scatter", "gather")  # a replica of it is one of its worker
        found.append(
            Place(
                stage.name,
                real[0] if joins and real else stage.path,
                role.name,
                role.replicas,
                spec.stage(stage.path).threads or share(spec, plan),
                on_cpu=role.device(stage.name, 0) == "cpu",
                plain=stage.kind == "stage" and "." not in stage.path and stage.exit is None,
                layers=stage.layers,
                fixed=not real,
            )
        )
    return found


def _layers(spec: PipelineSpec, plan: Plan) -> list[Layer]:
    """Return the model's layers as `streaminfer profile` has them; none if it was not profiled.

    Of several devices that of the first stage counts, with its number of threads if there is one.
    """
    from streaminfer.runtime.compute import share

    first = spec.stages[0]
    found = kept(model_key(spec, plan.random_weights)) if spec.model else []
    if not found:
        return []
    threads, device = first.threads or share(spec, plan), first.devices_of(None)[0]

    def unlike(profile: Profile) -> tuple[bool, int]:
        place = profile.devices[0]
        kind = place.device.partition(":")[0] == device.partition(":")[0]
        return not kind, abs(place.threads - threads)

    profile = min(found, key=unlike)
    most = spec.batch_of(first.name).max
    timing = min(profile.devices[0].timings, key=lambda t: abs(t.batch - most))
    spans = list(profile.layers())
    each = [sum(timing.seconds[a : b + 1]) / timing.batch for _, a, b in spans]
    names = [*(cut.layer for cut in profile.cuts), ""]  # "": the model's end
    return [Layer(name, seconds) for name, seconds in zip(names, each, strict=True)]


# ---- the changed file ----------------------------------------------------------------------------


def _check_out(spec: PipelineSpec, out: Path | None) -> None:
    if out is None:
        return
    if spec.path is None or out.resolve().parent != spec.path.resolve().parent:
        raise ConfigError(
            f"{out} is in another folder than {spec.path}, and its paths start there",
            where="-o",
            hint=f"-o {(spec.path or Path()).with_name(out.name)}",
        )
    if out.resolve() == spec.path.resolve():
        raise ConfigError("that is the file which runs", where="-o", hint="another name")


def _changed(spec: PipelineSpec, plan: Plan, change: Change) -> str:
    """Return the pipeline file with the change in it."""
    if spec.path is None:
        raise ConfigError("the pipeline was read from no file", where="-o")
    raw = yaml.safe_load(spec.path.read_text(encoding="utf-8"))
    if change.kind == "whole":
        raw["stages"] = [{"name": "whole", "replicas": change.replicas}]
        raw["edges"] = {k: v for k, v in raw.get("edges", {}).items() if k == "default"}
    elif change.kind == "cut":
        _declared(raw, change.stage)["until"] = change.until
    else:
        places = _places(spec, plan)
        workers = {place.worker for place in places if place.path == change.stage}
        real = {stage.name for stage in plan.stages if stage.kind in ("stage", "part")}
        paths = [p.path for p in places if p.worker in workers and p.name in real]
        for path in dict.fromkeys(paths):
            _replicate(_declared(raw, path), change.replicas)
    text = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
    return f"# {spec.path.name}, changed by its metrics: {change.text}\n{text}"


def _declared(raw: Any, path: str) -> dict[str, Any]:
    """Return what a file says at a path: a stage, a branch, or a stage of a branch."""
    found: dict[str, Any] = {}
    for key, name in zip(("stages", "branches", "stages"), path.split("."), strict=False):
        found = next(one for one in (found or raw)[key] if one["name"] == name)
    return found


def _replicate(stage: dict[str, Any], count: int) -> None:
    stage["replicas"] = count
    for key in ("device", "shares"):
        if isinstance(value := stage.get(key), list) and not (key == "device" and "split" in stage):
            stage[key] = [*value, *value[-1:] * (count - len(value))]


# ---- what a person sees --------------------------------------------------------------------------


def _share(text: str) -> float:
    try:
        value = float(text.rstrip("% ")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 100:
        raise ConfigError(f"{text!r} is no gain", where="--worth", hint="--worth 15%")
    return value


def _seconds(over: str | float) -> float:
    try:
        seconds = parse_duration(
            float(over) if isinstance(over, str) and over.isdecimal() else over
        )
    except ValueError as error:
        raise ConfigError(f"{over!r}: {error}", where="--over", hint="--over 10s") from None
    if not seconds > 0:
        raise ConfigError("nothing is measured in 0 s", where="--over", hint="--over 10s")
    return seconds


def print_advice(advice: Advice, *, as_json: bool = False, out: Path | None = None) -> None:
    """Show the verdict, the change, and what was measured."""
    if as_json:
        print(json.dumps(advice.to_json()))
        return
    table = Table("stage", "samples", "ms a sample", "batch", "waiting", "B in", "B out", box=None)
    total = advice.stages or {}
    for name, cell in total.items():
        batch = cell.samples / cell.batches if cell.batches else 0.0
        each = f"{cell.each * 1e3:,.2f}" if cell.samples else ""
        row = (f"{cell.samples:,.0f}", each, f"{batch:.1f}", f"{cell.queue:,.0f}")
        table.add_row(
            name, *row, f"{cell.bytes_in:,.0f}", f"{cell.bytes_out:,.0f}",
            style="bold" if name == advice.bottleneck else None,
        )  # fmt: skip
    console.print(table)
    heads = {
        "change": "[bold green]change it[/]",
        "leave": "[bold]leave it as it is[/]",
        "measure longer": "[bold yellow]measure longer[/]",
    }
    console.print(f"{heads[advice.verdict]}: {advice.why}")
    if advice.change is not None:
        one = advice.change
        console.print(
            f"  {one.text}: {one.capacity:,.1f} samples a second at most instead of "
            f"{advice.capacity:,.1f}, {one.gain:+.0%}"
        )
    for other in advice.others:
        console.print(f"  or {other.text}: {other.gain:+.0%}", style="dim")
    for note in advice.notes:
        console.print(f"  {note}", style="dim")
    if out is not None and advice.change is not None:
        console.print(f"written: {out}")
