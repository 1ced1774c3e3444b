"""Predicted against measured through a real Kafka: `simulate --check --kafka`, as a user runs it.

Each worker is a process of its own, and a prediction gives each cores of its own. Here they share
two with the broker and with who sends, so the load is light: this says what a check on one machine
is worth, and nothing of a cluster.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from streaminfer.commands.simulate import Ask, Outcome, predict
from streaminfer.spec.file import load
from tests.benchmarks.rows import Row, load_average, spread
from tests.benchmarks.simulated import CASES, P99, SAMPLES, THROUGHPUT, Case
from tests.broker import Broker

__all__ = ["NAME", "measure"]

NAME = "simulate_vs_measured_kafka"
PLANS = ("digits-1", "digits-3", "digits-3-local", "digits-2-replicas", "resnet18-1", "resnet18-2")
SHARE = 0.3  # of what the prediction says is full
FASTEST = 80.0  # samples a second
RUNS = 3  # with arrivals of their own: the medians count
SHORTEST = 8.0  # seconds


async def measure(goals: Mapping[str, str | None]) -> list[Row]:
    """Check every plan."""
    found = []
    with Broker.running() as broker:
        for case in (case for case in CASES if case.name in PLANS):
            ratios = await _ratios(case, broker.address)
            medians = {name: statistics.median(of) for name, of in ratios.items()}
            found.append(medians)
            said = ", ".join(f"{name} {spread(of)}" for name, of in ratios.items())
            print(f"  {case.name:<20} {said}", flush=True)
    right = sum(
        abs(one["throughput"] - 1) <= THROUGHPUT and abs(one["p99"] - 1) <= P99 for one in found
    )
    each = "; ".join(f"{name} {spread([one[name] for one in found])}" for name in found[0])
    note = f"of {len(found)} plans, {RUNS} runs of each: {each}; {load_average()}"
    return [Row(NAME, float(right), "plans", goals[NAME], note)]


async def _ratios(case: Case, address: str) -> dict[str, list[float]]:
    """Return predicted ÷ measured of each run, by name."""
    found: dict[str, list[float]] = {}
    with TemporaryDirectory() as name:
        spec = load(case.file(Path(name)), {"kafka.bootstrap": address})

        async def ask(**more: float | int | bool) -> Outcome:
            return await predict(spec, Ask(**more), Path(name) / "plan", random_weights=True)  # type: ignore[arg-type]

        rate = min(FASTEST, SHARE * (await ask(seconds=4.0)).predicted.throughput)
        seconds = max(SHORTEST, 1.25 * SAMPLES / rate)
        for seed in range(RUNS):
            outcome = await ask(rate=rate, seconds=seconds, seed=seed, check=True)
            for key, ratio in outcome.ratios():
                found.setdefault(key, []).append(ratio)
    return found
