"""Small random models that vLLM accepts, and their checkpoints as our writer makes them, ragged and padded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from helpers.checkpoints import all_tensors, change_config, write
from helpers.compressed import BUT_EXPERTS, Form, store
from helpers.fp8 import made
from helpers.served_families import COMMON, HIDDEN, NEURONS, PUBLISHED, PUBLISHED_VECTORS, SETTINGS
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.source import open_source

BLOCK = 128
BIASES = ("e_score_correction_bias", "expert_bias")  # of routers; zero in a new model
# of twelve experts: not multiples of 32 or of two ranks, dropped ones, the full width; a layer without any neuron
WIDTHS = [[256, 50, 50, 64, 0, 33, 256, 96, 160, 64, 0, 1], [50] * 12, [0] * 12]


def make_served(family: str, folder: Path) -> dict[str, Path]:
    """Layout or `source` -> checkpoint folder. The first MoE layer stays whole, the next ones take `WIDTHS` in turn."""
    source = save_source(family, folder / "source")
    for layout in ("ragged", "padded"):
        write(source, served_plan(source), folder / layout, layout, shard_size=10**7)
    return {name: folder / name for name in ("source", "ragged", "padded")}


def served_plan(source: Path, group: int = 1) -> dict[int, KeptNeurons]:
    """`WIDTHS` of every layer but the first; with `group` rounded up to whole groups of that many neurons."""
    layers = open_source(source).facts.moe_layers[1:]
    return {layer: drawn(widths, layer, group) for layer, widths in zip(layers, WIDTHS, strict=False)}


def make_fp8(source: Path, folder: Path) -> dict[str, Path]:
    """`fp8`: ragged with its experts in FP8, as our writer makes it; `values`: the numbers that these stand for."""
    made(source, served_plan(source), folder / "fp8", "ragged", dtype="fp8", shard_size=10**7)
    stored, values = all_tensors(folder / "fp8"), {}
    for name, tensor in stored.items():
        scale = stored.get(f"{name}_scale_inv")
        if scale is not None:
            rows, columns = tensor.shape
            spread = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
            tensor = tensor.float() * spread
        if not name.endswith("_scale_inv"):
            values[name] = tensor
    config = json.loads((folder / "fp8" / "config.json").read_text())
    assert config.pop("quantization_config")["weight_block_size"] == [BLOCK, BLOCK]
    (folder / "values").mkdir()
    (folder / "values" / "config.json").write_text(json.dumps(config))
    save_file(values, folder / "values" / "model.safetensors", metadata={"format": "pt"})
    return {kind: folder / kind for kind in ("values", "fp8")}


# forms of compressed-tensors that are served: layout -> the experts alone are stored, as Kimi-K2-Thinking has it
BY_TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
BY_GROUP = BY_TOKEN | {"strategy": "group", "group_size": BLOCK}
STORED = {
    "int4": Form("group", 4, 32),
    "int4-asymmetric": Form("group", 4, 64, symmetric=False),
    "int4-channel": Form("channel", 4),
    "int8": Form("group", 8, 32),
    "fp8-channel": Form("channel", scale=torch.float32, packed=False, activations=BY_TOKEN),
    "fp8-block": Form("block", group=(BLOCK, BLOCK), scale=torch.float32, packed=False, activations=BY_GROUP),
}


# name -> layout, and whether neurons stay in whole groups: ragged and padded stand for the same numbers then
WRITTEN = {"ragged": ("ragged", False), "ragged whole": ("ragged", True), "padded whole": ("padded", True)}


def make_stored(source: Path, folder: Path, form: Form, names: Iterable[str] = WRITTEN) -> dict[str, Path]:
    """Checkpoints of a source whose experts are stored in a form of compressed-tensors, written back in that form."""
    shutil.copytree(source, folder / "source")
    store(folder / "source", form, BUT_EXPERTS)
    group = form.group if form.strategy == "group" else BLOCK if form.strategy == "block" else 1
    for name in names:
        layout, whole = WRITTEN[name]
        made(folder / "source", served_plan(source, group if whole else 1), folder / name, layout, shard_size=10**7)
    return {name: folder / name for name in names}


@torch.inference_mode()
def by_transformers(folder: Path, prompts: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of all tokens of the prompts but the first ones, in float32."""
    from transformers import AutoModelForCausalLM

    import tenp_dist  # noqa: F401  ragged checkpoints load

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logprobs = model(prompts).logits[:, :-1].log_softmax(-1)
    return logprobs.gather(2, prompts[:, 1:, None]).flatten()


def damage(ragged: Path, folder: Path, change=lambda tensors: None, **config) -> Path:
    """A copy of a checkpoint with other tensors and other keys in config.json."""
    tensors = all_tensors(ragged)
    change(tensors)
    folder.mkdir()
    (folder / "config.json").write_text((ragged / "config.json").read_text())
    change_config(folder, **config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def drawn(widths: list[int], seed: int, group: int = 1) -> KeptNeurons:
    """Neurons drawn at random for every expert of a layer, `group` consecutive ones at a time."""
    generator, mask = np.random.default_rng(seed), np.zeros((len(widths), NEURONS), dtype=bool)
    for expert, width in enumerate(widths):
        groups = generator.permutation(NEURONS // group)[: -(-width // group)]
        mask[expert].reshape(-1, group)[groups] = True
    return KeptNeurons.from_mask(mask)


def save_source(family: str, folder: Path) -> Path:
    """A random model in float32; DeepSeek-V3 with a layer for multi-token prediction."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(len(family))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON | SETTINGS[family]))
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith(BIASES):
            tensor.detach().normal_(std=0.1)
    model.save_pretrained(folder)
    change_config(folder, **PUBLISHED.get(family, {}))
    _add_tensors(folder, {name: torch.ones(HIDDEN) for name in PUBLISHED_VECTORS.get(family, ())})
    if family == "deepseek_v3":
        _add_mtp_layer(folder, model.config.num_hidden_layers)
    return folder


def _add_tensors(folder: Path, added: dict[str, torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | added, file, metadata={"format": "pt"})


def _add_mtp_layer(folder: Path, layer: int) -> None:
    tensors = load_file(folder / "model.safetensors")
    last, new = f"model.layers.{layer - 1}.", f"model.layers.{layer}."
    added = {name.replace(last, new): torch.randn_like(t) * 0.1 for name, t in tensors.items() if last in name}
    ones = torch.ones(HIDDEN)
    added |= {f"{new}{name}.weight": ones.clone() for name in ("enorm", "hnorm", "shared_head.norm")}
    added[f"{new}eh_proj.weight"] = torch.randn(HIDDEN, 2 * HIDDEN) * 0.1
    added[f"{new}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    added[f"{new}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    _add_tensors(folder, added)
