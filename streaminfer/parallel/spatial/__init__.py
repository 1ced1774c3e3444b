"""A stage by places of its image: tiles with the halo that they need, stitched together again.

halo.py   which input an output needs      rules.py    how an operator moves over the map
tile.py   one tile's graph                 split.py    scatter, tiles and gather
patches.py  independent tiles, the approximate form
"""

from streaminfer.parallel.spatial.patches import approximate_tiles
from streaminfer.parallel.spatial.split import overhead, split_tiles, tiles_problem

__all__ = ["approximate_tiles", "overhead", "split_tiles", "tiles_problem"]
