"""Scoring of all statistics against one plain transformers forward of the same tokens.

Both in one process and one run, taken in turns: same dtype, microbatches, threads and grouped_mm.
Scoring includes building the skeleton, reading the source and writing the score files; the plain
forward is `AutoModelForCausalLM` with the model loaded before the clock starts. Imports count for neither.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import print_machine, score_here, timed

ROOT = Path(__file__).resolve().parents[2]


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), default=ROOT / "jobs/quickstart/moe-4m", show_default=True)
@click.option(
    "--text", "texts", type=click.Path(path_type=Path), multiple=True, help="jsonl with `text`; default: stdlib"
)
@click.option("--samples", default=32, show_default=True, help="sequences per text file")
@click.option("--length", default=256, show_default=True, help="tokens per sequence")
@click.option("--batch-tokens", default=8192, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--threads", default=None, type=int, help="default: all cores")
@click.option("--repeat", default=5, show_default=True)
def main(model, texts, samples, length, batch_tokens, dtype, threads, repeat):
    import torch
    from transformers import AutoModelForCausalLM

    from tenp_dist.calibration.corpus import write_corpus
    from tenp_dist.passes.compute import Compute
    from tenp_dist.passes.layer_ops import microbatches
    from tenp_dist.pool.machine import available_cores

    torch.set_num_threads(threads or available_cores())
    print_machine("torch", "transformers")
    corpus = make_corpus(model, texts, samples, length)
    tokens = int(corpus.mask_NS.sum())
    batches = microbatches(corpus, batch_tokens)
    click.echo(f"model     {model.name}, {dtype}, {torch.get_num_threads()} threads")
    click.echo(f"tokens    {tokens:,} in {len(batches)} microbatches of at most {batch_tokens} tokens, length {length}")
    plain_model = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), experts_implementation="grouped_mm"
    ).eval()

    def plain() -> None:
        with torch.inference_mode():
            for batch in batches:
                plain_model(batch.tokens_BS, use_cache=False)

    def score() -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(Path(folder) / "corpus.arrow", corpus)
            compute = Compute("cpu", dtype, batch_tokens, torch.get_num_threads())
            score_here(model, Path(folder) / "corpus.arrow", Path(folder) / "scores", compute)

    plain(), score()  # warm: lazy imports, page cache, thread pools
    times = [(timed(plain), timed(score)) for _ in range(repeat)]
    click.echo("run      plain s   tokens/s   scoring s   tokens/s   ratio")
    for run, (plain_s, score_s) in enumerate(times, start=1):
        click.echo(row(str(run), plain_s, score_s, tokens))
    plain_s, score_s = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(score_s / plain_s for plain_s, score_s in times)
    click.echo(row("median", plain_s, score_s, tokens, ratio))


def row(name: str, plain_s: float, score_s: float, tokens: int, ratio: float | None = None) -> str:
    ratio = score_s / plain_s if ratio is None else ratio
    rates = tokens / plain_s, tokens / score_s
    return f"{name:<7} {plain_s:>8.3f} {rates[0]:>10,.0f} {score_s:>11.3f} {rates[1]:>10,.0f} {ratio:>7.2f}"


def make_corpus(model: Path, texts: tuple[Path, ...], samples: int, length: int):
    from tenp_dist.calibration.corpus import build_corpus
    from tenp_dist.checkpoint.index import read_config
    from tenp_dist.config import Source, Text

    with tempfile.TemporaryDirectory() as folder:
        texts = texts or stdlib_texts(Path(folder))
        sources = tuple(Source(path=path, domain=path.name.split(".")[0], samples=samples) for path in texts)
        return build_corpus(Text(sources=sources, sequence_length=length), model, read_config(model)["vocab_size"])


def stdlib_texts(folder: Path) -> tuple[Path, ...]:
    import subprocess

    command = [sys.executable, ROOT / "scripts/stdlib_text.py", "--split", "calibration", "--out", folder]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return tuple(sorted(folder.glob("*.jsonl")))


if __name__ == "__main__":
    main()
