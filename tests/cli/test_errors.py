"""Errors on the command line: as JSON, in one line, with a traceback where asked for; exit codes."""

import json

from helpers.refusals import refused
from helpers.spoiling import FIRST
from tenp_dist import errors


def test_json_prints_the_error_as_an_object(tenp, job_file, model):
    (model / FIRST).unlink()
    result = tenp("run", job_file(model=model), "--json")
    refused(result, "SourceError", "shard is missing")
    printed = json.loads(result.stdout)
    assert printed["error"] == "SourceError" and printed["message"] == "Checkpoint shard is missing"
    assert printed["where"].endswith(FIRST) and "download" in printed["next"]


def test_unexpected_exception_is_one_line(tenp, job_file, monkeypatch):
    def bug(*_, **__):
        raise ZeroDivisionError("a bug\nwith a second line")

    monkeypatch.setattr("tenp_dist.checkpoint.source.checkpoint_facts", bug)
    result = tenp("inspect", job_file())
    said = "Unexpected ZeroDivisionError: a bug with a second line"
    refused(result, "TenpError", said, "run again with --debug for the traceback")
    assert isinstance(tenp("inspect", job_file(), "--debug").exception, ZeroDivisionError)


def test_debug_raises_the_error_itself(tenp, job_file, model):
    (model / FIRST).unlink()
    result = tenp("inspect", job_file(model=model), "--debug")
    assert isinstance(result.exception, errors.SourceError) and result.exit_code != 0


def test_exit_codes_are_distinct_and_documented():
    classes = [errors.TenpError, *errors.TenpError.__subclasses__()]
    codes = [cls.exit_code for cls in classes]
    assert len(set(codes)) == len(codes) and 0 not in codes and max(codes) < 256
    for cls in classes:
        line = next(line for line in errors.__doc__.splitlines() if f" {cls.__name__} " in line)
        assert f" {cls.exit_code} " in f"{line} "
