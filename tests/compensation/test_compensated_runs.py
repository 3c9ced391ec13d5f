"""Whole runs that compensate: the bytes of every layout, what `--overwrite` is needed for, what verify finds."""

from __future__ import annotations

import json

import torch

from helpers.checkpoints import all_tensors
from helpers.jobs import evaluation, files_of
from tenp_dist.checkpoint.compensated import open_compensated
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import DOWN
from tenp_dist.checkpoint.families.table import family_of
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import read_kept
from tenp_dist.errors import VerifyError
from tenp_dist.run_files import layer_file


def test_a_job_that_compensates(text_files, tiny_model, job_file, tenp, tmp_path):
    """The whole pipeline: stages, both layouts verified and equal, resumed files, what is said of it."""
    from safetensors.torch import load_file

    output = {"layouts": ["ragged", "padded"], "shard_size": "50KB", "compensate": True}
    job = job_file(model=tiny_model("deepseek_v3", "bfloat16"), output=output, evaluation=evaluation(text_files))
    result = tenp("run", job, "--json")
    assert result.exit_code == 0, result.stderr
    run, stages = tmp_path / "run", json.loads(result.stdout)["stages"]
    assert list(stages)[3:6] == ["plan", "compensate", "write"] and stages["compensate"]["compensated"] > 0
    checked = stages["verify"]["compensation"]
    assert checked["experts_tried"] == checked["experts_solved_again"] == stages["compensate"]["compensated"]
    ragged, padded, source = (
        all_tensors(f)
        for f in (*(run / "checkpoint" / x for x in ("ragged", "padded")), tiny_model("deepseek_v3", "bfloat16"))
    )
    kept, family = read_kept(run / "plan.safetensors"), family_of(open_index(tiny_model("deepseek_v3")).config)
    changed = 0
    for layer, neurons in kept.items():
        stored = load_file(layer_file(run / "compensation", layer))
        for expert in range(neurons.num_experts):
            name, ids = ExpertSlices(family).of(layer, expert, DOWN).tensor, neurons.of(expert).tolist()
            assert torch.equal(ragged[name], stored.get(name, source[name][:, ids]))
            assert torch.equal(padded[name][:, ids], ragged[name])
            assert padded[name].shape == source[name].shape and (padded[name] != 0).sum() == (ragged[name] != 0).sum()
            changed += name in stored and not torch.equal(ragged[name], source[name][:, ids])
    assert changed == stages["compensate"]["compensated"]
    assert "compensated" in (run / "checkpoint/ragged/README.md").read_text()
    assert "W_down" in (run / "report/index.html").read_text()
    content = files_of(run)
    (run / "compensation" / "layer_00002.safetensors").unlink()
    assert tenp("run", job).exit_code == 0 and files_of(run) == content


def test_one_width_is_compensated_in_the_uniform_layout_too(job_file, tenp, tmp_path):
    output = {"compensate": True, "shard_size": "50KB", "layouts": ["uniform", "ragged"]}
    result = tenp("run", job_file(output=output, budget={"method": "enp", "retention": 0.5}), "--json")
    assert result.exit_code == 0, result.stderr
    uniform, ragged = (all_tensors(tmp_path / "run/checkpoint" / layout) for layout in output["layouts"])
    names = [name for name in ragged if ".mlp.experts." in name and "down_proj" in name]
    assert len(names) == 24 and all(torch.equal(uniform[name], ragged[name]) for name in names)


def test_turning_compensation_off_again_needs_overwrite(job_file, tenp, tmp_path):
    job = job_file(output={"compensate": True, "shard_size": "100KB"})
    assert tenp("run", job).exit_code == 0
    plain = ("--set", "output.compensate=false")
    assert tenp("run", job, *plain).exit_code == 8
    assert tenp("run", job, "--set", "output.ridge=0.1").exit_code == 8
    assert tenp("run", job, *plain, "--overwrite").exit_code == 0
    assert "compensated" not in (tmp_path / "run/checkpoint/ragged/README.md").read_text()
    refused = tenp("compensate", job, *plain)
    assert refused.exit_code == 2 and "output.compensate" in refused.stderr


def test_verify_finds_a_checkpoint_without_the_compensated_columns(job_file, tenp, tmp_path):
    """The plain checkpoint under a job that compensates, byte by byte."""
    job = job_file(output={"compensate": True, "shard_size": "10MB"})
    assert tenp("run", job).exit_code == 0
    assert tenp("run", job, "--run-dir", tmp_path / "plain", "--set", "output.compensate=false").exit_code == 0
    files = list((tmp_path / "plain/checkpoint/ragged").glob("*.safetensors"))
    for file in files:
        (tmp_path / "run/checkpoint/ragged" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "run/verify.json").unlink()
    refused = tenp("verify", job)
    assert len(files) == 1 and refused.exit_code == 13 and "down_proj" in refused.stderr


def test_verify_finds_one_changed_weight_wherever_it_is_copied_to(job_file, tenp, tmp_path):
    """A byte of a compensated column, as the writer then copies it: too little for any tolerance."""
    job, run = job_file(output={"compensate": True}), tmp_path / "run"
    for stage in ("inspect", "calibrate", "score", "plan", "compensate"):
        assert tenp(stage, job).exit_code == 0
    path = layer_file(run / "compensation", 2)
    entry = next(iter(open_compensated(run / "compensation", 2).tensors.values()))
    with open(path, "r+b") as stream:
        stream.seek(entry.start)
        byte = stream.read(1)[0]
        stream.seek(entry.start)
        stream.write(bytes([byte ^ 1]))
    assert tenp("write", job).exit_code == 0
    refused = tenp("verify", job)
    assert refused.exit_code == VerifyError.exit_code and "changed after they were solved" in refused.stderr
