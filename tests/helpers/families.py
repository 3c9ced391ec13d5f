"""A small random model of every family in the table, as transformers saves it; `published.py` has published forms.

A family without an entry here fails the proof of its row: every row of the table is asked for by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.models import COMMON, EXPERTS, LATENT, NEURONS, SETTINGS

GROUPED = {
    "n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "num_hidden_layers": 3, "first_k_dense_replace": 1,
}  # fmt: skip
LINEAR = {
    "num_hidden_layers": 4, "shared_expert_intermediate_size": 16, "head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
ALONE = {"num_hidden_layers": 2, "intermediate_size": NEURONS}
OTHERS: Mapping[str, dict] = {
    "deepseek_v3": SETTINGS["deepseek_v3"] | {"n_group": 2, "topk_group": 1},
    "deepseek_v32": GROUPED | LATENT | {"q_lora_rank": 16, "index_topk": 5, "index_n_heads": 4, "index_head_dim": 16},
    "glm4_moe": GROUPED | {"head_dim": 8},
    "glm4_moe_lite": GROUPED | LATENT | {"q_lora_rank": 16},
    "dots1": GROUPED | {"head_dim": 8},
    "solar_open": GROUPED | {"head_dim": 8},
    "qwen3_next": {"num_experts": EXPERTS, "norm_topk_prob": True} | LINEAR,
    "olmoe": {"num_experts": EXPERTS} | ALONE,
    "flex_olmo": {"num_experts": EXPERTS} | ALONE,
    "mixtral": {"num_local_experts": EXPERTS} | ALONE,
    "minimax_m2": {"num_local_experts": EXPERTS, "head_dim": 8, "rotary_dim": 4} | ALONE,
    "phimoe": {"num_local_experts": EXPERTS} | ALONE,
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
        "num_hidden_layers": 3,
    },
    "glm_moe_dsa": GROUPED | LATENT | {"q_lora_rank": 16, "index_topk": 5, "index_n_heads": 4, "index_head_dim": 16},
    "kimi_linear": LATENT | {
        "num_local_experts": EXPERTS, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "num_hidden_layers": 3,
        "linear_head_dim": 8, "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "bailing_hybrid": LATENT | {key: value for key, value in GROUPED.items() if key != "n_routed_experts"} | {
        "num_experts": EXPERTS, "linear_head_dim": 8, "linear_num_heads": 4, "layer_group_size": 3,
    },
    "axk1": GROUPED | LATENT | {"q_lora_rank": 16},
    "qwen3_5_moe_text": {"num_experts": EXPERTS} | LINEAR,
    "afmoe": {
        "num_experts": EXPERTS, "num_shared_experts": 1, "num_dense_layers": 1, "num_hidden_layers": 4, "head_dim": 8,
        "sliding_window": 8, "global_attn_every_n_layers": 2,
    },
    "exaone_moe": {
        "num_experts": EXPERTS, "num_shared_experts": 1, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 8,
        "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    },
    "hy_v3": {"num_experts": EXPERTS, "num_shared_experts": 1, "num_hidden_layers": 3, "head_dim": 8},
    "cohere2_moe": {
        "num_experts": EXPERTS, "num_shared_experts": 1, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 8,
        "intermediate_size": NEURONS,
    },
    "lfm2_moe": {
        "num_experts": EXPERTS, "num_hidden_layers": 4, "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "jamba": {
        "num_experts": EXPERTS, "num_hidden_layers": 4, "intermediate_size": NEURONS, "mamba_d_state": 4,
        "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "granitemoe": {"num_local_experts": EXPERTS, "residual_multiplier": 0.7, "logits_scaling": 2.0} | ALONE,
    "granitemoeshared": {"num_local_experts": EXPERTS, "shared_intermediate_size": 16} | ALONE,
    "granitemoehybrid": ALONE | {
        "num_local_experts": EXPERTS, "shared_intermediate_size": 16, "mamba_n_heads": 4, "mamba_d_state": 4,
        "mamba_chunk_size": 8, "layer_types": ["linear_attention", "full_attention"],
    },
    "granitemoe_swa": ALONE | {
        "num_local_experts": EXPERTS, "shared_intermediate_size": 16, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "aria_text": {"moe_num_experts": EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 2, "head_dim": 8} | ALONE,
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": 2, "head_dim": 8} | ALONE,
    "mimo_v2_flash": {
        "n_routed_experts": EXPERTS, "n_group": 2, "topk_group": 1, "num_hidden_layers": 3, "head_dim": 8,
        "v_head_dim": 4, "sliding_window": 8, "num_key_value_heads": 2,
        "layer_types": ["full_attention", *["sliding_attention"] * 2],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    },
    "laguna": {
        "num_experts": EXPERTS, "shared_expert_intermediate_size": 16, "num_hidden_layers": 3, "head_dim": 8,
        "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "num_attention_heads_per_layer": [4, 8, 4], "moe_routed_scaling_factor": 2.5,
    },
    "mellum": {
        "num_experts": EXPERTS, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "minimax_m3_vl_text": ALONE | {
        "num_local_experts": EXPERTS, "head_dim": 8, "num_hidden_layers": 3, "dense_intermediate_size": 48,
        "shared_intermediate_size": 16, "index_n_heads": 4, "index_head_dim": 8, "index_block_size": 4,
        "index_topk_blocks": 2, "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    },
    "flint": {
        "num_experts": EXPERTS, "shared_expert_intermediate_size": 16, "num_hidden_layers": 3, "head_dim": 8,
        "sliding_window": 8, "mlp_only_layers": [0],
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "beam": {
        "num_experts": EXPERTS, "num_hidden_layers": 3, "head_dim": 8, "sliding_window": 8, "n_group": 2,
        "topk_group": 1, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "gemma4_text": {
        "num_experts": EXPERTS, "top_k_experts": 2, "enable_moe_block": True, "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0, "head_dim": 8, "global_head_dim": 16, "num_hidden_layers": 2, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"], "final_logit_softcapping": 30.0,
        "attention_k_eq_v": True, "num_key_value_heads": 4, "num_global_key_value_heads": 2,
    },
    "gpt_oss": {
        "num_local_experts": EXPERTS, "head_dim": 8, "sliding_window": 8, "swiglu_limit": 7.0,
    } | ALONE,
    "nemotron_h": {
        "n_routed_experts": EXPERTS, "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
        "moe_shared_expert_intermediate_size": 16, "n_group": 2, "topk_group": 1, "head_dim": 8, "ssm_state_size": 4,
        "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8, "routed_scaling_factor": 2.5,
    },
}  # fmt: skip
"""Settings of the families beside those of `helpers.models`, which the tests of ranks share."""
VISION = {
    "hidden_size": 16, "num_heads": 2, "depth": 1, "intermediate_size": 24, "out_hidden_size": 32, "patch_size": 2,
}  # fmt: skip
TOWERS: Mapping[str, dict] = {
    "minimax_m3_vl": {
        "text_config": OTHERS["minimax_m3_vl_text"],
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "patch_size": 2,
        },
    },
    "gemma4": {
        "text_config": OTHERS["gemma4_text"] | {"use_bidirectional_attention": "vision", "pad_token_id": 0},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "patch_size": 2, "position_embedding_size": 16,
        },
    },
    "qwen3_5_moe": {"text_config": {"num_experts": EXPERTS} | LINEAR, "vision_config": VISION},
    "qwen3_vl_moe": {
        "text_config": {"num_experts": EXPERTS, "head_dim": 8, "num_hidden_layers": 2},
        "vision_config": VISION | {"deepstack_visual_indexes": [0]},
    },
    "glm4v_moe": {
        "text_config": GROUPED | {
            "head_dim": 16, "attention_bias": True,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
            },
        },
        "vision_config": {
            "hidden_size": 16,
            "num_heads": 2,
            "depth": 1,
            "intermediate_size": 24,
            "out_hidden_size": 32,
        },
    },
    "kimi_k25": {
        "text_config": GROUPED | LATENT | {"model_type": "deepseek_v3", "q_lora_rank": 16},
        "vision_config": {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "intermediate_size": 24,
            "patch_size": 2,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
        },
        "projection_hidden_size": 16,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Of those with towers beside their language model: sections of the config."""
MISSAVED = {"kimi_k25": ("language_model.model.blocks.", "language_model.model.layers.")}
"""What transformers 5.23 calls layers that it saves, in no published file, and what they are called there."""
RESIDUAL = {
    "flex_olmo": "mlp", "afmoe": "pre_mlp_layernorm", "cohere2_moe": "input_layernorm", "lfm2_moe": "ffn_norm",
    "jamba": "pre_ff_layernorm", "nemotron_h": "norm", "gemma4": "pre_feedforward_layernorm",
    "gemma4_text": "pre_feedforward_layernorm", "beam": "pre_feedforward_layernorm",
}  # fmt: skip
"""Module whose input is the residual stream before the MoE block, where it is no norm named as usual."""


def save_family(folder: Path, family: str) -> Path:
    """A model of a family with noise on every weight, bias and buffer: a default would hide a tensor left out."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(sum(map(ord, family)))
    if family in TOWERS:
        sections = TOWERS[family] | {"text_config": COMMON | TOWERS[family]["text_config"]}
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **sections))
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(COMMON | (SETTINGS | OTHERS)[family])))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    model.save_pretrained(folder, max_shard_size="100KB")
    if family in MISSAVED:
        renamed(folder, *MISSAVED[family])
    return folder


def renamed(folder: Path, old: str, new: str) -> None:
    """The same files with another beginning of some tensors' names."""
    for file in folder.glob("*.safetensors"):
        save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(old, new))
