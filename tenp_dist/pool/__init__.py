"""Where work runs: this process, or a Ray cluster. The room knows nothing of models, stages or what the work means.

A stage is given a `Pool` (`base.py`). It runs plain functions of picklable arguments (`stream`, `map`, `each_node`) and
groups of workers that keep state and do one piece of work after another (`groups`, `wait`). What fails comes out as one
of our errors: `WorkerLost` where another try may help, `Unplaced` where no node takes the work, `ClusterError` where
the cluster is gone or a node cannot import what the work needs.

Files in reading order; each imports only from those before it:

- `heartbeat`, `worker_log`, `machine`: what a worker tells of itself in files, and what a machine has.
- `base`: the protocols `Pool`, `Group` and `Worker`, and what goes between them.
- `in_process`: the pool without Ray, for `--debug` and tests.
- `hang`: tells workers that hang from workers that are slow.
- `rank_logs`: logs and heartbeats of a group's ranks.
- `ray_head`: is Ray's head still there? `ray_client`: the connection, through which all calls to Ray's head go.
- `ray_nodes`: names and resources of nodes, calls on a certain one.
- `ray_imports`: which nodes cannot import what the work needs. `ray_results`: Ray's errors become ours.
- `ray_tasks`: functions on Ray. `ray_placement`, `ray_group`: groups of workers on Ray. `ray_metrics`: figures for
  Prometheus.
- `ray_pool`: the pool on Ray, put together from these.
"""
