"""The source checkpoint, opened once: what is in it, of which family it is, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tenp_dist.artifacts import digest_of
from tenp_dist.checkpoint.content_sample import content_sample
from tenp_dist.checkpoint.facts import Facts, checkpoint_facts
from tenp_dist.checkpoint.families.base import Family
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.foreign_forms import check_form
from tenp_dist.checkpoint.headers import Beginning
from tenp_dist.checkpoint.index import CheckpointIndex, open_index


@dataclass(frozen=True)
class Source:
    """A checkpoint to prune.

    index: config, and where every tensor lies.
    family: how its tensors are named.
    facts: its sizes, checked against the config; `facts.json` is their plain form.
    version: what stands for every byte of it where it comes from elsewhere (a commit); None of a folder.
    """

    index: CheckpointIndex
    family: Family
    facts: Facts
    version: str | None = None

    @property
    def folder(self) -> Path:
        return self.index.folder

    @property
    def fingerprint(self) -> str:
        """Digest of config, index, headers and file sizes."""
        return self.index.fingerprint

    @property
    def complete(self) -> bool:
        """Whether the weights are here, not only their headers."""
        return all((self.folder / file).is_file() for file in self.index.files)

    @cached_property
    def content(self) -> str:
        """Digest of pieces of the weights themselves; of the version where there is one."""
        if self.version is not None:
            return digest_of(self.version)
        return content_sample(self.folder / file for file in self.index.files)


def open_source(folder: Path, beginning: Beginning | None = None, version: str | None = None) -> Source:
    """Read config, index and headers.

    beginning: gives the headers of weights that are not in the folder yet; None where they are.
    version: see `Source`.

    Raises:
        SourceError: anything missing, truncated or contradictory.
        UnsupportedModelError: not a Mixture-of-Experts model of a known family, or stored in a form that is not read.
    """
    index = open_index(folder, beginning)
    check_form(index.folder, index.config)
    family = family_of(index.config)
    return Source(index, family, checkpoint_facts(index, family), version)
