"""A bucket: the experts of one layer and rank that have (nearly) one width.

It is an ordinary `RoutedExperts` of vLLM with a map of expert ids, as if it were a rank of expert parallelism: weights,
quantisation and kernels are vLLM's own.
"""

import dataclasses
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from tenp_dist_vllm.forms import Form
from tenp_dist_vllm.matrices import fill_up, matrix_shape, refine
from tenp_dist_vllm.settings import kernel_of_buckets


class BucketMap(ExpertMapManager):
    """Global expert id -> place in the bucket, -1 for the experts of other buckets and ranks."""

    def __init__(self, ids: list[int], moe_config: FusedMoEConfig):
        self.moe_parallel_config = moe_config.moe_parallel_config
        self.global_num_experts = moe_config.num_experts
        self.num_fused_shared_experts = 0
        self._places = {expert: place for place, expert in enumerate(ids)}
        self._local_num_experts = len(ids)
        self._placement_strategy = "linear"
        self._routing_tables = self._expert_mask = None
        every = [self._places.get(expert, -1) for expert in range(moe_config.num_experts)]
        self._expert_map = torch.tensor(every, dtype=torch.int32)

    def map_global_to_local(self, global_id: int) -> int:
        return self._places.get(global_id, -1)

    def update(self, *arguments: Any, **keywords: Any) -> None:
        raise NotImplementedError("ragged experts cannot move to other ranks while they serve")


class RoutedExpertsBucket(RoutedExperts):
    """Experts `ids`, each filled up with zeros to `width` neurons.

    compressed-tensors tells by the name of the class, which has to contain RoutedExperts, what is quantised.

    Args:
        layer: the `RaggedExperts` that it belongs to.
        quant_config: vLLM's quantisation of the model, or None.
        ids: global ids, ascending.
        width: neurons of the bucket, over all tensor-parallel ranks.
    """

    def __init__(self, layer: RoutedExperts, quant_config: Any, ids: list[int], width: int):
        super().__init__(
            layer.layer_name,
            layer.params_dtype,
            bucket_config(layer.moe_config, len(ids), width, layer.form),
            quant_config,
            expert_map_manager=BucketMap(ids, layer.moe_config),
            swiglu_limit=layer.swiglu_limit,
            swiglu_alpha=layer.swiglu_alpha,
            swiglu_beta=layer.swiglu_beta,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
        )
        self.ids, self.width, self.form = ids, width, layer.form
        if self.quant_method.is_monolithic or self.hidden_size != layer.hidden_size:
            raise NotImplementedError(
                f"{layer.layer_name}: vLLM chose {self.quant_method.method_name} in a form that routes by itself or "
                "pads the hidden size, which ragged experts cannot use; start with --moe-backend triton"
            )
        # the loader would refine the scales of a whole matrix; here they are refined before they are filled up
        self._refine = getattr(self.quant_method, "weight_scale_refine", None)
        if self._refine is not None:
            self.quant_method.weight_scale_refine = None

    def load(self, matrix: torch.Tensor, name: str, weight_name: str, shard: str, expert: int) -> bool:
        """Put one expert's matrix, or its scales, of true width into parameter `name`, this rank's share of it."""
        part = self.form.parts[name.partition("_")[2]]
        block = part.block
        if self._refine is not None and name.endswith("_scale_inv"):
            matrix, block = refine(matrix, self._refine), self.quant_method.moe_block_shape
        whole = fill_up(matrix, matrix_shape(shard, self.width, self.hidden_size, block), part.fill)
        return self.weight_loader(getattr(self, name), whole, weight_name, shard, expert, return_success=True)


def bucket_config(moe_config: FusedMoEConfig, experts: int, width: int, form: Form) -> FusedMoEConfig:
    """The layer's config for `experts` of `width` neurons. vLLM derives a rank's share of them again."""
    known = {field.name for field in dataclasses.fields(moe_config)}
    decomposed = {"require_decomposed_backend": True} if "require_decomposed_backend" in known else {}  # since 0.33
    return dataclasses.replace(
        moe_config,
        num_local_experts=experts,
        intermediate_size=width,
        intermediate_size_per_partition_unpadded=None,
        hidden_dim_unpadded=None,
        moe_backend=kernel_of_buckets(moe_config.moe_backend, form),
        **decomposed,
    )
