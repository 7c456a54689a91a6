"""What a run reads, opened and checked without loading weights: models as far as their headers, tokenizer, prompts and reward.

Each check raises a `UserError` whose message names the field, what is wrong with its value, and the remedy.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification

from rlhf.algorithms import make
from rlhf.config import Settings
from rlhf.config.data import in_words
from rlhf.config.extras import remedy
from rlhf.config.reward import SourceSettings
from rlhf.config.sft import SftSettings
from rlhf.data.architecture import architecture_of, check_folder
from rlhf.data.assets import resolve
from rlhf.data.model_folder import FolderError, find_model, read_config
from rlhf.data.prompts import PromptSet, load_prompts, load_tokenizer
from rlhf.data.rendering import control_tokens
from rlhf.preflight.finding import PlanError
from rlhf.preflight.machine import check_tensor_parallel
from rlhf.preflight.trial import try_out
from rlhf.reward.folders import check_reward_model
from rlhf.reward.judges.ensemble import read_common_set
from rlhf.reward.judges.llm_judge import check_llm_judge
from rlhf.reward.judges.llm_judge_endpoint import Endpoint
from rlhf.reward.judges.remote import RemoteJudge
from rlhf.reward.reading import Conversation
from rlhf.reward.serving.canaries import load_canaries
from rlhf.reward.shaping import Shaping
from rlhf.reward.verifiers.verifier import check_prompts
from rlhf.training.shapes import ModelShape, model_shape
from rlhf.training.trainable import check_adapters, check_policy, check_vocabulary
from rlhf.types import Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What was found.

    Attributes:
        reward: what judges, in words.
        verdicts: what each judge that can be asked said about a trial response, or that it answers, in words.
    """

    model_path: str
    model_type: str
    shape: ModelShape
    prompts: PromptSet
    eval_prompts: Sequence[Prompt]
    reward: str
    verdicts: Sequence[str]


def read_inputs(settings: Settings) -> Inputs:
    """Open everything the run reads. Raises UserError for the first thing that does not fit."""
    path = find_model(settings.policy.model, "`policy.model`", weights=False)
    config, tokenizer = open_model(settings, path)
    shape = _shape(settings, config, path)
    check_tensor_parallel(
        config, settings.rollout.tensor_parallel_size, "rollout.tensor_parallel_size", settings.policy.model
    )
    pair_tokens = settings.rollout.max_tokens if make(settings).dataset_pairs else None
    prompts = load_prompts(settings.data.prompts, tokenizer, settings.data, pair_tokens)
    if len(prompts) < settings.loop.prompts_per_step:
        raise PlanError(
            f"`loop.prompts_per_step`: a step draws {settings.loop.prompts_per_step} prompts, but `data.prompts` "
            f"({in_words(settings.data.prompts)}) holds {len(prompts)}. Lower `loop.prompts_per_step` or add prompts"
        )
    _check_shares(settings, prompts)
    _warn_of_few(settings, prompts)
    held_out: Sequence[Prompt] = ()
    if settings.data.eval_prompts is not None:
        held_out = load_prompts(settings.data.eval_prompts, tokenizer, settings.data)
    read = chain.from_iterable(prompt.token_ids for prompt in (*prompts, *held_out))
    check_vocabulary(tokenizer, config, path, token_ids=read)
    if settings.data.chat_template:  # a text that is rendered already has them on purpose
        _warn_of_control_tokens(tokenizer, [*prompts, *held_out])
    _check_critic(settings, config)
    for _, source in settings.reward.sources():
        if source.known.by == "verifier":
            check_prompts(source.named, prompts, in_words(settings.data.prompts))
            check_prompts(source.named, held_out, in_words(settings.data.eval_prompts or ""))
    Shaping.start(settings, prompts, held_out[: settings.loop.eval_limit])
    reward = _reward(settings, [*prompts, *held_out])
    verdicts = [
        f"{place}: {said}"
        for place, source in settings.reward.sources()
        if (said := _said(place, source, settings, prompts))
    ]
    return Inputs(path, config.model_type, shape, prompts, held_out, reward, verdicts)


def _check_shares(settings: Settings, prompts: PromptSet) -> None:
    """Raises PlanError if a source has fewer prompts than its share of one step, in which none comes twice."""
    total = sum(share.weight for share in prompts.shares)
    for place, share in enumerate(prompts.shares):
        wanted = settings.loop.prompts_per_step * share.weight / total
        if wanted > share.size:
            raise PlanError(
                f"`data.prompts[{place}].weight`: its share of a step is {wanted:.3g} of {settings.loop.prompts_per_step} prompts "
                f"(`loop.prompts_per_step`), and the source has {share.size}, of which none comes twice in a step. Lower the weight or "
                "`loop.prompts_per_step`, or add prompts"
            )


def _warn_of_few(settings: Settings, prompts: PromptSet) -> None:
    """Where there are fewer prompts than may be under way at once: none is under way twice."""
    loop = settings.loop
    wanted = (loop.staleness + 1) * loop.prompts_per_step
    if not loop.staleness:
        return
    if len(prompts) < wanted:
        log.warning(
            "loop.staleness: up to %d x %d = %d prompts may be under way, none of them twice, and `data.prompts` (%s) holds %d: the run "
            "goes no further ahead than these. Lower `loop.staleness` or `loop.prompts_per_step`, or add prompts",
            loop.staleness + 1,
            loop.prompts_per_step,
            wanted,
            in_words(settings.data.prompts),
            len(prompts),
        )
        return
    total = sum(share.weight for share in prompts.shares)
    for place, share in enumerate(prompts.shares):
        if (mine := wanted * share.weight / total) > share.size:
            log.warning(
                "loop.staleness: of %d prompts that may be under way `data.prompts[%d].weight` asks for %.3g, none of them twice, and the "
                "source has %d: its share will be smaller. Lower the weight or `loop.staleness`, or add prompts",
                wanted,
                place,
                mine,
                share.size,
            )


def open_model(settings: Settings | SftSettings, path: str) -> tuple[Any, Any]:
    """Configuration and tokenizer of `policy.model`, whose files are at `path`.

    Raises:
        UserError: it cannot be trained here, its weight files are not those of its architecture, or its tokenizer does not fit.
    """
    name = settings.policy.model
    config = check_policy(path)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, config, path)
    if settings.policy.lora.rank:
        check_adapters(config, settings.policy.lora)
    if settings.policy.lora.quantize_base != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise PlanError(f"`policy.lora.quantize_base`: the package bitsandbytes is not installed. {remedy('qlora')}")
    if settings.data.chat_template and not tokenizer.chat_template:
        raise PlanError(
            f"`data.chat_template`: the tokenizer of `{name}` has no chat template. Set `data.chat_template: false`, "
            "or use a model that was tuned for chat"
        )
    return config, tokenizer


def _warn_of_control_tokens(tokenizer: Any, prompts: Sequence[Prompt]) -> None:
    found = {prompt.id: names for prompt in prompts if (names := _written_out(tokenizer, prompt))}
    if found:
        log.warning(
            "data: %d of %d prompts have control tokens written out in their text (%s); the model reads them as such. Remove them if that "
            "is not meant",
            len(found),
            len(prompts),
            ", ".join(sorted(set().union(*found.values()))),
        )


def _written_out(tokenizer: Any, prompt: Prompt) -> set[str]:
    """Control tokens in the texts of a prompt's turns and of its pair, whose last tokens end it."""
    special = {token: str(name) for token, name in tokenizer.added_tokens_decoder.items() if name.special}
    answers = {special[token] for response in prompt.pair or () for token in response[:-1] if token in special}
    return answers | {name for turn in prompt.conversation for name in control_tokens(tokenizer, turn.content)}


def _shape(settings: Settings, config: Any, path: str) -> ModelShape:
    try:
        shape = model_shape(config)
    except ValueError as error:
        raise PlanError(f"`policy.model`: `{path}` is not a causal language model: {error}") from None
    longest = settings.data.max_prompt_tokens + settings.rollout.max_tokens
    if shape.context is not None and longest > shape.context:
        raise PlanError(
            f"`rollout.max_tokens`: a prompt of {settings.data.max_prompt_tokens} tokens (`data.max_prompt_tokens`) "
            f"and a response of {settings.rollout.max_tokens} make {longest}, but the model's context holds "
            f"{shape.context}. Lower one of the two"
        )
    return shape


def _check_critic(settings: Settings, policy: Any) -> None:
    """The critic's reward model must be of the policy's architecture, and its weight files must hold it whole."""
    name = getattr(settings.algorithm, "critic_model", None)
    if name is None:
        return
    path = find_model(name, "`algorithm.critic_model`", weights=False)
    instead = (
        f"Give the folder of a sequence classifier of the policy's architecture ({policy.model_type}) with one label, or set "
        "`algorithm.critic_model: null` to start from the policy's own body"
    )
    critic = read_config(path, "`algorithm.critic_model`")
    kind = (critic.model_type, critic.get_text_config().hidden_size, critic.num_labels)
    if kind != (policy.model_type, policy.get_text_config().hidden_size, 1):
        raise PlanError(
            f"`algorithm.critic_model`: `{name}` is a {kind[0]} of hidden size {kind[1]} with {kind[2]} labels. {instead}"
        )
    classifier = architecture_of(AutoModelForSequenceClassification, critic)
    if classifier is None or classifier.__name__ not in (critic.architectures or ()):
        raise PlanError(
            f"`algorithm.critic_model`: `{name}` is a {'/'.join(critic.architectures or ['body alone'])}. {instead}"
        )
    check_folder(Path(path), classifier, critic, "`algorithm.critic_model`")


def _reward(settings: Settings, prompts: Sequence[Prompt]) -> str:
    if settings.reward.common_set is not None:
        read_common_set(resolve(settings.reward.common_set))
    if settings.reward.canaries is not None:
        load_canaries(resolve(settings.reward.canaries))
    conversations = [prompt.conversation for prompt in prompts]
    judges = [_source(place, source, conversations) for place, source in settings.reward.sources()]
    words = judges[0] if len(judges) == 1 else f"{settings.reward.combine} of {', '.join(judges)}"
    transforms = ", ".join(transform.name for transform in settings.reward.transforms)
    return f"{words}, then {transforms}" if transforms else words


def _source(place: str, source: SourceSettings, conversations: Sequence[Conversation]) -> str:
    """A judge in words, opened as far as that takes no time."""
    match source.known.by:
        case "verifier":
            return f"the verifier {source.path}"
        case "language model":
            check_llm_judge(source)
            return f"the LLM judge {source.path}" + (f" at {source.url}" if source.url is not None else "")
        case "service":
            return f"the service at {source.url}"
        case "function":
            return f"the {'pairwise ' if source.compares else ''}function {source.path}"
    what = "pairwise model" if source.compares else "reward model"
    try:
        folder = find_model(source.named, f"`{place}.path`", weights=False)
    except FolderError as error:
        raise PlanError(f"{error}; or train a {what} first, with `rlhf reward train`") from error
    check_reward_model(source, folder, f"`{place}.path`", conversations)
    return f"the {what} in {folder}"


def _said(place: str, source: SourceSettings, settings: Settings, prompts: Sequence[Prompt]) -> str:
    """What a judge says when it is asked before the run; empty for those that load a model."""
    if source.known.by in ("function", "verifier"):
        return try_out(place, source, settings, prompts)
    if source.url is None:
        return ""
    if settings.cluster.address is not None:  # this host may not reach what the cluster's nodes reach
        return f"{source.url} is not asked from here, because the reward servers run in the cluster"
    if source.known.by == "language model":
        asyncio.run(Endpoint.start(source))
    else:
        asyncio.run(RemoteJudge.start(source))
    return f"{source.url} answers"
