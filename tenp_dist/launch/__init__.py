"""Around a run: jobs on Slurm (`slurm.py`) and on Ray clusters (`submit.py`), how a run stands (`status.py`), what a
machine, or every node, lacks (`doctor.py`, `visit.py`).

Nothing here runs a job in this process: it writes scripts, talks to job servers and reads files.
"""
