"""A command that is refused: what it says, and what it leaves as it was."""

import shutil
from pathlib import Path

import pytest

from tenp_dist import errors


def refused(result, error: str, *texts: str) -> None:
    """The command ended with this error's exit code and message, all of `texts` in it, and no traceback."""
    assert result.exit_code == getattr(errors, error).exit_code, (result.stderr, result.exception)
    for text in (*texts, "next:"):
        assert text in result.stderr, result.stderr
    assert "Traceback" not in result.stderr + result.stdout


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the journal, which tells of failures too."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "progress.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


_FINISHED: dict[str, Path] = {}


@pytest.fixture
def finished(tenp, job_file, model, tmp_path, tmp_path_factory) -> Path:
    """The job file of a run that went to its end, model and run directory in tmp_path."""
    job = job_file(model=model)
    if not _FINISHED:
        folder = tmp_path_factory.mktemp("finished") / "run"
        result = tenp("run", job, "--run-dir", folder)
        assert result.exit_code == 0, result.stderr
        _FINISHED["run"] = folder
    shutil.copytree(_FINISHED["run"], tmp_path / "run")
    return job
