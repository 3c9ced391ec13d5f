"""Training of pruned models: gradients are those of the written checkpoint in stock transformers, by autograd."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helpers.checkpoints import random_kept, write
from helpers.joint import compensate_jointly, without_experts
from helpers.scoring import pass_context, random_corpus
from helpers.training import EXACT, drawn, stock, training
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.checkpoint.compensated import open_compensated
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import KeptNeurons, write_kept
from tenp_dist.checkpoint.merging import Merging
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.evaluation.variants import Variant
from tenp_dist.training.merge import merged
from tenp_dist.training.state import write_state


def merged_plan(model) -> dict[int, KeptNeurons]:
    """Four experts of eight, two of them made of several."""
    matrix_KE = np.zeros((4, 8))
    matrix_KE[np.arange(4), (0, 2, 4, 6)] = 1
    matrix_KE[1, 5], matrix_KE[2, 1] = -0.2, 0.3
    return {layer: replace(kept, merging=Merging(matrix_KE)) for layer, kept in without_experts(model).items()}


CASES = {
    "plain": ("deepseek_v3", random_kept, "padded"),
    "narrow": ("deepseek_v3", random_kept, "padded"),
    "removed": ("qwen2_moe", without_experts, "uniform"),
    "merged": ("qwen3_moe", merged_plan, "uniform"),
}


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_written_checkpoint(case, tiny_model, tmp_path):
    """Compensated jointly, but for `plain`: W_down of experts and of shared experts are other than the source's."""
    family, plan, layout = CASES[case]
    model, corpus = tiny_model(family), random_corpus(256, sequences=4, padded=True)
    kept = plan(model)
    pruned, solved = Variant(tmp_path / "plan.safetensors"), None
    write_kept(pruned.plan, kept, {"plan": "test"})
    if case != "plain":
        compensate_jointly(model, tmp_path / "solved", {"plan": kept})
        pruned = replace(pruned, compensation=tmp_path / "solved" / "plan")
        solved = open_compensated(pruned.compensation)
    write(model, kept, tmp_path / "written", layout, compensated=solved)
    write_corpus(tmp_path / "corpus.arrow", corpus)
    one = training(model, tmp_path, (), pruned, when="after")
    state = drawn(one.begin())
    write_state(one.folder, one.key, state)
    step, found = one.gradients(pass_context(model, tmp_path / "ledger", shards=2), 0)
    loss, _, wanted = stock(tmp_path / "written", corpus, state.weights, one)
    assert step.loss == pytest.approx(loss, rel=1e-5) and step.change == 0
    assert found.keys() == wanted.keys() and len(found) > 10
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= EXACT * gradient.abs().max(), name
    plain_loss, _, _ = stock(model, corpus, state.weights, one)
    assert abs(plain_loss - loss) > 1e-3 * loss, "pruning must show, or the test says nothing"


def test_what_is_merged_begins_with_the_compensated_tensor(tiny_model, tmp_path):
    """W_down of a shared expert: compensated + B A; where nothing trained, the compensated one stays as it is."""
    model = tiny_model("deepseek_v3")
    compensate_jointly(model, tmp_path / "solved", {"plan": random_kept(model)})
    solved = open_compensated(tmp_path / "solved" / "plan")
    one = training(model, tmp_path, (), when="after")
    begun = one.begin()
    small = one.small_set()[1]
    name = next(own.tensor for own in small if own.tensor in solved.tensors)
    with TensorReader(open_index(model)) as source, TensorReader(solved) as columns:
        assert merged(source, columns, small, begun.weights) == {}
        found = merged(source, columns, small, drawn(begun).weights)
        parts = drawn(begun).weights
        wanted = columns.tensor(name) + parts[f"{name}:B"] @ parts[f"{name}:A"]
        assert (found[name] - wanted).abs().max() < 1e-6
        assert (found[name] - source.tensor(name)).abs().max() > 1e-3
