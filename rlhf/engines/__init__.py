"""vLLM, and every import of it: one engine, the arguments and the environment of its processes, the workers' end of a weight transfer.

Owns: what vLLM is told at its start (`arguments`, from an `EngineSpec`; `environment`), how an engine is started (`start`) and asked
(`engine`, `sampling`), in child processes (`async_engine`) or in this one (`in_process`, `shared_process`); what vLLM loads from us to
sample from mixtures of two models (`mixture`, `mixture_processors`); LoRA adapters (`lora`, `adapter_inbox`); how a worker takes new
weights (`receivers`, `reload`, `slots`), of which vLLM learns by an entry point (`plugin`); and NCCL's communicator (`nccl`). Does not
know: pools, versions that others expect, rewards, the policy, the loop. Talks to `rlhf.transfer` for the wire. The rollout's engines and
the LLM judge's are started and asked here; the policy borrows the communicator. Token ids in, token ids and log-probs out.
"""
