"""Every byte of source and checkpoints against the digests that were taken before: `tenp-dist verify JOB --full`.

A run notices weights that change in place by samples, for the price of some reads (`checkpoint/content_sample.py`).
This reads all: sha256 takes about a second per GB and core, so 689 GB are 12 minutes of one core, on 16 cores one, and
the rest is the time in which the storage gives 689 GB.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import file_digest, read_json, write_json
from tenp_dist.errors import StaleError, VerifyError
from tenp_dist.pool.base import Pool
from tenp_dist.stages.run import Run

SHA256 = "sha256"


def check_full(run: Run, pool: Pool) -> dict[str, Any]:
    """Read everything again; returns files and bytes that were read, and whether the source's digests are new.

    The written files are held against what `verify` read; the source against its digests of the first time, which are
    kept in the run directory.

    Raises:
        VerifyError: a written file is another one, or `verify.json` has no digests.
        StaleError: a file of the source is.
    """
    layouts = {name: _verified(run, name, entry) for name, entry in read_json(run.files.verify)["layouts"].items()}
    folders = {run.source.folder: list(run.source.index.files)}
    folders |= {run.files.checkpoint(name): list(files) for name, files in layouts.items()}
    paths = [folder / name for folder, names in folders.items() for name in names]
    found = dict(pool.map(_digest, [(path,) for path in paths]))
    for layout, digests in layouts.items():
        check_written(run.files.checkpoint(layout), digests, found)
    first = _check_source(run, {name: found[run.source.folder / name] for name in run.source.index.files})
    return {"files": len(paths), "bytes": sum(path.stat().st_size for path in paths), "source_noted": first}


def _digest(path: Path) -> tuple[Path, str]:
    return path, file_digest(path)


def _verified(run: Run, layout: str, entry: Mapping[str, Any]) -> Mapping[str, str]:
    if SHA256 not in entry:
        raise VerifyError(
            "The checkpoint was verified before digests of its files were kept",
            where=f"{run.files.verify}: {layout}",
            next_step=f"remove {run.files.verify} and give the command again",
        )
    return entry[SHA256]


def check_written(folder: Path, digests: Mapping[str, str], found: Mapping[Path, str]) -> None:
    """Hold files of a checkpoint against what `verify` read. Raises VerifyError."""
    changed = [name for name, digest in digests.items() if found[folder / name] != digest]
    if changed:
        raise VerifyError(
            "A file of the checkpoint changed since it was verified",
            where=folder / changed[0],
            found=f"{SHA256} {found[folder / changed[0]][:16]}, {len(changed)} of {len(digests)} files differ",
            wanted=digests[changed[0]][:16],
            next_step="remove the file and run `tenp-dist write`, then `tenp-dist verify`",
        )


def _check_source(run: Run, found: Mapping[str, str]) -> bool:
    """Hold the source against its digests of the first time; whether this is the first time."""
    path = run.files.source_digests
    kept = read_json(path) if path.exists() else {}
    if kept.get("fingerprint") != run.source.fingerprint:
        write_json(path, {"fingerprint": run.source.fingerprint, SHA256: found})
        return True
    changed = [name for name, digest in kept[SHA256].items() if found.get(name) != digest]
    if changed:
        raise StaleError(
            "Weights of the source changed since they were read in full",
            where=run.source.folder / changed[0],
            found=f"{SHA256} {found.get(changed[0], 'none')[:16]}, {len(changed)} of {len(found)} files differ",
            wanted=kept[SHA256][changed[0]][:16],
            next_step=f"put the files back; or remove {path} and begin another run directory with the new weights",
        )
    return False
