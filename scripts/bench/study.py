"""What `quality.py` is made of: calibration sets, plans from their scores, compensation, one pass that measures.

Everything goes through the package's own stages in one process, in a folder that outlives an interruption: what was
scored, compensated or measured is not made again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

import click
from machine import pass_context_here, score_here

from tenp_dist.artifacts import digest_of, read_json, write_json
from tenp_dist.budget.plan import make_plan, planning_statistics
from tenp_dist.budget.plan_files import write_plan
from tenp_dist.budget.protection import PEAK_STATISTIC, contribution_peaks
from tenp_dist.budget.settle import settle
from tenp_dist.budget.sizes import MoeLayer
from tenp_dist.calibration.corpus import Corpus, build_split, read_corpus, write_corpus
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.source import open_source
from tenp_dist.compensation.compensate_pass import CompensateTask, Target, compensate_model
from tenp_dist.compensation.joint_pass import JointTask
from tenp_dist.compensation.sequential_pass import SequentialTask
from tenp_dist.config import JOINT, Budget, Cluster, Source, Text
from tenp_dist.elimination.eliminate_pass import EliminateTask, eliminate_model
from tenp_dist.elimination.files import read_planning
from tenp_dist.errors import BudgetError
from tenp_dist.evaluation.measure import EvaluateTask, VariantsPass, drop_hidden, evaluate_model
from tenp_dist.evaluation.metrics import SOURCE
from tenp_dist.evaluation.plans import NamedPlan
from tenp_dist.evaluation.selection import candidates, chosen_budget, selection_document
from tenp_dist.evaluation.variants import Variant
from tenp_dist.passes.compute import Compute
from tenp_dist.run_files import layer_name
from tenp_dist.scoring.gradient_pass import NeuronGradientTask, score_gradients
from tenp_dist.scoring.gradient_statistics import GRADIENT_STATISTICS
from tenp_dist.scoring.statistics import ELIMINATION, read_statistics

AT_ONCE = 48  # variants that a pass measures: their hidden states are in memory together
IN_TURN = 8  # plans that a pass compensates layer after layer: their sums are too

SEQUENTIAL = "sequential"
FORMS = {True: CompensateTask, JOINT: JointTask, SEQUENTIAL: SequentialTask}
"""Expert by expert, a layer as one system, and so layer after layer on what the pruned layers before it give."""


@dataclass(frozen=True)
class Case:
    """A plan to measure. line: what its figures are averaged and drawn under; calibration: name of the set."""

    table: str
    line: str
    budget: Budget
    calibration: str
    compensated: bool | str = False


@dataclass(frozen=True)
class CalibrationSet:
    """sources: (file, domain, sequences); share: set aside to choose a budget on."""

    name: str
    sources: tuple[tuple[Path, str, int], ...]
    share: Fraction = Fraction(0)


class Study:
    """A model, a folder for what is made of it, and how to compute."""

    def __init__(self, model: Path, folder: Path, length: int, threads: int):
        self.model, self.length = model, length
        source = open_source(model)
        self.index, self.facts = source.index, source.facts
        self.folder = folder / self.index.fingerprint[:12]
        self.compute = Compute("cpu", "float32", 8192, threads)
        self.moe_layers = self.facts.moe_layers
        self.context = replace(pass_context_here(model, self.folder, threads), cluster=Cluster(host_memory=4 * 10**9))

    def corpora(self, text: CalibrationSet) -> tuple[Path, Path | None]:
        """The set's tokens and what was set aside of them, as files."""
        sources = tuple(Source(path=path, domain=domain, samples=count) for path, domain, count in text.sources)
        part = Text(sources=sources, sequence_length=self.length)
        corpora = build_split(part, self.model, self.facts.vocab_size, text.share)
        return self._stored(corpora[0]), corpora[1] and self._stored(corpora[1])

    def _stored(self, corpus: Corpus) -> Path:
        path = self.folder / "text" / f"{corpus.digest[:12]}.arrow"
        if not path.exists():
            write_corpus(path, corpus)
        return path

    @functools.cache  # noqa: B019  lives as long as the study
    def scores(self, corpus: Path) -> Path:
        """Folder of the score files of a corpus."""
        folder = self.folder / "scores" / corpus.stem
        if not (folder / f"{layer_name(self.moe_layers[-1])}.safetensors").exists():
            score_here(self.model, corpus, folder, self.compute, corpus.stem)
        return folder

    @functools.cache  # noqa: B019
    def eliminations(self, corpus: Path) -> Path:
        """Folder of the eliminations of a corpus."""
        folder = self.folder / "eliminations" / corpus.stem
        task = EliminateTask(self.model, corpus, folder, corpus.stem, self.compute, moe=tuple(self.moe_layers))
        eliminate_model(self.context, task)
        return folder

    @functools.cache  # noqa: B019
    def gradients(self, corpus: Path) -> Path:
        """Folder of the sums of gradients of a corpus."""
        folder = self.folder / "gradients" / corpus.stem
        layers = self.facts.num_layers
        task = NeuronGradientTask(self.model, corpus, folder, corpus.stem, self.compute, layers=layers)
        score_gradients(self.context, task)
        return folder

    def plan(self, budget: Budget, corpus: Path) -> NamedPlan | None:
        """The plan of a budget from a corpus's scores, None where none meets it."""
        names, scores = planning_statistics(budget), self.scores(corpus)
        eliminated = self.eliminations(corpus) if set(names) & set(ELIMINATION) else scores
        gradients = self.gradients(corpus) if set(names) & set(GRADIENT_STATISTICS) else None
        home = self.folder / "plans" / digest_of([budget.model_dump(mode="json"), corpus.stem])[:16]

        def read(layer: int):
            return read_planning(scores / f"{layer_name(layer)}.safetensors", eliminated, layer, names, gradients)

        def peaks(layer: int):
            path = scores / f"{layer_name(layer)}.safetensors"
            return contribution_peaks(read_statistics(path, (PEAK_STATISTIC,), weight_norm=False), layer)

        try:
            plan = make_plan(settle(budget, self._moe_layers(), peaks).budget, self._moe_layers(), read)
        except BudgetError as error:
            click.echo(f"left out  {budget.method} at {budget.retention}: {error.what}")
            return None
        tensors, text = write_plan(home, plan, source_fingerprint=self.index.fingerprint, scores_digest=corpus.stem)
        document = {
            "budget": {"important": str(budget.important), "slope": str(budget.slope)},
            "retention": {"realised": float(plan.retention)},
        }
        return NamedPlan(home.name, text, tensors, document)

    def _moe_layers(self) -> list[MoeLayer]:
        config = self.index.config
        family = family_of(config)
        experts, width = self.facts.num_experts, self.facts.intermediate_size
        limits = (family.groups(config), family.least_experts(config))
        return [MoeLayer(layer, experts, width, *limits) for layer in self.moe_layers]

    def compensated(self, plans: Iterable[NamedPlan], corpus: Path, form: bool | str = True) -> dict[str, Path]:
        """Name of each plan -> folder of its compensated W_down, solved on the corpus that it was planned on.

        One pass for all that are not there yet. form: one of `FORMS`.
        """
        name = "compensation" if form is True else f"compensation-{form}"
        found = {plan.name: Target(plan.tensors, plan.text.parent / name) for plan in plans}
        task = FORMS[form](
            self.model, corpus, self.folder / name / corpus.stem, corpus.stem, self.compute,
            moe=tuple(self.moe_layers),
        )  # fmt: skip
        due = tuple(one for one in found.values() if not all(task.stored(one, layer, 0) for layer in task.moe))
        many = IN_TURN if form == SEQUENTIAL else max(1, len(due))
        for start in range(0, len(due), many):
            part = due[start : start + many]
            click.echo(f"compensating {len(part)} plans")
            compensate_model(self.context, replace(task, targets=part))
        return {name: target.folder for name, target in found.items()}

    def measure(self, variants: Mapping[str, Variant], corpus: Path) -> dict[str, dict]:
        """variant -> figures, `source` among them; a pass over the model for every `AT_ONCE` that are not stored."""
        home = self.folder / "figures" / corpus.stem
        named = {SOURCE: Variant(), **variants}
        stored = {name: home / f"{digest_of(variant.digest)[:16]}.json" for name, variant in named.items()}
        due = [name for name in variants if not stored[name].exists()]
        for start in range(0, len(due), AT_ONCE):
            part = {name: named[name] for name in (SOURCE, *due[start : start + AT_ONCE])}
            task = EvaluateTask(
                [VariantsPass(self.model, part)], corpus, self.folder / "measure", "study", self.compute, waves=8
            )
            for name, figures in evaluate_model(self.context, task).summary().items():
                write_json(stored[name], figures)
            drop_hidden(task)
        return {name: read_json(path) for name, path in stored.items()}

    def choose(self, budgets: Sequence[Budget], text: CalibrationSet, *, compensated: bool = False) -> list[Budget]:
        """`auto` budgets as chosen on what the set sets aside; all of them in one pass."""
        corpus, aside = self.corpora(text)
        tried = [(budget, [self.plan(one, corpus) for one in candidates(budget).values()]) for budget in budgets]
        plans = {plan.name: plan for _, found in tried for plan in found if plan}
        solved = self.compensated(plans.values(), corpus) if compensated else {}
        figures = self.measure({name: Variant(plan.tensors, solved.get(name)) for name, plan in plans.items()}, aside)
        source = figures.pop(SOURCE)
        chosen = []
        for budget, found in tried:
            document = selection_document(budget, [plan for plan in found if plan], figures, source, {})
            chosen.append(chosen_budget(budget, document))
        return chosen

    def rows(self, cases: Iterable[Case], sets: Mapping[str, CalibrationSet], held_out: Path) -> list[dict]:
        """Plan, compensate and measure all cases in one pass; one flat row each."""
        corpora = {name: self.corpora(text)[0] for name, text in sets.items()}
        planned = {case: self.plan(case.budget, corpora[case.calibration]) for case in cases}
        planned = {case: plan for case, plan in planned.items() if plan}
        solved = {form: {} for form in (False, *FORMS)}
        for name, form in itertools.product(corpora, FORMS):
            wanted = [plan for case, plan in planned.items() if case.compensated == form and case.calibration == name]
            solved[form] |= self.compensated(wanted, corpora[name], form)
        variants, made = {}, {}
        for case, plan in planned.items():
            name = f"{plan.name}{case.compensated or ''}"
            variants[name] = Variant(plan.tensors, solved[case.compensated].get(plan.name))
            made[case] = name, plan
        click.echo(f"measuring {len(variants)} variants on {read_corpus(held_out).tokens_NS.size:,} tokens")
        figures = self.measure(variants, held_out)
        return [_row(case, plan, figures[name], figures[SOURCE]) for case, (name, plan) in made.items()]


def _row(case: Case, plan: NamedPlan, figures: Mapping, source: Mapping) -> dict:
    added = {name: row["nll"] - source["domains"][name]["nll"] for name, row in figures["domains"].items()}
    mean = figures["mean"]
    return {
        **{key: value for key, value in asdict(replace(case, budget=None)).items() if key != "budget"},
        "method": case.budget.method,
        "retention": str(case.budget.retention),
        "important": None if case.budget.important is None else str(case.budget.important),
        "slope": str(case.budget.slope),
        "seed": case.budget.seed,
        "realised": plan.document["retention"]["realised"],
        "nll_added": mean["nll"] - source["mean"]["nll"],
        "kl": mean["kl"],
        "top1_agreement": mean["top1_agreement"],
        **{f"nll_added {name}": value for name, value in added.items()},
    }
