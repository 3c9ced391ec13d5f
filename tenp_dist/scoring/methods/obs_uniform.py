"""OBS with one width for the whole model, which stock engines load: of every expert stay the last that `obs` lets go.

One width for each layer is `{method: obs, max_widths: 1}`: there the costs decide which layers get more.
"""

from __future__ import annotations

from tenp_dist.scoring.methods.obs import stay
from tenp_dist.scoring.methods.registry import Method

METHOD = Method(
    name="obs-uniform",
    source="optimal brain surgeon (Hassibi and Stork 1993) on neurons, inside each expert",
    neurons=stay,
    neuron_statistics=("token_count", "elimination_order"),
)
