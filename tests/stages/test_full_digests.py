"""`verify --full`: every byte of source and checkpoint is read again."""

from __future__ import annotations

import hashlib
import json

from helpers.refusals import refused


def test_one_byte_that_no_sample_and_no_size_shows(tenp, job_file, model, tmp_path):
    job, run = job_file(model=model), tmp_path / "run"
    assert tenp("run", job).exit_code == 0
    folder = run / "checkpoint" / "ragged"
    told = json.loads((run / "verify.json").read_text())["layouts"]["ragged"]["sha256"]
    assert told == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    first = tenp("verify", job, "--full")
    assert first.exit_code == 0 and "digests are noted" in first.stderr and "already done" in first.stderr
    noted = json.loads((run / "source.sha256.json").read_text())["sha256"]
    assert noted == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in model.glob("*.safetensors")}
    assert "as it was noted" in tenp("verify", job, "--full").stderr

    for place, error, text in ((folder, "VerifyError", "changed since it was"), (model, "StaleError", "changed since")):
        path = sorted(place.glob("*.safetensors"))[1]
        before = path.read_bytes()
        last = len(before) - 4096
        at = (last * 7 // 15 + 4096 + last * 8 // 15) // 2  # between two samples
        path.write_bytes(before[:at] + bytes([before[at] ^ 4]) + before[at + 1 :])
        assert tenp("verify", job).exit_code == 0, "sizes alone show nothing"
        refused(tenp("verify", job, "--full"), error, text, path.name, "1 of ")
        path.write_bytes(before)
    assert tenp("verify", job, "--full").exit_code == 0


def test_a_check_from_before_digests_were_kept(tenp, job_file, tmp_path):
    job, path = job_file(), tmp_path / "run" / "verify.json"
    assert tenp("run", job).exit_code == 0
    text = json.loads(path.read_text())
    del text["layouts"]["ragged"]["sha256"]
    path.write_text(json.dumps(text).ljust(path.stat().st_size))
    refused(tenp("verify", job, "--full"), "VerifyError", "before digests", "ragged", "give the command again")
