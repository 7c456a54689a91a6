"""Verifiers: is a response right? Rules decide, from what the prompt's line in the data says is right; there is no model.

`verifier` is what all of them are; `mathematics`, `instructions` (with `constraints`), `reasoning`, `patterns` and `code` have
the rules. `judge` is what a reward server asks; it has them work in processes of their own (`workers`, `worker`), so that
several responses are verified at once and one that hangs holds no other up. `sandbox` (with `jail` and `harness`) runs code
that a model wrote.
"""
