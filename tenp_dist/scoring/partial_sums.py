"""Partial sums: what a rank has summed so far for a layer, over the waves 0 .. n-1.

`parts/layer_00003.rank_000-of-002.safetensors` holds the sums of a rank's own experts over the waves that
went through. Microbatches are added one by one, in their order, so that the sums of n waves are the same
bytes however often they were stored on the way; the file is replaced whole. When all waves are in, the
files of the ranks are joined into the layer's score file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tenp_dist.errors import StaleError
from tenp_dist.run_files import ScoreFiles
from tenp_dist.scoring.statistics import (
    MERGE_RULES,
    LayerStatistics,
    join_experts,
    read_metadata,
    read_statistics,
    write_statistics,
)


class PartialSums:
    """The partial sums of one rank. With one rank a layer's last wave makes its score file at once.

    scores: folder of the score files.
    key: of the pass, with device and dtype.
    rank: whose sums these are.
    ranks: processes that share a layer.
    """

    def __init__(self, scores: Path, key: str, rank: int, ranks: int):
        self.files, self.key, self.rank, self.ranks = ScoreFiles(scores), key, rank, ranks

    def waves(self, layer: int) -> int:
        """Waves that are summed for a layer: in its score file, or else in this rank's partial sums."""
        return _waves(self.score_file(layer), self.key) or self._part_waves(layer, self.rank)

    def _part_waves(self, layer: int, rank: int) -> int:
        """Waves in a rank's partial sums; none where an earlier version began them, without all that is summed now."""
        file = self.part_file(layer, rank)
        waves = _waves(file, self.key)
        return waves if waves and set(MERGE_RULES) <= set(read_metadata(file)["merge"]) else 0

    def read(self, layer: int) -> tuple[int, LayerStatistics | None]:
        """Waves that are summed for a layer; their sums, or None where none go on: no wave, or all of them."""
        waves, path = self.waves(layer), self.part_file(layer, self.rank)
        return waves, read_statistics(path) if waves and self._part_waves(layer, self.rank) == waves else None

    def check_next(self, layer: int, wave: int, waves: int) -> None:
        """Raise StaleError where a wave would be added to sums that lack the one before. waves: in the sums."""
        if waves != wave:
            raise StaleError(
                "The sums of earlier waves are missing",
                where=self.part_file(layer, self.rank),
                found=f"sums of {waves} waves",
                wanted=f"of the {wave} whose hidden states have gone on",
                next_step="remove scores/hidden and run `tenp-dist score` again: layers that have their sums keep them",
            )

    def write(self, layer: int, statistics: LayerStatistics, waves: int, total: int) -> None:
        """Store the sums over the first `waves` waves of `total`."""
        whole = self.ranks == 1 and waves == total
        path = self.score_file(layer) if whole else self.part_file(layer, self.rank)
        write_statistics(path, statistics, layer=layer, key=self.key, waves=waves)

    def join(self, layers: Iterable[int], waves: int) -> None:
        """Make the score files of all ranks' partial sums, which must hold all waves; finished ones stay."""
        for layer in layers:
            if _waves(self.score_file(layer), self.key) != waves:
                write_statistics(
                    self.score_file(layer), self._joined(layer, waves), layer=layer, key=self.key, waves=waves
                )

    def _joined(self, layer: int, waves: int) -> LayerStatistics:
        files = [self.part_file(layer, rank) for rank in range(self.ranks)]
        for rank, file in enumerate(files):
            found = self._part_waves(layer, rank)
            if found != waves:
                raise StaleError(
                    "A score part is missing or incomplete",
                    where=file,
                    found=f"{found} waves",
                    wanted=f"{waves} waves",
                    next_step="remove scores/hidden and run `tenp-dist score` again",
                )
        return join_experts([read_statistics(file) for file in files])

    def score_file(self, layer: int) -> Path:
        return self.files.layer(layer)

    def part_file(self, layer: int, rank: int) -> Path:
        return self.files.part(layer, rank, self.ranks)


def check_ranks(scores: Path, ranks: int) -> None:
    """Raise StaleError where a run was begun with another number of ranks: its sums are not the same bytes."""
    parts = ScoreFiles(scores).parts
    for path in sorted(parts.glob("layer_*.rank_*")):
        begun = int(path.name.split("-of-")[1].split(".")[0])
        if begun != ranks:
            raise StaleError(
                "Scoring was begun with another tensor_parallel",
                where=parts,
                found=f"cluster.tensor_parallel: {begun}",
                wanted=f"cluster.tensor_parallel: {ranks}",
                next_step=f"go on with {begun}, or start over in another --run-dir",
            )


def _waves(path: Path, key: str) -> int:
    """Waves in a file, 0 if it is not there or was made from something else."""
    if not path.exists():
        return 0
    metadata = read_metadata(path)
    return int(metadata["waves"]) if metadata["key"] == key else 0
