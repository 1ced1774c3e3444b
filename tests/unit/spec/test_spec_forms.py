"""A form that cannot be is refused before a model is touched: the key to blame, and what works."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.spec.test_spec_models import declare, problems

A, C = {"name": "a", "until": "l1"}, {"name": "c"}
MODEL = {"factory": "toy.py:build", "example": [3, 8, 8]}
TWO = [{"name": "x", "model": MODEL}, {"name": "y", "model": MODEL}]
STAGED = {"stages": [{"name": "p", "until": "l1"}, {"name": "q"}]}
EXIT = {"factory": "toy.py:head"}


def ensemble(**stage: Any) -> list[Any]:
    return [{"name": "e", "branches": TWO, **stage}]


def split(**given: Any) -> list[Any]:
    return [{**A, "split": given}, C]


SPLIT = ("stages", 0, "split")

RULES: dict[str, tuple[dict[str, Any], tuple[Any, ...], str, str]] = {
    # a split
    "channels without parts": (
        {"stages": split(by="channels")}, (*SPLIT, "parts"), "missing", "parts: 2",
    ),
    "tiles without a grid": (
        {"stages": split(by="tiles")}, (*SPLIT, "grid"), "missing", "grid: [2, 2]",
    ),
    "channels with a grid": (
        {"stages": split(by="channels", parts=2, grid=[2, 2])},
        (*SPLIT, "grid"), "is not for by: channels", "parts says how many",
    ),
    "tiles with parts": (
        {"stages": split(by="tiles", parts=2, grid=[2, 2])},
        (*SPLIT, "parts"), "is not for by: tiles", "grid says how many",
    ),
    "channels that are reduced": (
        {"stages": split(by="channels", parts=2, reduce="mean")},
        (*SPLIT, "reduce"), "always exact", "drop it",
    ),
    "tiles with a form": (
        {"stages": split(by="tiles", grid=[2, 2], form="in")},
        (*SPLIT, "form"), "by: channels", "drop it",
    ),
    "one tile": (
        {"stages": split(by="tiles", grid=[1, 1])}, (*SPLIT, "grid"), "1 x 1", "2 to 64",
    ),
    "too many tiles": (
        {"stages": split(by="tiles", grid=[9, 8])}, (*SPLIT, "grid"), "9 x 8", "2 to 64",
    ),
    "a split stage with an exit": (
        {"stages": [{**A, "split": {"by": "channels", "parts": 2}, "exit": EXIT}, C]},
        ("stages", 0, "exit"), "no exit", "stage before",
    ),
    "a split stage with an exit, in a branch": (
        {"stages": ensemble(branches=[
            {**TWO[0], "stages": [{"name": "p", "until": "l1", "exit": EXIT,
                                   "split": {"by": "channels", "parts": 2}}, {"name": "q"}]},
            TWO[1]]), "model": None},
        ("stages", 0, "branches", 0, "stages", 0, "exit"), "no exit", "stage before",
    ),
    # branches
    "branches before the end": (
        {"stages": [*ensemble(), C]}, ("stages", 0, "branches"), "last stage", "move it",
    ),
    "one branch": (
        {"stages": ensemble(branches=TWO[:1]), "model": None},
        ("stages", 0, "branches"), "no ensemble", "two or more",
    ),
    "two branches of one name": (
        {"stages": ensemble(branches=[TWO[0], TWO[0]]), "model": None},
        ("stages", 0, "branches"), "called 'x'", "",
    ),
    "branches and layers": (
        {"stages": ensemble(until="l1"), "model": None},
        ("stages", 0, "until"), "no layers", "drop until",
    ),
    "branches and a split": (
        {"stages": ensemble(split={"by": "channels", "parts": 2}), "model": None},
        ("stages", 0, "split"), "no layers", "drop split",
    ),
    "branches and an exit": (
        {"stages": ensemble(exit=EXIT), "model": None},
        ("stages", 0, "exit"), "no layers", "drop exit",
    ),
    "a quorum larger than the branches": (
        {"stages": ensemble(quorum=3), "model": None},
        ("stages", 0, "quorum"), "3 of 2 branches", "at most 2",
    ),
    "a quorum for a module of the user": (
        {"stages": ensemble(quorum=1, fuse="own.py:Fuse"), "model": None},
        ("stages", 0, "quorum"), "outputs of all", "leave quorum out",
    ),
    "a quorum without branches": (
        {"stages": [{**A, "quorum": 1}, C]}, ("stages", 0, "quorum"), "branches", "drop it",
    ),
    "a way to fuse without branches": (
        {"stages": [{**A, "fuse": "max"}, C]}, ("stages", 0, "fuse"), "branches", "drop it",
    ),
    "stages without a model": ({"model": None}, ("model",), "missing", "whose layers"),
    "two stages of one name in a branch": (
        {"stages": ensemble(branches=[
            {**TWO[0], "stages": [{"name": "p", "until": "l1"}, {"name": "p"}]}, TWO[1]]),
         "model": None},
        ("stages", 0, "branches", 0, "stages", 1, "name"), "called 'p'", "",
    ),
    # devices
    "a device too few for the parts": (
        {"stages": [{**A, "split": {"by": "channels", "parts": 3}, "device": ["cpu", "cpu"]}, C]},
        ("stages", 0, "device"), "2 in the list for 3 part(s) of 'a'", "one device for all",
    ),
    "a device for each replica of a split stage": (
        {"stages": [{**A, "split": {"by": "tiles", "grid": [2, 2]}, "replicas": 2,
                     "device": ["cpu", "cpu"]}, C]},
        ("stages", 0, "device"), "2 in the list for 4 part(s) of 'a'", "list 4",
    ),
    "a device too many in a branch": (
        {"stages": ensemble(branches=[{**TWO[0], "device": ["cpu", "cpu"]}, TWO[1]]),
         "model": None},
        ("stages", 0, "branches", 0, "device"), "2 in the list for 1 replica(s)", "replicas: 2",
    ),
    "a share too many in a branch's stage": (
        {"stages": ensemble(branches=[
            {**TWO[0], "stages": [{"name": "p", "until": "l1", "shares": [1, 2]}, {"name": "q"}]},
            TWO[1]]), "model": None},
        ("stages", 0, "branches", 0, "stages", 0, "shares"), "2 in the list for 1", "replicas: 2",
    ),
    # local edges
    "replicas of which only one is local": (
        {"stages": [A, {**C, "replicas": 2}], "edges": {"c": {"transport": "local"}}},
        ("stages", 1, "replicas"), "2, but 'a' in the same worker has 1", "same number",
    ),
    "kafka within local branches": (
        {"stages": ensemble(branches=[{**TWO[0], **STAGED}, TWO[1]]), "model": None,
         "edges": {"default": {"transport": "local"}, "e.x.q": {"transport": "kafka"}}},
        ("edges", "e.x.q"), "share a worker", "kafka into the branches",
    ),
    "an edge into one branch": (
        {"stages": ensemble(), "model": None, "edges": {"e.x": {"dtype": "float16"}}},
        ("edges", "e.x"), "no stage is called 'e.x'", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_a_form_that_cannot_be_is_refused(name: str) -> None:
    changes, path, words, remedy = RULES[name]
    (problem,) = problems(**changes)
    assert problem.path == path
    assert words in problem.message
    assert remedy in problem.hint


def test_what_stands_beside_the_refused_is_fine() -> None:
    """The nearest thing that works, as the hints say."""
    declare(stages=split(by="channels", parts=2, form="in"))
    declare(stages=split(by="tiles", grid=[8, 8], reduce="exact"))
    declare(stages=ensemble(quorum=2), model=None)
    declare(stages=ensemble(quorum=2, fuse="own.py:Fuse"), model=None)
    declare(stages=[{"name": "a"}, *ensemble()])
    declare(
        stages=[{**A, "split": {"by": "channels", "parts": 2}, "replicas": 3,
                 "device": ["cpu", "cuda"]}, C]
    )  # fmt: skip
    declare(
        stages=[{**A, "replicas": 2}, {**C, "replicas": 2}], edges={"c": {"transport": "local"}}
    )
