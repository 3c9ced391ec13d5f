"""The command line: it parses, and draws what runs tell. All work is done by the rooms before this one.

`main.py` has the commands of the pipeline, `launch.py` those around a run; `view.py`, `status.py` and `doctor.py` draw;
`outcome.py` turns every error into a message and its exit code.
"""
