"""The rollout pool: all engines as one, from which the loop asks for responses.

Owns the engines' handles, the routing, and the question whether they hold the weights they should. Does not know the
policy: the loop tells it which version and fingerprint to expect. A request whose engine dies is asked once more of
another one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Sequence
from typing import Any

from rlhf.cluster import ActorDied, Handle, Runtime, actor_name, shared_engines, uses_gpu
from rlhf.config.settings import Settings
from rlhf.engines.engine import EngineDied
from rlhf.engines.sampling import Sampling
from rlhf.rollout.engine import Attestation, EngineInfo, RolloutEngine
from rlhf.rollout.router import Router
from rlhf.rollout.spec import rollout_environment
from rlhf.transfer import Backend, TransferSession
from rlhf.transfer.choice import backend_of
from rlhf.types import CompletionInfo, ModelSlot, Prompt, Rollout, WeightSpec


class StaleWeights(RuntimeError):
    """Some engine does not hold the weights that the policy published."""


class NoEngines(RuntimeError):
    """Every engine has died."""


class RolloutPool:
    """Engines that answer as one. Make it with `start`."""

    def __init__(
        self, settings: Settings, backend: Backend, handles: list[Handle[RolloutEngine]], infos: list[EngineInfo]
    ):
        self.backend = backend
        self._settings = settings
        self._handles = dict(enumerate(handles))
        self._infos = infos
        self._shared = shared_engines(settings, debug=backend == "local")
        self._router = Router(len(handles))
        self._joined: tuple[int, ...] = ()
        self._attested: tuple[Attestation, ...] = ()
        self._accepted = 0  # the model's own files
        self._unconfirmed: set[ModelSlot] = set()
        self._slots: set[ModelSlot] = {"policy", *(slot for info in infos for slot in info.held)}
        self._held = {index: info.held for index, info in enumerate(infos)}
        self._deaths: list[str] = []

    @classmethod
    async def start(cls, runtime: Runtime, settings: Settings, mixes: bool = False) -> RolloutPool:
        """Start the engines and wait until each can answer. In debug mode there is only one.

        Args:
            mixes: the engines hold a second model, the policy's partner, to sample from mixtures.

        Raises:
            DeadlineExpired: an engine was not ready within `cluster.startup_deadline_s`.
            ActorDied: an engine's process ended while starting.
        """
        gpu = uses_gpu(settings.cluster)
        backend = backend_of(settings, local=runtime.local, gpu=gpu)
        count = 1 if runtime.local else settings.rollout.engines
        env = rollout_environment(settings, runtime.local)
        handles = [
            runtime.start(actor_name("rollout", index), RolloutEngine, env=env)(
                settings, index, runtime.local, backend, gpu, mixes
            )
            for index in range(count)
        ]
        deadline = settings.cluster.startup_s
        infos = await asyncio.gather(*(handle.ask(RolloutEngine.ready, deadline=deadline)() for handle in handles))
        return cls(settings, backend, handles, list(infos))

    @property
    def workers(self) -> int:
        """vLLM worker processes of all living engines: the receivers of a weight transfer."""
        return sum(self._infos[index].workers for index in self._handles)

    @property
    def engines(self) -> int:
        """Living engines."""
        return len(self._handles)

    async def sample(self, prompt: Prompt, samplings: Sequence[Sampling], with_pair: bool = False) -> Rollout:
        """Responses to one prompt, from the engine with the fewest outstanding tokens. Call it for many at once.

        Args:
            samplings: what to draw, one after the other in the rollout.
            with_pair: append the data set's chosen and rejected response.

        Raises:
            StaleWeights: new weights were sent and not yet accepted.
            NoEngines: no engine is left, or the second one died as well.
            DeadlineExpired: no answer within `rollout.request_deadline_s`.
            ValueError: the prompt is too long.
        """
        self._require_confirmed()
        for _ in range(2):
            rollout = await self._try_sample(prompt, samplings, with_pair)
            if rollout is not None:
                return rollout
        raise NoEngines(f"prompt {prompt.id} lost two engines in a row. " + " ".join(self._deaths))

    async def probe(self, prompt: Prompt, samplings: Sequence[Sampling]) -> dict[int, Rollout]:
        """The answer of every living engine to the same prompt, by engine; one that dies meanwhile is left out.

        Raises:
            StaleWeights, DeadlineExpired, ValueError: as `sample`.
        """
        if not samplings:
            return {}
        self._require_confirmed()
        engines = list(self._handles)
        rollouts = await asyncio.gather(*(self._ask(index, prompt, samplings, False) for index in engines))
        return {index: rollout for index, rollout in zip(engines, rollouts, strict=True) if rollout is not None}

    def _require_confirmed(self) -> None:
        if self._unconfirmed:
            raise StaleWeights(
                "new weights were sent, and pool.accept has not yet confirmed that every engine holds them"
            )

    async def _try_sample(self, prompt: Prompt, samplings: Sequence[Sampling], with_pair: bool) -> Rollout | None:
        if not self._handles:
            raise NoEngines("no rollout engine is left. " + " ".join(self._deaths))
        tokens = len(prompt.token_ids) + sum(sampling.n * sampling.max_tokens for sampling in samplings)
        index = self._router.acquire(tokens)
        try:
            return await self._ask(index, prompt, samplings, with_pair)
        finally:
            self._router.release(index, tokens)

    async def _ask(self, index: int, prompt: Prompt, samplings: Sequence[Sampling], with_pair: bool) -> Rollout | None:
        """The engine's answer; None if it dies."""
        deadline = self._settings.rollout.request_deadline_s
        try:
            sample = self._handles[index].keep(RolloutEngine.sample, deadline=deadline)
            infos, completions = await sample(prompt, list(samplings), with_pair)
        except (ActorDied, EngineDied) as error:
            self._bury(index, error)
            return None
        require_fresh(index, infos, self._accepted)
        return Rollout(prompt, infos, completions)

    def _bury(self, index: int, error: Exception) -> None:
        self._router.remove(index)
        handle = self._handles.pop(index, None)
        if handle is not None:  # several requests may bring the same news
            info = self._infos[index]
            where = f"process {info.pid} on {info.host}"
            self._deaths.append(f"{handle.name} ({where}) died: {error}; its log there is {info.log}.")

    async def connect(self, session: TransferSession) -> None:
        """Let every living engine join the session; must run while the sender opens it.

        Raises:
            DeadlineExpired: not all had joined within `cluster.publish_deadline_s`.
        """
        offset, calls = 1, []  # rank 0 is the sender
        deadline = self._settings.cluster.publish_deadline_s
        for index, handle in self._handles.items():
            calls.append(handle.ask(RolloutEngine.join_transfer, deadline=deadline)(session, offset))
            offset += self._infos[index].workers
        await asyncio.gather(*calls)
        self._joined = tuple(self._handles)

    async def receive(self, specs: Sequence[WeightSpec], version: int, slot: ModelSlot = "policy") -> None:
        """Let every engine take the weights that the session's sender sends meanwhile. Then call `accept`.

        Args:
            version: of the policy's weights, which completions are marked with; sending the partner does not change it.
            slot: which of the engines' models the weights are for.

        Raises:
            StaleWeights: an engine has died, or a transfer has failed, since `connect`: connect anew.
            DeadlineExpired: an engine had not received all within `cluster.publish_deadline_s`.
            TransferFailed: the transfer failed at an engine.
        """
        self._unconfirmed.add(slot)
        self._attested = ()
        joined, self._joined = self._joined, ()  # a transfer that fails costs the session
        if joined != tuple(self._handles):
            raise StaleWeights(
                f"the weight-transfer session joins engines {list(joined)}, but {list(self._handles)} are alive: "
                "open a new session and call pool.connect (also after a failed transfer). " + " ".join(self._deaths)
            )
        deadline = self._settings.cluster.publish_deadline_s
        calls = (
            handle.ask(RolloutEngine.receive_weights, deadline=deadline)(list(specs), version, slot)
            for handle in self._handles.values()
        )
        self._attested = tuple(await asyncio.gather(*calls))
        self._joined = joined

    def accept(self, version: int, fingerprint: str, slot: ModelSlot = "policy") -> None:
        """Compare what the engines attested with what the sender sent; only then does the pool sample again.

        Args:
            version: of the policy's weights that the engines must hold now, whichever slot was sent.

        Raises:
            StaleWeights: an engine holds other weights, or has not attested, or the slot that was not sent has changed.
        """
        wrong = [a for a in self._attested if (a.version, a.fingerprint) != (version, fingerprint)]
        if wrong or {a.engine for a in self._attested} != set(self._handles):
            seen = ", ".join(f"engine {a.engine}: version {a.version}, {a.fingerprint}" for a in self._attested)
            raise StaleWeights(
                f"the weights of the {slot} were sent with fingerprint {fingerprint} at version {version}, "
                f"but the engines attest {seen or 'nothing'}"
            )
        for attested in self._attested:
            for other, before in self._held[attested.engine].items():
                if other not in self._unconfirmed and attested.held.get(other) != before:
                    raise StaleWeights(
                        f"weights were sent for the {slot}, but in engine {attested.engine} those of the {other} changed too"
                    )
        self._held |= {attested.engine: attested.held for attested in self._attested}
        self._accepted = version
        self._unconfirmed.discard(slot)

    async def sleep(self) -> None:
        """Let the engines that share GPUs with the policy give back their memory. At `rollout.sleep_level` 2 all weights must be
        sent again after `wake`."""
        if self._settings.rollout.sleep_level == 2:
            self._unconfirmed |= self._slots
        await self._all(RolloutEngine.sleep, self._shared)

    async def wake(self) -> None:
        """Undo `sleep`; needed before sampling and before receiving weights."""
        await self._all(RolloutEngine.wake, self._shared)

    async def close(self) -> None:
        """End all engines and their processes."""
        await self._all(RolloutEngine.close)

    async def _all(self, method: Callable[[RolloutEngine], Any], engines: Container[int] | None = None) -> None:
        deadline = self._settings.cluster.publish_deadline_s
        handles = [handle for index, handle in self._handles.items() if engines is None or index in engines]
        await asyncio.gather(*(handle.ask(method, deadline=deadline)() for handle in handles))


def require_fresh(engine: int, infos: Sequence[CompletionInfo], version: int) -> None:
    """Make sure that responses are learned from with the weights that wrote them: the loop is synchronous.

    Args:
        version: of the policy's weights.

    Raises:
        StaleWeights: the engine wrote one of them with other weights, or with several.
    """
    for info in infos:
        if len(info.versions) > 1:
            raise StaleWeights(
                f"engine {engine}: a response was written by the weight versions {list(info.versions)}, but exactly one is possible here"
            )
    stale = {written for info in infos for written in info.versions} - {version}
    if stale:
        raise StaleWeights(f"engine {engine} wrote with version {sorted(stale)}, the policy is at {version}")
