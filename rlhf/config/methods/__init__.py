"""Fields of the built-in methods: `shared` by several, those that learn from contrasts (`contrast`), and policy gradients (`gradient`).

`rlhf.config.algorithm` has all of them by name.
"""
