"""The pipeline of a job: a file for each stage, and a run that they all work on.

`run.py` is a job with its source and files, `base.py` what a stage's file defines, `catalogue.py` the stages of a run
in order, `run_job.py` the way to run a job from Python. Stages call the rooms before this one; what two of them share
lies in a file of its own (`measured_plans.py`).
"""
