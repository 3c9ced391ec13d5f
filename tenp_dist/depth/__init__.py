"""Which decoder layers leave, for methods that learn it from the model at work and not from the sums of scoring.

Files in reading order:

- `order`: a greedy order, whatever tells how much worse a model without some layers is.
- `measured`: the loss of many sets of layers left out, in one pass over the model.
- `learn`: TRSP's weights of layers, learnt, whatever tells the gradients by them.
- `weight_pass`, `learnt`: these gradients, in a pass up and back.
- `files`: what was found, on disk and beside the statistics that planning reads.
"""
