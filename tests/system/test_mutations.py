"""Damage at random to what a user gives: every time an error of ours with its exit code, or a result that is right."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.mutations import changed, damaged_json, damaged_shard, spoiled_bytes
from tenp_dist import errors

CODES = {one.exit_code for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.TenpError)}
OURS = CODES - {errors.TenpError.exit_code}  # 1 is what nobody foresaw
INDEX = "model.safetensors.index.json"

Spoil = Callable[[Path, Path, st.DataObject], str]
"""(model, job file, draw) -> what was done, for the message."""


def _json(name: str) -> Spoil:
    def spoil(model: Path, job: Path, data: st.DataObject) -> str:
        text = data.draw(damaged_json(model / name))
        _replace(model / name, text)
        return f"{name}: {text[:1500]!r}"

    return spoil


def _shard(model: Path, job: Path, data: st.DataObject) -> str:
    path = data.draw(st.sampled_from(sorted(model.glob("*.safetensors"))))
    text = data.draw(damaged_shard(path))
    _replace(path, text)
    return f"{path.name}: {text[:1500]!r}"


def _job(model: Path, job: Path, data: st.DataObject) -> str:
    if data.draw(st.integers(0, 5)) == 0:
        text = data.draw(spoiled_bytes(job.read_bytes()))
    else:
        text = yaml.safe_dump(data.draw(changed(yaml.safe_load(job.read_text())))).encode()
    _replace(job, text)
    return f"job: {text!r}"


def _replace(path: Path, text: bytes) -> None:
    path.unlink()  # a link to the file that all examples share
    path.write_bytes(text)


PARTS: dict[str, tuple[Spoil, str, int]] = {  # how it is damaged, the command that meets it, how often of 300
    "config": (_json("config.json"), "inspect", 110),
    "index": (_json(INDEX), "inspect", 30),
    "headers": (_shard, "inspect", 50),
    "tokenizer": (_json("tokenizer.json"), "calibrate", 25),
    "tokenizer_config": (_json("tokenizer_config.json"), "calibrate", 25),
    "job": (_job, "inspect", 60),
}
assert sum(often for _, _, often in PARTS.values()) == 300


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_model, text_files):
    """places(measured) -> (model, job file) in a folder of their own; weights are links to one copy.

    measured: whether the job has an evaluation.
    """
    source, made = tiny_model(), []

    def make(measured: bool) -> tuple[Path, Path]:
        folder = Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp()))
        made.append(folder)
        shutil.copytree(source, folder / "model", copy_function=os.link)
        sources = [{"path": str(path), "domain": domain, "samples": 2} for domain, path in text_files.items()]
        job = {
            "model": "model",
            "run_dir": "run",
            "calibration": {"sources": sources, "sequence_length": 16, "packing": "concat", "seed": 0},
            "score": {"batch_tokens": 64, "waves": 2},
            "budget": {"retention": 0.6, "important": 0.2, "method": "tenp", "align": 1, "max_widths": 2},
            "output": {"layouts": ["padded"], "shard_size": "1MB", "dtype": "source", "mtp": "keep"},
            "cluster": {"shards": 1, "threads": 1},
            **({"evaluation": {"sources": sources[:1], "sequence_length": 16, "checkpoint": True}} if measured else {}),
        }
        (folder / "job.yaml").write_text(yaml.safe_dump(job))
        return folder / "model", folder / "job.yaml"

    yield make
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


def judge(result, done: str) -> None:
    """Exit code 0, or a refusal with its own code, a message that says what is wrong, and no traceback."""
    said = f"{done}\nexit {result.exit_code}: {result.stderr}\n{result.exception!r}"
    assert result.exit_code == 0 or result.exit_code in OURS, said
    assert "Traceback" not in result.stderr and not result.stderr.startswith("Error: Unexpected"), said
    assert result.exit_code == 0 or ("Error: " in result.stderr and "next:" in result.stderr), said


def loads_as_a_user_would(checkpoint: Path, done: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    assert not told["missing_keys"] and not told["mismatched_keys"], f"{done}\n{told}"
    with torch.no_grad():
        logits = model(torch.arange(2, 18)[None], use_cache=False).logits
    assert bool(torch.isfinite(logits).all()), done


def tried(part: str, tenp, places, data: st.DataObject, *, whole: bool) -> None:
    spoil, command, _ = PARTS[part]
    model, job = places(measured=part == "job")
    done = spoil(model, job, data)
    if command == "calibrate":
        judge(tenp("inspect", job), done)
    result = tenp(command, job)
    judge(result, done)
    run_dir = job.parent / "run"
    if whole and result.exit_code == 0 and (run_dir / "facts.json").exists():
        result = tenp("run", job)
        judge(result, done)
        for checkpoint in (run_dir / "checkpoint").glob("padded") if result.exit_code == 0 else ():
            loads_as_a_user_would(checkpoint, done)
    shutil.rmtree(job.parent, ignore_errors=True)


def often(number: int):
    """A fixed sequence of examples: the same in every run."""
    unhealthy = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=unhealthy
    )


@pytest.mark.parametrize("part", PARTS)
def test_a_few_mutations(part, tenp, places):
    @often(8)
    @given(st.data())
    def examples(data):
        tried(part, tenp, places, data, whole=False)

    examples()


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", PARTS)
def test_300_mutations(part, tenp, places):
    """A config that nothing is found wrong with goes to the end of its job, and the checkpoint of that loads."""

    @often(PARTS[part][2])
    @given(st.data())
    def examples(data):
        tried(part, tenp, places, data, whole=part == "config")

    examples()
