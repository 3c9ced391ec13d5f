"""The kinds of plan: what becomes of the experts and neurons that a budget does not keep.

`base.py` says what a kind answers (`PlanKind`): the sizes of its plans, what it chooses of a layer, its warnings, its
random control, the keys of a budget that it does not use, and what a layout has to hold. `narrow.py`, `remove.py`,
`by_price.py` and `drop_layers.py` are one kind each, and `table.py` finds the kind of a budget: no other module asks
a method what it ranks to learn what its plans look like.
"""
