"""Weights that change in place, names, headers and sizes as before, are not taken for those that were scored."""

import json

from helpers.spoiling import change
from tenp_dist.checkpoint.content_sample import content_sample

EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


def test_every_piece_of_a_small_file_counts(tmp_path):
    path, data = tmp_path / "a", bytearray(50_000)
    path.write_bytes(data)
    before = content_sample([path])
    for at in (0, 4095, 25_000, 49_999):
        data[at] ^= 1
        path.write_bytes(data)
        assert content_sample([path]) != before
        data[at] ^= 1
    path.write_bytes(data)
    assert content_sample([path]) == before


def test_a_run_on_changed_weights_says_so_and_is_made_again(tenp, job_file, model, tmp_path):
    job, plan = job_file(model=model), tmp_path / "run" / "plan.safetensors"

    def stages(*options):
        result = tenp("run", job, *options)
        lines = [line for line in result.stderr.splitlines() if line.startswith("[")]
        return result, [line for line in lines if "already done" not in line]

    assert stages()[0].exit_code == 0 and not stages()[1]
    first = plan.read_bytes()
    change(EXPERT, lambda tensor: -tensor.flip(0))(model)
    refused, _ = stages()
    assert refused.exit_code == 8 and "weights_changed_in_place" in refused.stderr and "--overwrite" in refused.stderr
    again, made = stages("--overwrite")
    assert again.exit_code == 0 and len(made) == 5 and plan.read_bytes() != first
    assert not stages()[1], "nothing is made twice from the changed weights"
    change(EXPERT, lambda tensor: -tensor.flip(0))(model)
    back, made = stages("--overwrite")
    assert back.exit_code == 0 and len(made) == 5 and plan.read_bytes() == first


def test_runs_begun_before_weights_were_looked_at_go_on(tenp, job_file, tmp_path):
    job, record = job_file(), tmp_path / "run" / "stages" / "score.json"
    assert tenp("run", job).exit_code == 0
    written = json.loads(record.read_text())
    del written["summary"]["first_content"]
    record.write_text(json.dumps(written))
    assert tenp("run", job).stderr.count("already done") == 7
