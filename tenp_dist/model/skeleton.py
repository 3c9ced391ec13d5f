"""The model's structure without its weights, and the weights one module at a time.

The skeleton is transformers' own model built on the `meta` device from config.json. A decoder
layer gets its weights from the checkpoint by range when its turn comes and goes back to `meta`
afterwards; routed experts arrive in the fused tensors that the modeling code uses.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tenp_dist.checkpoint.expert_layers import layers_of
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import DOWN, GATE, UP
from tenp_dist.checkpoint.families.table import family_and_config
from tenp_dist.checkpoint.index import CheckpointIndex, open_index
from tenp_dist.checkpoint.reader import TensorReader, check_shape
from tenp_dist.errors import UnsupportedModelError
from tenp_dist.model.experts import FusedExperts
from tenp_dist.model.memory import own_zeros
from tenp_dist.model.stock import build_model
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
        self.layers: nn.ModuleList = self.model.base_model.layers  # kept: Frame swaps the model's own
        self._stored = names_of_parameters(self.model, self._outside_experts())
        self._layers_path = name_of(self.model, self.layers)
        self._loaded: dict[int, nn.Module] = {}
        self._check_interface()
        _restore_rotary(self.model, device)

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
        return self.model.base_model.get_submodule(self.family.final_norm)

    def experts_of(self, layer: nn.Module) -> FusedExperts | None:
        """The routed experts of a decoder layer, None if it is dense."""
        module: Any = layer
        for part in self.family.experts.split("."):
            module = getattr(module, part, None)
        return module if hasattr(module, "gate_up_proj") else None

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
            if key in (f"{self.family.experts}.gate_up_proj", f"{self.family.experts}.down_proj"):
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
            for name in ("gate_up_proj", "down_proj"):
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
        stored.check(self.index, parameter.shape)
        tensor = own_zeros(parameter.shape, self._dtype_of(path))
        parts = tensor.chunk(len(stored.tensors), stored.axis) if len(stored.tensors) > 1 else (tensor,)
        for name, part in zip(stored.tensors, parts, strict=True):
            self.reader.into(name, part)
        return tensor

    def _dtype_of(self, path: str) -> torch.dtype:
        kept = (self.model._keep_in_fp32_modules or set()) | (self.model._keep_in_fp32_modules_strict or set())
        parts = path.split(".")
        return torch.float32 if any(name in parts for name in kept) else self.dtype

    def _read_experts(
        self, layer: int, experts: FusedExperts, used: set[str], share: range | None
    ) -> dict[str, torch.Tensor]:
        """Fused experts of a share: gate_up [E, 2F, D], down [E, D, F]; narrow ones are padded with zeros."""
        num_experts, hidden = experts.gate_up_proj.shape[0], experts.gate_up_proj.shape[2]
        names = {(e, m): place.tensor for e, m, place in self.slices.of_layer(layer, range(num_experts))}
        used.update(names.values())
        full = experts.down_proj.shape[2]
        share = range(num_experts) if share is None else share
        gate_up_EPD = own_zeros((len(share), 2 * full, hidden), self.dtype)
        down_EDF = own_zeros((len(share), hidden, full), self.dtype)
        for row, e in enumerate(share):
            width = self._expert_width(names[e, GATE], full)
            for matrix, target, wanted in (
                (GATE, gate_up_EPD[row, :width], (width, hidden)),
                (UP, gate_up_EPD[row, full : full + width], (width, hidden)),
                (DOWN, down_EDF[row, :, :width], (hidden, width)),
            ):
                check_shape(self.index.entry(names[e, matrix]), wanted, self.index.folder)
                self.reader.into(names[e, matrix], target)
        return {f"{self.family.experts}.gate_up_proj": gate_up_EPD, f"{self.family.experts}.down_proj": down_EDF}

    def _expert_width(self, name: str, width: int) -> int:
        return self.index.entry(name).shape[0] if "tenp" in self.index.config else width

    def _check_interface(self) -> None:
        for layer, experts in enumerate(map(self.experts_of, self.layers)):
            if experts is None:
                continue
            odd = experts.has_bias or experts.is_transposed or experts.has_post_expert_norm
            if odd or not (experts.has_gate and experts.is_concatenated):
                raise UnsupportedModelError(
                    "Experts of a form that is not scored yet",
                    where=f"{type(experts).__name__}, layer {layer}",
                    wanted="gated experts without biases, in [F, D] layout",
                )


def _restore_rotary(model: nn.Module, device: torch.device) -> None:
    """Rotary tables are buffers that no checkpoint holds: compute them where the model runs."""
    for name, module in list(model.named_modules()):
        if "inv_freq" in module._buffers:
            parent = model.get_submodule(name.rpartition(".")[0])
            with torch.device(device):
                setattr(parent, name.rpartition(".")[2], type(module)(module.config))
