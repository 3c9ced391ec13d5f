"""Log-probabilities of prompts in stock vLLM; vllm_check.py starts it in vLLM's own environment.

Arguments: model folder, json file of prompts (token ids, all of one length), json file to write.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    from vllm import LLM, SamplingParams

    model, prompts, out = sys.argv[1:]
    tokens_NS = json.loads(Path(prompts).read_text())
    engine = LLM(model, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=len(tokens_NS))
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    answers = engine.generate([{"prompt_token_ids": tokens} for tokens in tokens_NS], asked, use_tqdm=False)
    rows = [
        [position[token].logprob for token, position in zip(tokens[1:], answer.prompt_logprobs[1:], strict=True)]
        for tokens, answer in zip(tokens_NS, answers, strict=True)
    ]
    Path(out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
