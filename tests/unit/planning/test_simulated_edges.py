"""What travels decides what a link can carry: forgetting a codec buys a faster one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streaminfer.commands.cells import cells
from streaminfer.commands.plans import plan_of
from streaminfer.commands.timing import _cut, _ratio, time_stages
from streaminfer.errors import ConfigError
from streaminfer.planning.profile import Encoding
from streaminfer.planning.simulation.encoded import encoded
from streaminfer.planning.simulation.scenario import Arrivals, Link, Scenario, SimStage, StageTimes
from streaminfer.planning.simulation.simulator import simulate
from streaminfer.planning.simulation.whatif import what_if
from streaminfer.wire import Envelope, Sample, Tensor, compress
from tests import virtual
from tests.unit.planning.profiles import made
from tests.unit.planning.test_simulated_forms import HEAD, STEM, form

MB = 1_000_000
LINK = Link(beta=1 / 100e6)  # 100 MB/s


def profile() -> Any:
    found = made([1.0, 1.0, 1.0], row_bytes=[MB, MB // 2])
    rows = [("native", "none", 1.0, 0.0, 0.0), ("float16", "none", 0.5, 1e-10, 1e-10),
            ("int8", "zstd", 0.125, 30e-9, 10e-9)]  # fmt: skip
    measured = [
        Encoding(position=0, dtype=d, codec=c, ratio=r, encode=e, decode=x)  # type: ignore[arg-type]
        for d, c, r, e, x in rows
    ]
    return found.model_copy(update={"encodings": tuple(measured)})


def scenario() -> Scenario:
    a = SimStage("a", {1: 0.001}, batch_max=1, batch_wait=0.0, bytes_out=MB)
    b = SimStage(
        "b", {1: 0.001}, batch_max=1, batch_wait=0.0, reads=("a",), bytes_in=(MB,),
        encodings=encoded(profile(), "a"),
    )  # fmt: skip
    return Scenario([a, b], Arrivals(window=64), link=LINK, partitions=1, seconds=10.0, warm=2.0)


def test_half_the_bytes_are_twice_the_throughput_where_the_link_is_the_limit() -> None:
    plain = simulate(scenario())
    assert plain.throughput == pytest.approx(100.0, rel=0.03)
    half = simulate(what_if(scenario(), ["b.edge=float16"]))
    assert half.throughput == pytest.approx(2 * plain.throughput, rel=0.03)
    assert half.queues["b"].nbytes_max <= plain.queues["b"].nbytes_max


def test_a_codec_costs_the_devices_of_both_ends() -> None:
    packed = what_if(scenario(), ["b.edge=int8+zstd"])
    a, b = packed.stages
    assert a.seconds == {1: pytest.approx(0.001 + 0.030)}
    assert b.seconds == {1: pytest.approx(0.001 + 0.010)}
    # an eighth of the bytes, and yet a third of the throughput: it computes 31 ms a sample
    assert simulate(packed).throughput == pytest.approx(1 / 0.031, rel=0.03)
    back = what_if(packed, ["b.edge=native"])
    assert back.stages[0].seconds == {1: pytest.approx(0.001)}
    assert back.stages[0].bytes_out == pytest.approx(MB)
    assert back.stages[1].bytes_in is not None
    assert sum(back.stages[1].bytes_in) == pytest.approx(MB)


@pytest.mark.parametrize(
    ("change", "words"),
    [("b.edge=int4", "float16, int8\\+zstd"), ("a.edge=int8", "no number"), ("b.edg=int8", "edge")],
)
def test_an_edge_that_cannot_be_is_refused(change: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        what_if(scenario(), [change])


def test_without_a_profile_the_remedy_is_named() -> None:
    known = scenario()
    blind = replace(known, stages=[replace(s, encodings={}) for s in known.stages])
    with pytest.raises(ConfigError, match="streaminfer profile PIPELINE"):
        what_if(blind, ["b.edge=float16"])


def envelope(codec: Any = None) -> Envelope:
    raw = np.zeros((4, 1000), "<f4")
    tensor = Tensor("F32", raw.shape, memoryview(raw.tobytes()))
    samples = tuple(Sample(k, k, str(k), None, 0) for k in range(4))
    return Envelope(
        0, samples, "0" * 64, "trial", tensors={"x": compress(tensor, codec) if codec else tensor}
    )


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_part_of_a_compressed_batch_is_timed_compressed(codec: Any) -> None:
    whole = envelope(codec)
    assert _ratio(envelope()) == 1.0
    assert _ratio(whole) < 0.1
    part = _cut(whole, 2)
    assert len(part.samples) == 2
    assert part.tensors["x"].codec == codec


def test_the_codec_of_a_plan_is_in_its_bytes(tmp_path: Path) -> None:
    sizes: dict[str, float] = {}
    for codec in ("none", "zstd"):
        folder = tmp_path / codec
        folder.mkdir()
        spec = form(folder, stages=[STEM, HEAD], edges={"head": {"compress": codec}})
        where, plan = plan_of(spec, folder / "plan", False)
        times = virtual.run(time_stages(spec, plan, where, batches=(1, 8)))
        stem, head = cells(spec, plan, times)
        assert head.bytes_in is not None
        assert sum(head.bytes_in) == pytest.approx(stem.bytes_out)
        assert head.edge == ("native" if codec == "none" else codec)
        sizes[codec] = stem.bytes_out
    assert sizes["none"] == 768 * 4
    assert 0.1 * sizes["none"] < sizes["zstd"] < 0.9 * sizes["none"]  # half of it is ReLU's zeros


def test_a_plan_knows_its_quorum_and_what_its_profile_knows_of_its_edges(tmp_path: Path) -> None:
    from tests.unit.planning.test_simulated_forms import FORMS

    fan = FORMS["ensemble"]["stages"][0]
    spec = form(tmp_path, stages=[{**fan, "quorum": 1, "deadline": "70ms"}])
    _, plan = plan_of(spec, tmp_path / "plan", False)
    found = {
        cell.name: cell
        for cell in cells(spec, plan, {s.name: StageTimes({1: 1.0}) for s in plan.stages})
    }
    gather = next(cell for name, cell in found.items() if name.endswith("gather"))
    assert (gather.quorum, gather.deadline) == (1, 0.07)
    assert {cell.quorum for cell in found.values() if cell is not gather} == {None}
    assert not any(cell.encodings for cell in found.values())
