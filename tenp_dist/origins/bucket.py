"""A model in a bucket (`s3://bucket/folder`, `gs://bucket/folder`), read by fsspec and copied into a cache folder."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from filelock import FileLock

from tenp_dist.artifacts import digest_of, read_json, write_json
from tenp_dist.errors import DiskFullError, SourceError, StaleError, TenpError, one_line
from tenp_dist.origins.origin import Origin, is_small

_MARKS = ("ETag", "etag", "generation", "md5Hash", "crc32c", "LastModified", "mtime", "created")
"""What a file's entry may have that another content changes; the first that is there counts."""
_PIECE_BYTES = 32 << 20  # of a file, asked for at a time: what an interrupted copy may lose
_COPIES = 8  # files copied at a time
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""Protocol -> extra of this package that has its library."""


def open_bucket(name: str, cache: Path | None = None, version: str | None = None) -> Origin:
    """List a model's files and copy the small ones.

    Args:
        name: an address that fsspec knows.
        cache: folder for copies, None for `default_cache`.
        version: the listing that is wanted, where one was chosen already. The bucket is not asked if a copy has it.

    Raises:
        SourceError: nothing there, no library or credentials for it, or not to be reached.
        StaleError: the bucket lists something else than the version that is wanted.
        DiskFullError: no room for a small file.
    """
    places = (cache or default_cache()) / "buckets"
    last = name.rstrip("/").rpartition("/")[2]
    listed = places / version / "listing.json" if version else None
    if version and listed and listed.is_file():
        sizes = read_json(listed)
    else:
        listing = _listing(name)
        found = digest_of(listing)[:40]
        _check_version(name, version, found)
        version, sizes = found, {file: entry["size"] for file, entry in listing.items()}
    folder = places / version / last
    store = BucketStore(name, folder, sizes, version)
    write_json(folder.parent / "listing.json", sizes)
    store.fetch([file for file in sizes if is_small(file)])
    return Origin(name=name, version=version, folder=folder, sizes=sizes, store=store)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tenp-dist" / "models"


def _listing(name: str) -> dict[str, dict[str, Any]]:
    """File below the address -> its size in bytes and what marks its content."""
    with _explained(name):
        system, root = fsspec.url_to_fs(name)
        system.invalidate_cache()
        entries = system.find(root, detail=True)
    named = {path.removeprefix(root).lstrip("/"): _entry(entry) for path, entry in sorted(entries.items())}
    found = {file: entry for file, entry in named.items() if file and not file.endswith("/")}  # marks of folders
    outside = [file for file in found if ".." in PurePosixPath(file).parts]
    if outside:
        raise SourceError(
            "A name in the bucket points outside the model's folder",
            where=name,
            found=outside[0],
            wanted="plain file names",
            next_step="do not use this model, or copy its files to another folder",
        )
    if not found:
        raise SourceError(
            "No files at the model's address",
            where=name,
            wanted="a folder with config.json, safetensors and tokenizer",
            next_step="correct `model`, or the credentials: what may not be listed looks empty",
        )
    return found


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    mark = next((str(entry[key]) for key in _MARKS if entry.get(key)), None)
    return {"size": int(entry["size"]), "mark": mark}


def _check_version(name: str, wanted: str | None, found: str) -> None:
    if wanted is not None and found != wanted:
        raise StaleError(
            "The files in the bucket are not those that this run began with",
            where=name,
            found=f"version {found[:12]}",
            wanted=f"version {wanted[:12]}",
            next_step="put the earlier files back, or choose another --run-dir",
        )


@dataclass(frozen=True)
class BucketStore:
    """One listing of a bucket's folder.

    name: its address.
    folder: of the copy.
    sizes: file -> bytes.
    version: of the listing.
    """

    name: str
    folder: Path
    sizes: Mapping[str, int]
    version: str

    def read(self, file: str, start: int, stop: int) -> bytes:
        with _explained(self.name):
            system, root = fsspec.url_to_fs(self.name)
            path = f"{root.rstrip('/')}/{file}"
            return bytes(system.cat_file(path, start=start, end=stop))  # by name: s3fs has another between

    def fetch(self, files: Sequence[str]) -> None:
        """Copies are made piece by piece, and go on from the last piece that was written."""
        missing = [file for file in files if not (self.folder / file).is_file()]
        if not missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.parent / "lock"), ThreadPoolExecutor(_COPIES) as copies:
            list(copies.map(self._copy, missing))
        try:
            _check_version(self.name, self.version, digest_of(_listing(self.name))[:40])
        except StaleError:  # what was copied may be of both
            for file in missing:
                (self.folder / file).unlink(missing_ok=True)
            raise

    def underway(self) -> Sequence[Path]:
        return list(self.folder.rglob(".*.part"))

    def _copy(self, file: str) -> None:
        target, size = self.folder / file, self.sizes[file]
        if target.is_file():  # another process was first
            return
        part = target.with_name(f".{target.name}.part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "ab") as stream:
                while (place := stream.tell()) < size:
                    stream.write(self._piece(file, place, min(place + _PIECE_BYTES, size)))
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(target)
        except OSError as error:
            raise _not_copied(target, error) from error

    def _piece(self, file: str, start: int, stop: int) -> bytes:
        found = self.read(file, start, stop)
        if len(found) != stop - start:
            raise SourceError(
                "A file in the bucket is shorter than it was listed",
                where=f"{self.name}: {file}",
                found=f"{start + len(found)} bytes",
                wanted=f"{self.sizes[file]} bytes",
                next_step="see who is writing there, then run again",
            )
        return found


def _not_copied(target: Path, error: OSError) -> TenpError:
    kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else SourceError
    return kind(
        "No space left for the model" if kind is DiskFullError else "The model cannot be copied into the cache",
        where=target,
        found=error.strerror or error,
        next_step="free space, or set model_cache to another folder; pieces that came are kept",
    )


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Each library of a protocol has errors of its own, with nothing above them in common."""
    try:
        yield
    except TenpError:
        raise
    except ImportError as error:
        protocol = name.partition("://")[0]
        extra = _EXTRAS.get(protocol)
        raise SourceError(
            f"The library that reads {protocol}:// is not installed",
            where=name,
            found=one_line(error),
            next_step=f"pip install 'tenp-dist[{extra}]', on the node that starts the run" if extra else "install it",
        ) from error
    except Exception as error:
        raise SourceError(
            "The model cannot be read at its address",
            where=name,
            found=f"{type(error).__name__}: {one_line(error)}",
            wanted="an address that fsspec can list, such as s3://bucket/folder or gs://bucket/folder",
            next_step="check the address, credentials (AWS_PROFILE, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS) "
            "and the network; pieces that came are kept, and the same command goes on from them",
        ) from error
