"""A source that lies elsewhere, at one version of it: small files here, weights as headers until they are brought."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tenp_dist.artifacts import free_bytes
from tenp_dist.checkpoint.headers import Beginning, beginning_of
from tenp_dist.checkpoint.index import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, weight_files
from tenp_dist.checkpoint.side_files import comes_along
from tenp_dist.checkpoint.source import Source, open_source
from tenp_dist.errors import DiskFullError, SourceError
from tenp_dist.origins.watch import watched

_FIRST_BYTES = 100_000  # of a file, read at once: most headers end inside them
_READERS = 8  # headers read at a time

Tell = Callable[[int, int], None]
"""Is told bytes that are here and bytes in all."""


class Store(Protocol):
    """How the files of one version are reached."""

    def read(self, file: str, start: int, stop: int) -> bytes:
        """A range of a file. Raises SourceError."""

    def fetch(self, files: Sequence[str]) -> None:
        """Bring whole files into the origin's folder; what is there stays. Raises SourceError, DiskFullError."""

    def underway(self) -> Sequence[Path]:
        """Files that downloads are being written to."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A source from elsewhere.

    name: as the job gives it.
    version: commit of a repository, or digest of what a bucket lists.
    folder: where its files go; the small ones are there.
    sizes: all of its files -> bytes.
    store: how they are reached.
    """

    name: str
    version: str
    folder: Path
    sizes: Mapping[str, int]
    store: Store

    def open(self) -> Source:
        """The source by its headers: read here where the weights are here, else by ranges.

        Raises:
            SourceError, UnsupportedModelError: as `open_source`, or it cannot be reached.
        """
        self._check_listed()
        files = weight_files(self.folder)
        if not self.missing(files):
            return open_source(self.folder, version=self.version)
        return open_source(self.folder, self._beginnings(files), self.version)

    def missing(self, files: Sequence[str]) -> list[str]:
        """Those that are not here in full."""
        return [file for file in files if _size_of(self.folder / file) != self.sizes.get(file, -1)]

    def fetch(self, tell: Tell) -> int:
        """Bring the weights; returns the bytes that were not here before.

        Raises:
            SourceError: a file cannot be brought. DiskFullError: there is no room for it.
        """
        files = weight_files(self.folder)
        missing, total = self.missing(files), sum(self.sizes.get(file, 0) for file in files)
        asked = sum(self.sizes.get(file, 0) for file in missing)
        self._check_room(asked)
        present = [self.folder / file for file in files]
        with watched(present, self.store.underway, lambda done: tell(min(done, total), total)):
            self.store.fetch(missing)
        return asked

    def plain(self) -> dict[str, Any]:
        """The content of `source.json`."""
        return {"model": self.name, "version": self.version}

    def _beginnings(self, files: Sequence[str]) -> Beginning:
        """Of the files, read side by side."""
        with ThreadPoolExecutor(_READERS) as readers:
            return dict(zip(files, readers.map(self._beginning, files), strict=True)).__getitem__

    def _beginning(self, file: str) -> tuple[bytes, int]:
        size, place = self._size(file), 0
        first = self.store.read(file, 0, min(size, _FIRST_BYTES))

        def read(count: int) -> bytes:
            nonlocal place
            start, place = place, min(place + count, size)
            known = first[start:place]
            return known + (self.store.read(file, start + len(known), place) if start + len(known) < place else b"")

        return beginning_of(read, size), size

    def _size(self, file: str) -> int:
        if file not in self.sizes:
            raise SourceError(
                "Checkpoint shard is missing",
                where=f"{self.name}, version {self.version}",
                wanted=file,
                next_step="choose another revision, or tell those who published it",
            )
        return self.sizes[file]

    def _check_listed(self) -> None:
        """Refuse what cannot be a checkpoint by the names of its files."""
        weights = INDEX_NAME in self.sizes or SINGLE_NAME in self.sizes
        if weights and CONFIG_NAME in self.sizes:
            return
        others = [file for file in self.sizes if weights or not is_small(file)]
        raise SourceError(
            "No config.json among the model's files" if weights else "No safetensors among the model's files",
            where=f"{self.name}, version {self.version}",
            found=", ".join(others[:3]) + ", ..." * (len(others) > 3) or "no weights",
            wanted=CONFIG_NAME if weights else f"{INDEX_NAME} or {SINGLE_NAME}",
            next_step="name a checkpoint, or a revision of it, as transformers saves them (`save_pretrained`)",
        )

    def _check_room(self, nbytes: int) -> None:
        free = free_bytes(self.folder)
        if free < nbytes:
            raise DiskFullError(
                "Not enough space for the model",
                where=self.folder,
                found=f"{free / 1e6:,.1f} MB free",
                wanted=f"{nbytes / 1e6:,.1f} MB of weights that are not here yet",
                next_step="free space, or set model_cache to a folder on a larger file system",
            )


def is_small(file: str) -> bool:
    """Whether a file is wanted beside the weights: configs, index, and what comes along with a checkpoint."""
    return ("/" not in file and file.endswith(".json")) or comes_along(file)


def _size_of(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
