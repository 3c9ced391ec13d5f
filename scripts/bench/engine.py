"""Shards and ranks on Ray against the plain full-model forward of the same tokens, and the engine's bounds.

Every row is a run of its own; starting processes, Ray and imports does not count, reading the source and
writing the score files does (the plain model is loaded before its clock starts). Memory is the peak of anonymous
resident memory of the largest process, sampled every 20 ms; `at open` is interpreter, libraries and skeleton.

The bounds compare with two parts that are measured alone in one process, with the same threads: reading the files
once (from the page cache, if they are in it), and computing scores, weight norms included, with a layer in memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import psutil

sys.path.insert(0, str(Path(__file__).parent))
from machine import PeakMemory, print_machine, spread, timed
from scoring import ROOT, make_corpus

from tenp_dist.config import Cluster
from tenp_dist.pool.machine import available_cores
from tenp_dist.pool.ray_pool import RayPool

MEGABYTE = 10**6


@dataclass(frozen=True)
class Case:
    """shards x ranks in a mode, every worker with so many threads."""

    shards: int
    ranks: int
    mode: str
    threads: int

    def __str__(self) -> str:
        return f"{self.shards}x{self.ranks} {self.mode}"


@dataclass(frozen=True)
class Measured:
    """seconds from open workers to score files, bytes of the largest process at open and at its peak."""

    seconds: float
    opened: int
    peak: int


class WatchedPool(RayPool):
    """Starts clock and memory sampling when all workers are open."""

    def groups(self, worker: type, *arguments: Any) -> list[Any]:
        groups = super().groups(worker, *arguments)
        self.started = time.perf_counter()
        children = psutil.Process().children(recursive=True)  # the workers themselves are busy from now on
        self.memory = PeakMemory([child.pid for child in children if f"ray::{worker.__name__}" in str(child.cmdline())])
        self.memory.__enter__()
        return groups


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), default=ROOT / "jobs/quickstart/moe-4m", show_default=True)
@click.option("--synthetic", is_flag=True, help="a random 2.6 GB model instead, made in a temporary folder")
@click.option(
    "--text", "texts", type=click.Path(path_type=Path), multiple=True, help="jsonl with `text`; default: stdlib"
)
@click.option("--samples", default=16, show_default=True, help="sequences per text file")
@click.option("--length", default=256, show_default=True, help="tokens per sequence")
@click.option("--batch-tokens", default=1024, show_default=True)
@click.option("--waves", default=16, show_default=True, help="pieces that the tokens are cut into")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--cores", default=None, type=int, help="for all workers of a run; default: all")
@click.option("--repeat", default=1, show_default=True, help="rounds; the table has medians")
@click.option("--folder", type=click.Path(path_type=Path), help="where the temporary folder goes")
@click.option("--measure", nargs=2, hidden=True, help="internal: `plain` or `alone`, and the folder of the corpus")
def main(model, synthetic, texts, samples, length, batch_tokens, waves, dtype, cores, repeat, folder, measure):
    cores = cores or available_cores()
    if measure:
        what = {"plain": measure_plain, "alone": measure_alone}[measure[0]]
        click.echo(json.dumps(what(make_task(model, Path(measure[1]), dtype, batch_tokens, waves, cores))))
        return
    print_machine("torch", "transformers", "ray", "deepspeed")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        temporary = Path(temporary)
        if synthetic:
            from synthetic import Shape, write_synthetic

            model = temporary / "synthetic"
            write_synthetic(model, Shape())
        task = make_task(model, temporary, dtype, batch_tokens, waves, cores)
        facts = describe(task, make_corpus(model, texts, samples, length))
        own = ["--model", model, "--dtype", dtype, "--batch-tokens", batch_tokens, "--waves", waves, "--cores", cores]
        rounds = [measure_round(task, facts, own) for _ in range(repeat)]
        report(rounds, facts)


def make_task(model: Path, folder: Path, dtype: str, batch_tokens: int, waves: int, cores: int):
    from tenp_dist.passes.compute import Compute
    from tenp_dist.scoring.score_pass import ScoreTask

    compute = Compute("cpu", dtype, batch_tokens, cores)
    return ScoreTask(model, folder / "corpus.arrow", folder / "scores", "bench", compute, waves=waves)


def describe(task, corpus) -> dict[str, Any]:
    """Write the corpus, say what runs, and return what the bounds need to know."""
    from tenp_dist.calibration.corpus import write_corpus
    from tenp_dist.checkpoint.source import open_source
    from tenp_dist.passes.layer_ops import microbatches
    from tenp_dist.passes.placement import active_bytes, layer_bytes

    write_corpus(task.corpus, corpus)
    facts, itemsize = open_source(task.model).facts, task.compute.torch_dtype.itemsize
    tokens, batches = corpus.tokens_NS.size, len(microbatches(corpus, task.compute.batch_tokens))
    waves = min(task.waves, batches)
    click.echo(f"model     {task.model.name}, {facts.bytes.total / MEGABYTE:,.0f} MB, {task.compute.dtype}")
    click.echo(f"tokens    {tokens:,} in {batches} microbatches of at most {task.compute.batch_tokens}, {waves} waves")
    hidden = tokens * facts.hidden_size * itemsize
    layers = {"nbytes": layer_bytes(facts, itemsize), "active": active_bytes(facts, itemsize)}
    layers["moe"] = facts.moe_layers
    return {"tokens": tokens, "hidden": hidden, "batches": batches, **layers}


def measure_round(task, facts, own: list) -> dict[Any, Any]:
    """One run of everything, in turns."""
    found: dict[Any, Any] = {}
    for name in ("plain", "alone"):
        found[name] = measure_child(name, task, own)
        click.echo(f"{name}: {found[name]}", err=True)
    cores = task.compute.threads
    half = max(1, cores // 2)
    cases = [
        Case(1, 1, "streaming", cores),
        Case(2, 1, "resident", half),
        Case(1, 2, "streaming", half),
        Case(1, 1, "resident", half),
    ]
    for case in cases:
        found[case] = measure_case(case, task, facts)
        click.echo(f"{case}: {found[case].seconds:.2f} s", err=True)
    return found


def measure_child(name: str, task, own: list) -> dict[str, float]:
    command = [sys.executable, __file__, *map(str, own), "--measure", name, str(task.corpus.parent)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure_case(case: Case, task, facts) -> Measured:
    from tenp_dist.passes.run_pass import PassContext
    from tenp_dist.progress import Ledger
    from tenp_dist.scoring.score_pass import score_model

    options = Cluster(
        shards=case.shards, tensor_parallel=case.ranks, mode=case.mode, device="cpu", threads=case.threads
    )
    pool = WatchedPool()
    with tempfile.TemporaryDirectory(dir=task.corpus.parent) as folder:
        task = replace(task, folder=Path(folder) / "scores")
        context = PassContext(
            pool, options, facts["nbytes"], Ledger(Path(folder) / "ledger.jsonl"), active=facts["active"]
        )
        score_model(context, task, facts["moe"])
        seconds = time.perf_counter() - pool.started
    pool.memory.__exit__()
    pool.close()
    return Measured(seconds, pool.memory.first, pool.memory.peak)


def measure_plain(task) -> dict[str, float]:
    """The stock model in one piece over the same microbatches."""
    import torch
    from transformers import AutoModelForCausalLM

    from tenp_dist.calibration.corpus import read_corpus
    from tenp_dist.passes.layer_ops import microbatches

    torch.set_num_threads(task.compute.threads)
    batches = microbatches(read_corpus(task.corpus), task.compute.batch_tokens)
    with PeakMemory() as memory, torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(
            task.model, dtype=task.compute.torch_dtype, experts_implementation="grouped_mm"
        ).eval()
        model(batches[0].tokens_BS, use_cache=False)
        started = time.perf_counter()
        for batch in batches:
            model(batch.tokens_BS, use_cache=False)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "opened": memory.first, "peak": memory.peak}


def measure_alone(task) -> dict[str, float]:
    """Reading the files; then layer by layer reading and scoring, one after the other, and what that takes beside them.

    workspace: of the whole pass, beyond what is open, the hidden states and the largest layer.
    """
    import torch

    from tenp_dist.checkpoint.index import open_index
    from tenp_dist.passes.layer_ops import embed_all, run_layer
    from tenp_dist.passes.layer_worker import LayerWorker
    from tenp_dist.scoring.score_pass import score_layer

    files = timed(lambda: read_files(task.model))
    worker = LayerWorker(task, range(open_index(task.model).config["num_hidden_layers"]))
    worker.open()
    shard, step = worker.shard, worker.step
    batches = [batch for wave in shard.batches for batch in wave]
    reading = computing = 0.0
    largest = 0
    with torch.inference_mode(), PeakMemory() as memory:
        hidden = embed_all(shard.frame, batches)
        for layer in shard.layers:
            started = time.perf_counter()
            state = shard.skeleton.read_layer(layer)
            reading += time.perf_counter() - started
            largest = max(largest, sum(tensor.nbytes for tensor in state.values()))
            module = shard.skeleton.load_layer(layer, state)
            del state
            experts = shard.skeleton.experts_of(module)
            scored = experts is not None
            run = score_layer if scored else run_layer
            started = time.perf_counter()
            sums = (step.norms_of(layer, experts), step.sums_of(layer, experts).statistics) if scored else ()
            run(shard.frame, layer, module, batches, hidden, {}, *sums)
            computing += time.perf_counter() - started
            shard.skeleton.unload_layer(layer)
    workspace = memory.peak - memory.first - largest - sum(tensor.nbytes for tensor in hidden)
    return {"files": files, "reading": reading, "computing": computing, "workspace": workspace}


def read_files(folder: Path) -> None:
    buffer = bytearray(16 << 20)
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def report(rounds: list[dict], facts: dict) -> None:
    def middle(key, field: str) -> float:
        values = [one[key] for one in rounds]
        return statistics.median(v[field] if isinstance(v, dict) else getattr(v, field) for v in values)

    click.echo("run             threads/worker  seconds   tokens/s   of plain   at open MB   peak MB")
    for key in (key for key in rounds[0] if key != "alone"):
        threads = "" if key == "plain" else key.threads
        seconds = middle(key, "seconds")
        ratio = statistics.median(middle_ratio(one, "plain", key) for one in rounds)
        memory = middle(key, "opened") / MEGABYTE, middle(key, "peak") / MEGABYTE
        click.echo(
            f"{key!s:<15} {threads:>14}  {seconds:>7.2f}  {facts['tokens'] / seconds:>9,.0f}  {ratio:>9.2f}"
            f"  {memory[0]:>11,.0f}  {memory[1]:>8,.0f}"
        )
    parts = {name: middle("alone", name) for name in ("files", "reading", "computing", "workspace")}
    click.echo(
        f"alone: reading the files {parts['files']:.2f} s, reading layers into compute dtype {parts['reading']:.2f} s, "
        f"computing {parts['computing']:.2f} s, its workspace {parts['workspace'] / MEGABYTE:,.0f} MB"
    )
    report_bounds(rounds, facts)


def report_bounds(rounds: list[dict], facts: dict) -> None:
    streaming, two, _, one = [key for key in rounds[0] if isinstance(key, Case)]
    largest = max(facts["nbytes"])
    memory = [
        (r[streaming].peak - r[streaming].opened - facts["hidden"] - r["alone"]["workspace"]) / largest for r in rounds
    ]
    slower = [r[streaming].seconds / max(r["alone"]["files"], r["alone"]["computing"]) for r in rounds]
    faster = [r[one].seconds / r[two].seconds for r in rounds]
    click.echo("bound                                                              wanted     measured")
    click.echo(
        f"streaming memory beyond `at open` and activations ({facts['hidden'] / MEGABYTE:,.0f} MB hidden "
        f"+ workspace), in largest layers ({largest / MEGABYTE:,.0f} MB)  <= 2.5  {spread(memory)}"
    )
    click.echo(f"streaming time over max(reading the files, computing)  <= 1.3  {spread(slower)}")
    click.echo(f"two shards over one shard of as many threads each      >= 1.6  {spread(faster)}")


def middle_ratio(one: dict, numerator: str, denominator) -> float:
    """Tokens/s of a run relative to plain: plain's seconds over its seconds."""
    value = one[denominator]
    return one[numerator]["seconds"] / (value["seconds"] if isinstance(value, dict) else value.seconds)


if __name__ == "__main__":
    main()
