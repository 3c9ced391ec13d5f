"""One run of llm-compressor's REAPPruningModifier; peer_llm_compressor.py starts it in the peer's own environment.

As in its own REAP examples: `load_context`, `oneshot` with the sequential pipeline and routed experts only, then
`save_pretrained`. Imports end before the clock starts, loading the model is timed apart. Prints one line of JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import PeakMemory


def main() -> None:
    """Arguments: one JSON object, see `measure`."""
    found = measure(**json.loads(sys.argv[1]))
    print(json.dumps(found))


def measure(model: str, corpus: str, out: str, sparsity: float, threads: int, **options) -> dict[str, float]:
    """options: of `oneshot`."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import REAPPruningModifier
    from llmcompressor.utils import load_context
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(threads)
    samples = read_samples(corpus)
    length = len(samples[0]["input_ids"])
    drop_aliases()
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))  # imports the model's code
    with PeakMemory() as memory:
        times = [time.perf_counter()]
        with load_context():
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        times.append(time.perf_counter())
        cpu = time.process_time()
        oneshot(
            model=loaded,
            dataset=samples,
            recipe=REAPPruningModifier(sparsity=sparsity),
            max_seq_length=length,
            num_calibration_samples=len(samples),
            shuffle_calibration_samples=False,
            moe_calibrate_all_experts=False,
            pipeline="sequential",
            **options,
        )
        times.append(time.perf_counter())
        loaded.save_pretrained(out)
        times.append(time.perf_counter())
        cpu = time.process_time() - cpu
    load, calibrate, save = (after - before for before, after in itertools.pairwise(times))
    parts = {"load": load, "calibrate": calibrate, "save": save}
    return {"seconds": calibrate + save, "cpu": cpu, "parts": parts, "opened": memory.first, "peak": memory.peak}


def read_samples(path: str):
    """The calibration tokens of tenp-dist as a `datasets.Dataset`."""
    import pyarrow as pa
    from datasets import Dataset

    with pa.OSFile(path) as stream:
        table = pa.ipc.open_file(stream).read_all()
    return Dataset.from_dict(table.select(["input_ids", "attention_mask"]).to_pydict())


def drop_aliases() -> None:
    """Forget transformers' aliases of old module names.

    `load_context` makes transformers look into every loaded module of its own; looking into an alias imports image
    processors, which fails without a torchvision that fits a CPU build of torch.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and getattr(module, "__file__", "") is None:
            del sys.modules[name]


if __name__ == "__main__":
    main()
