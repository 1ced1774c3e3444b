"""Ways to CUT a model: each file is a cut and its inverse. Pure torch.

capture → pipeline → program: a model becomes a graph, the graph becomes stages, a stage becomes
JSON and safetensors that any worker runs without the model's code. What it runs are calls on slots
(`calls`), some of them quicker ways to the same bits (`kernels`, `inplace`).
"""

from streaminfer.parallel.program import Program, load
from streaminfer.parallel.signature import DTYPES, Port, check_inputs

__all__ = ["DTYPES", "Port", "Program", "check_inputs", "load"]
