"""Checkpoints: what lies where in them, by name and by byte, and how new ones are made of them.

`open_source` opens the source once: an index of its tensors (`index.py`, from headers alone), the row of its family
(`families/`) and its sizes (`facts.py`). `reader.py` reads tensors by range, through the format that they are stored in
(`formats/`). `kept.py` holds what a plan keeps of each layer, `expert_slices.py` says where an expert's matrix lies,
`recipes.py` how a new tensor is made, `writer.py` writes files of them, and the `verify` modules check what was written
by a road of their own.
"""
