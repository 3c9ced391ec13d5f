"""Hidden states at the boundary between two layers, one file per wave: how shards hand over and where a run resumes.

`wave_002.layer_00004.safetensors` holds what enters layer 4. Files are written whole or not at all and
hold the key of what they belong to; a wave's position is its furthest file. Hidden states that do not
fit the host memory declared for them live here between layers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tenp_dist.artifacts import atomic_write
from tenp_dist.errors import StaleError, first_line
from tenp_dist.model.memory import own_copy
from tenp_dist.run_files import stored_layers, wave_file

_PAUSES = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)  # seconds, between tries to open a file that is listed


Hidden = dict[str, list[torch.Tensor]]  # of one wave: stream -> states [B, S, D], one tensor per microbatch


class HiddenStateFiles:
    """The files of hidden states of one pass. key: what they were made from; files with another do not count."""

    def __init__(self, folder: Path, key: str):
        self.folder = folder
        self.key = key

    def position(self, wave: int) -> int:
        """The layer that a wave enters next, 0 if nothing of it is stored. Raises StaleError."""
        return self._furthest(wave, float("inf"))

    def _furthest(self, wave: int, limit: float) -> int:
        """The wave's furthest file up to layer `limit`. Its worker may go on meanwhile, and drop what was listed.

        Raises StaleError where a file stays listed and there is none: a dangling link, a folder that is not told of it.
        """
        said, pauses = "", iter(_PAUSES)
        while True:
            try:
                found = (layer for layer in self._layers(wave) if layer <= limit)
                return max((layer for layer in found if self._ours(wave, layer)), default=0)
            except FileNotFoundError as error:
                if first_line(error) != said:  # another file than before: the wave goes on
                    said, pauses = first_line(error), iter(_PAUSES)
                pause = next(pauses, None)
                if pause is None:
                    raise _cannot_be_opened(self.folder, said) from error
                time.sleep(pause)

    def write(self, wave: int, layer: int, hidden: Mapping[str, torch.Tensor]) -> None:
        """Store what enters `layer`, then drop the wave's earlier files."""
        from safetensors.torch import save

        tensors = {name: tensor.cpu().contiguous() for name, tensor in hidden.items()}
        with atomic_write(self._path(wave, layer)) as stream:
            stream.write(save(tensors, metadata={"tenp": json.dumps({"key": self.key})}))
        for earlier in self._layers(wave):
            if earlier < self._needed_from(layer):
                self._path(wave, earlier).unlink(missing_ok=True)

    def _needed_from(self, layer: int) -> int:
        """The earliest file that a wave still needs once the one of `layer` is there."""
        return layer

    def read(self, wave: int, layer: int) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self._path(wave, layer))

    def open(self, wave: int, layer: int) -> Any:
        """The file, to be read tensor by tensor or slice by slice: a context manager."""
        from safetensors import safe_open

        return safe_open(self._path(wave, layer), framework="pt")

    def _layers(self, wave: int) -> list[int]:
        return stored_layers(self.folder, wave)

    def _path(self, wave: int, layer: int) -> Path:
        return wave_file(self.folder, wave, layer)

    def _ours(self, wave: int, layer: int) -> bool:
        from safetensors import SafetensorError

        try:
            with self.open(wave, layer) as file:
                return json.loads((file.metadata() or {}).get("tenp", "{}")).get("key") == self.key
        except SafetensorError:
            return False


class GuardedHiddenStateFiles(HiddenStateFiles):
    """For passes whose sums of a layer exist only in memory until its last wave.

    A file counts only where the layers before it are finished: what a wave needs to go through an unfinished
    layer again stays stored. unfinished: the first layer whose result is not stored, infinity if there is none.
    """

    def __init__(self, folder: Path, key: str, unfinished: Callable[[], float]):
        super().__init__(folder, key)
        self._unfinished = unfinished

    def position(self, wave: int) -> int:
        return self._furthest(wave, self._unfinished())

    def _needed_from(self, layer: int) -> int:
        return int(min(layer, self._unfinished()))


def _cannot_be_opened(folder: Path, said: str) -> StaleError:
    return StaleError(
        "A file of hidden states is listed but cannot be opened",
        where=folder,
        found=said,
        wanted="a file, or none",
        next_step="remove it and run the same command again: the wave goes on from what else is stored of it",
    )


def named(hidden: Hidden, batches: range) -> dict[str, torch.Tensor]:
    """The tensors of a file of hidden states. batches: numbers of the wave's microbatches."""
    return {
        tensor_name(stream, i): state
        for stream, states in hidden.items()
        for i, state in zip(batches, states, strict=True)
    }


def tensor_name(stream: str, batch: int) -> str:
    """Name of a microbatch's hidden states in their file: `random.00012`, of a single stream `00012`."""
    return f"{stream}.{batch:05d}" if stream else f"{batch:05d}"


def read_hidden(
    files: HiddenStateFiles, wave: int, layer: int, streams: Sequence[str], batches: range, device: str
) -> Hidden:
    """A wave's hidden states of all streams, from the file of what enters `layer`."""
    stored = files.read(wave, layer)
    return {stream: [own_copy(stored.pop(tensor_name(stream, i)), device) for i in batches] for stream in streams}
