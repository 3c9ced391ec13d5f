"""What of a checkpoint is known before a byte of its weights is read: names, shapes, files, config, what comes along.

The write stage follows it, `write --dry-run` shows it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenp_dist.checkpoint.expert_parallel import FileSets, files_by_rank
from tenp_dist.checkpoint.index import INDEX_NAME
from tenp_dist.checkpoint.joined import rejoined
from tenp_dist.checkpoint.output_form import routed_matrices
from tenp_dist.checkpoint.recipes import OutputTensor
from tenp_dist.checkpoint.side_files import side_files
from tenp_dist.checkpoint.source import Source
from tenp_dist.checkpoint.writer import OutputShard, assign_shards
from tenp_dist.layouts.base import Layout, Pruned


@dataclass(frozen=True)
class Outline:
    """What a checkpoint will be.

    shards: its weight files, with how every tensor in them is made.
    metadata: what the index says beside sizes and the map.
    config: the content of config.json.
    texts: name -> text of the files that the layout brings.
    carried: name -> file of the source that comes along.
    effective_bits: of a parameter of routed experts, those that went included.
    """

    shards: Sequence[OutputShard[OutputTensor]]
    metadata: Mapping[str, Any]
    config: Mapping[str, Any]
    texts: Mapping[str, str]
    carried: Mapping[str, Path]
    effective_bits: float

    @property
    def files(self) -> list[str]:
        """Names of all of them."""
        return [*(shard.file for shard in self.shards), INDEX_NAME, "config.json", *self.texts, *self.carried]

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(shard.nbytes for shard in self.shards)


def outline_of(layout: Layout, pruned: Pruned, shard_size: int, ranks: int | None = None) -> Outline:
    """What a layout makes of a pruned model, prediction layers as `pruned.mtp` says.

    Args:
        shard_size: bytes of the largest file, unless one tensor is larger.
        ranks: expert-parallel ranks that get files of their own, None for none.

    Raises:
        BudgetError, SourceError: as `Layout.tensors`. JobError: as `files_by_rank`.
    """
    source = pruned.source
    tensors = pruned.form.tensors(source, layout.tensors(pruned), _solved(pruned))
    if layout.keeps_fused:
        tensors = rejoined(pruned.form.fused(source), tensors)
    sets = _file_sets(tensors, source, shard_size, ranks)
    return Outline(
        shards=sets.shards,
        metadata=sets.metadata,
        config={**layout.config(pruned), **pruned.form.config_entry},
        texts=layout.extra_files(source),
        carried={name: path for name, path in side_files(source.folder).items() if layout.carries(path)},
        effective_bits=_effective_bits(source, tensors, (pruned.whole or source).facts.parameters.routed),
    )


def _effective_bits(source: Source, tensors: Sequence[OutputTensor], parameters: int) -> float:
    """Bits that the checkpoint spends on a parameter of routed experts. parameters: all, those that went included."""
    routed = set(routed_matrices(source))
    nbytes = sum(tensor.nbytes for tensor in tensors if tensor.recipe.source in routed)
    return 8 * nbytes / parameters


def _file_sets(tensors: Sequence[OutputTensor], source: Source, shard_size: int, ranks: int | None) -> FileSets:
    if ranks is None:
        return FileSets(assign_shards(tensors, shard_size), {})
    return files_by_rank(tensors, source.family, source.facts.num_layers, ranks, shard_size)


def _solved(pruned: Pruned) -> Collection[str]:
    """Names of the source's tensors that take compensated values."""
    return () if pruned.compensated is None else pruned.compensated.tensors.keys()
