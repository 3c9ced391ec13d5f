"""What a layout is, and what it gets to make a checkpoint from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tenp_dist.budget.kinds.base import PlanForm
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.sizes import MoeLayer, Shape, moe_layers
from tenp_dist.checkpoint.entries import TensorEntry
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.table import auto_class
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.output_form import OutputForm, routed_matrices
from tenp_dist.checkpoint.recipes import Copy, OutputTensor, Recipe
from tenp_dist.checkpoint.source import Source
from tenp_dist.config import AUTO, Budget, Job
from tenp_dist.errors import JobError


@dataclass(frozen=True)
class Pruned:
    """A source and what a plan keeps of it.

    source: the checkpoint to prune.
    kept: MoE layer -> its kept neurons.
    retention: share of the routed neurons that the job asked for, a decimal string.
    compensated: where tensors are that were compensated or trained, None where none was.
    form: how tensors are stored.
    mtp: number of a multi-token prediction layer -> what stays of it, in layouts that prune these too.
    neuron_groups: neurons that stay or go together.
    whole: the checkpoint with the layers that a plan takes out, where it takes out any; `source` has none of them.
    """

    source: Source
    kept: Mapping[int, KeptNeurons]
    retention: str
    compensated: CheckpointIndex | None = None
    form: OutputForm = field(default_factory=OutputForm)
    mtp: Mapping[int, KeptNeurons] = field(default_factory=dict)
    neuron_groups: int = 1
    whole: Source | None = None

    @property
    def kept_of_all(self) -> dict[int, KeptNeurons]:
        """What stays of every layer that loses something."""
        return {**self.kept, **self.mtp}


class Layout(ABC):
    """One form of a pruned checkpoint."""

    name: ClassVar[str]
    """As jobs name it, and its folder under `checkpoint/`."""
    sentence: ClassVar[str]
    """What the model card says of it."""
    needs_package: ClassVar[bool] = False
    """Whether transformers loads it only after `import tenp_dist` (or from the modeling file that it brings)."""
    how_to_load: ClassVar[str] = ""
    """Markdown of the card on loading it, where that is not by transformers."""
    readable: ClassVar[bool] = True
    """Whether transformers, and so an evaluation, can read it."""
    experts_apart: ClassVar[bool] = True
    """Whether every expert has tensors of its own, so that files can be divided by expert."""
    keeps_fused: ClassVar[bool] = False
    """Whether experts that the source has fused in one tensor are fused again, or have tensors of their own."""
    plain_only: ClassVar[bool] = False
    """Whether its tensors are plain numbers, in no stored format."""
    saves_space: ClassVar[bool] = True
    """Whether it is smaller than the source: reports name such layouts first, and people are told to load one."""
    holds_removal: ClassVar[bool] = False
    """Whether experts and layers can leave the model, or only neurons."""
    states_width: ClassVar[bool] = False
    """Whether its config states the width of experts anew, as the one number that the source's config has for it."""
    prunes_mtp: ClassVar[bool] = False
    """Whether multi-token prediction layers get the sizes of the others; elsewhere they stay whole."""

    def refusal(self, budget: Budget, forms: Sequence[PlanForm]) -> JobError | None:
        """Why plans of one of these forms have no such checkpoint, None where all have.

        Not asked of layouts that cannot hold a removal where experts leave: `check_layouts` refuses these together.
        """
        return None

    def check_source(self, source: Source) -> None:
        """Refuse a source, less the prediction layers that the job drops, that has no such checkpoint.

        Raises:
            UnsupportedModelError: why not.
        """
        return  # sources of every kind

    def check_loadable(self, budget: Budget, layers: Sequence[MoeLayer]) -> None:
        """Refuse sizes that the runtime of this layout would not load.

        Raises:
            BudgetError: a layer may get such sizes.
        """
        return  # sizes of every kind

    def warnings(self, shape: Shape, mtp_layers: int) -> list[str]:
        """What its checkpoint asks of engines, or keeps without evidence. mtp_layers: prediction layers in it."""
        return []

    @abstractmethod
    def tensors(self, pruned: Pruned) -> list[OutputTensor]:
        """Every tensor of the checkpoint, in the source's file order, so that reads stay sequential.

        Raises:
            BudgetError: the plan has no such checkpoint.
            SourceError: a tensor of the source is missing or of a shape that contradicts the config.
        """

    def config(self, pruned: Pruned) -> Mapping[str, Any]:
        """The content of config.json."""
        return pruned.source.index.config

    def extra_files(self, source: Source) -> Mapping[str, str]:
        """Name -> text of the files that the layout itself brings."""
        return {}

    def auto_class(self, model_type: str) -> str:
        """transformers' Auto class that loads it; the package's own classes are known as causal language models too.

        model_type: family of the source.
        """
        return auto_class("" if self.needs_package else model_type)

    def carries(self, side_file: Path) -> bool:
        """Whether a side file of the source (`checkpoint.writer.side_files`) comes along."""
        return True

    @abstractmethod
    def nbytes(self, sizes: OutputSizes, job: Job) -> int:
        """Bytes that its tensors will take on the disk, about, before there is a plan."""


def under_same_names(
    pruned: Pruned, expert_matrix: Callable[[TensorEntry, int, int, int], Recipe]
) -> list[OutputTensor]:
    """Every tensor of the source under its own name.

    Args:
        expert_matrix: (entry, axis of neurons, layer, expert) -> how a routed expert's matrix is made.
    """
    slices, index = ExpertSlices(pruned.source.family), pruned.source.index
    changed = {
        place.tensor: expert_matrix(index.entry(place.tensor), place.axis, layer, expert)
        for layer, neurons in pruned.kept.items()
        for expert, _, place in slices.of_layer(layer, range(neurons.num_experts))
        if place.axis is not None
    }
    return [
        OutputTensor(name, changed.get(name) or Copy(name, entry.dtype, entry.shape))
        for name, entry in index.tensors.items()
    ]


def with_length(shape: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    """The shape with another length along an axis."""
    return (*shape[:axis], length, *shape[axis + 1 :])


@dataclass(frozen=True)
class OutputSizes:
    """Sizes of a source's tensors in the form that results are written in, before anything is pruned.

    source: the checkpoint.
    total: bytes of all its tensors.
    routed: bytes of routed experts.
    """

    source: Source
    total: int
    routed: int

    def dropped(self, job: Job) -> int:
        """Bytes of routed experts that a plan of the job takes out, at least."""
        allowed = job.budget.retention_exact
        if job.budget.method != AUTO:
            allowed = kind_of(job.budget).allowed(moe_layers(self.source))
        return int(self.routed * (1 - allowed))


def output_sizes(source: Source, form: OutputForm) -> OutputSizes:
    """What the source would take in this form."""
    tensors = source.index.tensors

    def of(names: Iterable[str]) -> int:
        return sum(form.nbytes(tensors[name]) for name in names)

    return OutputSizes(source, of(tensors), of(routed_matrices(source)))
