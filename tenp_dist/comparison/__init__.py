"""Two checkpoints on the same prompts: what each writes, and how far the second's probabilities are from the first's.

`prompts.py` reads the prompts, `generate.py` runs one checkpoint, `compare.py` runs both one after the other,
`page.py` makes a page of what they found.
"""
