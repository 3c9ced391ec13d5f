"""Plans of whole neuron groups in FP8: where a group is a block, every block of the result is one of the source."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.checkpoints import all_tensors
from helpers.fp8 import make_pair

BLOCK, NEURONS = 8, 24


@pytest.fixture(scope="module", params=[False, True], ids=["floats", "powers"])
def model(request, tmp_path_factory, tiny_model):
    return make_pair(
        tmp_path_factory.mktemp("fp8"), tiny_model("deepseek_v3", "bfloat16"), (BLOCK, BLOCK), request.param
    )[0]


def blocks_of(tensors, name: str, neurons_first: bool) -> list[bytes]:
    """Bytes of each run of neurons that share factors, with these factors, in the order in which they are stored."""
    numbers, factors = tensors[name].view(torch.uint8), tensors[f"{name}_scale_inv"].view(torch.uint8)
    if not neurons_first:
        numbers, factors = numbers.T, tensors[f"{name}_scale_inv"].T.contiguous().view(torch.uint8)
    parts = zip(numbers.split(BLOCK), factors, strict=True)
    return [b"".join(one.contiguous().numpy().tobytes() for one in part) for part in parts]


def test_every_block_is_the_sources_byte_for_byte(model, job_file, tenp, tmp_path):
    """A whole run with verify; of an expert as many blocks as its width has, in their order."""
    budget = {"method": "enp", "retention": "0.7", "neuron_groups": BLOCK}
    job = job_file(model=model, budget=budget)
    for command in ("inspect", "calibrate", "score", "plan", "write", "verify"):
        result = tenp(command, job)
        assert result.exit_code == 0, result.stderr
    run = tmp_path / "run"
    rounding = json.loads((run / "verify.json").read_text())["layouts"]["ragged"]["rounding"]
    assert rounding["exact"] == rounding["tensors"] > 0 and rounding["largest_error"] == 0
    assert json.loads((run / "plan.json").read_text())["budget"]["neuron_groups"] == BLOCK
    before, after, fewer = all_tensors(model), all_tensors(run / "checkpoint" / "ragged"), 0
    for name in [name for name in after if ".experts." in name and name.endswith(".weight")]:
        first = not name.endswith("down_proj.weight")
        had, has = (blocks_of(tensors, name, first) for tensors in (before, after))
        places = [had.index(block) for block in has]
        assert places == sorted(set(places)) and len(has) in (2, 3), name
        fewer += len(has) < len(had)
    assert fewer == 8 * 3 * 3
