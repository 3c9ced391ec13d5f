"""One set of files for every rank of an expert-parallel engine, so that a rank reads its own experts and no others.

The index says, beside its `weight_map`, which rank each expert was given (`metadata.expert_parallel`):

    "expert_parallel": {"ranks": 2, "dense": [files], "files": [[files of rank 0], [of rank 1]],
                        "bytes": [of rank 0's experts, of rank 1's], "experts": {"3": [0, 1, 1, 0, ...]}}

`experts` has a rank for every expert id of a layer; prediction layers are counted behind the decoder's. What is no
expert's lies in `dense`, and every rank reads that. Loaders that know nothing of it follow the `weight_map`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenp_dist.checkpoint.families.base import Family
from tenp_dist.checkpoint.layer_names import experts_by_name
from tenp_dist.checkpoint.recipes import OutputTensor
from tenp_dist.checkpoint.writer import OutputShard, assign_shards
from tenp_dist.errors import JobError

METADATA_KEY = "expert_parallel"


@dataclass(frozen=True)
class FileSets:
    """The files of a checkpoint and what its index says of them beside the map.

    shards: all of them, dense ones first, then rank by rank.
    metadata: more entries of the index's `metadata`.
    """

    shards: Sequence[OutputShard[OutputTensor]]
    metadata: Mapping[str, Any]


def files_by_rank(
    tensors: Sequence[OutputTensor], family: Family, num_layers: int, ranks: int, shard_size: int
) -> FileSets:
    """Give every expert, with all its tensors, to a rank; each rank's tensors stay in the order given.

    Args:
        tensors: of the new checkpoint, experts under their new ids.
        num_layers: of the decoder.

    Raises:
        JobError: a layer has fewer experts than there are ranks.
    """
    owners = experts_by_name((tensor.name for tensor in tensors), family, num_layers)
    ranks_of = assign_ranks(_expert_bytes(tensors, owners), ranks)
    of_rank: list[list[OutputTensor]] = [[] for _ in range(ranks)]
    dense: list[OutputTensor] = []
    for tensor in tensors:
        owner = owners.get(tensor.name)
        (dense if owner is None else of_rank[ranks_of[owner[0]][owner[1]]]).append(tensor)
    dense_shards = assign_shards(dense, shard_size, "model-dense") if dense else []
    sets = [
        assign_shards(held, shard_size, f"model-rank-{rank:03d}-of-{ranks:03d}") for rank, held in enumerate(of_rank)
    ]
    metadata = {
        "ranks": ranks,
        "dense": [shard.file for shard in dense_shards],
        "files": [[shard.file for shard in shards] for shards in sets],
        "bytes": [sum(tensor.nbytes for tensor in held) for held in of_rank],
        "experts": {str(layer): given for layer, given in ranks_of.items()},
    }
    return FileSets([*dense_shards, *(shard for shards in sets for shard in shards)], {METADATA_KEY: metadata})


def assign_ranks(nbytes: Mapping[int, Sequence[int]], ranks: int) -> dict[int, list[int]]:
    """The rank of every expert, so that ranks hold about as many bytes, of every layer and of all together.

    A layer's experts go, the largest first, each to the bundle that is the lightest yet (Graham's LPT rule); then the
    heaviest bundle goes to the rank that holds the least so far, and so on. Bundles of a layer differ by its largest
    expert at most, and so, by induction, do ranks in all by the largest expert of the model: pairing heavy with light
    makes no difference larger than the larger of the two that it pairs. Ties go to lower ids.

    Args:
        nbytes: layer -> bytes of its experts, by id.

    Raises:
        JobError: a layer has fewer experts than there are ranks.
    """
    held, result = [0] * ranks, {}
    for layer, sizes in sorted(nbytes.items()):
        if len(sizes) < ranks:
            raise too_many_ranks(ranks, len(sizes), f"layer {layer}")
        bundles = sorted(_bundles(sizes, ranks), key=lambda bundle: (-sum(sizes[e] for e in bundle), bundle))
        lightest = sorted(range(ranks), key=lambda rank: (held[rank], rank))
        given = dict.fromkeys(range(len(sizes)), 0)
        for rank, bundle in zip(lightest, bundles, strict=True):
            held[rank] += sum(sizes[expert] for expert in bundle)
            given |= dict.fromkeys(bundle, rank)
        result[layer] = list(given.values())
    return result


def too_many_ranks(ranks: int, experts: int, where: str) -> JobError:
    return JobError(
        "There are more expert-parallel ranks than experts to give them",
        where=f"output.layout_by, {where}",
        found=f"{ranks} ranks",
        wanted=f"at most {experts}, the experts of a layer",
        next_step=f"set output.layout_by to expert-parallel={experts} or less",
    )


def _bundles(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Experts in so many bundles; one that weighs nothing goes where the fewest are."""
    bundles: list[list[int]] = [[] for _ in range(count)]
    weights = [0] * count
    for expert in sorted(range(len(sizes)), key=lambda expert: (-sizes[expert], expert)):
        lightest = min(range(count), key=lambda number: (weights[number], len(bundles[number]), number))
        bundles[lightest].append(expert)
        weights[lightest] += sizes[expert]
    return [sorted(bundle) for bundle in bundles]


def _expert_bytes(tensors: Iterable[OutputTensor], owners: Mapping[str, tuple[int, int]]) -> dict[int, list[int]]:
    """Layer -> bytes of each of its experts, by id."""
    found: dict[int, dict[int, int]] = {}
    for tensor in tensors:
        if tensor.name in owners:
            layer, expert = owners[tensor.name]
            sizes = found.setdefault(layer, {})
            sizes[expert] = sizes.get(expert, 0) + tensor.nbytes
    return {layer: [size for _, size in sorted(sizes.items())] for layer, sizes in found.items()}
