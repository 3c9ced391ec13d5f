"""Elimination: in which order the neurons of an expert can leave, and what is lost at every width, once those that stay
have been compensated.

One pass sums the moments of all experts and, layer by layer, keeps an order and a cost of each: methods plan from these
as they do from sums. This room knows the moments of `compensation/`; it knows nothing of budgets.

Files in reading order:

- `order`: the definition, and how it is computed.
- `eliminate_pass`: the pass that makes a layer's orders and costs.
- `files`: what it leaves, and how planning reads it beside the sums of the scoring pass.
"""
