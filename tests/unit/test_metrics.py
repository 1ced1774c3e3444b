"""Many values at once must read on a dashboard as the same values one by one."""

from __future__ import annotations

import pytest

from streaminfer.metrics import LATENCY, Metrics, Reading


def readings(metrics: Metrics) -> list[Reading]:
    return [r for r in metrics.readings() if r.name.startswith("streaminfer_e2e")]


@pytest.mark.parametrize(
    "values",
    [[], [0.0], [61.0], [0.03] * 5, [*LATENCY, 0.0300001, 1e9, 0.0, *LATENCY]],
    ids=["none", "zero", "over all bounds", "alike", "on every bound"],
)
def test_many_at_once_count_as_one_by_one(values: list[float]) -> None:
    together, apart = Metrics("p"), Metrics("p")
    together.e2e.labels("p").observe_all(values)
    one_by_one = apart.e2e.labels("p")
    for value in values:
        one_by_one.observe(value)
    for one, other in zip(readings(together), readings(apart), strict=True):
        assert (one.name, one.labels) == (other.name, other.labels)
        assert one.value == pytest.approx(other.value)
