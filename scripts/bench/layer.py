"""One MoE layer of DeepSeek-V3's shape with random weights: a plain forward of it, and scoring it.

Nothing is read: the checkpoint is headers over empty files, and the weights are drawn on the device. `plain` is the
layer in transformers' own grouped_mm; scoring is the same layer with all statistics. The share of the peak counts the
layer's matrix products (2 floating-point operations per weight that a token meets, and attention's) and needs
--peak-tflops, the dense bfloat16 peak of the device (989 for an H100 SXM). Smaller shapes run on a CPU.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parent))
from machine import PeakMemory, print_machine
from synthetic import BUNDLED, Shape

from tenp_dist.artifacts import write_json
from tenp_dist.checkpoint.index import INDEX_NAME
from tenp_dist.checkpoint.writer import assign_shards, shard_bytes, shard_header
from tenp_dist.model.layers import Frame, Microbatch
from tenp_dist.model.skeleton import Skeleton
from tenp_dist.passes.compute import Compute, open_skeleton
from tenp_dist.passes.layer_ops import run_layer
from tenp_dist.scoring.accumulate import column_norms, weight_norms
from tenp_dist.scoring.score_pass import Norms, check_statistics, score_layer
from tenp_dist.scoring.statistics import LayerStatistics

MOE_LAYER = 1  # layer 0 is dense


@click.command(help=__doc__)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda")
@click.option("--hidden", default=7168, show_default=True)
@click.option("--experts", default=256, show_default=True)
@click.option("--neurons", default=2048, show_default=True)
@click.option("--top-k", default=8, show_default=True)
@click.option("--heads", default=128, show_default=True)
@click.option("--head-dim", default=128, show_default=True)
@click.option("--batch-tokens", default=16384, show_default=True)
@click.option("--length", default=2048, show_default=True, help="tokens per sequence")
@click.option("--repeat", default=5, show_default=True, help="rounds; the table has medians")
@click.option("--peak-tflops", type=float, help="dense bfloat16 peak of the device")
@click.option("--threads", default=2, show_default=True, help="on CPU")
def main(device, batch_tokens, length, repeat, peak_tflops, threads, **sizes):
    shape = Shape(layers=1, rope_dim=64, kv_rank=512, **sizes)
    compute = Compute(device, "bfloat16", batch_tokens, threads).on_this_machine()
    print_machine("torch", "transformers")
    if compute.device == "cuda":
        click.echo(f"device    {torch.cuda.get_device_name()}")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        write_headers(Path(folder), shape)
        skeleton = open_skeleton(Path(folder), compute)
        state = draw_state(skeleton, compute)
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        module = skeleton.load_layer(MOE_LAYER, state)
        del state
        rows = max(1, batch_tokens // length)
        batch = Microbatch(torch.zeros(rows, length, dtype=torch.int64, device=compute.device), 0)
        hidden_BSD = torch.randn(rows, length, shape.hidden, device=compute.device).bfloat16()
        click.echo(f"layer     {shape}, {nbytes / 1e9:,.1f} GB; {rows} x {length} tokens")
        measure(skeleton, module, batch, hidden_BSD, repeat, flops(shape, rows, length), peak_tflops)


def write_headers(folder: Path, shape: Shape) -> None:
    """A checkpoint of the right names and sizes whose data are holes."""
    shards = assign_shards(list(shape.tensors()), 1 << 40)
    for shard in shards:
        with open(folder / shard.file, "wb") as stream:
            stream.write(shard_header(shard))
            stream.truncate(shard_bytes(shard))
    total = sum(shard.nbytes for shard in shards)
    files = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": files})
    write_json(folder / "config.json", shape.config())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((BUNDLED / name).read_bytes())


def draw_state(skeleton: Skeleton, compute: Compute) -> dict[str, torch.Tensor]:
    """Random weights of the MoE layer on the device: variance 1 / fan-in, norms of one, no bias."""
    generator = torch.Generator(compute.device).manual_seed(0)
    state = {}
    for key, parameter in skeleton.layers[MOE_LAYER].state_dict().items():
        dtype = torch.float32 if "bias" in key else compute.torch_dtype
        tensor = torch.zeros(parameter.shape, dtype=dtype, device=compute.device)
        if key.endswith("norm.weight"):
            tensor.fill_(1)
        elif "bias" not in key:
            tensor.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        state[key] = tensor
    return state


def flops(shape: Shape, rows: int, length: int) -> float:
    """Floating-point operations of the layer's matrix products, the causal half of attention counted whole."""
    expert, width = 3 * shape.hidden * shape.neurons, shape.heads * (shape.head_dim + shape.rope_dim)
    projections = shape.hidden * (width + shape.kv_rank + shape.rope_dim + shape.heads * shape.head_dim)
    projections += shape.kv_rank * shape.heads * 2 * shape.head_dim
    scores = length * (width + shape.heads * shape.head_dim)
    router = shape.hidden * shape.experts
    return 2.0 * rows * length * ((shape.top_k + 1) * expert + projections + scores + router)


def measure(skeleton: Skeleton, module, batch: Microbatch, hidden_BSD, repeat: int, work: float, peak) -> None:
    frame, experts = Frame(skeleton), skeleton.experts_of(module)
    columns = column_norms(experts)
    num_experts, _, width = experts.down_proj.shape
    sums = LayerStatistics.zeros(("text",), num_experts, width).to(hidden_BSD.device)
    norms = Norms(columns, weight_norms(experts, columns).cpu())

    def plain() -> None:
        skeleton.model.config._experts_implementation = "grouped_mm"
        run_layer(frame, MOE_LAYER, module, [batch], [hidden_BSD], {})

    def scoring() -> None:
        skeleton.model.config._experts_implementation = "tenp"
        score_layer(frame, MOE_LAYER, module, [batch], [hidden_BSD], {}, norms, sums)

    plain(), scoring()
    rounds = [(timed(plain), timed(scoring)) for _ in range(repeat)]
    check_statistics(replace(sums.to("cpu"), weight_norm=norms.weights_EF), MOE_LAYER)
    tokens = batch.tokens_BS.numel()
    click.echo("run       seconds    tokens/s   TFLOP/s   of peak   peak memory GB")
    for name, run, column in zip(("plain", "scoring"), (plain, scoring), zip(*rounds, strict=True), strict=True):
        seconds = statistics.median(column)
        share = f"{work / seconds / 1e12 / peak:>8.1%}" if peak else "       -"
        rate = work / seconds / 1e12
        click.echo(
            f"{name:<8} {seconds:>8.4f} {tokens / seconds:>11,.0f} {rate:>9.2f}  {share} {peak_memory(run):>16.2f}"
        )
    ratio = statistics.median(score / plain_s for plain_s, score in rounds)
    click.echo(f"scoring over plain: {ratio:.2f} (goal on an accelerator: at most 1.35)")


def timed(function) -> float:
    synchronise()
    started = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - started


def peak_memory(function) -> float:
    """GB allocated on the accelerator, or anonymous memory of the process, at the peak of one call."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        function()
        synchronise()
        return torch.cuda.max_memory_allocated() / 1e9
    with PeakMemory() as memory:
        function()
    return memory.peak / 1e9


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
