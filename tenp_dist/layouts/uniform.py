"""The `uniform` layout: as many experts in every layer and one width, so that stock engines load the result.

The architecture stays the source's; only numbers in its config change, to what the tensors hold. Experts that
a plan removes leave with their router rows and bias entries, the others are renumbered in order. DeepSeek
configs state the width of shared experts as a multiple of the routed experts' width: where that width
shrinks, the multiple grows, and shared experts are filled up with neurons that are zero. Multi-token prediction
layers share the config's numbers but were not scored, so they stay out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenp_dist.budget.kinds.base import PlanForm
from tenp_dist.budget.sizes import Shape
from tenp_dist.checkpoint.expert_layers import layers_of
from tenp_dist.checkpoint.expert_slices import ExpertSlice, ExpertSlices
from tenp_dist.checkpoint.families.base import NEURON_AXIS, experts_axis
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.recipes import Copy, Cut, Fill, OutputTensor, Recipe, Rows
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
    leaves_out_mtp = True

    def refusal(self, budget: Budget, forms: Sequence[PlanForm]) -> JobError | None:
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
        if mtp_layers:
            warnings.append(
                f"The uniform checkpoint leaves out {mtp_layers} multi-token prediction layers of the source: they "
                "share the config's expert numbers and were not scored."
            )
        unaligned = {width for width in shape.narrow if width is not None and width % ENGINE_ALIGN}
        if unaligned:
            warnings.append(
                f"Stock engines multiply experts in groups whose width is a multiple of {ENGINE_ALIGN} in bfloat16: "
                f"{min(unaligned)} neurons may not run. Set align to {ENGINE_ALIGN} or 16."
            )
        return warnings

    def tensors(self, pruned: Pruned) -> list[OutputTensor]:
        return uniform_tensors(pruned.source, pruned.kept)

    def config(self, pruned: Pruned) -> Mapping[str, Any]:
        """The source's config with the numbers of the new tensors; no key comes or goes."""
        family, config = pruned.source.family, pruned.source.index.config
        size = uniform_size(pruned.source, pruned.kept)
        numbers = dict.fromkeys(family.experts_keys, size.experts) | dict.fromkeys(family.mtp_keys, 0)
        numbers[family.width_key] = size.width
        if family.shared_key and size.shared:
            numbers[family.shared_key] = size.shared
        return family.with_numbers(config, numbers)

    def nbytes(self, sizes: OutputSizes, job: Job) -> int:
        """Without prediction layers. A shared expert is filled up by less than the width of a routed one."""
        source, dropped = sizes.source, sizes.dropped(job)
        filled = (sizes.routed - dropped) // source.facts.num_experts if source.family.shared_key else 0
        return sizes.total - dropped - sizes.mtp + filled


@dataclass(frozen=True)
class UniformSize:
    """Numbers that the new config states.

    experts: routed experts of every layer.
    width: neurons of each.
    shared: the shared expert's neurons, in widths of a routed one; None where the config does not say it so.
    """

    experts: int
    width: int
    shared: int | None = None


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
    return UniformSize(counts.pop(), width, wider)


def uniform_tensors(source: Source, kept: Mapping[int, KeptNeurons]) -> list[OutputTensor]:
    """Every tensor of the uniform checkpoint, in the source's file order.

    Raises:
        BudgetError: the plan has no such checkpoint.
        SourceError: a router tensor without a row per expert.
    """
    index, family, size = source.index, source.family, uniform_size(source, kept)
    slices, layers = ExpertSlices(family), layers_of(index, family)
    absent = {name for layer, names in layers.items() if layer >= source.facts.num_layers for name in names}
    absent |= {name for name in index.tensors if family.is_prediction(name)}
    changed: dict[str, OutputTensor] = {}
    for layer, neurons in kept.items():
        absent.update(place.tensor for _, _, place in slices.of_layer(layer, range(neurons.num_experts)))
        for number, expert in enumerate(neurons.routed.tolist()):
            for matrix in NEURON_AXIS:
                place, name = slices.of(layer, expert, matrix), slices.of(layer, number, matrix).tensor
                changed[place.tensor] = OutputTensor(name, _expert_matrix(source, place, layer, expert, size.width))
        prefix = family.layer.format(layer=layer)
        for recipe in _router(source, layers[layer], layer, neurons):
            changed[recipe.source] = OutputTensor(recipe.source, recipe)
        if size.shared:
            for recipe in _shared(source, prefix + family.shared_experts, size.shared * size.width):
                changed[recipe.source] = OutputTensor(recipe.source, recipe)
    return [
        changed.get(name) or OutputTensor(name, Copy(name, entry.dtype, entry.shape))
        for name, entry in index.tensors.items()
        if name in changed or name not in absent
    ]


def _expert_matrix(source: Source, place: ExpertSlice, layer: int, expert: int, width: int) -> Recipe:
    entry, axis = source.index.entry(place.tensor), place.axis
    if entry.shape[axis] == width:
        return Copy(entry.name, entry.dtype, entry.shape)
    return Cut(entry.name, entry.dtype, with_length(entry.shape, axis, width), axis, layer, expert)


def _router(source: Source, names: Sequence[str], layer: int, neurons: KeptNeurons) -> Iterator[Recipe]:
    """The router's tensors in a layer, with the rows of the experts that stay."""
    if neurons.experts is None:
        return
    prefixes = tuple(source.family.layer.format(layer=layer) + inside for inside in source.family.router_tensors)
    for name in names:
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
        yield Rows(name, entry.dtype, with_length(entry.shape, axis, len(neurons.experts)), axis, layer)


def _shared(source: Source, prefix: str, width: int) -> Iterator[Recipe]:
    """Shared experts, filled up with neurons that are zero; copied where they have the width already."""
    for matrix, axis in NEURON_AXIS.items():
        entry = source.index.entry(f"{prefix}.{source.family.matrices[matrix]}.weight")
        shape = with_length(entry.shape, axis, width)
        same = shape == entry.shape
        yield Copy(entry.name, entry.dtype, shape) if same else Fill(entry.name, entry.dtype, shape, axis)


LAYOUT = Uniform()
