"""Where a Ray of this machine keeps its sockets, and folders that it cannot keep them in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenp_dist.errors import ClusterError
from tenp_dist.launch import doctor
from tenp_dist.pool.ray_client import _local_folder
from tenp_dist.pool.ray_environment import ray_folder, unfit

LONG, ODD = "/scratch/" + "x" * 60, "/scratch/Ünïcode"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)


def test_as_ray_chooses_it(monkeypatch):
    from ray._common.utils import get_default_system_temp_dir

    for name, value in ((None, None), ("TMPDIR", "/var/tmp"), ("RAY_TMPDIR", "/dev/shm")):
        if name:
            monkeypatch.setenv(name, value)
        assert str(ray_folder()) == get_default_system_temp_dir()


@pytest.mark.parametrize("folder, why", [(LONG, "too long"), (ODD, "beyond ASCII"), ("/s/" + "ü" * 15, "ASCII")])
def test_a_local_ray_stays_away_from_a_folder_that_it_cannot_use(folder, why, monkeypatch):
    assert why in unfit(Path(folder))
    monkeypatch.setenv("TMPDIR", folder)
    assert _local_folder() == {"_temp_dir": "/tmp/ray"}
    findings = [finding for finding in doctor._temporary() if why in finding.found]
    assert [finding.verdict for finding in findings] == ["warning"] and "RAY_TMPDIR" in findings[0].fix
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with pytest.raises(ClusterError, match=why):
        _local_folder()
    assert [finding.verdict for finding in doctor._temporary()] == ["failed"]


def test_a_plain_folder_is_taken(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/var/tmp/a b")
    assert unfit(ray_folder()) is None and _local_folder() == {}
