"""What everything that learns has in common: packing, the forward pass that gives log-probs, balanced shares, DeepSpeed.

Owns: `Experience` (the packed tensors of one micro-batch), packed attention, the model wrapper whose forward returns
log-probs, LoRA adapters inside it (`lora`), its weights as the world outside knows them (`weights`), the split of work over
ranks and micro-batches, and the DeepSpeed engine with its checkpoints.
Does not know: losses (it is given an objective), Ray, vLLM, rewards.
"""
