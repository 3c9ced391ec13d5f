"""Several ranks per layer: real processes, real gloo, real DeepSpeed; the answer is that of one rank."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import free_port
from helpers.marks import VARIANT
from helpers.models import COMMON, EXPERTS, SETTINGS, save_model
from helpers.parallel_worker import batches, embed, results, run_layer, score_model, start
from helpers.source_files import SOURCES, imports_of
from tenp_dist.budget.plan import MoeLayer, make_plan
from tenp_dist.checkpoint.families.table import FAMILIES
from tenp_dist.config import Budget
from tenp_dist.errors import ClusterError, UnsupportedModelError
from tenp_dist.model.experts import IMPLEMENTATION, ExpertsState, register
from tenp_dist.model.layers import Frame
from tenp_dist.model.skeleton import Skeleton
from tenp_dist.passes.ranks import Ranks, check_parallel, join_ranks, listen
from tenp_dist.scoring.statistics import MERGE_RULES, LayerStatistics, join_experts, read_statistics

UNEVEN = {  # neither heads nor dense widths divide by two or three
    "deepseek_v2": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "q_lora_rank": 16},
    "deepseek_v3": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "q_lora_rank": 16},
    "qwen2_moe": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "decoder_sparse_step": 2},
    "qwen3_moe": {"hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 5, "mlp_only_layers": [1]},
}


pytestmark = pytest.mark.usefixtures("one_thread")  # as in the ranks


@pytest.fixture(scope="module")
def uneven_model(tmp_path_factory):
    """family -> a model whose heads and widths split unevenly, 128 over three ranks leaving one with nothing."""
    made = {}

    def make(family: str) -> Path:
        if family not in made:
            with pytest.MonkeyPatch.context() as patch:
                for key, value in (UNEVEN[family] | {"intermediate_size": 128}).items():
                    patch.setitem(COMMON if key in COMMON else SETTINGS[family], key, value)
                made[family] = save_model(tmp_path_factory.mktemp("uneven") / family, family, "float32")
        return made[family]

    return make


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """launch(size, models, dtype, padded) -> folder with what `size` ranks stored; they must say nothing."""

    def run(size: int, models: dict[str, Path], dtype: str = "float32", padded: bool = True) -> Path:
        out = tmp_path_factory.mktemp(f"ranks{size}")
        workers = start(out, size, models, dtype, padded)
        for worker in workers:
            said = worker.communicate(timeout=300)
            assert (worker.returncode, *said) == (0, "", ""), said
        return out

    return run


def plain_hidden(folder: Path, padded: bool) -> dict[tuple[int, int], torch.Tensor]:
    """(layer, microbatch) -> hidden states that leave the layer in transformers' own forward."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    hidden = {}
    for i, batch in enumerate(batches(padded)):
        hooks = [
            layer.register_forward_hook(lambda m, a, o, key=(n, i): hidden.update({key: o}))
            for n, layer in enumerate(model.model.layers)
        ]
        with torch.no_grad():
            model(batch.tokens_BS, attention_mask=None if batch.mask_BS is None else batch.mask_BS.long())
        for hook in hooks:
            hook.remove()
    return hidden


def stored_scores(out: Path, size: int, name: str) -> dict[int, LayerStatistics]:
    """layer -> statistics of all experts, joined from what every rank stored."""
    paths = sorted((out / "rank0" / name).glob("layer_*"))
    return {
        int(path.stem.split("_")[1]): join_experts(
            [read_statistics(out / f"rank{rank}" / name / path.name) for rank in range(size)]
        )
        for path in paths
    }


def assert_close_statistics(found: LayerStatistics, wanted: LayerStatistics, note: object) -> None:
    """Within 1e-5 of the largest entry of the expert."""
    assert torch.equal(found.weight_norm, wanted.weight_norm)
    for name in MERGE_RULES:
        assert found[name].shape == wanted[name].shape
        scale = wanted[name].abs()
        scale = scale.amax(dim=2, keepdim=True) if scale.dim() == 3 else scale
        assert ((found[name] - wanted[name]).abs() <= 1e-5 * scale).all(), (note, name)


def plan_of(scores: dict[int, LayerStatistics]):
    facts = [MoeLayer(i, *s["neuron_l2_sum"].shape[1:]) for i, s in scores.items()]
    return make_plan(Budget(retention=0.6, important=0.2), facts, scores.__getitem__)


def assert_same_answer(out: Path, size: int, name: str, folder: Path, alone: Path, padded: bool) -> None:
    """Ranks against transformers' forward (hidden states) and one rank (dense parts split, statistics, plan)."""
    inputs, plain = batches(padded), plain_hidden(folder, padded)
    for (layer, i), wanted in plain.items():
        found = [load_file(out / f"rank{r}" / name / f"hidden_{layer}.safetensors")[str(i)] for r in range(size)]
        assert all(torch.equal(hidden, found[0]) for hidden in found), "ranks would route differently"
        valid = slice(None) if inputs[i].mask_BS is None else inputs[i].mask_BS
        error = (found[0][valid] - wanted[valid]).norm() / wanted[valid].norm()
        assert error <= 2e-5, (layer, i, float(error))
    (whole,) = results(alone)
    for result in results(out):
        assert all(part < all_ for part, all_ in zip(result[name]["dense"], whole[name]["dense"], strict=True))
    scores, expected = stored_scores(out, size, name), stored_scores(alone, 1, name)
    assert scores.keys() == expected.keys() and scores
    for layer, statistics in scores.items():
        assert_close_statistics(statistics, expected[layer], layer)
    kept, kept_alone = plan_of(scores).kept, plan_of(expected).kept
    for layer in scores:
        assert torch.equal(torch.as_tensor(kept[layer].offsets), torch.as_tensor(kept_alone[layer].offsets))
        for expert in range(EXPERTS):
            assert kept[layer].of(expert).tolist() == kept_alone[layer].of(expert).tolist()


def score_alone(models: dict[str, Path], out: Path, padded: bool) -> Path:
    result = {
        name: score_model(folder, out / "rank0" / name, Ranks(), torch.float32, padded)
        for name, folder in models.items()
    }
    (out / "rank0.json").write_text(json.dumps(result))
    return out


@pytest.mark.slow
@pytest.mark.beside
def test_ranks_give_the_same_answer(launch, tiny_model, tmp_path):
    """Two ranks, all families: hidden states, statistics, plan, and every rank reads its own experts only."""
    models = {family: tiny_model(family) for family in SETTINGS}
    out, alone = launch(2, models), score_alone(models, tmp_path, padded=True)
    for family, folder in models.items():
        assert_same_answer(out, 2, family, folder, alone, padded=True)
    for rank, result in enumerate(results(out)):
        assert result["deepspeed"] and result["group"]
        for family in models:
            owned = Ranks(rank, 2).experts(EXPERTS)
            read = [name for name in result[family]["read"] if ".mlp.experts." in name]
            layers = {name.split(".")[2] for name in read}
            assert len(read) == len(set(read)) == len(layers) * len(owned) * 3
            assert {int(name.split(".")[5]) for name in read} == set(owned)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "padded"), [pytest.param(2, False, marks=VARIANT), (3, False), (3, True)])
def test_uneven_splits_give_the_same_answer(size, padded, launch, tiny_model, uneven_model, tmp_path):
    """8 experts and 4 heads over three ranks, 5 heads over two, 128 neurons in blocks of 64 over three."""
    models = {family: tiny_model(family) for family in SETTINGS}
    models |= {f"{family}-uneven": uneven_model(family) for family in SETTINGS}
    out, alone = launch(size, models, padded=padded), score_alone(models, tmp_path, padded)
    for name, folder in models.items():
        assert_same_answer(out, size, name, folder, alone, padded)


@pytest.mark.slow
def test_bfloat16_ranks_agree_with_one_another_and_nearly_with_one(launch, tiny_model):
    """Rounding flips some routing decisions, so most tokens agree, not all; float32 tensors stay float32."""
    models = {family: tiny_model(family) for family in SETTINGS}
    two, one = (launch(size, models, dtype="bfloat16", padded=False) for size in (2, 1))
    for family in models:
        for path in sorted((one / "rank0" / family).glob("hidden_*")):
            wanted = load_file(path)
            found = [load_file(two / f"rank{rank}" / family / path.name) for rank in (0, 1)]
            for key, hidden in wanted.items():
                assert torch.equal(found[0][key], found[1][key])
                error_BS = (found[0][key] - hidden).float().norm(dim=-1) / hidden.float().norm(dim=-1)
                assert error_BS.median() < 0.03, (family, path.name)
    for result in results(two):
        assert result["deepseek_v3"]["kept"] == ["e_score_correction_bias"]


@pytest.mark.slow
@pytest.mark.beside
def test_one_rank_imports_no_deepspeed(launch, tiny_model):
    (result,) = results(launch(1, {"model": tiny_model()}))
    assert not result["deepspeed"] and not result["group"]


@pytest.mark.slow
def test_a_rank_whose_peer_dies_fails_at_once(tiny_model, tmp_path):
    """No rank may wait for ever in a collective."""
    workers = start(tmp_path, 2, {f"{i}": tiny_model() for i in range(200)})
    while not (tmp_path / "rank1" / "1" / "hidden_3.safetensors").exists():
        assert workers[1].poll() is None
    workers[1].send_signal(signal.SIGKILL)
    _, said = workers[0].communicate(timeout=20)
    workers[1].communicate()
    assert workers[0].returncode != 0 and "gloo" in said


def test_ranks_that_do_not_meet_are_a_clear_error():
    own = listen("127.0.0.1")
    with mock.patch.dict(os.environ), pytest.raises(ClusterError, match="rank 0 of 2"):
        join_ranks(0, 2, own.host, own.port, own=own, timeout=1)
    with mock.patch.dict(os.environ), pytest.raises(ClusterError, match="rank 1 of 2"):
        join_ranks(1, 2, "127.0.0.1", free_port(), timeout=1)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ClusterError, match="did not meet"):
        listen(*taken.getsockname())


@pytest.mark.parametrize("num_experts", [8, 60, 256])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_expert_shares_are_contiguous_and_balanced(num_experts, size):
    shares = [Ranks(rank, size).experts(num_experts) for rank in range(size)]
    assert [expert for share in shares for expert in share] == list(range(num_experts))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class _Alone(Ranks):
    """One of several ranks, whose sums over all ranks are known beforehand; what it adds itself is noted.

    routed: the layer's output of every microbatch. rows: what `pair_sums` gets of them, None while it is not known.
    """

    def __init__(self, rank, size, routed, rows):
        super().__init__(rank, size)
        self.local, self.rows = [], []
        self._routed, self._wanted = iter(routed), rows

    def share(self, num_experts):
        return {"experts": self.experts(num_experts), "reduce": self._reduce}

    def _reduce(self, part):
        if part.dim() == 2:
            self.local.append(part)
            return next(self._routed)
        self.rows.append(part)
        return part if self._wanted is None else self._wanted[len(self.rows) - 1]


@pytest.mark.parametrize("family", SETTINGS)
@torch.inference_mode()
def test_shares_of_a_layer_add_up_to_it(family, tiny_model):
    """One process plays three ranks: local sums add up in float32, local statistics join to the whole."""
    register()
    skeleton = Skeleton(
        tiny_model(family), dtype=torch.float32, device=torch.device("cpu"), experts_implementation=IMPLEMENTATION
    )
    frame, inputs = Frame(skeleton), batches(padded=True)
    layer, hidden, routed = skeleton.moe_layers()[0], embed(frame, inputs), []
    module = skeleton.load_layer(layer, skeleton.read_layer(layer))
    skeleton.experts_of(module).register_forward_hook(lambda m, a, output: routed.append(output))
    whole = run_layer(frame, layer, module, inputs, list(hidden), Ranks())
    parts, local, rows = [], [], []
    for last in (False, True):  # what ranks say of pairs is known to all once each has said it
        parts.clear()
        local.clear()
        for rank in range(3):
            ranks = _Alone(rank, 3, routed, rows if last else None)
            module = skeleton.load_layer(layer, skeleton.read_layer(layer, ranks.experts(EXPERTS)))
            parts.append(run_layer(frame, layer, module, inputs, list(hidden), ranks))
            local += ranks.local
            if not last:
                rows = [a + b for a, b in zip(rows, ranks.rows, strict=True)] if rows else ranks.rows
    assert all(part.dtype == torch.float32 for part in local)
    for i in range(len(inputs)):
        torch.testing.assert_close(sum(local[i :: len(inputs)]), routed[i], rtol=1e-5, atol=1e-6)
    assert_close_statistics(join_experts(parts), whole, family)


def test_a_state_of_other_experts_than_the_layer_holds_is_refused(tiny_model):
    register()
    skeleton = Skeleton(
        tiny_model(), dtype=torch.float32, device=torch.device("cpu"), experts_implementation=IMPLEMENTATION
    )
    experts = skeleton.experts_of(skeleton.load_layer(1, skeleton.read_layer(1, range(2, 5))))
    experts.tenp_state = ExpertsState(experts=range(2, 6))
    with pytest.raises(ValueError, match="holds 3 experts"):
        experts(torch.zeros(1, 32), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2))


CONFIG = {"n_routed_experts": 8, "num_attention_heads": 8, "num_key_value_heads": 4}


def test_unverified_families_are_refused_by_name():
    family = dataclasses.replace(FAMILIES["deepseek_v3"], model_type="other_moe", tensor_parallel=False)
    check_parallel(family, CONFIG, 1)
    with pytest.raises(UnsupportedModelError, match="other_moe") as raised:
        check_parallel(family, CONFIG, 2)
    assert "deepseek_v3" in raised.value.wanted and "qwen3_moe" in raised.value.wanted


@pytest.mark.parametrize(
    ("size", "changes", "limit"),
    [
        (5, {}, "4 attention key-value heads"),
        (5, {"num_key_value_heads": None, "num_attention_heads": 4}, "4 attention key-value heads"),
        (4, {"n_routed_experts": 3}, "3 routed experts"),
    ],
)
def test_more_ranks_than_parts_are_refused(size, changes, limit):
    check_parallel(FAMILIES["deepseek_v3"], CONFIG, 4)
    with pytest.raises(UnsupportedModelError) as raised:
        check_parallel(FAMILIES["deepseek_v3"], CONFIG | changes, size)
    assert limit in raised.value.found


def test_deepspeed_is_imported_in_one_module_only():
    importers = {path.name for path in SOURCES if any(m.split(".")[0] == "deepspeed" for m in imports_of(path))}
    assert importers == {"ranks.py"}
