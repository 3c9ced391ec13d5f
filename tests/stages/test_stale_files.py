"""Files of a run that are missing, damaged, edited or of something else: named, and made again by their stage."""

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from helpers.refusals import contents, refused
from helpers.spoiling import configure
from tenp_dist.checkpoint.index import INDEX_NAME


@pytest.mark.parametrize("stage", ["calibrate", "score", "plan", "write", "verify", "report"])
def test_stage_before_its_upstream(stage, tenp, job_file, tmp_path):
    result = tenp(stage, job_file())
    refused(result, "StaleError", "has not finished", str(tmp_path / "run"), "run `tenp-dist ", "first")


def test_model_replaced_between_stages(finished, tenp, model, tmp_path):
    """Other weights under the same name: refused by whatever was made from the old ones."""
    before = contents(tmp_path / "run")
    for path in model.glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    configure(dtype="bfloat16")(model)
    for stage in ("score", "plan", "write", "verify"):
        refused(tenp(stage, finished), "StaleError", "Stage `inspect` was made from something else", "model: ", " -> ")
    refused(tenp("run", finished), "OutputError", "Stage `inspect`", "model: ", "--overwrite")
    assert contents(tmp_path / "run") == before


def test_plan_edited_by_hand(finished, tenp, tmp_path):
    run = tmp_path / "run"
    text = (run / "plan.json").read_text()
    (run / "plan.json").write_text(text.replace('"seed": 0', '"seed": 7'))  # the size stays
    assert (run / "plan.json").read_text() != text
    (run / "stages" / "write.json").unlink()
    refused(tenp("write", finished), "StaleError", "not of one plan", str(run), "run the plan stage again")
    (run / "plan.json").write_text(text + " ")
    refused(tenp("write", finished), "StaleError", "missing, cut or edited", "plan.json", "run `tenp-dist plan` again")
    assert tenp("plan", finished).exit_code == 0
    assert (run / "plan.json").read_text() == text


@pytest.mark.parametrize(
    "name",
    ["calibration/calibration.arrow", "scores/layer_00002.safetensors", "plan.safetensors",
     "checkpoint/ragged/model-00001-of-00004.safetensors", "checkpoint/ragged/config.json",
     f"checkpoint/ragged/{INDEX_NAME}"],
)  # fmt: skip
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 50)], ids=["deleted", "cut"])
def test_damaged_file_of_a_finished_run_is_made_again(name, damage, finished, tenp, tmp_path):
    before = contents(tmp_path / "run")
    assert name in before
    damage(tmp_path / "run" / name)
    stage = {"calibration": "calibrate", "scores": "score", "plan.safetensors": "plan"}.get(name.split("/")[0], "write")
    downstream = {"calibrate": "score", "score": "plan", "plan": "write", "write": "verify"}[stage]
    refused(
        tenp(downstream, finished), "StaleError", f"stage `{stage}`", name, "missing, cut", f"run `tenp-dist {stage}`"
    )
    assert tenp(stage, finished).exit_code == 0
    after = contents(tmp_path / "run")
    assert {key: data for key, data in after.items() if "stages" not in key} == {
        key: data for key, data in before.items() if "stages" not in key
    }


def test_stage_record_that_cannot_be_read(finished, tenp, tmp_path):
    path = tmp_path / "run" / "stages" / "score.json"
    path.write_text("{")
    refused(tenp("run", finished), "StaleError", "record of stage `score`", str(path), "remove it")


@pytest.mark.parametrize("stage", ["verify", "evaluate"])
@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
def test_unfinished_checkpoint_is_not_accepted(stage, name, tenp, job_file, text_files, model, tmp_path):
    sources = [{"path": str(text_files["prose"]), "domain": "prose", "samples": 2}]
    job = job_file(model=model, evaluation={"sources": sources, "sequence_length": 16})
    for first in ("inspect", "calibrate", "score", "plan", "write"):
        assert tenp(first, job).exit_code == 0
    (tmp_path / "run" / "checkpoint" / "ragged" / name).unlink()
    refused(tenp(stage, job), "StaleError", name, "stage `write`", "run `tenp-dist write`")
    assert not (tmp_path / "run" / f"{stage}.json").exists()
