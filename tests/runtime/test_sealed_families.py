"""Every family's ragged config is refused by the stock classes of that family, named by hand."""

from __future__ import annotations

import json

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from helpers.families import OTHERS, TOWERS
from helpers.models import COMMON, EXPERTS, SETTINGS
from tenp_dist.checkpoint.families.table import FAMILIES, family_of
from tenp_dist.runtime.ragged_config import ragged_config


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_stock_classes_named_by_hand_refuse(family, tmp_path):
    """Its width is a sentence, so no expert is filled with random numbers; the sentence says what to do."""
    if family in TOWERS:
        settings = TOWERS[family] | {"text_config": COMMON | TOWERS[family]["text_config"]}
    else:
        settings = COMMON | (SETTINGS | OTHERS)[family]
    config = transformers.AutoConfig.for_model(family, **settings).to_dict()
    assert family_of(config).expert_width(config)
    made = ragged_config(config, widths_by_layer={2: [8] * EXPERTS}, retention="0.6", fingerprint="f" * 64)
    (tmp_path / "config.json").write_text(json.dumps(made))
    stock = [getattr(transformers, CONFIG_MAPPING_NAMES[family])]
    if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        stock.append(getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]))
    for one in stock:
        with pytest.raises(Exception, match="would fill them with random") as refusal:
            one.from_pretrained(tmp_path)
        assert FAMILIES[family].width_key in str(refusal.value)
