"""`rlhf reward train`: from people's judgements to a reward or preference model, and a report of how far it can be trusted.

`rows` and `dataset` read. `choices` turns the command's options into one of `objectives` (of `losses`) and data for it. `heads` fits linear
heads on frozen encoders, `finetune` whole models on a DeepSpeed `group`. `report` measures on held-out pairs (`reliability`). `train` is
the order of it all.
"""
