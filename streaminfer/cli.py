"""The command line: reads arguments, calls one function, prints what it returns. No logic.

Exit codes: 0 done, 1 it failed (the error is on stderr), 2 the command was wrong.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from streaminfer import cli_planning
from streaminfer.cli_flags import (
    Bus,
    Changes,
    Check,
    Concurrency,
    Cost,
    Json,
    Kafka,
    Paths,
    PatternText,
    Pipeline,
    PlanDir,
    Priced,
    Random,
    Rate,
    Replicas,
    Seconds,
    Seed,
    Trust,
)
from streaminfer.errors import ConfigError, StreaminferError
from streaminfer.malloc import tune_malloc

if TYPE_CHECKING:
    from streaminfer.spec import PipelineSpec

__all__ = ["main"]

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One torch model, cut into stages; every stage an async Kafka consumer on its own device.",
)
topics = typer.Typer(no_args_is_help=True, help="Create and check the topics of a pipeline.")
config = typer.Typer(no_args_is_help=True, help="See what a pipeline file amounts to.")
app.add_typer(topics, name="topics")
app.add_typer(config, name="config")
cli_planning.register(app)


@app.command()
def run(
    pipeline: Pipeline,
    kafka: Kafka = None,
    bus: Annotated[
        str | None,
        typer.Option(
            metavar="memory|kafka", help="Where topics live; kafka if an address is known."
        ),
    ] = None,
    plan: PlanDir = None,
    random_weights: Random = False,
    trust: Trust = False,
    send: Annotated[
        list[str] | None,
        typer.Option(
            "--send", metavar="PATH", help="Send these images, print the predictions, end."
        ),
    ] = None,
) -> None:
    """Run the whole pipeline here: one process on the memory bus, or one per worker on Kafka."""
    from streaminfer import commands

    spec = _load(pipeline, kafka).trusted(trust)
    raise typer.Exit(
        _await(commands.run(spec, bus=bus, plan=plan, random_weights=random_weights, send=send))
    )


@app.command()
def worker(
    pipeline: Pipeline,
    stage: Annotated[str | None, typer.Option(metavar="NAME", help="The stage to run.")] = None,
    sink: Annotated[bool, typer.Option("--sink", help="Run the sink.")] = False,
    replica: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Which of the stage's devices and shares are its own, from 0."
        ),
    ] = None,
    kafka: Kafka = None,
    plan: PlanDir = None,
    random_weights: Random = False,
    trust: Trust = False,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port of /metrics; 0 is any free one.")
    ] = None,
) -> None:
    """Run one worker on Kafka: a stage or the sink. What a container starts."""
    from streaminfer import commands

    if (stage is None) == (not sink):
        raise typer.BadParameter("name one: --stage NAME or --sink")
    spec = _load(pipeline, kafka).trusted(trust)
    _await(
        commands.worker(
            spec,
            stage or "sink",
            plan=plan,
            random_weights=random_weights,
            port=metrics_port,
            replica=replica,
        )
    )


@app.command()
def build(
    pipeline: Pipeline,
    plan: PlanDir = None,
    random_weights: Random = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Capture the model, cut it, and write the plan directory that workers read."""
    from streaminfer import commands

    folder, made = commands.plan_of(_load(pipeline).trusted(trust), plan, random_weights)
    if as_json:
        return typer.echo(json.dumps({"plan": str(folder), **made.model_dump(mode="json")}))
    return commands.print_plan(folder, made)


@app.command()
def verify(
    pipeline: Pipeline,
    images: Annotated[
        list[str] | None, typer.Argument(metavar="[FILES|DIRS]", help="Real input; else random.")
    ] = None,
    plan: PlanDir = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda:0.")] = "cpu",
    random_weights: Random = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Prove that the cut model gives what the whole model gives."""
    from streaminfer import commands

    spec = _load(pipeline).trusted(trust)
    report = commands.verify(spec, images or [], plan, random_weights, device)
    typer.echo(report.to_json()) if as_json else commands.print_verified(report)
    if not report.holds:
        raise typer.Exit(1)


@app.command()
def cut(
    model: Annotated[
        str, typer.Argument(metavar="PIPELINE|MODULE:FACTORY", help="A pipeline file, or a model.")
    ],
    example: Annotated[
        str, typer.Option(metavar="C,H,W", help="Shape of one sample, for a MODULE:FACTORY.")
    ] = "3,224,224",
    kwargs: Annotated[str, typer.Option(metavar="JSON", help="Arguments of the factory.")] = "{}",
    random_weights: Random = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """List where a model can be cut, and the bytes per image that would travel there."""
    from streaminfer import commands

    rows = commands.cuts(model, example, kwargs, random_weights, trust)
    typer.echo(json.dumps([row._asdict() for row in rows])) if as_json else commands.print_cuts(
        rows
    )


@app.command()
def simulate(
    pipeline: Pipeline,
    rate: Rate = None,
    concurrency: Concurrency = None,
    pattern: PatternText = "poisson",
    replicas: Replicas = "",
    devices: Priced = "",
    changes: Changes = None,
    cost: Cost = None,
    bus: Bus = None,
    seconds: Seconds = 10.0,
    seed: Seed = 0,
    check: Check = False,
    kafka: Kafka = None,
    plan: PlanDir = None,
    random_weights: Random = False,
    as_json: Json = False,
) -> None:
    """Predict throughput, latency, queues and cost; ask what if; check it by a real run."""
    from streaminfer import commands

    ask = commands.Ask(
        rate, concurrency, pattern, replicas, devices, changes or (), cost or (), bus, seconds,
        seed, check,
    )  # fmt: skip
    outcome = _await(
        commands.predict(_load(pipeline, kafka), ask, plan, random_weights=random_weights)
    )
    commands.print_simulated(outcome, as_json=as_json)


@topics.command("apply")
def topics_apply(
    pipeline: Pipeline, kafka: Kafka = None, plan: PlanDir = None, random_weights: Random = False
) -> None:
    """Create what is missing, set what differs; refuse what cannot be changed."""
    from streaminfer import commands

    for line in _await(commands.topics_apply(_load(pipeline, kafka), plan, random_weights)):
        typer.echo(line)


@topics.command("diff")
def topics_diff(
    pipeline: Pipeline,
    kafka: Kafka = None,
    plan: PlanDir = None,
    random_weights: Random = False,
    as_json: Json = False,
) -> None:
    """Say what `apply` would change; exit 1 if anything."""
    from streaminfer import commands

    found = _await(commands.topics_diff(_load(pipeline, kafka), plan, random_weights))
    if as_json:
        typer.echo(json.dumps([d.to_json() for d in found]))
    else:
        typer.echo("\n".join(str(d) for d in found) or "all topics are as they should be")
    if found:
        raise typer.Exit(1)


@app.command()
def send(
    pipeline: Pipeline,
    paths: Paths,
    kafka: Kafka = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Print each prediction as a JSON line.")
    ] = False,
    rate: Annotated[
        float | None, typer.Option(metavar="N", help="At most N images a second.")
    ] = None,
) -> None:
    """Send images to the input topic; their names are the ids."""
    from streaminfer import commands

    raise typer.Exit(_await(commands.send(_load(pipeline, kafka), paths, wait=wait, rate=rate)))


@app.command()
def watch(
    pipeline: Pipeline,
    kafka: Kafka = None,
    from_beginning: Annotated[
        bool, typer.Option("--from-beginning", help="All that the topic holds.")
    ] = False,
    count: Annotated[int | None, typer.Option(metavar="N", help="End after N predictions.")] = None,
    as_json: Json = False,
) -> None:
    """Print predictions as they come."""
    from streaminfer import commands

    _await(
        commands.watch(
            _load(pipeline, kafka), from_beginning=from_beginning, count=count, as_json=as_json
        )
    )


@app.command()
def targets(pipeline: Pipeline) -> None:
    """Print the addresses of the workers that run here, as Prometheus reads them."""
    from streaminfer import commands

    typer.echo(commands.targets(_load(pipeline)))


@app.command()
def schema() -> None:
    """Print the JSON Schema of the pipeline file."""
    from streaminfer.spec import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@config.command("show")
def config_show(
    pipeline: Pipeline,
    kafka: Kafka = None,
    origin: Annotated[
        bool, typer.Option("--origin", help="Say where each value came from.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print every setting as it counts: flag over environment over file over default."""
    from streaminfer import commands

    typer.echo(commands.config_text(pipeline, _flags(kafka), origin=origin, as_json=as_json))


def _flags(kafka: str | None) -> dict[str, str]:
    return {"kafka.bootstrap": kafka} if kafka else {}


def _load(pipeline: Path, kafka: str | None = None) -> PipelineSpec:
    from streaminfer.spec.file import load

    return load(pipeline, _flags(kafka))


def _await(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def main() -> None:
    """Run the command line; every error of ours is one clear message and exit code 1."""
    tune_malloc()
    try:
        app()
    except ConfigError as error:
        sys.exit(_complain(str(error)))
    except StreaminferError as error:
        sys.exit(_complain(f"{type(error).__name__}: {error}"))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)


def _complain(text: str) -> int:
    sys.stderr.write(f"error: {text}\n")
    return 1
