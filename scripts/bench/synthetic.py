"""Write a random DeepSeek-V3-style checkpoint of any size, tensor by tensor.

Never in memory as a whole: names and shapes are known first, each tensor is drawn when its turn comes.
The tokenizer and the rest of the config are those of the bundled quickstart model. Weights are normal with
variance 1 / fan-in, those that add to the residual stream smaller, so that activations stay of order one.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from tenp_dist.artifacts import atomic_write, read_json, write_json
from tenp_dist.checkpoint.entries import TensorHeader
from tenp_dist.checkpoint.index import INDEX_NAME
from tenp_dist.checkpoint.writer import OutputShard, assign_shards, shard_header

BUNDLED = Path(__file__).resolve().parents[2] / "jobs/quickstart/moe-4m"
MEGABYTE = 10**6


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the model. layers: MoE layers, behind one dense layer."""

    hidden: int = 1024
    layers: int = 12
    experts: int = 64
    neurons: int = 512
    top_k: int = 4
    heads: int = 16
    head_dim: int = 64
    rope_dim: int = 32
    kv_rank: int = 256

    def config(self) -> dict:
        return read_json(BUNDLED / "config.json") | {
            "hidden_size": self.hidden,
            "intermediate_size": 4 * self.hidden,
            "moe_intermediate_size": self.neurons,
            "n_routed_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers + 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "kv_lora_rank": self.kv_rank,
            "head_dim": self.rope_dim,
            "qk_nope_head_dim": self.head_dim,
            "qk_rope_head_dim": self.rope_dim,
            "qk_head_dim": self.head_dim + self.rope_dim,
            "v_head_dim": self.head_dim,
            "max_position_embeddings": 4096,
        }

    def tensors(self) -> Iterator[TensorHeader]:
        """Names and shapes, in the order of the layers."""
        vocabulary = read_json(BUNDLED / "config.json")["vocab_size"]
        yield bf16("model.embed_tokens.weight", vocabulary, self.hidden)
        for layer in range(self.layers + 1):
            yield from self._layer(f"model.layers.{layer}.", dense=layer == 0)
        yield bf16("model.norm.weight", self.hidden)
        yield bf16("lm_head.weight", vocabulary, self.hidden)

    def _layer(self, prefix: str, *, dense: bool) -> Iterator[TensorHeader]:
        attention, hidden = f"{prefix}self_attn.", self.hidden
        yield bf16(f"{prefix}input_layernorm.weight", hidden)
        yield bf16(f"{attention}q_proj.weight", self.heads * (self.head_dim + self.rope_dim), hidden)
        yield bf16(f"{attention}kv_a_proj_with_mqa.weight", self.kv_rank + self.rope_dim, hidden)
        yield bf16(f"{attention}kv_a_layernorm.weight", self.kv_rank)
        yield bf16(f"{attention}kv_b_proj.weight", self.heads * 2 * self.head_dim, self.kv_rank)
        yield bf16(f"{attention}o_proj.weight", hidden, self.heads * self.head_dim)
        yield bf16(f"{prefix}post_attention_layernorm.weight", hidden)
        if dense:
            yield from self._mlp(f"{prefix}mlp.", 4 * hidden)
            return
        yield bf16(f"{prefix}mlp.gate.weight", self.experts, hidden)
        yield TensorHeader(f"{prefix}mlp.gate.e_score_correction_bias", "F32", (self.experts,))
        yield from self._mlp(f"{prefix}mlp.shared_experts.", self.neurons)
        for expert in range(self.experts):
            yield from self._mlp(f"{prefix}mlp.experts.{expert}.", self.neurons)

    def _mlp(self, prefix: str, neurons: int) -> Iterator[TensorHeader]:
        yield bf16(f"{prefix}gate_proj.weight", neurons, self.hidden)
        yield bf16(f"{prefix}up_proj.weight", neurons, self.hidden)
        yield bf16(f"{prefix}down_proj.weight", self.hidden, neurons)


def bf16(name: str, *shape: int) -> TensorHeader:
    return TensorHeader(name, "BF16", shape)


def draw(tensor: TensorHeader, generator: torch.Generator) -> torch.Tensor:
    if tensor.name.endswith("norm.weight"):
        return torch.ones(tensor.shape, dtype=torch.bfloat16)
    if tensor.dtype == "F32":
        return torch.zeros(tensor.shape)
    deviation = 1.0 if "embed_tokens" in tensor.name else tensor.shape[1] ** -0.5
    if tensor.name.endswith(("o_proj.weight", "down_proj.weight")):
        deviation /= 2
    return (torch.randn(tensor.shape, generator=generator) * deviation).bfloat16()


def write_synthetic(folder: Path, shape: Shape, shard_size: int = 500 * MEGABYTE) -> int:
    """Write the checkpoint; returns the bytes of its tensors."""
    generator = torch.Generator().manual_seed(0)
    shards = assign_shards(list(shape.tensors()), shard_size)
    for shard in shards:
        write_random_shard(folder, shard, generator)
    total = sum(shard.nbytes for shard in shards)
    files = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": files})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(BUNDLED / name, folder / name)
    write_json(folder / "config.json", shape.config())
    return total


def write_random_shard(folder: Path, shard: OutputShard, generator: torch.Generator) -> None:
    with atomic_write(folder / shard.file) as stream:
        stream.write(shard_header(shard))
        for tensor in shard.tensors:
            stream.write(draw(tensor, generator).view(torch.uint8).numpy())


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--hidden", default=Shape.hidden, show_default=True)
@click.option("--layers", default=Shape.layers, show_default=True, help="MoE layers, behind one dense layer")
@click.option("--experts", default=Shape.experts, show_default=True, help="routed experts per layer")
@click.option("--neurons", default=Shape.neurons, show_default=True, help="intermediate size of an expert")
@click.option("--top-k", default=Shape.top_k, show_default=True, help="experts per token")
@click.option("--shard-mb", default=500, show_default=True, help="largest file")
def main(folder, shard_mb, **sizes):
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty")
    started = time.perf_counter()
    total = write_synthetic(folder, Shape(**sizes), shard_mb * MEGABYTE)
    click.echo(f"{folder}: {total / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
