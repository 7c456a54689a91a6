"""The online loop and what surrounds it: the only room that knows policy, rollouts and rewards.

`online.py` is a step, and `roles.py` what it may ask of whom; `state.py` is what a run remembers and a checkpoint holds; `turns.py` is
who has shared devices. `run.py` and `sft.py` are runs from their files to their files, `starting.py` starts and ends the roles,
`evaluation.py` asks the held-out prompts.
"""
