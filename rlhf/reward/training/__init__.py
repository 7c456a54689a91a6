"""`rlhf reward train`: from human preferences to a reward or preference model, and a report of its accuracy and calibration.

`train` is the order of it all. `rows`, `reader` and `dataset` read; `choices` turns settings and data into one of `objectives` (of
`losses`); `preparing` is what is known before weights are loaded, `readable` what the model can read. `heads` fits linear heads on frozen
encoders, `finetune` whole models on a DeepSpeed group, from `examples`; its files are `journal`'s. `report` measures on held-out pairs
(`calibration`); `saving` puts the folder in place.
"""
