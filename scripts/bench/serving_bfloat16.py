"""What bfloat16 makes of ragged experts in vLLM: KL per token and tokens whose most likely successor is another one.

`ragged` with the plugin and `padded` in stock vLLM compute the same in exact arithmetic; in bfloat16 they add up in
another order, and a token may be routed to another expert. Both are compared with each other, and with the padded one
in float32, which says what bfloat16 itself costs. Random models of `serving_matrix.py`, or a trained one pruned here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests")]
from machine import print_machine
from scoring import ROOT, make_corpus

from helpers.engines import QUIET
from helpers.served import make_served
from helpers.served_families import VOCABULARY

WORKER = Path(__file__).with_name("serving_bfloat16_worker.py")
RANDOM = ("qwen3_moe", "deepseek_v3")
PATHS = click.Path(path_type=Path, exists=True)


@click.command(help=__doc__)
@click.option("--model", type=PATHS, help="a trained model, instead of random ones")
@click.option("--calibration", type=PATHS, multiple=True, help="jsonl with `text`, one a domain; it is pruned on them")
@click.option("--selection", type=PATHS, multiple=True, help="the same domains, to measure on")
@click.option("--method", default="global", show_default=True)
@click.option("--retention", default="0.6", show_default=True)
@click.option("--samples", default=16, show_default=True, help="calibration sequences a domain")
@click.option("--measured", default=2, show_default=True, help="sequences a domain to measure on")
@click.option("--length", default=256, show_default=True, help="tokens per sequence")
@click.option("--folder", type=click.Path(path_type=Path), help="where the temporary folder goes")
def main(model, calibration, selection, method, retention, samples, measured, length, folder):
    subprocess.run([ROOT / "scripts/setup-vllm"], check=True)
    print_machine("torch", "transformers")
    click.echo(f"{'model':<14} {'compared':<40} {'KL per token':>12} {'largest':>9} {'flips':>7}  tokens")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        home = Path(temporary)
        if model is None:
            for name in RANDOM:
                compare(name, make_served(name, home / name), random_prompts(), home)
        else:
            text = {"samples": samples, "length": length}
            folders = prune(model, calibration, home / "run", method=method, retention=retention, **text)
            compare(model.name, folders, make_corpus(model, selection, measured, length).tokens_NS, home)


def random_prompts() -> np.ndarray:
    return torch.randint(2, VOCABULARY, (16, 128), generator=torch.Generator().manual_seed(5)).numpy()


def prune(
    model: Path, calibration: tuple[Path, ...], folder: Path, *, method: str, retention: str, samples: int, length: int
) -> dict[str, Path]:
    """Layout -> checkpoint."""
    from tenp_dist import run_job
    from tenp_dist.pool.in_process import InProcessPool

    sources = [{"path": str(p.resolve()), "domain": p.name.split(".")[0], "samples": samples} for p in calibration]
    job = {
        "model": str(model.resolve()),
        "run_dir": str(folder),
        "calibration": {"sources": sources, "sequence_length": length},
        "budget": {"method": method, "retention": retention},
        "output": {"layouts": ["ragged", "padded"]},
    }
    run_job(job, stages=["inspect", "calibrate", "score", "plan", "write"], pool=lambda: InProcessPool(cores=1))
    return {layout: folder / "checkpoint" / layout for layout in ("ragged", "padded")}


def compare(name: str, folders: dict[str, Path], prompts: np.ndarray, home: Path) -> None:
    """Three engines, one after the other, and a line for every pair of them."""
    np.save(home / "prompts.npy", prompts)
    found = {
        f"{layout} {dtype}": distributions(folders[layout], dtype, home)
        for layout, dtype in (("padded", "float32"), ("padded", "bfloat16"), ("ragged", "bfloat16"))
    }
    for left, right in pairs(list(found)):
        kl_T = divergence(found[right], found[left])
        flips = (found[left].argmax(1) != found[right].argmax(1)).mean()
        what = f"{left} over {right}"
        click.echo(f"{name:<14} {what:<40} {kl_T.mean():>12.1e} {kl_T.max():>9.1e} {flips:>7.2%}  {len(kl_T):,}")


def pairs(names: list[str]) -> Iterator[tuple[str, str]]:
    """The two in bfloat16 first, then each of them over the exact one."""
    exact, padded, ragged = names
    yield ragged, padded
    yield ragged, exact
    yield padded, exact


def distributions(model: Path, dtype: str, home: Path) -> np.ndarray:
    """Log-probabilities [T, V] of one checkpoint in an engine of its own."""
    python = Path(os.environ.get("VLLM_VENV", ROOT / ".venv-vllm")) / "bin/python"
    command = [python, WORKER, model, dtype, home / "prompts.npy", home / "out.npy"]
    done = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"an engine ended:\n{done.stderr[-4000:]}")
    return np.load(home / "out.npy")


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of every token in nats, [T], in float64 from log-probabilities [T, V]."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    return (np.exp(p) * (p - q)).sum(1)


if __name__ == "__main__":
    main()
