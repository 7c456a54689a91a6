"""Judging responses: servers that score them, the models and functions behind these, and the training of such models.

Owns everything between a rollout and its `Feedback`. Does not know how responses are made or what is learned from
them. Rule: a failure is an outcome of its own (`Invalid`, `Failed`, `TimedOut`), never a reward of zero.

`serving` asks `judges`; `training` makes the models that judges load; neither of `serving` and `training` knows the other. All three
stand on the files beside this one.
"""
