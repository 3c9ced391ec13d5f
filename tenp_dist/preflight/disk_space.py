"""The disk space that a run needs: what it leaves, and what it makes and removes again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.plan import planning_statistics
from tenp_dist.checkpoint.output_form import output_form
from tenp_dist.checkpoint.source import Source
from tenp_dist.config import AUTO, COMPENSATE, JOINT, PRUNED, Budget, Compensate, Evaluation, Job, Text
from tenp_dist.evaluation.plans import given_plans, grid_budgets, with_controls
from tenp_dist.evaluation.selection import METHODS, candidates
from tenp_dist.layouts.base import output_sizes
from tenp_dist.layouts.table import layouts_of, written_source
from tenp_dist.run_files import COMPENSATION, HIDDEN, RunFiles
from tenp_dist.scoring.gradient_statistics import EXPERT_GRADIENTS, GRADIENT_STATISTICS, NEURON_GRADIENTS
from tenp_dist.scoring.statistics import ELIMINATION

Compensated = tuple[Budget, Compensate]  # a plan's budget, and how it is compensated

_ELIMINATED = 4 + 8  # bytes of a neuron's id and of its cost
_STATISTICS = (4, 7)  # float64 sums kept per neuron and per expert of every domain


def bytes_needed(job: Job, source: Source) -> int:
    """Bytes that a whole run takes in its directory, about."""
    held = max(states_held(job, source), boundaries_held(job, source))
    return bytes_left(job, source) + columns_held(job, source) + held + orders_held(job, source)


def orders_held(job: Job, source: Source) -> int:
    """Bytes of orders and costs that `eliminate` leaves, where a plan of the job asks for them."""
    facts = source.facts
    each = _ELIMINATED * facts.intermediate_size * facts.num_experts * len(facts.moe_layers)
    return _planned_from(ELIMINATION, job, source) * each


def states_held(job: Job, source: Source) -> int:
    """Bytes of hidden states that a stage which measures or compensates stores at a time, about: in float32."""
    tried = (
        tokens_of(job.calibration) * job.selection_share * (1 + len(job.forms) * len(candidates(job.budget)))
        if job.chooses
        else 0
    )
    measured = tokens_of(job.evaluation) * streams(job, job.evaluation, source) if job.evaluation else 0
    solved = tokens_of(job.calibration) * streams_in_turn(job, source)
    return int(4 * source.facts.hidden_size * max(tried, measured, solved))


def boundaries_held(job: Job, source: Source) -> int:
    """Bytes that the stage `gradients` takes while it works, about: hidden states between all layers, in float32."""
    if not _planned_from(GRADIENT_STATISTICS, job, source):
        return 0
    return 4 * source.facts.hidden_size * tokens_of(job.calibration) * (source.facts.num_layers + 2)


def _planned_from(statistics: Iterable[str], job: Job, source: Source) -> bool:
    """Whether a plan of the job reads one of these."""
    tried = [job.budget] if job.budget.method != AUTO else []
    tried += candidates(job.budget).values() if job.budget.auto else []
    tried += _plans(job, job.evaluation, source).values() if job.evaluation else []
    return any(set(statistics) & set(planning_statistics(budget)) for budget in tried)


def tokens_of(text: Text) -> int:
    return text.sequence_length * sum(one.samples for one in text.sources)


def streams(job: Job, asked: Evaluation, source: Source) -> int:
    """The source, the written checkpoint and its control, and the plans of an evaluation."""
    forms = len(asked.grid.get(COMPENSATE, (False,)))
    return 1 + 2 * asked.checkpoint + forms * len(_plans(job, asked, source))


def streams_in_turn(job: Job, source: Source) -> int:
    """The source and the plans that are compensated layer after layer in one pass, at most; 0 where none is so."""
    if job.output.compensate_on != PRUNED:
        return 0
    asked = job.evaluation
    grid = asked is not None and asked.many and JOINT in asked.grid.get(COMPENSATE, job.forms)
    measured = len(_plans(job, asked, source)) if asked is not None and grid else 0
    return 1 + max(len(candidates(job.budget)) if job.chooses else 1, measured)


def _plans(job: Job, asked: Evaluation, source: Source) -> dict[str, Budget]:
    """Name -> budget of the plans besides the written checkpoint, with their controls."""
    own = job.budget if job.budget.method != AUTO else job.budget.model_copy(update={"method": METHODS[0]})
    budgets = grid_budgets(own, asked.grid)[0] if asked.grid else {}
    given = given_plans(asked.plans, source.fingerprint)
    return with_controls(budgets | {plan.name: plan.budget for plan in given})


def columns_held(job: Job, source: Source) -> int:
    """Bytes of compensated W_down that lie in the run directory at a time, about: the run's own and a stage's."""
    own: list[Compensated] = [(job.budget, form) for form in job.forms[-1:] if form]
    budgets = candidates(job.budget).values() if job.chooses else ()
    tried: list[Compensated] = [(one, form) for one in budgets for form in job.forms if form]
    held = max(_share(own + tried), _share(own + _measured(job, own, source)))
    return int(source.facts.bytes.routed * held / 3)


def _measured(job: Job, own: list[Compensated], source: Source) -> list[Compensated]:
    """Budgets of the compensated plans of an evaluation."""
    asked = job.evaluation
    if asked is None:
        return []
    found = own if asked.checkpoint else []  # its control
    forms = [form for form in asked.grid.get(COMPENSATE, job.forms[-1:]) if form] if asked.many else []
    return [*found, *((one, form) for one in _plans(job, asked, source).values() for form in forms)] if forms else found


def _share(budgets: Sequence[Compensated]) -> Fraction:
    """Share of the routed parameters that the plans keep together of which something is compensated."""
    solved = (one for one, form in budgets if form == JOINT or one.method == AUTO or kind_of(one).leaves_narrow)
    return sum((one.retention_exact for one in solved), Fraction(0))


def bytes_left(job: Job, source: Source) -> int:
    """Scores with the hidden states on their way, and every layout."""
    facts, text = source.facts, job.calibration
    written = written_source(job, source)
    sizes = output_sizes(written, output_form(written, job.output.dtype))
    checkpoints = sum(layout.nbytes(sizes, job) for layout in layouts_of(job))
    neurons, experts = _STATISTICS
    domains = len({text_source.domain for text_source in text.sources})
    if _planned_from(GRADIENT_STATISTICS, job, source):
        neurons, experts = neurons + len(NEURON_GRADIENTS), experts + len(EXPERT_GRADIENTS)
    sums = (neurons * facts.intermediate_size + experts) * facts.num_experts * len(facts.moe_layers)
    return checkpoints + 8 * sums * domains + 4 * tokens_of(text) * facts.hidden_size


def written_bytes(run_dir: Path) -> int:
    """Bytes of it that are there already."""
    files = RunFiles(run_dir)
    folders = [files.checkpoints, files.scores.folder, files.elimination, files.gradients, files.compensation_folder]
    folders += [
        of / part for of in (files.selection_folder, files.evaluation_folder) for part in (COMPENSATION, HIDDEN)
    ]
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
