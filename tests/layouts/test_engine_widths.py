"""Widths that engines run are known before any work: chosen where the job names none, refused where none reads them."""

from __future__ import annotations

import pytest

from helpers.fp8 import make_pair
from helpers.refusals import refused
from tenp_dist.budget.kinds.table import kind_of
from tenp_dist.budget.sizes import moe_layers
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import JobError
from tenp_dist.job_file import load_job
from tenp_dist.layouts.engine_widths import block_warnings, check_engine_widths, with_engine_widths

FINE = (8, 16)  # numbers that share a factor: 16 neurons
UNIFORM = {"layouts": ["uniform"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model):
    plain = tiny_model("qwen3_moe", "bfloat16")
    fp8 = make_pair(tmp_path_factory.mktemp("fp8"), plain, FINE)[0]
    return {"bfloat16": plain, "float32": tiny_model("qwen3_moe", "float32"), "fp8": fp8}


@pytest.mark.parametrize(
    ("model", "budget", "output", "wanted"),
    [
        ("bfloat16", {"method": "enp"}, UNIFORM, 8),  # 16 bytes
        ("float32", {"method": "enp"}, UNIFORM, 4),
        ("fp8", {"method": "enp"}, UNIFORM, 16),
        ("fp8", {"method": "enp"}, UNIFORM | {"dtype": "bfloat16"}, 8),
        ("bfloat16", {"method": "enp"}, UNIFORM | {"dtype": "fp8"}, 8),  # 24 neurons are fewer than a block of 128
        ("fp8", {"method": "enp", "neuron_groups": 12}, UNIFORM, 48),
        ("fp8", {"method": "enp", "align": 1}, UNIFORM, 1),  # as it is asked for
        ("fp8", {"method": "enp"}, {"layouts": ["ragged", "padded"]}, 1),  # these fill up
        ("fp8", {"method": "reap"}, {}, 1),  # nothing is narrowed
        ("bfloat16", {"method": "auto"}, UNIFORM, 8),
    ],
)
def test_the_default_is_what_engines_run(models, job_file, model, budget, output, wanted):
    job = load_job(job_file(model=models[model], budget={"retention": "0.9", **budget}, output=output))
    assert with_engine_widths(job, open_source(models[model])).budget.align == wanted


def test_a_width_between_blocks_is_refused_with_the_way_out(models, job_file, tenp):
    """22 of 24 neurons: stock transformers would take a block for 11 rows."""
    job = job_file(model=models["fp8"], budget={"method": "enp", "retention": "0.92", "align": 11}, output=UNIFORM)
    refused(tenp("inspect", job), "JobError", "FP8", "budget.align", "align 11: experts of 22", "16", "bfloat16")
    ragged = job_file(model=models["fp8"], budget={"method": "enp", "retention": "0.92", "align": 11})
    source, one = open_source(models["fp8"]), load_job(ragged)
    layers = moe_layers(source)
    check_engine_widths(one, source, layers, [kind_of(one.budget).shape(layers)])
    whole = load_job(job_file(model=models["fp8"], budget={"method": "enp", "retention": "1"}, output=UNIFORM))
    check_engine_widths(whole, source, layers, [kind_of(whole.budget).shape(layers)])  # the source's own width
    with pytest.raises(JobError):
        given = load_job(job_file(model=models["fp8"], budget={"method": "enp", "retention": "0.92"}, output=UNIFORM))
        check_engine_widths(given, source, layers, [kind_of(given.budget).shape(layers)])


def test_widths_below_a_block_are_told(models, job_file):
    source = open_source(models["bfloat16"])
    job = load_job(
        job_file(model=source.folder, budget={"method": "enp", "retention": "0.7"}, output=UNIFORM | {"dtype": "fp8"})
    )
    job = with_engine_widths(job, source)
    (warning,) = block_warnings(job, source, kind_of(job.budget).shape(moe_layers(source)))
    assert "16 are fewer" in warning and "blocks of 128" in warning
    plain = job.model_copy(update={"output": job.output.model_copy(update={"dtype": "source"})})
    assert not block_warnings(plain, source, kind_of(job.budget).shape(moe_layers(source)))
