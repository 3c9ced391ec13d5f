"""CAMERA: every expert keeps the neurons of highest energy, sustained or in peaks.

Stated (CAMERA-P, paper and code): |w_j|^2 ((1 - a) sum_t (g m_j)^2 + a max_t (g m_j)^2), g the dispatch weight,
a = 0.9 in the authors' script. There the neurons of a layer, shared experts included, compete with each other. Ours:
the neurons of an expert compete, so that every expert gets one width and engines can load the result; shared
experts stay; the mixing over domains.
"""

from __future__ import annotations

import torch

from tenp_dist.scoring.domains import mix_neurons
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics

PEAK_SHARE = 0.9  # `--reduce_ratio` of https://github.com/xuyuzhuang11/CAMERA, run.sh


def neuron_energy(statistics: LayerStatistics, context: Context) -> torch.Tensor:
    """The energy above, mixed over domains, float64 [E, F]."""
    peak_NEF = statistics["neuron_contribution_max"].numpy() ** 2
    energy_NEF = (1 - PEAK_SHARE) * statistics["neuron_energy_sum"].numpy() + PEAK_SHARE * peak_NEF
    return mix_neurons(statistics, energy_NEF, context.domain_weights, context.layer, context.neuron_domains)


METHOD = Method(
    name="camera",
    source="CAMERA, arXiv 2508.02322, energy; ranking inside an expert and the mixing over domains are ours",
    neurons=neuron_energy,
    neuron_statistics=("token_count", "neuron_energy_sum", "neuron_contribution_max"),
)
