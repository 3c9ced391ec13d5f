"""Forms that checkpoints store matrices in, other than plain numbers: each is one file and one entry of `table.py`.

When a checkpoint is opened, its config says which format it is in; the format then folds the tensors that belong
together (packed numbers, their factors) into the one entry that they stand for, with an object that reads it. From
there on a source in that format is a plain one: facts, scoring, plans and writers see only entries. `base.py` says what
a format has to do.
"""
