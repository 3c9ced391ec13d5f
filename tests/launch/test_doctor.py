"""What doctor finds: on this machine, on a spoiled one, in a job."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tenp_dist.launch import doctor
from tenp_dist.launch.doctor import environment_traps, examine


def verdicts(findings) -> dict[str, str]:
    return {finding.what: finding.verdict for finding in findings}


def test_this_machine_is_examined(tmp_path, monkeypatch):
    for name in doctor._LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    findings = examine(tmp_path / "not" / "there")
    found = verdicts(findings)
    assert found["Python"] == found["Packages"] == "ok"
    assert {"Accelerators", "Compiler", "Shared memory", "Disk space", "Disk writes", "Open files", "Ports"} <= set(
        found
    )
    assert "MB/s" in next(finding.found for finding in findings if finding.what == "Disk writes")
    assert not any(tmp_path.iterdir()), "nothing is left behind"
    assert all(finding.fix for finding in findings if finding.verdict != "ok")


@pytest.mark.parametrize(
    "environment, verdict, named",
    [
        ({}, "ok", "no known traps"),
        ({"LOCAL_SIZE": "2"}, "failed", "LOCAL_SIZE"),
        ({"RANK": "0", "MASTER_PORT": "1"}, "failed", "RANK, MASTER_PORT"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "warning", "hides every GPU"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "ok", "no known traps"),
        ({"http_proxy": "http://proxy"}, "failed", "proxy"),
        ({"http_proxy": "http://proxy", "no_proxy": "10.0.0.0/8"}, "ok", "no known traps"),
    ],
)
def test_environment_traps(environment, verdict, named):
    findings = list(environment_traps(environment))
    assert [finding.verdict for finding in findings] == [verdict] and named in findings[0].found
    assert verdict == "ok" or findings[0].fix


def test_a_wrong_version_a_small_shared_memory_and_a_long_folder_are_told(monkeypatch, tmp_path):
    real = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "1.0" if name == "transformers" else real(name)
    )
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(total=64 * 2**20))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 60)))
    found = {finding.what: finding for finding in examine(tmp_path)}
    assert found["Packages"].verdict == "failed" and "transformers 1.0, wanted ~=5.23.0" in found["Packages"].found
    assert found["Shared memory"].verdict == "failed" and "--shm-size" in found["Shared memory"].fix
    assert found["Ray's folder"].verdict == "failed" and "too long" in found["Ray's folder"].found


def test_a_folder_that_cannot_be_written(tmp_path):
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount here")
    try:
        found = {finding.what: finding for finding in examine(folder / "run")}
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert found["Disk writes"].verdict == "failed" and "Read-only file system" in found["Disk writes"].found


def test_command_ends_with_its_code_and_says_the_fix(tenp, job_file, tmp_path, monkeypatch):
    for name in (*doctor._LAUNCHER, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    good = tenp("doctor", "--job", job_file(), "--json")
    document = json.loads(good.stdout)
    assert good.exit_code == (0 if document["ready"] else 1)
    assert [line["verdict"] for line in document["nodes"]["job"]] == ["ok", "ok"]
    assert not (tmp_path / "run").exists()

    monkeypatch.setenv("LOCAL_SIZE", "2")
    bad = tenp("doctor")
    assert bad.exit_code == 1 and "LOCAL_SIZE" in bad.stdout and "unset" in bad.stdout and "to repair" in bad.stdout
    job = tenp("doctor", "--job", job_file(model=tmp_path / "nowhere"), "--json")
    lines = json.loads(job.stdout)["nodes"]["job"]
    assert job.exit_code == 1 and lines[0]["verdict"] == "failed" and "Model folder not found" in lines[0]["found"]


def test_a_cluster_that_is_not_there(tenp):
    result = tenp("doctor", "--address", "127.0.0.1:9", "--json", ray=True)
    line = json.loads(result.stdout)["nodes"]["cluster"][0]
    assert result.exit_code == 1 and line["verdict"] == "failed" and "127.0.0.1:9" in line["found"]


def test_runs_without_heavy_imports_before_it_is_asked():
    script = "import sys, tenp_dist.launch.doctor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path("/"))
    assert done.stdout.strip() == "False"
