"""Looking at a run before it starts.

Owns: validating what can be validated without loading weights (`inputs`), estimating memory (`memory`), and the plan in
words that `rlhf train ... --dry-run` prints (`plan`). Starts no actor, writes no file.
"""
