"""Runs lm-eval on one model: a program of its own, for the Python of an environment that has lm-eval.

Reads a request from standard input and writes the answer to the file that it names, both JSON. Its text is handed to
that Python, so it imports nothing of this package by name: where the package is installed a ragged checkpoint loads
with it, elsewhere with the modeling code in the checkpoint.

    request  {model, model_args, tasks, tasks_folder, limit, num_fewshot, batch_size, seed, chat_template, tokenizer,
              answer}; the keys are those of `lm_eval.simple_evaluate` where it has them
    answer   {versions, tasks: {name: {items, metrics: {metric: {value, stderr}}, samples: {metric: {item: number}},
              answer_tokens: {item: count}}}}, or {refused: {what, found, wanted}}
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

LIBRARIES = ("lm_eval", "torch", "transformers", "tenp-dist", "vllm")


def main() -> None:
    request = json.load(sys.stdin)
    answer = measure(request)
    temporary = f"{request['answer']}.tmp"
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(answer, stream)
    os.replace(temporary, request["answer"])


def measure(request: dict[str, Any]) -> dict[str, Any]:
    try:
        lm_eval = importlib.import_module("lm_eval")
    except ImportError as error:
        return _refused("The environment has no lm-eval", str(error), "lm-eval 0.4.9 or newer, installed there")
    manager, unknown = task_manager(request["tasks"], request["tasks_folder"])
    if unknown:
        return _refused("lm-eval knows no such task", ", ".join(unknown), "a task of lm-eval, or of the tasks folder")
    seeds = {f"{part}_seed": request["seed"] for part in ("random", "numpy_random", "torch_random", "fewshot_random")}
    results = lm_eval.simple_evaluate(
        model=request["model"],
        model_args=remote_code() | request["model_args"],
        device=device(),
        tasks=request["tasks"],
        task_manager=manager,
        limit=request["limit"],
        num_fewshot=request["num_fewshot"],
        batch_size=request["batch_size"],
        apply_chat_template=request["chat_template"],
        log_samples=True,
        **seeds,
    )
    count = _token_counter(request["tokenizer"])
    samples = results["samples"]
    tasks = {name: task_figures(row, samples.get(name, []), count) for name, row in results["results"].items()}
    return {"versions": {name: _version(name) for name in LIBRARIES}, "tasks": tasks}


def task_manager(tasks: list[str], folder: str | None) -> tuple[Any, list[str]]:
    """lm-eval's index of tasks, and which of these it lacks; its own tasks are read only where the folder lacks one."""
    manager_of = importlib.import_module("lm_eval.tasks").TaskManager
    if folder:
        local = manager_of(include_path=folder, include_defaults=False)
        if not _unknown(local, tasks):
            return local, []
    manager = manager_of(include_path=folder)
    return manager, _unknown(manager, tasks)


def _unknown(manager: Any, tasks: list[str]) -> list[str]:
    return [name for name in tasks if not manager.match_tasks([name])]


def remote_code() -> dict[str, bool]:
    """Whether checkpoints have to bring their modeling code: not where the package is there to load them."""
    try:
        importlib.import_module("tenp_dist")
    except ImportError:
        return {"trust_remote_code": True}
    return {"trust_remote_code": False}


def device() -> str:
    return "cuda" if importlib.import_module("torch").cuda.is_available() else "cpu"


def task_figures(row: dict[str, Any], samples: list[dict], count: Callable[[str], int]) -> dict[str, Any]:
    """A task, or group of tasks, of lm-eval's results: its metrics, named `metric,filter`, and what every item got.

    An item that is sampled several times counts with the mean length of its answers.
    """
    metrics = {name: value for name, value in row.items() if "," in name and "_stderr," not in name}
    figures: dict[str, Any] = {
        "items": len({sample["doc_id"] for sample in samples}),
        "metrics": {name: {"value": _number(value), "stderr": _stderr(row, name)} for name, value in metrics.items()},
        "samples": {},
        "answer_tokens": {},
    }
    for sample in samples:
        item = str(sample["doc_id"])
        for name in metrics:
            metric, _, chosen = name.partition(",")
            value = _number(sample.get(metric))
            if sample.get("filter", "none") == chosen and value is not None:
                figures["samples"].setdefault(name, {})[item] = value
        answers = [text for text in sample["resps"][0] if isinstance(text, str)] if sample["resps"] else []
        if answers:
            figures["answer_tokens"][item] = sum(map(count, answers)) / len(answers)
    return figures


def _stderr(row: dict[str, Any], name: str) -> float | None:
    metric, _, chosen = name.partition(",")
    return _number(row.get(f"{metric}_stderr,{chosen}"))


def _number(value: Any) -> float | None:
    """A figure of one item or task; None for what is none, such as the pairs that perplexities are made from."""
    return float(value) if hasattr(value, "__float__") and not isinstance(value, str) else None


def _token_counter(folder: str) -> Callable[[str], int]:
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(folder)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _refused(what: str, found: str, wanted: str) -> dict[str, dict[str, str]]:
    return {"refused": {"what": what, "found": found, "wanted": wanted}}


if __name__ == "__main__":
    main()
