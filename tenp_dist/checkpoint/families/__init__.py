"""Families of models as data: a row says where a family's config and checkpoint keep things, and how modules are named.

`base.py` says what a row holds, one file per group of families lists `ROWS`, `table.py` joins the files and finds the
row of a config. A new family is a row in a file, and a new file one word in the table. No config key and no name of a
tensor or module of a family is spelt outside this folder and the runtime: `Family` has a method or a field for each.
"""
