"""Score a model on a pool: its shards are driven, then the score files made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tenp_dist.config import Cluster
from tenp_dist.engine.compute import Progress
from tenp_dist.engine.controller import Ledger
from tenp_dist.engine.drive import Summary, cut_model, drive
from tenp_dist.engine.local import Pool
from tenp_dist.engine.parts import check_ranks
from tenp_dist.engine.shard import ScoreShard, ScoreTask, finish_scores


@dataclass(frozen=True)
class Layers:
    """Of the model: bytes of every decoder layer in compute dtype, and which of them are MoE layers."""

    nbytes: Sequence[int]
    moe: Sequence[int]


def score_model(
    pool: Pool, task: ScoreTask, layers: Layers, cluster: Cluster, waves: int, progress: Callable[[Progress], None]
) -> Summary:
    """Score all layers.

    Args:
        task: settled (no `auto` in it). waves: of the corpus, at most `task.waves`.

    Raises:
        ClusterError: more shards than layers, or the cluster is smaller than asked.
        StaleError: scoring was begun with another number of ranks.
    """
    task = replace(task, ranks=cluster.tensor_parallel)
    check_ranks(task.folder, task.ranks)
    cut = cut_model(cluster, layers.nbytes, task.compute.device)
    if all(task.parts().waves(layer) == waves for layer in layers.moe):
        done = Summary(0, 0.0, cut.mode, [], 1.0)
    else:
        ledger = Ledger(task.folder.parent / "stages" / "score.ledger.jsonl")
        done = drive(pool, ScoreShard, task, cut, cluster, progress, ledger)
    finish_scores(task, layers.moe, waves)
    return done


def layers_of_facts(facts: Mapping[str, Any], itemsize: int) -> Layers:
    """Layer sizes in a compute dtype of `itemsize` bytes, from `facts.json`."""
    stored = max(facts["dtypes"], key=facts["dtypes"].get)
    ratio = itemsize / {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}[stored]
    per_layer = facts["bytes"]["per_layer"]
    return Layers([int(per_layer[str(i)] * ratio) for i in range(facts["num_layers"])], facts["moe_layers"])
