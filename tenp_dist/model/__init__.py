"""The model: transformers' own code, run one decoder layer at a time, with its experts open to observers.

No family has forward code of its own here. This room knows checkpoints and transformers; it knows nothing of shards,
passes or what is summed.

Files in reading order:

- `skeleton`: the model without its weights, and the weights of one module at a time.
- `layers`: the model's forward around its layers: what enters the first, the arguments of each, the head.
- `experts`: the routed experts' forward, which tells an `Observer` what it computes and takes masks of neurons.
- `routing`: a layer that routes to some of its experts only.
- `attention`: the CPU's fused attention for models whose values are narrower than their keys.
- `memory`: where tensors lie that outlive a microbatch.
"""
