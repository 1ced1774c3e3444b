"""Commands that run workers: the whole pipeline here, or one worker."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streaminfer.app import Deployment, LocalPipeline, run_worker
from streaminfer.client import Client, connect
from streaminfer.commands.messages import either, on_signals, print_answers
from streaminfer.commands.plans import plan_of, topics_apply
from streaminfer.commands.processes import worker_commands
from streaminfer.errors import ConfigError
from streaminfer.launcher import Command, Launcher, free_ports, scrape_targets
from streaminfer.plan import Plan
from streaminfer.topology import WorkerSpec, build
from streaminfer.transport.kafka import quiet_start_up

if TYPE_CHECKING:
    from streaminfer.spec import PipelineSpec

__all__ = ["run", "targets", "worker"]


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
    stop = on_signals()
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
                return await print_answers(client, send, stop)
        here = Command(spec.pipeline, (), port)
        scrape_targets(spec.pipeline, spec.metrics.host, [here], targets_file(spec))
        print(
            f"ready  pipeline {spec.pipeline}  bus memory  metrics {pipeline.address}/metrics",
            flush=True,
        )
        await either(stop.wait(), pipeline.failed())
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
    commands = worker_commands(spec, plan, folder, random_weights)
    file = targets_file(spec)
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
                code = await print_answers(client, send, stop)
            stop.set()
            return max(code, await running)
    return await running


async def worker(
    spec: PipelineSpec,
    stage: str,
    *,
    plan: Path | None,
    random_weights: bool,
    port: int | None,
    replica: int | None,
) -> None:
    """Run one worker on Kafka until SIGTERM. Raises ConfigError if it is not clear which one."""
    _log_to(sys.stderr)
    # a plan that is named is taken as it is: a worker needs neither the model's code nor weights
    folder, made = (plan, Plan.load(plan)) if plan else plan_of(spec, plan, random_weights)
    which = _replica(build(spec, made).worker(stage), replica)
    transport = connect(spec)
    deployment = await Deployment.open(spec, made, folder, transport)
    await run_worker(
        deployment,
        stage,
        on_signals(),
        host=spec.metrics.host,
        port=spec.metrics.port if port is None else port,
        replica=which,
        said=lambda address: print(f"ready  worker {stage}  metrics {address}/metrics", flush=True),
    )


def _replica(role: WorkerSpec, number: int | None) -> int:
    """Return which replica a worker is; one that is like all others needs no number."""
    if number is None and role.unlike:
        raise ConfigError(
            f"the {role.replicas} replicas of {role.name} have devices or shares of their own:"
            " which one is this?",
            where="--replica",
            hint=f"a number from 0 to {role.replicas - 1}",
        )
    role.share(number or 0)  # there is one of this number
    return number or 0


def targets(spec: PipelineSpec) -> str:
    """Return the scrape targets of what `run` started here."""
    file = targets_file(spec)
    if not file.exists():
        raise ConfigError(
            f"nothing runs here: no {file}", hint="streaminfer run PIPELINE writes it"
        )
    return file.read_text().rstrip()


def targets_file(spec: PipelineSpec) -> Path:
    return Path(".streaminfer") / f"{spec.pipeline}.targets.json"


def _log_to(stream: Any) -> None:
    logging.basicConfig(
        stream=stream, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("aiokafka").setLevel(logging.ERROR)
    quiet_start_up()
