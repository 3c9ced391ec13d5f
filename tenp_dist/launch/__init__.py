"""Around a run: jobs on Slurm (`slurm.py`) and on Ray clusters (`submit.py`), how a run stands (`status.py`), what a
machine lacks (`doctor.py`).

Nothing here runs a job in this process: it writes scripts, talks to job servers and reads files.
"""
