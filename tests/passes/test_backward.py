"""A pass that goes back: the gradients are those of torch's backward through the stock model in one piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from helpers.gradients import plain_gradients
from helpers.scoring import COMPUTE, FAMILIES, batches_of, pass_context, random_corpus
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.errors import ClusterError, DiskFullError
from tenp_dist.model.experts import ExpertsState
from tenp_dist.model.layers import Frame
from tenp_dist.passes import room_for_gradients
from tenp_dist.passes.backward import GradientTask, run_gradients
from tenp_dist.passes.compute import open_skeleton
from tenp_dist.passes.layer_gradient import Backward, Forward, LayerGradient
from tenp_dist.passes.layer_ops import microbatches
from tenp_dist.passes.layer_step import OpenShard
from tenp_dist.passes.loss import loaded_tail, loss_gradient
from tenp_dist.passes.schedule import Unit, layer_words

EXACT = 1e-5  # of the largest gradient


class Seen(NamedTuple):
    """Of one microbatch in one layer: gradients by what left it and by what entered it, and by a scale of 1."""

    leaving: torch.Tensor
    entering: torch.Tensor
    scale: float


SEEN: dict[int, list[Seen]] = {}  # layer -> its microbatches in order; the pool is this process


class Scaled(LayerGradient[list]):
    """Every layer's change h -> h + s f(h) has a scale s = 1 whose gradient is asked for; s^2 / 2 may be penalised."""

    def __init__(self, task: ScaledTask, shard: OpenShard):
        self.task, self.shard = task, shard

    def begin(self, layer, module) -> list:
        return []

    def forward(self, layer, module, batch, hidden_BSD) -> Forward:
        experts = self.shard.skeleton.experts_of(module)
        if experts is not None:
            experts.tenp_state = ExpertsState(valid_T=batch.valid_T, **self.shard.share)
        scale = torch.ones((), requires_grad=True)
        change_BSD = self.shard.frame.run_layer(layer, module, batch, hidden_BSD) - hidden_BSD
        penalty = 0.5 * scale.square() if self.task.penalised else None
        return Forward(hidden_BSD + scale * change_BSD, [scale], penalty)

    def add(self, layer, batch, passed: Backward, sums: list) -> None:
        sums.append(Seen(passed.leaving_BSD.clone(), passed.entering_BSD, float(passed.wanted[0])))

    def finish(self, layer, sums: list) -> None:
        SEEN[layer] = sums


@dataclass(frozen=True)
class ScaledTask(GradientTask):
    penalised: bool = False

    def layer_gradient(self, shard: OpenShard) -> Scaled:
        return Scaled(self, shard)

    def done_by(self, layer: int, rank: int) -> bool:
        return layer in SEEN


def went_back(model, folder, corpus, *, progress=lambda step: None, options: Any = None, **cluster):
    SEEN.clear()
    folder.mkdir(exist_ok=True)
    write_corpus(folder / "corpus.arrow", corpus)
    context = pass_context(model, folder / "ledger", progress=progress, **cluster)
    task = ScaledTask(
        model, folder / "corpus.arrow", folder / "gradients", "key", COMPUTE, waves=3, layers=len(context.nbytes),
        **options or {},
    )  # fmt: skip
    return run_gradients(context, task)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= EXACT * wanted.abs().max())


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_model_in_one_piece(family, shards, tiny_model, tmp_path):
    model, corpus = tiny_model(family), random_corpus(256, sequences=8, padded=True)
    plain = plain_gradients(model, batches_of(corpus))
    done = went_back(model, tmp_path, corpus, shards=shards, options={"penalised": True})
    assert sum(done.loss.values()) == pytest.approx(sum(one.loss for one in plain), rel=1e-6)
    assert sum(done.tokens.values()) == int((corpus.mask_NS[:, 1:] & corpus.mask_NS[:, :-1]).sum())
    assert sorted(SEEN) == sorted(plain[0].leaving)
    for layer, seen in SEEN.items():
        for one, wanted in zip(seen, plain, strict=True):
            assert close(one.leaving, wanted.leaving[layer]), layer
            entering = wanted.leaving[layer - 1] if layer else wanted.embedded
            assert close(one.entering, entering), layer
            by_scale = float((wanted.leaving[layer] * wanted.change[layer]).sum())
            assert one.scale == pytest.approx(by_scale + 1, rel=1e-4, abs=1e-4), layer


def test_progress_and_shards_name_layers_from_the_last_down(tiny_model, tmp_path):
    told = []
    went_back(tiny_model("deepseek_v3"), tmp_path, random_corpus(256), progress=told.append, shards=2)
    notes = [step.note for step in told if step.note]
    assert notes == [f"layer {layer}, waves 0-2" for layer in (0, 1, 2, 3, 3, 2, 1, 0)]
    assert [step.message for step in told if step.message] == [
        "layers 0-1, layers 2-3; streaming",
        "layers 3-2, layers 1-0; streaming",
    ]
    done = [step.done / step.total for step in told]
    assert done == sorted(done) and done[-1] == 1
    assert str(Unit(0, 2, (1,), turned=8)) == "layers 7-6, wave 1" and layer_words(range(3, 4), 8) == "layer 4"


def test_a_divergence_from_a_reference_goes_back(tiny_model, tmp_path):
    """KL and its gradient, through norm and head, in chunks; of the reference itself both are 0."""
    from transformers import AutoModelForCausalLM

    model = tiny_model("qwen3_moe")
    batch = microbatches(random_corpus(256, padded=True), 64)[0]
    draw = torch.Generator().manual_seed(0)
    final, other = torch.randn(2, *batch.tokens_BS.shape, 32, generator=draw)
    frame = Frame(open_skeleton(model, COMPUTE))
    with loaded_tail(frame):
        found = loss_gradient(frame, batch, final, other)
        same = loss_gradient(frame, batch, final, final)
    assert frame.skeleton.final_norm.weight.is_meta
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    entered = final.clone().requires_grad_(True)
    log, wanted = (torch.log_softmax(stock.lm_head(stock.model.norm(h)), dim=-1) for h in (entered, other))
    valid = batch.mask_BS[:, 1:] & batch.mask_BS[:, :-1]
    loss = torch.nn.functional.kl_div(log, wanted, log_target=True, reduction="none").sum(-1)[:, :-1][valid].sum()
    loss.backward()
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-5) and found.tokens == int(valid.sum())
    assert close(found.gradient_BSD, entered.grad)
    assert abs(same.loss) < 1e-6 and float(same.gradient_BSD.abs().max()) < 1e-5


def test_what_does_not_fit_is_refused_with_its_numbers(tiny_model, tmp_path, monkeypatch):
    model, corpus = tiny_model("qwen3_moe"), random_corpus(256)
    monkeypatch.setattr(room_for_gradients.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10**4}))
    with pytest.raises(DiskFullError) as disk:
        went_back(model, tmp_path / "disk", corpus)
    assert disk.value.wanted == "0.00 GB: 5 times 0.00 GB" and disk.value.exit_code == 9
    monkeypatch.undo()
    monkeypatch.setattr(room_for_gradients, "memory_per_rank", lambda *of: 1000.0)
    with pytest.raises(ClusterError, match="graph of a microbatch") as memory:
        went_back(model, tmp_path / "memory", corpus)
    assert memory.value.found == "0.00 GB a rank" and "score.batch_tokens" in memory.value.next_step
    assert not SEEN and not (tmp_path / "memory" / "ledger").exists()


def test_a_finished_pass_is_not_made_again(tiny_model, tmp_path):
    model, corpus = tiny_model("qwen3_moe"), random_corpus(256)
    went_back(model, tmp_path, corpus)
    seen = dict(SEEN)
    assert not (tmp_path / "gradients" / "hidden").exists()
    write_corpus(tmp_path / "corpus.arrow", corpus)
    context = pass_context(model, tmp_path / "ledger")
    task = ScaledTask(model, tmp_path / "corpus.arrow", tmp_path / "gradients", "key", COMPUTE, waves=3, layers=3)
    done = run_gradients(context, task)
    assert done.up.resumed_share == done.back.resumed_share == 1 and not done.loss and seen == SEEN
