"""The config.json of a ragged checkpoint: which expert of which layer has which width.

    "model_type": "tenp_deepseek_v3",
    "moe_intermediate_size": "of a ragged checkpoint: ...",
    "tenp": {"format_version": 1, "source": {...}, "retention": "0.6",
             "widths": [48, 128], "layers": {"1": "0110...", ...},
             "sealed": {"moe_intermediate_size": 128}}

`layers` has one string per pruned decoder layer and one character per expert: `chr(48 + i)` stands
for `widths[i]`, so '0' is the narrowest; past 79 widths the characters are no longer printable ASCII.
A layer that is not listed keeps its full width.

The stock width of an expert is *sealed*: a sentence stands in its place and the number in `tenp.sealed`. A stock class
named by hand, and any engine that is told a stock `model_type`, refuses such a width; with the number it would fill
the experts with random or cut weights and say nothing. Files without a seal, as they were written before, load too.

Pure Python: the writer needs no torch for it, and the modeling files carry a copy of this text.
"""

import copy

FORMAT_VERSION = 1
PREFIX = "tenp_"
# source model_type -> what the names of its ragged classes start with, after `Tenp`; a new family is one line
FAMILIES = {
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "deepseek_v32": "DeepseekV32",
    "glm4_moe": "Glm4Moe",
    "glm4_moe_lite": "Glm4MoeLite",
    "dots1": "Dots1",
    "solar_open": "SolarOpen",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "qwen3_next": "Qwen3Next",
    "olmoe": "Olmoe",
    "flex_olmo": "FlexOlmo",
    "mixtral": "Mixtral",
    "minimax_m2": "MiniMaxM2",
    "phimoe": "Phimoe",
    "ernie4_5_moe": "Ernie4_5_Moe",
    "glm_moe_dsa": "GlmMoeDsa",
    "qwen3_5_moe_text": "Qwen3_5MoeText",
    "axk1": "AXK1",
    "kimi_linear": "KimiLinear",
    "bailing_hybrid": "BailingHybrid",
    "afmoe": "Afmoe",
    "exaone_moe": "ExaoneMoe",
    "hy_v3": "HYV3",
    "cohere2_moe": "Cohere2Moe",
    "lfm2_moe": "Lfm2Moe",
    "jamba": "Jamba",
    "granitemoe": "GraniteMoe",
    "granitemoeshared": "GraniteMoeShared",
    "granitemoehybrid": "GraniteMoeHybrid",
    "gpt_oss": "GptOss",
    "nemotron_h": "NemotronH",
    "qwen3_5_moe": "Qwen3_5Moe",
    "qwen3_vl_moe": "Qwen3VLMoe",
    "kimi_k25": "KimiK25",
    "hunyuan_v1_moe": "HunYuanMoEV1",
    "glm4v_moe": "Glm4vMoe",
    "granitemoe_swa": "GraniteMoeSWA",
    "aria_text": "AriaText",
    "gemma4_text": "Gemma4Text",
    "gemma4": "Gemma4",
    "mimo_v2_flash": "MiMoV2Flash",
    "laguna": "Laguna",
    "mellum": "Mellum",
    "flint": "Flint",
    "beam": "Beam",
    "minimax_m3_vl_text": "MiniMaxM3VLText",
    "minimax_m3_vl": "MiniMaxM3VL",
}
FIRST_CODE = ord("0")
# config key of the width of an expert, where it is another than `moe_intermediate_size`
WIDTH_KEYS = dict.fromkeys(
    (
        "olmoe", "flex_olmo", "mixtral", "minimax_m2", "phimoe", "cohere2_moe", "jamba", "granitemoe",
        "granitemoeshared", "granitemoehybrid", "granitemoe_swa", "gpt_oss", "hunyuan_v1_moe", "aria_text",
        "minimax_m3_vl_text", "minimax_m3_vl",
    ),
    "intermediate_size",
)  # fmt: skip
# families with towers beside their language model -> the part of the config that describes the latter
SECTIONS = dict.fromkeys(
    ("qwen3_5_moe", "qwen3_vl_moe", "kimi_k25", "glm4v_moe", "gemma4", "minimax_m3_vl"), "text_config"
)
SEAL = (
    "of a ragged checkpoint, whose experts have different widths: a stock model class would fill them with random "
    "numbers. Load it with AutoModelForCausalLM after `import tenp_dist`, or with trust_remote_code=True"
)


def class_prefix(family: str) -> str:
    """What the names of a family's ragged classes start with: deepseek_v3 -> TenpDeepseekV3.

    Raises:
        ValueError: the family has no line in `FAMILIES`.
    """
    if family not in FAMILIES:
        raise ValueError(f"no ragged runtime for model_type {family!r}; supported: {', '.join(FAMILIES)}")
    return f"Tenp{FAMILIES[family]}"


def width_key(family: str) -> str:
    """Config key of the width of a family's experts."""
    return WIDTH_KEYS.get(family, "moe_intermediate_size")


def class_name(family: str) -> str:
    """Name of a family's ragged model class: TenpDeepseekV3ForCausalLM."""
    return class_prefix(family) + ("ForConditionalGeneration" if family in SECTIONS else "ForCausalLM")


def modeling_module(family: str) -> str:
    """Name of the modeling file of a family without `.py`: modeling_tenp_deepseek_v3."""
    return f"modeling_{PREFIX}{family}"


def auto_map(family: str) -> dict[str, str]:
    """Where `trust_remote_code=True` finds the classes of a family."""
    module = modeling_module(family)
    kinds = ["AutoModelForCausalLM"] + ["AutoModelForImageTextToText"] * (family in SECTIONS)
    classes = {kind: f"{module}.{class_name(family)}" for kind in kinds}
    return {"AutoConfig": f"{module}.{class_prefix(family)}Config", **classes}


def ragged_config(
    source_config: dict,
    *,
    widths_by_layer: dict[int, list[int]],
    retention: str,
    fingerprint: str,
    full_width: int | None = None,
) -> dict:
    """config.json of the ragged checkpoint made from a source with `source_config`.

    Args:
        source_config: parsed config.json of the source; it is not modified.
        widths_by_layer: decoder layer -> width of each expert, in order of expert id.
        retention: kept share of the routed neurons as the job states it, a decimal string.
        fingerprint: fingerprint of the source checkpoint.
        full_width: width of the source's experts; None if no one knows.

    Raises:
        ValueError: unknown family, a source that is already ragged, a retention that is not a
            string, a width outside 0..full_width.
    """
    family = source_config.get("model_type")
    if "tenp" in source_config:
        raise ValueError(f"the source is already a ragged checkpoint (model_type {family!r}); prune its source instead")
    if not isinstance(retention, str):
        raise ValueError(f"retention is {retention!r}, wanted the decimal string of the job")
    name = class_name(family)
    table, layers = _encode(widths_by_layer, full_width)
    config = copy.deepcopy(source_config)
    config["model_type"] = PREFIX + family
    config["architectures"] = [name]
    config["auto_map"] = auto_map(family)
    config["tenp"] = {
        "format_version": FORMAT_VERSION,
        "source": {
            "model_type": family,
            "architectures": list(source_config.get("architectures") or []),
            "fingerprint": fingerprint,
        },
        "retention": retention,
        "widths": table,
        "layers": layers,
    }
    return sealed(config)


def sealed(config: dict) -> dict:
    """A ragged config as it goes into a file: no stock class accepts it. Its argument is not modified."""
    key = width_key(_family(config))
    kept = {key: _language_model(config).get(key)}  # None: the source does not state it
    changed = _with_language_model(config, {**_language_model(config), key: SEAL})
    return {**changed, "tenp": {**config["tenp"], "sealed": kept}}


def unsealed(config: dict) -> dict:
    """Inverse of `sealed`: the stock keys with their numbers again; any other config as it is."""
    tenp = config.get("tenp") or {}
    if "sealed" not in tenp:
        return dict(config)
    plain = {key: value for key, value in _language_model(config).items() if key not in tenp["sealed"]}
    stated = {key: value for key, value in tenp["sealed"].items() if value is not None}
    changed = _with_language_model(config, {**plain, **stated})
    return {**changed, "tenp": {key: value for key, value in tenp.items() if key != "sealed"}}


def _family(config: dict) -> str:
    return config["model_type"].removeprefix(PREFIX)


def _language_model(config: dict) -> dict:
    """The part of a ragged config that describes the language model: all of it, or a section."""
    section = SECTIONS.get(_family(config))
    return config if section is None else config.get(section) or {}


def _with_language_model(config: dict, part: dict) -> dict:
    section = SECTIONS.get(_family(config))
    return dict(part) if section is None else {**config, section: part}


def widths_by_layer(config: dict) -> dict[int, list[int]]:
    """Decoder layer -> width of each expert, the inverse of `ragged_config`.

    Raises:
        ValueError: no `tenp` entry, another format version, a character without a width.
    """
    tenp = config.get("tenp")
    if tenp is None:
        raise ValueError("config.json has no `tenp` entry: not a ragged checkpoint")
    if tenp.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"ragged format_version {tenp.get('format_version')!r}, this runtime reads {FORMAT_VERSION}; "
            "install the tenp-dist that wrote the checkpoint or a newer one"
        )
    return {int(layer): _decode(layer, codes, tenp["widths"]) for layer, codes in tenp["layers"].items()}


def _encode(widths: dict[int, list[int]], limit: int | None) -> tuple[list[int], dict[str, str]]:
    """Width table and one string of codes per layer."""
    table = sorted({int(width) for layer in widths.values() for width in layer})
    if table and (table[0] < 0 or (limit is not None and table[-1] > limit)):
        raise ValueError(f"expert widths {table[0]}..{table[-1]}, wanted 0..{limit}, the source's")
    code = {width: chr(FIRST_CODE + index) for index, width in enumerate(table)}
    return table, {str(layer): "".join(code[int(w)] for w in widths[layer]) for layer in sorted(widths)}


def _decode(layer: str, codes: str, table: list[int]) -> list[int]:
    """Width of each expert of one layer."""
    indices = [ord(code) - FIRST_CODE for code in codes]
    if any(not 0 <= index < len(table) for index in indices):
        raise ValueError(f"layer {layer} of the ragged config names a width outside its table of {len(table)}")
    return [table[index] for index in indices]
