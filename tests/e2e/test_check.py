"""`simulate --check` through a real Kafka: a process per worker, on topics of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from streaminfer.commands import plan_of, predict, print_simulated
from streaminfer.commands.processes import Processes
from streaminfer.commands.records import inputs_of
from streaminfer.commands.simulate import KAFKA, Ask
from streaminfer.commands.trial import measure
from streaminfer.errors import ConfigError, StreaminferError, TransportError
from streaminfer.planning.simulation.scenario import Arrivals, Scenario
from streaminfer.spec.file import load
from tests.e2e.conftest import digits_file, workers_of

DEAD = "127.0.0.1:1"
TWO = [{"name": "stem", "until": "stem"}, {"name": "rest", "replicas": 2}]


async def _checks(address: str, name: str) -> list[str]:
    """Return the topics of checks of pipelines of this name."""
    admin = AIOKafkaAdminClient(bootstrap_servers=address)
    await admin.start()
    try:
        return [topic for topic in await admin.list_topics() if name in topic]
    finally:
        await admin.close()


async def test_a_check_on_kafka_runs_the_plan_there_and_leaves_nothing(
    folder: Path, kafka_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = digits_file(folder, stages=TWO, kafka={"partitions": 4, "prefix": folder.name[-8:]})
    spec = load(file, {"kafka.bootstrap": kafka_address})
    outcome = await predict(spec, Ask(rate=30.0, seconds=6.0, check=True), folder / "plan")
    assert outcome.measured is not None
    assert outcome.predicted.throughput == pytest.approx(outcome.measured.throughput, rel=0.25)
    assert 0.0 < outcome.measured.p50 <= outcome.measured.p99
    for stage in ("stem", "rest"):
        assert 0.0 < outcome.measured.busy[stage] < 1.0
        assert 1.0 <= outcome.measured.batch[stage] <= spec.batch.max
    assert await _checks(kafka_address, folder.name[-8:]) == []
    print_simulated(outcome, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert {"throughput", "p50", "p99", "busy"} <= set(found["measured"]) & set(found["predicted"])
    assert found["measured"]["host"] is None  # each worker has its event loop
    print_simulated(outcome)
    assert "nan" not in capsys.readouterr().out


async def test_what_the_broker_takes_is_part_of_the_latency(
    folder: Path, kafka_address: str
) -> None:
    spec = load(digits_file(folder), {"kafka.bootstrap": kafka_address})
    ask = Ask(rate=20.0, seconds=4.0)
    here = (await predict(spec, ask, folder / "plan")).predicted
    slow = await predict(
        spec, Ask(rate=20.0, seconds=4.0, what_if=["link.alpha=50ms"]), folder / "plan"
    )
    assert slow.changed is not None
    hops = 5  # to the input, between three stages, to the sink, from the predictions
    assert slow.changed.p50 > hops * 0.045
    assert 0.0 < here.p50 < 0.1


async def test_a_worker_that_ends_is_the_answer(folder: Path, kafka_address: str) -> None:
    spec = load(
        digits_file(folder, kafka={"partitions": 2, "prefix": folder.name[-8:]}),
        {"kafka.bootstrap": kafka_address},
    )
    where, plan = plan_of(spec, folder / "plan", False)
    for weights in where.rglob("*.safetensors"):
        weights.write_bytes(b"none")
    with pytest.raises(StreaminferError, match=r"ended by itself:\n.*safetensors"):
        async with Processes(spec, plan, where).up():
            pass
    assert await _checks(kafka_address, folder.name[-8:]) == []


async def test_a_worker_that_dies_while_it_is_measured_is_the_answer(
    folder: Path, kafka_address: str
) -> None:
    spec = load(digits_file(folder), {"kafka.bootstrap": kafka_address})
    where, plan = plan_of(spec, folder / "plan", False)
    load_it = Scenario((), Arrivals(rate=20.0), partitions=4, seconds=60.0, warm=40.0)
    async with Processes(spec, plan, where).up() as pipeline:
        sink = workers_of(os.getpid())["sink"]
        asyncio.get_running_loop().call_later(1.0, os.kill, sink, signal.SIGKILL)
        async with asyncio.timeout(30):
            with pytest.raises(StreaminferError, match="sink ended 1 times"):
                await measure(pipeline, load_it, inputs_of(spec, plan))
            with pytest.raises(StreaminferError, match="sink ended 1 times"):
                await pipeline.read("streaminfer_stage_samples_total")


async def test_a_check_needs_a_broker_that_answers(folder: Path) -> None:
    file = digits_file(folder)
    with pytest.raises(ConfigError, match="no Kafka address"):
        await predict(load(file), Ask(check=True, bus="kafka"), folder / "plan")
    with pytest.raises(TransportError, match=DEAD):
        await predict(load(file, {"kafka.bootstrap": DEAD}), Ask(check=True), folder / "plan")


async def test_a_prediction_does_not_need_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = load(digits_file(folder), {"kafka.bootstrap": DEAD})
    outcome = await predict(spec, Ask(rate=20.0, seconds=3.0), folder / "plan")
    assert outcome.predicted.p50 > 5 * KAFKA.alpha
    assert "a typical one, not measured" in " ".join(capsys.readouterr().err.split())
