"""A checkpoint of a published model at its true size that takes nearly no space: headers are real, data are holes.

    python scripts/make_sparse_checkpoint.py --like deepseek-v3 OUT

Names, shapes, dtypes and layers for multi-token prediction are those of the published files, every weight is zero and
every factor of FP8 one (a few hundred megabytes of DeepSeek-V3's 689 GB). `tenp-dist inspect`, `estimate`, `plan
--synthetic-scores` and `write --dry-run` run on it.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tenp_dist.checkpoint.entries import TensorHeader
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import Family
from tenp_dist.checkpoint.families.table import family_and_config, stock_config
from tenp_dist.checkpoint.writer import assign_shards, finish_checkpoint, shard_bytes, shard_header

BLOCK = 128
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
ENCODED = re.compile(r"\.layers\.\d+\..*(?<!\.eh)_proj(_with_mqa)?\.weight$")
FACTORS, ONE = "_scale_inv", struct.pack("<f", 1.0)
FLOAT32 = re.compile(r"\.e_score_correction_bias$")

_LATENT = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "quantization_config": FP8,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    # https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json
    "deepseek-v3": _LATENT | {
        "architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": 3, "n_routed_experts": 256, "n_group": 8,
        "topk_group": 4, "num_attention_heads": 128, "num_key_value_heads": 128, "routed_scaling_factor": 2.5,
        "vocab_size": 129280, "max_position_embeddings": 163840, "num_nextn_predict_layers": 1,
    },
    # https://huggingface.co/moonshotai/Kimi-K2-Instruct/blob/main/config.json
    "kimi-k2": _LATENT | {
        "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": 1,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "num_attention_heads": 64, "num_key_value_heads": 64,
        "routed_scaling_factor": 2.827, "rope_theta": 50000.0, "vocab_size": 163840, "max_position_embeddings": 131072,
        "num_nextn_predict_layers": 0,
    },
    # https://huggingface.co/Qwen/Qwen3-235B-A22B/blob/main/config.json
    "qwen3-235b": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 94,
        "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6, "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    # https://huggingface.co/zai-org/GLM-4.5/blob/main/config.json
    "glm-4.5": {
        "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "num_hidden_layers": 92,
        "first_k_dense_replace": 3, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "n_routed_experts": 160, "n_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": True, "n_group": 1,
        "topk_group": 1, "routed_scaling_factor": 2.5, "num_attention_heads": 96, "num_key_value_heads": 8,
        "head_dim": 128, "attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.5,
        "rope_theta": 1000000, "rms_norm_eps": 1e-5, "vocab_size": 151552, "max_position_embeddings": 131072,
        "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """What its config says of a checkpoint's tensors. family, known: its row, and the config as that knows it."""

    config: dict[str, Any]
    family: Family
    known: Mapping[str, Any]

    def headers(self) -> Iterator[TensorHeader]:
        """Every tensor as published, decoder first, prediction layers behind it."""
        plain = dict(self.parameters())
        for name, shape in (plain | dict(self.prediction(plain))).items():
            yield from self.stored(name, shape)

    def stored(self, name: str, shape: tuple[int, ...]) -> Iterator[TensorHeader]:
        """A parameter as it lies in the file, with its factors where the checkpoint is in FP8."""
        if "quantization_config" in self.config and len(shape) == 2 and ENCODED.search(name):
            yield TensorHeader(name, "F8_E4M3", shape)
            yield TensorHeader(f"{name}{FACTORS}", "F32", tuple(-(-size // BLOCK) for size in shape))
        else:
            yield TensorHeader(name, "F32" if FLOAT32.search(name) else "BF16", shape)

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of the decoder's parameters, every expert's matrices apart."""
        import torch

        from tenp_dist.model.stock import build_model

        model = build_model(self.known, torch.bfloat16, "eager")
        for name, value in model.state_dict().items():
            inside, fused = re.match(r".*\.layers\.(\d+)\.(.*)", name), f"{self.family.experts}.gate_up_proj"
            if inside and inside[2] == fused:
                experts, neurons, hidden = value.shape
                for _, matrix, place in ExpertSlices(self.family).of_layer(int(inside[1]), range(experts)):
                    yield place.tensor, (hidden, neurons // 2) if matrix == "down" else (neurons // 2, hidden)
            elif not (inside and inside[2] == f"{self.family.experts}.down_proj"):
                yield name, tuple(value.shape)

    def prediction(self, decoder: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The layers behind the last one: its tensors again, and what joins two embeddings and predicts."""
        last, hidden = self.config["num_hidden_layers"] - 1, self.config["hidden_size"]
        vocabulary = (self.config["vocab_size"], hidden)
        for number in range(last + 1, last + 1 + self.config.get("num_nextn_predict_layers", 0)):
            old, new = self.family.layer.format(layer=last), self.family.layer.format(layer=number)
            yield from ((new + name.removeprefix(old), s) for name, s in decoder.items() if name.startswith(old))
            yield f"{new}eh_proj.weight", (hidden, 2 * hidden)
            yield from ((f"{new}{name}.weight", (hidden,)) for name in ("enorm", "hnorm", "shared_head.norm"))
            yield from ((f"{new}{name}.weight", vocabulary) for name in ("embed_tokens", "shared_head.head"))


def write_sparse(like: str, folder: Path, shard_size: int = 43 * 10**8) -> Path:
    """Write the files. like: a key of CONFIGS."""
    config = CONFIGS[like]
    shards = assign_shards(list(Model(config, *family_and_config(stock_config(config))).headers()), shard_size)
    folder.mkdir(parents=True)
    for shard in shards:
        with open(folder / shard.file, "wb") as stream:
            stream.write(shard_header(shard))
            for tensor in shard.tensors:
                if tensor.name.endswith(FACTORS):
                    stream.write(ONE * (tensor.nbytes // len(ONE)))
                else:
                    stream.seek(tensor.nbytes, os.SEEK_CUR)
            stream.truncate(shard_bytes(shard))
    finish_checkpoint(folder, shards, config, {})
    return folder


@click.command(help=__doc__)
@click.option("--like", type=click.Choice(sorted(CONFIGS)), required=True, help="The published model.")
@click.argument("out", type=click.Path(path_type=Path))
def main(like: str, out: Path) -> None:
    files = sorted(write_sparse(like, out).glob("*.safetensors"))
    size, used = (sum(getattr(file.stat(), of) for file in files) for of in ("st_size", "st_blocks"))
    click.echo(f"{out}: {len(files)} files, {size:,} bytes, of which {512 * used:,} on the disk")


if __name__ == "__main__":
    main()
