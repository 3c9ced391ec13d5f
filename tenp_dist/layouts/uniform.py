"""The `uniform` layout: as many experts in every layer and one width, so that stock engines load the result.

The architecture stays the source's; only numbers in its config change, to what the tensors hold. Experts that
a plan removes leave with their router rows and bias entries, the others are renumbered in order. DeepSeek
configs state the width of shared experts as a multiple of the routed experts' width: where that width
shrinks, the multiple grows, and shared experts are filled up with neurons that are zero. Multi-token prediction
layers share the config's numbers: they get the same sizes, by the norms of their weights (`budget/unscored.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tenp_dist.budget.kinds.base import PlanForm
from tenp_dist.budget.sizes import Shape
from tenp_dist.checkpoint.expert_slices import ExpertSlice
from tenp_dist.checkpoint.families.base import NEURON_AXIS, experts_axis
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.layer_names import LayerNames, layer_names
from tenp_dist.checkpoint.mtp import mtp_expert_layers
from tenp_dist.checkpoint.recipes import Copy, Cut, Fill, Merge, OutputTensor, Recipe, Rows
from tenp_dist.checkpoint.source import Source
from tenp_dist.config import Budget, Job
from tenp_dist.errors import BudgetError, JobError, SourceError
from tenp_dist.layouts.base import Layout, OutputSizes, Pruned, with_length

ENGINE_ALIGN = 8  # 16 bytes: torch's grouped matrix multiplication refuses other strides


class Uniform(Layout):
    name = "uniform"
    sentence = (
        "Every layer has as many experts and every expert the same width, as the config says: it runs wherever "
        "the source's architecture runs."
    )
    holds_removal = True
    states_width = True
    prunes_mtp = True
    keeps_fused = True

    def refusal(self, budget: Budget, forms: Sequence[PlanForm]) -> JobError | None:
        if any(form.counts_differ for form in forms):
            return JobError(
                "A uniform checkpoint has as many experts in every layer",
                where="output.layouts",
                found="budget.expert_counts: global, which no layout holds",
                wanted="expert_counts: per-layer",
                next_step="set budget.expert_counts to per-layer; global counts are measured in evaluation.grid",
            )
        widths = [form.widths for form in forms if form.widths is not None]
        if len(widths) < len(forms):
            return JobError(
                f"Method {budget.method} gives experts widths of their own, a uniform checkpoint needs one",
                where="output.layouts",
                found=self.name,
                wanted="layout ragged or padded",
                next_step="use layout ragged, or method enp for one width",
            )
        most = max(widths, key=len)
        if len(most) > 1 and not any(form.experts_leave for form in forms):
            return JobError(
                "A uniform checkpoint needs one width for all experts",
                where="output.layouts",
                found=f"experts of {', '.join(map(str, sorted(most)))} neurons",
                wanted="layout ragged or padded",
                next_step="use method enp (or important 0) for one width, a method that removes experts, or layout "
                "ragged",
            )
        return None

    def warnings(self, shape: Shape, mtp_layers: int) -> list[str]:
        warnings = []
        if mtp_layers and not shape.layers_alone:
            warnings.append(
                f"The uniform checkpoint prunes {mtp_layers} multi-token prediction layers to the sizes of the others "
                "by the norms of their weights: they were not scored, so drafts may be accepted less often. "
                "output.mtp: drop leaves them out."
            )
        unaligned = {width for width in shape.narrow if width is not None and width % ENGINE_ALIGN}
        if unaligned:
            warnings.append(
                f"Stock engines multiply experts in groups whose width is a multiple of {ENGINE_ALIGN} in bfloat16: "
                f"{min(unaligned)} neurons may not run. Set align to {ENGINE_ALIGN} or 16."
            )
        return warnings

    def tensors(self, pruned: Pruned) -> list[OutputTensor]:
        return uniform_tensors(pruned.source, pruned.kept_of_all)

    def config(self, pruned: Pruned) -> Mapping[str, Any]:
        """The source's config with the numbers of the new tensors; no key comes or goes."""
        family, config = pruned.source.family, pruned.source.index.config
        size, predicting = uniform_size(pruned.source, pruned.kept_of_all), len(pruned.source.facts.mtp_layers)
        numbers = dict.fromkeys(family.experts_keys, size.experts) | dict.fromkeys(family.mtp_keys, predicting)
        numbers[family.width_key] = size.width
        if family.shared_key and size.shared:
            numbers[family.shared_key] = size.shared
        if size.top_k:
            numbers[family.top_k_key] = size.top_k
        return family.with_numbers(config, numbers)

    def nbytes(self, sizes: OutputSizes, job: Job) -> int:
        """Prediction layers shrink like the others. A shared expert is filled up by less than a routed width."""
        facts, family = sizes.source.facts, sizes.source.family
        alike = 1 + Fraction(len(mtp_expert_layers(sizes.source)), len(facts.moe_layers))
        routed, dropped = int(sizes.routed * alike), int(sizes.dropped(job) * alike)
        filled = (routed - dropped) // facts.num_experts if family.shared_key else 0
        return sizes.total - dropped + filled


@dataclass(frozen=True)
class UniformSize:
    """Numbers that the new config states.

    experts: routed experts of every layer.
    width: neurons of each.
    shared: the shared expert's neurons, in widths of a routed one; None where the config does not say it so.
    top_k: experts that a token goes to, None for as many as in the source.
    """

    experts: int
    width: int
    shared: int | None = None
    top_k: int | None = None


def uniform_size(source: Source, kept: Mapping[int, KeptNeurons]) -> UniformSize:
    """What the new config has to state, if every layer and expert is alike.

    Raises:
        BudgetError: they are not.
    """
    counts = {len(neurons.routed) for neurons in kept.values()}
    widths = {int(width) for neurons in kept.values() for width in neurons.widths[neurons.routed]}
    if len(counts) != 1 or len(widths) != 1 or widths == {0}:
        raise BudgetError(
            "The plan has no uniform checkpoint",
            where="output.layouts",
            found=f"widths {sorted(widths)}, {sorted(counts)} experts per layer",
            wanted="one width above 0 and as many experts in every layer",
            next_step="use layout ragged, method enp, or a method that removes experts",
        )
    width, family, config = widths.pop(), source.family, source.index.config
    shared = family.shared_widths(config)
    wider = math.ceil(shared * family.expert_width(config) / width) if shared else None
    return UniformSize(counts.pop(), width, wider, _top_k(kept))


def _top_k(kept: Mapping[int, KeptNeurons]) -> int | None:
    """Experts that a token goes to, None for as many as in the source.

    Raises:
        BudgetError: layers differ in it, or a router is more than a selection of the source's rows.
    """
    merging = {number: neurons.merging for number, neurons in kept.items() if neurons.merging is not None}
    mapped = next((number for number, one in merging.items() if one.router_KE is not None), None)
    if mapped is not None:
        raise BudgetError(
            "A router that mixes the scores of the source's experts has no uniform checkpoint",
            where=f"output.layouts, layer {mapped}",
            found="a router mapping (W_RM) with other entries than one 1 in each row",
            wanted="a mapping that selects experts; stock routers have one row per expert and no matrix behind them",
            next_step="search again with search.router: selection",
        )
    active = {one.top_k for one in merging.values()}
    if len(active) > 1:
        raise BudgetError(
            "The plan has no uniform checkpoint",
            where="output.layouts",
            found=f"tokens go to {' or '.join(map(str, sorted(active, key=str)))} experts",
            wanted="one number for all layers",
            next_step="plan again",
        )
    return next(iter(active), None)


def uniform_tensors(source: Source, kept: Mapping[int, KeptNeurons]) -> list[OutputTensor]:
    """Every tensor of the uniform checkpoint, in the source's file order.

    Raises:
        BudgetError: the plan has no such checkpoint.
        SourceError: a router tensor without a row per expert.
    """
    index, family, size = source.index, source.family, uniform_size(source, kept)
    layers = layer_names(index.tensors, family, source.facts.num_layers)
    absent: set[str] = set()
    changed: dict[str, OutputTensor] = {}
    for number, neurons in kept.items():
        layer = layers[number]
        merged = neurons.merged
        absent.update(place.tensor for place in layer.slices(range(neurons.num_experts)))
        for new, expert in enumerate(neurons.routed.tolist()):
            for matrix in layer.row.matrices:
                place, name = layer.slice(expert, matrix), layer.slice(new, matrix).tensor
                if expert in merged:
                    parts = [(layer.slice(e, matrix).tensor, factor) for e, factor in merged[expert]]
                    recipe = _merged_matrix(source, place, parts)
                else:
                    recipe = _expert_matrix(source, place, number, expert, size.width)
                changed[place.tensor] = OutputTensor(name, recipe)
        for recipe in _router(source, layer, neurons):
            changed[recipe.source] = OutputTensor(recipe.source, recipe)
        if size.shared:
            for recipe in _shared(source, layer.prefix + family.shared_prefix, size.shared * size.width):
                changed[recipe.source] = OutputTensor(recipe.source, recipe)
    return [
        changed.get(name) or OutputTensor(name, Copy(name, entry.dtype, entry.shape))
        for name, entry in index.tensors.items()
        if name in changed or name not in absent
    ]


def _expert_matrix(source: Source, place: ExpertSlice, layer: int, expert: int, width: int) -> Recipe:
    entry, axis = source.index.entry(place.tensor), place.axis
    if axis is None or entry.shape[axis] == width:
        return Copy(entry.name, entry.dtype, entry.shape)
    return Cut(entry.name, entry.dtype, with_length(entry.shape, axis, width), axis, layer, expert)


def _merged_matrix(source: Source, place: ExpertSlice, parts: Sequence[tuple[str, float]]) -> Recipe:
    entry, (names, factors) = source.index.entry(place.tensor), zip(*parts, strict=True)
    return Merge(entry.name, entry.dtype, entry.shape, names, factors)


def _router(source: Source, layer: LayerNames, neurons: KeptNeurons) -> Iterator[Recipe]:
    """The router's tensors in a layer, with the rows of the experts that stay."""
    if neurons.experts is None:
        return
    prefixes = tuple(layer.prefix + inside for inside in layer.row.router_tensors)
    for name in layer.names:
        if not name.startswith(prefixes):
            continue
        entry = source.index.entry(name)
        if neurons.num_experts not in entry.shape:
            raise SourceError(
                "A router tensor has no row per expert",
                where=f"{source.folder / entry.file}: {name}",
                found=list(entry.shape),
                wanted=f"{neurons.num_experts} rows",
                next_step="check that config.json belongs to these weights",
            )
        axis = experts_axis(entry.shape, neurons.num_experts)
        yield Rows(name, entry.dtype, with_length(entry.shape, axis, len(neurons.experts)), axis, layer.number)


def _shared(source: Source, prefix: str, width: int) -> Iterator[Recipe]:
    """Shared experts, filled up with neurons that are zero; copied where they have the width already."""
    for matrix, name in source.family.shared_matrices.items():
        entry, axis = source.index.entry(f"{prefix}.{name}.weight"), NEURON_AXIS[matrix]
        shape = with_length(entry.shape, axis, width)
        same = shape == entry.shape
        yield Copy(entry.name, entry.dtype, shape) if same else Fill(entry.name, entry.dtype, shape, axis)


LAYOUT = Uniform()
