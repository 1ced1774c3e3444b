"""What each command does, behind the command line: plain functions of a spec."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from streaminfer.app import Deployment, LocalPipeline, run_worker
from streaminfer.client import Client, Prediction, connect
from streaminfer.errors import ConfigError
from streaminfer.launcher import Command, Launcher, free_ports, scrape_targets
from streaminfer.plan import Plan
from streaminfer.planning.source import ensure
from streaminfer.topology import Difference, build, diff, topic_specs
from streaminfer.transport.kafka import tune_malloc

if TYPE_CHECKING:
    from streaminfer.planning.cuts import CutRow
    from streaminfer.planning.verify import VerifyReport
    from streaminfer.spec import PipelineSpec

__all__ = [
    "config_text",
    "cuts",
    "plan_of",
    "print_cuts",
    "print_plan",
    "print_verified",
    "run",
    "send",
    "targets",
    "topics_apply",
    "topics_diff",
    "verify",
    "watch",
    "worker",
]

IMAGES = {".jpg", ".jpeg", ".png", ".webp"}
console = Console()


def plan_of(spec: PipelineSpec, folder: Path | None, random_weights: bool) -> tuple[Path, Plan]:
    """Return the plan's directory and the plan, built now if there is none of this spec."""
    where = folder or Path(".streaminfer") / "plans" / spec.pipeline
    plan = ensure(spec, where, random_weights=random_weights)
    if plan.random_weights:
        _warn(f"RANDOM WEIGHTS: the predictions of {spec.pipeline} mean nothing (--random-weights)")
    return where, plan


# ---- run -------------------------------------------------------------------------------------


async def run(
    spec: PipelineSpec,
    *,
    bus: str | None,
    plan: Path | None,
    random_weights: bool,
    send: Sequence[str] | None,
) -> int:
    """Run a whole pipeline until SIGTERM or Ctrl-C, or until `send` is answered."""
    if bus not in (None, "memory", "kafka"):
        raise ConfigError(f"no bus {bus!r}", where="--bus", hint="memory or kafka")
    folder, made = plan_of(spec, plan, random_weights)
    stop = _on_signals()
    if bus == "memory" or (bus is None and not spec.kafka.bootstrap):
        return await _run_here(spec, made, folder, send, stop)
    return await _run_processes(spec, made, folder, send, stop, random_weights)


async def _run_here(
    spec: PipelineSpec, plan: Plan, folder: Path, send: Sequence[str] | None, stop: asyncio.Event
) -> int:
    _log_to(sys.stderr)
    port = free_ports(spec.metrics.host, spec.metrics.port, 1)[0]
    async with LocalPipeline(spec, plan, folder, port=port) as pipeline:
        if send:
            async with pipeline.client() as client:
                return await _print_answers(client, send, stop)
        here = Command(spec.pipeline, (), port)
        scrape_targets(spec.pipeline, spec.metrics.host, [here], _targets_file(spec))
        print(
            f"ready  pipeline {spec.pipeline}  bus memory  metrics {pipeline.address}/metrics",
            flush=True,
        )
        await _either(stop.wait(), pipeline.failed())
    return 0


async def _run_processes(
    spec: PipelineSpec,
    plan: Plan,
    folder: Path,
    send: Sequence[str] | None,
    stop: asyncio.Event,
    random_weights: bool,
) -> int:
    for line in await topics_apply(spec, folder, random_weights):
        print(line, flush=True)
    commands = _worker_commands(spec, plan, folder, random_weights)
    file = _targets_file(spec)
    scrape_targets(spec.pipeline, spec.metrics.host, commands, file)
    up = asyncio.Event()

    def ready() -> None:
        if not up.is_set():
            names = " ".join(f"{c.name}:{c.port}" for c in commands)
            print(f"ready  pipeline {spec.pipeline}  kafka {spec.kafka.bootstrap}  metrics {names}"
                  f"  targets {file}", flush=True)  # fmt: skip
        up.set()

    launcher = Launcher(
        commands, stop, say=lambda name, line: print(f"{name:>8} | {line}", flush=True), ready=ready
    )
    running = asyncio.create_task(launcher.run())
    if send:
        await asyncio.wait(
            [running, asyncio.create_task(up.wait())], return_when=asyncio.FIRST_COMPLETED
        )
        if not running.done():
            async with Client(pipeline=spec) as client:
                code = await _print_answers(client, send, stop)
            stop.set()
            return max(code, await running)
    return await running


def _worker_commands(
    spec: PipelineSpec, plan: Plan, folder: Path, random_weights: bool
) -> list[Command]:
    roles = [(role, k) for role in build(spec, plan).workers for k in range(role.replicas)]
    ports = free_ports(spec.metrics.host, spec.metrics.port, len(roles))
    commands = []
    for (role, k), port in zip(roles, ports, strict=True):
        what = ["--stage", role.stages[0]] if role.stages else ["--sink"]
        random = ["--random-weights"] if random_weights else []
        arguments = ["worker", str(spec.path), *what, "--plan", str(folder), *random]
        arguments += ["--metrics-port", str(port), "--kafka", spec.kafka.bootstrap or ""]
        name = role.name if role.replicas == 1 else f"{role.name}.{k}"
        commands.append(Command(name, arguments, port, role.stages))
    return commands


async def worker(
    spec: PipelineSpec, stage: str, *, plan: Path | None, random_weights: bool, port: int | None
) -> None:
    """Run one worker on Kafka until SIGTERM."""
    tune_malloc()
    _log_to(sys.stderr)
    # a plan that is named is taken as it is: a worker needs neither the model's code nor weights
    folder, made = (plan, Plan.load(plan)) if plan else plan_of(spec, plan, random_weights)
    transport = connect(spec)
    deployment = await Deployment.open(spec, made, folder, transport)
    await run_worker(
        deployment,
        stage,
        _on_signals(),
        host=spec.metrics.host,
        port=spec.metrics.port if port is None else port,
        said=lambda address: print(f"ready  worker {stage}  metrics {address}/metrics", flush=True),
    )


def _on_signals() -> asyncio.Event:
    """Return the event that SIGTERM and Ctrl-C set; a second one ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def again(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, again, number)
    return stop


async def _either(*works: Any) -> None:
    tasks = [asyncio.ensure_future(work) for work in works]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()


# ---- plan ------------------------------------------------------------------------------------


def verify(
    spec: PipelineSpec, images: Sequence[str], folder: Path | None, random_weights: bool
) -> VerifyReport:
    """Compare the cut model with the whole one, on real images or random input."""
    from streaminfer.planning.verify import verify as compare
    from streaminfer.runtime.postprocess import batch_of

    where, _ = plan_of(spec, folder, random_weights)
    values = [value for _, value in _files(images)]
    return compare(spec, where, images=batch_of(values, spec.input) if values else None)


def print_verified(report: VerifyReport) -> None:
    """Say what was compared and what came out."""
    verdict = "[bold green]holds[/]" if report.holds else "[bold red]does not hold[/]"
    how = "bit for bit" if report.equal else f"within {report.max_abs:.1e}"
    allowed = f" (tolerance {report.tolerance:.1e})" if report.tolerance else ""
    console.print(
        f"{verdict}  {report.stages} stages give what the whole model gives, {how}{allowed}, "
        f"at batch sizes {', '.join(map(str, report.batch_sizes))}; {report.samples} samples"
    )
    if report.top1_agreement is not None:
        console.print(
            f"top-1 agreement {report.top1_agreement:.4f}   max |Δ| {report.max_abs:.1e}   "
            f"relative {report.max_rel:.1e}   digest {report.digest[:8]}"
        )
    if not report.rows_independent:
        console.print("a row in a batch is not what it is alone: this model mixes its samples")


def cuts(model: str, example: str, kwargs: str, random_weights: bool) -> list[CutRow]:
    """List the legal cuts of a pipeline file's model, or of a factory's."""
    from streaminfer.planning.cuts import list_cuts
    from streaminfer.spec import ModelSpec
    from streaminfer.spec.file import load

    if model.endswith((".yaml", ".yml")):
        spec = load(Path(model))
        return list_cuts(spec.model, spec.path, random_weights=random_weights)
    try:
        shape = tuple(int(n) for n in example.split(","))
        options = json.loads(kwargs)
    except ValueError as error:
        raise ConfigError(
            str(error), hint="--example 3,224,224 --kwargs '{\"weights\": null}'"
        ) from None
    return list_cuts(
        ModelSpec(factory=model, kwargs=options, example=shape), None, random_weights=random_weights
    )


def print_plan(folder: Path, plan: Plan) -> None:
    """Show a plan: its stages, what they hold and what travels between them."""
    table = Table(
        title=f"{plan.pipeline}  {plan.model}@{plan.model_version}  digest {plan.digest[:8]}"
    )
    for name in ("stage", "layers", "weights", "in, per image", "as"):
        table.add_column(name, justify="left" if name in ("stage", "layers", "as") else "right")
    for stage in plan.stages:
        layers = (
            stage.layers[0] if len(stage.layers) == 1 else f"{stage.layers[0]} … {stage.layers[-1]}"
        )
        size = sum(t.row_bytes(stage.edge.dtype) for t in stage.inputs)
        how = f"{stage.edge.dtype} {stage.edge.compress}"
        table.add_row(stage.name, layers, f"{stage.weight_bytes:,} B", f"{size:,} B", how)
    console.print(table)
    console.print(f"plan directory: {folder}")


def print_cuts(rows: Sequence[CutRow]) -> None:
    """Show where a model may be cut."""
    table = Table(title="a stage may end with (until:)")
    table.add_column("layer")
    for name in ("tensors", "bytes per image", "weights before"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.layer, str(row.tensors), f"{row.nbytes:,}", f"{row.weights_before:.0%}")
    console.print(table)


# ---- topics ----------------------------------------------------------------------------------


async def topics_diff(
    spec: PipelineSpec, folder: Path | None, random_weights: bool
) -> list[Difference]:
    """Compare the topics as they are with what the plan needs."""
    _, plan = plan_of(spec, folder, random_weights)
    topology = build(spec, plan)
    async with connect(spec, replication=spec.kafka.replication).admin() as admin:
        existing = await admin.topics(topology.topics())
    known = existing.get(topology.input_topic)
    partitions = known.partitions if known else spec.kafka.partitions
    return diff(topic_specs(topology, spec, partitions), existing)


async def topics_apply(spec: PipelineSpec, folder: Path | None, random_weights: bool) -> list[str]:
    """Create missing topics and set what differs; returns a line per change."""
    found = await topics_diff(spec, folder, random_weights)
    if stuck := [d for d in found if not d.fixable]:
        raise ConfigError(
            "; ".join(str(d) for d in stuck),
            where="kafka",
            hint="delete the topic while nothing runs, or build the plan anew for other partitions",
        )
    async with connect(spec, replication=spec.kafka.replication).admin() as admin:
        await admin.create([d.wanted for d in found if d.missing])
        for d in found:
            if not d.missing:
                await admin.configure(d.wanted.name, d.wanted.config)
    return [f"topic {d.wanted.name}: {'created' if d.missing else 'configured'}" for d in found]


# ---- messages --------------------------------------------------------------------------------


async def send(spec: PipelineSpec, paths: Sequence[str], *, wait: bool, rate: float | None) -> int:
    """Send files; with `wait` print each outcome, and return 1 if any has no prediction."""
    stop = _on_signals()
    async with Client(pipeline=spec) as client:
        if wait:
            return await _print_answers(client, paths, stop, rate)
        acks, count = [], 0
        async for name, value in _paced(paths, rate):
            acks.append(await client.send(value, id=name))
            count += 1
            if stop.is_set():
                break
        await asyncio.gather(*acks)
        print(f"sent {count} images to {spec.input.topic}")
    return 0


async def _print_answers(
    client: Client, paths: Sequence[str], stop: asyncio.Event, rate: float | None = None
) -> int:
    bad = 0
    async with aclosing(client.stream(_paced(paths, rate))) as answers:
        async for answer in answers:
            print(json.dumps(answer.raw), flush=True)
            bad += answer.status != "ok"
            if stop.is_set():
                break
    return 1 if bad else 0


async def watch(
    spec: PipelineSpec, *, from_beginning: bool, count: int | None, as_json: bool
) -> None:
    """Print predictions until Ctrl-C, or `count` of them."""
    stop = _on_signals()
    async with Client(pipeline=spec) as client:

        async def show() -> None:
            seen = 0
            async with aclosing(client.watch(from_beginning=from_beginning)) as answers:
                async for answer in answers:
                    print(json.dumps(answer.raw) if as_json else _line(answer), flush=True)
                    seen += 1
                    if seen == count:
                        return

        await _either(show(), stop.wait())


def _line(answer: Prediction) -> str:
    if answer.error:
        what = answer.error
        return f"{answer.id}  {answer.status}  {what.stage}/{what.kind}: {what.message}"
    best = "  ".join(f"{p.label} {p.score:.3f}" for p in answer.predictions[:3])
    return f"{answer.id}  {best or 'ok'}  {answer.e2e_ms:.0f} ms"


async def _paced(paths: Sequence[str], rate: float | None) -> AsyncIterator[tuple[str, bytes]]:
    loop = asyncio.get_running_loop()
    begin = loop.time()
    for k, (name, value) in enumerate(_files(paths)):
        if rate and (pause := begin + k / rate - loop.time()) > 0:
            await asyncio.sleep(pause)
        yield name, value


def _files(paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Read what the user named: files, the images of folders (sorted, recursive), stdin."""
    for text in paths:
        path = Path(text)
        if text == "-":
            yield "stdin", sys.stdin.buffer.read()
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES)
            if not found:
                raise ConfigError(
                    f"no images in {path}", hint=f"looked for {', '.join(sorted(IMAGES))}"
                )
            for image in found:
                yield str(image.relative_to(path)), image.read_bytes()
        elif path.is_file():
            yield path.name, path.read_bytes()
        else:
            raise ConfigError(f"no such file or folder: {path}")


# ---- the rest --------------------------------------------------------------------------------


def targets(spec: PipelineSpec) -> str:
    """Return the scrape targets of what `run` started here."""
    file = _targets_file(spec)
    if not file.exists():
        raise ConfigError(
            f"nothing runs here: no {file}", hint="streaminfer run PIPELINE writes it"
        )
    return file.read_text().rstrip()


def config_text(pipeline: Path, flags: dict[str, str], *, origin: bool, as_json: bool) -> str:
    """Return every setting; with `origin`, and which of flag, environment, file won."""
    from streaminfer.spec.file import load, origins

    values = load(pipeline, flags).model_dump(mode="json")
    won = origins(pipeline, flags) if origin else {}
    if as_json:
        return json.dumps({"values": values, "origins": won} if origin else values)
    rows = [f"{key} = {json.dumps(value)}" + (f"   # {won.get(key, 'default')}" if origin else "")
            for key, value in _flat(values)]  # fmt: skip
    return "\n".join(rows)


def _flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _targets_file(spec: PipelineSpec) -> Path:
    return Path(".streaminfer") / f"{spec.pipeline}.targets.json"


def _warn(text: str) -> None:
    Console(stderr=True).print(f"[bold yellow]warning[/] {text}", highlight=False)


def _log_to(stream: Any) -> None:
    logging.basicConfig(
        stream=stream, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("aiokafka").setLevel(logging.ERROR)
