"""One microbatch through a layer's MoE block: what it received and gave, as it is and with other routers.

Shape letters: T tokens of the microbatch, padding included, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.compensation.joint_features import SharedExpert
from tenp_dist.errors import UnsupportedModelError
from tenp_dist.model.experts import Dispatch, ExpertsState, Observer
from tenp_dist.model.layers import Microbatch
from tenp_dist.model.merged_experts import MergedExperts, planned_router, replaced_experts
from tenp_dist.passes.layer_ops import run_layer
from tenp_dist.passes.layer_step import OpenShard

APART = 1e-2  # norm of what routed and shared experts do not explain, over that of the block's output


class Nobody:
    """An `Observer` that wants nothing."""

    domain = 0

    def __call__(self, dispatch: Dispatch) -> None:
        return


class _Tee:
    """An `Observer` that keeps what it sees and passes it on."""

    def __init__(self, other: Observer | None = None):
        self._other, self.domain = other, 0
        self.seen: Dispatch | None = None

    def __call__(self, dispatch: Dispatch) -> None:
        self.seen = dispatch
        if self._other is not None:
            self._other.domain = self.domain
            self._other(dispatch)

    def dispatch(self) -> Dispatch:
        if self.seen is None:
            raise RuntimeError("the block's forward calls no experts")
        return self.seen


class BlockRun:
    """A layer's block over one microbatch.

    x_TD: what the block received.
    y_TD: what it gave.
    target_TD: what it should give, unless said otherwise what it gave; all three are there once the layer has run.
    """

    x_TD: torch.Tensor
    y_TD: torch.Tensor
    target_TD: torch.Tensor

    def __init__(self, shard: OpenShard, layer: int, module: nn.Module, batch: Microbatch):
        self._shard, self._layer, self._module, self._batch = shard, layer, module, batch
        self._block = module.get_submodule(shard.skeleton.family.block)

    def whole_layer(self, states: torch.Tensor, observer: Observer, *, silent: bool = False) -> Dispatch:
        """Run the layer, which overwrites `states`; what its experts computed.

        silent: what the block gives is left out of what leaves the layer.
        """
        tee, shard = _Tee(observer), self._shard
        handle = self._block.register_forward_hook(self._keep_back if silent else self._keep)
        try:
            run_layer(shard.frame, self._layer, self._module, [self._batch], [states], shard.share, tee)
        finally:
            handle.remove()
        return tee.dispatch()

    def _keep(self, _block: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        given = output[0] if isinstance(output, tuple) else output
        self._input, self.x_TD = inputs[0], inputs[0].reshape(-1, inputs[0].shape[-1])
        self.y_TD = self.target_TD = given.reshape(self.x_TD.shape)

    def _keep_back(self, block: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
        self._keep(block, inputs, output)
        nothing = torch.zeros_like(output[0] if isinstance(output, tuple) else output)
        return (nothing, *output[1:]) if isinstance(output, tuple) else nothing

    def restricted(self, kept: KeptNeurons, merged: MergedExperts | None = None) -> Dispatch:
        """What the experts compute of the same microbatch where a plan removes or merges some. merged: them, if so."""
        tee, skeleton = _Tee(), self._shard.skeleton
        fused = skeleton.experts_of(self._module)
        assert fused is not None, "a layer with a block has experts"
        with (
            planned_router(skeleton, self._layer, self._module, kept),
            replaced_experts(fused, merged),
        ):
            fused.tenp_state = ExpertsState(valid_T=self._batch.valid_T, observer=tee, **self._shard.share)
            self._block(self._input)
        fused.tenp_state = None
        return tee.dispatch()

    @property
    def valid_T(self) -> torch.Tensor:
        """Which tokens are no padding."""
        valid_T = self._batch.valid_T
        return torch.ones(len(self.x_TD), dtype=torch.bool, device=self.x_TD.device) if valid_T is None else valid_T

    def valid(self, part_TX: torch.Tensor) -> torch.Tensor:
        """The rows of tokens that are no padding."""
        return part_TX if self._batch.valid_T is None else part_TX[self._batch.valid_T]

    def check_sum(self, dispatch: Dispatch, shared_TF: torch.Tensor | None, shared: SharedExpert | None) -> None:
        """Refuse a block that adds up its experts in another way than the features say.

        Raises:
            UnsupportedModelError: routed and shared experts do not explain what the block gives; biases.
        """
        if dispatch.bias_ED is not None:
            raise UnsupportedModelError(
                "Experts with biases cannot be solved as one system",
                where=f"{self._shard.skeleton.index.folder}, layer {self._layer}: {type(self._block).__name__}",
                found="a bias of W_down",
                wanted="experts that are matrices alone",
                next_step="set output.compensate to true: experts are then compensated one by one",
            )
        explained_TD = dispatch.routed_TD.float()
        if shared_TF is not None and shared is not None:
            explained_TD = explained_TD + shared_TF @ shared.down_DF.float().T
        given_TD = self.valid(self.y_TD).float()
        apart = float((self.valid(explained_TD) - given_TD).norm() / given_TD.norm().clamp_min(1e-30))
        if apart > APART:
            raise UnsupportedModelError(
                "A MoE block that gives something else than the sum of its routed and shared experts",
                where=f"{self._shard.skeleton.index.folder}, layer {self._layer}: {type(self._block).__name__}",
                found=f"{apart:.1%} of its output is of another origin",
                wanted="at most 1.0%",
                next_step="set output.compensate to true: experts are then compensated one by one",
            )
