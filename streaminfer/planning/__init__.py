"""BEFORE: a pipeline file becomes a plan directory. Never imports transport or runtime.

source.py   is the plan current? (no torch)      factory.py  the model the file names
build.py    model → plan directory               verify.py   cut against whole
cuts.py     where a model may be cut
"""

from streaminfer.planning.source import ensure, source_key

__all__ = ["ensure", "source_key"]
