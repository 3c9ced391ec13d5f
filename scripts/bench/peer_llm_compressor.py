"""Our score + plan + write against llm-compressor's REAPPruningModifier, calibrate + save.

Same model, tokens, retention, threads and bfloat16; every run is a process of its own, taken in turns. Starting
processes, Ray, imports and tokenising count for neither. Loading the model does not count for the peer; reading the
source counts for us, and so do the score files, the plan, the stage records and flushing all of it to the disk. Ours
runs in one process (verification is a stage of its own and is left out). llm-compressor prunes whole experts: of E it
keeps E - floor(E * sparsity). Its settings:

\b
as in its examples   batch_size 1, its default
batched              batch_size of as many tokens as our microbatches
batched, one pass    and propagate_error off: like ours, scores of the unpruned model from one forward

CPU seconds are of all threads of the process: on a machine that does other work too they say more than the clock,
if OMP_WAIT_POLICY=PASSIVE is set, so that threads that wait for each other do not spin.
Memory is the peak of anonymous resident memory (RssAnon, sampled every 4 ms), for the peer with its load;
`at open` is after imports. The peer gets an environment of its own (about 1.5 GB), made on the first run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import PeakMemory, print_machine, spread
from scoring import ROOT, stdlib_texts

MEGABYTE = 10**6
PINS = (
    "llmcompressor==0.14.0.1",
    "compressed-tensors==0.19.0",
    "torch==2.13.0",
    "transformers==5.17.0",
    "accelerate==1.15.0",
    "auto-round==0.15.1",
    "datasets==5.2.0",
    "safetensors==0.8.0",
    "tokenizers==0.23.3",
    "numpy==2.4.6",
    "click==8.5.1",
)
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tenp-dist" / "peer-llm-compressor"
OURS, EXAMPLES, BATCHED, ONE_PASS = "tenp-dist", "as in its examples", "batched", "batched, one pass"
STAGES = ("score", "plan", "write")


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), default=ROOT / "jobs/quickstart/moe-4m", show_default=True)
@click.option(
    "--text", "texts", type=click.Path(path_type=Path), multiple=True, help="jsonl with `text`; default: stdlib"
)
@click.option("--tokens", default=65536, show_default=True, help="in all")
@click.option("--length", "lengths", multiple=True, type=int, default=(256, 1024), show_default=True)
@click.option("--retention", default="0.6", show_default=True)
@click.option("--batch-tokens", default=8192, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--repeat", default=3, show_default=True, help="rounds; the tables have medians")
@click.option("--env", type=click.Path(path_type=Path), default=CACHE, show_default=True, help="the peer's environment")
@click.option("--folder", type=click.Path(path_type=Path), help="where the temporary folder goes")
@click.option("--measure", type=click.Path(path_type=Path), hidden=True, help="internal: the job file of a run of ours")
def main(model, texts, tokens, lengths, retention, batch_tokens, threads, repeat, env, folder, measure):
    if measure:
        click.echo(json.dumps(measure_ours(measure, threads)))
        return
    python = make_environment(env)
    print_machine("torch", "transformers")
    click.echo(f"peer      {', '.join(pin.replace('==', ' ') for pin in PINS[:4])}")
    click.echo(f"model     {model.name}, bfloat16, {threads} threads, retention {retention}, medians of {repeat}")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        temporary = Path(temporary)
        texts = texts or stdlib_texts(temporary)
        for length in lengths:
            job = make_job(temporary / str(length), model, texts, tokens, length, retention, batch_tokens)
            settings = {
                EXAMPLES: {"batch_size": 1},
                BATCHED: {"batch_size": max(1, batch_tokens // length)},
                ONE_PASS: {"batch_size": max(1, batch_tokens // length), "propagate_error": False},
            }
            rounds = [measure_round(job, python, settings, threads) for _ in range(repeat)]
            report(rounds, job, length)


def make_environment(folder: Path, pins: Sequence[str] = PINS, unwanted: Sequence[str] = ()) -> Path:
    """The Python of a virtual environment that holds exactly pins and what they need, but for what is unwanted."""
    python, done = folder / "bin" / "python", folder / "pins.json"
    if not done.is_file() or json.loads(done.read_text()) != list(pins):
        click.echo(f"making an environment of its own in {folder}", err=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pins], check=True)
        if unwanted:
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted], check=True)
        done.write_text(json.dumps(pins))
    return python


def make_job(folder: Path, model: Path, texts, tokens: int, length: int, retention: str, batch_tokens: int):
    """A job whose source is inspected and whose text is tokenised; its run directory is copied for every run."""
    import yaml

    from tenp_dist.job_file import load_job

    samples = -(-tokens // (length * len(texts)))
    domains = {path.name.split(".")[0]: path for path in texts}
    sources = [{"path": str(path.resolve()), "domain": name, "samples": samples} for name, path in domains.items()]
    values = {
        "model": str(model.resolve()),
        "run_dir": "base",
        "calibration": {"sources": sources, "sequence_length": length},
        "score": {"dtype": "bfloat16", "batch_tokens": batch_tokens},
        "budget": {"method": "tenp", "retention": retention},
        "output": {"layouts": ["ragged"]},
        "cluster": {"device": "cpu"},
    }
    folder.mkdir()
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    job = load_job(path)
    run_stages(job, 1, ["inspect", "calibrate"])
    return job


def run_stages(job, threads: int, names) -> dict[str, float]:
    """Run stages here, without Ray; seconds of each."""
    from tenp_dist import run_job
    from tenp_dist.pipeline.stage import Listener
    from tenp_dist.pool.in_process import InProcessPool

    class Clock(Listener):
        def finished(self, stage, record, seconds: float) -> None:
            parts[stage.name] = seconds

    parts: dict[str, float] = {}
    run_job(job, stages=names, pool=lambda: InProcessPool(threads), listener=Clock())
    return parts


def measure_ours(path: Path, threads: int) -> dict[str, Any]:
    """Score, plan and write the job in this process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tenp_dist.job_file import load_job
    from tenp_dist.stages import catalogue as stages  # noqa: F401  imports what stages need

    job = load_job(path)
    torch.set_num_threads(threads)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.model))  # imports the model's code
    with PeakMemory() as memory:
        started, cpu = time.perf_counter(), time.process_time()
        parts = run_stages(job, threads, STAGES)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "parts": parts, "opened": memory.first, "peak": memory.peak}


def measure_round(job, python: Path, settings: dict[str, dict], threads: int) -> dict[str, dict[str, Any]]:
    """One run of each side and setting, in turns; what they wrote is measured and deleted."""
    found = {}
    for name, options in {OURS: None, **settings}.items():
        found[name] = one = run_ours(job, threads) if options is None else run_theirs(job, python, options, threads)
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in one["parts"].items())
        click.echo(
            f"{name}: {one['seconds']:.2f} s ({parts}), CPU {one['cpu']:.1f} s, peak {one['peak'] / MEGABYTE:.0f} MB",
            err=True,
        )
    return found


def run_ours(job, threads: int) -> dict[str, Any]:
    folder = job.run_dir.parent
    run = folder / "run"
    shutil.copytree(job.run_dir, run)
    path = folder / "run.yaml"
    path.write_text((folder / "job.yaml").read_text().replace("run_dir: base", "run_dir: run"))
    found = run_child([sys.executable, __file__, "--measure", path, "--threads", threads], threads)
    return found | weigh(run / "checkpoint" / "ragged", run)


def run_theirs(job, python: Path, options: dict[str, Any], threads: int) -> dict[str, Any]:
    out = job.run_dir.parent / "theirs"
    arguments = {
        "model": str(job.model),
        "corpus": str(job.run_dir / "calibration" / "calibration.arrow"),
        "out": str(out),
        "sparsity": float(1 - job.budget.retention),
        "threads": threads,
    }
    script = Path(__file__).with_name("llm_compressor_reap.py")
    return run_child([python, script, json.dumps(arguments | options)], threads) | weigh(out, out)


def run_child(command: list, threads: int) -> dict[str, Any]:
    """The last line that a command prints, as JSON; what else it says is shown only if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise click.ClickException(f"{command[1]} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def weigh(checkpoint: Path, delete: Path) -> dict[str, Any]:
    """Bytes of a checkpoint, of its routed experts, and experts per layer by weights and by config; then it is gone."""
    config = json.loads((checkpoint / "config.json").read_text())
    weighed = weights_of(checkpoint) | {"config_experts": config.get("n_routed_experts", config.get("num_experts"))}
    shutil.rmtree(delete)
    return weighed


def weights_of(checkpoint: Path) -> dict[str, int]:
    from safetensors import safe_open

    nbytes, routed, experts = 0, 0, set()
    for path in checkpoint.glob("*.safetensors"):
        nbytes += path.stat().st_size
        with safe_open(path, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                if match := re.search(r"\.experts\.(\d+)\.", name):
                    experts.add(int(match[1]))
                    shape = tensors.get_slice(name).get_shape()
                    routed += shape[0] * shape[1]
    return {"nbytes": nbytes, "routed": routed, "experts": len(experts)}


def report(rounds: list[dict[str, dict]], job, length: int) -> None:
    from tenp_dist.calibration.corpus import read_corpus

    tokens = read_corpus(job.run_dir / "calibration" / "calibration.arrow").tokens_NS.size
    source = weights_of(job.model)["routed"]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    click.echo(f"length {length}, {tokens:,} tokens; load of the machine at the end {load} (1, 5, 15 minutes)")
    click.echo(
        "side                  seconds  tokens/s  CPU s  at open MB  peak MB  routed kept  checkpoint MB"
        "  seconds over ours     CPU over ours"
    )
    for name in rounds[0]:
        runs = [one[name] for one in rounds]
        seconds, cpu, opened, peak = (
            statistics.median(run[key] for run in runs) for key in ("seconds", "cpu", "opened", "peak")
        )
        over = [spread([one[name][key] / one[OURS][key] for one in rounds]) for key in ("seconds", "cpu")]
        click.echo(
            f"{name:<20}  {seconds:>7.2f}  {tokens / seconds:>8,.0f}  {cpu:>5.1f}  {opened / MEGABYTE:>10,.0f}"
            f"  {peak / MEGABYTE:>7,.0f}  {runs[-1]['routed'] / source:>11.1%}  {runs[-1]['nbytes'] / MEGABYTE:>13.1f}"
            f"  {over[0]:<20}  {over[1]}"
        )
    for name in rounds[0]:
        middle = {
            part: statistics.median(one[name]["parts"][part] for one in rounds) for part in rounds[0][name]["parts"]
        }
        click.echo(f"{name:<20}  " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in middle.items()))
    theirs = rounds[0][EXAMPLES]
    if theirs["experts"] != theirs["config_experts"]:
        click.echo(
            f"the peer's checkpoint holds {theirs['experts']} experts, its config says {theirs['config_experts']}"
        )


if __name__ == "__main__":
    main()
