"""`subset` and `split`: used where a source has such parts, refused where they would be ignored."""

from __future__ import annotations

import json

import pytest

from helpers.refusals import refused


@pytest.fixture
def refusal(tenp, job_file, tmp_path):
    """refusal(source, *texts): a job with this source ends with these words. A folder `t` holds a file a.jsonl."""
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.jsonl").write_text(json.dumps({"text": "seven times nine"}) + "\n")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "ds.py").write_text("raise SystemExit('never run')\n")

    def check(source, *texts):
        values = {key: str(tmp_path / value) if key in ("path", "name") else value for key, value in source.items()}
        job = job_file(calibration={"sources": [{"domain": "d", "samples": 1, **values}], "sequence_length": 8})
        refused(tenp("run", job), "CalibrationError", *texts)

    return check


def test_a_file_has_no_parts(refusal):
    refusal({"path": "t/a.jsonl", "split": "test"}, "A file has no split", "a.jsonl", "split: test", "`samples` says")
    refusal({"path": "t/a.jsonl", "split": "train[:10]"}, "A file has no split", "train[:10]")
    refusal({"path": "t/a.jsonl", "subset": "x"}, "A file has no subset", "take `subset` out")


def test_patterns_are_not_expanded(refusal):
    refusal({"path": "t/*.jsonl"}, "not found", "one source for each file")


def test_what_datasets_raises_of_a_name(refusal):
    refusal({"name": "t", "split": "train[:1]"}, "cannot be read", "Bad split", "correct `name`, `subset` and `split`")
    refusal({"name": "code"}, "cannot be read", "DataFilesNotFoundError", "correct `name`")
