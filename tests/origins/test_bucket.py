"""Models in buckets, by fsspec's own file systems in memory and on the disk; S3 itself in `test_s3.py`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import pytest

from helpers.paths import ROOT
from helpers.refusals import refused
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import DiskFullError, SourceError, StaleError
from tenp_dist.origins import bucket
from tenp_dist.origins import origin as origins
from tenp_dist.origins.bucket import open_bucket

ADDRESS = "memory://models/tiny"
MODEL = ROOT / "jobs" / "quickstart" / "moe-4m"
TOTAL = sum(path.stat().st_size for path in MODEL.glob("*.safetensors"))


@pytest.fixture
def stored():
    """The file system in memory, with the quickstart's model in it."""
    memory = fsspec.filesystem("memory")
    for path in MODEL.iterdir():
        memory.pipe(f"/models/tiny/{path.name}", path.read_bytes())
    yield memory
    memory.rm("/models", recursive=True)


@pytest.fixture
def ranges(monkeypatch) -> list[tuple[str, int, int]]:
    """(file, start, stop) of every range that is read."""
    found, read = [], bucket.BucketStore.read

    def noted(self, file, start, stop):
        found.append((file, start, stop))
        return read(self, file, start, stop)

    monkeypatch.setattr(bucket.BucketStore, "read", noted)
    return found


def of_weights(ranges) -> int:
    return sum(stop - start for file, start, stop in ranges if file.endswith(".safetensors"))


def test_headers_alone_are_read(stored, ranges, tmp_path, monkeypatch):
    monkeypatch.setattr(origins, "_FIRST_BYTES", 8)
    found, here = open_bucket(ADDRESS, tmp_path).open(), open_source(MODEL)
    assert found.fingerprint == here.fingerprint and found.facts.model == "tiny"
    assert of_weights(ranges) < TOTAL / 5
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.beside
def test_a_run(stored, tenp, job_file, tmp_path):
    job = job_file(model=ADDRESS, model_cache="cache")
    done = tenp("run", job)
    assert done.exit_code == 0 and "Fetch the source" in done.stderr, done.stderr
    stored.rm("/models", recursive=True)
    again = tenp("run", job)
    assert again.exit_code == 0 and again.stderr.count("already done") == 8, "a copy needs no bucket"
    stored.pipe("/models/other", b"")
    noted = json.loads((tmp_path / "run" / "source.json").read_text())
    assert noted["model"] == ADDRESS and (tmp_path / "cache" / "buckets" / noted["version"] / "tiny").is_dir()


def test_a_copy_goes_on_from_its_last_piece(stored, ranges, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket, "_PIECE_BYTES", 100_000)
    monkeypatch.setattr(bucket, "_COPIES", 1)
    origin, read = open_bucket(ADDRESS, tmp_path), bucket.BucketStore.read
    left = 3

    def breaking(self, file, start, stop):
        nonlocal left
        left -= file.endswith(".safetensors")
        if left < 0:
            raise SourceError("broken", next_step="again")
        return read(self, file, start, stop)

    monkeypatch.setattr(bucket.BucketStore, "read", breaking)
    with pytest.raises(SourceError, match="broken"):
        origin.fetch(lambda done, total: None)
    monkeypatch.setattr(bucket.BucketStore, "read", read)
    ranges.clear()
    origin.fetch(lambda done, total: None)
    assert of_weights(ranges) == TOTAL - 3 * 100_000
    for path in MODEL.glob("*.safetensors"):
        assert (origin.folder / path.name).read_bytes() == path.read_bytes()
    assert not origin.store.underway()


def test_progress_is_told_from_nothing_to_all(stored, tmp_path):
    told = []
    open_bucket(ADDRESS, tmp_path).fetch(lambda done, total: told.append((done, total)))
    assert told[0] == (0, TOTAL) and told[-1] == (TOTAL, TOTAL)


def test_files_that_change_are_not_taken_for_those_of_before(stored, tmp_path):
    origin = open_bucket(ADDRESS, tmp_path)
    config = stored.cat("/models/tiny/config.json")
    stored.pipe("/models/tiny/config.json", config)
    with pytest.raises(StaleError, match="not those that this run began with"):
        origin.fetch(lambda done, total: None)
    assert not list(origin.folder.glob("*.safetensors")), "copied while the bucket changed"
    assert open_bucket(ADDRESS, tmp_path).version != origin.version
    with pytest.raises(StaleError):
        open_bucket(ADDRESS, tmp_path / "other", origin.version)


def test_a_folder_as_an_address(tmp_path):
    folder = shutil.copytree(MODEL, tmp_path / "model")
    assert open_bucket(f"file://{folder}", tmp_path / "cache").open().fingerprint == open_source(MODEL).fingerprint


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://bucket/tiny", ("not installed", "tenp-dist[s3]")),
        ("gs://bucket/tiny", ("not installed", "tenp-dist[gs]")),
        ("zz://bucket/tiny", ("cannot be read at its address", "zz")),
        ("memory://nowhere/tiny", ("No files at the model's address",)),
    ],
)
def test_what_cannot_be_reached(address, said, tenp, job_file, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    refused(tenp("inspect", job_file(model=address, model_cache="cache")), "SourceError", *said)
    assert not (tmp_path / "run").exists()


def test_names_that_lead_out_of_the_folder(stored, tmp_path):
    stored.store["/models/tiny/../../out.json"] = stored.store["/models/tiny/config.json"]
    with pytest.raises(SourceError, match="points outside"):
        open_bucket(ADDRESS, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_no_room(stored, tmp_path, monkeypatch):
    origin = open_bucket(ADDRESS, tmp_path)
    monkeypatch.setattr(bucket.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DiskFullError, match="No space left"):
        origin.fetch(lambda done, total: None)


def test_a_listing_says_what_marks_a_content():
    entry = {"name": "b/x", "size": 3, "ETag": '"abc"', "LastModified": "now"}
    assert bucket._entry(entry) == {"size": 3, "mark": '"abc"'}
    assert bucket._entry({"size": 3, "mtime": 1.5})["mark"] == "1.5" and bucket._entry({"size": 3})["mark"] is None
    assert bucket.default_cache().name == "models" and isinstance(bucket.default_cache(), Path)
