"""The online loop and what surrounds it: the only room that knows policy, rollouts and rewards.

`online.py` is the loop itself; `run.py` wires the roles and holds what the command line calls; `evaluation.py` asks the held-out
prompts; `checkpoints.py` decides which checkpoint is complete.
"""
