"""What everything that learns has in common: packing, the forward pass that gives log-probs, balanced shares, DeepSpeed.

Owns: `Experience` (the packed tensors of one micro-batch), packed attention (`segments`: who sees whom; `attention` and
`gpu_attention`: how it is computed), the model wrapper whose forward returns log-probs, LoRA adapters inside it (`lora`), its
weights as the world outside knows them (`weights`), the split of work over ranks and micro-batches, the DeepSpeed engine with its
checkpoints, and supervised training from its first step to its last (`supervised`), on which SFT and reward models are trained.
Does not know: the losses of alignment (it is given an objective), vLLM, rewards.
"""
