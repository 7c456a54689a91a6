"""vLLM, and every import of it: one engine, the arguments and the environment of its processes, the workers' end of a weight transfer.

Owns: how an engine is started and asked (`engine`, `environment`, `sampling`, `shared_process`), what vLLM loads from us to sample from
mixtures of two models (`mixture`, `mixture_processors`), LoRA adapters (`lora`, `adapter_inbox`), and how a worker takes new weights
(`receivers`, `reload`, `slots`). Does not know: pools, versions that others expect, rewards, the policy, the loop. Talks to
`rlhf.transfer` for the wire; the rollout and the LLM judge use it. Token ids in, token ids and log-probs out.
"""
