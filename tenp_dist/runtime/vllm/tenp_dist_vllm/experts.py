"""Experts of different widths in the place of vLLM's `RoutedExperts`.

vLLM keeps its router, its shared experts and its reductions over ranks. It routes once; the outputs of the buckets are
added. Parameters of no elements carry the names that vLLM's loaders look for: what is loaded into them goes to the
bucket of its expert.
"""

import functools
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from tenp_dist_vllm import rows_op  # noqa: F401  registers the op
from tenp_dist_vllm.buckets import RoutedExpertsBucket
from tenp_dist_vllm.forms import SIZES, form_of
from tenp_dist_vllm.matrices import NEURON_AXIS, checkpoint_names, matrix_shape
from tenp_dist_vllm.ragged_config import widths_by_layer
from tenp_dist_vllm.rows import Slots
from tenp_dist_vllm.settings import refuse_layer
from tenp_dist_vllm.sizes import group_by_width, width_step


class RaggedRoutedExperts(RoutedExperts):
    """The routed experts of one layer: ragged if config.json lists it, else as vLLM makes them.

    Attributes of a ragged layer:
        widths: neurons of every expert; None in a layer that is as vLLM makes it.
        listed: whether config.json lists the layer.
        form: how its experts are stored.
        buckets: `RoutedExpertsBucket`s of this rank's experts, ascending in width.
        missing: (expert, w1 | w2 | w3, parameter) that have not been loaded yet.
    """

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: FusedMoEConfig) -> FusedMoEMethodBase:
        vllm_config = get_current_vllm_config()
        self.layer = extract_layer_index(self.layer_name)
        config = vllm_config.model_config.hf_text_config
        self.widths = widths_by_layer({"tenp": config.tenp}).get(self.layer)
        self.listed = self.widths is not None
        if not self.listed and current_platform.is_cpu() and moe_config.use_ep:
            # vLLM's CPU kernel ignores the map of experts and crashes with those of other ranks; buckets do not
            self.widths = [moe_config.intermediate_size] * moe_config.num_experts
        if self.widths is None:
            return super()._get_quant_method(prefix, quant_config, moe_config)
        refuse_layer(moe_config, len(self.widths), self.expert_map_manager.num_fused_shared_experts, self.layer_name)
        self.random_weights = vllm_config.load_config.load_format == "dummy"
        self.form = form_of(quant_config, self)
        self._make_buckets(quant_config, moe_config)
        self.missing = {
            (expert, shard, name)
            for expert in self.bucket_of
            for shard in NEURON_AXIS
            for name in self.form.names
            if name.startswith("w2") == (shard == "w2") and not name.endswith(SIZES)
        }
        return RaggedMethod(moe_config, self.form.names)

    def _make_buckets(self, quant_config: Any, moe_config: FusedMoEConfig) -> None:
        local = {e: width for e, width in enumerate(self.widths) if self.expert_map_manager.is_local_expert(e)}
        step = width_step(moe_config.tp_size, self.form, cpu=current_platform.is_cpu())
        groups = group_by_width(local, step)
        self.buckets = nn.ModuleList(
            RoutedExpertsBucket(self, quant_config, ids, width) for width, ids in groups.items()
        )
        self.slots = Slots(list(groups.values()), moe_config.num_experts)
        self.bucket_of = {expert: bucket for bucket in self.buckets for expert in bucket.ids}

    def weight_loader(
        self,
        param: nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Check one matrix of one expert against config.json and hand it to its bucket.

        Raises:
            ValueError: its shape is another than config.json says.
            NotImplementedError: weights are replaced in a model that serves.
        """
        if self.widths is None:
            return super().weight_loader(param, loaded_weight, weight_name, shard_id, expert_id, return_success)
        name = weight_name.rpartition(".")[2]
        suffix = name.partition("_")[2]
        sizes = suffix == SIZES
        block = (1, 1) if sizes else self.form.parts[suffix].block
        wanted = matrix_shape(shard_id, self.widths[expert_id], self.hidden_size, block)
        found = loaded_weight.tolist() if sizes else list(loaded_weight.shape)
        if found != wanted:
            raise ValueError(
                f"{self._matrix(expert_id, shard_id)} has {name} of shape {found}, config.json "
                f"wants {wanted}; write or download the checkpoint again"
            )
        bucket = self.bucket_of.get(expert_id)
        if bucket is None or sizes:  # of another rank, which loaders want to know; or nothing to load
            loaded = bool(self.expert_map_manager.is_local_expert(expert_id))
        else:
            loaded = self._load(bucket, loaded_weight, name, weight_name, shard_id, expert_id)
        return loaded if return_success else None

    weight_loader.supports_moe_loading = True

    def _load(
        self, bucket: RoutedExpertsBucket, matrix: torch.Tensor, name: str, weight_name: str, shard: str, expert: int
    ) -> bool:
        if (expert, shard, name) not in self.missing:
            raise NotImplementedError(
                f"{self._matrix(expert, shard)} arrives a second time; the weights of a ragged "
                "model cannot be replaced while it serves: start the engine again"
            )
        self.missing.remove((expert, shard, name))
        return bucket.load(matrix, name, weight_name, shard, expert)

    def _matrix(self, expert: int, shard: str) -> str:
        return f"{self.layer_name}.{expert}.{checkpoint_names(self)[shard]}"

    def check_all_arrived(self) -> None:
        """Raises RuntimeError that names what was not loaded. vLLM itself does not notice missing expert tensors."""
        if self.missing and not self.random_weights:
            expert, shard, name = min(self.missing)
            raise RuntimeError(
                f"{len(self.missing)} matrices of experts are not in the checkpoint, first "
                f"{self._matrix(expert, shard)} ({name}); write or download it again"
            )


class RaggedMethod(FusedMoEMethodBase):
    """What vLLM asks of a layer's method, answered by its buckets.

    Args:
        moe: config of the layer.
        names: parameters that vLLM's loaders look for.
    """

    def __init__(self, moe: FusedMoEConfig, names: list[str]):
        super().__init__(moe)
        self.names = names

    def create_weights(self, layer: RaggedRoutedExperts, *arguments: Any, weight_loader: Any, **keywords: Any) -> None:
        for name in self.names:
            nothing = nn.Parameter(torch.empty(0, dtype=layer.params_dtype), requires_grad=False)
            layer.register_parameter(name, nothing)
            set_weight_attrs(nothing, {"weight_loader": weight_loader})

    def process_weights_after_loading(self, layer: RaggedRoutedExperts) -> None:
        """vLLM goes on to the buckets by itself."""
        layer.check_all_arrived()

    def get_fused_moe_quant_config(self, layer: RaggedRoutedExperts) -> Any:
        return FUSED_MOE_UNQUANTIZED_CONFIG  # nobody computes with it

    def apply(
        self,
        layer: RaggedRoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *shared: Any,
        **more: Any,
    ) -> torch.Tensor:
        if current_platform.is_cpu():
            return torch.ops.vllm.tenp_ragged_experts(x, topk_weights, topk_ids, layer.layer_name)
        outputs = [bucket.forward_modular(x, topk_weights, topk_ids) for bucket in layer.buckets]
        return functools.reduce(torch.add, outputs) if outputs else torch.zeros_like(x)
