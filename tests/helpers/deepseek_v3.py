"""DeepSeek-V3 as it is published, 688.57 GB in FP8, in files that take no space: headers are real, data are holes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tenp_dist.checkpoint.entries import TensorHeader
from tenp_dist.checkpoint.index import INDEX_NAME
from tenp_dist.checkpoint.writer import assign_shards, shard_bytes, shard_header

LAYERS, DENSE, EXPERTS, NEURONS, HIDDEN = 61, 3, 256, 2048, 7168
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "num_hidden_layers": LAYERS, "first_k_dense_replace": DENSE, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
    "moe_intermediate_size": NEURONS, "hidden_size": HIDDEN, "intermediate_size": 18432, "vocab_size": 129280,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "num_attention_heads": 128, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                            "weight_block_size": [128, 128]},
}  # fmt: skip
ATTENTION = {
    "q_a_proj": (1536, HIDDEN), "q_b_proj": (24576, 1536), "kv_a_proj_with_mqa": (576, HIDDEN),
    "kv_b_proj": (32768, 512), "o_proj": (HIDDEN, 16384),
}  # fmt: skip


def fp8(name: str, rows: int, columns: int) -> Iterator[TensorHeader]:
    yield TensorHeader(f"{name}.weight", "F8_E4M3", (rows, columns))
    yield TensorHeader(f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128)))


def gated(name: str, neurons: int) -> Iterator[TensorHeader]:
    for matrix in ("gate_proj", "up_proj"):
        yield from fp8(f"{name}.{matrix}", neurons, HIDDEN)
    yield from fp8(f"{name}.down_proj", HIDDEN, neurons)


def layer(number: int) -> Iterator[TensorHeader]:
    prefix = f"model.layers.{number}"
    for name, width in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN),
                        ("self_attn.q_a_layernorm", 1536), ("self_attn.kv_a_layernorm", 512)):  # fmt: skip
        yield TensorHeader(f"{prefix}.{name}.weight", "BF16", (width,))
    for name, shape in ATTENTION.items():
        yield from fp8(f"{prefix}.self_attn.{name}", *shape)
    if number < DENSE:
        yield from gated(f"{prefix}.mlp", 18432)
        return
    yield TensorHeader(f"{prefix}.mlp.gate.weight", "BF16", (EXPERTS, HIDDEN))
    yield TensorHeader(f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (EXPERTS,))
    yield from gated(f"{prefix}.mlp.shared_experts", NEURONS)
    for expert in range(EXPERTS):
        yield from gated(f"{prefix}.mlp.experts.{expert}", NEURONS)


def headers() -> Iterator[TensorHeader]:
    vocabulary = (129280, HIDDEN)
    yield TensorHeader("model.embed_tokens.weight", "BF16", vocabulary)
    for number in range(LAYERS + 1):  # the last one predicts a second token
        yield from layer(number)
    for name, shape in (("eh_proj", (HIDDEN, 2 * HIDDEN)), ("enorm", (HIDDEN,)), ("hnorm", (HIDDEN,)),
                        ("embed_tokens", vocabulary), ("shared_head.head", vocabulary),
                        ("shared_head.norm", (HIDDEN,))):  # fmt: skip
        yield TensorHeader(f"model.layers.{LAYERS}.{name}.weight", "BF16", shape)
    yield TensorHeader("model.norm.weight", "BF16", (HIDDEN,))
    yield TensorHeader("lm_head.weight", "BF16", vocabulary)


def sparse_checkpoint(folder: Path) -> Path:
    """Write it; every number is a hole, zero."""
    shards = assign_shards(list(headers()), 43 * 10**8)
    folder.mkdir()
    for shard in shards:
        with open(folder / shard.file, "wb") as stream:
            stream.write(shard_header(shard))
            stream.truncate(shard_bytes(shard))
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder
