"""The experts of a ragged checkpoint: those of one layer, grouped into buckets by width.

Shape legend: T tokens, K experts per token, S = T * K rows, R rows of one bucket, D model width,
E experts of a layer, N experts of a bucket, W width of a bucket.

A bucket holds experts of (nearly) one width and runs one grouped matmul per matrix, whatever the
number of experts. Widths are rounded up to `ALIGNMENT` neurons and filled with zeros, because
`torch.nn.functional.grouped_mm` wants strides that are multiples of 16 bytes. Padding is exact and
stays so in training: gating zeros gives 0, and the gradients of the padding are zero. It is cut off again
when the model is saved. Buckets are stored as `experts.buckets.{i}.gate_up_proj [N, 2 W, D]` and
`.down_proj [N, D, W]`, ascending in width; inside a bucket expert ids ascend. Experts without a gate have `up_proj
[N, W, D]`, those with biases `gate_up_proj_bias [N, 2 W]` and `down_proj_bias [N, D]` too; stock experts that are
transposed, or whose gate and up take turns, are held like the others.

Needs torch and transformers only: the modeling files next to the weights carry a copy of this text.
"""

import copy
from collections.abc import Callable
from contextvars import ContextVar
from typing import NoReturn

import torch
from torch import nn
from transformers.integrations.moe import _grouped_linear

ALIGNMENT = 8  # neurons: 16 bytes in bfloat16 and float16, 32 in float32
MAX_BUCKETS = 32  # per layer; the names of the buckets have to be listed in the conversion
# bucket parameter -> (the parts of an expert that it holds, the axis of the neurons in one of them, None for none)
PARAMETERS = {
    "gate_up_proj": (("gate_proj", "up_proj"), 0),
    "up_proj": (("up_proj",), 0),  # of experts without a gate
    "down_proj": (("down_proj",), 1),
    "gate_up_proj_bias": (("gate_proj_bias", "up_proj_bias"), 0),
    "down_proj_bias": (("down_proj_bias",), None),
}

Gate = Callable[[torch.Tensor], torch.Tensor]  # gate and up of rows, [R, 2 W] -> activations [R, W]


# What the tensors being loaded contradict. transformers turns the errors of a conversion into a log
# entry and one general exception; the model's `from_pretrained` reads the reasons here.
contradictions: ContextVar[list[str] | None] = ContextVar("contradictions", default=None)


def bucket_width(width: int) -> int:
    """`width` rounded up to the alignment; at least one block, so that width 0 works too."""
    return max(ALIGNMENT, -(-width // ALIGNMENT) * ALIGNMENT)


def grouped_linear(x_RI: torch.Tensor, weight_NOI: torch.Tensor, end_N: torch.Tensor) -> torch.Tensor:
    """Rows of group n, which end at `end_N[n]`, times `weight_NOI[n].T`: [R, O].

    A model width that breaks the 16 byte rule goes through the fallback of transformers, a loop.
    """
    if any(size * weight_NOI.element_size() % 16 for size in weight_NOI.shape[1:]):
        weight_NIO = weight_NOI.transpose(1, 2)
        return torch.ops.transformers.grouped_mm_fallback(x_RI.to(weight_NIO.dtype), weight_NIO, offs=end_N)
    return _grouped_linear(x_RI, weight_NOI, end_N)


def bucket_shape(name: str, width: int, hidden: int) -> tuple[int, ...]:
    """Shape that a parameter of a bucket has for each of its experts."""
    if name == "down_proj":
        return hidden, width
    if name == "down_proj_bias":
        return (hidden,)
    lines = len(PARAMETERS[name][0]) * width
    return (lines,) if name.endswith("_bias") else (lines, hidden)


class ExpertBucket(nn.Module):
    """Experts `ids` of true widths `widths`, zero-padded to one width W.

    The parameters `names` are random like those of a stock model; checkpoints overwrite them.
    """

    def __init__(
        self, ids: list[int], widths: list[int], names: list[str], hidden_size: int, std: float, like: torch.Tensor
    ):
        super().__init__()
        self.ids, self.widths = ids, widths
        self.width = bucket_width(max(widths))
        for name in names:
            shape = bucket_shape(name, self.width, hidden_size)
            value = torch.zeros(len(ids), *shape, dtype=like.dtype, device=like.device)
            for position in range(0 if value.is_meta else len(ids)):
                for block in self.blocks(name, value, position):
                    block.normal_(std=std)
            self.register_parameter(name, nn.Parameter(value))

    def blocks(self, name: str, value: torch.Tensor, position: int) -> list[torch.Tensor]:
        """Views on the true neurons of one expert in a value of parameter `name`, one per part of an expert."""
        matrices, axis = PARAMETERS[name]
        if axis is None:
            return [value[position]]
        width = self.widths[position]
        return [value[position].narrow(axis, index * self.width, width) for index in range(len(matrices))]

    def forward(self, x_RD: torch.Tensor, end_N: torch.Tensor, apply_gate: Gate) -> torch.Tensor:
        """Outputs of the experts, [R, D]; expert n owns the rows up to `end_N[n]`."""
        weight_NPD = self.up_proj if "up_proj" in self._parameters else self.gate_up_proj
        m_RW = apply_gate(self._biased("gate_up_proj_bias", grouped_linear(x_RD, weight_NPD, end_N), end_N))
        return self._biased("down_proj_bias", grouped_linear(m_RW, self.down_proj, end_N), end_N)

    def _biased(self, name: str, y_RO: torch.Tensor, end_N: torch.Tensor) -> torch.Tensor:
        """Rows with the bias of their expert, where there are biases."""
        if name not in self._parameters:
            return y_RO
        every_R = torch.arange(len(y_RO), device=end_N.device, dtype=end_N.dtype)
        return y_RO + getattr(self, name)[torch.searchsorted(end_N, every_R, right=True)]


class BucketedExperts(nn.Module):
    """Takes the place of a stock experts module whose experts have `widths`.

    Args:
        stock: the module that it replaces; its sizes, activation, dtype and device are used.
        widths: neurons of each expert, in order of expert id.
        path: name of the module in its model, for messages.
        std: standard deviation of fresh weights.

    Raises:
        ValueError: another number of widths than experts, a width above the stock one, or more
            than `MAX_BUCKETS` buckets.
        NotImplementedError: the stock experts do more than up, an activation or a gate, and down.
    """

    def __init__(self, stock: nn.Module, widths: list[int], path: str, std: float):
        super().__init__()
        if stock.has_post_expert_norm:
            raise NotImplementedError(f"{type(stock).__name__} has a norm after every expert, which is not run here")
        self.path = path
        experts, first, second = stock.down_proj.shape
        self.num_experts = int(experts)
        self.hidden_dim, intermediate_dim = (second, first) if stock.is_transposed else (first, second)
        if len(widths) != self.num_experts or max(widths, default=0) > intermediate_dim:
            raise ValueError(
                f"{path}: config.json has {len(widths)} expert widths up to {max(widths, default=0)} for a layer of "
                f"{self.num_experts} experts of width {intermediate_dim}"
            )
        names = [name for name in PARAMETERS if name in stock._parameters]
        self._gate = (_without_weights(stock),)  # in a tuple: no module of this one's, nor of its state
        members: dict[int, list[int]] = {}
        for expert, width in enumerate(widths):
            members.setdefault(bucket_width(width), []).append(expert)
        if len(members) > MAX_BUCKETS:
            raise ValueError(f"{path}: {len(members)} distinct expert widths, at most {MAX_BUCKETS} are supported")
        self.buckets = nn.ModuleList(
            ExpertBucket(ids, [widths[e] for e in ids], names, self.hidden_dim, std, stock.down_proj)
            for _, ids in sorted(members.items())
        )
        self._slot_E: torch.Tensor | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs, [T, D].

        Rows are sorted by slot, the place of their expert in bucket order. With more than one bucket
        the ends of the slots are copied to the host, one synchronisation per layer on accelerators.
        Sums like `grouped_mm_experts_forward` of transformers, in the routing weights' precision.
        """
        x_TD, index_TK = hidden_states, top_k_index
        slot_S, order_S = torch.sort(self._slots(x_TD.device)[index_TK.reshape(-1)])
        every_E = torch.arange(self.num_experts, device=x_TD.device)
        end_E = torch.searchsorted(slot_S, every_E, right=True, out_int32=True)
        x_SD = x_TD[order_S // index_TK.size(-1)]
        weight_S1 = top_k_weights.reshape(-1)[order_S].unsqueeze(-1)
        row_dtype = torch.result_type(self.buckets[0].down_proj, weight_S1)
        y_SD = torch.empty_like(x_SD, dtype=row_dtype)
        for bucket, first, start, stop in self._spans(end_E, len(slot_S)):
            end_N = end_E[first : first + len(bucket.ids)] - start
            y_RD = self._run(bucket, x_SD[start:stop], end_N)
            y_SD.index_copy_(0, order_S[start:stop], (y_RD * weight_S1[start:stop]).to(row_dtype))
        return y_SD.view(*index_TK.shape, self.hidden_dim).sum(dim=1).to(x_TD.dtype)

    def to_buckets(self, name: str, tensors: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Values of one parameter of every bucket, from the matrices of all experts.

        Args:
            name: a key of `PARAMETERS`.
            tensors: matrix name -> one tensor per expert, [w, D] or for down_proj [D, w].

        Raises:
            ValueError: an expert is missing or its shape contradicts the widths of the config.
        """
        matrices, _ = PARAMETERS[name]
        for matrix in matrices:
            self._check(matrix, tensors.get(matrix, []))
        values = {}
        for index, bucket in enumerate(self.buckets):
            like = tensors[matrices[0]][bucket.ids[0]]
            value = like.new_zeros(getattr(bucket, name).shape)
            for position, expert in enumerate(bucket.ids):
                for matrix, block in zip(matrices, bucket.blocks(name, value, position), strict=True):
                    block.copy_(tensors[matrix][expert])
            values[f"buckets.{index}.{name}"] = value
        return values

    def from_buckets(self, values: dict[str, torch.Tensor]) -> dict[tuple[int, str], torch.Tensor]:
        """Inverse of `to_buckets` for any subset of bucket parameters: (expert, matrix) -> its tensor."""
        tensors = {}
        for key, value in values.items():
            _, index, name = key.split(".")
            bucket = self.buckets[int(index)]
            for position, expert in enumerate(bucket.ids):
                for matrix, block in zip(PARAMETERS[name][0], bucket.blocks(name, value, position), strict=True):
                    tensors[expert, matrix] = block.contiguous()
        return tensors

    def _slots(self, device: torch.device) -> torch.Tensor:
        """Place of each expert in bucket order, [E]. Not a buffer: those are lost on the meta device."""
        if self._slot_E is None or self._slot_E.device != device:
            in_order = [expert for bucket in self.buckets for expert in bucket.ids]
            self._slot_E = torch.argsort(torch.tensor(in_order, device=device))
        return self._slot_E

    def _spans(self, end_E: torch.Tensor, rows: int):
        """(bucket, its first slot, its first row, the row after its last) per bucket."""
        ends = end_E.tolist() if len(self.buckets) > 1 else [rows] * self.num_experts
        first = start = 0
        for bucket in self.buckets:
            stop = ends[first + len(bucket.ids) - 1]
            yield bucket, first, start, stop
            first, start = first + len(bucket.ids), stop

    def _run(self, bucket: ExpertBucket, x_RD: torch.Tensor, end_N: torch.Tensor) -> torch.Tensor:
        """Outputs of one bucket, [R, D], for R = 0 too."""
        if len(x_RD) > 0:
            return bucket(x_RD, end_N, self._apply_gate)
        if not torch.is_grad_enabled():
            return x_RD
        # data-parallel training expects a gradient, if zero, for every parameter: a row of zeros, dropped after
        return bucket(x_RD.new_zeros(1, self.hidden_dim), torch.ones_like(end_N), self._apply_gate)[:0]

    def _apply_gate(self, up_RP: torch.Tensor) -> torch.Tensor:
        """What the stock experts make of their first product; gate and up come one behind the other here."""
        return _gated(self._gate[0], up_RP)

    def _check(self, matrix: str, tensors: list[torch.Tensor]) -> None:
        if len(tensors) != self.num_experts:
            self._contradict(f"{len(tensors)} {matrix} tensors, config.json wants {self.num_experts}")
        for bucket in self.buckets:
            for expert, width in zip(bucket.ids, bucket.widths, strict=True):
                wanted = self._shape(matrix, width)
                if list(tensors[expert].shape) != wanted:
                    found = list(tensors[expert].shape)
                    self._contradict(f"expert {expert} {matrix}: shape {found}, config.json wants {wanted}")

    def _shape(self, matrix: str, width: int) -> list[int]:
        if matrix.endswith("_bias"):
            return [self.hidden_dim if matrix == "down_proj_bias" else width]
        return [self.hidden_dim, width] if matrix == "down_proj" else [width, self.hidden_dim]

    def _contradict(self, reason: str) -> NoReturn:
        message = f"{self.path}: {reason}"
        reasons = contradictions.get()
        if reasons is not None:
            reasons.append(message)
        raise ValueError(message)


def _without_weights(stock: nn.Module) -> nn.Module:
    """The stock experts without their parameters: what is left knows the family's own way to gate.

    Raises:
        NotImplementedError: neurons of zeros would not gate to zero, so that buckets could not be filled up.
    """
    bare = copy.copy(stock)
    bare._parameters = {}
    if _gated(bare, torch.zeros(1, 2 * ALIGNMENT, device="cpu")).any():
        raise NotImplementedError(f"{type(stock).__name__} gates zeros to something else, so no expert can be narrow")
    return bare


def _gated(stock: nn.Module, up_RP: torch.Tensor) -> torch.Tensor:
    """Activations of rows [R, 2 W], gate before up, or of [R, W] where there is no gate."""
    if not stock.has_gate:
        return stock.act_fn(up_RP)
    if not stock.is_concatenated:
        up_RP = torch.stack(up_RP.chunk(2, dim=-1), dim=-1).flatten(-2)
    return stock._apply_gate(up_RP)
