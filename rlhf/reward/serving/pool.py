"""All reward servers as one object: spreads questions over them, turns what goes wrong on the way into typed outcomes.

Owns how much a server is given (`reward.max_waiting`), what happens when one dies (its questions fail, it is started again up to
`reward.restarts` times), and when the canaries are judged. Does not know how a server judges. Talks to: the runtime (to start
servers), the servers through their handles.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.cluster import ActorDied, DeadlineExpired, Handle, Runtime, actor_name, shared_rewards
from rlhf.cluster.devices import threads_env
from rlhf.config import Settings
from rlhf.config.loader import UserError
from rlhf.data.assets import resolve
from rlhf.reward.errors import Busy, NoServerLeft, RewardError, TooMany
from rlhf.reward.scoring import failure
from rlhf.reward.serving.canaries import Watch, load_canaries
from rlhf.reward.serving.server import Health, RewardServer, ServerInfo, secrets
from rlhf.types import Failed, Feedback, Outcome, Prompt, Rollout, TimedOut

# A server keeps the deadline itself, response by response. The pool waits a little longer, for the way there and back,
# so that only a server that answers nothing at all loses a whole rollout.
GRACE_S = 5.0
CLOSE_S = 5.0
HEALTH_S = 5.0
CANARIES_AT_ONCE = 16


@dataclass
class _Server:
    """A server as the pool sees it.

    Attributes:
        outstanding: responses that it has got and not answered.
        starting: the task that starts it again.
    """

    index: int
    handle: Handle[RewardServer]
    info: ServerInfo
    live: bool = True
    outstanding: int = 0
    restarts: int = 0
    starting: asyncio.Task[None] | None = None


class RewardPool:
    """The reward servers of a run. Made by `start`."""

    def __init__(self, runtime: Runtime, settings: Settings, service: bool, servers: list[_Server]):
        self._runtime, self._settings, self._service = runtime, settings, service
        self._servers = servers
        self._errors = _remote_errors(runtime)
        self._start_errors: tuple[type[Exception], ...] = (UserError, ActorDied, DeadlineExpired, *self._errors)
        self._deaths: list[str] = []
        self._next = asyncio.Lock()  # first come, first served
        self._changed = asyncio.Event()
        self._watch: Watch | None = None

    @classmethod
    async def start(cls, runtime: Runtime, settings: Settings, service: bool = False) -> RewardPool:
        """Start `reward.servers` servers and wait until all are ready, and have judged the canaries.

        Args:
            service: texts will be judged, no completions.

        Raises:
            RewardError: the function or the model cannot be used, or judges the canaries wrongly.
            DeadlineExpired, ActorDied: a server did not start.
        """
        canaries = None if settings.reward.canaries is None else load_canaries(resolve(settings.reward.canaries))
        handles = [_launch(runtime, settings, index, service) for index in range(settings.reward.servers)]
        try:
            infos = await asyncio.gather(*(_ready(handle, settings) for handle in handles))
        except UserError as error:
            raise RewardError(_cause(error)) from None
        servers = [_Server(index, *pair) for index, pair in enumerate(zip(handles, infos, strict=True))]
        pool = cls(runtime, settings, service, servers)
        if canaries is not None:
            pool._watch = Watch(settings.reward, canaries)
            pool._watch.begin(await pool._judge_canaries(pool._watch))
        return pool

    @property
    def infos(self) -> list[ServerInfo]:
        """Of all servers, as they were when they became ready."""
        return [server.info for server in self._servers]

    async def judge(self, rollout: Rollout) -> Feedback:
        """An outcome for every completion. A reward that fails does not raise; it is `Invalid`, `Failed` or `TimedOut`.

        Waits while all servers have enough to do.

        Raises:
            NoServerLeft: all servers have died.
        """
        n = len(rollout.infos)
        server = await self._seat(n)
        return await self._ask(server, RewardServer.judge, rollout.prompt, rollout.completions, n)

    async def judge_texts(self, prompt: Prompt, responses: Sequence[str]) -> Feedback:
        """The same for responses as text, without waiting.

        Raises:
            TooMany: no server may hold so many.
            Busy: all servers have enough to do.
            NoServerLeft: all servers have died.
        """
        most = self._settings.reward.max_waiting
        if len(responses) > most:
            raise TooMany(
                f"the request has {len(responses):,} responses, and a server holds at most {most:,} (`reward.max_waiting` of the service); "
                "ask about fewer at once"
            )
        server = None if self._next.locked() else self._room(len(responses))
        if server is None:
            raise Busy("all reward servers have enough to do")
        server.outstanding += len(responses)
        return await self._ask(server, RewardServer.judge_texts, prompt, list(responses), len(responses))

    async def check(self, step: int) -> dict[str, float]:
        """What the canaries say, for the record, every `reward.canaries_every` steps; nothing in between.

        Raises:
            CanaryAlarm: a server does not judge as it did at the start.
        """
        if self._watch is None or step % self._settings.reward.canaries_every:
            return {}
        return self._watch.compare(await self._judge_canaries(self._watch))

    async def health(self) -> dict[str, Health | None]:
        """Server -> what it has done; None for one that does not answer."""

        async def ask(server: _Server) -> Health | None:
            try:
                return await server.handle.ask(RewardServer.health, deadline=HEALTH_S)() if server.live else None
            except DeadlineExpired:
                return None
            except ActorDied as error:
                self._bury(server, server.handle, error)
                return None

        answers = await asyncio.gather(*(ask(server) for server in self._servers))
        return {server.handle.name: answer for server, answer in zip(self._servers, answers, strict=True)}

    async def fingerprints(self) -> dict[str, str | None]:
        """Server name -> hash of its weights now. They must always equal those in `infos`."""
        patience = self._settings.cluster.startup_s
        live = [server.handle for server in self._servers if server.live]
        prints = await asyncio.gather(*(handle.ask(RewardServer.fingerprint, deadline=patience)() for handle in live))
        return {handle.name: value for handle, value in zip(live, prints, strict=True)}

    async def offload(self) -> None:
        """Move reward models to host memory where they share GPUs with the policy, whose turn it is: after all that the servers are
        doing, a new start among it.

        Raises:
            DeadlineExpired: a server does not answer.
        """
        await self._turn(RewardServer.offload)

    async def reload(self) -> None:
        """Undo `offload`."""
        await self._turn(RewardServer.reload)

    async def _turn(self, method: Callable[[RewardServer], Coroutine[Any, Any, None]]) -> None:
        if not shared_rewards(self._settings, self._runtime.local):
            return
        turned: list[Handle[RewardServer]] = []
        while True:
            await asyncio.gather(*(server.starting for server in self._servers if server.starting is not None))
            left = [server for server in self._servers if server.live and server.handle not in turned]
            if not left:
                return
            await asyncio.gather(*(self._turn_one(server, method) for server in left))
            turned += [server.handle for server in left]

    async def _turn_one(self, server: _Server, method: Callable[[RewardServer], Coroutine[Any, Any, None]]) -> None:
        handle = server.handle
        try:
            await handle.ask(method, deadline=self._settings.cluster.startup_s)()
        except ActorDied as error:
            self._bury(server, handle, error)

    async def close(self) -> None:
        """Let the servers finish. Their processes end with the runtime."""
        for server in self._servers:
            if server.starting is not None:
                server.starting.cancel()
        live = [server.handle for server in self._servers if server.live]
        calls = (handle.ask(RewardServer.close, deadline=CLOSE_S)() for handle in live)
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, (ActorDied, DeadlineExpired)):
                raise result

    async def _ask(
        self,
        server: _Server,
        method: Callable[[RewardServer, Prompt, Any], Coroutine[Any, Any, Feedback]],
        prompt: Prompt,
        responses: Any,
        n: int,
    ) -> Feedback:
        """The answer of a server that has been given `n` more responses."""
        handle, deadline = server.handle, self._settings.reward.deadline_s
        try:
            return await handle.ask(method, deadline=deadline + GRACE_S)(prompt, responses)
        except DeadlineExpired:
            return _all(prompt, n, TimedOut(deadline))
        except ActorDied as error:
            self._bury(server, handle, error)
            return _all(prompt, n, failure(error))
        except self._errors as error:  # the completions were lost with their owner, or the server has a bug
            return _all(prompt, n, Failed(f"{handle.name}: {_cause(error)}"))
        finally:
            if server.handle is handle:
                server.outstanding -= n
            self._changed.set()

    async def _seat(self, n: int) -> _Server:
        """A server that takes `n` more responses, as soon as there is one."""
        async with self._next:
            while (server := self._room(n)) is None:
                self._changed.clear()
                await self._changed.wait()
            server.outstanding += n
            return server

    def _room(self, n: int) -> _Server | None:
        """The live server with the fewest outstanding responses, the first of equals, if it takes `n` more."""
        live = [server for server in self._servers if server.live]
        if not live and not any(server.starting for server in self._servers):
            raise NoServerLeft(
                f"all {len(self._servers)} reward servers have died: {'; '.join(self._deaths)}. Look for a crash or "
                "for memory in their logs (ray logs), then continue the run with --resume."
            )
        server = min(live, key=lambda server: (server.outstanding, server.index), default=None)
        if server is None or (server.outstanding and server.outstanding + n > self._settings.reward.max_waiting):
            return None
        return server

    def _bury(self, server: _Server, handle: Handle[RewardServer], error: ActorDied) -> None:
        """Note a death, which several of its callers may report, and start the server again if it may be."""
        if not server.live or server.handle is not handle:
            return
        server.live = False
        self._deaths.append(str(error).splitlines()[0])
        if server.restarts < self._settings.reward.restarts:
            server.restarts += 1
            server.starting = asyncio.ensure_future(self._restart(server))

    async def _restart(self, server: _Server) -> None:
        try:
            handle = _launch(self._runtime, self._settings, server.index, self._service)
            info = await _ready(handle, self._settings)
        except self._start_errors as error:
            self._deaths.append(f"{server.handle.name} could not be started again: {_cause(error)}".splitlines()[0])
        else:
            if info.fingerprint == server.info.fingerprint:
                server.handle, server.info, server.live, server.outstanding = handle, info, True, 0
            else:
                self._deaths.append(
                    f"{handle.name} was started again and judges with {info.fingerprint} instead of {server.info.fingerprint}"
                )
        finally:
            server.starting = None
            self._changed.set()

    async def _judge_canaries(self, watch: Watch) -> dict[str, list[Feedback]]:
        """Every live server's feedback on each canary. A server that dies over it is left out."""

        async def ask(server: _Server) -> list[Feedback]:
            found: list[Feedback] = []
            for start in range(0, len(watch.canaries), CANARIES_AT_ONCE):
                some = watch.canaries[start : start + CANARIES_AT_ONCE]
                server.outstanding += 2 * len(some)
                asked = (
                    self._ask(server, RewardServer.judge_texts, one.prompt, [one.good, one.bad], 2) for one in some
                )
                found += await asyncio.gather(*asked)
            return found

        live = [server for server in self._servers if server.live]
        answers = await asyncio.gather(*(ask(server) for server in live))
        return {server.handle.name: found for server, found in zip(live, answers, strict=True) if server.live}


def _launch(runtime: Runtime, settings: Settings, index: int, service: bool) -> Handle[RewardServer]:
    env = {} if runtime.local else threads_env(settings.cluster, settings.reward.servers)
    start = runtime.start(actor_name("reward", index), RewardServer, env=env)
    return start(settings, index, runtime.local, service, secrets())


async def _ready(handle: Handle[RewardServer], settings: Settings) -> ServerInfo:
    return await handle.ask(RewardServer.ready, deadline=settings.cluster.startup_s)()


def _cause(error: Exception) -> str:
    """Ray wraps an actor's exception together with its traceback; the message itself is what helps."""
    return str(getattr(error, "cause", error))


def _remote_errors(runtime: Runtime) -> tuple[type[Exception], ...]:
    """What a remote call may raise besides the handle's own errors. In this process nothing is remote: bugs surface."""
    if runtime.local:
        return ()
    from ray.exceptions import RayError

    return (RayError,)


def _all(prompt: Prompt, n: int, outcome: Outcome) -> Feedback:
    return Feedback(prompt.id, (outcome,) * n)
