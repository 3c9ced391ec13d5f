"""What is refused before any work: by the job and the source's headers, by what nodes see, by the space on the disk.

`job_checks.py` needs neither Ray nor torch's devices, `node_checks.py` asks every node once, `disk_space.py` estimates
what a run takes.
"""
