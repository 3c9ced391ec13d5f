"""Outputs that are in the way and file systems without space: refused in time, and nothing lost."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from helpers.refusals import contents, refused
from tenp_dist.checkpoint.index import INDEX_NAME


def test_run_directory_is_a_file(tenp, job_file, tmp_path):
    (tmp_path / "run").write_text("mine")
    refused(tenp("run", job_file()), "OutputError", "cannot be written", str(tmp_path / "run"), "--run-dir")
    assert (tmp_path / "run").read_text() == "mine"


def test_checkpoint_folder_of_somebody_else(tenp, job_file, tmp_path):
    folder = tmp_path / "run" / "checkpoint" / "ragged"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    refused(tenp("run", job_file()), "OutputError", "not empty", str(folder), "thesis.tex", "--overwrite")
    assert contents(folder) == {"thesis.tex": b"years of work"}


def test_nothing_is_overwritten_without_overwrite(finished, tenp, tmp_path):
    before = contents(tmp_path / "run")
    for command, changed, field in (
        ("run", "budget.retention=0.5", "budget.retention: 0.6 -> 0.5"),
        ("score", "score.dtype=bfloat16", "dtype: auto -> bfloat16"),
        ("calibrate", "calibration.seed=4", "seed: 0 -> 4"),
        ("write", "output.shard_size=50KB", "shard_size: 100000 -> 50000"),
    ):
        result = tenp(command, finished, "--set", changed)
        refused(result, "OutputError", "made from other settings", field.split(".")[-1], "--overwrite", "--run-dir")
        assert contents(tmp_path / "run") == before
    assert tenp("run", finished, "--set", "budget.retention=0.5", "--overwrite").exit_code == 0
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["retention"]["realised"] < 0.5 + 1e-9


def test_overwrite_that_cannot_succeed_costs_nothing(finished, tenp, tmp_path, monkeypatch):
    """A refused budget, unreadable text and a file system that is too small are found before anything goes."""
    before = contents(tmp_path / "run")
    for *arguments, error in (
        ("plan", "--set", "budget.align=64", "BudgetError"),
        ("calibrate", "--set", "calibration.sequence_length=100000", "CalibrationError"),
    ):
        refused(tenp(*arguments[:1], finished, *arguments[1:], "--overwrite"), error)
    monkeypatch.setattr("tenp_dist.stages.write.free_bytes", lambda folder: -(10**9))
    result = tenp("write", finished, "--set", "output.shard_size=50KB", "--overwrite")
    refused(result, "DiskFullError", "Not enough space", "free", "nothing was written yet")
    assert contents(tmp_path / "run") == before
    assert tenp("verify", finished).exit_code == 0


def test_not_enough_space_is_seen_before_writing(tenp, job_file, tmp_path, monkeypatch):
    monkeypatch.setattr("tenp_dist.stages.write.free_bytes", lambda folder: 100_000)
    job = job_file()
    refused(
        tenp("run", job), "DiskFullError", "Not enough space", "0.1 MB free", "checkpoint/ragged", "larger file system"
    )
    assert not (tmp_path / "run" / "checkpoint").exists()
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("victim", "code"),
    [
        ("calibration.arrow", errno.ENOSPC),
        ("layer_00002.safetensors", errno.ENOSPC),
        ("plan.json", errno.EDQUOT),
        ("model-00002-of-", errno.ENOSPC),
        ("modeling_tenp_deepseek_v3.py", errno.ENOSPC),
        ("tokenizer.json", errno.EDQUOT),
        (INDEX_NAME, errno.ENOSPC),
    ],
)
def test_disk_fills_while_writing(victim, code, tenp, job_file, tmp_path, monkeypatch):
    """Whichever file meets the end of the disk: no half file stays, and the same command goes on from there."""
    real = os.fsync

    def full(handle):
        if f".{victim}" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    job = job_file()
    refused(tenp("run", job), "DiskFullError", "No space left", victim, "finished files are kept", "larger file system")
    monkeypatch.setattr(os, "fsync", real)
    before = contents(tmp_path / "run")
    assert not [name for name in before if name.endswith(".tmp") or Path(name).name.startswith(victim)]
    assert tenp("run", job).exit_code == 0
    after = contents(tmp_path / "run")
    working = (".writing.json", "scores/hidden/", "scores/parts/", ".ledger.jsonl")  # only while a stage runs
    assert all(after[name] == data for name, data in before.items() if not any(part in name for part in working))


def test_real_file_system_without_space(tenp, job_file, tmp_path, monkeypatch):
    """Seen before any work; and where the estimate is too low, when the file system is full."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        job = job_file()
        result = tenp("run", job, "--run-dir", folder / "run")
        refused(result, "DiskFullError", "Not enough space for the run", "node ", str(folder / "run"), "MB free")
        assert not (folder / "run" / "facts.json").exists(), "before any work"
        with monkeypatch.context() as patch:
            patch.setattr("tenp_dist.preflight.node_checks.bytes_needed", lambda job, source: 0)
            result = tenp("run", job, "--run-dir", folder / "run")
        refused(result, "DiskFullError", "No space left", "small/run/scores")
        assert not list(folder.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=10m", str(folder)], check=True)
        assert tenp("run", job, "--run-dir", folder / "run").exit_code == 0
    finally:
        subprocess.run(["umount", str(folder)], check=True)
