"""The plans of an evaluation besides the written checkpoint: a grid of budgets, plan files, random controls.

All run as masks in one pass over the source, so the model is read once however many there are. Compensated plans use a
W_down of their own in that pass; all of these are solved in one pass over the calibration tokens before it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.plan import Plan
from tenp_dist.budget.plan_files import plan_pair, read_plan_pair
from tenp_dist.config import COMPENSATE, JOINT, Budget, Compensate
from tenp_dist.errors import BudgetError, JobError, StaleError
from tenp_dist.run_files import PLAN_JSON

MakePlan = Callable[[Budget], Plan]
WritePlan = Callable[[Path, Plan], Sequence[Path]]
CONTROL = "control: "
_MEASURED_ANYWAY = ("source", "pruned", "random", "untrained", "trained")  # names that evaluations have themselves


@dataclass(frozen=True)
class NamedPlan:
    """A stored plan.

    name: of the plan in the evaluation.
    text: its plan.json.
    tensors: its plan.safetensors.
    document: what plan.json says.
    compensated: whether it is measured with compensated weights, and with which.
    solved: folder of these, where they are there already.
    training: folder of trained tensors that it is measured with, None for the source's.
    """

    name: str
    text: Path
    tensors: Path
    document: Mapping[str, Any]
    compensated: Compensate = False
    solved: Path | None = None
    training: Path | None = None

    @property
    def budget(self) -> Budget:
        return budget_of(self.document)

    def compensate(self, wanted: Compensate) -> NamedPlan:
        """The same, compensated if that is wanted and there is something to solve."""
        return replace(self, compensated=wanted if solvable(self.document, wanted) else False)


def solvable(document: Mapping[str, Any], form: Compensate) -> bool:
    """Whether a plan.json leaves something to compensate in this form.

    Expert by expert, experts that keep a part of their neurons; as one system, whatever loses neurons or
    experts, or merges some.
    """
    layers = document["layers"].values()
    widths = [(int(width), layer["intermediate_size"]) for layer in layers for width in layer["widths"]]
    if form == JOINT:
        return any(width < whole for width, whole in widths) or any(
            0 < layer.get("removed", 0) < layer["experts"] or "merged" in layer for layer in layers
        )
    return bool(form) and any(0 < width < whole for width, whole in widths)


def in_forms(plans: Iterable[NamedPlan], forms: Sequence[Compensate]) -> list[NamedPlan]:
    """Every plan in each of the forms that it has, named so: plain (False), compensated (True), or jointly.

    What leaves nothing to compensate in any of them is there once, under its own name.
    """
    found = []
    for plan in plans:
        own = [form for form in forms if not form or solvable(plan.document, form)]
        named = {f"{plan.name} {COMPENSATE}={str(form).lower()}": form for form in own}
        many = [replace(plan, name=name, compensated=form) for name, form in named.items()]
        found += many if any(own) else [plan]
    return found


def grid_budgets(budget: Budget, grid: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Budget], list[str]]:
    """Every combination of the grid's values over `budget`: name -> budget, and those that are out of range.

    Keys vary in the order of the budget's own, the last one fastest. Keys that a method does not use are left
    out of its names, so no budget comes twice. `compensate` is no key of budgets: see `in_forms`.
    """
    budgets, refused = {}, []
    keys = [key for key in Budget.model_fields if key in grid]
    for values in itertools.product(*(grid[key] for key in keys)):
        changes = dict(zip(keys, values, strict=True))
        method = str(changes.get("method", budget.method))
        unused = kind_of(Budget(method=method)).unused_keys
        changes = {key: value for key, value in changes.items() if key not in unused}
        name = grid_name(method, changes)
        try:
            budgets[name] = Budget.model_validate(budget.model_dump() | changes)
        except ValueError:
            refused.append(name)
    return budgets, list(dict.fromkeys(refused))


def grid_name(method: str, changes: Mapping[str, Any]) -> str:
    """`tenp retention=0.3 important=0.1`."""
    return " ".join([method, *(f"{key}={value}" for key, value in changes.items() if key != "method")])


def with_controls(budgets: Mapping[str, Budget]) -> dict[str, Budget]:
    """The budgets, then the missing random controls: one for every retention and kind of control, by its first plan."""
    drawn = {_kind(budget) for budget in budgets.values()}
    controls = {}
    for budget in budgets.values():
        control = kind_of(budget).control()
        if _kind(control) not in drawn:
            drawn.add(_kind(control))
            ranking = {"neurons": control.neurons} if control.neurons else {}
            dropped = control.drop_layers
            size = {"retention": control.retention} if dropped is None else {"drop_layers": dropped}
            name = grid_name(control.method, {**ranking, **size})
            controls[CONTROL + name] = control
    return {**budgets, **controls}


def _kind(budget: Budget) -> tuple[str, str | tuple[str, ...] | None, Decimal, Decimal | None]:
    return budget.method, budget.neurons, budget.retention, budget.drop_layers


def store_plans(
    budgets: Mapping[str, Budget], folder: Path, make: MakePlan, write: WritePlan
) -> tuple[list[NamedPlan], list[str]]:
    """Make every plan from the stored scores and write it under `folder`; and those that no plan can meet.

    Raises:
        BudgetError: none can be met.
    """
    stored: list[NamedPlan] = []
    refused: list[str] = []
    error: BudgetError | None = None
    for name, budget in budgets.items():
        try:
            plan = make(budget)
        except BudgetError as infeasible:
            refused, error = [*refused, name], infeasible
            continue
        home = _home(folder, name, {one.text.parent for one in stored})
        write(home, plan)
        text, tensors = plan_pair(home)
        stored.append(NamedPlan(name, text, tensors, read_plan_pair(text, tensors)))
    if error is not None and not stored:
        raise error
    return stored, refused


def _home(folder: Path, name: str, taken: Collection[Path]) -> Path:
    """Where a plan of this name is stored: names may differ in what no folder's name shows (`slope=-1`, `slope=1`)."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", name)
    homes = (folder / (plain if number == 1 else f"{plain}.{number}") for number in itertools.count(1))
    return next(home for home in homes if home not in taken)


def given_plans(paths: Iterable[Path], fingerprint: str) -> list[NamedPlan]:
    """Plan files that a user names, by file name (`plan.json`: by its folder's), with ` (2)` where that is taken.

    Raises:
        StaleError: a plan is missing or damaged, of another schema, or of another model.
    """
    plans: list[NamedPlan] = []
    for path in paths:
        text, tensors = plan_pair(path)
        document = read_plan_pair(text, tensors)
        if document["source_fingerprint"] != fingerprint:
            raise StaleError(
                "The plan was made from another model",
                where=text,
                found=document["source_fingerprint"],
                wanted=fingerprint,
                next_step="plan again for this model, or evaluate with the job of the model that was planned",
            )
        name = text.parent.name if text.name == PLAN_JSON else text.stem
        same = sum(plan.name.split(" (")[0] == name for plan in plans) + (name in _MEASURED_ANYWAY)
        plans.append(NamedPlan(f"{name} ({same + 1})" if same else name, text, tensors, document))
    return plans


def budget_of(document: Mapping[str, Any]) -> Budget:
    """The budget that plan.json was made for; shares that no decimal equals are cut after nine digits."""
    values = {"method": document["method"], **document["budget"]}
    known = {key: _decimal(value) for key, value in values.items() if key in Budget.model_fields}
    return Budget.model_validate(known)


def _decimal(value: Any) -> Any:
    if not (isinstance(value, str) and re.fullmatch(r"-?\d+/\d+", value)):
        return value
    share = Fraction(value)
    return Decimal(share.numerator * 10**9 // share.denominator).scaleb(-9)


def entry(plan: NamedPlan, figures: Mapping[str, Any]) -> dict[str, Any]:
    """What evaluation.json says of a plan."""
    document = plan.document
    return {
        "name": plan.name,
        "method": document["method"],
        "control": plan.name.startswith(CONTROL),
        "budget": document["budget"],
        "retention": document["retention"],
        "compensated": plan.compensated,
        **({"trained": True} if plan.training else {}),
        **figures,
    }


def check_distinct(plans: Sequence[NamedPlan]) -> None:
    """Raise JobError where two plans have one name."""
    names = [plan.name for plan in plans]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise JobError("Two plans have one name", where="evaluation", found=twice, next_step="rename one of the files")


def check_apart(paths: Iterable[Path], own: Path) -> None:
    """Raise JobError for a plan in the folder `own`, which the stage that measures it replaces."""
    for path in paths:
        if path.resolve().is_relative_to(own.resolve()):
            raise JobError(
                "A plan to measure lies among the files that the evaluation itself replaces",
                where=path,
                wanted=f"plans outside {own}",
                next_step="copy it (its .json and .safetensors) to another folder and name that",
            )
