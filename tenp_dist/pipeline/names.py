"""The stages in their order: what each does, and examples of its command. Imports nothing, so `--help` is instant.

A line here and a file `stages/<name>.py` are all there is to a stage.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageName:
    """What the command line says of a stage.

    name: of its command, its record and its file in `stages/`.
    help: one sentence.
    examples: what follows `tenp-dist <name>`.
    """

    name: str
    help: str
    examples: tuple[str, ...] = ("JOB.yaml",)


STAGES = (
    StageName(
        "inspect",
        "Read config and safetensors headers; write facts.json.",
        ("JOB.yaml --set model=/models/DeepSeek-V3",),
    ),
    StageName(
        "fetch",
        "Download the weights of a model that the job names on the Hugging Face Hub or in a bucket.",
        ("JOB.yaml --set model=Qwen/Qwen3-30B-A3B", "JOB.yaml --set model=Qwen/Qwen3-30B-A3B@main"),
    ),
    StageName(
        "calibrate",
        "Tokenise the calibration text; write calibration/calibration.arrow.",
        ("JOB.yaml --set calibration.sources.0.samples=8",),
    ),
    StageName(
        "score",
        "Run the model over the tokens layer by layer; write scores/layer_*.safetensors.",
        ("JOB.yaml --set score.dtype=float32",),
    ),
    StageName(
        "eliminate",
        "Find in which order neurons leave, and at what cost, for methods obs and obs-uniform.",
        ("JOB.yaml --set budget.method=obs",),
    ),
    StageName(
        "gradients",
        "Sum the gradients of the loss, from the last layer down, for methods saap, fisher, taylor and heapr.",
        ("JOB.yaml --set budget.method=saap",),
    ),
    StageName(
        "layers",
        "Find in which order decoder layers leave, for methods greedy, leave-one-out, trsp and trsp-once.",
        ("JOB.yaml --set budget.method=greedy",),
    ),
    StageName(
        "select",
        "Choose the budget's auto keys on calibration text set aside; write selection.json.",
        ("JOB.yaml --set budget.important=auto --set budget.slope=auto",),
    ),
    StageName(
        "search",
        "Search the experts to keep and to merge, for method eep; write search.json.",
        ("JOB.yaml --set budget.method=eep", "JOB.yaml --set budget.method=eep --set search.passes=40"),
    ),
    StageName(
        "plan",
        "Choose whole experts and kept neurons; write plan.json and plan.safetensors.",
        ("JOB.yaml --set budget.retention=0.45 --overwrite",),
    ),
    StageName(
        "compensate",
        "Solve W_down of kept experts for what pruning takes away.",
        ("JOB.yaml --set output.compensate=joint", "JOB.yaml --set output.ridge=0.001 --overwrite"),
    ),
    StageName(
        "train",
        "Train norms and low-rank changes of the pruned model, or before layers leave; write training/layer_*.",
        ("JOB.yaml --set train.when=after", "JOB.yaml --set train.penalty=0.1 --overwrite"),
    ),
    StageName(
        "write",
        "Write the pruned checkpoint in every layout of the job.",
        ("JOB.yaml --set 'output.layouts=[ragged, padded]'",),
    ),
    StageName(
        "verify",
        "Compare the written checkpoint with source and plan, byte by byte; check compensated weights.",
        ("JOB.yaml", "JOB.yaml --full"),
    ),
    StageName(
        "evaluate",
        "Compare source, pruned and a random control on held-out text.",
        ("JOB.yaml --set evaluation.sequence_length=1024", "JOB.yaml --plans a.json b.json"),
    ),
    StageName(
        "benchmark",
        "Measure source and pruned checkpoint on tasks with lm-eval; write benchmark.json.",
        ("JOB.yaml", "JOB.yaml --set 'benchmark.tasks=[arc_easy, gsm8k]' --set benchmark.limit=100"),
    ),
    StageName("report", "Write report/index.html, report/report.json and the model card."),
    StageName(
        "publish",
        "Upload a verified checkpoint and its card to the Hugging Face Hub.",
        ("JOB.yaml --set publish=org/name", "JOB.yaml --set 'publish={repo: org/name, private: true}'"),
    ),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)
