"""The flags of the command line that several commands share, or that are many on one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# ---- of several --------------------------------------------------------------------------------

Pipeline = Annotated[Path, typer.Argument(metavar="PIPELINE", help="The pipeline file (YAML).")]
Kafka = Annotated[
    str | None,
    typer.Option(
        "--kafka",
        metavar="HOST:PORT",
        help="The broker; else KAFKA_BOOTSTRAP_SERVERS, else the file.",
    ),
]
PlanDir = Annotated[
    Path | None,
    typer.Option("--plan", metavar="DIR", help="The plan directory; else one in .streaminfer/."),
]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Read a model.file (.pt2): its reader can run what is in it."),
]
Paths = Annotated[
    list[str],
    typer.Argument(metavar="FILES|DIRS|-", help="Images; a folder means all in it; - stdin."),
]
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
Broker = Annotated[
    str | None,
    typer.Option("--kafka", metavar="HOST:PORT", help="Measure the hops of this broker."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again, whatever was kept.")]

# ---- of `plan` ---------------------------------------------------------------------------------

Stages = Annotated[int | None, typer.Option(min=1, help="Exactly so many stages.")]
Batch = Annotated[
    int | None,
    typer.Option(min=1, help="Exactly this micro-batch: it is measured however long it takes."),
]
AlsoBatch = Annotated[
    int | None,
    typer.Option("--batch", min=1, help="Measure this micro-batch, too, however long it takes."),
]
Memory = Annotated[
    str | None, typer.Option(metavar="4GB|cuda:0=16GB,…", help="Memory of each device.")
]
Slo = Annotated[
    str | None, typer.Option(metavar="p99=50ms", help="Only plans that answer within it.")
]
LinkText = Annotated[
    str | None,
    typer.Option(
        metavar="memory|kafka|100MB/s", help="What stages are joined by; else as the file says."
    ),
]
CodecText = Annotated[
    str | None,
    typer.Option(metavar="auto|float16|int8|…", help="What travels; auto: chosen by drift."),
]
MaxDrop = Annotated[
    str, typer.Option(metavar="0.1%", help="Answers that `--codec auto` may change.")
]
Calibrate = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Images for `--codec auto`; else seeded.")
]
Tries = Annotated[
    bool, typer.Option("--try", help="Run the best few here; rank by what is measured.")
]
FromMetrics = Annotated[
    list[str] | None,
    typer.Option(
        metavar="URL|FILE",
        help="Re-plan what runs by its /metrics (or a targets file): is a change worth it?",
    ),
]
Worth = Annotated[
    str, typer.Option(metavar="PERCENT", help="With --from-metrics: the least gain to act on.")
]
Over = Annotated[
    str, typer.Option(metavar="DURATION", help="With --from-metrics: how long to measure.")
]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write a pipeline file.")
]
Report = Annotated[
    Path | None, typer.Option(metavar="FILE.html", help="Write a report with figures.")
]

# ---- of `simulate` -----------------------------------------------------------------------------

Rate = Annotated[
    float | None, typer.Option(metavar="R", help="Images a second; else as fast as it goes.")
]
Concurrency = Annotated[
    int | None, typer.Option(metavar="N", help="Without a rate: images in flight (256).")
]
PatternText = Annotated[
    str, typer.Option(metavar="poisson|constant|burst", help="How they arrive.")
]
Replicas = Annotated[str, typer.Option(metavar="STAGE=N,…", help="Other replicas.")]
Priced = Annotated[
    str, typer.Option(metavar="NAME,…", help="What --cost calls the stages' devices.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--what-if", metavar="KEY=VALUE", help="trunk.seconds=0.5x, trunk.edge=int8+zstd"),
]
Cost = Annotated[
    list[str] | None, typer.Option(metavar="DEVICE=$", help="Dollars an hour of a device.")
]
Bus = Annotated[
    str | None, typer.Option(metavar="memory|kafka", help="One process, or one per worker.")
]
Seconds = Annotated[float, typer.Option(metavar="S", help="Simulated seconds.")]
Seed = Annotated[int, typer.Option(help="Of the arrivals.")]
Check = Annotated[
    bool, typer.Option("--check", help="Run it, too, and compare; on Kafka on topics of its own.")
]
