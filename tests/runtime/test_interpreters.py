"""Ragged checkpoints in interpreters of their own: without the package, with other orders of import."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tenp_dist
from helpers.ragged import TOKENS, auto_load, break_folder, drop_expert, logits, same_tensors
from tenp_dist.runtime.auto_classes import modeling_source
from tenp_dist.runtime.ragged_config import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.beside]

WITHOUT_PACKAGE = """
import json, sys
sys.modules["tenp_dist"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM
job = json.load(sys.stdin)
torch.set_num_threads(1)
for family, folder, target in job["cases"]:
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "custom code" in str(error), error
    else:
        raise AssertionError(f"{family}: stock loaded a ragged checkpoint")
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    model.save_pretrained(target)
    torch.save(model(torch.tensor(job["tokens"])).logits.detach(), target + "/logits.pt")
try:
    AutoModelForCausalLM.from_pretrained(job["without_auto_map"])
except ValueError as error:
    assert "does not recognize this architecture" in str(error), error
else:
    raise AssertionError("stock loaded a ragged checkpoint without auto_map")
try:
    AutoModelForCausalLM.from_pretrained(job["broken"], trust_remote_code=True)
except ValueError as error:
    assert "config.json wants 8" in str(error), error
else:
    raise AssertionError("a broken checkpoint was loaded")
"""

OTHER_ORDERS = """
import json, sys
job = json.load(sys.stdin)
sys.path.insert(0, job["root"])
exec(job["imports"])
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(job["folder"], trust_remote_code=True)
assert type(model).__module__ == "tenp_dist.runtime.auto_classes", type(model)
assert type(AutoConfig.from_pretrained(job["folder"])) is type(model.config)
"""

ALONE = """
import json, sys
sys.path.insert(0, json.load(sys.stdin)["root"])
import tenp_dist
assert tenp_dist.__version__
assert not {"torch", "transformers", "numpy"} & set(sys.modules), sorted(sys.modules)
"""


def run_isolated(script, job, tmp_path):
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", script]
    done = subprocess.run(
        command, input=json.dumps(job), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_remote_code_without_the_package(cases, tmp_path):
    bare = break_folder(cases["qwen3_moe"], tmp_path / "bare", lambda tensors: None)
    config = json.loads((bare / "config.json").read_text())
    del config["auto_map"]
    (bare / "config.json").write_text(json.dumps(config))
    broken = break_folder(cases["deepseek_v3"], tmp_path / "broken", drop_expert)
    jobs = [(case.family, str(case.folder), str(tmp_path / f"saved_{case.family}")) for case in cases.values()]
    job = {"cases": jobs, "tokens": TOKENS.tolist(), "without_auto_map": str(bare), "broken": str(broken)}
    run_isolated(WITHOUT_PACKAGE, job, tmp_path)
    for family, folder, target in jobs:
        assert same_tensors(Path(folder), Path(target))
        torch.testing.assert_close(torch.load(f"{target}/logits.pt"), logits(auto_load(folder)), atol=1e-6, rtol=0)
        written, saved = [json.loads((Path(f) / "config.json").read_text()) for f in (folder, target)]
        assert saved["auto_map"] == written["auto_map"] and saved["tenp"] == written["tenp"]
        assert (Path(target) / f"modeling_tenp_{family}.py").read_text() == modeling_source(family)


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import AutoConfig, AutoModelForCausalLM; import tenp_dist",
        # the Auto modules are then imported from the middle of a config module that ours derives from
        "import tenp_dist; from transformers import DeepseekV2Config",
    ],
)
def test_import_in_other_orders(cases, tmp_path, imports):
    root = str(Path(tenp_dist.__file__).parent.parent)
    run_isolated(OTHER_ORDERS, {"root": root, "imports": imports, "folder": str(cases["deepseek_v2"].folder)}, tmp_path)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_modeling_file_is_self_contained(family):
    nodes = list(ast.walk(ast.parse(modeling_source(family))))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    roots = {module.partition(".")[0] for module in modules}
    assert {"torch", "transformers"} <= roots <= {"torch", "transformers", *sys.stdlib_module_names}


def test_import_is_cheap(tmp_path):
    run_isolated(ALONE, {"root": str(Path(tenp_dist.__file__).parent.parent)}, tmp_path)
