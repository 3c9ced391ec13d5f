"""Scores and plan of a trained model against an independent brute force, in float32; the plan in bfloat16 too.

The brute force is tests/helpers/brute_force.py: the stock model in one piece, loops over experts, float64, the
F x T x D tensor of single-neuron outputs built as the paper writes it. Prints the largest relative
error of every statistic (relative to the largest entry of the same expert, or of the same layer for
statistics per expert) and how many experts and neurons the two plans choose differently. Scored in bfloat16 some tokens
are routed otherwise, so there only the overlap of the kept neurons is stated.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import click

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests")]
from machine import print_machine, score_here
from scoring import ROOT, make_corpus


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), default=ROOT / "jobs/quickstart/moe-4m", show_default=True)
@click.option(
    "--text", "texts", type=click.Path(path_type=Path), multiple=True, help="jsonl with `text`; default: stdlib"
)
@click.option("--samples", default=16, show_default=True, help="sequences per text file")
@click.option("--length", default=256, show_default=True, help="tokens per sequence")
@click.option("--retention", default="0.6", show_default=True)
@click.option("--important", default="0.2", show_default=True)
@click.option("--slope", default="1", show_default=True)
def main(model, texts, samples, length, retention, important, slope):
    import torch

    from helpers.brute_force import brute_force_plan, brute_force_statistics
    from tenp_dist.passes.layer_ops import microbatches
    from tenp_dist.pool.machine import available_cores

    torch.set_num_threads(available_cores())
    print_machine("torch", "transformers")
    corpus = make_corpus(model, texts, samples, length)
    click.echo(
        f"model     {model.name}, float32, {int(corpus.mask_NS.sum()):,} tokens in {len(corpus.domains)} domains"
    )
    scored = score(model, corpus, available_cores(), "float32")
    started = time.perf_counter()
    batches = [(b.tokens_BS, b.mask_BS, b.domain) for b in microbatches(corpus, 4096)]
    expected = brute_force_statistics(model, batches, domains=len(corpus.domains))
    click.echo(f"brute force took {time.perf_counter() - started:.0f} s")
    report_errors(scored, expected)
    reference = brute_force_plan(expected, rho=retention, alpha=important, slope=slope)
    report_plan("float32", scored, reference, retention, important, slope)
    rounded = score(model, corpus, available_cores(), "bfloat16")
    report_plan("bfloat16", rounded, reference, retention, important, slope)


def score(model: Path, corpus, threads: int, dtype: str):
    from tenp_dist.calibration.corpus import write_corpus
    from tenp_dist.passes.compute import Compute
    from tenp_dist.scoring.statistics import read_statistics

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus.arrow", corpus)
        compute = Compute("cpu", dtype, 8192, threads)
        score_here(model, folder / "corpus.arrow", folder / "scores", compute)
        files = sorted((folder / "scores").glob("layer_*"))
        return {int(path.stem.split("_")[1]): read_statistics(path) for path in files}


def report_errors(scored, expected) -> None:
    from tenp_dist.scoring.statistics import MERGE_RULES

    click.echo("statistic                 largest relative error")
    for name in MERGE_RULES:
        worst = 0.0
        for layer, statistics in scored.items():
            wanted = expected[layer][name]
            scale = wanted.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
            worst = max(worst, float(((statistics[name] - wanted).abs() / scale).max()))
        click.echo(f"{name:<25} {worst:.2e}")


def report_plan(dtype: str, scored, reference, retention: str, important: str, slope: str) -> None:
    from tenp_dist.budget.plan import MoeLayer, make_plan
    from tenp_dist.config import Budget

    facts = [MoeLayer(layer, *statistics["neuron_l2_sum"].shape[1:]) for layer, statistics in scored.items()]
    budget = Budget(retention=retention, important=important, slope=slope)
    plan = make_plan(budget, facts, scored.__getitem__)
    widths = neurons = total = 0
    for layer, experts in reference.items():
        for expert, kept in experts.items():
            found = plan.kept[layer].of(expert).tolist()
            widths += len(found) != len(kept)
            neurons += len(set(kept) - set(found))
            total += len(kept)
    experts = sum(len(layer) for layer in reference.values())
    click.echo(
        f"plan in {dtype}: {widths} of {experts} experts of another width, {neurons:,} of {total:,} kept neurons "
        f"chosen otherwise, overlap {1 - neurons / total:.2%}"
    )


if __name__ == "__main__":
    main()
