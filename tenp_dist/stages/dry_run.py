"""What a job would write, told without measuring a model and without reading or writing a weight. No stages.

`plan_synthetic` plans from drawn scores (`scoring/synthetic.py`) into a folder of its own: no stage takes that for a
plan. `dry_run` says, from headers and a plan, what the write stage would make, by what that stage itself is told
(`layouts/outline.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tenp_dist.artifacts import digest_of
from tenp_dist.budget.plan_files import SYNTHETIC, read_plan, write_plan
from tenp_dist.checkpoint.kept import KeptNeurons, read_kept
from tenp_dist.checkpoint.writer import shard_bytes
from tenp_dist.errors import JobError, StaleError
from tenp_dist.layouts.base import Layout, Pruned
from tenp_dist.layouts.outline import Outline, outline_of
from tenp_dist.pipeline.records import read_record
from tenp_dist.pipeline.settings_diff import difference, plain
from tenp_dist.run_files import PLAN_TENSORS
from tenp_dist.scoring.methods import registry
from tenp_dist.stages.mtp import mtp_sizes
from tenp_dist.stages.plan import plan_fields, plan_summary, planned
from tenp_dist.stages.pruned import pruned_by
from tenp_dist.stages.run import Run

_NOTHING_REAL = "These scores are drawn, not measured: the plan says how large things are, not what to keep."
_NO_SEARCH = "A search would exchange and merge experts; here the ranking that it starts from is drawn."


def plan_synthetic(run: Run) -> dict[str, Any]:
    """Plan from scores drawn by `budget.seed`, into `synthetic/` of the run directory; returns the plan's summary.

    Raises:
        JobError: something of the budget is chosen by measuring the model.
        BudgetError, UnsupportedModelError: as the plan stage.
    """
    budget = run.job.budget
    if budget.auto:
        raise JobError(
            "What is chosen by measuring the model has no plan from synthetic scores",
            where=", ".join(f"budget.{key}" for key in budget.auto),
            found="auto",
            wanted="a value",
            next_step=" ".join(f"--set budget.{key}=..." for key in budget.auto),
        )
    drawn = run.with_synthetic_scores()
    plan = planned(drawn)
    missing = (_NOTHING_REAL, _NO_SEARCH) if registry.of_budget(budget).searched else (_NOTHING_REAL,)
    folder = run.files.synthetic_folder
    write_plan(
        folder,
        replace(plan, warnings=(*missing, *plan.warnings)),
        source_fingerprint=run.source.fingerprint,
        scores_digest=SYNTHETIC,
        synthetic={"seed": budget.seed, "settings": _settings(run)},
    )
    return plan_summary(read_plan(folder, synthetic=True))


@dataclass(frozen=True)
class DryRun:
    """What a job would write.

    outlines: layout -> all that is known of its checkpoint.
    synthetic: whether the plan is one of synthetic scores.
    bytes_before: of the source.
    """

    outlines: Mapping[str, Outline]
    synthetic: bool
    bytes_before: int

    def plain(self) -> dict[str, Any]:
        """For JSON: every layout with its sums and its shard map, every tensor named."""
        layouts = {name: _plain(outline) for name, outline in self.outlines.items()}
        return {SYNTHETIC: self.synthetic, "bytes_before": self.bytes_before, "layouts": layouts}


def dry_run(run: Run) -> DryRun:
    """Every layout of the job under the plan of the run directory, or under one from synthetic scores.

    Raises:
        StaleError: there is no plan, or it was made from something else.
        BudgetError, SourceError, JobError: as the write stage.
    """
    kept, synthetic = _kept(run)
    pruned = pruned_by(run, kept, values=False)
    outlines = {layout.name: _outline(run, layout, pruned) for layout in run.layouts}
    return DryRun(outlines, synthetic, run.source.facts.bytes.stored)


def _outline(run: Run, layout: Layout, pruned: Pruned) -> Outline:
    output = run.job.output
    if layout.prunes_mtp:
        pruned = replace(pruned, mtp=mtp_sizes(pruned.source, pruned.kept, pruned.neuron_groups))
    return outline_of(layout, pruned, output.shard_size, output.expert_ranks)


def _kept(run: Run) -> tuple[dict[int, KeptNeurons], bool]:
    """What the run's plan keeps of every layer; whether it is one of synthetic scores."""
    files, record = run.files, read_record(run.job.run_dir, "plan")
    synthetic = record is None
    folder = files.synthetic_folder if synthetic else files.run_dir
    if not (folder / PLAN_TENSORS).is_file():
        raise StaleError(
            "There is no plan to write by",
            where=files.run_dir,
            next_step="run `tenp-dist plan JOB.yaml --synthetic-scores`, or `tenp-dist plan` once there are scores",
        )
    document = read_plan(folder, synthetic=synthetic)
    if document["source_fingerprint"] != run.source.fingerprint:
        raise _other("another model", document["source_fingerprint"][:16], run.source.fingerprint[:16])
    if record is not None and record.inputs["fields"] != plain(plan_fields(run)):
        raise _other("other settings", difference(record.inputs, {**record.inputs, "fields": plain(plan_fields(run))}))
    if record is None and document[SYNTHETIC]["settings"] != _settings(run):
        raise _other("other settings", f"synthetic scores, {folder}")
    return read_kept(folder / PLAN_TENSORS), synthetic


def _settings(run: Run) -> str:
    return digest_of(plan_fields(run))


def _other(what: str, found: object, wanted: object = None) -> StaleError:
    return StaleError(
        f"The plan was made for {what}",
        found=found,
        wanted=wanted,
        next_step="plan again: `tenp-dist plan`, with --synthetic-scores where there are none",
    )


def _plain(outline: Outline) -> dict[str, Any]:
    weights = {shard.file for shard in outline.shards}
    return {
        "bytes": outline.nbytes,
        "effective_bits": outline.effective_bits,
        "files": [
            {"file": shard.file, "bytes": shard_bytes(shard), "tensors": _tensors(shard.tensors)}
            for shard in outline.shards
        ],
        "other_files": [name for name in outline.files if name not in weights],
    }


def _tensors(tensors: Sequence[Any]) -> dict[str, dict[str, Any]]:
    return {one.name: {"dtype": one.dtype, "shape": list(one.shape), "bytes": one.nbytes} for one in tensors}
