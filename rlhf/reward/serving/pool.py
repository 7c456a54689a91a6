"""All reward servers as one object: spreads questions over them, turns what goes wrong on the way into typed outcomes.

Owns what happens when a server dies (its questions fail, and it is started again where the budget allows), who waits while all have enough
to do, and when the canaries are judged. Who is alive is `rlhf.cluster.lives`' to say, who has the least to do `rlhf.cluster.router`'s. Does
not know how a server judges. Talks to: the runtime (to start servers), the servers through their handles.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.cluster import ActorDied, DeadlineExpired, Handle, Runtime, actor_name, shared_rewards
from rlhf.cluster.devices import threads_env
from rlhf.cluster.lives import Lives, Member, Whereabouts
from rlhf.cluster.router import Router, Ticket
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
    """A place in the pool: the server that stands there, or stood there last.

    Attributes:
        starting: the task that starts another one.
    """

    handle: Handle[RewardServer]
    info: ServerInfo
    starting: asyncio.Task[None] | None = None


class RewardPool:
    """The reward servers of a run. Made by `start`."""

    def __init__(self, runtime: Runtime, settings: Settings, service: bool, servers: list[_Server]):
        self._runtime, self._settings, self._service = runtime, settings, service
        self._servers = servers
        self._router = Router(most=settings.reward.max_waiting)
        self._lives = Lives([server.handle.name for server in servers], settings.reward.restarts)
        for member, server in zip(self._lives.members(), servers, strict=True):
            self._lives.started(member, _whereabouts(server.info))
        self._errors = _remote_errors(runtime)
        self._start_errors: tuple[type[Exception], ...] = (UserError, ActorDied, DeadlineExpired, *self._errors)
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
        servers = [_Server(handle, info) for handle, info in zip(handles, infos, strict=True)]
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
        ticket = await self._seat(n)
        return await self._ask(ticket, RewardServer.judge, rollout.prompt, rollout.completions)

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
        ticket = None if self._next.locked() else self._acquire(len(responses))
        if ticket is None:
            raise Busy("all reward servers have enough to do")
        return await self._ask(ticket, RewardServer.judge_texts, prompt, list(responses))

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

        async def ask(member: Member) -> Health | None:
            if self._lives.state(member) != "ready":
                return None
            try:
                return await self._handle(member).ask(RewardServer.health, deadline=HEALTH_S)()
            except DeadlineExpired:
                return None
            except ActorDied as error:
                self._died(member, error)
                return None

        answers = await asyncio.gather(*(ask(member) for member in self._lives.members()))
        return {server.handle.name: answer for server, answer in zip(self._servers, answers, strict=True)}

    async def fingerprints(self) -> dict[str, str | None]:
        """Server name -> hash of its weights now. They must always equal those in `infos`."""
        deadline = self._settings.cluster.startup_s
        live = [self._handle(member) for member in self._lives.alive()]
        prints = await asyncio.gather(*(handle.ask(RewardServer.fingerprint, deadline=deadline)() for handle in live))
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
        turned: set[Member] = set()
        while True:
            await asyncio.gather(*(server.starting for server in self._servers if server.starting is not None))
            left = set(self._lives.alive()) - turned
            if not left:
                return
            await asyncio.gather(*(self._turn_one(member, method) for member in sorted(left)))
            turned |= left

    async def _turn_one(self, member: Member, method: Callable[[RewardServer], Coroutine[Any, Any, None]]) -> None:
        try:
            await self._handle(member).ask(method, deadline=self._settings.cluster.startup_s)()
        except ActorDied as error:
            self._died(member, error)

    async def close(self) -> None:
        """Let the servers finish. Their processes end with the runtime."""
        for server in self._servers:
            if server.starting is not None:
                server.starting.cancel()
        live = [self._handle(member) for member in self._lives.alive()]
        calls = (handle.ask(RewardServer.close, deadline=CLOSE_S)() for handle in live)
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, (ActorDied, DeadlineExpired)):
                raise result

    async def _ask(
        self,
        ticket: Ticket,
        method: Callable[[RewardServer, Prompt, Any], Coroutine[Any, Any, Feedback]],
        prompt: Prompt,
        responses: Any,
    ) -> Feedback:
        """The answer of the server that has been given these responses, as many as the ticket's load."""
        handle, deadline, n = self._handle(ticket.member), self._settings.reward.deadline_s, ticket.load
        try:
            return await handle.ask(method, deadline=deadline + GRACE_S)(prompt, responses)
        except DeadlineExpired:
            return _all(prompt, n, TimedOut(deadline))
        except ActorDied as error:
            self._died(ticket.member, error)
            return _all(prompt, n, failure(error))
        except self._errors as error:  # the completions were lost with their owner, or the server has a bug
            return _all(prompt, n, Failed(f"{handle.name}: {_cause(error)}"))
        finally:
            self._router.release(ticket)
            self._changed.set()

    async def _seat(self, n: int) -> Ticket:
        """A server takes `n` more responses, as soon as there is one that may."""
        async with self._next:
            while (ticket := self._acquire(n)) is None:
                self._changed.clear()
                await self._changed.wait()
            return ticket

    def _acquire(self, n: int) -> Ticket | None:
        """The least loaded server takes `n` more responses, if it may."""
        alive = self._lives.alive()
        if not alive and not self._lives.starting():
            raise NoServerLeft(
                f"all {len(self._servers)} reward servers have died: {self._lives.account()} Look for a crash or "
                "for memory in their logs (ray logs), then continue the run with --resume."
            )
        return self._router.acquire(alive, n)

    def _handle(self, member: Member) -> Handle[RewardServer]:
        return self._servers[member.place].handle

    def _died(self, member: Member, error: ActorDied) -> None:
        """Note a death, which several callers may report, and start another server in its place if that may be."""
        news = self._lives.died(member, _first_line(str(error)), when=time.time())
        if news is not None and self._lives.may_restart(member):
            starting = self._restart(self._lives.restarting(member))
            self._servers[member.place].starting = asyncio.ensure_future(starting)

    async def _restart(self, member: Member) -> None:
        server = self._servers[member.place]
        try:
            handle = _launch(self._runtime, self._settings, member.place, self._service)
            info = await _ready(handle, self._settings)
        except self._start_errors as error:  # another try would most likely end alike
            self._lives.died(member, _first_line(_cause(error)), when=time.time())
        else:
            if info.fingerprint == server.info.fingerprint:
                server.handle, server.info = handle, info
                self._lives.started(member, _whereabouts(info))
            else:
                reason = f"was started again and judges with {info.fingerprint} instead of {server.info.fingerprint}"
                self._lives.lied(member, reason, when=time.time())
        finally:
            server.starting = None
            self._changed.set()

    async def _judge_canaries(self, watch: Watch) -> dict[str, list[Feedback]]:
        """Every live server's feedback on each canary. A server that dies over it is left out."""

        async def ask(member: Member) -> list[Feedback]:
            found: list[Feedback] = []
            for start in range(0, len(watch.canaries), CANARIES_AT_ONCE):
                if self._lives.state(member) == "dead":
                    break
                some = watch.canaries[start : start + CANARIES_AT_ONCE]
                tickets = [self._router.assign(member, 2) for _ in some]
                asked = (
                    self._ask(ticket, RewardServer.judge_texts, one.prompt, [one.good, one.bad])
                    for ticket, one in zip(tickets, some, strict=True)
                )
                found += await asyncio.gather(*asked)
            return found

        asked = self._lives.alive()
        answers = dict(zip(asked, await asyncio.gather(*(ask(member) for member in asked)), strict=True))
        return {self._handle(member).name: answers[member] for member in asked if member in self._lives.alive()}


def _whereabouts(info: ServerInfo) -> Whereabouts:
    return Whereabouts(info.host, info.pid)


def _launch(runtime: Runtime, settings: Settings, index: int, service: bool) -> Handle[RewardServer]:
    env = {} if runtime.local else threads_env(settings.cluster, settings.reward.servers)
    start = runtime.start(actor_name("reward", index), RewardServer, env=env)
    return start(settings, index, runtime.local, service, secrets())


async def _ready(handle: Handle[RewardServer], settings: Settings) -> ServerInfo:
    return await handle.ask(RewardServer.ready, deadline=settings.cluster.startup_s)()


def _cause(error: Exception) -> str:
    """Ray wraps an actor's exception together with its traceback; the message itself is what helps."""
    return str(getattr(error, "cause", error))


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _remote_errors(runtime: Runtime) -> tuple[type[Exception], ...]:
    """What a remote call may raise besides the handle's own errors. In this process nothing is remote: bugs surface."""
    if runtime.local:
        return ()
    from ray.exceptions import RayError

    return (RayError,)


def _all(prompt: Prompt, n: int, outcome: Outcome) -> Feedback:
    return Feedback(prompt.id, (outcome,) * n)
