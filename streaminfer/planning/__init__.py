"""BEFORE: measure, cut, place, predict, build, prove.

Never imports runtime, and of transport the pure assignor alone.

subject.py   what is planned           profiler.py + timing.py  model and devices → profile.py
codecs.py    what travels as what      partitioner.py           exact search over cuts and devices
predict.py   a quick estimate          planner.py               the best, the runners-up, and why
forecast.py  a candidate, simulated    finalists.py             which ones, and the choice of one
placement.py → a pipeline file         report.py + drawing.py   → a page with figures
source.py   is the plan current? (no torch)      factory.py  the model the file names
build.py    model → plan directory               verify.py   cut against whole
cuts.py     where a model may be cut

standin.py  a model that costs nothing, to measure the engine
live.py     what a running pipeline measures → advice.py     simulation/ predict by discrete events
calls.py    layers of a profile → a stage's calls            splitting/  shards and tiles
"""

from streaminfer.planning.source import ensure, source_key

__all__ = ["ensure", "source_key"]
