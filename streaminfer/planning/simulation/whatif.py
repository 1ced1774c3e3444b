"""Change a number of a scenario by its name: `trunk.seconds=0.5x`, `link.alpha=2ms`.

    STAGE.…      seconds, speed, replicas, batch.max, batch.wait, bytes, overhead, threads,
                 exit: the share of its rows that leave at its exit
                 edge: as what it reads travels: float16, int8+zstd
                 quorum, deadline: of an ensemble's gather
    batch.…      max, wait: of every stage
    link.…       alpha, beta (or a bandwidth: 100MB/s)
    host.…       cores and every cost of the engine
    the rest     rate, concurrency, burst, skew, partitions, window, sinks

A value is a number, a duration, a size, or a factor: `0.5x` halves what is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from streaminfer.errors import ConfigError
from streaminfer.planning.simulation.scenario import Host, Scenario, SimStage
from streaminfer.spec import did_you_mean
from streaminfer.spec.units import parse_duration, parse_size

__all__ = ["keys", "what_if", "with_replicas"]

FACTOR = re.compile(r"^(\d+(?:\.\d+)?(?:e[-+]?\d+)?)x$")
Read = Callable[[str], float]


def _whole(text: str) -> float:
    value = int(text)
    if value < 1:
        raise ValueError("expected a whole number of 1 or more")
    return value


def _beta(text: str) -> float:
    """Read seconds per byte, or bytes per second as 100MB/s."""
    if text.endswith("/s"):
        return 1 / max(1, parse_size(text[:-2]))
    return parse_duration(text)


def _size(text: str) -> float:
    return parse_size(text)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError("expected a share from 0 to 1")
    return value


STAGE: dict[str, Read] = {
    "seconds": parse_duration,
    "speed": float,
    "replicas": _whole,
    "batch.max": _whole,
    "batch.wait": parse_duration,
    "bytes": _size,
    "overhead": parse_duration,
    "threads": _whole,
    "exit": _share,
}
GATHER: dict[str, Read] = {"quorum": _whole, "deadline": parse_duration}
BATCH: dict[str, Read] = {"batch.max": _whole, "batch.wait": parse_duration}
LINK: dict[str, Read] = {"link.alpha": parse_duration, "link.beta": _beta}
HOST: dict[str, Read] = {
    f"host.{field.name}": float if field.name == "cores" else parse_duration
    for field in fields(Host)
}
LOAD: dict[str, Read] = {"rate": float, "concurrency": _whole, "burst": _whole, "skew": float}
REST: dict[str, Read] = {"partitions": _whole, "window": _whole, "sinks": _whole}


def keys(scenario: Scenario) -> list[str]:
    """Return every name that can be changed."""
    stages = [f"{stage.name}.{key}" for stage in scenario.stages for key in STAGE]
    gathers = [f"{s.name}.{key}" for s in scenario.stages if s.quorum for key in GATHER]
    edges = [f"{s.name}.edge" for s in scenario.stages[1:] if not s.local]
    return [*stages, *gathers, *edges, *BATCH, *LINK, *HOST, *LOAD, *REST]


def what_if(scenario: Scenario, changes: Sequence[str]) -> Scenario:
    """Return the scenario with these KEY=VALUE applied, one after the other.

    Raises:
        ConfigError: no such key (says the nearest one), or a value that is none for it.
    """
    for change in changes:
        key, equals, value = (part.strip() for part in change.partition("="))
        if not equals or not value:
            raise ConfigError(
                f"{change!r} changes nothing", where="--what-if", hint="KEY=VALUE: link.alpha=2ms"
            )
        if key not in keys(scenario):
            hint = did_you_mean(key, keys(scenario))
            raise ConfigError(f"no number {key!r} to change", where="--what-if", hint=hint)
        try:
            scenario = _change(scenario, key, value)
        except ValueError as error:
            raise ConfigError(f"{key}={value}: {error}", where="--what-if") from None
    return scenario


def with_replicas(scenario: Scenario, text: str) -> Scenario:
    """Return the scenario with the replicas that `trunk=4,head=2` says. Raises ConfigError."""
    names = [stage.name for stage in scenario.stages]
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, count = part.partition("=")
        if name not in names:
            hint = did_you_mean(name, names)
            raise ConfigError(f"no stage {name!r}", where="--replicas", hint=hint)
        if not count.isdecimal() or not int(count):
            raise ConfigError(
                f"{part!r}: a stage has 1 or more replicas",
                where="--replicas",
                hint=f"--replicas {name}=2",
            )
        scenario = _change(scenario, f"{name}.replicas", count)
    return scenario


def _change(scenario: Scenario, key: str, value: str) -> Scenario:
    room, rest = _parted(scenario, key)
    if key in BATCH:
        field, read = key.replace(".", "_"), BATCH[key]
        stages = [
            replace(s, **{field: _value(value, getattr(s, field), read)}) for s in scenario.stages
        ]
        return replace(scenario, stages=stages)
    if key in LINK:
        old = getattr(scenario.link, rest)
        link = replace(scenario.link, **{rest: _value(value, old, LINK[key])})
        return replace(scenario, link=link)
    if key in HOST:
        old = getattr(scenario.host, rest)
        return replace(
            scenario, host=replace(scenario.host, **{rest: _value(value, old, HOST[key])})
        )
    if key in LOAD:
        return _load(scenario, key, value)
    if key in REST:
        return replace(scenario, **{key: _value(value, getattr(scenario, key), REST[key])})
    if rest == "edge":
        return _recoded(scenario, room, value)
    rooms = {room}
    if rest == "replicas":  # of a worker: all of its stages
        names = [[scenario.stages[k].name for k in group] for group in scenario.groups()]
        rooms = next(set(group) for group in names if room in group)
    stages = [_stage(s, rest, value) if s.name in rooms else s for s in scenario.stages]
    if rest == "bytes":
        stages = [_read_anew(s, scenario.stages, stages) for s in stages]
    return replace(scenario, stages=stages)


def _parted(scenario: Scenario, key: str) -> tuple[str, str]:
    """Return whose number it is, and which: names of stages may have dots."""
    for stage in scenario.stages:
        rest = key[len(stage.name) + 1 :]
        if key.startswith(f"{stage.name}.") and rest in (*STAGE, *GATHER, "edge"):
            return stage.name, key[len(stage.name) + 1 :]
    room, _, rest = key.partition(".")
    return room, rest


def _load(scenario: Scenario, key: str, value: str) -> Scenario:
    load = scenario.arrivals
    if key == "rate":
        new = replace(load, rate=_value(value, load.rate, float), window=None)
    elif key == "concurrency":
        new = replace(load, window=_value(value, load.window, _whole), rate=None)
    else:
        new = replace(load, **{key: _value(value, getattr(load, key), LOAD[key])})
    return replace(scenario, arrivals=new)


def _recoded(scenario: Scenario, name: str, value: str) -> Scenario:
    """Let what a stage reads travel in another way: other bytes, and work at both ends."""
    index = next(k for k, stage in enumerate(scenario.stages) if stage.name == name)
    reader = scenario.stages[index]
    if not reader.encodings:
        raise ValueError(
            "nobody has measured other edges here; between two plain stages, "
            "`streaminfer profile PIPELINE` does"
        )
    if value not in reader.encodings:
        raise ValueError(f"no such edge; there are {', '.join(reader.encodings)}")
    now, then = reader.encodings[reader.edge], reader.encodings[value]
    factor = then.nbytes / now.nbytes if now.nbytes else 1.0
    (source,) = scenario.sources()[index]
    sender = scenario.stages[source]
    stages = list(scenario.stages)
    stages[source] = replace(
        sender,
        seconds=_longer(sender.seconds, then.encode - now.encode),
        bytes_out=sender.bytes_out * factor,
    )
    stages[index] = replace(
        reader,
        seconds=_longer(reader.seconds, then.decode - now.decode),
        bytes_in=reader.bytes_in and tuple(n * factor for n in reader.bytes_in),
        edge=value,
    )
    return replace(scenario, stages=stages)


def _longer(seconds: Mapping[int, float], by: float) -> dict[int, float]:
    return {n: max(0.0, t + n * by) for n, t in seconds.items()}


def _stage(stage: SimStage, key: str, value: str) -> SimStage:
    read = (STAGE | GATHER)[key]
    if key == "seconds":
        if match := FACTOR.match(value):
            factor = float(match[1])
            seconds, warming = (
                {n: t * factor for n, t in times.items()}
                for times in (stage.seconds, stage.warming)
            )
            return replace(stage, seconds=seconds, warming=warming)
        return replace(stage, seconds={stage.batch_max: read(value)})
    if key == "speed":
        speeds = tuple(_value(value, speed, read) for speed in stage.speeds)
        return replace(stage, speeds=speeds)
    if key == "replicas":
        count = int(_value(value, len(stage.speeds), read))
        speeds = tuple(stage.speeds[k % len(stage.speeds)] for k in range(count))
        shares = stage.shares and tuple(stage.shares[k % len(stage.shares)] for k in range(count))
        return replace(stage, speeds=speeds, shares=shares)
    field = {"bytes": "bytes_out", "exit": "leaves"}.get(key, key.replace(".", "_"))
    return replace(stage, **{field: _value(value, getattr(stage, field), read)})


def _read_anew(stage: SimStage, before: Sequence[SimStage], after: Sequence[SimStage]) -> SimStage:
    """Let what a stage reads weigh as much more or less as what is sent."""
    if stage.bytes_in is None or stage.reads is None:
        return stage
    by = {
        old.name: new.bytes_out / old.bytes_out if old.bytes_out else 1.0
        for old, new in zip(before, after, strict=True)
    }
    sizes = zip(stage.reads, stage.bytes_in, strict=True)
    return replace(stage, bytes_in=tuple(by[name] * nbytes for name, nbytes in sizes))


def _value(text: str, old: float | None, read: Read) -> Any:
    """Read a value, or multiply the old one."""
    match = FACTOR.match(text)
    if not match:
        return read(text)
    if old is None:
        raise ValueError("there is nothing to multiply: give a value")
    new = old * float(match[1])
    return max(1, round(new)) if read is _whole else new
