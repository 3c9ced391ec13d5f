"""Trains a small DeepSeek-V3-style mixture-of-experts model on the CPU, as a subject for pruning tests.

Text comes from the `training` split of `stdlib_text.py`; the table at the end is measured on the
`evaluation` split with the saved bfloat16 weights loaded again in float32.

Shape suffixes: B sequences, T tokens, E experts, V vocabulary.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from stdlib_text import DOMAINS, documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1
VOCAB = 2048
TOKENIZER_CHARS = 1_500_000  # of each domain

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 7,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 80,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "max_position_embeddings": 1024,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.04,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}

SEQUENCE = 256
BATCH = 8
DOMAIN_WEIGHTS = {"code": 0.5, "docstrings": 0.3, "math": 0.2}
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
FINAL_LR_SHARE = 0.03
WEIGHT_DECAY = 0.1
GRADIENT_CLIP = 1.0
BIAS_SPEED = 2e-3  # of the router's correction bias, scaled by the learning-rate schedule
EVALUATION_WINDOWS = 96
SHARD_SIZE = "4MB"  # small, so that the saved model has several shards and an index


@dataclass(frozen=True, kw_only=True)
class Score:
    """Means over the evaluated tokens of one domain; `unigram` is the loss of the best context-free guess."""

    nll: float
    accuracy: float
    unigram: float


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with one token per digit, so that sums are learnt digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_text(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def _tokenizer_text() -> Iterator[str]:
    for domain in DOMAINS:
        left = TOKENIZER_CHARS
        for text in documents(domain, "training"):
            if left <= 0:
                break
            left -= len(text)
            yield text


class TokenStream:
    """The documents of one domain end to end, each as bos, text, eos."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, domain: str, split: str) -> None:
        texts = list(documents(domain, split))
        rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        rows = [[BOS_ID, *row, EOS_ID] for row in rows]
        lengths = torch.tensor([len(row) for row in rows])
        self.tokens = torch.tensor([token for row in rows for token in row])
        self.starts = lengths.cumsum(0) - lengths
        self.last_offset = len(self.tokens) - SEQUENCE - 1

    def sample(self, generator: torch.Generator) -> Tensor:
        """A random window. Half of them begin at a document, as texts do when the model is used."""
        at_document = torch.rand((), generator=generator) < 0.5
        if at_document:
            offset = self.starts[torch.randint(len(self.starts), (), generator=generator)]
        else:
            offset = torch.randint(self.last_offset + 1, (), generator=generator)
        return self._window(min(int(offset), self.last_offset))

    def windows(self, limit: int) -> Tensor:
        """Up to `limit` windows spread evenly over the stream, without overlap."""
        count = min(limit, len(self.tokens) // (SEQUENCE + 1))
        return torch.stack([self._window(i * self.last_offset // max(count - 1, 1)) for i in range(count)])

    def _window(self, offset: int) -> Tensor:
        return self.tokens[offset : offset + SEQUENCE + 1]


def batches(streams: dict[str, TokenStream], seed: int) -> Iterator[Tensor]:
    """Endless batches of B x (T + 1) tokens; every row takes its domain by weight."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([DOMAIN_WEIGHTS[domain] for domain in streams])
    choices = list(streams.values())
    while True:
        picks = torch.multinomial(weights, BATCH, replacement=True, generator=generator)
        yield torch.stack([choices[pick].sample(generator) for pick in picks.tolist()])


class RouterBalancer:
    """Aux-loss-free balancing: an expert with fewer tokens than the mean gets a higher selection bias."""

    def __init__(self, model: nn.Module) -> None:
        self.routers = [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]
        self.counts = [torch.zeros(router.num_experts) for router in self.routers]
        for index, router in enumerate(self.routers):
            router.register_forward_hook(self._counter(index))

    def _counter(self, index: int):
        def count(router: nn.Module, inputs: tuple, outputs: tuple) -> None:
            self.counts[index] = torch.bincount(outputs[2].flatten(), minlength=router.num_experts).float()

        return count

    def step(self, speed: float) -> None:
        for router, count_E in zip(self.routers, self.counts, strict=True):
            router.e_score_correction_bias += speed * (count_E.mean() - count_E).sign()


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Weight decay on matrices only: norms and embeddings keep their scale."""
    named = list(model.named_parameters())
    plain = [p for name, p in named if p.ndim < 2 or "embed_tokens" in name]
    matrices = [p for name, p in named if not (p.ndim < 2 or "embed_tokens" in name)]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to FINAL_LR_SHARE."""
    warmup = min(WARMUP_STEPS, steps // 5 + 1)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def next_token_nll(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())


def train(model: nn.Module, data: Iterator[Tensor], steps: int, console: Console) -> None:
    optimizer, balancer = make_optimizer(model), RouterBalancer(model)
    model.train()
    with _progress(console) as progress:
        task, began = progress.add_task("training", total=steps, note=""), time.monotonic()
        for step in range(steps):
            share = schedule(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * share
            loss = next_token_nll(model, next(data))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            balancer.step(BIAS_SPEED * share)
            rate = (step + 1) / (time.monotonic() - began)
            progress.update(task, advance=1, note=f"NLL {loss.item():.3f}  {rate:.2f} steps/s")
    seconds = time.monotonic() - began
    console.print(f"{steps} steps in {seconds:.0f} s ({steps / seconds:.2f} steps/s), last NLL {loss.item():.3f}")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
    )


@torch.no_grad()
def evaluate(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> dict[str, Score]:
    """NLL and top-1 accuracy per domain on the evaluation split."""
    model.eval()
    return {domain: _score(model, TokenStream(tokenizer, domain, "evaluation")) for domain in DOMAINS}


def _score(model: nn.Module, stream: TokenStream) -> Score:
    windows, nll, right = stream.windows(EVALUATION_WINDOWS), 0.0, 0
    for tokens_BT in windows.split(BATCH):
        logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
        targets_BT = tokens_BT[:, 1:]
        nll += F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum").item()
        right += (logits_BTV.argmax(-1) == targets_BT).sum().item()
    targets = windows[:, 1:].flatten()
    share_V = torch.bincount(targets, minlength=VOCAB) / len(targets)
    unigram = torch.special.entr(share_V).sum().item()
    return Score(nll=nll / len(targets), accuracy=right / len(targets), unigram=unigram)


def save(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Saves in bfloat16, but leaves the correction biases in float32 as released checkpoints do."""
    for stale in out.glob("*.safetensors*"):
        stale.unlink()
    biases = {name: buffer.clone() for name, buffer in model.named_buffers() if "correction_bias" in name}
    model.to(torch.bfloat16)
    for name, bias in biases.items():
        model.get_buffer(name).data = bias
    model.config.use_cache = True
    model.save_pretrained(out, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(out)
    for shard in out.glob("*.safetensors"):
        shard.chmod(0o644)  # shards are written readable by their owner alone


def score_table(scores: dict[str, Score]) -> Table:
    table = Table("domain", "NLL", "top-1", "unigram NLL")
    for domain, score in scores.items():
        table.add_row(domain, f"{score.nll:.3f}", f"{score.accuracy:.1%}", f"{score.unigram:.3f}")
    return table


@click.command()
@click.option("--steps", type=click.IntRange(1), default=1600, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Model folder to write.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
def main(steps: int, out: Path, seed: int, threads: int) -> None:
    """Train a tokenizer and a tiny mixture-of-experts model, and save both in OUT."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)  # gathers otherwise add their gradients in any order
    console = Console()
    tokenizer = train_tokenizer()
    streams = {domain: TokenStream(tokenizer, domain, "training") for domain in DOMAINS}
    for domain, stream in streams.items():
        console.print(f"{domain}: {len(stream.tokens):,} training tokens")
    model = DeepseekV3ForCausalLM._from_config(DeepseekV3Config(**SHAPE), experts_implementation="grouped_mm")
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, batches(streams, seed), steps, console)
    out.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, out)
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    console.print(score_table(evaluate(saved, tokenizer)))


if __name__ == "__main__":
    main()
