"""From what an engine is to be to an engine that answers."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.engines.arguments import EngineSpec, engine_arguments
from rlhf.engines.engine import Engine
from rlhf.engines.plugin import register


def start_engine(spec: EngineSpec, *, in_process: bool, stops: Sequence[int] = ()) -> Engine:
    """Load the model and start the engine; takes tens of seconds. The environment (`engine_environment`) must be set.

    Args:
        in_process: in this very process, in which a policy may be at work; else in child processes.
        stops: tokens that end a response beside those of tokenizer and generation configuration, which vLLM knows itself.

    Raises:
        CannotMix: vLLM cannot run two such models as one.
        UserError: the engine is to mix, and is to be sent adapters.
        ValueError: vLLM refuses the arguments (a `max_model_len` beyond the model's positions, too little memory, ...).
    """
    from rlhf.engines.async_engine import AsyncEngine
    from rlhf.engines.in_process import InProcessEngine

    register()  # vLLM's own call of the entry point comes too late for checks in this process, and twice does no harm
    arguments = engine_arguments(spec)
    return InProcessEngine(arguments, stops) if in_process else AsyncEngine(arguments, stops)
