"""A run: one job, the source that it prunes, and the files of its run directory. Every stage gets one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np

from tenp_dist.artifacts import read_json
from tenp_dist.budget.kinds.base import PlanKind
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.plan import Plan, make_plan, planning_statistics, with_kept
from tenp_dist.budget.plan_files import write_plan
from tenp_dist.budget.protection import PEAK_STATISTIC, contribution_peaks
from tenp_dist.budget.settle import settle
from tenp_dist.budget.sizes import MoeLayer, moe_layers
from tenp_dist.checkpoint.compensated import open_compensated
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.kept import read_kept
from tenp_dist.checkpoint.output_form import OutputForm, output_form
from tenp_dist.checkpoint.source import Source, open_source
from tenp_dist.checkpoint.trained import open_trained, over_compensated
from tenp_dist.config import AUTO, COMPENSATE, Budget, Cluster, Compensate, Job
from tenp_dist.depth.files import with_choices
from tenp_dist.elimination.files import read_planning
from tenp_dist.errors import BudgetError
from tenp_dist.evaluation.selection import chosen_budget
from tenp_dist.layouts.base import Layout
from tenp_dist.layouts.engine_widths import with_engine_widths
from tenp_dist.layouts.table import layouts_of, written_source
from tenp_dist.origins.origin import Origin
from tenp_dist.origins.table import open_origin
from tenp_dist.passes.compute import Compute
from tenp_dist.passes.placement import active_bytes, layer_bytes
from tenp_dist.passes.run_pass import PassContext
from tenp_dist.pipeline.stage import StageContext
from tenp_dist.progress import Ledger
from tenp_dist.run_files import RunFiles
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.statistics import LAYER_CHOICES, LayerStatistics, read_statistics
from tenp_dist.scoring.synthetic import SyntheticScores

SPLIT_KEYS = ("shards", "tensor_parallel", "mode")
"""Keys of `cluster` that are chosen for the nodes of a run where the job does not name them (`split.py`)."""


@dataclass(frozen=True)
class Run:
    """What the stages of one job work on.

    job: what was asked for.
    source: the checkpoint to prune, opened once.
    origin: where it comes from if the job names no folder.
    synthetic: scores that stand for those of the run directory, where nothing is to be measured.
    """

    job: Job
    source: Source
    origin: Origin | None = None
    synthetic: SyntheticScores | None = None

    @property
    def model(self) -> Path:
        """The folder of the source."""
        return self.source.folder

    @cached_property
    def files(self) -> RunFiles:
        return RunFiles(self.job.run_dir)

    @property
    def cluster(self) -> Cluster:
        """What the job says of its cluster, with what was chosen of the rest for the nodes of this run.

        `resident` is left to what memory is free once a pass begins, for a node may be lost until then.
        """
        cluster, path = self.job.cluster, self.files.split
        chosen = read_json(path)["chosen"] if path.is_file() else {}
        named = cluster.model_fields_set
        taken = {key: value for key, value in chosen.items() if key not in named and value != "resident"}
        return cluster.model_copy(update=taken)

    @property
    def split_words(self) -> str | None:
        """What was chosen, for people; None where the job leaves nothing open."""
        path = self.files.split
        return read_json(path)["words"] if path.is_file() else None

    @cached_property
    def layers(self) -> list[MoeLayer]:
        """The source's MoE layers, in depth order."""
        return moe_layers(self.source)

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """The layouts that are written."""
        return layouts_of(self.job)

    @cached_property
    def written_source(self) -> Source:
        """The source as checkpoints are made from it."""
        return written_source(self.job, self.source)

    @cached_property
    def form(self) -> OutputForm:
        """How the tensors of checkpoints are stored."""
        return output_form(self.written_source, self.job.output.dtype)

    @property
    def budget(self) -> Budget:
        """The job's budget, its `auto` keys as they were chosen."""
        budget = self.job.budget
        return chosen_budget(budget, read_json(self.files.selection)) if budget.auto else budget

    @property
    def compensate(self) -> Compensate:
        """Whether the run compensates, and in which form; as it was chosen where the job leaves it open."""
        asked = self.job.output.compensate
        return read_json(self.files.selection)["chosen"][COMPENSATE] if asked == AUTO else asked

    @property
    def kind(self) -> PlanKind:
        """The kind of the plans that this budget asks for."""
        return kind_of(self.budget)

    @cached_property
    def domain_weights(self) -> dict[str, Fraction]:
        """Domain -> weight: the weight of its first source."""
        weights: dict[str, Decimal] = {}
        for source in self.job.calibration.sources:
            weights.setdefault(source.domain, source.weight)
        return {domain: Fraction(weight) for domain, weight in weights.items()}

    @property
    def solved(self) -> CheckpointIndex | None:
        """What takes other values than the source's, compensated or trained; None where the job asks for neither."""
        compensated = open_compensated(self.files.compensation_folder) if self.compensate else None
        if not self.job.train:
            return compensated
        trained = open_trained(self.files.training_folder)
        return trained if compensated is None else over_compensated(trained, compensated)

    def with_synthetic_scores(self) -> Run:
        """The same run with scores drawn by the budget's seed in place of stored ones."""
        facts, seed = self.source.facts, self.job.budget.seed
        sizes = (tuple(facts.moe_layers), facts.num_experts, facts.intermediate_size)
        return replace(self, synthetic=SyntheticScores(seed, tuple(self.domain_weights), *sizes))

    def make_plan(self, budget: Budget) -> Plan:
        """A plan from the run's scores; with what the search found where the method has one.

        Raises:
            BudgetError: as `make_plan` of `budget/`, or no search was made for this budget.
        """
        settled = settle(budget, self.layers, lambda layer: self._peaks[layer])
        statistics = self.statistics(settled.budget)
        plan = make_plan(settled.budget, self.layers, statistics, domain_weights=self.domain_weights)
        if registry.of_budget(budget).searched and not self.synthetic:
            self._check_searched(budget)
            plan = with_kept(plan, read_kept(self.files.search.chosen))
        return replace(plan, warnings=(*settled.warnings, *plan.warnings))

    def _check_searched(self, budget: Budget) -> None:
        if budget.model_dump() != self.budget.model_dump() or not self.files.search.chosen.exists():
            raise BudgetError(
                "No search was made for this budget",
                where=f"method {budget.method}, retention {budget.retention}",
                wanted=f"the job's own budget: retention {self.budget.retention}",
                next_step="leave it out of evaluation.grid, or run a job of its own for it",
            )

    def settled(self, budget: Budget) -> Budget:
        """The budget with what it protects as a list."""
        return settle(budget, self.layers, lambda layer: self._peaks[layer]).budget

    @cached_property
    def _peaks(self) -> dict[int, np.ndarray]:
        """Decoder index -> the largest contribution of each expert, read once for all plans of the run."""
        return {facts.layer: self._peaks_of(facts.layer) for facts in self.layers}

    def _peaks_of(self, layer: int) -> np.ndarray:
        if self.synthetic:
            return contribution_peaks(self.synthetic.of_layer(layer, (PEAK_STATISTIC,)), layer)
        path = self.files.scores.layer(layer)
        return contribution_peaks(read_statistics(path, (PEAK_STATISTIC,), weight_norm=False), layer)

    def statistics(self, budget: Budget) -> Callable[[int], LayerStatistics]:
        """layer -> its statistics, only those that the budget's method reads."""
        names, drawn = planning_statistics(budget), self.synthetic
        if drawn:
            return lambda layer: drawn.of_layer(layer, names)
        files, summed = self.files, [name for name in names if name not in LAYER_CHOICES]

        def read(layer: int) -> LayerStatistics:
            found = read_planning(files.scores.layer(layer), files.elimination, layer, summed, files.gradients)
            return with_choices(found, files.layers_folder, layer, names)

        return read

    def store_plan(self, folder: Path, plan: Plan, digests: Mapping[str, str]) -> list[Path]:
        """Write a plan of the source; returns `write_plan`'s paths. digests: of the stages that it was made from."""
        scores = digests.get("score", digests.get("plan", ""))
        return write_plan(folder, plan, source_fingerprint=self.source.fingerprint, scores_digest=scores)

    def compute(self, context: StageContext, batch_tokens: int) -> Compute:
        """How workers compute. Device and dtype are decided here, so that all workers of a run agree."""
        device = self.job.cluster.device
        on_gpu = device == "cuda" or (device == "auto" and context.pool.gpus > 0)
        return Compute("cuda" if on_gpu else "cpu", self.job.score.dtype, batch_tokens).with_own_dtype()

    def pass_context(self, context: StageContext, stage: str, compute: Compute) -> PassContext:
        """Where a stage's shards run. compute: without `auto` in it."""
        facts, itemsize = self.source.facts, compute.torch_dtype.itemsize
        nbytes, active = layer_bytes(facts, itemsize), active_bytes(facts, itemsize)
        ledger = Ledger(self.files.ledger(stage))
        return PassContext(context.pool, self.cluster, nbytes, ledger, context.progress, active)


def open_run(job: Job) -> Run:
    """Open the job's model, one from elsewhere by its headers, in the version that the run directory notes.

    Raises:
        SourceError, UnsupportedModelError: as `open_source`. JobError: nothing can be written in its form.
        DiskFullError: no room for small files of a model from elsewhere.
    """
    if isinstance(job.model, Path):
        source = open_source(job.model)
        return Run(with_engine_widths(job, source), source)
    origin = open_origin(job.model, job.model_cache, _noted_version(job))
    source = origin.open()
    return Run(with_engine_widths(job, source), source, origin)


def _noted_version(job: Job) -> str | None:
    """The version that the run directory was begun with; None for none, or of another model."""
    path = RunFiles(job.run_dir).origin
    noted = read_json(path) if path.is_file() else {}
    return noted.get("version") if noted.get("model") == job.model else None
