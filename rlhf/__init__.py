"""Online alignment of language models, distributed: vLLM engines write, reward servers judge, DeepSpeed ranks learn.

The rooms, from the ground up; imports point downwards only:

- `types`, `config`: the nouns that rooms exchange, and the settings of a run.
- `tracking`, `cluster`, `data`, `algorithms`: the run record, actors and deadlines, prompts, and the mathematics.
- `training`, `transfer`: DeepSpeed machinery, and the wire for weights.
- `rollout`, `policy`, `reward`: the three roles. They know nothing of one another.
- `loop`, `preflight`: what wires and drives the roles, and what looks at a plan before it runs.
- `cli`: the `rlhf` command.
"""

__version__ = "0.1.0"
"""The one place of the version; pyproject.toml reads it from here."""
