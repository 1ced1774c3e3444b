"""Chains of nodes and devices to partition, and the partitioner's answer by trying everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, product

import numpy as np
from hypothesis import strategies as st

from streaminfer.planning.partitioner import Kind, Problem

__all__ = ["best_by_trial", "chain", "problems"]


def chain(
    seconds: Sequence[float],
    kinds: Sequence[Kind] | None = None,
    crossing: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    ties: tuple[tuple[int, int, int], ...] = (),
) -> Problem:
    """Make a chain that may be cut behind every node. `crossing`: seconds on each side of a cut."""
    n = len(seconds)
    times = np.array([0.0, *(crossing or [0.0] * (n - 1)), 0.0])
    return Problem(
        kinds=tuple(kinds or [Kind(2, np.array(seconds, float))]),
        ends=np.array([-1, *range(n - 1), n - 1]),
        receive=times,
        send=times,
        held=np.zeros(n + 1),
        weights=np.array(weights or [0.0] * n, float),
        peaks=np.zeros(n),
        ties=ties,
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Chains of up to 7 nodes on up to 4 devices of up to 2 kinds, some short of memory."""
    n = draw(st.integers(2, 7))
    number = st.floats(0.01, 10.0)
    several = st.lists(number, min_size=n, max_size=n)
    counts = draw(st.sampled_from([(1,), (2,), (3,), (1, 1), (2, 1), (1, 2)]))
    sizes = st.integers(1, 1000).map(float)  # bytes are whole: sums of them are exact
    weights = draw(st.lists(sizes, min_size=n, max_size=n))
    caps = st.sampled_from([float("inf"), 2 * sum(weights), 0.7 * sum(weights), max(weights)])
    kinds = [
        Kind(count, np.array(draw(several)), draw(caps), draw(st.sampled_from([0.0, 0.5])))
        for count in counts
    ]
    tie = draw(st.sampled_from([(), ((0, n - 1, 1),)]))
    crossing = draw(st.lists(st.floats(0, 3), min_size=n - 1, max_size=n - 1))
    return chain([0.0] * n, kinds, crossing, weights, tie)


def best_by_trial(problem: Problem, stages: int) -> float:
    """Return the least bottleneck over all cuts into so many stages and all ways to place them."""
    counts = [kind.count for kind in problem.kinds]
    groups = [g for g in product(*(range(n + 1) for n in counts)) if any(g)]
    best = float("inf")
    for cuts in combinations(range(1, problem.size - 1), stages - 1):
        parts = list(pairwise([0, *cuts, problem.size - 1]))
        for chosen in product(groups, repeat=stages):
            used = [sum(group[k] for group in chosen) for k in range(len(counts))]
            if all(u <= n for u, n in zip(used, counts, strict=True)):
                worst = max(
                    _seconds(problem, first, last, group)
                    for (first, last), group in zip(parts, chosen, strict=True)
                )
                best = min(best, worst)
    return best


def _seconds(problem: Problem, first: int, last: int, group: Sequence[int]) -> float:
    rates = list(_rates(problem, first, last, group))
    return float("inf") if 0.0 in rates else 1 / sum(rates)


def _rates(problem: Problem, first: int, last: int, group: Sequence[int]) -> Iterator[float]:
    nodes = slice(int(problem.ends[first]) + 1, int(problem.ends[last]) + 1)
    need = problem.weights[nodes].sum() + problem.held[first] + problem.held[last]
    need += problem.peaks[nodes].max()
    for a, b, nbytes in problem.ties:
        need += nbytes * (a < nodes.start <= b < nodes.stop)
    for kind, count in zip(problem.kinds, group, strict=True):
        if count:
            seconds = kind.seconds[nodes].sum() + kind.fixed
            seconds += problem.receive[first] + problem.send[last]
            yield count / seconds if need <= kind.memory else 0.0
