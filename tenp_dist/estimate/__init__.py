"""What a job takes on a cluster, before anybody pays for it: memory, disk, seconds and money.

From headers and a description of the machines alone. `machines.py` reads the description, `work.py` counts what a job
does, `times.py` and `memory.py` turn counts into seconds and bytes, `choose.py` tries every split of the model over the
machines and takes the fastest that fits. Every figure carries the formula that made it.
"""
