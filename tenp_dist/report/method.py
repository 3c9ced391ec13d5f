"""What the report says of a plan's method: its kind, its control, and the score of experts that the map shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tenp_dist.budget.kinds.base import PlanKind
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.config import Budget
from tenp_dist.scoring.methods import registry
from tenp_dist.scoring.methods.registry import Context, Method
from tenp_dist.scoring.statistics import LayerStatistics

_SHOWN_INSTEAD = "tenp"  # of methods that rank no experts, or by chance


def method_facts(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The `method` part of the report, from plan.json.

    removes: whether experts leave the model, alone or with their layers. layers: those that leave. drawn: whether
    everything is chosen by chance. experts, neurons: methods whose rankings the budget takes instead, or None. map: the
    method whose expert scores the importance map shows.
    """
    kind, exchanged = _kind(plan), {unit: _name(plan["budget"].get(unit)) for unit in ("experts", "neurons")}
    method = kind.method
    return {
        "name": method.name,
        "source": method.source,
        "removes": kind.takes_out,
        "layers": plan.get("leaving_layers", []),
        "drawn": not method.statistics,
        **exchanged,
        "control": f"The random control {kind.control_words}, at the same size.",
        "map": (exchanged["experts"] or method.name) if method.expert_statistics else _SHOWN_INSTEAD,
    }


def map_ranking(plan: Mapping[str, Any]) -> Method:
    """The method whose expert scores the map shows: the plan's, or TENP's where that ranks none from the text."""
    method = _kind(plan).method
    return method if method.expert_statistics else registry.get(_SHOWN_INSTEAD)


def importance_of(
    ranking: Method, statistics: LayerStatistics, weights: Mapping[str, float], layer: int
) -> list[float]:
    """Score of every expert over domains, [E]. weights: domain -> weight, also of domains that were not scored."""
    known = {name: weight for name, weight in weights.items() if name in statistics.domains}
    return ranking.expert_scores(statistics, Context(layer=layer, domain_weights=known)).tolist()


def _name(given: str | Sequence[str] | None) -> str | None:
    return given if given is None or isinstance(given, str) else " + ".join(given)


def _kind(plan: Mapping[str, Any]) -> PlanKind:
    exchanged = {unit: plan["budget"].get(unit) for unit in ("experts", "neurons")}
    return kind_of(Budget(method=plan["method"], **exchanged))
