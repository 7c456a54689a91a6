"""What a reward server judges with: `judge` says what they are and makes the one that the settings ask for.

A judge scores single responses or compares two: a model, a function, a verifier, several judges as one (`ensemble`), a language model
(`llm_judge`, in an engine or behind an endpoint), or a service elsewhere (`remote`). `batching` and `cache` stand before all of them.
"""
