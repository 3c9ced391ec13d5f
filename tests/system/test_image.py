"""The image's Dockerfile, step by step in a folder of this machine, and the RayJob against KubeRay's own schema."""

from __future__ import annotations

import copy
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from helpers.paths import ROOT

DOCKERFILE = ROOT / "cluster" / "Dockerfile"
SCHEMA = ROOT / "tests" / "helpers" / "kuberay" / "rayjob-v1.json"
RAYJOB = ROOT / "cluster" / "kuberay" / "rayjob.yaml"
PACKAGES = ("gcc", "g++", "wget")  # of Debian, by name


@dataclass(frozen=True)
class Step:
    """One instruction of a Dockerfile, and the folder that it works in."""

    name: str
    text: str
    folder: str


def steps() -> list[Step]:
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    found, folder = [], "/"
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, text = line.split(maxsplit=1)
            folder = text if name == "WORKDIR" else folder
            found.append(Step(name, " ".join(text.split()), folder))
    return found


def tracked() -> list[str]:
    """What a clean clone holds."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def copied(step: Step) -> dict[str, str]:
    """Name in the clone -> path in the image."""
    *sources, target = shlex.split(step.text)
    files = {}
    for source in sources:
        inside = [name for name in tracked() if name == source or name.startswith(f"{source}/")]
        assert inside, f"COPY {source}: not in a clean clone"
        for name in inside:
            relative = name.removeprefix(f"{source}/") if name != source else Path(name).name
            files[name] = os.path.normpath(f"{step.folder}/{target}/{relative}")
    return files


def test_a_clean_clone_holds_all_that_the_image_copies():
    every = steps()
    assert {step.name for step in every} <= {"FROM", "RUN", "WORKDIR", "COPY"}, "an instruction that no test knows"
    ignore = (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    assert "*" in ignore
    files = [name for step in every if step.name == "COPY" for name in copied(step)]
    assert files
    for name in files:
        assert any(name == one or name.startswith(f"{one}/") for one in let_in), f"{name}: hidden from the builder"


def test_the_image_has_a_python_that_the_package_takes_and_the_ray_of_the_manifest():
    project = (ROOT / "pyproject.toml").read_text()
    (image,) = (step.text for step in steps() if step.name == "FROM")
    least, below = map(int, re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', project).groups())
    assert least <= int(re.match(r"python:3\.(\d+)-slim", image)[1]) < below
    ray = re.search(r"ray\[default\]~=(\d+\.\d+)\.", project)[1]
    assert manifest()["spec"]["rayClusterSpec"]["rayVersion"].startswith(f"{ray}.")


@pytest.mark.slow
@pytest.mark.beside
def test_steps_of_the_image(tmp_path):
    """pip without what is installed here already; nothing outside the folder is written."""
    root, site = tmp_path / "image", tmp_path / "site"
    environment = {**os.environ, "PYTHONPATH": str(site), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def run(folder: str, *words: str) -> str:
        done = subprocess.run(
            words, cwd=root / folder.lstrip("/"), env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    for step in steps():
        if step.name == "WORKDIR":
            (root / step.folder.lstrip("/")).mkdir(parents=True)
        elif step.name == "COPY":
            for name, path in copied(step).items():
                (root / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, root / path.lstrip("/"))
        elif step.name == "RUN":
            for command in step.text.split(" && "):
                match shlex.split(command):
                    case ["apt-get", "update"] | ["rm", "-rf", "/var/lib/apt/lists/*"]:
                        pass
                    case ["apt-get", "install", "-y", "--no-install-recommends", *names]:
                        assert set(names) <= set(PACKAGES)
                    case ["python", *words]:
                        here = ["--no-deps", "--no-build-isolation", "--target", str(site)]
                        run(step.folder, sys.executable, *words, *here)
                    case ["tenp-dist", *words]:
                        assert "0.1.0" in run(step.folder, sys.executable, "-m", "tenp_dist.cli.main", *words)
                    case ["ray", *words]:
                        run(step.folder, str(Path(sys.executable).with_name("ray")), *words)
                    case _:
                        raise AssertionError(f"a step that no test runs: {command}")
    package = [name for name in tracked() if name.startswith("tenp_dist/") and "/vllm/" not in name]
    assert [name for name in package if not (site / name).is_file()] == [], "not installed"
    job = re.search(r"tenp-dist run (\S+)", manifest()["spec"]["entrypoint"])[1]
    show = "import sys, tenp_dist.job_file as j; print(j.__file__, j.load_job(sys.argv[1]))"
    environment |= {name: str(tmp_path) for name in ("TENP_MODELS", "TENP_RUNS", "TENP_TEXT")}
    assert str(site) in run("/opt/tenp-dist", sys.executable, "-c", show, str(root / job.lstrip("/")))
    run("/opt/tenp-dist", sys.executable, "scripts/stdlib_text.py", "--help")


def manifest() -> dict:
    return yaml.safe_load(RAYJOB.read_text())


def close(schema: dict) -> None:
    """Have the schema refuse keys that it does not name, as kubectl does."""
    properties = schema.get("properties", {})
    if properties and "additionalProperties" not in schema and "x-kubernetes-preserve-unknown-fields" not in schema:
        schema["additionalProperties"] = False
    for inner in (*properties.values(), schema.get("items"), schema.get("additionalProperties")):
        if isinstance(inner, dict):
            close(inner)


@pytest.fixture(scope="module")
def faults():
    """faults(manifest) -> what KubeRay's schema has against it."""
    from jsonschema import Draft202012Validator

    schema = json.loads(SCHEMA.read_text())
    for part in (schema, *schema["$defs"].values()):
        close(part)
    validator = Draft202012Validator(schema)
    return lambda value: [error.message for error in validator.iter_errors(value)]


def test_kuberay_accepts_the_manifest(faults):
    assert faults(manifest()) == []


@pytest.mark.parametrize(
    "path, value",
    [
        ("spec.rayClusterSpec.headGroupSpecs", {}),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterSpec.workerGroupSpecs.0.replicas", "4"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.volumeMounts.0.mountPath", None),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.volume", []),
        ("spec.shutdownAfterJobFinishes", "yes"),
    ],
)
def test_kuberay_refuses_what_is_not_in_its_schema(path, value, faults):
    job = copy.deepcopy(manifest())
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    target = job
    for part in parents:
        target = target[part]
    target[last] = value
    assert len(set(faults(job))) == 1


def test_the_manifest_names_the_image_that_the_dockerfile_builds():
    image = re.search(r"-t (\S+)", DOCKERFILE.read_text())[1]
    assert fnmatch.fnmatch(image, "registry.example/tenp-dist:*")
    assert set(re.findall(r"image: (\S+)", RAYJOB.read_text())) == {image}
