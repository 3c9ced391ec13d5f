"""DeepSeek-V3 at its true size, from headers alone: what a result in FP8 takes."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.sparse import sparse_checkpoint
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.output_form import output_form
from tenp_dist.checkpoint.source import open_source
from tenp_dist.job_file import load_job
from tenp_dist.layouts.base import Pruned, output_sizes
from tenp_dist.layouts.table import LAYOUTS
from tenp_dist.stages.inspect import check_stored

pytestmark = [pytest.mark.slow, pytest.mark.beside]
LAYERS, DENSE, EXPERTS, NEURONS = 61, 3, 256, 2048


def test_a_result_of_deepseek_v3(job_file, tmp_path):
    """60 % of the experts' neurons in widths of 1152 and 1280: smaller than the source, as the job is told before."""
    source = open_source(sparse_checkpoint("deepseek-v3", tmp_path / "deepseek-v3"))
    check_stored(source)  # as `inspect` does: every factor is a number above zero
    assert source.facts.bytes.stored == pytest.approx(688.57e9, rel=1e-4)
    widths = np.where(np.arange(EXPERTS) % 5 < 3, 1280, 1152)  # 0.6 * 2048 = 1228.8 in the mean
    neurons = KeptNeurons.from_mask(np.arange(NEURONS) < widths[:, None])
    kept = dict.fromkeys(range(DENSE, LAYERS), neurons)
    job = load_job(job_file(model=source.folder, budget={"retention": "0.6", "align": 128}))
    sizes, nbytes = {}, {}
    for dtype in ("source", "bfloat16"):
        form = output_form(source, dtype)
        sizes[dtype] = LAYOUTS["ragged"].nbytes(output_sizes(source, form), job)
        tensors = form.tensors(source, LAYOUTS["ragged"].tensors(Pruned(source, kept, "0.6", form=form)))
        nbytes[dtype] = sum(tensor.nbytes for tensor in tensors)
    assert nbytes["source"] == pytest.approx(sizes["source"], rel=2e-3) and sizes["source"] < 430e9 > nbytes["source"]
    assert nbytes["bfloat16"] > 840e9
