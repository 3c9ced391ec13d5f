"""Removes experts drawn by chance: the control of the methods that remove experts.

The draws are those of `random`, so they depend on the seed and the layer alone.
"""

from __future__ import annotations

from tenp_dist.scoring.methods.random import random_experts
from tenp_dist.scoring.methods.registry import Method

METHOD = Method(name="random-experts", source="ours: uniform draws, a control", experts=random_experts)
