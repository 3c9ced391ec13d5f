"""ENP: TENP without whole experts, every expert of one width."""

from __future__ import annotations

from tenp_dist.scoring.methods.registry import Method
from tenp_dist.scoring.methods.tenp import neuron_projection

METHOD = Method(
    name="enp",
    source="TENP, arXiv 2606.09885, Eq. 8-10 with alpha = 0; the mixing of neuron scores over domains is ours",
    neurons=neuron_projection,
    neuron_statistics=("token_count", "neuron_projection_sum"),
)
