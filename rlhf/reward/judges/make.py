"""The one table of judges: of each kind of reward, how its judge is made.

What a kind's name alone says (whether it compares, which fields it reads) is in `rlhf.config.reward.KINDS`, where the configuration's
checks and the planner find it without loading anything. A judge's module is imported when one of its kind is made.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from rlhf.config import Settings
from rlhf.config.reward import Kind, SourceSettings
from rlhf.reward.functions import COMPARE, SCORE, load_function
from rlhf.reward.judges.cache import CachedJudge
from rlhf.reward.judges.function_judge import FunctionJudge
from rlhf.reward.judges.judge import Judge
from rlhf.reward.judges.model_judge import ModelJudge, PairwiseModelJudge, judging_device
from rlhf.reward.judges.remote import RemoteJudge
from rlhf.reward.judges.workplace import Workplace


@dataclass(frozen=True)
class Server:
    """Where a judge will work.

    Attributes:
        local: in the driver's process.
    """

    settings: Settings
    workplace: Workplace
    local: bool


async def make_judge(source: SourceSettings, settings: Settings, workplace: Workplace, local: bool) -> Judge:
    """The judge that `source` names, ready to judge.

    Args:
        local: in the driver's process.

    Raises:
        RewardError: the function or the model cannot be used.
    """
    return await _ready(source, Server(settings, workplace, local))


async def _ready(source: SourceSettings, server: Server) -> Judge:
    judge = await JUDGES[source.kind](source, server)
    entries = server.settings.reward.cache
    return CachedJudge(judge, entries) if entries and source.known.repeatable else judge


async def _function(source: SourceSettings, server: Server) -> Judge:
    return FunctionJudge(load_function(source.named, COMPARE if source.compares else SCORE), server.workplace)


async def _model(source: SourceSettings, server: Server) -> Judge:
    device = judging_device(server.settings, server.local)
    judge = PairwiseModelJudge if source.compares else ModelJudge
    return judge(source, server.settings.reward, server.workplace, device)


async def _verifier(source: SourceSettings, server: Server) -> Judge:
    from rlhf.reward.verifiers.judge import VerifierJudge

    return await VerifierJudge.start(source.named, server.settings)


async def _service(source: SourceSettings, server: Server) -> Judge:
    return await RemoteJudge.start(source)


async def _llm_judge(source: SourceSettings, server: Server) -> Judge:
    from rlhf.reward.judges.llm_judge import make_llm_judge

    return await make_llm_judge(source, server.settings, server.local)


async def _members(source: SourceSettings, server: Server) -> Judge:
    from rlhf.reward.judges.ensemble import Ensemble

    reward = server.settings.reward
    members = [await _ready(member, server) for member in reward.members]
    return await Ensemble.start(reward, members, server.settings.cluster.startup_s)


JUDGES: Mapping[Kind, Callable[[SourceSettings, Server], Awaitable[Judge]]] = {
    "model": _model,
    "function": _function,
    "verifier": _verifier,
    "remote": _service,
    "several": _members,
    "pairwise_model": _model,
    "pairwise_function": _function,
    "pairwise_remote": _service,
    "llm_judge": _llm_judge,
}
"""Kind -> what makes its judge, ready to judge."""
