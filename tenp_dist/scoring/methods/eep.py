"""EEP: removes and merges experts that an evolutionary search finds, which is a stage of its own (`tenp_dist/search/`).

Stated (arXiv 2407.00945): per layer a router mapping and an expert merging matrix, both found without gradients: first
which experts stay, then what is merged into them. Ours: the ranking here, REAP's, gives the search its first individual
and says which exchanges it tries first; `budget.experts` exchanges it.
"""

from __future__ import annotations

from dataclasses import replace

from tenp_dist.scoring.methods import reap

METHOD = replace(
    reap.METHOD,
    name="eep",
    source="EEP, arXiv 2407.00945; the ranking that its search starts from is REAP's, which is ours",
    searched=True,
)
