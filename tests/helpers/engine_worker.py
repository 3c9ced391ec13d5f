"""Asks vLLM the same prompts of several checkpoints, one engine after another in one process of vLLM's environment.

    python engine_worker.py JOB.json OUT.json

`JOB.json`: `prompts`, lists of token ids; `runs`, each with `folder`, and `settings` of `vllm.LLM`.
`OUT.json`: per run the prompts' log-probabilities, greedy tokens, bytes of the experts, seconds to start; or an error.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import sys
import time
import traceback
from pathlib import Path

NEW_TOKENS = 16
DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 2**26,
    "skip_tokenizer_init": True,
    "disable_log_stats": False,
    "attention_backend": "CPU_MLA",  # with latent attention: the one for AMX knows no float32
}
# vLLM 0.32 computes this op wrongly on CPUs, for latent attention without torch.compile
ROTARY = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}


def main(job: str, out: str) -> None:
    given = json.loads(Path(job).read_text())
    found = [attempt(run, given["prompts"]) for run in given["runs"]]
    Path(out).write_text(json.dumps(found))


def attempt(run: dict, prompts: list[list[int]]) -> dict:
    """The answers of one checkpoint, or why vLLM does not start."""
    try:
        return answers(run, prompts)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        clean_up()


def clean_up() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    with contextlib.suppress(Exception):  # nothing was started
        cleanup_dist_env_and_memory()


def answers(run: dict, prompts: list[list[int]]) -> dict:
    import vllm

    settings = DEFAULTS | run["settings"]
    if module := settings.get("worker_extension_cls", "").rpartition(".")[0]:
        importlib.import_module(module)  # in this process too
    if settings["enforce_eager"]:
        settings |= ROTARY
    started = time.perf_counter()
    engine = vllm.LLM(run["folder"], **settings)
    seconds = time.perf_counter() - started
    greedy = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "detokenize": False}
    asked, plain = vllm.SamplingParams(**greedy, prompt_logprobs=0), vllm.SamplingParams(**greedy)
    logprobs, tokens = [], []
    for prompt in prompts:  # one at a time: how requests are batched is a matter of timing
        (answer,) = engine.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)
        logprobs += [p[t].logprob for t, p in zip(prompt[1:], answer.prompt_logprobs[1:], strict=True)]
        (again,) = engine.generate([{"prompt_token_ids": prompt}], plain, use_tqdm=False)
        tokens.append([list(one.outputs[0].token_ids) for one in (answer, again)])
    found = {"logprobs": logprobs, "tokens": tokens, "seconds": seconds, "metrics": counters(engine)}
    with contextlib.suppress(Exception):
        found["bytes"] = engine.apply_model(weight_bytes)[0]
    return found


def counters(engine) -> dict[str, float]:
    """Counters of the engine by name: prefix cache hits, drafts of speculative decoding."""
    return {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}


def weight_bytes(model) -> int:
    """Bytes of the routed experts."""
    return sum(p.nbytes for name, p in model.named_parameters() if ".routed_experts." in name)


if __name__ == "__main__":
    main(*sys.argv[1:])
