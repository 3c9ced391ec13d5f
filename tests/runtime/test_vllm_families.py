"""Every family that the plugin serves: ragged in vLLM computes what padded does in vLLM's own experts.

float32, eager, one rank; what else vLLM does with ragged experts is tried in `test_vllm_serving.py`, with families that
it names, and is the same for all.
"""

from __future__ import annotations

import pytest

from helpers.engines import agrees
from helpers.served import WIDTHS, make_served, served_plan
from helpers.served_families import EXPERTS, HIDDEN, NEURONS
from tenp_dist_vllm.families import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.variant, pytest.mark.timeout(1800)]
OTHERS = sorted(FAMILIES.keys() - {"deepseek_v3", "qwen3_moe", "mixtral"})


@pytest.mark.parametrize("family", OTHERS)
def test_ragged_computes_what_padded_does(family, answers, tmp_path):
    served = make_served(family, tmp_path)
    found = answers({layout: (served[layout], {}) for layout in ("padded", "ragged")})
    agrees(found["ragged"], found["padded"])
    pruned = WIDTHS[: len(served_plan(served["source"]))]
    rounded = sum(-(-width // 32) * 32 for layer in pruned for width in layer)  # as by vLLM on CPUs
    of_neuron = 3 * HIDDEN * 4
    assert found["ragged"]["bytes"] == (EXPERTS * NEURONS + rounded) * of_neuron
    assert found["padded"]["bytes"] == (1 + len(pruned)) * EXPERTS * NEURONS * of_neuron
