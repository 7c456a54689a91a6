"""Looking at a run before it starts.

`inputs`: validating what can be validated without loading weights; `plan`: the run in words, for `--dry-run`.
`rlhf plan`: `memory` and `speed` (arithmetic on a model's shape and a GPU's data sheet), `estimate` (a layout on a cluster), `propose`
(the search for one), `report` (words and JSON), `table` (the one in the docs).
`rlhf doctor`: `checks_*` (each a few findings) and `doctor` (their order and report).
Nothing here starts a role, except that the doctor probes a Ray cluster and is handed the loop for a trial step.
"""
