"""The model that is pruned, one decoder layer at a time, in transformers' own code.

`skeleton.py` builds it without weights and fills one layer or module after another from the checkpoint; `layers.py`
runs a layer with the arguments that the model's own forward would give it; `experts.py` opens the experts' forward to
observers and masks, and `routing.py` restricts a layer to some of its experts. `attention.py` and `memory.py` are about
speed and memory on the CPU.
"""
