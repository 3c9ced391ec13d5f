"""Removes layers drawn by chance: the control of the methods that remove layers.

The draws depend on the seed and the layer alone.
"""

from __future__ import annotations

from tenp_dist.scoring.methods.random import random_layer
from tenp_dist.scoring.methods.registry import Method

METHOD = Method(name="random-layers", source="ours: uniform draws, a control", layers=random_layer)
