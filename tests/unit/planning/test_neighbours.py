"""If these fail, a stage is timed beside another than the one that will take its caches."""

from __future__ import annotations

from typing import Any

from streaminfer.commands.timing import _Load, _neighbour


def load(each: float, device: str = "cpu") -> _Load:
    some: Any = None
    return _Load(some, device, some, each)


def test_a_stage_is_timed_beside_the_slowest_of_the_others() -> None:
    loads = {"stem": load(0.1), "trunk": load(0.3), "head": load(0.2)}
    assert _neighbour("stem", loads) is loads["trunk"]
    assert _neighbour("trunk", loads) is loads["head"]


def test_a_gpu_takes_no_cache_and_who_is_alone_has_itself() -> None:
    loads = {"stem": load(0.1), "trunk": load(0.3, "cuda:0"), "head": load(0.2)}
    assert _neighbour("stem", loads) is loads["head"]
    alone = {"all": load(0.1), "far": load(0.3, "cuda:0")}
    assert _neighbour("all", alone) is alone["all"]
