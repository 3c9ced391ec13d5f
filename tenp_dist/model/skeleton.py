"""The model's structure without its weights, and the weights one module at a time.

The skeleton is transformers' own model built on the `meta` device from config.json. A decoder
layer gets its weights from the checkpoint by range when its turn comes and goes back to `meta`
afterwards; routed experts arrive in the fused tensors that the modeling code uses.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tenp_dist.checkpoint.expert_layers import layers_of
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import DOWN, DOWN_BIAS, NEURON_AXIS, PARAMETERS, UP, UP_BIAS, part_shape
from tenp_dist.checkpoint.families.table import family_and_config
from tenp_dist.checkpoint.index import CheckpointIndex, open_index
from tenp_dist.checkpoint.reader import TensorReader, check_shape
from tenp_dist.errors import UnsupportedModelError
from tenp_dist.model.buffers import restore_buffers
from tenp_dist.model.experts import FusedExperts
from tenp_dist.model.forms import in_one_form
from tenp_dist.model.memory import own_zeros
from tenp_dist.model.stock import build_model, decoder_of
from tenp_dist.model.tensor_names import StoredParameter, check_known, name_of, names_of_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Skeleton:
    """A causal language model on `meta`, and the reader that fills it.

    Args:
        folder: a source checkpoint, or a ragged or padded one that tenp-dist wrote.
        dtype: compute dtype; modules that transformers keeps in float32 stay in float32.
        device: where materialised weights live.
        experts_implementation: name in transformers' experts interface.
    """

    def __init__(
        self, folder: Path, *, dtype: torch.dtype, device: torch.device, experts_implementation: str = "grouped_mm"
    ):
        self.index: CheckpointIndex = open_index(folder)
        self.family, self.config_dict = family_and_config(self.index.config)
        self.slices = ExpertSlices(self.family)
        self.dtype = dtype
        self.device = device
        self.model: PreTrainedModel = build_model(self.config_dict, dtype, experts_implementation)
        self.reader = TensorReader(self.index)
        self._names: dict[int, list[str]] = layers_of(self.index, self.family)
        self.decoder: nn.Module = decoder_of(self.model, self.family)
        self.layers = cast(nn.ModuleList, self.decoder.layers)  # kept: Frame swaps the model's own
        self._stored = names_of_parameters(self.model, self._outside_experts())
        self._layers_path = name_of(self.model, self.layers)
        self._loaded: dict[int, nn.Module] = {}
        for number in self.moe_layers():
            in_one_form(self.experts_of(self.layers[number]), number)
        restore_buffers(self.decoder, device)

    @property
    def num_layers(self) -> int:
        return self.family.num_layers(self.config_dict)

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer."""
        return self.family.num_experts(self.config_dict)

    @property
    def hidden_size(self) -> int:
        return self.family.hidden_size(self.config_dict)

    @property
    def vocab_size(self) -> int:
        return self.family.vocab_size(self.config_dict)

    @property
    def final_norm(self) -> nn.Module:
        """What normalises the hidden states that leave the last layer."""
        return self.decoder.get_submodule(self.family.final_norm)

    def experts_of(self, layer: nn.Module) -> FusedExperts | None:
        """The routed experts of a decoder layer, None if it is dense."""
        module: Any = layer
        for part in self.family.experts.split("."):
            module = getattr(module, part, None)
        return module if "down_proj" in getattr(module, "_parameters", ()) else None

    def moe_layers(self) -> list[int]:
        return [i for i, layer in enumerate(self.layers) if self.experts_of(layer) is not None]

    def read_layer(self, layer: int, experts: range | None = None) -> dict[str, torch.Tensor]:
        """The state of one decoder layer in compute dtype, keyed as in its `state_dict()`.

        Args:
            experts: read only these routed experts, into fused tensors of this length; None for all.

        Raises:
            SourceError: a tensor is missing, unknown to the model, or of another shape.
        """
        module = self.layers[layer]
        state: dict[str, torch.Tensor] = {}
        used: set[str] = set()
        for key, parameter in module.state_dict().items():
            if key in {f"{self.family.experts}.{name}" for name in PARAMETERS}:
                continue
            path = f"{self._layers_path}.{layer}.{key}"
            used.update(self._stored_parameter(path).tensors)
            state[key] = self._read(path, parameter)
        fused = self.experts_of(module)
        if fused is not None:
            state |= self._read_experts(layer, fused, used, experts)
        check_known(self.index, self.model, [name for name in self._names.get(layer, []) if name not in used])
        return {key: tensor.to(self.device) for key, tensor in state.items()}

    def load_layer(self, layer: int, state: Mapping[str, torch.Tensor]) -> nn.Module:
        """A copy of the skeleton's layer with a state that `read_layer` returned, all experts or some.

        The skeleton's own layer stays on `meta`, so a caller may rebuild the copy and load the layer again.
        """
        config = self.model.config
        module = copy.deepcopy(self.layers[layer], {id(config): config})
        experts = self.experts_of(module)
        if experts is not None:
            for name in experts._parameters.keys() & set(PARAMETERS):
                shaped = torch.empty_like(state[f"{self.family.experts}.{name}"], device="meta")
                setattr(experts, name, nn.Parameter(shaped, requires_grad=False))
        module.load_state_dict(dict(state), assign=True, strict=True)
        self._loaded[layer] = module.eval().requires_grad_(False)
        return module

    def unload_layer(self, layer: int) -> None:
        self._loaded.pop(layer).to("meta")

    def load_part(self, layer: int, path: str) -> nn.Module | None:
        """A copy of one module of a decoder layer with its own weights, whole on every rank; None where there is none.

        Args:
            path: of the module inside the layer.
        """
        try:
            module = copy.deepcopy(self.layers[layer].get_submodule(path))
        except AttributeError:
            return None
        state = {
            key: self._read(f"{self._layers_path}.{layer}.{path}.{key}", parameter).to(self.device)
            for key, parameter in module.state_dict().items()
        }
        module.load_state_dict(state, assign=True, strict=True)
        return module.eval().requires_grad_(False)

    def load_module(self, name: str) -> nn.Module:
        """Fill a module outside the layers (embedding, final norm, head); a tied head takes the embedding's weights."""
        module = self.model.get_submodule(name)
        state = {
            key: self._read(f"{name}.{key}", parameter).to(self.device)
            for key, parameter in module.state_dict().items()
        }
        module.load_state_dict(state, assign=True, strict=True)
        return module.eval().requires_grad_(False)

    def router_parameters(self, layer: int) -> list[str]:
        """Parameters and buffers of a layer that hold one row, or entry, per routed expert; experts' own left out."""
        inside = {path.removeprefix(f"{self._layers_path}.{layer}."): made for path, made in self._stored.items()}
        prefixes = tuple(self.family.layer.format(layer=layer) + prefix for prefix in self.family.router_tensors)
        return [key for key, made in inside.items() if made.tensors[0].startswith(prefixes)]

    def tensor_of(self, layer: int, key: str) -> str | None:
        """The checkpoint's tensor of a layer's parameter, None where it has several, or none of its own."""
        made = self._stored.get(f"{self._layers_path}.{layer}.{key}")
        return made.tensors[0] if made is not None and len(made.tensors) == 1 else None

    def _stored_parameter(self, path: str) -> StoredParameter:
        """What fills a parameter; a tensor of its own name where the checkpoint has none, for the message."""
        return self._stored.get(path) or StoredParameter((path,))

    def _outside_experts(self) -> Iterator[str]:
        """Names of the checkpoint's tensors but those of routed experts."""
        held = {
            place.tensor
            for layer in self.moe_layers()
            for _, _, place in self.slices.of_layer(layer, range(self.num_experts))
        }
        return (name for name in self.index.tensors if name not in held)

    def _read(self, path: str, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter of the model from its tensor, or from its parts."""
        stored = self._stored_parameter(path)
        if stored.shared_by > 1:
            raise UnsupportedModelError(
                "A tensor holds several parameters",
                where=f"{self.index.folder}: {stored.tensors[0]}",
                found=f"{path}, one of {stored.shared_by} in it",
                wanted="such tensors in towers alone, which are copied and not read",
                next_step="save the checkpoint with a tensor for each parameter",
            )
        stored.check(self.index, parameter.shape)
        tensor = own_zeros(parameter.shape, self._dtype_of(path))
        parts = tensor.chunk(len(stored.tensors), stored.axis) if len(stored.tensors) > 1 else (tensor,)
        for name, part in zip(stored.tensors, parts, strict=True):
            self.reader.into(name, part)
        return tensor

    def _dtype_of(self, path: str) -> torch.dtype:
        kept = (self.model._keep_in_fp32_modules or set()) | (self.model._keep_in_fp32_modules_strict or set())
        return torch.float32 if any(f".{name}." in f".{path}." for name in kept) else self.dtype

    def _read_experts(
        self, layer: int, experts: FusedExperts, used: set[str], share: range | None
    ) -> dict[str, torch.Tensor]:
        """Fused experts of a share in the form of `forms.py`; narrow ones are filled up with zeros."""
        full, hidden = experts.down_proj.shape[2], experts.down_proj.shape[1]
        every = range(experts.down_proj.shape[0])
        names = {(e, part): place.tensor for e, part, place in self.slices.of_layer(layer, every)}
        used.update(names.values())
        share = every if share is None else share
        made = {
            name: own_zeros((len(share), *experts.get_parameter(name).shape[1:]), self.dtype)
            for name in PARAMETERS
            if name in experts._parameters
        }
        for row, e in enumerate(share):
            width = self._expert_width(names[e, UP], full)
            for part in self.family.matrices:
                check_shape(self.index.entry(names[e, part]), part_shape(part, width, hidden), self.index.folder)
                self.reader.into(names[e, part], _place(made, part, row, width))
        return {f"{self.family.experts}.{name}": tensor for name, tensor in made.items()}

    def _expert_width(self, name: str, width: int) -> int:
        return self.index.entry(name).shape[0] if "tenp" in self.index.config else width


def _place(made: Mapping[str, torch.Tensor], part: str, row: int, width: int) -> torch.Tensor:
    """Where a part of an expert goes in the fused tensors of its layer. row: of the expert; width: its neurons."""
    matrix = made["down_proj" if part in (DOWN, DOWN_BIAS) else "gate_up_proj"][row]
    if part == DOWN:
        return matrix[:, :width]
    if part == DOWN_BIAS:
        return made["down_proj_bias"][row]
    rows = matrix if part in NEURON_AXIS else made["gate_up_proj_bias"][row]
    first = len(rows) - made["down_proj"].shape[2] if part in (UP, UP_BIAS) else 0
    return rows[first : first + width]
