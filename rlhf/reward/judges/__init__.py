"""What a reward server judges with: `judge` says what a judge is, `make` is the one table of kinds and makes the one that is configured.

A judge scores single responses or compares two: a function (`function_judge`), a reward or preference model (`model_judge`), a verifier,
several judges as one (`ensemble`), a language model (`llm_judge`, in an engine or behind an endpoint), or a service elsewhere (`remote`).
`batching` and `cache` stand before all of them; what blocks is done in a `workplace`.
"""
