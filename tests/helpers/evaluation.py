"""Evaluations of small models, and the figures that they have by definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.scoring import COMPUTE, pass_context, random_corpus
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.evaluation.measure import EvaluateTask, drop_hidden, evaluate_model
from tenp_dist.passes.compute import Compute


def evaluate(passes, corpus, folder, compute=COMPUTE) -> dict:
    write_corpus(folder / "held-out.arrow", corpus)
    task = EvaluateTask(passes, folder / "held-out.arrow", folder, "key", compute)
    metrics = evaluate_model(pass_context(passes[0].checkpoint, folder / "ledger"), task)
    drop_hidden(task)
    return metrics.summary()


def auto_class(folder):
    """What loads the whole model: one with towers beside its language model is no causal one for transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    towers = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    return AutoModelForImageTextToText if towers else AutoModelForCausalLM


def load(folder, dtype=torch.float32):
    return auto_class(folder).from_pretrained(folder, dtype=dtype).eval()


def layers_of(model):
    """The decoder layers of a model."""
    return getattr(model.base_model, "language_model", model.base_model).layers


def logits_of(model, corpus) -> torch.Tensor:
    mask = torch.from_numpy(corpus.mask_NS)
    with torch.no_grad():
        return model(torch.from_numpy(corpus.tokens_NS).long(), attention_mask=mask.long()).logits.float()


def masked(model, kept):
    """The stock model with the dropped neurons' down columns set to zero."""
    for layer, neurons in kept.items():
        name, down = next(i for i in layers_of(model)[layer].named_parameters() if i[0].endswith("experts.down_proj"))
        turned = getattr(layers_of(model)[layer].get_submodule(name.rpartition(".")[0]), "is_transposed", False)
        down_EDF = down.transpose(1, 2) if turned else down
        with torch.no_grad():
            down_EDF *= torch.from_numpy(neurons.mask(down_EDF.shape[2]))[:, None, :]
    return model


def expected_figures(reference, logits, corpus, domain) -> dict[str, float]:
    """By definition: float64, one position at a time over the predicted tokens of a domain."""
    rows = corpus.domain_N == domain
    log_p = torch.log_softmax(reference[rows].double(), -1)
    log_q = torch.log_softmax(logits[rows].double(), -1)
    tokens, mask = corpus.tokens_NS[rows], corpus.mask_NS[rows]
    nll, kl, agree, count = 0.0, 0.0, 0, 0
    for i in range(len(tokens)):
        for t in range(tokens.shape[1] - 1):
            if mask[i, t] and mask[i, t + 1]:
                nll -= float(log_q[i, t, tokens[i, t + 1]])
                kl += float((log_p[i, t].exp() * (log_p[i, t] - log_q[i, t])).sum())
                agree += int(log_p[i, t].argmax() == log_q[i, t].argmax())
                count += 1
    return {"tokens": count, "nll": nll / count, "kl": kl / count, "top1_agreement": agree / count}


def task_of(passes, folder: Path, *, sequences: int, waves: int) -> EvaluateTask:
    """Microbatches of one sequence."""
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder / "held-out.arrow", random_corpus(256, sequences=sequences))
    return EvaluateTask(passes, folder / "held-out.arrow", folder, "key", Compute("cpu", "float32", 24, 1), waves=waves)


def run(pool, passes, folder: Path, *, sequences=6, waves=3, steps=None, **cluster) -> dict:
    """The summary of an evaluation on `pool`."""
    task = task_of(passes, folder, sequences=sequences, waves=waves)
    told = [] if steps is None else steps
    context = pass_context(passes[0].checkpoint, folder / "evaluate.ledger.jsonl", pool, told.append, **cluster)
    metrics = evaluate_model(context, task)
    drop_hidden(task)
    return metrics.summary()


def close_to(found: dict, reference: dict, tolerance: float) -> None:
    for variant, values in reference.items():
        for domain, figures in values["domains"].items():
            for name, figure in figures.items():
                other = found[variant]["domains"][domain][name]
                assert other == pytest.approx(figure, rel=tolerance, abs=tolerance), (variant, domain, name)


LAYERS, WAVES = 4, 3
