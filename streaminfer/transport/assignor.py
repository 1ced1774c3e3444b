"""Who of a group reads which partitions: shares by weight, few moves, equal topics alike. Pure.

    weights 2 : 1, six partitions          b joins                    a leaves
    a  0 1 2 3 4 5                 ──▶     a  0 1 2 3        ──▶
                                           b          4 5            b  0 1 2 3 4 5

Topics with the same partition count and the same subscribers move as one: whoever reads partition
3 of one of them reads partition 3 of all of them, so what was keyed alike meets in one worker.
Every member that is given the same arguments computes the same answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from math import floor, isfinite
from typing import NamedTuple

from streaminfer.transport.base import TopicPartition

__all__ = ["Member", "assign"]


class Member(NamedTuple):
    """One member of a group as it asks to join.

    `weight` is relative: 2 asks for twice the partitions of 1; 0 asks for none (unless all do).
    `owned` is what it read until now, and would rather keep.
    """

    weight: float
    topics: Collection[str]
    owned: Collection[TopicPartition] = ()


class _Bundle(NamedTuple):
    """Topics that move as one, by partition number."""

    members: Sequence[str]
    partitions: int
    topics: Sequence[str]


def assign(
    members: Mapping[str, Member], partitions: Mapping[str, int]
) -> dict[str, list[TopicPartition]]:
    """Give every partition of every subscribed topic to exactly one subscriber.

    Args:
        members: by member id. An unusable weight (negative, infinite, no number) counts as 0.
        partitions: partition count by topic; a subscribed topic that is missing here is left out.

    Returns:
        For every member its partitions, sorted; possibly none.
    """
    weights = {name: _weight(member.weight) for name, member in members.items()}
    given: dict[str, list[TopicPartition]] = {name: [] for name in members}
    owed: dict[str, Fraction] = defaultdict(Fraction)  # what rounding kept from each so far
    for bundle in _bundles(members, partitions):
        claims = _claims(bundle, members)
        quotas = _quotas(bundle, weights, owed, claims)
        for name, numbers in _fill(bundle.partitions, quotas, claims).items():
            given[name] += [TopicPartition(t, p) for t in bundle.topics for p in numbers]
    return {name: sorted(tps) for name, tps in given.items()}


def _weight(weight: float) -> Fraction:
    return Fraction(weight) if isfinite(weight) and weight > 0 else Fraction(0)


def _bundles(members: Mapping[str, Member], partitions: Mapping[str, int]) -> list[_Bundle]:
    topics: dict[tuple[int, tuple[str, ...]], list[str]] = defaultdict(list)
    for topic in sorted(partitions):
        readers = tuple(sorted(name for name, member in members.items() if topic in member.topics))
        if readers:
            topics[partitions[topic], readers].append(topic)
    return [_Bundle(readers, count, names) for (count, readers), names in sorted(topics.items())]


def _claims(bundle: _Bundle, members: Mapping[str, Member]) -> dict[str, list[int]]:
    """Return what each member owns of the bundle; of two claimants the one with more topics."""
    topics = set(bundle.topics)
    votes: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name in bundle.members:
        for tp in set(members[name].owned):
            if tp.topic in topics and 0 <= tp.partition < bundle.partitions:
                votes[tp.partition][name] += 1
    claims: dict[str, list[int]] = {name: [] for name in bundle.members}
    for number, counts in sorted(votes.items()):
        claims[min(counts, key=lambda name: (-counts[name], name))].append(number)
    return claims


def _quotas(
    bundle: _Bundle,
    weights: Mapping[str, Fraction],
    owed: dict[str, Fraction],
    claims: Mapping[str, list[int]],
) -> dict[str, int]:
    """Divide the partition numbers by largest remainder.

    Of equal remainders the member wins that owns more: it moves less. `owed` (changed here)
    carries what one bundle's rounding kept from a member into the next bundle.
    """
    total = sum(weights[name] for name in bundle.members)
    exact = {
        name: bundle.partitions
        * (weights[name] / total if total else Fraction(1, len(bundle.members)))
        for name in bundle.members
    }
    quotas = {name: floor(share) for name, share in exact.items()}
    rest = bundle.partitions - sum(quotas.values())

    def deserving(name: str) -> tuple[Fraction, int, str]:
        return -(exact[name] - quotas[name] + owed[name]), -len(claims[name]), name

    eligible = [name for name in bundle.members if exact[name]]
    for name in sorted(eligible, key=deserving)[:rest]:
        quotas[name] += 1
    for name in bundle.members:
        owed[name] += (exact[name] - quotas[name]) * len(bundle.topics)
    return quotas


def _fill(
    partitions: int, quotas: Mapping[str, int], claims: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """Let each member keep what its quota allows, then hand out the rest in order."""
    kept = {name: claims[name][:quota] for name, quota in quotas.items()}
    taken = {number for numbers in kept.values() for number in numbers}
    free = [number for number in range(partitions) if number not in taken]
    for name in sorted(quotas):
        missing = quotas[name] - len(kept[name])
        kept[name] += free[:missing]
        del free[:missing]
    return kept
