"""How a layer's experts are stored, as config.json says it: the tensors of a matrix, and what they are filled up with.

vLLM's own methods load and run them, bucket by bucket. Plain Python, no vLLM: what is asked of its quantisation
configs is handed in.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tenp_dist_vllm.matrices import checkpoint_names

SIZES = "weight_shape"  # rows and columns of a packed matrix: compared, and not needed any more
MARLIN_GROUPS = (None, 32, 64, 128)
MARLIN_STEP = 64  # neurons; Marlin fills a narrower share up to this at every step
BLOCK_STEP = 64  # neurons: DeepSeek's scales of 128 are refined to 64 or 32 without loss; finer ones no kernel takes
SMALLEST_BLOCK = 32
BLOCK = [128, 128]


@dataclass(frozen=True)
class Part:
    """One tensor of a stored matrix.

    rows, columns: of the matrix that share one number of it; None for all of them.
    fill: what neurons that are filled up have here.
    """

    rows: int | None = 1
    columns: int | None = 1
    fill: float = 0.0

    @property
    def block(self) -> tuple[int | None, int | None]:
        return self.rows, self.columns


@dataclass(frozen=True)
class Form:
    """How experts are stored.

    parts: last word of a tensor's name -> the part.
    share: neurons that a rank's share of a bucket is a multiple of; None for what kernels of plain numbers like.
    whole: neurons that the bucket itself is a multiple of.
    kernel: of buckets on NVIDIA GPUs where none is asked for. It has to honour any map of expert ids.
    sized: whether checkpoints may say a matrix's size in a tensor of its own.
    """

    parts: Mapping[str, Part]
    share: int | None = None
    whole: int = 1
    kernel: str = "triton"
    sized: bool = False

    @property
    def names(self) -> list[str]:
        """Parameters that vLLM's loaders look for."""
        suffixes = [*self.parts, *([SIZES] if self.sized else [])]
        return [f"{half}_{suffix}" for half in ("w13", "w2") for suffix in suffixes]


PLAIN = Form({"weight": Part()})
# of compressed-tensors, with a scale for each row
FP8_BY_ROW = Form({"weight": Part(), "weight_scale": Part(1, None, 1.0)})


def fp8_in_blocks(block: list[int]) -> Form:
    """DeepSeek's FP8."""
    parts = {"weight": Part(), "weight_scale_inv": Part(*block, 1.0)}
    return Form(parts, share=SMALLEST_BLOCK, whole=BLOCK_STEP)


def compressed_in_blocks(block: list[int]) -> Form:
    """compressed-tensors' FP8 with a scale for each block, which vLLM does not refine: shares are whole blocks."""
    return Form({"weight": Part(), "weight_scale": Part(*block, 1.0)}, share=math.lcm(*block))


def packed(bits: int, group: int | None, *, symmetric: bool) -> Form:
    """Whole numbers in 32-bit words, a scale for each group of a row or each row. What is filled up has the scale 0."""
    of_word = 32 // bits
    parts = {"weight_packed": Part(1, of_word), "weight_scale": Part(1, group)}
    if not symmetric:
        parts["weight_zero_point"] = Part(of_word, group)
    kernel = "marlin" if group in MARLIN_GROUPS else "triton"
    return Form(parts, share=math.lcm(MARLIN_STEP, group or 1), kernel=kernel, sized=True)


def not_served(quant_config: Any) -> str | None:
    """Why no layer of a model in this quantisation of vLLM's is served; None where it depends on the layer."""
    if quant_config is None or quant_config.get_name() == "compressed-tensors":
        return None
    stored = getattr(quant_config, "is_checkpoint_fp8_serialized", False)
    if quant_config.get_name() == "fp8" and stored and getattr(quant_config, "weight_block_size", None):
        return None
    return (
        f"quantisation {quant_config.get_name()}: FP8 with block scales (`weight_block_size`) and compressed-tensors "
        "are; for others write the checkpoint with `output.dtype: bfloat16`"
    )


def form_of(quant_config: Any, layer: Any) -> Form:
    """How the experts of a layer are stored.

    Args:
        quant_config: vLLM's quantisation of the model, or None.
        layer: a `RoutedExperts`; compressed-tensors finds it by the names of its class and of its first expert.

    Raises:
        NotImplementedError: in a form that vLLM has no method for, or whose numbers it changes.
    """
    if quant_config is None:
        return PLAIN
    if quant_config.get_name() == "fp8":
        return fp8_in_blocks(quant_config.weight_block_size)
    quant_config._add_fused_moe_to_target_scheme_map()
    names = checkpoint_names(layer).values()
    schemes = [quant_config.get_scheme_dict(layer, f"{layer.layer_name}.0.{name}") for name in names]
    if not any(schemes):
        return PLAIN
    found = None if None in schemes else _compressed(**schemes[0])
    if found is None or any(scheme != schemes[0] for scheme in schemes):
        raise NotImplementedError(
            f"{layer.layer_name}: experts stored as {_described(schemes)} are not served ragged. Write the checkpoint "
            "with `output.dtype: bfloat16`. Of compressed-tensors these are served, all three matrices alike: "
            "pack-quantized of 4 bits, or symmetric 8, by group or channel; float-quantized by channel with dynamic "
            "activations by token, or by block of 128 x 128 with dynamic ones"
        )
    return found


def _compressed(
    weights: Any = None, input_activations: Any = None, format: str | None = None, **others: Any
) -> Form | None:
    """The form of a scheme of compressed-tensors; None for one that is not served."""
    if weights is None or others.get("output_activations") is not None:
        return None
    strategy, bits, symmetric = weights.strategy, weights.num_bits, weights.symmetric
    if format == "pack-quantized":
        known = weights.type == "int" and (bits == 4 or (bits == 8 and symmetric)) and input_activations is None
        group = None if strategy == "channel" else weights.group_size
        return packed(bits, group, symmetric=symmetric) if known and strategy in ("group", "channel") else None
    dynamic = input_activations is not None and input_activations.dynamic and input_activations.type == "float"
    if weights.type != "float" or bits != 8 or not dynamic:
        return None
    if strategy == "block":  # vLLM chooses kernels for blocks of 128, whatever the config says
        return compressed_in_blocks(BLOCK) if weights.block_structure == BLOCK else None
    return FP8_BY_ROW if strategy == "channel" and input_activations.strategy == "token" else None


def _described(schemes: list[Any]) -> str:
    """What config.json says of the matrices, for people."""
    kinds = dict.fromkeys(map(_kind, schemes))
    return " and ".join(kinds)


def _kind(scheme: Any) -> str:
    if scheme is None or scheme.get("weights") is None:
        return "plain numbers"
    weights, inputs = scheme["weights"], scheme.get("input_activations")
    zeros = "" if weights.symmetric else ", with zero points"
    by = f"{weights.num_bits}-bit {_word(weights.type)} by {_word(weights.strategy)}{zeros}"
    if inputs is None:
        return f"{scheme.get('format')} ({by}, activations as they are)"
    when = "dynamic" if inputs.dynamic else "static"
    return f"{scheme.get('format')} ({by}, activations {when} by {_word(inputs.strategy)})"


def _word(value: Any) -> str:
    """compressed-tensors' enumerations are strings of their own."""
    return str(getattr(value, "value", value))
