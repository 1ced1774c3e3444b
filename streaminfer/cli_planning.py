"""The command line of `profile` and `plan`: reads arguments, calls one function, prints."""

from __future__ import annotations

from pathlib import Path

import typer

from streaminfer.cli_flags import (
    AlsoBatch,
    Batch,
    Broker,
    Calibrate,
    CodecText,
    Devices,
    ExampleText,
    Fresh,
    FromMetrics,
    Json,
    Kwargs,
    LinkText,
    MaxDrop,
    Memory,
    Model,
    Output,
    Over,
    Random,
    Report,
    Slo,
    Stages,
    Tries,
    Worth,
)

__all__ = ["register"]


def profile(  # noqa: PLR0913 - a command's flags
    model: Model,
    devices: Devices = "cpu",
    kwargs: Kwargs = "{}",
    example: ExampleText = "",
    random_weights: Random = False,
    batch: AlsoBatch = None,
    kafka: Broker = None,
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
    stages: Stages = None,
    batch: Batch = None,
    memory: Memory = None,
    slo: Slo = None,
    link: LinkText = None,
    kafka: Broker = None,
    codec: CodecText = None,
    max_drop: MaxDrop = "0.1%",
    calibrate: Calibrate = None,
    tries: Tries = False,
    kwargs: Kwargs = "{}",
    example: ExampleText = "",
    random_weights: Random = False,
    fresh: Fresh = False,
    from_metrics: FromMetrics = None,
    worth: Worth = "15%",
    over: Over = "10s",
    output: Output = None,
    report: Report = None,
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
