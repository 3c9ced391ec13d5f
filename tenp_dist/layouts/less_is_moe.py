"""The `less_is_moe` layout: ragged experts in the form that another project's vLLM plugin and Triton kernels read.

Its documentation: docs/RAGGED_EXPERTS.md of github.com/HectorHHZ/Less-is-MoE (arXiv 2606.05538), format version 1. Each
MoE layer has two flat tensors in place of its experts', which lie one after another in the order of their ids:

    mlp.experts.gate_up_proj   every expert's [2 width, D], gate rows first
    mlp.experts.down_proj      every expert's [D, width]

Router and ids stay, an expert may have width 0, and config.json has the widths of every layer under `less_is_moe`. The
`model_type` stays the source's: stock transformers refuses the flat tensors for their shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenp_dist.checkpoint.entries import ITEM_SIZE
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import DOWN, GATE, NEURON_AXIS, UP
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.recipes import Copy, Cut, Inputs, OutputTensor, Recipe
from tenp_dist.checkpoint.source import Source
from tenp_dist.config import Job
from tenp_dist.errors import SourceError, UnsupportedModelError
from tenp_dist.layouts.base import Layout, OutputSizes, Pruned, with_length

FORMAT_VERSION = 1
WEIGHT_LAYOUT = "flat_gate_up_down_v1"
ARCHITECTURES = {
    "qwen2_moe": "RaggedQwen2MoeForCausalLM",
    "olmoe": "RaggedOlmoeForCausalLM",
    "qwen3_moe": "RaggedQwen3MoeForCausalLM",
    "qwen3_5_moe_text": "RaggedQwen3_5MoeForCausalLM",
}
"""model_type -> the plugin's architecture, for the families of this format version."""
FLAT = {"gate_up_proj": (GATE, UP), "down_proj": (DOWN,)}
"""Flat tensor -> an expert's matrices in it."""


class LessIsMoe(Layout):
    name = "less_is_moe"
    sentence = (
        "Every expert is stored at its own width, the experts of a layer one after another in two flat tensors, as the "
        "vLLM plugin of Less-is-MoE (arXiv 2606.05538) reads them."
    )
    how_to_load = (
        "Install that project and vLLM 0.29.0 on a machine with a GPU, then "
        "`VLLM_PLUGINS=less_is_moe_ragged vllm serve path/to/this/folder --dtype bfloat16 --enforce-eager`. No other "
        "engine reads this layout, and stock transformers refuses it. tenp-dist checked every byte against the source, "
        "not what the plugin computes."
    )
    readable = False
    experts_apart = False
    plain_only = True

    def check_source(self, source: Source) -> None:
        facts, text = source.facts, source.family.text(source.index.config)
        activation = text.get("hidden_act", "silu")
        findings = (
            (facts.family not in ARCHITECTURES, f"family {facts.family}", f"one of {', '.join(ARCHITECTURES)}"),
            (activation != "silu", f"activation {activation}", "silu"),
            (facts.moe_layers != tuple(range(facts.num_layers)), "layers without experts", "experts in every layer"),
            (bool(facts.mtp_layers), "multi-token prediction layers", "none: set output.mtp to drop"),
        )
        for wrong, found, wanted in findings:
            if wrong:
                raise UnsupportedModelError(
                    "The less_is_moe layout has no place for this model",
                    where="output.layouts",
                    found=found,
                    wanted=wanted,
                    next_step="use layout ragged, padded or uniform",
                )

    def tensors(self, pruned: Pruned) -> list[OutputTensor]:
        source, slices = pruned.source, ExpertSlices(pruned.source.family)
        flat: dict[str, list[OutputTensor]] = {}  # name of the tensor in whose place they go
        absent: set[str] = set()
        for layer, neurons in pruned.kept.items():
            names = [place.tensor for _, _, place in slices.of_layer(layer, range(neurons.num_experts))]
            absent.update(names)
            flat[names[0]] = list(_flat_tensors(source, layer, neurons))
        written: list[OutputTensor] = []
        for name, entry in source.index.tensors.items():
            copied = [] if name in absent else [OutputTensor(name, Copy(name, entry.dtype, entry.shape))]
            written += flat.get(name, copied)
        return written

    def config(self, pruned: Pruned) -> Mapping[str, Any]:
        widths = {str(layer): neurons.widths.tolist() for layer, neurons in sorted(pruned.kept.items())}
        return {
            **pruned.source.index.config,
            "architectures": [ARCHITECTURES[pruned.source.facts.family]],
            "less_is_moe": {
                "format_version": FORMAT_VERSION,
                "weight_layout": WEIGHT_LAYOUT,
                "expert_intermediate_sizes": widths,
            },
        }

    def nbytes(self, sizes: OutputSizes, job: Job) -> int:
        return sizes.total - sizes.dropped(job)


@dataclass(frozen=True)
class Flat(Recipe):
    """Matrices of a layer's experts one after another. Holds the whole tensor, and one matrix beside it.

    parts: how each matrix is made.
    """

    parts: tuple[Recipe, ...]

    def read(self, inputs: Inputs) -> memoryview:
        whole = np.empty(self.shape[0] * ITEM_SIZE[self.dtype], dtype=np.uint8)
        begin = 0
        for part in self.parts:
            piece = part.read(inputs)
            whole[begin : begin + len(piece)] = piece
            begin += len(piece)
        return whole.data


def _flat_tensors(source: Source, layer: int, neurons: KeptNeurons) -> Iterator[OutputTensor]:
    family, index, slices = source.family, source.index, ExpertSlices(source.family)
    for name, matrices in FLAT.items():
        parts = []
        for expert, width in enumerate(neurons.widths.tolist()):
            for matrix in matrices:
                place = slices.of(layer, expert, matrix)
                entry = index.entry(place.tensor)
                axis = NEURON_AXIS[matrix]
                shape = with_length(entry.shape, axis, width)
                parts.append(Cut(entry.name, entry.dtype, shape, axis, layer, expert))
        dtypes = {part.dtype for part in parts}
        if len(dtypes) > 1:
            raise SourceError(
                "Experts of one layer are stored in several dtypes",
                where=f"{source.folder}: layer {layer}",
                found=", ".join(sorted(dtypes)),
                wanted="one dtype for the flat tensor of the less_is_moe layout",
                next_step="use layout ragged",
            )
        count = sum(math.prod(part.shape) for part in parts)
        recipe = Flat(parts[0].source, parts[0].dtype, (count,), tuple(parts))
        yield OutputTensor(f"{family.layer.format(layer=layer)}{family.experts}.{name}", recipe)


LAYOUT = LessIsMoe()
