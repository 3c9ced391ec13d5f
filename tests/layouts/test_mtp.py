"""Multi-token prediction layers: whole, pruned like the others, or dropped; in both ways that families name them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tenp_dist
from helpers.checkpoints import all_tensors, change_config, corrupt, random_kept, verify, write
from helpers.fp8 import make_pair
from tenp_dist.budget.unscored import keep_by_norm
from tenp_dist.checkpoint.index import INDEX_NAME
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.mtp import mtp_expert_layers, without_mtp
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import NumericalError, SourceError, VerifyError
from tenp_dist.pool.in_process import InProcessPool
from tenp_dist.stages.mtp import mtp_kept

EXPERTS, NEURONS = 8, 24


def scales(tensor, draw) -> torch.Tensor:
    """A factor between 0.5 and 1.5 for every row."""
    factors = 0.5 + torch.rand(tensor.shape[0], generator=draw)
    return factors.view(-1, *[1] * (tensor.dim() - 1)).to(tensor.dtype)


def add_mtp(model, folder, prefix: str, key: str, more=()):
    """A checkpoint with one prediction layer: the last decoder layer's tensors, each row scaled."""
    shutil.copytree(model, folder)
    tensors, draw = all_tensors(model), torch.Generator().manual_seed(5)
    last = max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    extra = {
        prefix + name.split(".", 3)[3]: tensor * scales(tensor, draw)
        for name, tensor in tensors.items()
        if name.startswith(f"model.layers.{last}.")
    }
    dtype = next(iter(tensors.values())).dtype
    extra |= {name: torch.randn(4, 6, generator=draw).to(dtype) for name in more}
    save_file(extra, folder / "mtp.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"] |= dict.fromkeys(extra, "mtp.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps(index))
    change_config(folder, **{key: 1})
    return folder


@pytest.fixture(params=["behind the decoder", "apart"])
def model(request, tiny_model, tmp_path):
    """A model, the prefix of its prediction layer, and the config key that counts it."""
    if request.param == "apart":
        prefix, key = "mtp.layers.0.", "mtp_num_hidden_layers"
        return (
            add_mtp(tiny_model("qwen3_moe"), tmp_path / "m", prefix, key, ("mtp.fc.weight", "mtp.norm.weight")),
            prefix,
            key,
        )
    prefix, key = "model.layers.4.", "num_nextn_predict_layers"
    folder = add_mtp(tiny_model("deepseek_v3"), tmp_path / "m", prefix, key, ("model.layers.4.eh_proj.weight",))
    change_config(folder, n_group=2, topk_group=1)
    return folder, prefix, key


def moe_layers(folder) -> list[int]:
    return list(open_source(folder).facts.moe_layers)


def removed(folder) -> dict[int, KeptNeurons]:
    """Six experts of every layer, three in each half."""
    return {i: KeptNeurons.without_others([0, 1, 2, 4, 6, 7], EXPERTS, NEURONS) for i in moe_layers(folder)}


def narrowed(folder) -> dict[int, KeptNeurons]:
    mask = np.zeros((EXPERTS, NEURONS), dtype=bool)
    mask[:, 3:15] = True
    return {layer: KeptNeurons.from_mask(mask) for layer in moe_layers(folder)}


def energies(tensors, prefix: str) -> np.ndarray:
    """(norm of gate row * of up row * of down column)^2 by loops, [E, F]."""
    found = np.zeros((EXPERTS, NEURONS))
    for expert in range(EXPERTS):
        gate, up, down = (
            tensors[f"{prefix}mlp.experts.{expert}.{m}_proj.weight"].double().numpy() for m in ("gate", "up", "down")
        )
        for neuron in range(NEURONS):
            found[expert, neuron] = sum(gate[neuron] ** 2) * sum(up[neuron] ** 2) * sum(down[:, neuron] ** 2)
    return found


def test_facts_count_it_behind_the_decoder(model):
    folder, prefix, _ = model
    source = open_source(folder)
    assert source.facts.mtp_layers == (source.facts.num_layers,)
    (layer,) = mtp_expert_layers(source)
    assert layer.prefix == prefix and layer.number == source.facts.num_layers
    nbytes = sum(t.numel() * t.element_size() for n, t in all_tensors(folder).items() if n.startswith(prefix))
    assert source.facts.bytes.per_layer[layer.number] == nbytes


def test_uniform_narrows_it_by_the_norms_of_its_weights(model, tmp_path):
    folder, prefix, key = model
    write(folder, narrowed(folder), tmp_path / "u", "uniform")
    before, after = all_tensors(folder), all_tensors(tmp_path / "u")
    assert after.keys() == before.keys()
    best = np.sort(np.argsort(-energies(before, prefix), axis=1)[:, :12], axis=1)
    assert len({tuple(row) for row in best.tolist()}) == EXPERTS, "every expert its own"
    for expert in range(EXPERTS):
        for matrix in ("gate", "up", "down"):
            name = f"{prefix}mlp.experts.{expert}.{matrix}_proj.weight"
            wanted = before[name][:, best[expert]] if matrix == "down" else before[name][best[expert]]
            assert torch.equal(after[name], wanted), name
    config = json.loads((tmp_path / "u" / "config.json").read_text())
    assert config[key] == 1 and config["moe_intermediate_size"] == 12
    verify(folder, narrowed(folder), tmp_path / "u", "uniform", tmp_path)


def test_uniform_removes_its_weakest_experts(model, tmp_path):
    folder, prefix, key = model
    write(folder, removed(folder), tmp_path / "u", "uniform")
    before, after = all_tensors(folder), all_tensors(tmp_path / "u")
    groups, energy = (2 if "model" in prefix else 1), energies(before, prefix).sum(axis=1)
    size = EXPERTS // groups
    stay = sorted(
        g * size + int(i) for g in range(groups) for i in np.argsort(-energy[g * size : (g + 1) * size])[: 6 // groups]
    )
    assert not any(f"{prefix}mlp.experts.6." in name for name in after)
    for new, old in enumerate(stay):
        for matrix in ("gate", "up", "down"):
            name = f"{prefix}mlp.experts.{{}}.{matrix}_proj.weight"
            assert torch.equal(after[name.format(new)], before[name.format(old)])
    gate = f"{prefix}mlp.gate.weight"
    assert torch.equal(after[gate], before[gate][stay])
    assert json.loads((tmp_path / "u" / "config.json").read_text())[key] == 1
    verify(folder, removed(folder), tmp_path / "u", "uniform", tmp_path)
    corrupt(tmp_path / "u", f"{prefix}mlp.experts.5.up_proj.weight", 33)
    with pytest.raises(VerifyError, match="differs"):
        verify(folder, removed(folder), tmp_path / "u", "uniform", tmp_path)


@pytest.mark.parametrize("layout", ["ragged", "padded"])
def test_elsewhere_it_stays_whole(layout, model, tmp_path):
    folder, prefix, key = model
    kept = random_kept(folder)
    write(folder, kept, tmp_path / "r", layout)
    before, after = all_tensors(folder), all_tensors(tmp_path / "r")
    mine = [name for name in before if name.startswith((prefix, "mtp."))]
    assert len(mine) > 20 and all(torch.equal(before[name], after[name]) for name in mine)
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config[key] == 1 and set(config.get("tenp", {}).get("layers", {})) <= set(map(str, kept))
    verify(folder, kept, tmp_path / "r", layout, tmp_path)
    change_config(tmp_path / "r", **{key: 0})
    with pytest.raises(VerifyError, match="another number of prediction layers"):
        verify(folder, kept, tmp_path / "r", layout, tmp_path)


def test_transformers_loads_ragged_beside_it(model, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, _, _ = model
    tokens = torch.arange(24).view(2, 12)
    logits = []
    for layout in ("ragged", "padded"):
        write(folder, random_kept(folder), tmp_path / layout, layout)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / layout, dtype=torch.float32)
        with torch.no_grad():
            logits.append(loaded.eval()(tokens).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layout", ["ragged", "padded", "uniform"])
def test_dropped(layout, model, tmp_path):
    """A source without the layer is the source as it was before the layer came."""
    folder, prefix, key = model
    source = without_mtp(open_source(folder))
    assert source.facts.mtp_layers == () and source.fingerprint == open_source(folder).fingerprint
    kept = narrowed(folder)
    write(folder, kept, tmp_path / "d", layout, mtp="drop")
    after = all_tensors(tmp_path / "d")
    assert after.keys() == {n for n in all_tensors(folder) if not n.startswith((prefix, "mtp."))}
    assert json.loads((tmp_path / "d" / "config.json").read_text())[key] == 0
    verify(folder, kept, tmp_path / "d", layout, tmp_path, mtp="drop")
    with pytest.raises(VerifyError, match="other tensors"):
        verify(folder, kept, tmp_path / "d", layout, tmp_path)


def test_ties_go_to_the_lower_id():
    whole = KeptNeurons.without_others([1, 3], 4, 5)
    assert keep_by_norm(np.ones((4, 5)), whole, 1).experts.tolist() == [0, 1]
    assert keep_by_norm(np.ones((4, 5)), whole, 2).experts.tolist() == [0, 2]
    mask = np.zeros((4, 5), dtype=bool)
    mask[:, :2] = True
    assert keep_by_norm(np.ones((4, 5)), KeptNeurons.from_mask(mask), 1).of(3).tolist() == [0, 1]


def test_a_factor_moved_between_up_and_down_changes_no_choice(model, tmp_path):
    folder, prefix, _ = model
    like = narrowed(folder)
    first = mtp_kept(InProcessPool(), open_source(folder), like)
    tensors = {n: t for n, t in all_tensors(folder).items() if n.startswith((prefix, "mtp."))}
    for expert in range(EXPERTS):
        factor = 2.0 ** torch.randint(-6, 6, (NEURONS,), generator=torch.Generator().manual_seed(expert))
        name = f"{prefix}mlp.experts.{expert}.{{}}_proj.weight"
        tensors[name.format("up")] *= factor[:, None]
        tensors[name.format("down")] /= factor
    save_file(tensors, folder / "mtp.safetensors")
    again = mtp_kept(InProcessPool(), open_source(folder), like)
    assert first.keys() == again.keys() == {open_source(folder).facts.num_layers}
    assert all(np.array_equal(first[n].indices, again[n].indices) for n in first)


def test_what_is_wrong_with_it_is_refused(model, tmp_path):
    folder, prefix, _ = model
    tensors = {n: t for n, t in all_tensors(folder).items() if n.startswith((prefix, "mtp."))}
    name = f"{prefix}mlp.experts.2.down_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, folder / "mtp.safetensors")
    with pytest.raises(NumericalError, match="prediction layer") as caught:
        write(folder, narrowed(folder), tmp_path / "u", "uniform")
    assert "experts.2." in str(caught.value) and not (tmp_path / "u").exists()
    save_file(tensors | {name: torch.zeros(32, 23)}, folder / "mtp.safetensors")
    with pytest.raises(SourceError, match="contradicts the config"):
        open_source(folder)


def test_stock_transformers_drafts_with_the_pruned_layer(tiny_model, tmp_path, monkeypatch):
    """The block of the loaded prediction layer computes what the source's does with the dropped neurons at zero."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

    # transformers knows the published depth alone
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.4.*"])
    folder = drafting(tiny_model("deepseek_v3"), tmp_path / "m")
    kept = narrowed(folder)
    (neurons,) = mtp_kept(InProcessPool(), open_source(folder), kept).values()
    write(folder, kept, tmp_path / "u", "uniform")
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (folder, tmp_path / "u")]
    source, pruned = (MtpModel.from_pretrained(model).eval() for model in models)
    experts, mask_EF = source.layers[0].mtp_block.mlp.experts, torch.from_numpy(neurons.mask(NEURONS))
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = source.layers[0].mtp_block.mlp(x)
        experts.down_proj.mul_(mask_EF[:, None, :])
        wanted, found = source.layers[0].mtp_block.mlp(x), pruned.layers[0].mtp_block.mlp(x)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert (whole - wanted).abs().max() > 1e-3
        tokens, options = torch.arange(2, 14).view(1, 12), {"do_sample": False, "max_new_tokens": 12}
        plain = models[1].generate(tokens, **options)
        assert torch.equal(models[1].generate(tokens, use_mtp=True, **options), plain)


def test_a_job_says_what_becomes_of_it(tiny_model, job_file, tmp_path):
    """Kept and dropped in one run directory: warning, summary and card; what is there is not taken for the other."""
    model = add_mtp(
        tiny_model("qwen3_moe"), tmp_path / "m", "mtp.layers.0.", "mtp_num_hidden_layers", ("mtp.fc.weight",)
    )
    job = job_file(
        model=model, budget={"method": "enp", "retention": "0.5", "align": 4}, output={"layouts": ["uniform", "ragged"]}
    )
    records = tenp_dist.run_job(job, pool=lambda: InProcessPool(cores=1))
    assert [layout["mtp"] for layout in records["write"].summary["layouts"].values()] == ["pruned", "whole"]
    assert "prunes 1 multi-token prediction layers" in " ".join(records["plan"].summary["warnings"])
    cards = [(tmp_path / "run" / "checkpoint" / name / "README.md").read_text() for name in ("uniform", "ragged")]
    assert "by the norms of their weights, without scores" in cards[0] and "were not pruned" in cards[1]
    dropped = job_file(
        model=model,
        budget={"method": "enp", "retention": "0.5", "align": 4},
        output={"layouts": ["uniform", "ragged"], "mtp": "drop"},
    )
    again = tenp_dist.run_job(dropped, pool=lambda: InProcessPool(cores=1), overwrite=True)
    assert [layout["mtp"] for layout in again["write"].summary["layouts"].values()] == ["left out"] * 2
    assert not any("prediction" in warning for warning in again["plan"].summary["warnings"])
    assert "are not in this checkpoint" in (tmp_path / "run" / "checkpoint" / "ragged" / "README.md").read_text()


def test_in_fp8_and_with_files_of_ranks(tiny_model, job_file, tmp_path):
    """Blocks of the prediction layer are read, chosen by what they stand for, cut and encoded like the others."""
    prefix, source = "model.layers.4.", tiny_model("deepseek_v3", "bfloat16")
    model = add_mtp(source, tmp_path / "m", prefix, "num_nextn_predict_layers", (prefix + "enorm.weight",))
    fp8, plain = make_pair(tmp_path, model, powers=True)
    same = [mtp_kept(InProcessPool(), open_source(folder), narrowed(model)) for folder in (fp8, plain)]
    assert same[0].keys() == same[1].keys() == {4}
    assert np.array_equal(same[0][4].indices, same[1][4].indices)
    job = job_file(
        model=fp8,
        budget={"method": "enp", "retention": "0.5", "align": 4},
        output={"layouts": ["uniform", "ragged"], "layout_by": "expert-parallel=2"},
    )
    records = tenp_dist.run_job(job, pool=lambda: InProcessPool(cores=1))
    assert all(layout["ok"] for layout in records["verify"].summary["layouts"].values())
    written = all_tensors(tmp_path / "run" / "checkpoint" / "uniform")
    name = "model.layers.4.mlp.experts.7.up_proj.weight"
    assert written[name].shape == (12, 32) and written[name].dtype == torch.float8_e4m3fn
    assert f"{name}_scale_inv" in written


def drafting(model, folder):
    """A DeepSeek-V3 checkpoint with all that a prediction layer has."""
    folder = add_mtp(model, folder, "model.layers.4.", "num_nextn_predict_layers")
    tensors = {n: t for n, t in all_tensors(folder).items() if n.startswith("model.layers.4.")}
    norm = tensors["model.layers.4.input_layernorm.weight"]
    tensors |= {f"model.layers.4.{name}.weight": norm.clone() for name in ("enorm", "hnorm", "shared_head.norm")}
    tensors["model.layers.4.eh_proj.weight"] = torch.randn(32, 64, generator=torch.Generator().manual_seed(2)) / 8
    save_file(tensors, folder / "mtp.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "mtp.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder
