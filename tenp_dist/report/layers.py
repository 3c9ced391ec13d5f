"""What the report says of every MoE layer: what the plan keeps of it, how its experts rank, which were reached."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tenp_dist.elimination.files import read_planning
from tenp_dist.report.method import importance_of, map_ranking
from tenp_dist.run_files import RunFiles
from tenp_dist.scoring.methods.registry import Method

STARVED_SHARE = 0.1
"""An expert with fewer tokens than this share of an even split is called starved."""


def routing_of(tokens: Sequence[float]) -> dict[str, Any]:
    """Which experts of one layer the calibration text did not reach, from routed tokens per expert [E].

    `uniform_share` is what every expert would get from an even split; `starved` lists the experts
    above zero and under STARVED_SHARE of it, `unreached` those at zero.
    """
    uniform = sum(tokens) / len(tokens)
    return {
        "total": sum(tokens),
        "uniform_share": uniform,
        "minimum": min(tokens),
        "median": statistics.median(tokens),
        "maximum": max(tokens),
        "unreached": [expert for expert, seen in enumerate(tokens) if seen == 0],
        "starved": [expert for expert, seen in enumerate(tokens) if 0 < seen < STARVED_SHARE * uniform],
    }


def layer_figures(files: RunFiles, plan: Mapping[str, Any], weights: Mapping[str, float]) -> list[dict[str, Any]]:
    """One entry per MoE layer of the plan, in depth order. weights: of domains."""
    ranking, layers = map_ranking(plan), sorted((int(layer), entry) for layer, entry in plan["layers"].items())
    return [_layer(files, layer, entry, ranking, weights) for layer, entry in layers]


def _layer(
    files: RunFiles, layer: int, entry: Mapping[str, Any], ranking: Method, weights: Mapping[str, float]
) -> dict[str, Any]:
    neurons = entry["experts"] * entry["intermediate_size"]
    kept = sum(int(width) * experts for width, experts in entry["widths"].items())
    whole = len(entry["whole"]) * entry["intermediate_size"]
    found: dict[str, Any] = {"domains": None, "importance": None, "tokens": None, "routing": None}
    path = files.scores.layer(layer)
    if path.exists():
        names = dict.fromkeys((*ranking.expert_statistics, "token_count"))
        scores = read_planning(path, files.elimination, layer, list(names), files.gradients)
        tokens = scores["token_count"].sum(dim=0).tolist()
        found = {
            "domains": list(scores.domains),
            "importance": importance_of(ranking, scores, weights, layer),
            "tokens": tokens,
            "routing": routing_of(tokens),
        }
    return {
        "layer": layer,
        **{key: entry[key] for key in ("experts", "intermediate_size", "whole", "widths", "retention", "activated")},
        "share_whole": whole / neurons,
        "share_narrow": (kept - whole) / neurons,
        **found,
    }


def routing_total(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How many experts of the whole model text did not, or nearly not, reach; None where no layer has scores."""
    routed = [layer["routing"] for layer in layers if layer["routing"]]
    if not routed:
        return None
    return {
        "tokens": sum(layer["total"] for layer in routed),
        "unreached": sum(len(layer["unreached"]) for layer in routed),
        "starved": sum(len(layer["starved"]) for layer in routed),
        "starved_share": STARVED_SHARE,
    }
