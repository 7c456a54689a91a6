"""The rollout pool: all engines as one, from which the loop asks for responses.

Owns the engines' handles, and calls them. What happens is told to three pure parts, which decide: who is alive (`rlhf.cluster.lives`),
who has the least to do (`rlhf.cluster.router`), who may sample with what it holds (`rlhf.transfer.versions`). Does not know the policy: the
loop tells it which shipment comes and with which fingerprint it was sent. While weights are under way, requests wait, and answers too. A
request whose engine dies is asked once more of another one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rlhf.cluster import ActorDied, DeadlineExpired, Handle, Runtime, actor_name, shared_engines, uses_gpu
from rlhf.cluster.lives import Lives, Member, Whereabouts
from rlhf.cluster.router import Router
from rlhf.config.settings import Settings
from rlhf.engines.engine import EngineDied
from rlhf.engines.sampling import Sampling
from rlhf.rollout.engine import EngineInfo, RolloutEngine
from rlhf.rollout.spec import rollout_environment
from rlhf.transfer import Backend, TransferSession
from rlhf.transfer.choice import backend_of
from rlhf.transfer.versions import StaleWeights, Versions
from rlhf.types import ModelSlot, Prompt, Rollout, Shipment

Answer = TypeVar("Answer")


class NoEngines(RuntimeError):
    """Every engine has died."""


class RolloutPool:
    """Engines that answer as one. Make it with `start`."""

    def __init__(
        self, settings: Settings, backend: Backend, handles: list[Handle[RolloutEngine]], infos: list[EngineInfo]
    ):
        self.backend = backend
        self._settings = settings
        self._handles, self._infos = handles, infos
        self._shared = shared_engines(settings, debug=backend == "local")
        self._router = Router()
        self._lives = Lives([handle.name for handle in handles])
        engines = dict(zip(self._lives.members(), infos, strict=True))
        for member, info in engines.items():
            self._lives.started(member, Whereabouts(info.host, info.pid, info.log))
        self._versions = Versions({member: info.held for member, info in engines.items()})
        self._settled = asyncio.Event()  # not `Versions.publishing`
        self._settled.set()

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
        return sum(self._infos[member.place].workers for member in self._lives.alive())

    @property
    def engines(self) -> int:
        """Living engines."""
        return len(self._lives.alive())

    @property
    def writing(self) -> dict[str, int]:
        """Prompts that engines write responses to now -> place of the engine."""
        return {prompt: engine.place for engine in self._lives.alive() for prompt in self._router.holding(engine)}

    @property
    def missing(self) -> tuple[ModelSlot, ...]:
        """The slots whose weights must be sent before all engines may sample, the policy's first."""
        return self._versions.missing()

    async def sample(self, prompt: Prompt, samplings: Sequence[Sampling], with_pair: bool = False) -> Rollout:
        """Responses to one prompt, from the engine with the fewest outstanding tokens. Call it for many at once.

        While weights are sent, from `receive` to `accept`, it waits. A request that was under way before goes on, and its answer waits.

        Args:
            samplings: what to draw, one after the other in the rollout.
            with_pair: append the data set's chosen and rejected response.

        Raises:
            StaleWeights: the engines do not hold the weights that were sent last, or weights that were not accepted may have written some
                of it.
            NoEngines: no engine is left, or the second one died as well.
            DeadlineExpired: no answer within `rollout.request_deadline_s`.
            ValueError: the prompt is too long.
        """
        tokens = len(prompt.token_ids) + sum(sampling.n * sampling.max_tokens for sampling in samplings)
        for _ in range(2):
            await self._settle()
            ticket = self._router.acquire(self._samplers(), tokens, prompt.id)
            assert ticket is not None, "a router without a limit always finds one of several"
            begun = self._versions.version, self._versions.failures
            try:
                rollout = await self._ask(ticket.member, prompt, samplings, with_pair)
            finally:
                self._router.release(ticket)
            if rollout is not None:
                await self._settle()
                self._require_accepted(rollout, *begun)
                return rollout
        raise NoEngines(f"prompt {prompt.id} lost two engines in a row. {self._lives.account()}")

    async def probe(self, prompt: Prompt, samplings: Sequence[Sampling]) -> dict[int, Rollout]:
        """The answer of every living engine to the same prompt, by engine; one that dies meanwhile is left out. The present weights have
        written all of it.

        Raises:
            StaleWeights, NoEngines, DeadlineExpired, ValueError: as `sample`; StaleWeights also if weights came meanwhile.
        """
        if not samplings:
            return {}
        await self._settle()
        engines, sent, failures = self._samplers(), self._versions.shipments, self._versions.failures
        rollouts = await asyncio.gather(*(self._ask(engine, prompt, samplings, False) for engine in engines))
        await self._settle()
        if self._versions.shipments != sent:
            raise StaleWeights(f"weights were sent while the engines answered a probe with prompt {prompt.id}")
        answered = {engine.place: one for engine, one in zip(engines, rollouts, strict=True) if one is not None}
        for rollout in answered.values():
            self._require_accepted(rollout, self._versions.version, failures)
        return answered

    async def _settle(self) -> None:
        """Wait until no weights are under way.

        Raises:
            DeadlineExpired: they were neither accepted nor refused within `cluster.publish_deadline_s`.
        """
        deadline = self._settings.cluster.publish_deadline_s
        while not self._settled.is_set():
            try:
                async with asyncio.timeout(deadline):
                    await self._settled.wait()
            except TimeoutError:
                raise DeadlineExpired(
                    f"a request waited {deadline:g} s for weights that were sent to the engines, and pool.accept has not confirmed them"
                ) from None

    def _require_accepted(self, rollout: Rollout, begun: int, failures: int) -> None:
        """Make sure that only accepted weights have written this.

        Args:
            begun, failures: `Versions.version` and `Versions.failures` as it was asked for.

        Raises:
            StaleWeights: others have, or may have.
        """
        where = f"engine {rollout.engine}, prompt {rollout.prompt.id}"
        if self._versions.failures != failures:
            raise StaleWeights(
                f"{where}: weights that were sent meanwhile were not accepted, and may have written some of it"
            )
        try:
            for info in rollout.infos:
                self._versions.require_accepted(info.spans, begun)
        except StaleWeights as error:
            raise StaleWeights(f"{where}: {error}") from None

    def _samplers(self) -> list[Member]:
        """Living engines that hold what was sent last; at least one."""
        alive = self._lives.alive()
        if not alive:
            raise NoEngines(f"no rollout engine is left. {self._lives.account()}")
        samplers = [engine for engine in alive if self._versions.may_sample(engine)]
        if not samplers:
            raise StaleWeights(
                "new weights were sent, and pool.accept has not yet confirmed that every engine holds them"
            )
        return samplers

    async def _ask(
        self, engine: Member, prompt: Prompt, samplings: Sequence[Sampling], with_pair: bool
    ) -> Rollout | None:
        """The engine's answer; None if it dies."""
        deadline = self._settings.rollout.request_deadline_s
        sample = self._handles[engine.place].keep(RolloutEngine.sample, deadline=deadline)
        try:
            infos, completions = await self._or_its_death(engine, sample(prompt, list(samplings), with_pair))
        except (ActorDied, EngineDied):
            return None
        return Rollout(prompt, infos, completions, engine.place)

    def new_session(self, host: str, port: int) -> TransferSession:
        """A session for weights with all living engines, under a new epoch: then `connect`, while the sender opens it.

        Args:
            host, port: of the sender: its address, and a free port there.
        """
        workers = {engine: self._infos[engine.place].workers for engine in self._lives.alive()}
        with self._publishing():  # a publication in the session before has failed
            membership = self._versions.reopen(workers)
        timeout = self._settings.cluster.publish_deadline_s
        return TransferSession(self.backend, host, port, membership.world_size, timeout, membership.epoch)

    async def connect(self, session: TransferSession) -> None:
        """Let every living engine join the session; must run while the sender opens it.

        Raises:
            StaleWeights: there is a newer session.
            DeadlineExpired: not all had joined within `cluster.publish_deadline_s`.
        """
        offsets = self._versions.membership(session.epoch).offsets
        deadline = self._settings.cluster.publish_deadline_s
        join = RolloutEngine.join_transfer
        await self._each(
            {
                engine: self._handles[engine.place].ask(join, deadline=deadline)(session, offset)
                for engine, offset in offsets.items()
            }
        )
        self._versions.joined(session.epoch)

    async def receive(self, shipment: Shipment) -> None:
        """Let every engine take the weights that the session's sender sends meanwhile. Then call `accept`.

        Args:
            shipment: completions are marked with the version of the policy's last one; sending the partner does not change it.

        Raises:
            StaleWeights: an engine has died, or a transfer has failed, since `connect`: connect anew.
            DeadlineExpired: an engine had not received all within `cluster.publish_deadline_s`.
            TransferFailed: the transfer failed at an engine.
        """
        with self._publishing():
            try:
                self._versions.shipping(shipment)
            except StaleWeights as error:
                raise StaleWeights(f"{error} {self._lives.account()}".rstrip()) from None
        deadline, receive = self._settings.cluster.publish_deadline_s, RolloutEngine.receive_weights
        with self._publishing():
            attestations = await self._each(
                {
                    engine: self._handles[engine.place].ask(receive, deadline=deadline)(shipment)
                    for engine in self._lives.alive()
                }
            )
            self._versions.attested(attestations)

    def accept(self, shipment: Shipment, fingerprint: str) -> None:
        """Compare what the engines attested with what the sender sent; only then does the pool sample again.

        Raises:
            StaleWeights: an engine holds other weights, or has not attested, or the slot that was not sent has changed.
        """
        with self._publishing():
            self._versions.accept(shipment, fingerprint)

    @contextmanager
    def _publishing(self) -> Iterator[None]:
        """A part of a publication, or the end of one: if it fails, the publication has failed. Those who wait are told how it stands."""
        try:
            yield
        except BaseException:
            self._versions.broke_off()
            raise
        finally:
            (self._settled.clear if self._versions.publishing else self._settled.set)()

    async def offload(self) -> None:
        """Let the engines that share GPUs with the policy give back their memory. At `rollout.sleep_level` 2 all their weights must be
        sent again after `reload`."""
        if self._settings.rollout.sleep_level == 2:
            self._versions.lost([engine for engine in self._lives.alive() if engine.place in self._shared])
        await self._all(RolloutEngine.offload, self._shared)

    async def reload(self) -> None:
        """Undo `offload`; needed before sampling and before receiving weights."""
        await self._all(RolloutEngine.reload, self._shared)

    async def close(self) -> None:
        """End all engines and their processes."""
        await self._all(RolloutEngine.close)

    async def _all(self, method: Callable[[RolloutEngine], Any], places: Container[int] | None = None) -> None:
        deadline = self._settings.cluster.publish_deadline_s
        engines = [engine for engine in self._lives.alive() if places is None or engine.place in places]
        await self._each({engine: self._handles[engine.place].ask(method, deadline=deadline)() for engine in engines})

    async def _each(self, calls: Mapping[Member, Awaitable[Answer]]) -> dict[Member, Answer]:
        """What each of these engines answers. A death is noted, also one that another engine's error preceded."""
        answers = await asyncio.gather(*(self._or_its_death(engine, call) for engine, call in calls.items()))
        return dict(zip(calls, answers, strict=True))

    async def _or_its_death(self, engine: Member, call: Awaitable[Answer]) -> Answer:
        """What the engine answers; a death is noted before it is raised."""
        try:
            return await call
        except (ActorDied, EngineDied) as error:
            holding = self._router.holding(engine)
            self._lives.died(engine, str(error), when=time.time(), holding=holding)
            self._versions.died(engine)
            raise
