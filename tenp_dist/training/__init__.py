"""Training of a small set of weights around pruning, as TRSP's second stage does: the rest of the model stays.

Files in reading order:

- `small_set`: which weights of a layer these are, and what the layer computes with while they train.
- `state`: where training is, as one file; and the step of Adam from one state to the next.
- `gradient_pass`: gradients by the small set and by the penalty, in a pass up and back.
- `steps`: one step after another.
- `merge`: what was trained as tensors that take the place of the source's.
"""
