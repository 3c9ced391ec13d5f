"""What a finished stage leaves in the run directory: its key, the digest of what it wrote, its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION, read_json, write_json
from tenp_dist.errors import StaleError
from tenp_dist.run_files import RunFiles


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What a finished stage leaves behind.

    stage: its name.
    key: digest of the settings read, the digests of the stages before it and the schema version.
    digest: digest of what was written; part of the keys of stages that read it.
    files: path relative to the run directory -> size in bytes, to notice deleted or cut files.
    summary: for people and `--json`.
    inputs: what the key was made from, so that a mismatch can be explained.
    schema_version: of the files that the stage writes.
    """

    stage: str
    key: str
    digest: str
    files: Mapping[str, int]
    summary: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def write(self, run_dir: Path) -> None:
        write_json(RunFiles(run_dir).record(self.stage), asdict(self))

    def intact(self, run_dir: Path) -> bool:
        """Whether every file that the stage wrote is still there at its size."""
        return not self.damaged(run_dir)

    def damaged(self, run_dir: Path) -> list[str]:
        """Files that are gone or of another size than they were written with."""
        return [name for name, size in self.files.items() if _size(run_dir / name) != size]


def read_record(run_dir: Path, stage: str) -> StageRecord | None:
    """The record of `stage`, or None if the stage never finished under this schema."""
    path = RunFiles(run_dir).record(stage)
    if not path.exists():
        return None
    try:
        value = read_json(path)
        return StageRecord(**value) if value.get("schema_version") == SCHEMA_VERSION else None
    except (ValueError, TypeError, AttributeError) as error:
        raise StaleError(
            f"The record of stage `{stage}` cannot be read",
            where=path,
            found=error,
            wanted="the file as it was written",
            next_step=f"remove it and run `tenp-dist {stage} --overwrite`",
        ) from error


def sizes(run_dir: Path, paths: Sequence[Path]) -> dict[str, int]:
    """Relative path -> size, the form in which a StageRecord lists files."""
    return {str(path.relative_to(run_dir)): path.stat().st_size for path in paths}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None
