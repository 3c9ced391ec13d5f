"""Search: which experts of every layer stay and what is merged into them, found by measuring whole models (method eep).

EEP (arXiv 2407.00945) looks for a router mapping and an expert merging matrix of every layer with an evolutionary
search, without gradients. Here a population of them goes through the model in one pass: this room says what an
individual is, how children come from parents, and how a search goes on; it knows plans' kept experts and budgets, and
is handed what measures individuals. Nothing here knows passes or stages.

Files in reading order:

- `space`: what a search may choose from.
- `individuals`: genes, and the plan that they stand for.
- `operators`: how genes change; the authors' own, and what is ours.
- `parents`: who has children.
- `children`: the individuals of a pass, from all that was measured before it.
- `population`: individuals and figures as files, which a search goes on from.
- `likeness`, `seeds`: which experts are near each other; the first individuals, from rankings.
- `evolution`: the passes of a search.
- `outcome`: who is measured again on the development split, and what a search says of itself.
"""
