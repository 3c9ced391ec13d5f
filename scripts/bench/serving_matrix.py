"""Ragged checkpoints in vLLM in every configuration, against padded ones in stock vLLM and against stock transformers.

Random models in float32 with widths that nothing divides; per family and configuration the differences of the prompts'
log-probabilities, and whether greedy tokens are equal. `uniform` is compared with transformers too. Tests run a part.
With `--only` some of these configurations.

With `--stored` experts are stored in forms of compressed-tensors that the plugin serves, and run by an emulated
kernel, in stock vLLM too: ragged ones of any widths are compared with transformers, ones that keep neurons in whole
groups with the padded one in stock vLLM.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests")]
from machine import print_machine
from scoring import ROOT

from helpers.checkpoints import write
from helpers.engines import HELPERS, QUIET
from helpers.served import STORED, by_transformers, drawn, make_served, make_stored, save_source
from helpers.served_families import SETTINGS, VOCABULARY
from tenp_dist.checkpoint.source import open_source

CONFIGURATIONS = {
    "eager": {},
    "compiled": {"enforce_eager": False},
    "chunks of 32, prefix cache": {
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 32,
        "enable_prefix_caching": True,
    },
    "two ranks": {"tensor_parallel_size": 2},
    "two ranks, experts by id": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "drafts": {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1, "attention_backend": "CPU_MLA"}},
}
UNIFORM = "uniform"
PROMPTS = torch.randint(2, VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(1))


@click.command(help=__doc__)
@click.option("--family", "families", multiple=True, default=list(SETTINGS), type=click.Choice(list(SETTINGS)))
@click.option(
    "--only", multiple=True, default=[*CONFIGURATIONS, UNIFORM], type=click.Choice([*CONFIGURATIONS, UNIFORM])
)
@click.option("--stored", multiple=True, type=click.Choice(list(STORED)), help="experts in this form instead")
@click.option("--folder", type=click.Path(path_type=Path), help="where the temporary folder goes")
def main(families, only, stored, folder):
    subprocess.run([ROOT / "scripts/setup-vllm"], check=True)
    print_machine("torch", "transformers")
    click.echo(
        f"{'family':<16} {'configuration':<28} {'over padded in stock vLLM':<27} {'over transformers':<27} tokens"
    )
    for family in families:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            compare_stored(family, stored, Path(temporary)) if stored else compare(family, only, Path(temporary))


def compare(family: str, only: tuple[str, ...], folder: Path) -> None:
    checkpoints = make_served(family, folder)
    stock = by_transformers(checkpoints["padded"], PROMPTS)
    chosen = [name for name in CONFIGURATIONS if name in only and (name != "drafts" or family == "deepseek_v3")]
    alike = [name for name in chosen if not CONFIGURATIONS[name]]  # in one process with the padded one
    padded, *found = answers([(checkpoints["padded"], {}), *[(checkpoints["ragged"], {}) for _ in alike]], folder)
    show(family, "padded, stock vLLM", padded, None, stock)
    for name, one in zip(alike, found, strict=True):
        show(family, name, one, padded, stock)
    for name in [name for name in chosen if name not in alike]:
        show(family, name, answers([(checkpoints["ragged"], CONFIGURATIONS[name])], folder)[0], padded, stock)
    if UNIFORM in only:
        uniform = write_uniform(checkpoints["source"], folder / UNIFORM)
        found = answers([(uniform, {})], folder)[0]
        show(family, f"{UNIFORM}, stock vLLM", found, None, by_transformers(uniform, PROMPTS))


def compare_stored(family: str, forms: tuple[str, ...], folder: Path) -> None:
    source, emulated = save_source(family, folder / "source"), {"worker_extension_cls": "compressed_emulation.Emulated"}
    for name in forms:
        made = make_stored(source, folder / name, STORED[name])
        runs = [(one, emulated) for one in made.values()]
        ragged, ragged_whole, padded_whole, two = answers(
            [*runs, (made["ragged"], emulated | {"tensor_parallel_size": 2})], folder
        )
        stock, stock_whole = (by_transformers(made[one], PROMPTS) for one in ("ragged", "ragged whole"))
        show(family, name, ragged, None, stock)
        show(family, f"{name}, two ranks", two, None, stock)
        show(family, f"{name}, whole groups", ragged_whole, padded_whole, stock_whole)


def write_uniform(source: Path, folder: Path) -> Path:
    layers = open_source(source).facts.moe_layers
    write(source, {layer: drawn([96] * 12, layer) for layer in layers}, folder, "uniform", shard_size=10**7)
    return folder


def answers(runs: list[tuple[Path, dict]], folder: Path) -> list[dict]:
    """What `engine_worker.py` finds for checkpoints with these settings; an error ends the run."""
    job, out = folder / "job.json", folder / "out.json"
    given = [{"folder": str(one), "settings": settings} for one, settings in runs]
    job.write_text(json.dumps({"prompts": PROMPTS.tolist(), "runs": given}))
    python = Path(os.environ.get("VLLM_VENV", ROOT / ".venv-vllm")) / "bin/python"
    command = [python, HELPERS / "engine_worker.py", job, out]
    environment = os.environ | QUIET | {"PYTHONPATH": str(HELPERS)}
    environment["VLLM_CACHE_ROOT"] = str(folder / "vllm-cache")  # no graphs that were compiled for another model
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = json.loads(out.read_text()) if done.returncode == 0 else [{"error": done.stderr[-4000:]}]
    if errors := [one["error"] for one in found if "error" in one]:
        raise click.ClickException(errors[0])
    return found


def show(family: str, name: str, found: dict, padded: dict | None, stock: torch.Tensor) -> None:
    logprobs = torch.tensor(found["logprobs"])
    over = spread(logprobs, torch.tensor(padded["logprobs"])) if padded else "-"
    tokens = "-" if padded is None else "equal" if found["tokens"] == padded["tokens"] else "DIFFERENT"
    click.echo(f"{family:<16} {name:<28} {over:<27} {spread(logprobs, stock):<27} {tokens}")


def spread(left: torch.Tensor, right: torch.Tensor) -> str:
    off = (left - right).abs()
    return f"mean {off.mean():.1e} max {off.max():.1e}"


if __name__ == "__main__":
    main()
