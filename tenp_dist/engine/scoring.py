"""Score a model on a pool: its shards are driven, then the score files made."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tenp_dist.artifacts import drop_leftovers
from tenp_dist.checkpoint.entries import ITEM_SIZE
from tenp_dist.engine.drive import Site, Summary, drive
from tenp_dist.engine.parts import check_ranks
from tenp_dist.engine.shard import ScoreShard, ScoreTask


def score_model(site: Site, task: ScoreTask, moe_layers: Sequence[int]) -> Summary:
    """Score all layers. task: settled (no `auto` in it); its ranks are those of the site.

    Raises:
        ClusterError: as `drive`.
        NumericalError: NaN or Inf in weights, activations or sums.
        StaleError: scoring was begun with another number of ranks.
    """
    task, waves = replace(task, ranks=site.cluster.tensor_parallel), task.count_waves()
    check_ranks(task.folder, task.ranks)
    scored = all(task.parts().waves(layer) == waves for layer in moe_layers)
    done = drive(site, ScoreShard, task, finished=scored)
    task.parts().join(moe_layers, waves)
    for folder in ("parts", "hidden"):  # what only an unfinished run needs
        shutil.rmtree(task.folder / folder, ignore_errors=True)
    drop_leftovers(task.folder)
    return done


def layer_bytes(facts: Mapping[str, Any], itemsize: int) -> list[int]:
    """Bytes of every decoder layer in a compute dtype of `itemsize` bytes, from `facts.json`."""
    stored = max(facts["dtypes"], key=facts["dtypes"].get)
    ratio = itemsize / ITEM_SIZE[stored]
    per_layer = facts["bytes"]["per_layer"]
    return [int(per_layer[str(layer)] * ratio) for layer in range(facts["num_layers"])]


def active_bytes(facts: Mapping[str, Any], itemsize: int) -> list[int]:
    """Like `layer_bytes`, of routed experts only the `top_k` that a token goes to."""
    nbytes, experts = layer_bytes(facts, itemsize), facts["num_experts"]
    routed = facts["parameters"]["routed"] // max(1, len(facts["moe_layers"])) * itemsize
    passed_by = routed * (experts - (facts["top_k"] or experts)) // max(1, experts)
    return [size - passed_by * (layer in facts["moe_layers"]) for layer, size in enumerate(nbytes)]
