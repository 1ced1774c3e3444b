"""Stages joined by local edges: one step that hands tensors from forward to forward in memory.

    ──▶ stem ──▶ trunk.0 ──▶ gather ──▶ head ──▶      a row that fails in a part has failed once
            └──▶ trunk.1 ──┘                          its gather has heard of all parts

Calls overlap, so with stages on several devices this is a pipeline, too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from streaminfer.plan import StagePlan
from streaminfer.runtime.join import Join, Piece, Row
from streaminfer.runtime.steps import Item, Plain, Result, Settled, Step
from streaminfer.wire import Envelope

__all__ = ["Graph"]


class Graph(Plain):
    """Runs stages in the order of their sources; the last one's outputs are its outputs."""

    def __init__(
        self, stages: Sequence[StagePlan], steps: Mapping[str, Step], quorums: Mapping[str, int]
    ) -> None:
        """Join stages.

        Args:
            stages: in the order of the plan; only the first one's sources lie outside.
            steps: what each does to an envelope, by name.
            quorums: of gathers that may do without some of their sources, by name.
        """
        self._stages, self._steps = stages, steps
        self._named = {stage.name: stage for stage in stages}
        self._joins = {
            stage.name: Join(stage, quorums.get(stage.name))
            for stage in stages[1:]
            if len(stage.sources) > 1
        }

    async def start(self) -> None:
        """Start all, the last one first, so that whoever hands over finds a taker."""
        for stage in reversed(self._stages):
            await self._steps[stage.name].start()

    async def stop(self) -> None:
        """Stop all, in the order of the road."""
        for stage in self._stages:
            await self._steps[stage.name].stop()

    async def __call__(self, items: Sequence[Item]) -> Result:
        """Run each item through all stages."""
        results = await asyncio.gather(*[self._one(item) for item in items])
        return Result(
            outputs=tuple(e for r in results for e in r.outputs),
            outcomes=tuple(e for r in results for e in r.outcomes),
            settled=tuple(Settled(p) for item in items for p in item.positions),
        )

    async def _one(self, item: Item) -> Result:
        if item.envelope is None:
            raise TypeError("stages take envelopes")
        running: dict[str, asyncio.Task[Result]] = {}
        try:
            for stage in self._stages:
                running[stage.name] = asyncio.create_task(self._stage(stage, item, running))
            done = await asyncio.gather(*running.values())
        except BaseException:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)
            raise
        # a row that failed inside a fan is in its gather's outcomes
        outcomes = [e for s, r in zip(self._stages, done, strict=True) if self._speaks(s)
                    for e in r.outcomes]  # fmt: skip
        return Result(outputs=done[-1].outputs, outcomes=tuple(outcomes))

    def _speaks(self, stage: StagePlan) -> bool:
        return stage.gather not in self._joins

    async def _stage(
        self, stage: StagePlan, item: Item, running: Mapping[str, asyncio.Task[Result]]
    ) -> Result:
        """Run a stage once its sources are done; its outcomes include what its join gave up."""
        if stage is self._stages[0]:
            return await self._steps[stage.name]([item])
        parts = [await running[source.stage] for source in stage.sources]
        if join := self._joins.get(stage.name):
            joined = join(list(self._rows(stage, parts, running)))
            outputs, outcomes = joined.outputs, joined.outcomes
        else:
            names = stage.sources[0].tensors
            outputs = tuple(_only(envelope, names) for envelope in parts[0].outputs)
            outcomes = ()
        if not outputs:
            return Result(outcomes=outcomes)
        now = time.time()
        handed = [Item((), envelope, nbytes=envelope.nbytes, since=now) for envelope in outputs]
        result = await self._steps[stage.name](handed)
        return replace(result, outcomes=(*outcomes, *result.outcomes))

    def _rows(
        self,
        stage: StagePlan,
        parts: Sequence[Result],
        running: Mapping[str, asyncio.Task[Result]],
    ) -> Sequence[Row]:
        """Lay the rows of all sources side by side, those that failed on the way too."""
        rows: dict[int, list[Piece | None]] = {}
        for k, (source, part) in enumerate(zip(stage.sources, parts, strict=True)):
            for envelope in (*part.outputs, *self._failed(source.stage, stage.name, running)):
                for at, sample in enumerate(envelope.samples):
                    row = rows.setdefault(sample.offset, [None] * len(parts))
                    row[k] = row[k] or Piece(envelope, at)
        return list(rows.values())

    def _failed(
        self, source: str, gather: str, running: Mapping[str, asyncio.Task[Result]]
    ) -> list[Envelope]:
        """Return the outcomes of a source and of the stages before it within the same fan."""
        found: list[Envelope] = []
        name = source
        while (stage := self._named.get(name)) and self._is_within(stage, gather):
            if stage.gather == gather:
                found += running[name].result().outcomes
            name = stage.sources[0].stage if stage.sources else ""
        return found

    def _is_within(self, stage: StagePlan, gather: str) -> bool:
        around = stage.gather
        while around and around != gather and around in self._named:
            around = self._named[around].gather
        return bool(around) and around == gather


def _only(envelope: Envelope, names: Sequence[str]) -> Envelope:
    kept = envelope.only(names)
    return envelope if len(kept) == len(envelope.tensors) else replace(envelope, tensors=kept)
