"""If these fail, the planner answers with a slower plan than there is, or one that does not fit."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from streaminfer.planning.partitioner import Kind, Problem, least_memory, solve
from tests.unit.planning.problems import best_by_trial, chain, problems


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_nothing_is_better_than_what_it_finds(problem: Problem) -> None:
    most = sum(kind.count for kind in problem.kinds)
    tried = {k: best_by_trial(problem, k) for k in range(1, min(3, most, problem.size - 1) + 1)}
    for stages, best in tried.items():
        found = solve(problem, stages=stages, slack=1.0)
        assert (found.bottleneck if found else math.inf) == pytest.approx(best)
        assert found is None or len(found.stages) == stages
    best = min(tried.values())
    free = solve(problem, slack=1.0)
    assert (free.bottleneck if free else math.inf) <= best * (1 + 1e-9)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_what_it_finds_is_a_plan(problem: Problem) -> None:
    found = solve(problem)
    if found is None:
        return
    assert found.stages[0].first == 0
    assert found.stages[-1].last == problem.size - 1
    for a, b in zip(found.stages, found.stages[1:], strict=False):
        assert a.last == b.first
    for k, kind in enumerate(problem.kinds):
        assert sum(stage.group[k] for stage in found.stages) <= kind.count
        for stage in found.stages:
            if stage.group[k]:
                assert problem.memory[stage.first, stage.last] <= kind.memory


def test_a_model_that_fits_is_replicated_not_cut() -> None:
    found = solve(chain([1, 2, 3, 4], crossing=[0.1, 0.1, 0.1]))
    assert found is not None
    assert [(s.first, s.last, s.group) for s in found.stages] == [(0, 4, (2,))]
    assert found.bottleneck == pytest.approx(5)


def test_too_little_memory_for_the_whole_cuts_it() -> None:
    problem = chain(
        [1, 2, 3, 4], [Kind(2, np.array([1.0, 2, 3, 4]), memory=7)], weights=[1, 2, 3, 4]
    )
    found = solve(problem)
    assert found is not None
    assert [(s.first, s.last) for s in found.stages] == [(0, 3), (3, 4)]


def test_a_fast_and_a_slow_device_share_one_stage() -> None:
    fast, slow = Kind(1, np.ones(4)), Kind(1, 4 * np.ones(4))
    found = solve(chain([0, 0, 0, 0], [fast, slow], crossing=[2, 2, 2]))
    assert found is not None
    assert [s.group for s in found.stages] == [(1, 1)]
    assert found.bottleneck == pytest.approx(1 / (1 / 4 + 1 / 16))


def test_of_plans_as_good_the_one_that_sends_less_is_taken() -> None:
    problem = chain([5, 0.01, 5], crossing=[1.0, 0.9])
    found = solve(problem, stages=2)
    assert found is not None
    assert found.stages[0].last == 2  # 5.91 against 6.0 seconds, and fewer of them in between


def test_a_tied_weight_is_counted_in_every_stage_that_reads_it() -> None:
    problem = chain([1, 1, 1], weights=[10, 1, 1], ties=((0, 2, 10),))
    assert problem.memory[0, 3] == 12  # one stage keeps it once
    assert problem.memory[1, 3] == 12  # the second stage of two needs its own
    assert problem.memory[1, 2] == 1


def test_says_how_much_more_memory_would_do() -> None:
    problem = chain([1, 1, 1], [Kind(2, np.ones(3), memory=5)], weights=[2, 20, 3])
    assert solve(problem) is None
    factor, first, last = least_memory(problem, 2)
    assert factor == pytest.approx(22 / 5)
    assert first <= 1 < last


@pytest.mark.parametrize("counts", [(8,), (4, 4), (2, 2, 2, 2)])
def test_a_bound_from_few_cuts_changes_nothing(counts: tuple[int, ...]) -> None:
    random = np.random.default_rng(len(counts))
    base = random.random(150) ** 3
    kinds = tuple(
        Kind(n, base * (0.3 + random.random()) * (0.8 + 0.4 * random.random(150))) for n in counts
    )
    crossing = (random.random(149) * 0.1).tolist()
    problem = chain([0.0] * 150, kinds, crossing)
    for stages in (2, 3):
        found = solve(problem, stages=stages, slack=1.0)
        assert found is not None
        assert _reachable(problem, stages, found.bottleneck * (1 + 1e-6))
        assert not _reachable(problem, stages, found.bottleneck * (1 - 1e-6)), (
            "there is a better one"
        )


def _reachable(problem: Problem, stages: int, bound: float) -> bool:
    """Say whether some cuts into so many stages, placed somehow, are all within a bound."""
    seconds = [problem.segments(kind) for kind in problem.kinds]
    counts = [kind.count for kind in problem.kinds]
    groups = [g for g in np.ndindex(*(n + 1 for n in counts)) if any(g)]
    reach = {(0,) * len(counts): {0}}
    for _ in range(stages):
        after: dict[tuple[int, ...], set[int]] = {}
        for used, cuts in reach.items():
            for group in groups:
                total = tuple(a + b for a, b in zip(used, group, strict=True))
                if any(t > n for t, n in zip(total, counts, strict=True)):
                    continue
                rows = sorted(cuts)
                rate = sum(q / s[rows] for q, s in zip(group, seconds, strict=True) if q)
                with np.errstate(divide="ignore"):
                    ends = np.nonzero((1 / np.asarray(rate) <= bound).any(axis=0))[0]
                after.setdefault(total, set()).update(ends.tolist())
        reach = after
    return any(problem.size - 1 in cuts for cuts in reach.values())


def test_eight_kinds_of_device_are_planned_for_in_seconds() -> None:
    random = np.random.default_rng(0)
    base = random.random(500) ** 3
    kinds = tuple(Kind(1, base * (0.3 + random.random())) for _ in range(8))
    problem = chain([0.0] * 500, kinds, (random.random(499) * 0.1).tolist())
    began = time.process_time()
    assert solve(problem) is not None
    assert time.process_time() - began < 20  # about 4; the benchmark has the bound
