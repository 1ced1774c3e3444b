"""A stage by channels: shards of its layers' weights, and their sum or concatenation.

placement.py  whole, sharded, partial      layout.py  a stage's placements, one layer after another
algebra.py    which rule an operator has    weighted.py, pointwise.py, shapes.py  the rules
split.py      the graphs of parts and gather
"""

from streaminfer.parallel.tensor.split import channels_problem, split_channels

__all__ = ["channels_problem", "split_channels"]
