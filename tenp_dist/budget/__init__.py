"""From scores and a budget to a plan: which experts stay whole, which neurons the others keep, or which experts leave.

Everything here is a pure function of the job's budget, the sizes of the model and the stored statistics; no model
runs. `protection.py` says which experts stay whole whatever their scores, and `settle.py` finds them; `plan.py` makes
a plan and `plan_files.py` stores it; `sizes.py` holds the sizes of a model and of a plan. What differs between
methods that remove experts, narrow them, or let neurons compete is a kind of plan (`kinds/`). `trapezoid.py` computes
sizes in exact rationals from the job's decimal strings, `selection.py` ranks by scores with ties to the lower id,
`expert_sets.py` finds the set of experts that loses least, and `widths/` solves for the widths that method `global`
gives every expert.
"""
