"""Scoring: the statistics of one pass over the calibration tokens, and the methods that rank experts and neurons.

The pass sums once what all methods read, so that another method or budget needs no new pass. This room knows passes
and the model's experts; it knows nothing of budgets, which ask the methods for their ranking.

Files in reading order:

- `statistics`: what is summed for a layer, by domain, and its file.
- `accumulate`: adds what the experts of a microbatch compute to these sums.
- `pairs`: the part of it that is of two experts at a time.
- `flatness`: what weights alone say.
- `partial_sums`: what a rank has summed so far; how the ranks' sums become a layer's score file.
- `score_pass`: the pass.
- `gradient_statistics`: sums of what gradients say of neurons and experts, `gradient_files` how they are stored.
- `shared_gradients`: the same of shared experts' neurons.
- `gradient_pass`: the pass up and back that makes them.
- `uncertainty`: several importances as one, and how much it fluctuates over text.
- `domains`: scores of several domains made comparable and added.
- `fusion`: several rankings as one.
- `methods/`: a file for each method, and `registry`, which finds them.
"""
