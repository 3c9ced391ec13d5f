"""The stage publish, against a stand-in of the Hub that takes uploads the way of large files without Xet."""

from __future__ import annotations

import json

import pytest

from helpers.checkpoints import corrupt
from helpers.refusals import refused
from tenp_dist.config import Job
from tenp_dist.job_file import load_job

pytestmark = [pytest.mark.slow, pytest.mark.beside]
NAME = "me/tiny-pruned"


@pytest.fixture
def writable(hub, monkeypatch):
    """The stand-in, with a token that may write."""
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return hub


def published(hub) -> dict[str, bytes]:
    """Relative path -> content of the last commit."""
    repository = hub.repositories[NAME]
    folder = repository.commits[repository.branches["main"]]
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_checkpoint_and_card_are_uploaded(writable, finished, tenp, tmp_path):
    done = tenp("publish", finished, "--set", f"publish={NAME}", "--json")
    assert done.exit_code == 0, done.stderr
    folder = tmp_path / "run" / "checkpoint" / "ragged"
    own = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert published(writable) == own and "README.md" in own
    summary = json.loads(done.stdout)["stages"]["publish"]
    assert summary["commit"] == writable.repositories[NAME].branches["main"] and summary["layout"] == "ragged"
    assert writable.repositories[NAME].token is None
    writable.forget()
    again = tenp("publish", finished, "--set", f"publish={NAME}")
    assert "already done" in again.stderr and not writable.asked


def test_a_private_one(writable, finished, tenp):
    done = tenp("publish", finished, "--set", f"publish={{repo: {NAME}, private: true}}")
    assert done.exit_code == 0 and writable.repositories[NAME].token == "hf_right", done.stderr


def test_an_upload_that_broke_sends_only_what_is_missing(writable, finished, tenp, tmp_path):
    verified = json.loads((tmp_path / "run" / "verify.json").read_text())["layouts"]["ragged"]["sha256"]
    last = list(verified.values())[-1]
    writable.broken.add(last)
    asked = ("publish", finished, "--set", f"publish={NAME}")
    refused(tenp(*asked), "OutputError", "could not be uploaded", "again: what has been uploaded is kept")
    assert not writable.repositories[NAME].commits, "nothing half is to be seen"
    came = set(writable.uploaded)
    writable.broken.clear()
    writable.forget()
    assert tenp(*asked).exit_code == 0
    assert sum(line.startswith("PUT") for line in writable.asked) == len(set(verified.values()) - came)


def test_what_changed_since_it_was_verified_is_refused(writable, finished, tenp, tmp_path):
    corrupt(tmp_path / "run" / "checkpoint" / "ragged", "lm_head.weight", 3)
    refused(tenp("publish", finished, "--set", f"publish={NAME}"), "VerifyError", "changed since it was verified")
    assert not writable.asked


def test_what_was_not_verified_is_refused(writable, finished, tenp, tmp_path):
    (tmp_path / "run" / "stages" / "verify.json").unlink()
    refused(tenp("publish", finished, "--set", f"publish={NAME}"), "StaleError", "`verify` has not finished")


def test_no_card(writable, finished, tenp, tmp_path):
    (tmp_path / "run" / "checkpoint" / "ragged" / "README.md").unlink()
    refused(tenp("publish", finished, "--set", f"publish={NAME}"), "VerifyError", "no model card")


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_a_token_that_may_not_write(writable, finished, tenp, monkeypatch, token):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    said = "no token is set" if token is None else "a token is set"
    refused(tenp("publish", finished, "--set", f"publish={NAME}"), "OutputError", "does not let this token write", said)


def test_offline(writable, finished, tenp, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(tenp("publish", finished, "--set", f"publish={NAME}"), "OutputError", "HF_HUB_OFFLINE")


@pytest.mark.parametrize("given", ["tiny", "me/tiny@main", "s3://me/tiny", "/me/tiny", "{layout: ragged}"])
def test_names_that_are_none(tenp, job_file, given):
    refused(tenp("publish", job_file(), "--set", f"publish={given}"), "JobError", "publish")


def test_layouts_that_are_not_written(tenp, job_file):
    refused(
        tenp("run", job_file(), "--set", f"publish={{repo: {NAME}, layout: padded}}"),
        "JobError",
        "layout to publish is not written",
    )


def test_nothing_is_published_unasked(tenp, job_file):
    refused(tenp("publish", job_file()), "JobError", "no `publish`")
    job: Job = load_job(job_file(), [f"publish={NAME}"])
    assert job.publish.repo == NAME and not job.publish.private
