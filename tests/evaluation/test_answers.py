"""Answers of several variants in one pass: against stock transformers, a sequence at a time and without padding."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from helpers.checkpoints import random_kept
from helpers.evaluation import load, masked
from helpers.scoring import COMPUTE, pass_context
from tenp_dist.calibration.items import EXACT, Items, build_items, read_items, write_items
from tenp_dist.checkpoint.kept import write_kept
from tenp_dist.evaluation.answers import answered
from tenp_dist.evaluation.measure import EvaluateTask, VariantsPass, drop_hidden, evaluate_model
from tenp_dist.evaluation.variants import Variant

TEXT = "the expert routes a token to neurons and prunes what layer norm leaves while sum of seven times nine is"
WORDS = TEXT.split()


def items_of(folder, model, stock) -> Items:
    """Twelve of each kind, drawn by chance. Some texts are what the model itself would write, one but for its end."""
    rng, rows = np.random.default_rng(3), []
    for number in range(12):
        prompt = " ".join(rng.choice(WORDS, 2 + number % 5))
        choices = [" ".join(rng.choice(WORDS, 1 + place)) for place in range(3)]
        rows.append({"prompt": prompt, "choices": choices, "answer": number % 3})
        rows.append({"prompt": prompt, "answer": " ".join(rng.choice(WORDS, 2))})
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = build_items(path, read_items(path), model, 320, 64)
    texts = np.flatnonzero(items.right_M[items.item_N] == EXACT)[:4]
    for row, less in zip(texts, (0, 0, 0, 1), strict=True):
        tokens = items.corpus.tokens_NS[row]
        for place in range(items.begin_N[row], items.end_N[row] - less):
            with torch.no_grad():
                tokens[place] = int(stock(torch.from_numpy(tokens[:place]).long()[None]).logits[0, -1].argmax())
    return items


def by_definition(model, items: Items) -> tuple[list[float], list[bool]]:
    """Of every sequence: log-probability of its answer, and whether every token of it is the likeliest."""
    log, greedy = [], []
    for row, begin, end in zip(items.corpus.tokens_NS, items.begin_N, items.end_N, strict=True):
        with torch.no_grad():
            found = torch.log_softmax(model(torch.from_numpy(row[:end]).long()[None]).logits[0].double(), -1)
        log.append(sum(float(found[place - 1, row[place]]) for place in range(begin, end)))
        greedy.append(all(int(found[place - 1].argmax()) == row[place] for place in range(begin, end)))
    return log, greedy


def asked(model, items: Items, variants, folder, **cluster):
    write_items(folder / "asked.arrow", items)
    task = EvaluateTask([VariantsPass(model, variants)], folder / "asked.arrow", folder, "key", COMPUTE, 3, items=True)
    found = evaluate_model(pass_context(model, folder / "ledger", **cluster), task)
    drop_hidden(task)
    return found


@pytest.mark.slow
@pytest.mark.beside
def test_answers_are_those_of_stock_models(tiny_model, tmp_path):
    model = tiny_model("deepseek_v3")
    kept, stock = random_kept(model), load(model)
    write_kept(tmp_path / "kept.safetensors", kept, {"plan": "test"})
    items = items_of(tmp_path, model, stock)
    variants = {"source": Variant(), "pruned": Variant(tmp_path / "kept.safetensors")}
    found = asked(model, items, variants, tmp_path, shards=2)
    for name, reference in (("source", stock), ("pruned", masked(load(model), kept))):
        log, greedy = by_definition(reference, items)
        assert found.log_N[name] == pytest.approx(log, rel=1e-5)
        assert found.greedy_N[name].tolist() == greedy
        wanted = [_right(items, number, log, greedy) for number in range(len(items.right_M))]
        figures = found.summary()[name]
        assert figures["accuracy"] == pytest.approx(sum(wanted) / len(wanted)) == 1 - figures["error"]
        nll = -np.array(log)[items.right_N].sum() / (items.end_N - items.begin_N)[items.right_N].sum()
        assert figures["nll"] == pytest.approx(nll, rel=1e-5)
    assert found.greedy_N["source"].sum() == 3, "some texts must match, or the test says nothing"
    assert np.abs(found.log_N["source"] - found.log_N["pruned"]).max() > 1e-3


def _right(items: Items, number: int, log, greedy) -> bool:
    own = np.flatnonzero(items.item_N == number)
    if items.right_M[number] == EXACT:
        return greedy[own[0]]
    return int(np.argmax([log[place] / items.letters_N[place] for place in own])) == items.right_M[number]


def test_choices_count_by_letter_and_texts_as_a_whole():
    """-2 / 4 = -0.5 beats -1 / 1 and -3 / 3, though -1 is the largest sum; equal ones: the first."""
    nothing = np.zeros(7, dtype=int)
    item_N, letters_N = np.array([0, 0, 0, 1, 2, 2, 3]), np.array([4, 1, 3, 5, 2, 2, 1])
    items = Items(None, nothing, nothing, item_N, letters_N, np.array([0, EXACT, 0, EXACT]))
    log_N, greedy_N = np.array([-2.0, -1, -3, -9, -4, -4, -1]), np.array([0, 0, 0, 1, 0, 0, 0], dtype=bool)
    assert answered(items, log_N, greedy_N).tolist() == [True, True, True, False]
