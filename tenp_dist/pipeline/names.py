"""The stages' names in order, what each does, and examples of its command."""

from __future__ import annotations

STAGES = {
    "inspect": "Read config and safetensors headers; write facts.json.",
    "calibrate": "Tokenise the calibration text; write calibration/calibration.arrow.",
    "score": "Run the model over the tokens layer by layer; write scores/layer_*.safetensors.",
    "select": "Choose the budget's auto keys on calibration text set aside; write selection.json.",
    "plan": "Choose whole experts and kept neurons; write plan.json and plan.safetensors.",
    "compensate": "Solve W_down of narrow experts for what their dropped neurons contributed.",
    "write": "Write the pruned checkpoint in every layout of the job.",
    "verify": "Compare the written checkpoint with source and plan, byte by byte; check compensated weights.",
    "evaluate": "Compare source, pruned and a random control on held-out text.",
    "report": "Write report/index.html, report/report.json and the model card.",
}


EXAMPLES = {
    "run": ["JOB.yaml", "JOB.yaml --set budget.retention=0.5 --run-dir runs/half", "JOB.yaml --json > result.json"],
    "inspect": ["JOB.yaml --set model=/models/DeepSeek-V3"],
    "calibrate": ["JOB.yaml --set calibration.sources.0.samples=8"],
    "score": ["JOB.yaml --set score.dtype=float32"],
    "select": ["JOB.yaml --set budget.important=auto --set budget.slope=auto"],
    "plan": ["JOB.yaml --set budget.retention=0.45 --overwrite"],
    "compensate": ["JOB.yaml --set output.compensate=true", "JOB.yaml --set output.ridge=0.001 --overwrite"],
    "write": ["JOB.yaml --set 'output.layouts=[ragged, padded]'"],
    "verify": ["JOB.yaml"],
    "evaluate": ["JOB.yaml --set evaluation.sequence_length=1024", "JOB.yaml --plans a.json b.json"],
    "report": ["JOB.yaml"],
}
