"""What a format of stored tensors does: it is recognised, read as plain tensors, and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tenp_dist.checkpoint.entries import Encoder, TensorEntry


class StoredFormat(Protocol):
    """A form that matrices are stored in, and the plain tensors that they stand for.

    What a folded entry takes in the files, and how it is read, its `stored` says (`entries.Stored`).
    """

    @property
    def described(self) -> str:
        """What a checkpoint in this format has, for messages about one in no format that is read."""
        ...

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this config.json is in the format."""
        ...

    def fold(
        self, folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
    ) -> dict[str, TensorEntry]:
        """The tensors with one plain entry for all those that are stored parts of it; others stay as they are.

        Raises:
            SourceError: parts that do not fit each other. folder: of the checkpoint, for the message.
        """
        ...

    def plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config of the plain checkpoint that one with this config stands for."""
        ...


class WrittenFormat(StoredFormat, Protocol):
    """A format that plain tensors can be written in. Those in a format are written so again by their `stored`."""

    def encoder(self, name: str) -> Encoder:
        """How a plain matrix of this name is written."""
        ...

    def config_entry(self, plain_modules: Sequence[str]) -> dict[str, Any]:
        """What config.json says of such a checkpoint. plain_modules: those whose weights stay plain numbers."""
        ...
