"""Let the threads go that OpenMP keeps for whoever has computed with several.

GNU's libgomp, which torch's wheels for Linux bring, keeps a team of threads for every thread that
ever computed with more than one. If all teams of a process are more threads than there are cores,
each sleeps between two operators, where it would else spin for a moment. Measured: a stage with two
threads on two cores, in the process that has built its plan, does 108 images a second, and 132 once
the builder's team is gone (efficientnet_b0).
"""

from __future__ import annotations

import ctypes

__all__ = ["release_team"]

_SOFT = 1  # omp_pause_soft of <omp.h>


def release_team() -> bool:
    """End the calling thread's team, if it has one; its next computation makes a new one.

    Returns:
        Whether it could be: False with another OpenMP than GNU's, which shares its threads among
        all, or before torch is loaded.
    """
    try:
        library = ctypes.CDLL(None)
        if hasattr(library, "kmp_set_blocktime"):  # LLVM's and Intel's: it would stop all threads
            return False
        return int(library.omp_pause_resource_all(_SOFT)) == 0
    except (AttributeError, OSError):
        return False
