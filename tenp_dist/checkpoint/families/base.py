"""What a row says of a family of models: keys of its config, and where its checkpoint and its modules keep things."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

GATE, UP, DOWN = "gate", "up", "down"


PROJECTIONS: Mapping[str, str] = {GATE: "gate_proj", UP: "up_proj", DOWN: "down_proj"}
"""What most families call the matrices of a gated block."""


NEURON_AXIS: Mapping[str, int] = {GATE: 0, UP: 0, DOWN: 1}
"""Axis of the torch-layout expert matrix that counts neurons: [F, D] for gate and up, [D, F] for down."""


GATE_BIAS, UP_BIAS, DOWN_BIAS = "gate_bias", "up_bias", "down_bias"


PART_AXIS: Mapping[str, int | None] = {**NEURON_AXIS, GATE_BIAS: 0, UP_BIAS: 0, DOWN_BIAS: None}
"""The same of every part that an expert can have; None where a part has nothing per neuron, as the bias of W_down."""


PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
"""What transformers calls the tensors of a layer's experts in its modules, those that there are."""


UP_ALONE = "up_proj"
"""The same of the first, where experts have no gate."""


BIASED: Mapping[str, str] = {
    **{part: f"{name}.weight" for part, name in PROJECTIONS.items()},
    **{f"{part}_bias": f"{name}.bias" for part, name in PROJECTIONS.items()},
}
"""What the parts of experts with biases are called where every expert has tensors of its own."""


ANY = "*"
"""Of a row's `refused`: whatever a config key says."""


def part_shape(part: str, width: int, hidden: int) -> tuple[int, ...]:
    """Shape that a part of an expert has. width: its neurons; hidden: D."""
    if part in NEURON_AXIS:
        return (hidden, width) if NEURON_AXIS[part] else (width, hidden)
    return (hidden,) if PART_AXIS[part] is None else (width,)


@dataclass(frozen=True)
class StoredPart:
    """One of the tensors that a matrix is stored as, groups of the numbers of a row in place of these.

    suffix: of the part's name, behind that of the matrix.
    group: numbers of a group.
    each: shape of what a group takes here; () for one number.
    """

    suffix: str
    group: int
    each: tuple[int, ...] = ()


@dataclass(frozen=True)
class FusedTensor:
    """A tensor of a layer that holds one or two parts of all its experts, the experts along its first axis.

    name: of the tensor inside a layer, as in the checkpoint.
    parts: of an expert, one behind the other along the axis that counts neurons.
    interleaved: whether the neurons of the parts take turns there instead.
    transposed: whether that is the other axis than in torch's layout of a matrix; None where files of both kinds are
        published, so that it has to be read off the shape.
    stored: which of the tensors it holds that the matrices are stored as; None for their numbers.
    """

    name: str
    parts: tuple[str, ...]
    interleaved: bool = False
    transposed: bool | None = False
    stored: StoredPart | None = None


FUSED = (FusedTensor("mlp.experts.gate_up_proj", (GATE, UP)), FusedTensor("mlp.experts.down_proj", (DOWN,)))
"""As most families fuse their experts: [E, 2F, D], gate first, and [E, D, F]."""


def experts_axis(shape: Sequence[int], num_experts: int) -> int:
    """The axis of a router's tensor that counts experts: the first one of their number.

    Raises:
        ValueError: it has none.
    """
    return list(shape).index(num_experts)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row.

    model_type: `model_type` of config.json.
    aliases: other `model_type`s whose checkpoints are this family's, tensor by tensor.
    section: key of the part of the config that describes the language model; None for the config itself.
    layers_keys: config keys that may hold the number of decoder layers, or an entry for each; the first one that is
        set.
    hidden_key: config key of D, the width of the hidden states.
    vocab_key: config key of the number of rows of the embedding.
    heads_keys: config keys that may hold the number of attention heads that ranks share; the first one that is set.
    experts_keys: config keys that may hold the number of routed experts (transformers renames some).
    top_k_key: config key of the number of experts that a token goes to; one for each layer if they are alike.
    width_key: config key of an expert's width.
    layer: prefix of a decoder layer's tensors.
    experts: the experts module inside a layer, as in the modeling code.
    expert_tensor: an expert's tensor inside a layer, as in the checkpoint.
        Where the tensor holds all experts of a layer: what it is called in a checkpoint that keeps them apart.
    matrices: parts that an expert has -> the checkpoint's names of them: gate, up and down; less where it has no gate,
        more where it has biases.
    fused: tensors that hold all experts of a layer, of checkpoints that have such.
    decoder: module of transformers' model that holds embedding, layers and final norm; None for its base model.
    final_norm: module of the decoder that normalises what leaves its last layer.
    layer_outputs: values that a decoder layer returns, the hidden states first; the others are not handed on.
    block_norm: module inside a layer whose input is the residual stream before the MoE block.
    router: module inside a layer that returns the chosen experts' ids as its only tensor of integers, and knows
        their number.
    router_tensors: prefixes of a layer's tensors that hold one row, or one entry, per routed expert.
    groups_key, chosen_groups_key: config keys of the number of equal groups that experts are routed in and
        of how many of them a token may use, None for a family without groups.
    group_scorers: experts of a group whose scores rank the group.
    output_projections: modules inside a layer that end attention, or what stands in its place; a layer has one.
    shared_experts: module inside a layer that every token goes through beside its routed experts.
    shared_tensors: prefix of their tensors inside a layer, None where it is the module's name.
    shared_matrices: the checkpoint's names of their gate, up and down.
    shared_gate: module inside a layer whose sigmoid multiplies what the shared experts give, None where nothing does.
    shared_key: config key of the width of shared experts in widths of a routed one, None where the config states the
        width itself.
    positions_key: config key of the longest sequence that the model was made for.
    width_of_others: modules that are as wide as the config says of an expert, so that experts cannot get another
        width alone.
    mtp_keys: config keys that may hold the number of multi-token prediction layers.
    mtp_tensors: prefixes of the tensors of prediction layers that are not numbered behind the decoder's.
    mtp_changes: fields of the row that differ in those layers; their prefix at least.
    entries_keys: config keys of lists with an entry for every decoder layer.
    ids_keys: config keys of lists of ids of decoder layers.
    first_keys, last_key: config keys of how many layers something holds for from the first on, and of the id of the
        last that it holds for.
    step_key, dense_key: config keys of the rule that every so many layers have experts, and of the ids of layers that
        have none whatever that rule says.
    refused: config key -> what no layer may be by it, ANY for a key that may not be set, or only to 0: forms of the
        family that are not scored yet.
    tensor_parallel: verified with more than one rank per shard.
    """

    model_type: str
    aliases: tuple[str, ...] = ()
    section: str | None = None
    layers_keys: tuple[str, ...] = ("num_hidden_layers",)
    hidden_key: str = "hidden_size"
    vocab_key: str = "vocab_size"
    heads_keys: tuple[str, ...] = ("num_key_value_heads", "num_attention_heads")
    experts_keys: tuple[str, ...]
    top_k_key: str = "num_experts_per_tok"
    width_key: str = "moe_intermediate_size"
    layer: str = "model.layers.{layer}."
    experts: str = "mlp.experts"
    expert_tensor: str = "mlp.experts.{expert}.{matrix}.weight"
    matrices: Mapping[str, str] = field(default_factory=lambda: dict(PROJECTIONS))
    fused: tuple[FusedTensor, ...] = ()
    decoder: str | None = None
    final_norm: str = "norm"
    layer_outputs: int = 1
    block_norm: str = "post_attention_layernorm"
    router: str = "mlp.gate"
    router_tensors: tuple[str, ...] = ("mlp.gate.",)
    groups_key: str | None = None
    chosen_groups_key: str | None = None
    group_scorers: int = 1
    output_projections: tuple[str, ...] = ("self_attn.o_proj",)
    shared_experts: str = "mlp.shared_experts"
    shared_tensors: str | None = None
    shared_matrices: Mapping[str, str] = field(default_factory=lambda: dict(PROJECTIONS))
    shared_gate: str | None = None
    shared_key: str | None = None
    positions_key: str = "max_position_embeddings"
    width_of_others: tuple[str, ...] = ()
    mtp_keys: tuple[str, ...] = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
    mtp_tensors: tuple[str, ...] = ("mtp.",)
    mtp_changes: Mapping[str, Any] = field(default_factory=lambda: {"layer": "mtp.layers.{layer}."})
    entries_keys: tuple[str, ...] = ("layer_types", "mlp_layer_types", "indexer_types", "attn_type_list")
    ids_keys: tuple[str, ...] = ("mlp_only_layers",)
    first_keys: tuple[str, ...] = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
    last_key: str = "moe_layer_end_index"
    step_key: str = "decoder_sparse_step"
    dense_key: str = "mlp_only_layers"
    refused: Mapping[str, str] = field(default_factory=dict)
    tensor_parallel: bool = False

    @property
    def mtp_row(self) -> Family:
        """The row of prediction layers that are not numbered behind the decoder's."""
        return replace(self, **self.mtp_changes)

    def text(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of a config that describes the language model, empty where the config lacks it."""
        return config if self.section is None else config.get(self.section) or {}

    def num_layers(self, config: Mapping[str, Any]) -> int:
        """Decoder layers, prediction layers not counted."""
        text = self.text(config)
        stated = text[next((key for key in self.layers_keys if text.get(key)), self.layers_keys[0])]
        return int(stated) if isinstance(stated, int) else len(stated)

    def hidden_size(self, config: Mapping[str, Any]) -> int:
        """D, the width of the hidden states."""
        return int(self.text(config)[self.hidden_key])

    def vocab_size(self, config: Mapping[str, Any]) -> int:
        """Rows of the embedding."""
        return int(self.text(config)[self.vocab_key])

    def top_k(self, config: Mapping[str, Any]) -> int:
        """Routed experts that a token goes to."""
        stated = self.text(config)[self.top_k_key]
        return int(stated[0] if isinstance(stated, list) else stated)

    def positions(self, config: Mapping[str, Any]) -> int | None:
        """Tokens of the longest sequence that the model was made for, None where the config does not say."""
        return self.text(config).get(self.positions_key)

    def heads(self, config: Mapping[str, Any]) -> int | None:
        """Attention heads that ranks share: those of keys and values where they are counted; None where none are."""
        return next((int(stated) for key in self.heads_keys if (stated := self.text(config).get(key))), None)

    def num_experts(self, config: Mapping[str, Any]) -> int:
        """Routed experts per layer, 0 where the config names none."""
        return next((int(stated) for key in self.experts_keys if (stated := self.text(config).get(key))), 0)

    def expert_width(self, config: Mapping[str, Any]) -> int:
        """F, neurons of a routed expert."""
        return int(self.text(config)[self.width_key])

    def shared_down(self, layer: int) -> str:
        """The checkpoint's name of W_down of a layer's shared experts."""
        return f"{self.layer.format(layer=layer)}{self.shared_prefix}.{self.shared_matrices[DOWN]}.weight"

    @property
    def shared_prefix(self) -> str:
        """Prefix of the shared experts' tensors inside a layer, as in the checkpoint."""
        return self.shared_tensors or self.shared_experts

    @property
    def block(self) -> str:
        """The module inside a layer that adds up routed and shared experts."""
        return self.experts.rpartition(".")[0]

    def groups(self, config: Mapping[str, Any]) -> int:
        """Equal groups of consecutive ids that experts are routed in, 1 for none."""
        return int((self.groups_key and self.text(config).get(self.groups_key)) or 1)

    def least_experts(self, config: Mapping[str, Any]) -> int:
        """The fewest routed experts per layer that the router still works with, equally many in each group.

        A token picks top-k experts from the groups chosen for it, and a group is ranked by its best
        `group_scorers` experts.
        """
        top_k, groups = self.top_k(config), self.groups(config)
        if groups == 1:
            return top_k
        chosen = int((self.chosen_groups_key and self.text(config).get(self.chosen_groups_key)) or groups)
        return groups * max(math.ceil(top_k / chosen), self.group_scorers)

    def shared_widths(self, config: Mapping[str, Any]) -> int:
        """Width of a layer's shared experts in widths of a routed one, 0 where the config does not state it so."""
        return int((self.shared_key and self.text(config).get(self.shared_key)) or 0)

    def with_numbers(self, config: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
        """The config with other numbers under those keys that its language model has; no key comes or goes."""
        text = {key: numbers.get(key, value) for key, value in self.text(config).items()}
        return text if self.section is None else {**config, self.section: text}
