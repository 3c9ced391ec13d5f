"""Compensation: new W_down for experts that lose neurons, so that those they keep make up for those they lose.

One pass sums the moments of the activations and solves every plan's experts; another checks what is stored, and shares
no code with the first but the pass itself. This room knows passes and the files of kept neurons; it knows nothing of
how a plan came about.

Files in reading order:

- `moments`: the definition, its sums and its solution.
- `compensate_pass`: the pass that solves and stores.
- `random_vectors`: whether a solution holds, tried on random vectors without the sums.
- `recheck_pass`: the pass that checks: all experts on random vectors, some by solving them again.

A layer of the source as a plan and its compensation make it:

- `planned_layer`: what they make of it, and the layer while it is so; training and evaluation take it from here.
- `planned_layers`: the same of several plans in turn.

A layer as one system (`output.compensate: joint`):

- `joint_features`, `joint_block`: what its experts hand to W_down, and one microbatch through its block.
- `normal_equations`, `conjugate_gradients`: two ways to solve it; `stored_features` keeps what the second needs.
- `joint_systems`: what a rank sums and how ranks solve together.
- `joint_pass`, `joint_outcome`: the pass that solves and stores, and what it tells people.
- `block_check`, `joint_recheck`: the pass that checks it on random vectors.

The same layer after layer (`output.compensate_on: pruned`):

- `sequential_pass`: the pass that solves a layer on what the solved layers before it give.
- `sequential_recheck`: the pass that checks it.
"""
