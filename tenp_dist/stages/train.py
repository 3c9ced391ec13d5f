"""train: a small set of weights, of the model before layers leave it or of the pruned one, merged for the writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION, digest_of, drop_leftovers, file_digest, write_json
from tenp_dist.budget.plan_files import read_plan
from tenp_dist.checkpoint.compensated import open_compensated
from tenp_dist.checkpoint.fewer_layers import staying
from tenp_dist.checkpoint.kept import leaving_layers, read_kept
from tenp_dist.errors import JobError
from tenp_dist.evaluation.variants import Variant
from tenp_dist.job_parts import Train
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.run_files import HIDDEN, LAYER_FILES, training_state
from tenp_dist.stages.base import RunStage, bits_fields, reads, weight_fields
from tenp_dist.stages.measured_plans import part_of
from tenp_dist.stages.run import Run
from tenp_dist.training.merge import merge_layer
from tenp_dist.training.state import plain_curve
from tenp_dist.training.steps import Training


def train_fields(run: Run) -> dict[str, Any]:
    compute = run.job.score.model_dump(mode="json", exclude={"waves"}) | bits_fields(run)
    asked = _asked(run)
    return asked.model_dump(mode="json") | {"penalty": asked.lambda2} | compute | {"weights": weight_fields(run)}


def train(run: Run, context: StageContext) -> Output:
    """Steps are stored as they are made: an interrupted run goes on from the last."""
    files, asked = run.files, _asked(run)
    read_plan(files.run_dir)  # its two files belong together
    leaving, folder = leaving_layers(read_kept(files.plan_tensors)), files.training_folder
    compute = run.compute(context, run.job.score.batch_tokens)
    pruned = Variant(files.plan_tensors, files.compensation_folder if run.compensate else None)
    training = Training(
        model=run.model,
        corpus=files.calibration,
        folder=folder,
        key=context.key,
        compute=compute,
        layers=run.source.facts.num_layers,
        leaving=leaving,
        pruned=pruned,
        asked=asked,
        shares={domain: float(weight) for domain, weight in run.domain_weights.items()},
    )
    context.replace()
    where = run.pass_context(context, "train", compute)
    state = training.run(lambda number: part_of(where, number, asked.steps))
    changed = _merge(run, context, training)
    written = sorted(folder.glob(LAYER_FILES))
    curve = plain_curve(state.curve)
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "when": asked.when,
        "lambda2": asked.lambda2,
        "rank": asked.rank,
        "leaving_layers": list(leaving),
        "parameters": sum(value.numel() for value in state.weights.values()),
        "tensors": changed,
        "curve": curve,
    }
    write_json(files.training, document)
    made = [*written, files.training]
    summary = {key: value for key, value in document.items() if key not in ("schema_version", "curve")}
    ends = {"first": curve[0], "last": curve[-1]} if curve else {}
    return Output(made, digest_of({path.name: file_digest(path) for path in made}), summary | ends)


def _asked(run: Run) -> Train:
    if run.job.train is None:
        raise _no_training(run)
    return run.job.train


def _merge(run: Run, context: StageContext, training: Training) -> int:
    """Store what training changed of the layers that stay, a task a layer; returns how many tensors that are."""
    folder: Path = training.folder
    for path in folder.glob(LAYER_FILES):  # of an attempt that was interrupted here
        path.unlink()
    drop_leftovers(folder)
    small, leaving = training.small_set(), training.leaving
    solved = training.form.compensation
    compensated = None if solved is None else open_compensated(solved)
    shared = context.pool.share((run.source.index, compensated, training_state(folder), folder, context.key))
    return sum(
        context.pool.map(merge_layer, [(shared, layer, small[layer]) for layer in staying(training.layers, leaving)])
    )


def _no_training(run: Run) -> JobError:
    return JobError("The job does not train", where=run.job.run_dir, next_step="give it a part `train`")


def _gist(summary: Mapping[str, Any]) -> str:
    if "first" not in summary:
        return "no steps"
    first, last = summary["first"]["loss"], summary["last"]["loss"]
    return f"{summary['parameters']} parameters, loss {first:.4f} -> {last:.4f}, {summary['tensors']} tensors changed"


STAGE = RunStage(
    title="Train a small set",
    run=train,
    needs=reads("inspect", "fetch", "calibrate", "plan", "compensate"),
    fields=train_fields,
    not_asked=lambda run: None if run.job.train else _no_training(run),
    owns=("training", "training.json"),
    remote=True,
    scratch=(f"training/{HIDDEN}", "training/step", "training/state.safetensors"),
    gist=_gist,
)
