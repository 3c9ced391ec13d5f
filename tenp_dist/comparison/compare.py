"""Two checkpoints, one after the other, on the same prompts.

Memory: one checkpoint at a time, and the logits of one answer. Those of the first checkpoint wait in a temporary
folder: answers x tokens x vocabulary x 4 bytes, 33 MB for 64 tokens of a vocabulary of 129,280.

Shape legend: T tokens of an answer, V rows of the vocabulary.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tenp_dist.comparison.generate import Loaded, load
from tenp_dist.errors import SourceError

Announce = Callable[[str], None]


def compare(
    source: Path,
    pruned: Path,
    prompts: Sequence[str],
    *,
    length: int = 64,
    chat: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    announce: Announce = lambda text: None,
) -> dict[str, Any]:
    """What both write after every prompt, and KL(source || pruned) along the source's answer.

    Args:
        source, pruned: folders; the prompts are tokens of the source's tokenizer.
        length: tokens of an answer, at most.
        chat: prompts are users' messages.
        device, dtype: as `generate.load` takes them.
        announce: is told what is at work.

    Returns:
        answers: prompt, source and pruned (text, tokens), first_divergence (the first token that differs, None where
        none does), kl (nats, per token of the source's answer) and agreement (share of these at which the pruned model
        has the same most likely token); mean_kl and agreement over all tokens; same, the number of equal answers.

    Raises:
        SourceError: a checkpoint does not load, or they have different vocabularies.
        DeviceError, NumericalError.
    """
    with tempfile.TemporaryDirectory(prefix="tenp-compare-") as folder:
        announce(f"loading {source}")
        first = _source_answers(load(source, device, dtype), prompts, length, chat, Path(folder), announce)
        announce(f"loading {pruned}")
        answers = _pruned_answers(load(pruned, device, dtype), first, length, Path(folder), announce)
    kl = [value for answer in answers for value in answer["kl"]]
    return {
        "source": source.name,
        "pruned": pruned.name,
        "length": length,
        "answers": answers,
        "mean_kl": math.fsum(kl) / len(kl) if kl else 0.0,
        "agreement": _share([same for answer in answers for same in answer.pop("agreeing")]),
        "same": sum(answer["first_divergence"] is None for answer in answers),
    }


def _source_answers(
    model: Loaded, prompts: Sequence[str], length: int, chat: bool, folder: Path, announce: Announce
) -> list[dict[str, Any]]:
    answers = []
    for number, prompt in enumerate(prompts):
        announce(f"source, prompt {number + 1} of {len(prompts)}")
        ids = model.prompt_ids(prompt, chat=chat)
        if not ids:
            raise SourceError("A prompt has no tokens", where=repr(prompt), next_step="write something into it")
        answer = model.answer(ids, length)
        save_file({"logits": model.logits(ids, answer).contiguous()}, folder / f"{number}.safetensors")
        answers.append({"prompt": prompt, "prompt_ids": ids, "source": _written(model, answer)})
    return answers


def _pruned_answers(
    model: Loaded, first: Sequence[dict[str, Any]], length: int, folder: Path, announce: Announce
) -> list[dict[str, Any]]:
    answers = []
    for number, one in enumerate(first):
        announce(f"pruned, prompt {number + 1} of {len(first)}")
        ids = one["source"]["ids"]
        source_TV = load_file(folder / f"{number}.safetensors")["logits"]
        if source_TV.shape[1] != model.vocabulary:
            raise SourceError(
                "The checkpoints have different vocabularies",
                where=model.folder,
                found=model.vocabulary,
                wanted=source_TV.shape[1],
                next_step="compare a checkpoint with what was pruned from it",
            )
        pruned_TV = model.logits(one["prompt_ids"], ids)
        answer = model.answer(one["prompt_ids"], length)
        agreeing = (source_TV.argmax(-1) == pruned_TV.argmax(-1)).tolist()
        answers.append(
            {
                "prompt": one["prompt"],
                "source": one["source"],
                "pruned": _written(model, answer),
                "first_divergence": first_divergence(ids, answer),
                "kl": divergence(source_TV, pruned_TV).tolist(),
                "agreement": _share(agreeing),
                "agreeing": agreeing,
            }
        )
    return answers


def _written(model: Loaded, answer: list[int]) -> dict[str, Any]:
    tokens = model.texts(answer)
    return {"text": "".join(tokens), "tokens": tokens, "ids": answer}


def divergence(source_TV: torch.Tensor, pruned_TV: torch.Tensor) -> torch.Tensor:
    """KL(source || pruned) of every row of logits, in nats, [T] float64."""
    source_TV, pruned_TV = (logits.double().log_softmax(-1) for logits in (source_TV, pruned_TV))
    return (source_TV.exp() * (source_TV - pruned_TV)).sum(-1).clamp_min(0)


def first_divergence(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which two answers differ, the end of the shorter one included; None where they are equal."""
    differing = (place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differing, None if len(one) == len(other) else min(len(one), len(other)))


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 1.0
