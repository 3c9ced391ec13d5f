"""Saved models of families in the form of their published files: older configs, other tensors, prediction layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers.checkpoints import all_tensors, change_config
from helpers.families import TOWERS
from helpers.models import EXPERTS
from tenp_dist.checkpoint.index import INDEX_NAME


def published(folder: Path, target: Path, family: str) -> Path:
    """A copy of a saved model as its published files are: an older config, and prediction layers where there are."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    if family in TOWERS:
        config["text_config"]["dtype"] = config.pop("dtype")
        (target / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "a.B"}}))
        PUBLISHED.get(family, lambda folder, config: None)(target, config)
        return target
    rope = config.get("rope_parameters") or {}
    if not any(isinstance(value, dict) for value in rope.values()):  # of types of layers: younger than the old keys
        config.pop("rope_parameters", None)
        config |= {"rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": None}
    config |= {"torch_dtype": config.pop("dtype", "float32"), "eos_token_id": [1, 2], "auto_map": {"AutoConfig": "a.B"}}
    config.pop("tie_word_embeddings", None)  # left to the family's default, as many published configs leave it
    config |= {key: rope[key] for key in ("partial_rotary_factor",) if key in rope}
    (target / "config.json").write_text(json.dumps(config))
    PUBLISHED.get(family, lambda folder, config: None)(target, config)
    return target


def _add(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, folder / "extra.safetensors", {"format": "pt"}
    )
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "extra.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps(index))


def _numbered_mtp(folder: Path, config: Mapping) -> None:
    """DeepSeek-V3, V3.2 and GLM: one prediction layer, numbered behind the decoder's, with embedding and head."""
    tensors, last = all_tensors(folder), config["num_hidden_layers"]
    copied = {n: t for n, t in tensors.items() if n.startswith(f"model.layers.{last - 1}.")}
    extra = {n.replace(f"layers.{last - 1}.", f"layers.{last}."): t for n, t in copied.items()}
    prefix = f"model.layers.{last}."
    extra |= {prefix + name: torch.randn(32) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    extra |= {prefix + "eh_proj.weight": torch.randn(32, 64), prefix + "embed_tokens.weight": torch.randn(320, 32)}
    _add(folder, extra)
    change_config(folder, num_nextn_predict_layers=1)


def _named_mtp(folder: Path, config: Mapping) -> None:
    """Qwen3-Next and EXAONE: prediction layers under names of their own, with all experts."""
    tensors = {n: t for n, t in all_tensors(folder).items() if n.startswith("model.layers.3.")}
    extra = {n.replace("model.layers.3.", "mtp.layers.0."): t for n, t in tensors.items()}
    _add(folder, extra | {"mtp.fc.weight": torch.randn(32, 64), "mtp.norm.weight": torch.randn(32)})


def _qwen3_next(folder: Path, config: Mapping) -> None:
    _named_mtp(folder, config)
    values = json.loads((folder / "config.json").read_text()) | {"full_attention_interval": 4}
    del values["layer_types"]
    (folder / "config.json").write_text(json.dumps(values))


def _ernie(folder: Path, config: Mapping) -> None:
    _add(
        folder, {"model.mtp_emb_norm.0.weight": torch.randn(32), "model.mtp_linear_proj.0.weight": torch.randn(32, 64)}
    )


def _rewritten(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """The same folder with other tensors."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": {}}))
    _add(folder, tensors)


def _qwen3_5(folder: Path, config: Mapping) -> None:
    """Qwen3.5: experts fused, those of the prediction layer apart."""
    tensors = all_tensors(folder)
    for layer in range(4):
        prefix = f"model.language_model.layers.{layer}.mlp.experts."
        held = [
            [tensors.pop(f"{prefix}{e}.{name}_proj.weight") for e in range(EXPERTS)] for name in ("gate", "up", "down")
        ]
        if layer == 3:
            extra = {
                f"{e}.{n}_proj.weight": t[e]
                for n, t in zip(("gate", "up", "down"), held, strict=True)
                for e in range(8)
            }
            tensors |= {f"mtp.layers.0.mlp.experts.{name}": tensor for name, tensor in extra.items()}
        gate, up, down = map(torch.stack, held)
        tensors |= {f"{prefix}gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}down_proj": down}
    rest = {n: t for n, t in tensors.items() if "language_model.layers.3." in n and "experts" not in n}
    tensors |= {n.replace("model.language_model.layers.3.", "mtp.layers.0."): t for n, t in rest.items()}
    _rewritten(folder, tensors | {"mtp.fc.weight": torch.randn(32, 64), "mtp.norm.weight": torch.randn(32)})
    change_config(folder, text_config=config["text_config"] | {"mtp_num_hidden_layers": 1})


def _qwen3_vl(folder: Path, config: Mapping) -> None:
    """Qwen3-VL: experts fused, and transposed."""
    tensors = all_tensors(folder)
    _rewritten(folder, {n: t.mT.contiguous() if ".mlp.experts." in n else t for n, t in tensors.items()})


def _mimo(folder: Path, config: Mapping) -> None:
    """MiMo-V2-Flash: a dense prediction layer under a prefix of its own."""
    tensors = {n: t for n, t in all_tensors(folder).items() if n.startswith("model.layers.0.")}
    extra = {n.replace("model.layers.0.", "model.mtp.layers.0."): t for n, t in tensors.items()}
    _add(folder, extra | {"model.mtp.layers.0.eh_proj.weight": torch.randn(32, 64)})


def _kimi_k25(folder: Path, config: Mapping) -> None:
    """Kimi-K2.5: what joins the towers under names that transformers reads and does not write."""
    others = {"model.mm_projector.": "mm_projector.", "vision_tower.encoder.patch_embed.": "vision_tower.patch_embed."}
    tensors = all_tensors(folder)
    for old, new in others.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    _rewritten(folder, tensors)


def _nemotron(folder: Path, config: Mapping) -> None:
    """Nemotron 3: the kinds of layers as a word, and their number."""
    values = json.loads((folder / "config.json").read_text())
    letters = {"linear_attention": "M", "moe": "E", "full_attention": "*", "mlp": "-"}
    word = "".join(letters[kind] for kind in values.pop("layers_block_type"))
    values |= {"hybrid_override_pattern": word, "num_hidden_layers": len(word)}
    (folder / "config.json").write_text(json.dumps(values))


def _kimi_linear(folder: Path, config: Mapping) -> None:
    """Dense layers keep their own name in the published files, and the kinds of attention are counted from 1."""
    tensors = {
        name.replace("layers.0.block_sparse_moe.", "layers.0.mlp."): tensor.clone()
        for name, tensor in all_tensors(folder).items()
    }
    _rewritten(folder, tensors)
    gone = ("layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim")
    values = {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key not in gone}
    linear = {"full_attn_layers": [2], "kda_layers": [1, 3], "head_dim": 8, "num_heads": 4, "short_conv_kernel_size": 4}
    values |= {"linear_attn_config": linear, "first_k_dense_replace": 1}
    (folder / "config.json").write_text(json.dumps(values))


PUBLISHED: Mapping[str, Callable[[Path, Mapping], None]] = {
    "deepseek_v3": _numbered_mtp,
    "deepseek_v32": _numbered_mtp,
    "glm_moe_dsa": _numbered_mtp,
    "glm4_moe": _numbered_mtp,
    "glm4_moe_lite": _numbered_mtp,
    "hy_v3": _numbered_mtp,
    "bailing_hybrid": _numbered_mtp,
    "kimi_k25": _kimi_k25,
    "mimo_v2_flash": _mimo,
    "kimi_linear": _kimi_linear,
    "qwen3_next": _qwen3_next,
    "qwen3_5_moe_text": _named_mtp,
    "exaone_moe": _named_mtp,
    "qwen3_5_moe": _qwen3_5,
    "qwen3_vl_moe": _qwen3_vl,
    "nemotron_h": _nemotron,
    "hunyuan_v1_moe": lambda folder, config: change_config(folder, moe_topk=[2] * config["num_hidden_layers"]),
    "ernie4_5_moe": _ernie,
    "minimax_m2": lambda folder, config: change_config(folder, num_mtp_modules=3, use_mtp=True),  # no tensors of it
}
