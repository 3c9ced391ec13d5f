"""One vLLM engine that `serving.py` asks in turn with others; runs in vLLM's environment.

Argument: a model folder. Every line of standard input is [sequences, prompt tokens, new tokens]; the answer is a line
`RESULT {"wall": s, "cpu": s}`, after a first one with the bytes of the weights and the seconds to load.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the clock of this process counts
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
VOCABULARY = 4000


def say(found: dict) -> None:
    print("RESULT", json.dumps(found), flush=True)


def main() -> None:
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    engine = LLM(
        sys.argv[1],
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2**28,
        skip_tokenizer_init=True,
    )
    say({"seconds": time.perf_counter() - started} | engine.apply_model(weigh)[0])
    draw = random.Random(0)
    gc.collect()
    gc.disable()
    for line in sys.stdin:
        sequences, prompt, new = json.loads(line)
        prompts = [
            {"prompt_token_ids": [draw.randrange(2, VOCABULARY) for _ in range(prompt)]} for _ in range(sequences)
        ]
        asked = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        wall, cpu = time.perf_counter(), time.process_time()
        engine.generate(prompts, asked, use_tqdm=False)
        say({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu})


def weigh(model) -> dict[str, int]:
    """Bytes of all parameters, and of the routed experts among them."""
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    return {"bytes": sum(sizes.values()), "experts": sum(n for name, n in sizes.items() if ".routed_experts." in name)}


if __name__ == "__main__":
    main()
