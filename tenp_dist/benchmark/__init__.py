"""Measuring models on tasks with EleutherAI's lm-eval, in an environment of its own.

`environment.py` finds or makes that environment, `harness.py` is the program that runs in it, `column.py` measures one
model (a column of the table), `servers.py` asks the servers that models may be served by, `paired.py` compares columns.
"""
