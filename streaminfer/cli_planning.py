"""The command line of `profile` and `plan`: reads arguments, calls one function, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|PIPELINE", help="package.module:factory, path.py:name, or a pipeline file."
    ),
]
Devices = Annotated[
    str,
    typer.Option(
        metavar="LIST", help="A worker each: cpu,cpu are two that share the cores; cuda:0,cuda:1."
    ),
]
Kwargs = Annotated[str, typer.Option(metavar="JSON", help="Arguments of the factory.")]
ExampleText = Annotated[
    str,
    typer.Option(
        "--example",
        metavar="3x224x224[:DTYPE[<MAX]]",
        help="One sample of each input, comma-separated; whole numbers are below MAX (2).",
    ),
]
Random = Annotated[
    bool,
    typer.Option("--random-weights", help="Don't load weights: seeded random ones, for trying."),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Kafka = Annotated[
    str | None,
    typer.Option("--kafka", metavar="HOST:PORT", help="Measure the hops of this broker."),
]
Batch = Annotated[
    int | None,
    typer.Option(min=1, help="Exactly this micro-batch: it is measured however long it takes."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again, whatever was kept.")]


def profile(  # noqa: PLR0913 - a command's flags
    model: Model,
    devices: Devices = "cpu",
    kwargs: Kwargs = "{}",
    example: ExampleText = "",
    random_weights: Random = False,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Measure this micro-batch, too, whatever it takes.")
    ] = None,
    kafka: Kafka = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Measure a model layer by layer: time by batch, memory, bytes and their encodings, links."""
    from rich.console import Console

    from streaminfer.commands.asked import Asked
    from streaminfer.commands.planned import show_profile
    from streaminfer.commands.planning import make_profile

    asked = Asked(
        model,
        devices.split(","),
        kwargs,
        example,
        random_weights,
        batch=batch,
        kafka=kafka,
        fresh=fresh,
    )
    _, found, _ = make_profile(asked, quiet=as_json)
    typer.echo(found.model_dump_json()) if as_json else show_profile(found, Console())


def plan(  # noqa: PLR0913 - a command's flags
    model: Model,
    devices: Devices = "cpu",
    stages: Annotated[int | None, typer.Option(min=1, help="Exactly so many stages.")] = None,
    batch: Batch = None,
    memory: Annotated[
        str | None, typer.Option(metavar="4GB|cuda:0=16GB,…", help="Memory of each device.")
    ] = None,
    slo: Annotated[
        str | None, typer.Option(metavar="p99=50ms", help="Only plans that answer within it.")
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            metavar="memory|kafka|100MB/s", help="What stages are joined by; else as the file says."
        ),
    ] = None,
    kafka: Kafka = None,
    codec: Annotated[
        str | None,
        typer.Option(metavar="auto|float16|int8|…", help="What travels; auto: chosen by drift."),
    ] = None,
    max_drop: Annotated[
        str, typer.Option(metavar="0.1%", help="Answers that `--codec auto` may change.")
    ] = "0.1%",
    calibrate: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Images for `--codec auto`; else seeded.")
    ] = None,
    tries: Annotated[
        bool, typer.Option("--try", help="Run the best few here; rank by what is measured.")
    ] = False,
    kwargs: Kwargs = "{}",
    example: ExampleText = "",
    random_weights: Random = False,
    fresh: Fresh = False,
    from_metrics: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL|FILE",
            help="Re-plan what runs by its /metrics (or a targets file): is a change worth it?",
        ),
    ] = None,
    worth: Annotated[
        str, typer.Option(metavar="PERCENT", help="With --from-metrics: the least gain to act on.")
    ] = "15%",
    over: Annotated[
        str, typer.Option(metavar="DURATION", help="With --from-metrics: how long to measure.")
    ] = "10s",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write a pipeline file.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a report with figures.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the best way to run a model on these devices, and say why; it may be not to cut it."""
    from rich.console import Console

    from streaminfer.commands.asked import Asked
    from streaminfer.commands.planned import show_plan, to_json
    from streaminfer.commands.planning import make_plan, write

    if from_metrics:
        _replan(model, from_metrics, worth, over, output, random_weights, as_json)
        return
    asked = Asked(
        model, devices.split(","), kwargs, example, random_weights, stages, batch, memory, slo,
        link, kafka, codec, max_drop, calibrate, tries, fresh,
    )  # fmt: skip
    outcome = make_plan(asked, quiet=as_json)
    write(outcome, output, report)
    typer.echo(to_json(outcome)) if as_json else show_plan(outcome, Console(), output)


def _replan(
    model: str,
    sources: list[str],
    worth: str,
    over: str,
    output: Path | None,
    random_weights: bool,
    as_json: bool,
) -> None:
    """Say whether a running pipeline should be changed: from what its workers measure."""
    import asyncio

    from streaminfer import commands
    from streaminfer.errors import ConfigError
    from streaminfer.spec.file import load

    if not model.endswith((".yaml", ".yml")):
        raise ConfigError(
            f"{model!r} is no pipeline file",
            where="--from-metrics",
            hint="name the file that runs: streaminfer plan pipeline.yaml --from-metrics URL",
        )
    advice = asyncio.run(
        commands.replan(
            load(model), sources, worth=worth, over=over, folder=None, out=output,
            random_weights=random_weights,
        )
    )  # fmt: skip
    commands.print_advice(advice, as_json=as_json, out=output)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(profile)
    app.command()(plan)
