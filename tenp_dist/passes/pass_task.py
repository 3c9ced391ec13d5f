"""What a pass over a model's layers is told: which tokens, through what, where files go, and what happens there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from tenp_dist.artifacts import digest_of
from tenp_dist.calibration.corpus import read_corpus
from tenp_dist.passes.compute import Compute
from tenp_dist.passes.hidden_states import HiddenStateFiles
from tenp_dist.passes.layer_ops import microbatches
from tenp_dist.passes.layer_step import LayerStep, OpenShard
from tenp_dist.passes.schedule import Mode, split_waves
from tenp_dist.run_files import HIDDEN, worker_logs

DEFAULT_WAVES = 8


@dataclass(frozen=True)
class PassTask(ABC):
    """What the workers of a pass need. Every kind of pass has its own task, which makes its `LayerStep`.

    model: folder of the checkpoint.
    corpus: file of the tokens.
    folder: of the stage's own files.
    key: of the stage; with device, dtype and ranks it is stored in every file.
    compute: how a worker computes.
    waves: the tokens are cut into at most so many.
    mode: whether shards keep their layers or stream them; see `schedule.py`.
    host_memory: bytes that hidden states may take in a process.
    commit_seconds: how much work a streaming shard may lose: hidden states are stored no more often than this, and
        always at the end of a shard.
    ranks: processes that share a layer.
    """

    model: Path
    corpus: Path
    folder: Path
    key: str
    compute: Compute
    waves: int = DEFAULT_WAVES
    mode: Mode = "streaming"
    host_memory: int = 1 << 62
    commit_seconds: float = 10.0
    ranks: int = 1

    @property
    def file_key(self) -> str:
        return digest_of([self.key, self.compute.device, self.compute.dtype, self.waves, self.ranks])

    @property
    def logs(self) -> Path:
        """Where the workers' logs go: beside the folder, for they outlive it."""
        return worker_logs(self.folder)

    @property
    def hidden_state_files(self) -> HiddenStateFiles:
        return HiddenStateFiles(self.folder / HIDDEN, self.file_key)

    @property
    def differentiates(self) -> bool:
        """Whether its steps ask for gradients: all workers of the pass then compute so that there can be some."""
        return False

    @property
    def turned(self) -> int:
        """How many layers the model has, where the pass takes them from the last down; 0 where from the first up.

        Shards, units, steps and files of hidden states then count from the last layer, which is place 0.
        """
        return 0

    @property
    def visits(self) -> int:
        """How often in a row a layer is taken: every time is a place of its own, between which a wave can be stored."""
        return 1

    def layer_at(self, place: int) -> int:
        """The layer that is taken at a place of the pass."""
        return self.turned - 1 - place if self.turned else place // self.visits

    @abstractmethod
    def step(self, shard: OpenShard) -> LayerStep:
        """What happens in the layers of one rank of a shard."""

    def side_by_side(self) -> int:
        """How many of the model's forms go through a layer side by side, at most."""
        return 1

    def count_waves(self) -> int:
        """Waves that the corpus is cut into, at most `waves`."""
        return len(split_waves(len(microbatches(read_corpus(self.corpus), self.compute.batch_tokens)), self.waves))
