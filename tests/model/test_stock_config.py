"""config.json as transformers' own config object."""

from __future__ import annotations

import json
import math

from tenp_dist.checkpoint.index import read_config
from tenp_dist.checkpoint.stock_config import plain_floats, transformers_config


def test_floats_that_json_lacks_are_read_as_transformers_writes_them(tiny_model, tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_model("qwen3_moe"))
    config.limits = [0.5, {"most": math.inf}, -math.inf, math.nan]
    config.save_pretrained(tmp_path)
    assert '"__float__"' in (tmp_path / "config.json").read_text()
    found = transformers_config(read_config(tmp_path)).limits
    assert found[:3] == [0.5, {"most": math.inf}, -math.inf] and math.isnan(found[3])


def test_other_values_stay(tiny_model):
    config = json.loads((tiny_model("deepseek_v3") / "config.json").read_text())
    assert plain_floats(config) == config


def test_kimi_gets_the_config_class_of_its_family(tiny_model):
    config = read_config(tiny_model("deepseek_v3")) | {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "a.B"}}
    assert type(transformers_config(config)).__name__ == "DeepseekV3Config"
