"""Who is measured again on the development split, which decides; and what a search says of itself (`search.json`).

Fitness on little text rewards chance: gains of a search may not carry over to other text. So the best individuals and
all rankings are measured once more on text that no fitness was measured on, and the best there is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tenp_dist.search.evolution import Figures, Generation
from tenp_dist.search.individuals import kept_of
from tenp_dist.search.parents import Scored, ranked
from tenp_dist.search.space import Space

RANKING = "ranking"  # how individuals came to be that a ranking keeps


def candidates(scored: Sequence[Scored], count: int) -> list[Scored]:
    """The best by fitness, then all others that rankings keep."""
    best = ranked(scored)[:count]
    return best + [one for one in scored if one.origin["by"] == RANKING and one not in best]


def decided(tried: Sequence[Scored], values: Mapping[str, float]) -> Scored:
    """The candidate of least value on the development split; equals by fitness. values: by name."""
    return min(tried, key=lambda one: (values[one.name], one.value))


def document(
    space: Space,
    generations: Sequence[Generation],
    tried: Sequence[Scored],
    figures: Mapping[str, Figures],
    source: Figures,
    fitness: str,
) -> dict[str, Any]:
    """What `search.json` holds. figures, source: of the candidates and the source on the development split."""
    chosen = decided(tried, {name: own[fitness] for name, own in figures.items()})
    told = {one.name: _told(space, one, fitness) | _development(figures[one.name], source, fitness) for one in tried}
    rankings = [one for one in tried if one.origin["by"] == RANKING]
    best = decided(rankings, {name: own[fitness] for name, own in figures.items()}) if rankings else None
    return {
        "criterion": fitness,
        "passes": len(generations) + 1,
        "individuals": sum(len(one.scored) for one in generations),
        "chosen": told[chosen.name],
        "best_ranking": None if best is None else told[best.name],
        "source": {"fitness": dict(generations[-1].source), "development": dict(source)},
        "development": list(told.values()),
        "curve": _curve(generations),
    }


def _curve(generations: Sequence[Generation]) -> list[dict[str, Any]]:
    rows, scored = [], list[Scored]()
    for one in generations:
        scored += one.scored
        best = ranked(scored)[0]
        rows.append(
            {
                "pass": one.number,
                "phase": one.phase,
                "individuals": len(one.scored),
                "best": best.value,
                "best_individual": best.name,
                "best_of_pass": ranked(one.scored)[0].value,
            }
        )
    return rows


def _told(space: Space, one: Scored, fitness: str) -> dict[str, Any]:
    kept = kept_of(space, one.individual)
    return {
        "individual": one.name,
        "origin": dict(one.origin),
        "phase": "merge" if one.individual.merges else "prune",
        "active": one.individual.active,
        "merged": sum(len(layer.merged) for layer in kept.values()),
        "fitness": one.value,
        "fitness_figures": dict(one.figures),
    }


def _development(figures: Figures, source: Figures, fitness: str) -> dict[str, Any]:
    return {"development": figures[fitness], "nll_increase": figures["nll"] - source["nll"], "figures": dict(figures)}


def best_words(passes: int, scored: Sequence[Scored], new: Generation, fitness: str) -> str:
    """A line on how far a search is. scored: all that was measured, of which `new` is the last pass."""
    best = ranked(scored)[0]
    by = " ".join(str(best.origin[key]) for key in ("by", "name") if key in best.origin)
    above = best.figures["nll"] - new.source["nll"]
    return (
        f"pass {new.number + 1} of {passes}, {new.phase}: best so far {best.name} ({by}), "
        f"{fitness} {best.value:.4f}, NLL {above:+.4f} over the source's"
    )
