"""What random kills cost: `kill -9` of scoring workers at random moments, seconds lost per kill, bytes compared.

The same scoring runs twice on local Ray, undisturbed and disturbed. Seconds lost hold the start of a new
worker process (imports included) and the unit that was in flight.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import pass_context_here, print_machine
from scoring import ROOT, make_corpus


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), default=ROOT / "jobs/quickstart/moe-4m", show_default=True)
@click.option("--text", "texts", type=click.Path(path_type=Path), multiple=True, help="jsonl; default: stdlib")
@click.option("--samples", default=128, show_default=True, help="sequences per text file")
@click.option("--length", default=256, show_default=True, help="tokens per sequence")
@click.option("--shards", default=2, show_default=True)
@click.option("--mode", type=click.Choice(["resident", "streaming"]), default="resident", show_default=True)
@click.option("--kills", default=4, show_default=True)
@click.option("--every", default=12.0, show_default=True, help="mean seconds between kills")
@click.option("--seed", default=0, show_default=True)
def main(model, texts, samples, length, shards, mode, kills, every, seed):
    from tenp_dist.config import Cluster
    from tenp_dist.pool.ray_pool import RayPool

    print_machine("torch", "ray", "transformers")
    corpus = make_corpus(model, texts, samples, length)
    cluster = Cluster(shards=shards, mode=mode, commit_seconds=0)
    click.echo(f"model     {model.name}, {int(corpus.mask_NS.sum()):,} tokens, {shards} shards, {mode}")
    pool = RayPool()
    try:
        with tempfile.TemporaryDirectory() as folder:
            calm, calm_bytes = score(pool, model, corpus, cluster, Path(folder) / "calm")
            killer = Killer(kills, every, random.Random(seed))
            killer.start()
            wild, wild_bytes = score(pool, model, corpus, cluster, Path(folder) / "wild")
            killer.stop()
    finally:
        pool.close()
    click.echo("run          seconds  kills  lost per kill s  bytes")
    click.echo(f"undisturbed  {calm:>7.1f}  {0:>5}  {'':>15}")
    lost = (wild - calm) / max(killer.done, 1)
    same = "identical" if wild_bytes == calm_bytes else "DIFFERENT"
    click.echo(f"disturbed    {wild:>7.1f}  {killer.done:>5}  {lost:>15.1f}  {same}")


class Killer(threading.Thread):
    """Kills a random scoring worker, `kills` times, at random intervals."""

    def __init__(self, kills: int, every: float, generator: random.Random):
        super().__init__(daemon=True)
        self.kills, self.every, self.generator = kills, every, generator
        self.done = 0
        self._stop_now = threading.Event()

    def run(self) -> None:
        while self.done < self.kills and not self._stop_now.wait(self.generator.uniform(0.5, 1.5) * self.every):
            workers = scoring_workers()
            if workers:
                os.kill(self.generator.choice(workers), signal.SIGKILL)
                self.done += 1

    def stop(self) -> None:
        self._stop_now.set()
        self.join()


def scoring_workers() -> list[int]:
    import psutil

    return [p.pid for p in psutil.process_iter(["cmdline"]) if "ray::LayerWorker" in " ".join(p.info["cmdline"] or [])]


def score(pool, model: Path, corpus, cluster, folder: Path) -> tuple[float, dict[str, bytes]]:
    from tenp_dist.calibration.corpus import write_corpus
    from tenp_dist.checkpoint.source import open_source
    from tenp_dist.passes.compute import Compute
    from tenp_dist.scoring.score_pass import ScoreTask, score_model

    write_corpus(folder / "corpus.arrow", corpus)
    compute = Compute("cpu", "float32", 2048, 1)
    task = ScoreTask(model, folder / "corpus.arrow", folder / "scores", "bench", compute, waves=16)
    moe_layers = open_source(model).facts.moe_layers
    context = replace(pass_context_here(model, folder, 1), pool=pool, cluster=cluster)
    started = time.perf_counter()
    score_model(context, task, moe_layers)
    seconds = time.perf_counter() - started
    return seconds, {path.name: path.read_bytes() for path in sorted((folder / "scores").glob("layer_*"))}


if __name__ == "__main__":
    main()
