"""Distributions over the vocabulary at every token of some prompts, from one vLLM engine; runs in vLLM's environment.

    python serving_bfloat16_worker.py MODEL DTYPE PROMPTS.npy OUT.npy

`PROMPTS.npy`: token ids [N, S]. `OUT.npy`: float32 log-probabilities [N * (S - 1), V] of the next token.
"""

from __future__ import annotations

import os
import sys

import numpy as np

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def main(model: str, dtype: str, prompts: str, out: str) -> None:
    from vllm import LLM, SamplingParams

    given = np.load(prompts)
    engine = LLM(
        model,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=given.shape[1] + 1,
        max_num_seqs=1,
        max_logprobs=-1,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2**27,
        skip_tokenizer_init=True,
        attention_backend="CPU_MLA",  # with latent attention: the one for AMX knows no float32
        compilation_config={"custom_ops": ["-rotary_embedding"]},  # vLLM 0.32 computes it wrongly on CPUs
    )
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    vocabulary, rows = engine.model_config.get_vocab_size(), []
    for prompt in given.tolist():
        (answer,) = engine.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)
        found = answer.prompt_logprobs
        ids, values = np.array(found.token_ids), np.array(found.logprobs, dtype=np.float32)
        for start, end in list(zip(found.start_indices, found.end_indices, strict=True))[1:]:
            row = np.full(vocabulary, np.nan, dtype=np.float32)
            row[ids[start:end]] = values[start:end]
            rows.append(row)
    np.save(out, np.stack(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
