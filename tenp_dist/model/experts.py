"""The routed experts' forward, open to an observer and to neuron masks.

Registered in transformers' experts interface under the name `tenp`: routing, dispatch weights and
chosen experts are what the model's own router hands over. The arithmetic is that of transformers'
`grouped_mm` implementation (transformers/integrations/moe.py), so that scoring sees the numbers
of a plain forward.

Where the experts of a layer are split over ranks, each rank holds a contiguous range of them: slots
of the others are cut off like padding, and the local sums are added over the ranks in float32.

Shape letters: T tokens, K experts per token, S = T * K dispatched slots without padding, in
ascending order of expert; D model width, F neurons of an expert, P = 2F, E experts that this rank holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

IMPLEMENTATION = "tenp"
_ROW_BYTES = 16  # what torch asks of the rows of a grouped matrix multiplication
_ROWS = 64


@dataclass
class Dispatch:
    """What one experts call computed, for an observer.

    input_TD: what the block received.
    x_SD: the same per slot.
    m_SF: gated activations.
    y_SD: outputs of the experts, before their dispatch weights.
    g_S: dispatch weights.
    token_S: the token of every slot.
    expert_S: the expert of every slot, as this rank numbers its experts.
    offsets_E: ends of the experts' runs of slots, int32.
    routed_TD: the block's output.
    down_EDF: the experts' W_down.
    experts: global ids of the experts that this rank holds, None for all.
    bias_ED: the bias of every expert's output, None where there are none.
    reduce: as `ExpertsState.reduce`; an observer that asks must do so in every call, as all ranks have to.
    """

    input_TD: torch.Tensor
    x_SD: torch.Tensor
    m_SF: torch.Tensor
    y_SD: torch.Tensor
    g_S: torch.Tensor
    token_S: torch.Tensor
    expert_S: torch.Tensor
    offsets_E: torch.Tensor
    routed_TD: torch.Tensor
    down_EDF: torch.Tensor
    experts: range | None = None
    bias_ED: torch.Tensor | None = None
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def of_neurons_SD(self) -> torch.Tensor:
        """What the neurons give, W_down m: the outputs without their biases."""
        return self.y_SD if self.bias_ED is None else self.y_SD - self.bias_ED[self.expert_S]


class Observer(Protocol):
    """Sees what the experts of a layer compute, and sums what it needs of it.

    domain: of the microbatch that runs next; set before each of them.
    """

    domain: int

    def __call__(self, dispatch: Dispatch) -> None:
        """Take in one experts call; there is one per microbatch and layer."""


@dataclass
class ExpertsState:
    """Module state of one experts call: set before a layer runs, cleared after it.

    valid_T: positions that are not padding, None for all; padding reaches no expert.
    mask_EF: neurons that count, None for all; rows are the experts that this rank holds.
    observer: called once per experts call, with local expert ids and the whole `routed_TD`.
    experts: global ids of the experts that this rank holds, None for all.
    reduce: adds float32 [T, X] over the ranks that share the layer; all ask equally often in an experts call.
    """

    valid_T: torch.Tensor | None = None
    mask_EF: torch.Tensor | None = None
    observer: Observer | None = field(default=None, repr=False)
    experts: range | None = None
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = field(default=None, repr=False)


class FusedExperts(nn.Module):
    """The routed experts of a layer as transformers holds them; a name for what is used of such a module, never made.

    num_experts: of the whole layer, whatever this rank holds.
    gate_up_proj: [E, P, D], gate first; P = F where there is no gate (`forms.py`).
    down_proj: [E, D, F].
    gate_up_proj_bias, down_proj_bias: [E, P] and [E, D], where there are biases.
    has_bias: whether there are.
    tenp_state: of the call at work.
    """

    num_experts: int
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_up_proj_bias: torch.Tensor
    down_proj_bias: torch.Tensor
    has_bias: bool
    tenp_state: ExpertsState | None
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]


def experts_forward(
    self: FusedExperts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts forward for `ALL_EXPERTS_FUNCTIONS`: hidden_states [T, D] -> routed output [T, D]."""
    state: ExpertsState = getattr(self, "tenp_state", None) or ExpertsState()
    held = range(self.num_experts) if state.experts is None else state.experts
    if len(held) != self.gate_up_proj.shape[0]:
        raise ValueError(f"The layer holds {self.gate_up_proj.shape[0]} experts, its state says {held}")
    slot_S, expert_S, offsets_E = _dispatch(top_k_index, held, state)
    token_S = slot_S // top_k_index.shape[-1]
    x_SD = _TokenRows.apply(hidden_states, slot_S, token_S, top_k_index.shape)
    up_SP = grouped(x_SD, self.gate_up_proj.transpose(1, 2), offsets_E)
    m_SF = self._apply_gate(up_SP + self.gate_up_proj_bias[expert_S] if self.has_bias else up_SP)
    if state.mask_EF is not None:
        m_SF = m_SF * state.mask_EF[expert_S]
    y_SD = grouped(m_SF, self.down_proj.transpose(1, 2), offsets_E)
    if self.has_bias:
        y_SD = y_SD + self.down_proj_bias[expert_S]
    g_S = top_k_weights.reshape(-1)[slot_S]
    weighted_SD = y_SD * g_S.unsqueeze(-1)
    if state.experts is not None:
        weighted_SD = weighted_SD.float()
    routed_TD = _Combined.apply(weighted_SD, slot_S, token_S, top_k_index.shape)
    if state.reduce is not None:
        routed_TD = state.reduce(routed_TD)
    routed_TD = routed_TD.to(hidden_states.dtype)
    if state.observer is not None:
        seen = (hidden_states, x_SD, m_SF, y_SD, g_S, token_S, expert_S, offsets_E, routed_TD, self.down_proj)
        bias_ED = self.down_proj_bias if self.has_bias else None
        state.observer(Dispatch(*seen, experts=state.experts, bias_ED=bias_ED, reduce=state.reduce))
    return routed_TD


def incoming(experts: FusedExperts) -> tuple[torch.Tensor, ...]:
    """The rows of every neuron, [E, F, D] each: of gate and up, or of up alone where there is no gate."""
    return experts.gate_up_proj.split(experts.down_proj.shape[2], dim=1)


def activations(experts: FusedExperts, place: int, x_TD: torch.Tensor) -> torch.Tensor:
    """Gated activations [T, F] of one expert in float32. place: of the expert among those that this rank holds."""
    up_TP = x_TD.float() @ experts.gate_up_proj[place].float().T
    return experts._apply_gate(up_TP + experts.gate_up_proj_bias[place].float() if experts.has_bias else up_TP)


def register() -> None:
    """Make `experts_implementation="tenp"` known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def _dispatch(
    top_k_index: torch.Tensor, held: range, state: ExpertsState
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots in order of expert (stable: by token inside an expert), their local experts, run ends [E] int32."""
    expert_of_slot = top_k_index.reshape(-1)
    unused = None
    if state.valid_T is not None:
        unused = ~state.valid_T.repeat_interleave(top_k_index.shape[-1])
    if state.experts is not None:
        others = (expert_of_slot < held.start) | (expert_of_slot >= held.stop)
        unused = others if unused is None else unused | others
        expert_of_slot = expert_of_slot - held.start
    if unused is not None:  # padding and other ranks' slots sort behind the last expert and are cut off
        expert_of_slot = expert_of_slot.masked_fill(unused, len(held))
    expert_S, slot_S = torch.sort(expert_of_slot, stable=True)
    counts = torch.bincount(expert_S, minlength=len(held) + 1)[: len(held)]
    offsets_E = torch.cumsum(counts, 0).to(torch.int32)
    if unused is not None:
        used = int(offsets_E[-1])
        expert_S, slot_S = expert_S[:used], slot_S[:used]
    return slot_S, expert_S, offsets_E


def grouped(input_SI: torch.Tensor, weight_EIO: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """Row s times the weight of its expert: [S, I] x [E, I, O] -> [S, O]."""
    from transformers.integrations.moe import _grouped_mm

    more_inner, more_outer = (-size % (_ROW_BYTES // weight_EIO.element_size()) for size in weight_EIO.shape[1:])
    if more_inner or more_outer:  # zeros, which add nothing
        padded_EIO = F.pad(weight_EIO, (0, more_outer, 0, more_inner))
        return grouped(F.pad(input_SI, (0, more_inner)), padded_EIO, offsets_E)[:, : weight_EIO.shape[2]]
    if input_SI.device.type != "cpu" or input_SI.dtype != torch.bfloat16:
        return _grouped_mm(input_SI, weight_EIO, offsets_E)
    row_S, ends_E = _padded_runs(offsets_E, input_SI.shape[0])
    padded_RI = input_SI.new_zeros(int(ends_E[-1]), input_SI.shape[1])
    padded_RI[row_S] = input_SI
    return _grouped_mm(padded_RI, weight_EIO, ends_E)[row_S]


def _padded_runs(offsets_E: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where slots go, and where runs end, when every expert's run has a multiple of _ROWS rows.

    On CPU oneDNN builds and keeps a kernel for every number of rows that it meets in bfloat16: with runs of all
    lengths that took a third of the time and most of the memory (`scripts/bench/scoring.py`).
    """
    counts_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1))
    room_E = (counts_E + _ROWS - 1) // _ROWS * _ROWS
    ends_E = torch.cumsum(room_E, 0)
    shift_E = (ends_E - room_E) - (offsets_E - counts_E)
    shift_S = torch.repeat_interleave(shift_E, counts_E.long(), output_size=slots)
    return torch.arange(slots) + shift_S, ends_E.to(torch.int32)


class _TokenRows(torch.autograd.Function):
    """The row of every slot's token. Going back, what its slots say is added in their order: torch would add in any."""

    @staticmethod
    def forward(
        ctx: Any, input_TD: torch.Tensor, slot_S: torch.Tensor, token_S: torch.Tensor, shape_TK: torch.Size
    ) -> torch.Tensor:
        ctx.save_for_backward(slot_S)
        ctx.shape_TK = shape_TK
        return input_TD[token_S]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slot_S,), (grad_SD,) = ctx.saved_tensors, grads
        return _combine(grad_SD, slot_S, ctx.shape_TK), None, None, None


class _Combined(torch.autograd.Function):
    """`_combine`, and the way back: every slot gets what its token got."""

    @staticmethod
    def forward(
        ctx: Any, weighted_SD: torch.Tensor, slot_S: torch.Tensor, token_S: torch.Tensor, shape_TK: torch.Size
    ) -> torch.Tensor:
        ctx.save_for_backward(token_S)
        return _combine(weighted_SD, slot_S, shape_TK)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (token_S,), (grad_TD,) = ctx.saved_tensors, grads
        return grad_TD[token_S], None, None, None


def _combine(weighted_SD: torch.Tensor, slot_S: torch.Tensor, shape_TK: torch.Size) -> torch.Tensor:
    """Add the K weighted outputs of every token, in the order of its slots; no atomics."""
    tokens, top_k = shape_TK
    if slot_S.numel() == tokens * top_k:
        inverse = torch.empty_like(slot_S)
        inverse[slot_S] = torch.arange(slot_S.numel(), device=slot_S.device)
        by_slot = weighted_SD[inverse]
    else:
        by_slot = weighted_SD.new_zeros(tokens * top_k, weighted_SD.shape[-1])
        by_slot[slot_S] = weighted_SD
    return by_slot.view(tokens, top_k, -1).sum(dim=1)
