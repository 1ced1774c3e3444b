"""A stage on disk: JSON of allow-listed operators, run by an interpreter over a list of slots.

    {"version": 1,
     "inputs":  [["x", "F32", [null, 3, 224, 224]]],         as in the plan
     "weights": [["conv1.weight", "F32", [64, 3, 7, 7]]],    what stage.safetensors must hold
     "nodes":   [["conv2d", "aten.conv2d.default", [{"v": "x"}, {"w": "conv1.weight"}, …], {}]],
     "outputs": [["relu", {"v": "relu"}]]}

A value is null, a bool, a number, a string, a list of values, or one of: {"v": earlier value},
{"w": weight}, {"dtype": "F32"}, {"float": "inf"}, {"layout": "strided"}, {"format":
"contiguous_format"}, {"device": null}: always the one the stage is loaded on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import fx
from torch._ops import OpOverload

from streaminfer.errors import CaptureError, PlanError
from streaminfer.parallel.operators import Operator, arguments, name_of, resolve
from streaminfer.parallel.pipeline import StageGraph
from streaminfer.parallel.signature import DTYPES, Port, dtype_name

__all__ = ["Program", "dump", "load"]
