"""Which kind of place a name means, and the origin that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tenp_dist.job_values import is_address
from tenp_dist.origins.origin import Origin, Tell


def open_origin(name: str, cache: Path | None = None, version: str | None = None) -> Origin:
    """The origin that a job's `model` names; libraries that reach it are imported here only.

    Args:
        name: as the job gives it.
        cache: folder that it is brought to, None for the default.
        version: the one that was chosen before, None for what the name stands for now.

    Raises:
        SourceError: not there, or not to be reached. StaleError: a bucket has another version than was chosen before.
        DiskFullError: no room for a small file.
    """
    if is_address(name):
        from tenp_dist.origins.bucket import open_bucket

        return open_bucket(name, cache, version)
    from tenp_dist.origins.hub import open_hub

    return open_hub(name, cache, version)


def upload(folder: Path, repo: str, message: str, *, private: bool) -> str:
    """A folder to a repository of the Hub; returns the commit. Raises OutputError."""
    from tenp_dist.origins.hub_upload import upload as upload_folder

    return upload_folder(folder, repo, message, private=private)


def fetched(model: Path | str, announce: Callable[[str], None]) -> Path:
    """The folder of a model, brought here if it lies elsewhere. announce: is told how far it is."""
    if isinstance(model, Path):
        return model
    origin = open_origin(model)

    def tell(done: int, total: int) -> None:
        announce(f"downloading {model}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    told: Tell = tell
    origin.fetch(told)
    return origin.folder
