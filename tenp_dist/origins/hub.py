"""A model on the Hugging Face Hub, by huggingface_hub: its cache, token, endpoint, offline variables and retries."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, get_cached_repo_tree, get_session, hf_hub_url, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, hf_raise_for_status

from tenp_dist.origins.hub_errors import explained
from tenp_dist.origins.origin import Origin, is_small


def open_hub(name: str, cache: Path | None = None, version: str | None = None) -> Origin:
    """Find the commit that a name stands for and bring its small files.

    Args:
        name: `org/name` or `org/name@revision`.
        cache: in place of the Hub's own cache.
        version: the commit, where it is known already; the revision of the name is not asked for then.

    Raises:
        SourceError: not there, not to be seen, or not to be reached. DiskFullError: no room for a small file.
    """
    repo, _, revision = name.partition("@")
    disable_progress_bars()  # progress is told by the files themselves
    with explained(name):
        folder = _bring(repo, version or revision or None, cache, ["config.json"])
        sizes = _listing(repo, folder, cache)
        _bring(repo, folder.name, cache, [file for file in sizes if is_small(file)])
    return Origin(name=name, version=folder.name, folder=folder, sizes=sizes, store=HubStore(name, repo, folder, cache))


def _bring(repo: str, revision: str | None, cache: Path | None, files: Sequence[str]) -> Path:
    """The folder of a snapshot, with these files in it."""
    patterns = [glob.escape(file) for file in files]
    return Path(snapshot_download(repo, revision=revision, cache_dir=cache, allow_patterns=patterns))


def _listing(repo: str, folder: Path, cache: Path | None) -> Mapping[str, int]:
    """File -> bytes, as the Hub lists this commit; of what is here where its list was never asked for."""
    try:
        return {file.path: file.size for file in get_cached_repo_tree(repo, revision=folder.name, cache_dir=cache)}
    except CachedRepoTreeNotFoundError:  # offline, and brought here by something else
        found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


@dataclass(frozen=True)
class HubStore:
    """One commit of a repository.

    name: as the job gives it.
    repo: `org/name`.
    folder: of the snapshot, called like the commit.
    cache: in place of the Hub's own cache.
    """

    name: str
    repo: str
    folder: Path
    cache: Path | None

    def read(self, file: str, start: int, stop: int) -> bytes:
        url = hf_hub_url(self.repo, file, revision=self.folder.name)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}"}
        wanted, found = stop - start, b""
        with explained(self.name), get_session().stream(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as answer:  # fmt: skip
            if answer.is_error:
                answer.read()
            hf_raise_for_status(answer)
            skip = start if answer.status_code == 200 else 0  # a server that knows no ranges begins at the beginning
            for piece in answer.iter_bytes():
                found += piece
                if len(found) >= skip + wanted:
                    break
        return found[skip : skip + wanted]

    def fetch(self, files: Sequence[str]) -> None:
        with explained(self.name):
            _bring(self.repo, self.folder.name, self.cache, files)

    def underway(self) -> Sequence[Path]:
        return list((self.folder.parent.parent / "blobs").glob("*.incomplete"))
