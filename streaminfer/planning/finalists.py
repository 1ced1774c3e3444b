"""All that the search found → the few that are shown, simulated: the best of each form.

    "2 stages"   batch 16 ─▶ p99 too late   batch 8 ─▶ in time: shown   batch 4: not simulated

Candidates come ranked by `predict`. With a limit for the p99 a form's next ones are simulated
until one is in time, or none of them could be as fast as what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from streaminfer.planning.forecast import forecast
from streaminfer.planning.predict import Candidate
from streaminfer.planning.profile import Profile

if TYPE_CHECKING:
    from streaminfer.planning.planner import Request

__all__ = ["CLOSE", "Foresee", "choose", "finalists", "in_time", "is_asked"]

Foresee = Callable[[Candidate, Profile, "Request"], Candidate]
CLOSE = 0.98  # of the best throughput: as good, so that fewer devices and less latency decide


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """Take the highest throughput; of those close to it, the fewest devices, the least latency."""
    most = max(c.throughput for c in candidates)
    close = [c for c in candidates if c.throughput >= CLOSE * most]
    return min(close, key=lambda c: (sum(len(s.devices) for s in c.stages), c.p99))


def finalists(
    found: Sequence[Candidate], profile: Profile, request: Request, foresee: Foresee = forecast
) -> tuple[list[Candidate], list[Candidate]]:
    """Simulate the best of each form, or, where it answers too late, those behind it.

    Returns:
        Of each form the best that is in time, else its best; and all that were simulated.
    """
    forms: dict[str, list[Candidate]] = {}
    for candidate in found:
        forms.setdefault(candidate.form, []).append(candidate)
    shown, tried, most = list[Candidate](), list[Candidate](), 0.0
    for same in sorted(forms.values(), key=lambda same: -max(c.throughput for c in same)):
        first = choose(same)
        rest = sorted((c for c in same if c is not first), key=lambda c: -c.throughput)
        seen: list[Candidate] = []
        for candidate in (first, *rest):
            if seen and (candidate.throughput < CLOSE * most or not is_asked(first, request)):
                break
            seen.append(foresee(candidate, profile, request))
            if in_time(seen[-1], request):
                most = max(most, seen[-1].throughput if is_asked(first, request) else 0.0)
                break
        shown.append(seen[-1] if in_time(seen[-1], request) else seen[0])
        tried += seen
    return shown, tried


def is_asked(candidate: Candidate, request: Request) -> bool:
    """Tell whether it has as many stages as are asked for."""
    return request.stages in (None, len(candidate.stages))


def in_time(candidate: Candidate, request: Request) -> bool:
    """Tell whether a simulated candidate answers as soon as is asked for."""
    return request.slo_p99 is None or candidate.p99 <= request.slo_p99
