"""Evaluation: how much worse than the source pruned models are, on text that was held out.

Many variants of a checkpoint go through its layers side by side, each layer read once; what they predict is compared
with the source, token by token. Figures of cheap plans choose the keys of a budget that are `auto`. This room knows
passes, plans' kept neurons and budgets; it knows nothing of the stages that ask for it.

Files in reading order:

- `variants`: forms of a checkpoint, and the layers in which they are still the same.
- `evaluate_pass`: the pass that takes them through the layers.
- `planned_layer`: a layer as a plan has it, compensated and merged.
- `metrics`: norm, head and the figures, from the final hidden states.
- `answers`: the same of items that are asked.
- `measure`: all passes of an evaluation, then the figures.
- `plans`: the grid of plans that an evaluation compares.
- `selection`: the budget that does best among several.
"""
