"""Choosing `auto` keys of a job: a grid of plans measured on calibration text that nothing was scored on.

The grid is ours: alpha in six shares of rho, which hold the paper's best (rho/2 for Qwen1.5-MoE and rho/3 for
DeepSeek-V2-Lite at rho 0.6, rho/6 at 0.3), and the slope in four steps. All plans go through the model in one pass.
`method: auto` tries a few methods in the same pass, each with the shares and slopes that are asked for if it keeps
experts whole: what is the best of them differs from model to model. `compensate: auto` tries every plan as it is
and compensated, in the forms that it has. Chosen is the least divergence from the source
(KL), not the least NLL: it compares whole distributions instead of one token's probability, so it settles on less
text, and a plan gains nothing by chance on a domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction
from typing import Any

from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.neuron_groups import in_groups
from tenp_dist.config import COMPENSATE, Budget, Compensate
from tenp_dist.errors import JobError
from tenp_dist.evaluation.plans import NamedPlan

ALPHA_SHARES = tuple(Fraction(n, 12) for n in (0, 1, 2, 4, 6, 8))
SLOPES = tuple(map(Decimal, ("0", "0.33", "0.67", "1")))
CRITERION = "kl"
METHODS = ("obs", "obs-uniform", "global", "camera", "tenp", "enp", "hope", "reap")
"""What `method: auto` tries: the best of each kind of plan on the models that we measured."""


def candidates(budget: Budget) -> dict[str, Budget]:
    """Name -> budget of every combination tried, in the order in which ties are settled: method, alpha, slope.

    Raises:
        JobError: the method keeps no expert whole, so there is nothing to choose.
    """
    if not budget.auto:
        return {f"method={budget.method}": budget}
    if "method" not in budget.auto:
        _check_whole(budget)
        return _combinations(budget)
    found: dict[str, Budget] = {}
    for method in METHODS:
        own = _without_unused(budget.model_copy(update={"method": method}))
        if not in_groups(own, kind_of(own).method):
            continue
        many = _combinations(own) if own.auto else {"": own}
        found |= {f"method={method} {name}".rstrip(): one for name, one in many.items()}
    return found


def _without_unused(budget: Budget) -> Budget:
    """The budget without `auto`, or an `align`, that its method has no use for."""
    kind = kind_of(budget)
    unused = (() if kind.keeps_whole else budget.auto) + (("align",) if "align" in kind.unused_keys else ())
    return budget.model_copy(update={key: Budget.model_fields[key].default for key in unused})


def _check_whole(budget: Budget) -> None:
    if not kind_of(Budget(method=budget.method)).keeps_whole:
        raise JobError(
            f"Method {budget.method} has no whole experts to choose a number of",
            where="budget: " + ", ".join(f"{key}: auto" for key in budget.auto),
            wanted="auto with a method that keeps experts whole",
            next_step="leave `important` and `slope` out, or use method tenp",
        )


def _combinations(budget: Budget) -> dict[str, Budget]:
    alphas = [_alpha(budget, share) for share in ALPHA_SHARES] if "important" in budget.auto else [budget.important]
    slopes = SLOPES if "slope" in budget.auto else [budget.slope]
    pairs = [(alpha, slope) for alpha in dict.fromkeys(alphas) for slope in (slopes if alpha != 0 else slopes[:1])]
    return {
        f"important={alpha} slope={slope}": budget.model_copy(update={"important": alpha, "slope": slope})
        for alpha, slope in pairs
    }


def _alpha(budget: Budget, share: Fraction) -> Decimal:
    """share * rho, cut after four digits."""
    exact = budget.retention_exact * share
    value = (Decimal(exact.numerator) / Decimal(exact.denominator)).quantize(Decimal("0.0001"), rounding=ROUND_FLOOR)
    return value.normalize() + 0


def selection_document(
    budget: Budget,
    plans: Sequence[NamedPlan],
    figures: Mapping[str, Mapping[str, Any]],
    source: Mapping[str, Any],
    weights: Mapping[str, Fraction],
    forms: Sequence[Compensate] = (),
) -> dict[str, Any]:
    """The content of selection.json.

    Args:
        plans: in the order in which ties are settled.
        figures: plan name -> figures of evaluation.
        source: figures of the model as it is.
        weights: domain -> weight, as for scores.
        forms: of compensation, where several were tried.
    """
    curve = [_point(plan, figures[plan.name], source, weights, bool(forms)) for plan in plans]
    best = min(curve, key=lambda point: point[CRITERION])  # the first of equals
    keys = ("method", "important", "slope") if "method" in budget.auto else ("important", "slope")
    others = [point for point in curve if point.get("method") != best.get("method")]
    return {
        "auto": [*budget.auto, *([COMPENSATE] if forms else [])],
        "criterion": CRITERION,
        "chosen": {key: best[key] for key in keys} | ({COMPENSATE: best[COMPENSATE]} if forms else {}),
        **({"next_method": min(others, key=lambda point: point[CRITERION])} if others else {}),
        "tokens": {domain: row["tokens"] for domain, row in source["domains"].items()},
        "source_nll": weighted_mean(source, "nll", weights),
        "curve": curve,
    }


def _point(
    plan: NamedPlan,
    figures: Mapping[str, Any],
    source: Mapping[str, Any],
    weights: Mapping[str, Fraction],
    forms: bool,
) -> dict[str, Any]:
    measured = {key: weighted_mean(figures, key, weights) for key in ("nll", "kl", "top1_agreement")}
    return {
        **{key: plan.document[key] for key in ("method",) if key in plan.document},
        "important": plan.document["budget"]["important"],
        "slope": plan.document["budget"]["slope"],
        **({COMPENSATE: plan.compensated} if forms else {}),
        "retention": plan.document["retention"]["realised"],
        "nll_increase": measured["nll"] - weighted_mean(source, "nll", weights),
        **measured,
    }


def weighted_mean(figures: Mapping[str, Any], key: str, weights: Mapping[str, Fraction]) -> float:
    """A figure over domains, by their weights."""
    rows = figures["domains"]
    shares = {domain: float(weights.get(domain, 1)) for domain in rows}
    return sum(shares[domain] * row[key] for domain, row in rows.items()) / sum(shares.values())


def chosen_budget(budget: Budget, document: Mapping[str, Any]) -> Budget:
    """The budget with its `auto` keys as chosen."""
    if "method" in budget.auto:
        budget = _without_unused(budget.model_copy(update={"method": document["chosen"]["method"]}))
    chosen = {key: Decimal(document["chosen"][key]) for key in budget.auto}
    return Budget.model_validate(budget.model_dump() | chosen)
