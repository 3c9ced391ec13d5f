"""What forms a pruned checkpoint can take, one file each; `job_parts.LAYOUTS` names them and the default.

A layout (`base.py`) answers all that the house asks about its checkpoints: which plans it can hold, the tensors and
their order, config.json, the files that come along, the bytes on the disk, and what the model card says. Nobody else
tells layouts apart by name: the write stage, the disk space check, the report and the command line ask the layout.
Only the check of written checkpoints (`checkpoint/verify_layouts.py`) has a table of its own, so that a fault of a
layout cannot hide in it. A new layout is a file here, its name in `job_parts.LAYOUTS` and a line in that table.
"""
