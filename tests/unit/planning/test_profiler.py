"""If these fail, plans rest on times, bytes or memory that are not the model's, or are stale."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest
import torch

from streaminfer.errors import ConfigError
from streaminfer.parallel.capture import capture
from streaminfer.parallel.pipeline import Cutter
from streaminfer.planning import profiler
from streaminfer.planning.profile import Profile
from streaminfer.planning.profiler import Captured, Place, capture_model, places, profile
from streaminfer.planning.subject import subject
from streaminfer.planning.timing import Runner, _Half, _side_by_side, cores
from tests.models import MODELS, make
from tests.unit.planning.profiles import made

MODEL = """
from torch import nn

def build(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(width * 49, 5),
    )
"""
CPU = Place(("cpu",), "some", 1)


@pytest.fixture
def captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Captured:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    return capture_model(subject("model.py:build", "{}", "3x16x16").spec)


@pytest.mark.parametrize("name", MODELS)
def test_nodes_run_one_by_one_give_what_the_model_gives(name: str) -> None:
    model, rows = make(name), MODELS[name].rows(3)
    with torch.inference_mode():
        whole = model(rows)
    first = whole["tags"] if isinstance(whole, dict) else whole
    found, *_ = Runner(Cutter(capture(model, (rows,))), torch.device("cpu")).run([rows])
    torch.testing.assert_close(found, first)  # fused attention is near only


def test_the_figures_are_the_models(captured: Captured) -> None:
    found = profile(captured, [CPU], batches=(1, 2), cached=False)
    (device,) = found.devices
    assert [t.batch for t in device.timings] == [1, 2]
    assert all(sum(t.seconds) == pytest.approx(t.whole) for t in device.timings)
    assert found.weight_bytes == sum(t.nbytes for t in captured.graph.tensors.values())
    assert [cut.layer for cut in found.cuts] == ["0", "1", "2", "3", "4"]
    assert found.cuts[0].row_bytes == 8 * 16 * 16 * 4
    assert (found.input_bytes, found.output_bytes) == (3 * 16 * 16 * 4, 5 * 4)
    assert found.nodes[0].peak_bytes == (3 + 8) * 16 * 16 * 4  # the input and the first output
    assert found.encoding(found.cuts[0].position, "float16", "none").ratio == 0.5


def test_it_is_measured_once(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "BUSY", float("inf"))
    said: list[str] = []
    first = profile(captured, [CPU], batches=(1,), say=lambda what, *_: said.append(what))
    assert said
    said.clear()
    assert profile(captured, [CPU], batches=(1,), say=lambda what, *_: said.append(what)) == first
    assert not said
    other = Place(("cpu",), "some", 2)  # another number of threads is another profile
    profile(captured, [other], batches=(1,), say=lambda what, *_: said.append(what))
    assert said


def test_a_batch_that_is_missing_is_added_to_what_was_kept(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `plan --batch 8` cannot be asked of a model that is slow, or all is measured again."""
    monkeypatch.setattr(profiler, "BUSY", float("inf"))
    monkeypatch.setattr(profiler, "LONGEST", 0.0)
    first = profile(captured, [CPU], batches=(1, 2, 4))
    assert first.batches() == (1,)
    said: list[str] = []
    more = profile(captured, [CPU], batches=(1, 2, 4), also=(4,), say=lambda w, *_: said.append(w))
    assert said == ["cpu batch 4"]
    assert more.batches() == (1, 4)
    assert more.devices[0].timing(1) == first.devices[0].timing(1)
    said.clear()
    again = profile(captured, [CPU], batches=(1, 2, 4), also=(4,), say=lambda w, *_: said.append(w))
    assert (again, said) == (more, [])


def test_another_model_is_measured_anew(captured: Captured) -> None:
    same = capture_model(captured.spec)
    assert same.key == captured.key
    Path("model.py").write_text(MODEL.replace("width=8", "width=9"))
    assert capture_model(captured.spec).key != captured.key


def test_a_busy_machine_is_said_and_not_kept(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "BUSY", -1.0)
    warned: list[str] = []
    profile(captured, [CPU], batches=(1,), warn=warned.append)
    assert "busy" in warned[0]
    assert not list(Path().glob(".streaminfer/profiles/*"))


def test_devices_that_do_not_exist_are_named() -> None:
    with pytest.raises(ConfigError, match="no device 'cuda:93' on this machine; it has: cpu"):
        places(["cpu", "cuda:93"])


def test_cpu_workers_share_the_cores() -> None:
    (one,) = places(["cpu"])
    assert (one.names, one.threads) == (("cpu",), cores())
    if cores() > 1:
        (two,) = places(["cpu", "cpu"])
        assert (two.names, two.threads) == (("cpu", "cpu"), cores() // 2)
    (many,) = places(["cpu"] * (2 * cores()))
    assert many.threads == 1


def test_a_profile_of_an_older_version_is_measured_again(tmp_path: Path) -> None:
    """Else plans rest on figures that lack what is foreseen by now."""
    found = made([1, 2], single=2.0, beside=1.5)
    file = tmp_path / "kept.json"
    found.save(file)
    assert Profile.load(file) == found
    older = json.loads(file.read_text()) | {"version": found.version - 1}
    file.write_text(json.dumps(older))
    assert Profile.load(file) is None


def test_cold_calls_and_calls_beside_others_are_profiled(captured: Captured) -> None:
    """Else `plan` promises the latency of a device that is never idle and never shares."""
    found = profile(captured, [CPU], batches=(1, 2), cached=False)
    for one in found.devices[0].timings:
        assert len(one.single) >= 1
        assert all(len(nodes) == len(found.nodes) for nodes in one.single)
        assert min(map(sum, one.single)) > 0
        assert len(one.beside) == (len(found.nodes) if cores() > 1 else 0)
        assert min(one.beside, default=0.0) >= 0.0
        if one.beside:  # both halves were timed, and together they are the model
            assert all(bool(a) == bool(b) for a, b in zip(one.beside, one.seconds, strict=True))
        part = one.span(1, 2)
        assert part.seconds == one.seconds[1:3]
        assert part.single == tuple(nodes[1:3] for nodes in one.single)


def test_two_halves_of_a_model_are_the_model(captured: Captured) -> None:
    whole = Runner(captured.cutter, torch.device("cpu"))
    halves = whole.halves([1.0] * (len(whole.nodes) - 1) + [float(len(whole.nodes))])
    assert halves is not None
    rows = torch.randn(2, 3, 16, 16)
    first, second = halves
    between = first.run([rows])
    assert len(between) == 1
    assert torch.equal(second.run(between)[0], whole.run([rows])[0])
    seen: dict[Runner, list[int]] = {first: [], second: []}
    first.run([rows], watch=lambda at, _: seen[first].append(at))
    second.run(between, watch=lambda at, _: seen[second].append(at))
    assert seen[second][0] == seen[first][-1] + 1  # each times its own nodes of the model
    assert len(seen[second]) == 1  # the last one takes as long as all the others
    assert [*seen[first], *seen[second]] == list(range(len(whole.nodes)))


def test_a_half_is_looked_at_however_soon_the_other_has_ended() -> None:
    """Else its nodes take no time, and a plan gives one stage nearly all of the model."""
    looks = [0, 0]

    class Quick(_Half):
        def __init__(self, index: int) -> None:
            self.index, self.ended = index, False

        def warm(self) -> None:
            pass

        def measure(self, other: _Half) -> None:
            pass

        def look(self) -> None:
            looks[self.index] += 1

    for _ in range(2000):
        _side_by_side((Quick(0), Quick(1)), (set(), set()), 1)
    assert looks == [2000, 2000]


@pytest.mark.skipif(cores() < 2, reason="needs two cores")
@pytest.mark.parametrize("broken", [0, 1])
def test_a_half_that_fails_ends_both(
    captured: Captured, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """Else the other one computes for ever."""
    halve = Runner.halves

    def halves(self: Runner, seconds: Sequence[float]) -> tuple[Runner, Runner] | None:
        found = halve(self, seconds)
        assert found is not None
        program, calls = found[broken].program, count()

        class Failing:
            stepped = program.stepped

            def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
                if next(calls) < 5:
                    return program(*inputs)
                raise RuntimeError("no memory for this one")

        monkeypatch.setattr(found[broken], "program", Failing())
        return found

    monkeypatch.setattr(Runner, "halves", halves)
    with pytest.raises(RuntimeError, match="no memory for this one"):
        profile(captured, [CPU], batches=(1,), cached=False)
