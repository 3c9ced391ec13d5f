"""Small models of every family with pruned neurons: masked, and as a ragged folder cut by hand."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tenp_dist.runtime.auto_classes import modeling_source
from tenp_dist.runtime.ragged_config import ragged_config

EXPERTS, NEURONS, VOCABULARY = 8, 24, 64
# per MoE layer: three widths of which one is not a multiple of 8 and one is full; one width; not pruned
WIDTHS = [[24, 8, 13, 8, 8, 24, 8, 13], [16] * EXPERTS, None]
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": NEURONS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
SETTINGS = {
    "deepseek_v2": {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 4,
        "topk_method": "group_limited_greedy",
        **LATENT,
        **GROUPS,
    },
    "deepseek_v3": {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "first_k_dense_replace": 0,
        "num_hidden_layers": 3,
        "norm_topk_prob": True,
        **LATENT,
        **GROUPS,
    },
    "qwen2_moe": {"num_experts": EXPERTS, "shared_expert_intermediate_size": 40, "num_hidden_layers": 3},
    "qwen3_moe": {"num_experts": EXPERTS, "norm_topk_prob": True, "num_hidden_layers": 3, "head_dim": 8},
}
TOKENS = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Case:
    """One family: its ragged folder, the widths in it, and the masked stock model."""

    family: str
    source: Path
    folder: Path
    widths: dict[int, list[int]]
    masked: torch.nn.Module


def auto_load(folder, **kwargs):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def stock_model(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(len(family))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON, **SETTINGS[family])).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    return model


def kept_neurons(model):
    """Decoder layer -> sorted neurons kept per expert, at random."""
    layers = [index for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    return {
        layer: [torch.randperm(NEURONS)[:width].sort().values for width in widths]
        for layer, widths in zip(layers, WIDTHS, strict=True)
        if widths is not None
    }


def mask(model, kept):
    for layer, neurons in kept.items():
        down_EDF = model.model.layers[layer].mlp.experts.down_proj.data
        for expert, indices in enumerate(neurons):
            pruned = torch.ones(NEURONS, dtype=torch.bool)
            pruned[indices] = False
            down_EDF[expert][:, pruned] = 0


def cut_folder(source, folder, family, kept):
    """A ragged folder: the contract of the writer, in its simplest form."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    for layer, neurons in kept.items():
        for expert, indices in enumerate(neurons):
            for matrix, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"
                tensors[name] = tensors[name].index_select(axis, indices).contiguous()
    widths = {layer: [len(indices) for indices in neurons] for layer, neurons in kept.items()}
    config = json.loads((source / "config.json").read_text())
    config = ragged_config(config, widths_by_layer=widths, retention="0.6", fingerprint="f" * 64)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / f"modeling_tenp_{family}.py").write_text(modeling_source(family))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return widths


def make_case(family, root):
    model = stock_model(family)
    model.save_pretrained(root / "source")
    kept = kept_neurons(model)
    widths = cut_folder(root / "source", root / "ragged", family, kept)
    mask(model, kept)
    return Case(family, root / "source", root / "ragged", widths, model)


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def same_tensors(one, other):
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def break_folder(case, target, change):
    target.mkdir()
    for file in case.folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(case.folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def drop_expert(tensors):
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        del tensors[f"model.layers.1.mlp.experts.7.{matrix}.weight"]
