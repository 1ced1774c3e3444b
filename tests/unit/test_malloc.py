"""One setting of the C library."""

from __future__ import annotations

import subprocess
import sys

import pytest

from streaminfer.malloc import tune_malloc

FAULTS = """
import resource, sys
from streaminfer.malloc import tune_malloc
if sys.argv[1] == "tuned":
    tune_malloc()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytearray(48 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def test_it_may_be_tuned_twice() -> None:
    assert tune_malloc() == tune_malloc()


@pytest.mark.skipif(not tune_malloc(), reason="this C library has no such thresholds")
def test_pages_of_a_buffer_fault_in_once() -> None:
    def faults(how: str) -> int:
        found = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True)
        return int(found.stdout)

    assert faults("plain") > 1000 > faults("tuned")
