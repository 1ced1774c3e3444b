"""If these fail, a plan with a split is not the best one, and nobody would notice."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise, product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streaminfer.planning.predict import How
from streaminfer.planning.splitting.cheapest import Leg, Option, cheapest, groups


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Option], tuple[int, ...], int]:
    """Up to 5 cuts, up to 4 devices of up to 2 kinds, whole and split, some stages impossible."""
    size = draw(st.integers(2, 5))
    counts = draw(st.sampled_from([(1,), (2,), (3,), (1, 1), (2, 1)]))
    number = st.one_of(st.integers(1, 50).map(float), st.just(float("inf")))
    options = []
    for group in groups(counts):
        for how in (None, How(sum(group))) if sum(group) > 1 else (None,):
            period, latency = (np.full((size, size), np.inf) for _ in range(2))
            for a, b in combinations(range(size), 2):
                period[a, b] = draw(number)
                latency[a, b] = period[a, b] * draw(st.sampled_from([1.0, 1.5]))
            options.append(Option(group, how, period, latency))
    return options, counts, size


def ways(
    options: list[Option], counts: tuple[int, ...], size: int, stages: int | None
) -> Iterator[tuple[Leg, ...]]:
    for k in range(size - 1):
        for cuts in combinations(range(1, size - 1), k):
            spans = list(pairwise([0, *cuts, size - 1]))
            if stages not in (None, len(spans)):
                continue
            for chosen in product(options, repeat=len(spans)):
                used = [sum(o.group[i] for o in chosen) for i in range(len(counts))]
                if all(u <= n for u, n in zip(used, counts, strict=True)):
                    yield tuple(Leg(*s, o) for s, o in zip(spans, chosen, strict=True))


def period(way: tuple[Leg, ...]) -> float:
    return max((float(leg.option.period[leg.a, leg.b]) for leg in way), default=float("inf"))


def latency(way: tuple[Leg, ...]) -> float:
    return sum(float(leg.option.latency[leg.a, leg.b]) for leg in way)


def devices(way: tuple[Leg, ...]) -> int:
    return sum(sum(leg.option.group) for leg in way)


@given(chains(), st.sampled_from([None, 1, 2]))
def test_the_least_bottleneck_of_all_ways(
    chain: tuple[list[Option], tuple[int, ...], int], stages: int | None
) -> None:
    every = list(ways(*chain, stages))
    found = cheapest(*chain, stages)
    least = min((period(way) for way in every), default=float("inf"))
    assert period(found) == least
    assert stages in (None, len(found)) or not found


@given(chains(), st.sampled_from([10.0, 30.0, float("inf")]))
def test_the_least_latency_within_a_bound(
    chain: tuple[list[Option], tuple[int, ...], int], bound: float
) -> None:
    every = [way for way in ways(*chain, None) if period(way) <= bound and period(way) < np.inf]
    found = cheapest(*chain, bound=bound)
    assert bool(found) == bool(every)
    if found:
        assert period(found) <= bound
        assert latency(found) == min(map(latency, every))
        few = cheapest(*chain, bound=bound, frugal=True)
        assert (devices(few), latency(few)) == min((devices(w), latency(w)) for w in every)
