"""One rank of a layer shard: scores models layer by layer and stores what it saw.

`start` runs `python -m helpers.parallel_worker JOB.json RANK` once per rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from helpers.commands import free_port
from helpers.paths import ROOT
from tenp_dist.model.experts import IMPLEMENTATION, ExpertsState, register
from tenp_dist.model.layers import Frame, Microbatch
from tenp_dist.model.skeleton import Skeleton
from tenp_dist.passes.ranks import check_parallel, join_ranks, listen, parallelise_layer
from tenp_dist.scoring.accumulate import LayerAccumulator, column_norms, weight_norms
from tenp_dist.scoring.statistics import LayerStatistics, write_statistics

DOMAINS = ("first", "second")


def start(out: Path, size: int, models: dict[str, Path], dtype="float32", padded=True) -> list[subprocess.Popen]:
    """Start the ranks of a shard on a free port; they score `models` into `out`."""
    models = {name: str(folder) for name, folder in models.items()}
    job = {"size": size, "port": free_port(), "dtype": dtype, "models": models, "padded": padded, "out": str(out)}
    (out / "job.json").write_text(json.dumps(job))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "helpers.parallel_worker", str(out / "job.json"), str(rank)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(size)
    ]  # fmt: skip


def results(out: Path) -> list[dict]:
    """What the ranks counted, in their order."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]


def batches(padded: bool) -> list[Microbatch]:
    """Two domains of random tokens, two microbatches each; with `padded`, one row of each is cut short."""
    generator = np.random.default_rng(0)
    made = []
    for domain in (0, 0, 1, 1):
        tokens_BS = torch.from_numpy(generator.integers(2, 256, (2, 24)))
        mask_BS = torch.ones(2, 24, dtype=torch.bool)
        mask_BS[0, 8:] = False
        made.append(Microbatch(tokens_BS, domain, mask_BS if padded else None))
    return made


def embed(frame: Frame, inputs: list[Microbatch]) -> list[torch.Tensor]:
    frame.skeleton.load_module("model.embed_tokens")
    return [frame.embed(batch) for batch in inputs]


def run_layer(frame, layer, module, inputs, hidden, ranks) -> LayerStatistics | None:
    """Advance all microbatches through a layer; the statistics of this rank's experts, None if it is dense."""
    experts, accumulator = frame.skeleton.experts_of(module), None
    if experts is not None:
        sizes = experts.down_proj.shape[0], experts.down_proj.shape[2]
        statistics = LayerStatistics.zeros(DOMAINS, *sizes, layer_experts=experts.num_experts)
        accumulator = LayerAccumulator(statistics, column_norms(experts))
        module.get_submodule(frame.skeleton.family.block_norm).register_forward_pre_hook(accumulator.see_residual)
    for i, batch in enumerate(inputs):
        if experts is not None:
            accumulator.domain = batch.domain
            share = ranks.share(experts.num_experts)
            experts.tenp_state = ExpertsState(valid_T=batch.valid_T, observer=accumulator, **share)
        hidden[i] = frame.run_layer(layer, module, batch, hidden[i])
    if experts is None:
        return None
    return LayerStatistics(DOMAINS, statistics.tensors, weight_norms(experts, column_norms(experts)))


@torch.inference_mode()
def score_model(folder: Path, out: Path, ranks, dtype: torch.dtype, padded: bool) -> dict:
    """Score one model on this rank: hidden states and statistics as files, counts as the result."""
    register()
    skeleton = Skeleton(folder, dtype=dtype, device=torch.device("cpu"), experts_implementation=IMPLEMENTATION)
    check_parallel(skeleton.family, skeleton.config_dict, ranks.size)
    num_experts = skeleton.family.num_experts(skeleton.config_dict)
    read: list[str] = []
    into = skeleton.reader.into
    skeleton.reader.into = lambda name, target: read.append(name) or into(name, target)
    frame, inputs = Frame(skeleton), batches(padded)
    hidden, seconds, kept, dense = embed(frame, inputs), [], set(), []
    out.mkdir(parents=True)
    for layer in range(skeleton.num_layers):
        module = skeleton.load_layer(layer, skeleton.read_layer(layer, ranks.share(num_experts).get("experts")))
        started = time.monotonic()
        parallelise_layer(skeleton, module, ranks)
        seconds.append(time.monotonic() - started)
        kept |= {n.rpartition(".")[2] for n, t in module.state_dict().items() if t.dtype != dtype}
        dense.append(sum(t.numel() for n, t in module.state_dict().items() if "mlp.experts" not in n))
        statistics = run_layer(frame, layer, module, inputs, hidden, ranks)
        save_file({str(i): h.clone() for i, h in enumerate(hidden)}, out / f"hidden_{layer}.safetensors")
        if statistics is not None:
            write_statistics(out / f"layer_{layer}.safetensors", statistics, layer=layer, key="")
        skeleton.unload_layer(layer)
    return {"read": read, "seconds": seconds, "kept": sorted(kept), "dense": dense}


def main() -> None:
    job, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    torch.set_num_threads(1)
    meeting = ("127.0.0.1", job["port"])
    own = listen(*meeting) if rank == 0 and job["size"] > 1 else None
    ranks = join_ranks(rank, job["size"], *meeting, "cpu", own=own, timeout=120)
    result = {}
    for name, folder in job["models"].items():
        out = Path(job["out"]) / f"rank{rank}" / name
        result[name] = score_model(Path(folder), out, ranks, getattr(torch, job["dtype"]), job["padded"])
    result["deepspeed"] = "deepspeed" in sys.modules
    result["group"] = torch.distributed.is_initialized()
    if result["group"]:
        torch.distributed.destroy_process_group()
    (Path(job["out"]) / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
