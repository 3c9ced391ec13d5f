"""Settings of small random models that vLLM accepts, one of each family that the plugin serves."""

from __future__ import annotations

from collections.abc import Mapping

NEURONS, VOCABULARY, HIDDEN, EXPERTS = 256, 512, 128, 12
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 192,
    "moe_intermediate_size": NEURONS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# latent attention in vLLM wants these two sizes
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "q_lora_rank": None, "qk_nope_head_dim": 64, "v_head_dim": 64}
GROUPED = {
    "num_hidden_layers": 4, "first_k_dense_replace": 1, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
    "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
}  # fmt: skip
ALONE = {"num_hidden_layers": 3, "intermediate_size": NEURONS}
SETTINGS: Mapping[str, dict] = {
    "deepseek_v3": LATENT | GROUPED,
    "qwen3_moe": {"num_hidden_layers": 4, "num_experts": EXPERTS, "norm_topk_prob": True, "head_dim": 64},
    "qwen2_moe": {"num_hidden_layers": 3, "num_experts": EXPERTS, "shared_expert_intermediate_size": 96},
    "deepseek_v2": LATENT | GROUPED | {
        "num_hidden_layers": 3, "n_shared_experts": 2, "norm_topk_prob": False, "topk_method": "group_limited_greedy",
    },
    "afmoe": {
        "num_experts": EXPERTS, "num_shared_experts": 1, "num_dense_layers": 1, "num_hidden_layers": 4, "head_dim": 64,
        "sliding_window": 8, "global_attn_every_n_layers": 2,
    },
    "axk1": LATENT | GROUPED | {"q_lora_rank": 32},
    "cohere2_moe": ALONE | {
        "num_experts": EXPERTS, "num_shared_experts": 1, "num_hidden_layers": 4, "head_dim": 64, "sliding_window": 8,
    },
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS, "moe_k": 4, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
        "num_hidden_layers": 4,
    },
    "exaone_moe": {
        "num_experts": EXPERTS, "num_shared_experts": 1, "num_hidden_layers": 4, "head_dim": 64, "sliding_window": 8,
        "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
    },
    "glm4_moe": GROUPED | {"head_dim": 64},
    "glm4_moe_lite": LATENT | GROUPED | {"q_lora_rank": 32},
    "granitemoe": ALONE | {"num_local_experts": EXPERTS, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "granitemoe_swa": ALONE | {
        "num_local_experts": EXPERTS, "shared_intermediate_size": 96, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "granitemoehybrid": ALONE | {
        "num_local_experts": EXPERTS, "shared_intermediate_size": 96, "mamba_n_heads": 4, "mamba_d_state": 16,
        "mamba_chunk_size": 8, "layer_types": ["linear_attention", "full_attention", "full_attention"],
    },
    "granitemoeshared": ALONE | {"num_local_experts": EXPERTS, "shared_intermediate_size": 96},
    "hy_v3": {"num_experts": EXPERTS, "num_shared_experts": 1, "num_hidden_layers": 4, "head_dim": 64},
    "lfm2_moe": {
        "num_experts": EXPERTS, "num_hidden_layers": 4, "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "mimo_v2_flash": {
        "n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2, "num_hidden_layers": 4, "head_dim": 64,
        "v_head_dim": 64, "sliding_window": 8, "num_attention_heads": 4, "num_key_value_heads": 1,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    },
    "minimax_m2": ALONE | {"num_local_experts": EXPERTS, "head_dim": 64, "rotary_dim": 32},
    "mixtral": ALONE | {"num_local_experts": EXPERTS},
    "olmoe": ALONE | {"num_experts": EXPERTS},
    "phimoe": ALONE | {
        "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True,
    },
}  # fmt: skip
# what configs on the Hub say, vLLM reads and transformers does not save
PUBLISHED: Mapping[str, dict] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 1},
    "hy_v3": {
        "expert_hidden_dim": NEURONS, "first_k_dense_replace": 1, "moe_router_use_sigmoid": True, "qk_norm": True,
        "route_norm": True,
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1], "moe_layer_freq": [0, 1, 1, 1], "layernorm_epsilon": 1e-5,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 64, "swa_v_head_dim": 64,
        "sliding_window_size": 8, "add_swa_attention_sink_bias": True, "rope_theta": 5e6,
        "swa_rope_theta": 1e4, "partial_rotary_factor": 0.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    },
    "minimax_m2": {"scoring_func": "softmax", "use_routing_bias": True},  # sigmoid there: vLLM's CPU router lacks it
    "phimoe": {"architectures": ["PhiMoEForCausalLM"]},
}  # fmt: skip
# vectors of `HIDDEN` ones that files on the Hub hold, vLLM loads and transformers does not save
PUBLISHED_VECTORS: Mapping[str, tuple[str, ...]] = {"axk1": ("model.layers.0.post_mlp_layernorm.weight",)}
