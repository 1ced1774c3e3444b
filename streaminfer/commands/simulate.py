"""The command that predicts a plan, asks what if, and checks the prediction by a real run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from streaminfer.commands.cells import cells
from streaminfer.commands.plans import console, plan_of, warn
from streaminfer.errors import ConfigError, TransportError
from streaminfer.plan import Plan
from streaminfer.planning.profile import Profile, kept
from streaminfer.planning.simulation.sanity import check
from streaminfer.planning.simulation.scenario import PATTERNS
from streaminfer.planning.simulation.simulator import (
    Arrivals,
    Host,
    Link,
    Pattern,
    Report,
    Scenario,
    StageTimes,
    simulate,
)
from streaminfer.planning.simulation.whatif import what_if, with_replicas
from streaminfer.planning.source import model_key
from streaminfer.spec import did_you_mean
from streaminfer.topics import window

if TYPE_CHECKING:
    from streaminfer.commands.records import Input
    from streaminfer.commands.trial import Trial
    from streaminfer.spec import PipelineSpec

__all__ = ["Ask", "Outcome", "predict", "print_simulated", "scenario_of"]

CLOSED = 256  # samples in the loop where no rate is given
BUSY = 0.02  # cores that others use, above which a check's p99 is not to be trusted
SPREAD = 0.25  # of a stage's times, above which they are not to be trusted
KAFKA = Link(alpha=0.003, beta=1 / 200e6)  # a broker in the same rack, acks=all


@dataclass(frozen=True)
class Ask:
    """What the command line asks for."""

    rate: float | None = None
    concurrency: int | None = None
    pattern: str = "poisson"
    replicas: str = ""
    devices: str = ""
    what_if: Sequence[str] = ()
    cost: Sequence[str] = ()
    bus: str | None = None
    seconds: float = 10.0
    seed: int = 0
    check: bool = False


@dataclass(frozen=True)
class Outcome:
    """A prediction; what it would be with the changes; what was measured."""

    predicted: Report
    changed: Report | None = None
    measured: Trial | None = None
    changes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Return `predicted` and `measured` with the same keys, and `what_if`."""
        found: dict[str, Any] = {"predicted": self.predicted.to_json()}
        if self.changed is not None:
            found["what_if"] = {"changes": list(self.changes), **self.changed.to_json()}
        if self.measured is not None:
            found["measured"] = self.measured.to_json()
            found["ratio"] = dict(self.ratios())
        return found

    def ratios(self) -> list[tuple[str, float]]:
        """Return predicted by measured, for what both have."""
        if self.measured is None:
            return []
        names = ("throughput", "p50", "p99")
        return [(n, getattr(self.predicted, n) / getattr(self.measured, n)) for n in names]


async def predict(
    spec: PipelineSpec, ask: Ask, folder: Path | None = None, *, random_weights: bool = False
) -> Outcome:
    """Measure the stages of a plan, simulate it, and run it if that is asked.

    Raises:
        ConfigError: an unknown stage, device, pattern or key; a rate of 0; a price that is none;
            a check through Kafka, and no broker is named.
        TransportError: a check, and the broker does not answer.
    """
    from streaminfer.commands.calibration import calibrate
    from streaminfer.commands.engine import apart
    from streaminfer.commands.records import inputs_of
    from streaminfer.commands.timing import time_decode, time_stages
    from streaminfer.planning.timing import cores

    _refuse(ask)
    where, plan = plan_of(spec, folder, random_weights)
    inputs = inputs_of(spec, plan)
    # what the flags say is judged before anything is measured
    blank = {stage.name: StageTimes({1: 1.0}) for stage in plan.stages}
    profiles = kept(model_key(spec, plan.random_weights)) if spec.model else []
    profile = profiles[0] if profiles else None
    _asked(scenario_of(spec, plan, blank, Host(), ask, profile), ask)
    link = await _link(spec, ask) if _bus(spec, ask) == "kafka" else None
    times = await time_stages(spec, plan, where)
    for name, one in times.items():
        if one.spread > SPREAD:
            warn(f"{name}: its times spread by {one.spread:.0%}: is the machine busy?")
    found = await calibrate(spec, plan, where, inputs, float(cores()))
    host = replace(found.host, decode=time_decode(plan.input, inputs))
    times = {name: replace(one, leaves=found.leaves.get(name, 0.0)) for name, one in times.items()}
    before = replace(
        scenario_of(spec, plan, times, host, ask, profile),
        bytes_in=_mean(len(one.value) for one in inputs),
    )
    if link:
        before = replace(before, host=apart(host), link=link)
    plain, after = _asked(before, ask)
    predicted = simulate(plain)
    changed = simulate(after) if ask.what_if else None
    if not ask.check:
        return Outcome(predicted, changed, None, ask.what_if)
    measured = await _measured(spec, plan, where, plain, inputs, random_weights)
    if measured.others > BUSY:
        warn(
            f"others kept {measured.others:.2f} cores busy while it was measured (processes here,"
            " or other guests of the same host): its p99 is theirs, too"
        )
    return Outcome(predicted, changed, measured, ask.what_if)


async def _link(spec: PipelineSpec, ask: Ask) -> Link:
    """Return what the broker takes, if there is one that answers; a check needs it."""
    from streaminfer.commands.road import transit

    if not spec.kafka.bootstrap and not ask.check:
        return KAFKA
    try:
        return await transit(spec)
    except TransportError as error:
        if ask.check:
            raise
        warn(f"the link is a typical one, not measured: {error}")
        return KAFKA


async def _measured(
    spec: PipelineSpec,
    plan: Plan,
    folder: Path,
    load: Scenario,
    inputs: Sequence[Input],
    random_weights: bool,
) -> Trial:
    """Run the plan as it was predicted: in this process, or on Kafka with one for each worker."""
    from streaminfer.commands.processes import Processes
    from streaminfer.commands.trial import drive, measure
    from streaminfer.planning.timing import cores

    if load.host.cores is not None:
        return await drive(spec, plan, folder, load, inputs)
    threads = sum(len(stage.speeds) * stage.threads for stage in load.stages)
    if threads + 1 > cores():  # and this process
        warn(
            f"the prediction gives every worker cores of its own; here {threads} threads, this"
            f" process and maybe the broker share {cores():.0f}"
        )
    pipeline = Processes(spec, plan, folder, random_weights=random_weights)
    async with pipeline.up():
        return await measure(pipeline, load, inputs)


def _asked(scenario: Scenario, ask: Ask) -> tuple[Scenario, Scenario]:
    """Return the scenario as the flags have it, and with the changes on top."""
    plain = with_replicas(scenario, ask.replicas)
    check(plain)
    changed = what_if(plain, ask.what_if)
    check(changed)
    return plain, changed


def scenario_of(
    spec: PipelineSpec,
    plan: Plan,
    times: Mapping[str, StageTimes],
    host: Host,
    ask: Ask,
    profile: Profile | None = None,
) -> Scenario:
    """Make the scenario of a pipeline file, given what was measured of each cell of its plan.

    `profile`: the model's, for what it would be if something else travelled.
    """
    devices = [name.strip() for name in ask.devices.split(",")] if ask.devices else []
    partitions = spec.kafka.partitions
    closed = (ask.concurrency or CLOSED) if ask.rate is None else None
    pattern: Pattern = next(p for p in PATTERNS if p == ask.pattern)
    return Scenario(
        stages=cells(spec, plan, times, devices, profile),
        arrivals=Arrivals(ask.rate, closed, pattern if ask.rate is not None else "constant"),
        host=host,
        partitions=partitions,
        window=window(spec, plan, partitions),
        seconds=ask.seconds,
        warm=ask.seconds / 5,
        seed=ask.seed,
        prices=_prices(ask.cost),
    )


def _bus(spec: PipelineSpec, ask: Ask) -> str:
    return ask.bus or ("kafka" if spec.kafka.bootstrap else "memory")


def _refuse(ask: Ask) -> None:
    if ask.pattern not in PATTERNS:
        hint = did_you_mean(ask.pattern, PATTERNS)
        raise ConfigError(f"no pattern {ask.pattern!r}", where="--pattern", hint=hint)
    if ask.bus not in (None, "memory", "kafka"):
        raise ConfigError(f"no bus {ask.bus!r}", where="--bus", hint="memory or kafka")
    if ask.rate is not None and ask.concurrency is not None:
        raise ConfigError("a load is a rate or a concurrency", where="--rate", hint="drop one")
    if ask.concurrency is not None and ask.concurrency < 1:
        raise ConfigError("a loop of no samples", where="--concurrency", hint="give 1 or more")
    if ask.check and (ask.replicas or ask.devices):
        raise ConfigError(
            "a check runs the file as it is",
            where="--check",
            hint="drop --replicas and --devices, or set them in the file",
        )


def _prices(texts: Iterable[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        device, _, price = text.partition("=")
        try:
            found[device] = float(price)
        except ValueError:
            raise ConfigError(
                f"{text!r} is no price", where="--cost", hint="dollars an hour: --cost cpu=0.05"
            ) from None
    return found


def _mean(values: Iterable[int]) -> float:
    found = list(values)
    return sum(found) / max(1, len(found))


def print_simulated(outcome: Outcome, *, as_json: bool = False) -> None:
    """Show it: a column for the prediction, one for the changes, one for what was measured."""
    if as_json:
        print(json.dumps(outcome.to_json()))
        return
    columns: list[tuple[str, Report | Trial]] = [("predicted", outcome.predicted)]
    if outcome.changed:
        columns.append((" ".join(outcome.changes), outcome.changed))
    if outcome.measured:
        columns.append(("measured", outcome.measured))
    table = Table("", *[name for name, _ in columns], *(["ratio"] if outcome.measured else []))
    ratios = dict(outcome.ratios())
    for key, unit, factor in (("throughput", "/s", 1), ("p50", " ms", 1e3), ("p99", " ms", 1e3)):
        cells = [f"{getattr(report, key) * factor:,.1f}{unit}" for _, report in columns]
        table.add_row(key, *cells, *([f"{ratios[key]:.2f}"] if ratios else []))
    for name in outcome.predicted.busy:
        table.add_row(f"busy {name}", *[f"{report.busy[name]:.0%}" for _, report in columns])
    loops = ["" if math.isnan(report.host) else f"{report.host:.0%}" for _, report in columns]
    table.add_row("event loop", *loops)
    console.print(table)
    for title, report in columns:
        if isinstance(report, Report):
            _print_report(title, report)


def _print_report(title: str, report: Report) -> None:
    console.print(
        f"{title}: the bottleneck is {report.bottleneck}; "
        f"devices work {report.utilisation:.0%} of the time"
    )
    for name, queue in report.queues.items():
        console.print(
            f"  waiting for {name}: {queue.samples:,.0f} samples, at most "
            f"{queue.samples_max:,.0f} ({queue.nbytes_max / 1e6:,.1f} MB)"
        )
    if report.partial or report.failed:
        console.print(
            f"  at a deadline: {report.partial:.1%} go on without some of their branches, "
            f"{report.failed:.1%} fail"
        )
    if report.saturated:
        console.print("[yellow]more arrives than is answered: the latency grows with time[/]")
    if report.cost is not None:
        console.print(f"${report.cost:,.2f} per million images")
