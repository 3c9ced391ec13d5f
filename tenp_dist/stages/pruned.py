"""A run's source and what its plan keeps of it, as layouts are made from them; where layers leave, without these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tenp_dist.checkpoint.fewer_layers import kept_of_fewer, staying, tensors_of_fewer, without_layers
from tenp_dist.checkpoint.kept import KeptNeurons, leaving_layers
from tenp_dist.checkpoint.output_form import output_form
from tenp_dist.layouts.base import Pruned
from tenp_dist.stages.run import Run


def pruned_by(run: Run, kept: Mapping[int, KeptNeurons], *, values: bool = True) -> Pruned:
    """What the run's checkpoints are made from.

    Args:
        kept: MoE layer -> what its plan keeps.
        values: whether numbers are wanted, or names and shapes alone: compensated ones need not be there then.
    """
    source, retention, leaving = run.written_source, str(run.job.budget.retention), leaving_layers(kept)
    values_of = run.solved if values else None
    if not leaving:
        groups = run.job.budget.neuron_groups
        return Pruned(source, kept, retention, values_of, run.form, neuron_groups=groups)
    fewer = without_layers(source, leaving)
    form = output_form(fewer, run.job.output.dtype)
    solved = values_of and tensors_of_fewer(values_of, source.family, leaving)
    return Pruned(fewer, kept_of_fewer(kept), retention, solved, form, whole=source)


def check_layers_stay_the_same(run: Run, leaving: Sequence[int]) -> None:
    """Refuse a plan whose checkpoint would have other layers than those that stay. leaving: those that do not.

    Raises:
        UnsupportedModelError: as `check_same_layers`.
        BudgetError: no layer with experts would be left.
    """
    if not leaving:
        return
    from tenp_dist.model.same_layers import check_same_layers  # imports torch and transformers

    source = run.written_source
    fewer = without_layers(source, leaving)
    check_same_layers(source.index.config, fewer.index.config, staying(source.facts.num_layers, leaving))
