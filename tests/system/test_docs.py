"""Every command of the pages: run here as it stands there, or said why not. A new command without a line here fails."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.commands import COMMAND, call
from helpers.paths import ROOT

PAGES = (
    "README.md",
    "cluster/README.md",
    "cluster/kuberay/rayjob.yaml",
    *(f"jobs/{name}.yaml" for name in ("rebudget", "evaluate", "drop-layers", "deepseek-v3", "qwen3-235b", "kimi-k2")),
)
PROGRAMS = (
    "tenp-dist",
    "ray",
    "sbatch",
    "scancel",
    "tail",
    "kubectl",
    "docker",
    "python",
    "pip",
    "cp",
    "export",
    "echo",
)

IN_PROCESS = [  # in this order, JOB.yaml a job that asks for every stage
    "tenp-dist run JOB.yaml",
    "tenp-dist inspect JOB.yaml",
    "tenp-dist calibrate JOB.yaml",
    "tenp-dist score JOB.yaml",
    "tenp-dist eliminate JOB.yaml",
    "tenp-dist gradients JOB.yaml",
    "tenp-dist select JOB.yaml",
    "tenp-dist plan JOB.yaml",
    "tenp-dist compensate JOB.yaml",
    "tenp-dist write JOB.yaml",
    "tenp-dist verify JOB.yaml",
    "tenp-dist evaluate JOB.yaml",
    "tenp-dist report JOB.yaml",
    "tenp-dist run JOB.yaml --set budget.retention=0.45 --overwrite",
    "tenp-dist status RUN_DIR",
    "tenp-dist run jobs/quickstart.yaml",
    "tenp-dist status runs/quickstart",
    "tenp-dist plan jobs/rebudget.yaml --overwrite",
    "tenp-dist run jobs/rebudget.yaml --overwrite",
    "tenp-dist evaluate jobs/evaluate.yaml --overwrite",
    "tenp-dist run jobs/drop-layers.yaml",
    "tenp-dist doctor --job jobs/quickstart.yaml",
    "tenp-dist doctor",
    "cp jobs/quickstart.yaml my-job.yaml",
    "tenp-dist run my-job.yaml",
    "tenp-dist evaluate JOB.yaml --plans a.json b.json",
    "tenp-dist slurm jobs/deepseek-v3.yaml --nodes 4 --gpus 8 --account ACCOUNT --partition PARTITION --time 08:00:00",
]
ELSEWHERE = {
    "tests/system/test_slurm.py runs it": [
        "sbatch deepseek-v3.sbatch",
        "scancel NUMBER",
        "tail -F tenp-dist-NUMBER.log",
        "tenp-dist slurm JOB.yaml --nodes 4 --gpus 8 --submit",
        "tenp-dist slurm jobs/deepseek-v3.yaml --nodes 4 --gpus 8 --submit",
        "tenp-dist slurm jobs/qwen3-235b.yaml --nodes 1 --gpus 8 --submit",
        "tenp-dist slurm jobs/kimi-k2.yaml --nodes 4 --gpus 8 --time 08:00:00 --submit",
        "tenp-dist slurm jobs/quickstart.yaml --nodes 2 --cpus 1 --scratch /tmp/ray --submit",
        "scripts/slurm-in-a-box start",
        "scripts/slurm-in-a-box status",
        "scripts/slurm-in-a-box stop",
        "export SLURM_CONF=/var/tmp/slurm-in-a-box/slurm.conf",
    ],
    "what a continuous integration run begins with": ["./scripts/quickstart", "./scripts/test"],
    "tests/system/test_fresh_home.py runs it": [
        "python scripts/stdlib_text.py --split calibration --split evaluation --out runs/quickstart-text",
        "python scripts/stdlib_text.py --split calibration --split evaluation --out $TENP_RUNS/quickstart-text",
        "tenp-dist doctor --address HEAD:6379 --job jobs/quickstart.yaml",
        "tenp-dist run jobs/quickstart.yaml --address HEAD:6379",
        "tenp-dist submit jobs/quickstart.yaml --address http://HEAD:8265",
        "ray job submit --address http://HEAD:8265 --working-dir . -- tenp-dist run jobs/quickstart.yaml",
        "ray job list --address http://HEAD:8265",
        "ray job logs --follow NUMBER --address http://HEAD:8265",
        "ray job stop NUMBER --address http://HEAD:8265",
        "ray get-auth-token --generate",
        "ray start --head --port 6379 --dashboard-host 0.0.0.0",
        "ray start --address HEAD:6379",
        "export TENP_RUNS=/shared/runs TENP_MODELS=/shared/models",
        "export RAY_AUTH_MODE=token",
    ],
    "tests/system/test_fresh_home.py runs the like": [
        "tenp-dist run JOB.yaml --address HOST:PORT",
        "tenp-dist submit JOB.yaml --address http://HEAD:8265",
    ],
    "needs several machines": ["ray up cluster/ray/cluster.yaml"],
    "needs Kubernetes": [
        "kubectl apply -f cluster/kuberay/rayjob.yaml",
        "kubectl apply -f cluster/kuberay/rayjob.yaml; kubectl logs -f job/tenp-dist",
        "kubectl get rayjob tenp-dist",
        "kubectl delete -f cluster/kuberay/rayjob.yaml",
    ],
    "tests/system/test_image.py runs its steps": [
        "docker build -f cluster/Dockerfile -t registry.example/tenp-dist:0.1.0 .",
    ],
    "needs a registry": ["docker push registry.example/tenp-dist:0.1.0"],
    "installs": ["pip install ./tenp_dist/runtime/vllm"],
    "tests/cli/test_rank_experts.py runs it": ["tenp-dist rank-experts JOB.yaml --out experts.json"],
    "tests/estimate/test_estimate.py runs it": [
        "tenp-dist estimate",
        "tenp-dist estimate JOB.yaml --cluster MACHINES.yaml",
        "tenp-dist estimate JOB.yaml --cluster cluster/machines/h100.yaml --nodes 2",
    ],
    "tests/stages/test_dry_run.py runs it": [
        "tenp-dist plan JOB.yaml --synthetic-scores",
        "tenp-dist write JOB.yaml --dry-run",
    ],
    "tests/layouts/test_deepseek_v3_bytes.py runs it": [
        "python scripts/make_sparse_checkpoint.py --like deepseek-v3 models/DeepSeek-V3",
    ],
    "tests/stages/test_search_stage.py runs it": ["tenp-dist search JOB.yaml"],
    "tests/stages/test_removed_layers.py runs it": ["tenp-dist layers JOB.yaml"],
    "tests/stages/test_trained_runs.py runs it": ["tenp-dist train JOB.yaml"],
    "tests/origins/test_hub.py runs it": ["tenp-dist fetch JOB.yaml"],
    "tests/origins/test_publish.py runs it": ["tenp-dist publish JOB.yaml"],
    "tests/system/test_benchmark.py runs it": ["tenp-dist benchmark JOB.yaml"],
    "tests/comparison/test_compare.py runs it": ["tenp-dist compare SOURCE PRUNED --prompts FILE"],
    "test_tab_completion runs it": [
        """echo 'eval "$(_TENP_DIST_COMPLETE=bash_source tenp-dist)"' >> ~/.bashrc""",
    ],
}


def commands_of(page: str) -> list[str]:
    """Lines indented by four (in YAML: after `#   `) and inline code that begin with a program and have arguments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lead = " {4}" if page.endswith(".md") else "# {2,3}|# Slurm, [^:]*: "
    lines = re.findall(rf"^(?:{lead})(\S.*)$", text, re.MULTILINE)
    inline = [one.replace("\n", " ") for one in re.findall(r"`([^`\n]+)`", text)] if page.endswith(".md") else []
    found = []
    for line in lines + [one for one in inline if _has_arguments(one)]:
        program = line.split()[0].removeprefix("./").split("/")[0]
        if program in (*PROGRAMS, "scripts"):
            found.append(re.split(r"\s{2,}", line)[0])
    return found


def _has_arguments(text: str) -> bool:
    """Whether inline code is a command to give, not the name of one."""
    names = ("tenp-dist run", "tenp-dist submit", "ray job submit", "ray symmetric-run")
    return len(text.split()) > 1 and text not in names


def test_every_command_is_run_here_or_said_why_not():
    known = {*IN_PROCESS, *(command for commands in ELSEWHERE.values() for command in commands)}
    shown = {command for page in PAGES for command in commands_of(page)}
    assert shown - known == set(), "on a page, in no list"
    assert known - shown == set(), "in a list, on no page"


@pytest.fixture
def folder(tmp_path):
    """A checkout with the quickstart's text, little of it; JOB.yaml asks for every stage."""
    for name in ("jobs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    words = ("--split", "calibration", "--split", "evaluation", "--out", "runs/quickstart-text")
    done = call(sys.executable, "scripts/stdlib_text.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "jobs").glob("*.yaml"):
        path.write_text(path.read_text().replace("samples: 64", "samples: 4"))
    job = yaml.safe_load((tmp_path / "jobs" / "quickstart.yaml").read_text())
    job["budget"] |= {"slope": "auto", "neurons": ["obs", "fisher"]}
    job["output"] |= {"compensate": True}
    (tmp_path / "JOB.yaml").write_text(
        yaml.safe_dump(job).replace("../runs", "runs").replace("quickstart/moe-4m", "jobs/quickstart/moe-4m")
    )
    (tmp_path / "JOB.yaml").write_text((tmp_path / "JOB.yaml").read_text().replace("}/quickstart\n", "}/JOB\n"))
    return tmp_path


@pytest.mark.slow
def test_commands_of_one_machine(folder, tenp, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("TENP_RUNS", raising=False)
    for command in IN_PROCESS:
        words = shlex.split(command.replace("RUN_DIR", "runs/JOB"))
        if words[0] == "cp":
            shutil.copyfile(words[1], words[2])
            text = (
                Path(words[2]).read_text().replace("../runs", "runs").replace("quickstart/moe", "jobs/quickstart/moe")
            )
            Path(words[2]).write_text(text)  # "set model, run_dir, calibration sources"
            continue
        if "my-job.yaml" in words:
            words += ["--run-dir", "runs/my-job"]
        if "--plans" in words:  # two plans, as somebody has them
            for name, retention in (("a", 0.45), ("b", 0.6)):
                values = ["--set", "budget.slope=1", "--set", "calibration.selection_share=0.25"]
                values += ["--set", f"budget.retention={retention}"]
                made = tenp("plan", "JOB.yaml", *values, "--overwrite")
                assert made.exit_code == 0, made.stderr
                for suffix in ("json", "safetensors"):
                    shutil.copyfile(f"runs/JOB/plan.{suffix}", f"{name}.{suffix}")
            words += ["--overwrite"]
        found = tenp(*words[1:])
        machine = words[1] == "doctor" and found.exit_code == 1  # what this machine lacks is not the page's fault
        assert found.exit_code == 0 or machine, f"{command}\n{found.stderr}{found.stdout}"


def test_tab_completion():
    """The one documented line, in bash."""
    line = next(command for command in commands_of("README.md") if "bash_source" in command)
    script = shlex.split(line)[1] + "\ncomplete -p tenp-dist"
    environment = os.environ | {"PATH": f"{COMMAND.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "tenp-dist" in done.stdout, done.stderr


@pytest.mark.parametrize("path", ["cluster/ray/cluster.yaml"])
def test_ray_accepts_the_cluster_file(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((ROOT / path).read_text())))


def test_the_rayjob_has_what_kuberay_asks_for():
    job = yaml.safe_load((ROOT / "cluster" / "kuberay" / "rayjob.yaml").read_text())
    assert job["apiVersion"] == "ray.io/v1" and job["kind"] == "RayJob"
    spec = job["spec"]["rayClusterSpec"]
    (workers,) = spec["workerGroupSpecs"]
    assert f"cluster.shards={workers['replicas']}" in job["spec"]["entrypoint"]
    gpus = workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert f"cluster.tensor_parallel={gpus}" in job["spec"]["entrypoint"]
    for group in (spec["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]} == {"shared", "memory"}
        assert {one["name"] for one in pod["containers"][0]["env"]} == {"TENP_MODELS", "TENP_RUNS", "TENP_TEXT"}
