"""search: the experts to keep and to merge, found by measuring whole models; for method eep alone."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION, digest_of, write_json
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.protection import protected_of_layer
from tenp_dist.checkpoint.kept import write_kept
from tenp_dist.errors import JobError, StaleError
from tenp_dist.evaluation.measure import EvaluateTask, VariantsPass, drop_hidden, evaluate_model
from tenp_dist.evaluation.metrics import SOURCE
from tenp_dist.evaluation.variants import Variant
from tenp_dist.pipeline.stage import Output, StageContext
from tenp_dist.progress import Progress
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.methods.registry import Context
from tenp_dist.search.children import Born, Policy
from tenp_dist.search.evolution import Evolution, Generation
from tenp_dist.search.individuals import Individual, kept_of
from tenp_dist.search.likeness import router_likeness
from tenp_dist.search.outcome import RANKING, best_words, candidates, document
from tenp_dist.search.parents import Scored, point_of_loss, point_of_share
from tenp_dist.search.population import FileStore
from tenp_dist.search.seeds import seed, seed_budgets
from tenp_dist.search.space import Space, check_locked, depth_groups, make_places
from tenp_dist.stages.base import RunStage, reads, weight_fields
from tenp_dist.stages.plan import plan_fields
from tenp_dist.stages.run import Run
from tenp_dist.stages.score import score_fields
from tenp_dist.stages.search_text import criterion, figures_of, item_fields, search_text


def search_fields(run: Run) -> dict[str, Any]:
    asked = run.job.search.model_dump(mode="json", exclude={"items"}) | item_fields(run)
    return plan_fields(run) | score_fields(run) | {"search": asked, "weights": weight_fields(run)}


def search(run: Run, context: StageContext) -> Output:
    files, asked = run.files, run.job.search
    space = space_of(run)
    seeds = _seeds(run, space) if asked.start == "rankings" else []
    context.replace()
    store = FileStore(files.search, space)
    store.claim(context.key)
    text, least = search_text(run), criterion(run)
    meter = _Meter(run, context, space, text.items)
    point = point_of_share if text.items else point_of_loss
    evolution = Evolution(space, _policy(run), seeds, fitness=least, point=point)
    generations, scored = [], list[Scored]()
    for one in evolution.run(asked.passes - 1, store, partial(meter.measure, text.fitness)):
        generations.append(one)
        scored += one.scored
        meter.tell(one, scored)
    tried = candidates(scored, asked.development)
    figures, source = meter.measure(text.development, asked.passes - 1, {one.name: one.individual for one in tried})
    found = document(space, generations, tried, figures, source, least)
    chosen = next(one for one in tried if one.name == found["chosen"]["individual"])
    return _store(run, context, kept_of(space, chosen.individual), found)


def _store(run: Run, context: StageContext, kept: Mapping[int, Any], found: Mapping[str, Any]) -> Output:
    files = run.files
    shutil.rmtree(files.search.work, ignore_errors=True)
    about = {"schema_version": SCHEMA_VERSION, **found, "warnings": _warnings(found)}
    write_kept(files.search.chosen, kept, {"search": digest_of(about)})
    write_json(files.search_outcome, about)
    summary = {
        name: about[name] for name in ("criterion", "passes", "individuals", "chosen", "best_ranking", "warnings")
    }
    stored = sorted(files.search.population.iterdir())
    return Output([files.search_outcome, files.search.chosen, *stored], digest_of([about, context.key]), summary)


def space_of(run: Run) -> Space:
    """What the job's search may choose from.

    Raises:
        BudgetError: the budget is infeasible, or tied layers protect too many experts.
    """
    asked, facts, first = run.job.search, run.source.facts, run.layers[0]
    settled = run.settled(run.budget)
    groups = depth_groups(facts.moe_layers, asked.depth_groups)
    space = Space(
        groups=groups,
        places=make_places(
            groups,
            {layer: _scores(run, layer) for layer in facts.moe_layers},
            {layer: router_likeness(run.source, layer) for layer in facts.moe_layers},
            {layer.layer: protected_of_layer(settled, layer) for layer in run.layers},
        ),
        experts=facts.num_experts,
        kept=kind_of(settled).shape(run.layers).whole[0],
        neurons=facts.intermediate_size,
        router_groups=first.groups,
        active=asked.active,
        neighbours=asked.neighbours,
        mapped=asked.router == "mapped",
    )
    check_locked(space)
    return space


def _scores(run: Run, layer: int) -> Any:
    method = registry.of_budget(run.budget)
    context = Context(layer=layer, seed=run.budget.seed, domain_weights=run.domain_weights)
    return method.expert_scores(run.statistics(run.budget)(layer), context).numpy()


def _seeds(run: Run, space: Space) -> list[Born]:
    """What rankings keep; one that scores of an earlier version cannot give is left out."""
    born: list[Born] = []
    for name, budget in seed_budgets(run.budget).items():
        try:
            plan = run.make_plan(budget)
        except StaleError:
            continue
        born.append((seed(space, plan.kept), {"by": RANKING, "name": name}))
    return born


def _policy(run: Run) -> Policy:
    asked = run.job.search
    pruning = math.ceil(Fraction(asked.prune_share) * (asked.passes - 1))
    local = float(asked.local_share)
    return Policy(asked.individuals, max(1, pruning), local, run.job.budget.seed, point=0.0)


@dataclass(frozen=True)
class _Meter:
    """Measures individuals, a pass at a time, and tells how it goes.

    run: the job and its files.
    context: of the stage.
    space: what individuals are made of.
    items: whether they are asked items.
    """

    run: Run
    context: StageContext
    space: Space
    items: bool = False

    def measure(
        self, corpus: Path, number: int, individuals: Mapping[str, Individual]
    ) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """The figures of individuals on a text, and the source's: one pass over the model."""
        files, compute = self.run.files.search, self.run.compute(self.context, self._batch_tokens)
        plans = {name: files.plan_of(name) for name in individuals}
        for name, individual in individuals.items():
            write_kept(plans[name], kept_of(self.space, individual), {"search": self.context.key})
        variants = {SOURCE: Variant(), **{name: Variant(plan) for name, plan in plans.items()}}
        task = EvaluateTask(
            [VariantsPass(self.run.model, variants)],
            corpus,
            files.folder,
            self.context.key,
            compute,
            waves=self._waves,
            items=self.items,
        )
        where = self.run.pass_context(self.context, "search", compute)
        summary = evaluate_model(replace(where, progress=partial(self._within, number)), task).summary()
        drop_hidden(task)
        shutil.rmtree(files.work, ignore_errors=True)
        found = {name: figures_of(self.run, own) for name, own in summary.items()}
        source = found.pop(SOURCE)
        return found, source

    @property
    def _batch_tokens(self) -> int:
        return self.run.job.score.batch_tokens

    @property
    def _waves(self) -> int:
        """One where a single shard takes all waves through a layer anyway: experts are merged once then."""
        return self.run.job.score.waves if self.run.cluster.shards > 1 else 1

    def _within(self, number: int, step: Progress) -> None:
        passes = self.run.job.search.passes
        self.context.progress(replace(step, done=number + step.done / step.total, total=passes))

    def tell(self, generation: Generation, scored: Sequence[Scored]) -> None:
        """Say what is the best so far."""
        asked = self.run.job.search
        words = best_words(asked.passes, scored, generation, criterion(self.run))
        self.context.progress(Progress(generation.number + 1, asked.passes, 0, 0.0, message=words))


def _warnings(found: Mapping[str, Any]) -> list[str]:
    best, chosen = found["best_ranking"], found["chosen"]
    if best is None or chosen["individual"] != best["individual"]:
        return []
    return ["No individual of the search did better on the text set aside than the best ranking: that one was taken."]


def _not_asked(run: Run) -> JobError | None:
    budget = run.job.budget
    if not budget.auto and registry.of_budget(budget).searched:
        return None
    return JobError(
        f"Method {budget.method} keeps what its scores say: there is nothing to search",
        where=run.job.run_dir,
        wanted="method eep",
        next_step="set budget.method to eep, or plan from the scores",
    )


def _gist(summary: Mapping[str, Any]) -> str:
    chosen, criterion = summary["chosen"], summary["criterion"]
    by = " ".join(str(chosen["origin"][key]) for key in ("by", "name") if key in chosen["origin"])
    return (
        f"{summary['individuals']} individuals in {summary['passes']} passes, {chosen['phase']} ({by}), "
        f"{criterion} {chosen['development']:.4f} on the development split"
    )


STAGE = RunStage(
    title="Search experts",
    run=search,
    needs=reads("inspect", "fetch", "calibrate", "score"),
    fields=search_fields,
    not_asked=_not_asked,
    owns=("search", "search.json"),
    remote=True,
    scratch=("search/hidden", "search/work"),
    gist=_gist,
)
