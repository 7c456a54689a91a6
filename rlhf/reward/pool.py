"""All reward servers as one object: spreads rollouts over them, turns what goes wrong on the way into typed outcomes.

Does not know how a server judges. Talks to: the runtime (to start servers), the servers through their handles.
"""

from __future__ import annotations

import asyncio

from rlhf.cluster import ActorDied, DeadlineExpired, Handle, Runtime
from rlhf.config import Settings
from rlhf.reward.errors import NoServerLeft, RewardError
from rlhf.reward.scoring import failure
from rlhf.reward.server import RewardServer, ServerInfo
from rlhf.types import Failed, Feedback, Outcome, Rollout, TimedOut

# A server keeps the deadline itself, response by response. The pool waits a little longer, for the way there and back,
# so that only a server that answers nothing at all loses a whole rollout.
GRACE_S = 5.0
CLOSE_S = 5.0


class RewardPool:
    """The reward servers of a run. Made by `start`."""

    def __init__(self, settings: Settings, handles: list[Handle], infos: list[ServerInfo], errors: tuple[type, ...]):
        self._settings = settings
        self._errors = errors
        self._handles = handles
        self._outstanding = {index: 0 for index in range(len(handles))}
        self._deaths: list[str] = []
        self.infos = infos

    @classmethod
    async def start(cls, runtime: Runtime, settings: Settings) -> RewardPool:
        """Start `reward.servers` servers and wait until all are ready.

        Raises:
            RewardError: the function or the model cannot be used.
            DeadlineExpired, ActorDied: a server did not start.
        """
        reward, patience = settings.reward, settings.cluster.startup_deadline_s
        handles = [
            runtime.start(f"reward-{index}", RewardServer, settings, index, runtime.local)
            for index in range(reward.servers)
        ]
        try:
            infos = await asyncio.gather(*(handle.call("ready", deadline=patience) for handle in handles))
        except RewardError as error:
            # Ray wraps an actor's exception together with its traceback; the message itself is what helps.
            raise RewardError(str(getattr(error, "cause", error))) from None
        return cls(settings, handles, list(infos), _remote_errors(runtime))

    async def judge(self, rollout: Rollout) -> Feedback:
        """An outcome for every completion. A reward that fails does not raise; it is `Invalid`, `Failed` or `TimedOut`.

        Raises:
            NoServerLeft: all servers have died.
        """
        index = self._pick()
        handle, deadline = self._handles[index], self._settings.reward.deadline_s
        self._outstanding[index] += len(rollout.infos)
        try:
            return await handle.call("judge", rollout.prompt, rollout.completions, deadline=deadline + GRACE_S)
        except DeadlineExpired:
            return _all(rollout, TimedOut(deadline))
        except ActorDied as error:
            self._bury(index, error)
            return _all(rollout, failure(error))
        except self._errors as error:  # the completions were lost with their owner, or the server has a bug
            return _all(rollout, Failed(f"{handle.name}: {getattr(error, 'cause', error)}"))
        finally:
            if index in self._outstanding:
                self._outstanding[index] -= len(rollout.infos)

    async def fingerprints(self) -> dict[str, str | None]:
        """Server name -> hash of its weights now. They must equal those in `infos` for ever."""
        patience = self._settings.cluster.startup_deadline_s
        live = [self._handles[index] for index in self._outstanding]
        prints = await asyncio.gather(*(handle.call("fingerprint", deadline=patience) for handle in live))
        return {handle.name: value for handle, value in zip(live, prints, strict=True)}

    async def close(self) -> None:
        """Let the servers finish. Their processes end with the runtime."""
        live = [self._handles[index] for index in self._outstanding]
        calls = (handle.call("close", deadline=CLOSE_S) for handle in live)
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, (ActorDied, DeadlineExpired)):
                raise result

    def _pick(self) -> int:
        """The live server with the fewest outstanding responses, the first of equals."""
        if not self._outstanding:
            raise NoServerLeft(
                f"all {len(self._handles)} reward servers have died: {'; '.join(self._deaths)}. Look for a crash or "
                "for memory in their logs (ray logs), then continue the run with --resume."
            )
        return min(self._outstanding, key=lambda index: (self._outstanding[index], index))

    def _bury(self, index: int, error: ActorDied) -> None:
        if self._outstanding.pop(index, None) is not None:
            self._deaths.append(str(error).splitlines()[0])


def _remote_errors(runtime: Runtime) -> tuple[type, ...]:
    """What a remote call may raise besides the handle's own errors. In this process nothing is remote: bugs surface."""
    if runtime.local:
        return ()
    from ray.exceptions import RayError

    return (RayError,)


def _all(rollout: Rollout, outcome: Outcome) -> Feedback:
    return Feedback(rollout.prompt.id, (outcome,) * len(rollout.infos))
