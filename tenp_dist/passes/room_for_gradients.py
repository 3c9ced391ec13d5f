"""Whether a pass that goes back has room: refused with its numbers before any work.

On disk the boundaries, and the gradients on their way; in memory two layers, the graph of a microbatch and the logits
of a chunk. What a graph takes is an estimate from sizes in the config, on the high side: per token _OF_TOKEN tensors of
the model's width, per routed slot three of it and six of an expert's width.
"""

from __future__ import annotations

import shutil

from tenp_dist.calibration.corpus import read_corpus
from tenp_dist.checkpoint.families.table import family_and_config
from tenp_dist.checkpoint.index import open_index
from tenp_dist.errors import ClusterError, DiskFullError
from tenp_dist.passes.loss import CHUNK_ELEMENTS
from tenp_dist.passes.pass_task import PassTask
from tenp_dist.passes.placement import memory_per_rank
from tenp_dist.passes.run_pass import PassContext

_OF_TOKEN = 24  # attention with its projections, norms, shared experts


def check_room(context: PassContext, task: PassTask, copied: float = 0.0) -> None:
    """Refuse what cannot fit. copied: see `GradientTask`.

    Raises:
        DiskFullError: the boundaries do not.
        ClusterError: a layer and the graph of a microbatch do not.
    """
    _check_disk(task, len(context.nbytes))
    needed = memory_needed(context, task, copied)
    found = memory_per_rank(context.pool, context.cluster, task.compute.device)
    if 0 < found < needed:
        raise ClusterError(
            "A layer and the graph of a microbatch do not fit the memory of a rank",
            where="gradients",
            found=f"{found / 1e9:,.2f} GB a rank",
            wanted=f"{needed / 1e9:,.2f} GB",
            next_step="lower score.batch_tokens, or raise cluster.tensor_parallel",
        )


def memory_needed(context: PassContext, task: PassTask, copied: float = 0.0) -> int:
    """Bytes that a rank needs, about: two layers, a microbatch with its graph, a chunk of logits with theirs.

    copied: what is made of a layer beside, as a share of it.
    """
    family, config = family_and_config(open_index(task.model).config)
    width, itemsize = family.hidden_size(config), task.compute.torch_dtype.itemsize
    length = read_corpus(task.corpus).tokens_NS.shape[1]
    tokens = max(1, task.compute.batch_tokens // length) * length
    slot = family.top_k(config) * (3 * width + 6 * family.expert_width(config))
    graph = tokens * (_OF_TOKEN * width + slot) * itemsize
    layers = int((2 + copied) * max(context.nbytes)) // task.ranks
    return layers + max(graph, 5 * 4 * min(CHUNK_ELEMENTS, tokens * family.vocab_size(config)))


def _check_disk(task: PassTask, layers: int) -> None:
    family, config = family_and_config(open_index(task.model).config)
    state = read_corpus(task.corpus).tokens_NS.size * family.hidden_size(config) * task.compute.torch_dtype.itemsize
    needed = (layers + 2) * state
    files = task.hidden_state_files
    files.folder.mkdir(parents=True, exist_ok=True)
    needed -= sum(path.stat().st_size for path in files.folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(files.folder).free
    if free < needed:
        raise DiskFullError(
            "The hidden states between layers, which gradients need, do not fit the disk",
            where=files.folder,
            found=f"{free / 1e9:,.2f} GB free",
            wanted=f"{needed / 1e9:,.2f} GB: {layers + 2} times {state / 1e9:,.2f} GB",
            next_step="calibrate on fewer tokens, or use another --run-dir",
        )
