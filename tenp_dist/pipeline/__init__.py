"""Stages in a run directory: which are due, in what order they run, what each leaves.

Nothing here knows what a stage does: `stages/` says that. Read `stage.py` (what a stage is), `records.py` (what a
finished one leaves), `runner.py` (what is skipped, refused, run and recorded); `settings_diff.py` explains a refusal,
`names.py` holds the names that the command line shows.
"""
