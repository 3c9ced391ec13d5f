"""The disk space that a job is asked for: every layout says what it takes, worked out by hand."""

from __future__ import annotations

from helpers.checkpoints import random_kept, with_mtp, write
from tenp_dist.checkpoint.output_form import OutputForm
from tenp_dist.checkpoint.source import open_source
from tenp_dist.job_file import load_job
from tenp_dist.layouts.base import output_sizes
from tenp_dist.layouts.table import LAYOUTS, layouts_of, written_source
from tenp_dist.preflight.disk_space import bytes_left

ROUTED = 3 * 8 * 3 * 24 * 32 * 4
"""Tiny DeepSeek-V3: 3 MoE layers of 8 experts of 3 matrices [24, 32] in float32, 221184 bytes."""


def test_bytes_of_each_layout_by_hand(tiny_model, job_file, tmp_path):
    """Half of the neurons go: 110592 bytes. A shared expert is filled by less than 1/8 of what stays: 13824 bytes.

    In `uniform` the prediction layer loses, and is filled, as much as each of the three MoE layers.
    """
    model = with_mtp(tiny_model(), tmp_path / "with-mtp")
    source = open_source(model)
    assert source.facts.bytes.routed == ROUTED
    total = source.index.nbytes
    layer = sum(entry.nbytes for name, entry in source.index.tensors.items() if "layers.4." in name)
    job = load_job(job_file(model=model, budget={"method": "enp", "retention": 0.5}))
    sizes = output_sizes(source, OutputForm())
    assert LAYOUTS["padded"].nbytes(sizes, job) == total
    assert LAYOUTS["ragged"].nbytes(sizes, job) == total - 110_592
    assert LAYOUTS["uniform"].nbytes(sizes, job) == total - 147_456 + 18_432
    dropped = written_source(load_job(job_file(model=model, output={"mtp": "drop"})), source)
    sizes = output_sizes(dropped, OutputForm())
    assert LAYOUTS["padded"].nbytes(sizes, job) == total - layer
    assert LAYOUTS["ragged"].nbytes(sizes, job) == total - layer - 110_592
    assert LAYOUTS["uniform"].nbytes(sizes, job) == total - layer - 110_592 + 13_824


def test_a_uniform_job_is_not_asked_for_the_whole_source(tiny_model, job_file):
    """Two layouts take their sum; a method that removes experts writes `uniform` where the job names none."""
    source = open_source(tiny_model("qwen3_moe"))

    def asked(**parts) -> int:
        return bytes_left(load_job(job_file(model=source.folder, **parts)), source)

    budget, dropped = {"method": "enp", "retention": 0.5}, source.facts.bytes.routed // 2
    padded = asked(budget=budget, output={"layouts": ["padded"]})
    assert padded - asked(budget=budget, output={"layouts": ["uniform"]}) == dropped
    assert padded - asked(budget=budget) == dropped
    both = asked(budget=budget, output={"layouts": ["padded", "uniform"]})
    assert both - padded == source.facts.bytes.total - dropped
    removing = job_file(model=source.folder, budget={"method": "reap", "retention": 0.5})
    assert [layout.name for layout in layouts_of(load_job(removing))] == ["uniform"]
    assert padded - asked(budget={"method": "reap", "retention": 0.5}) == dropped


def test_what_is_asked_for_is_enough(tiny_model, job_file, tmp_path):
    """Expert 0 whole and 7 neurons of the others: (24 + 7 * 7) / (8 * 24) = 0.3802 of the routed parameters stay."""
    model = tiny_model()
    source, job = open_source(model), load_job(job_file(budget={"retention": "0.381"}))
    for name in ("ragged", "padded"):
        written = write(model, random_kept(model), tmp_path / name, name)
        assert (
            0
            <= LAYOUTS[name].nbytes(output_sizes(source, OutputForm()), job) - written.nbytes
            < 0.001 * source.index.nbytes
        )
