"""The features of a layer's tokens, kept for products with them: in memory as far as declared, then in files.

A rank keeps those of its own experts, the first rank the shared expert's too, by microbatch and block and only of the
tokens that reach the block: 4 k W bytes a token over all ranks, k the experts of a token, W the kept neurons of one.

Shape letters: T tokens of a microbatch, R tokens of it that reach a block, W features of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from tenp_dist.compensation.joint_features import in_order
from tenp_dist.model.memory import own_copy
from tenp_dist.run_files import feature_file

BlockRows = tuple[torch.Tensor, torch.Tensor]
"""Tokens that reach a block, [R] int64, and its features of them, [R, W] float32."""


class StoredFeatures:
    """Microbatch after microbatch of one layer.

    folder: for files. name: of these features there. memory: bytes that may be held; what comes after goes to files.
    device: where products are made.
    """

    def __init__(self, folder: Path, name: str, memory: int, device: torch.device):
        self._folder, self._name, self._memory, self._device = folder, name, memory, device
        self._held: list[dict[int, BlockRows] | Path] = []
        self._tokens: list[int] = []
        self._nbytes = 0

    def append(self, blocks: Mapping[int, BlockRows], tokens: int) -> None:
        """One microbatch. tokens: T, those of other blocks included."""
        self._tokens.append(tokens)
        self._nbytes += sum(part.nbytes for pair in blocks.values() for part in pair)
        if self._nbytes <= self._memory:
            self._held.append({block: (rows, own_copy(part)) for block, (rows, part) in blocks.items()})
        else:
            self._held.append(self._spilled(blocks))

    def _spilled(self, blocks: Mapping[int, BlockRows]) -> Path:
        from safetensors.torch import save_file

        path = feature_file(self._folder, self._name, len(self._held))
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = {f"{block}.{i}": part.contiguous() for block, pair in blocks.items() for i, part in enumerate(pair)}
        save_file(parts, path)
        return path

    def __iter__(self) -> Iterator[tuple[int, dict[int, BlockRows]]]:
        """T and the blocks of every microbatch, in order."""
        for tokens, held in zip(self._tokens, self._held, strict=True):
            yield tokens, self._read(held) if isinstance(held, Path) else held

    def _read(self, path: Path) -> dict[int, BlockRows]:
        from safetensors.torch import load_file

        parts = load_file(path, device=str(self._device))
        blocks = in_order({int(name.split(".")[0]) for name in parts})
        return {block: (parts[f"{block}.0"], own_copy(parts[f"{block}.1"])) for block in blocks}

    def drop(self) -> None:
        """Remove the files."""
        for held in self._held:
            if isinstance(held, Path):
                held.unlink(missing_ok=True)
        self._held.clear()
