"""Passes: all tokens of a corpus through all layers of a model, on shards that may be lost.

The tokens are cut into waves, the layers into shards, and a shard is held by one or more ranks. A pass is described by
a `PassTask`, which makes the `LayerStep` that says what happens to a wave in a layer. Scoring, compensation and
evaluation bring their own tasks and steps: this room knows the model and the pool, but nothing of what is summed.

Files in reading order:

- `schedule`: what a shard does next, units; a pure policy.
- `placement`: how a model is cut into shards and what their ranks ask for; decisions, no work.
- `pass_task`: what a pass is told.
- `layer_step`: what happens in a layer, and what a step may know of the shard that it runs in.
- `layer_worker`: one rank, which brings the waves to its layers and commits what leaves them.
- `layer_sums`: the steps that sum something over all waves of a layer before anything is stored.
- `layer_gradient`, `loss`, `boundaries`, `backward`, `room_for_gradients`: a pass that goes back: what is summed of a
  layer, the loss at its end, the way up that keeps what it needs, both ways, and what is refused.
- `compute`, `layer_loader`, `layer_ops`: the model as a worker opens it, its layers, a layer over microbatches.
- `hidden_states`, `fence`: what is stored between layers, and who may store it.
- `ranks`: several processes that hold the same layers; the only file that imports DeepSpeed.
- `split_gradients`: how gradients go back through what they share.
- `controller`, `pass_progress`, `run_pass`: the loop over all shards, what is told of it, and a whole pass.
"""
