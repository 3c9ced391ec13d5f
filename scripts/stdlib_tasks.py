"""A folder of small tasks for lm-eval, from the held-out text of `stdlib_text.py`: they need no network.

  stdlib_cloze        the last word of a sentence of a docstring, by log-likelihood (accuracy, perplexity)
  stdlib_choice       which of four lines goes on with a piece of code, by log-likelihood (accuracy)
  stdlib_arithmetic   the result of a sum after eight examples, generated (exact match)

They tell a better pruned model of the quickstart from a worse one, and say nothing of large models.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml
from stdlib_text import documents

SPLIT = "evaluation"
SHOWN = 8  # examples before a sum
COMMON = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0, "metadata": {"version": 1.0}}
ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
TASKS: dict[str, dict[str, Any]] = {
    "stdlib_cloze": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{' ' ~ word}}",
        "metric_list": [ACCURACY, {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    },
    "stdlib_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{right}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "metric_list": [ACCURACY],
    },
    "stdlib_arithmetic": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{result}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 12},
        "filter_list": [
            {
                "name": "number",
                "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def cloze() -> Iterator[dict[str, Any]]:
    """Sentences of 12 to 40 words and their last one."""
    for document in documents("docstrings", SPLIT):
        for sentence in re.split(r"(?<=\.)\s", " ".join(document.split())):
            words = sentence.removesuffix(".").split(" ")
            if 12 <= len(words) <= 40 and words[-1].isalpha():
                yield {"text": " ".join(words[:-1]), "word": words[-1]}


def choice() -> Iterator[dict[str, Any]]:
    """Six lines of code and the one after them, among three lines of other places."""
    rng = random.Random(0)
    pieces = [lines for text in documents("code", SPLIT) for lines in _pieces(text)]
    for lines in pieces:
        others = [other[-1] for other in rng.sample(pieces, 3)]
        if lines[-1] in others or len(set(others)) < 3:
            continue
        right = rng.randrange(4)
        yield {
            "text": "\n".join(lines[:-1]) + "\n",
            "choices": [*others[:right], lines[-1], *others[right:]],
            "right": right,
        }


def _pieces(text: str) -> Iterator[list[str]]:
    lines = [line for line in text.split("\n") if line.strip()]
    for start in range(0, len(lines) - 7, 7):
        if 12 <= len(lines[start + 6].strip()) <= 80:
            yield lines[start : start + 7]


def arithmetic() -> Iterator[dict[str, Any]]:
    """Sums of one document, the last one without its result."""
    for document in documents("math", SPLIT):
        sums = [line for line in document.split("\n") if re.fullmatch(r"\d+ [+*-] \d+ = \d+", line)]
        for start in range(0, len(sums) - SHOWN, SHOWN):
            question, _, result = sums[start + SHOWN].rpartition(" ")
            yield {"text": "\n".join([*sums[start : start + SHOWN], question]), "result": result}


def write_task(name: str, items: Iterator[dict[str, Any]], folder: Path, limit: int) -> int:
    """Write the items and the description of a task; returns how many there are."""
    drawn = list(items)
    random.Random(name).shuffle(drawn)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in drawn[:limit]), encoding="utf-8")
    described = {"task": name, **COMMON, **TASKS[name], "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
    return len(drawn[:limit])


@click.command(help=__doc__)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write to.")
@click.option("--limit", default=400, show_default=True, help="Items of a task, at most.")
def main(out: Path, limit: int) -> None:
    folder = out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in (("stdlib_cloze", cloze), ("stdlib_choice", choice), ("stdlib_arithmetic", arithmetic)):
        click.echo(f"{name}: {write_task(name, items(), folder, limit)} items")


if __name__ == "__main__":
    main()
