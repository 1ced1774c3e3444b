"""What a simulation is told: stages with their times, the link, the engine's own costs, the load.

Every number is seconds, bytes or samples. A `SimStage` is made from a profile, from a measurement,
or by hand; nothing here knows torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from streaminfer.errors import ConfigError

__all__ = [
    "Arrivals",
    "Encoded",
    "Floats",
    "Host",
    "Ints",
    "Link",
    "Pattern",
    "Scenario",
    "SimStage",
    "StageTimes",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Pattern = Literal["constant", "poisson", "burst"]
PATTERNS: tuple[Pattern, ...] = ("constant", "poisson", "burst")


@dataclass(frozen=True)
class StageTimes:
    """What was measured of one stage.

    Attributes:
        seconds: of one device call by batch size, on the first replica's device.
        cold: the same after a pause, when caches hold other things; {}: no longer.
        spread: (third quartile - first) / median of the groups of calls, at the largest batch.
        speeds: of each replica's device, relative to the first; () if all are alike.
        leaves: 0-1: rows that had their answer at the stage's exit.
        ratio: bytes of its output as they travel ÷ before compression.
        takes: how often a call takes the interpreter's lock.
        noise: seconds of single calls ÷ their median.
        beside: seconds of a call ÷ before, while another device computes the same.
    """

    seconds: Mapping[int, float]
    spread: float = 0.0
    speeds: tuple[float, ...] = ()
    cold: Mapping[int, float] = field(default_factory=dict)
    leaves: float = 0.0
    ratio: float = 1.0
    takes: float = 0.0
    noise: tuple[float, ...] = ()
    beside: float = 1.0


@dataclass(frozen=True)
class Encoded:
    """What a sample costs on an edge of one dtype and codec: bytes, and seconds of the devices."""

    nbytes: float
    encode: float  # on the device that sends
    decode: float  # on the device that reads


@dataclass(frozen=True)
class SimStage:
    """A stage: how long a batch takes, on how many devices, and what its output weighs.

    Attributes:
        seconds: batch size → seconds of one device call; linear between the sizes that are known.
        warming: by batch size, the seconds that a call takes longer whose device stood idle.
        speeds: one relative speed per replica; 2.0 computes in half of `seconds`.
        bytes_out: per sample, as it travels.
        overhead: seconds of the worker's event loop per micro-batch, beside `Host`'s.
        local: it shares a worker with what it reads: no hop.
        threads: cores that one call keeps busy (where `Host.cores` are shared).
        takes: how often a call takes the interpreter's lock (where `Host.cores` are shared).
        noise: by what calls take longer or shorter, each as likely as the others; (): all alike.
        beside: times that a call takes as long while other devices compute, too (`Host.cores`).
        reads: the stages whose output it needs, all of them; None: the one before it.
        bytes_in: per sample, of each that it reads; None: all that they send.
        topic: stages that read the same one are sent what is in it once; "": one of its own.
        balance: micro-batches reach any of its replicas, whatever their partition.
        leaves: 0-1: rows that have their answer here and go to the sink.
        device: what `prices` call it.
        shares: what each replica asks of the partitions; None: by its speed.
        quorum: of what it reads, how many will do at the `deadline`; None: all, however late.
        deadline: seconds from the first part of a micro-batch on.
        edge: as what it reads travels; its bytes and its times are of that.
        encodings: what else could travel, and what it would cost, by name.
    """

    name: str
    seconds: Mapping[int, float]
    speeds: tuple[float, ...] = (1.0,)
    batch_max: int = 16
    batch_wait: float = 0.004
    bytes_out: float = 0.0
    overhead: float = 0.0
    local: bool = False
    threads: int = 1
    takes: float = 0.0
    noise: tuple[float, ...] = ()
    beside: float = 1.0
    reads: tuple[str, ...] | None = None
    bytes_in: tuple[float, ...] | None = None
    topic: str = ""
    balance: bool = False
    leaves: float = 0.0
    device: str = "cpu"
    shares: tuple[float, ...] | None = None
    quorum: int | None = None
    deadline: float = 30.0
    edge: str = "native"
    encodings: Mapping[str, Encoded] = field(default_factory=dict)
    warming: Mapping[int, float] = field(default_factory=dict)

    def warming_table(self) -> list[float]:
        """Return the seconds that a batch of n takes longer on an idle device, at index n."""
        known = sorted(self.warming.items()) or [(0, 0.0)]
        sizes, times = [n for n, _ in known], [t for _, t in known]
        return [float(t) for t in np.interp(np.arange(self.batch_max + 1), sizes, times)]

    def table(self) -> list[float]:
        """Return the seconds of a batch of n samples at index n, 0 to `batch_max`."""
        known = sorted(self.seconds.items())
        sizes, times = [n for n, _ in known], [t for _, t in known]
        found = np.interp(np.arange(self.batch_max + 1), sizes, times)
        if len(known) > 1 and self.batch_max > sizes[-1]:
            slope = max(0.0, (times[-1] - times[-2]) / (sizes[-1] - sizes[-2]))
            beyond = np.arange(sizes[-1], self.batch_max + 1)
            found[sizes[-1] :] = times[-1] + slope * (beyond - sizes[-1])
        elif self.batch_max > sizes[-1]:  # one size known: the work is by sample
            beyond = np.arange(sizes[-1], self.batch_max + 1)
            found[sizes[-1] :] = times[-1] / sizes[-1] * beyond
        return [float(t) for t in found]

    def capacity(self) -> float:
        """Return the most samples a second that its replicas compute together."""
        best = max(n / t if t else math.inf for n, t in enumerate(self.table()) if n)
        return best * sum(self.speeds)


@dataclass(frozen=True)
class Link:
    """What a hop takes beside the work at its ends. The link of a replica sends one by one."""

    alpha: float = 0.0  # seconds per message, those from and to the client included
    beta: float = 0.0  # seconds per byte


@dataclass(frozen=True)
class Host:
    """What the engine itself costs.

    With `cores` all workers and the client live in one process, as on the memory bus: they share
    one event loop, one interpreter's lock, and so many cores. Without, every replica has its own
    event loop, and its device waits for nobody.

    Attributes:
        cores: shared by all; None: each worker has its own.
        client: seconds per sample to send it and to read its answer.
        receive: seconds per input record.
        decode: seconds per image in the decoder's thread; `python` of it with the lock held.
        form: seconds per micro-batch at ingest.
        hop: seconds per envelope, to hand it to a device and to publish what comes of it.
        row: seconds per sample of an envelope, each time it is read or written.
        nbyte: seconds per byte, each time it is read or written.
        call: seconds per device call, to start it and to take its results.
        wake: seconds of an event loop that had nothing to do, to begin again.
        answer: seconds per sample at the sink.
        settle: seconds per envelope at the sink.
        turn: seconds per poll.
        timer: seconds that a timer comes late.
        commit: seconds between two commits of the sink, which the window is read from.
        look: seconds between two looks at them.
    """

    cores: float | None = None
    client: float = 0.0
    receive: float = 0.0
    decode: float = 0.0
    python: float = 0.0
    form: float = 0.0
    hop: float = 0.0
    row: float = 0.0
    nbyte: float = 0.0
    call: float = 0.0
    wake: float = 0.0
    answer: float = 0.0
    settle: float = 0.0
    turn: float = 0.0
    timer: float = 0.0
    commit: float = 0.1
    look: float = 0.05

    @classmethod
    def reference(cls, cores: float | None) -> Host:
        """Return the costs on the machine they were fitted on; `scaled` makes them another's.

        Least squares over the event loop's CPU time of the digits pipeline with 1 and 3 stages at
        batches of 1, 4, 16 and 64: 102 µs a sample, 686 µs a micro-batch, and for each stage
        471 µs a micro-batch and 22 µs a sample; it fits the eight runs within 22 %. How a sum is
        divided among its parts is read off the code, not measured.
        """
        return cls(
            cores=cores,
            client=30e-6,
            receive=30e-6,
            answer=42e-6,
            form=230e-6,
            settle=250e-6,
            hop=350e-6,
            call=120e-6,
            row=11e-6,
            turn=100e-6,
            timer=0.0005 if cores is not None else 0.0,
        )

    def scaled(self, by_sample: float, by_batch: float) -> Host:
        """Return the costs of an event loop that takes so many times as long for each."""
        samples = ("client", "receive", "answer", "row")
        batches = ("form", "settle", "hop", "call", "turn")
        factors = dict.fromkeys(samples, by_sample) | dict.fromkeys(batches, by_batch)
        return replace(self, **{name: getattr(self, name) * by for name, by in factors.items()})

    def loop_seconds(self, samples: float, batches: float, stages: int, hops: float) -> float:
        """Return the event loop's seconds for samples that cross so many stages and hops.

        A hop is a message that is sent and read: stages joined by local edges share one, and a
        gather has one for each of its parts.
        """
        each = self.client + self.receive + self.answer + 2 * self.row * hops
        return samples * each + batches * (
            self.form + self.settle + 2 * self.turn + stages * self.call + hops * self.hop
        )


@dataclass(frozen=True)
class Arrivals:
    """The load: `rate` samples a second, or (closed loop) always `window` of them unanswered.

    constant: at even distances, one partition after the other. poisson: at random times. burst:
    `burst` of them at once, at even distances. `skew`: partition k gets a share ∝ 1/(k+1)^skew.
    """

    rate: float | None = None
    window: int | None = None
    pattern: Pattern = "constant"
    skew: float = 0.0
    burst: int = 1

    def schedule(self, seconds: float, partitions: int, seed: int) -> tuple[Floats, Ints]:
        """Return when each sample of an open load arrives, in order, and in which partition."""
        if self.rate is None:
            raise ConfigError("a closed loop has no schedule", hint="give a rate")
        random = np.random.default_rng(seed)
        count = math.ceil(self.rate * seconds)
        times: Floats = np.arange(count, dtype=np.float64) / self.rate
        if self.pattern == "poisson":
            gaps = random.exponential(1 / self.rate, count + 8 * math.ceil(math.sqrt(count)) + 8)
            times = np.cumsum(gaps, dtype=np.float64)
        elif self.pattern == "burst":
            times = times[np.arange(count) // self.burst * self.burst]
        times = times[times < seconds]
        return times, self.partitions_of(len(times), partitions, random)

    def next_partitions(
        self, sent: int, count: int, partitions: int, random: np.random.Generator
    ) -> list[int]:
        """Return where a closed loop sends `count` more, after those it has sent."""
        found = self.partitions_of(count, partitions, random)
        if not self.skew and self.pattern != "poisson":
            found = (found + sent) % partitions
        return [int(n) for n in found]

    def partitions_of(self, count: int, partitions: int, random: np.random.Generator) -> Ints:
        """Return the partition of each of `count` samples."""
        if not self.skew and self.pattern != "poisson":
            return np.arange(count, dtype=np.int64) % partitions
        weights = 1.0 / np.arange(1, partitions + 1) ** self.skew
        return random.choice(partitions, count, p=weights / weights.sum())


@dataclass(frozen=True)
class Scenario:
    """All of it. `window`: samples of one partition between ingest and answer.

    It runs for `seconds` of simulated time; what is answered in the first `warm` isn't counted.
    """

    stages: Sequence[SimStage]
    arrivals: Arrivals
    link: Link = Link()
    host: Host = Host()
    partitions: int = 8
    window: int = 4096
    sinks: int = 1
    bytes_in: float = 0.0  # per input record
    seconds: float = 10.0
    warm: float = 1.0
    seed: int = 0
    prices: Mapping[str, float] = field(default_factory=dict)  # $ per hour of a device

    def sources(self) -> list[tuple[int, ...]]:
        """Return, for each stage, the indices of those it reads; () is the input topic."""
        index = {stage.name: k for k, stage in enumerate(self.stages)}
        return [
            ((k - 1,) if k else ()) if stage.reads is None else tuple(index[r] for r in stage.reads)
            for k, stage in enumerate(self.stages)
        ]

    def groups(self) -> list[list[int]]:
        """Return the indices of each worker's stages: a local one is where what it reads is."""
        found: list[list[int]] = []
        home: dict[int, list[int]] = {}
        for k, (stage, reads) in enumerate(zip(self.stages, self.sources(), strict=True)):
            if stage.local and reads:
                home[k] = home[reads[0]]
            else:
                found.append([])
                home[k] = found[-1]
            home[k].append(k)
        return found

    def hops(self) -> float:
        """Return the messages that a micro-batch is, each sent once and read once.

        Those that are sent once and read by several count half for each end.
        """
        sources = self.sources()
        outlets, read = set(), 0
        within = {k for group in self.groups() for k in group[:-1]}
        for group in self.groups():
            first = self.stages[group[0]]
            outlets |= {(k, first.topic or first.name) for k in sources[group[0]]}
            read += len(sources[group[0]])
        ends = len(set(range(len(self.stages))) - within - {k for k, _ in outlets})
        exits = sum(stage.leaves > 0 for stage in self.stages)
        return (len(outlets) + read) / 2 + ends + exits

    def reach(self) -> list[float]:
        """Return the share of the samples that comes to each stage: some leave at exits."""
        found: list[float] = []
        for reads in self.sources():
            found.append(min((found[k] * (1 - self.stages[k].leaves) for k in reads), default=1.0))
        return found

    def bottleneck(self) -> str:
        """Return the stage that can carry the least samples of the input a second."""
        loads = zip(self.stages, self.reach(), strict=True)
        return min(loads, key=lambda one: one[0].capacity() / max(one[1], 1e-9))[0].name
