"""Check the files of an expert-parallel checkpoint: every expert whole in the files of the rank that the index names.

Whose a tensor is is read off its name, by the road of the uniform check, and what ranks hold is added up again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tenp_dist.artifacts import read_json
from tenp_dist.checkpoint.index import INDEX_NAME, CheckpointIndex
from tenp_dist.checkpoint.source import Source
from tenp_dist.checkpoint.verify_uniform import Names
from tenp_dist.errors import VerifyError


def check_ranks(source: Source, written: CheckpointIndex, ranks: int) -> None:
    """Files, map and bytes of so many ranks agree with the tensors.

    Raises:
        VerifyError: names the first tensor, or the figure, that differs.
    """
    stated = (read_json(written.folder / INDEX_NAME).get("metadata") or {}).get("expert_parallel") or {}
    if stated.get("ranks") != ranks or len(stated.get("files") or ()) != ranks:
        raise _differs(written, "ranks", stated.get("ranks"), ranks)
    names = Names(source.family, source.family.num_layers(written.config))  # fewer where layers leave
    owner_of = {file: rank for rank, files in enumerate(stated["files"]) for file in files}
    experts: Counter[tuple[int, int]] = Counter()
    held: Counter[int] = Counter()
    for name, entry in written.tensors.items():
        layer, expert = names.layer(name), names.expert(name)
        rank = None if layer is None or expert is None else _stated_rank(stated, layer, expert[0])
        if owner_of.get(entry.file) != rank or (rank is None and entry.file not in stated["dense"]):
            raise _differs(written, name, entry.file, "a dense file" if rank is None else f"a file of rank {rank}")
        if layer is not None and expert is not None and rank is not None:
            experts[layer, expert[0]] += entry.stored_bytes
            held[rank] += entry.stored_bytes
    if sum(map(len, stated["experts"].values())) != len(experts):
        raise _differs(written, "experts", "experts that have no tensor", f"{len(experts)} experts")
    sums = [held[rank] for rank in range(ranks)]
    if stated.get("bytes") != sums or max(sums) - min(sums) > max(experts.values(), default=0):
        raise _differs(written, "bytes", stated.get("bytes"), f"{sums}, apart by one expert at most")


def _stated_rank(stated: Mapping[str, Any], layer: int, expert: int) -> int:
    given = stated["experts"].get(str(layer), ())
    return given[expert] if expert < len(given) else -1


def _differs(written: CheckpointIndex, what: str, found: object, wanted: object) -> VerifyError:
    return VerifyError(
        "Files of expert-parallel ranks differ from what their index says",
        where=f"{written.folder / INDEX_NAME}: {what}",
        found=found,
        wanted=wanted,
        next_step="write again with --overwrite; if it stays, report it with this message",
    )
