"""Models that others wrote, captured, cut in 2, 3 and 4, read from disk: how many are still equal.

`python -m tests.benchmarks.zoo [FAMILY | MODEL…]` runs some and writes build/zoo.json; the measure
runs all of them that are installed, in a process of its own, on one thread.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks.processes import ROOT
from tests.benchmarks.rows import Row

__all__ = ["EQUAL", "measure"]

EQUAL = "zoo"
FILE = ROOT / "build" / "zoo.json"
# Models that are not asked for, or only asked for less, each with its reason.
EXCEPTIONS: Mapping[str, str] = {}


async def measure(goals: Mapping[str, str | None]) -> list[Row]:
    """Run all families and count."""
    began = time.monotonic()
    FILE.unlink(missing_ok=True)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.benchmarks.zoo", cwd=ROOT
    )
    if await process.wait():
        raise RuntimeError(f"the zoo ended with {process.returncode}")
    results = json.loads(FILE.read_text())
    asked = [r for r in results if r["name"] not in EXCEPTIONS]
    equal = sum(r["equal"] for r in asked)
    wrong = [f"{r['name']} ({r['reason']})" for r in asked if not r["equal"]]
    families = {r["family"]: sum(q["family"] == r["family"] for q in results) for r in results}
    note = "; ".join(
        [
            f"{equal} of {len(asked)} bit for bit in 2, 3 and 4 stages at batch 2 and 3",
            ", ".join(f"{family} {n}" for family, n in families.items()),
            *[f"without {name}: {reason}" for name, reason in EXCEPTIONS.items()],
            f"not equal: {', '.join(wrong) or 'none'}",
            f"{time.monotonic() - began:.0f} s; each in {FILE.relative_to(ROOT)}",
        ]
    )
    return [Row(EQUAL, equal / len(asked), "of models", goals[EQUAL], note)]


def main(chosen: Sequence[str]) -> int:
    """Try models, or all of a family; print and keep what became of each."""
    import torch

    from tests import zoo

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    absent = [family for family in ("timm", "transformers") if not find_spec(family)]
    for family in absent:
        print(f"  {family} is not installed: its models are left out")
    there = zoo.entries([family for family in zoo.ZOO if family not in absent])
    entries = [e for e in there if not chosen or {e.name, e.family} & set(chosen)]
    known = json.loads(FILE.read_text()) if FILE.exists() else []
    again = {entry.name for entry in entries}
    results = [kept for kept in known if kept["name"] not in again]
    for entry in entries:
        with TemporaryDirectory() as folder:
            result = zoo.attempt(entry, Path(folder))
        results.append(asdict(result))
        word = "equal" if result.equal else "NOT"
        print(
            f"  {word:<6}{result.family:<13}{result.name:<32}{result.seconds:6.1f} s  "
            f"{result.nodes:5} operators {result.cuts:5} cuts  {result.reason}",
            flush=True,
        )
        FILE.parent.mkdir(parents=True, exist_ok=True)
        FILE.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
