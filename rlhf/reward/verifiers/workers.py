"""Worker processes for verifiers: several responses at once, each with a hard limit, and a fresh process for one that died.

Knows nothing of what is verified. Talks to `worker` over pipes. Threads wait for the processes, so that any event loop will do.
"""

from __future__ import annotations

import asyncio
import json
import queue
import select
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlhf.reward.errors import RewardError
from rlhf.reward.verifiers.sandbox import SandboxError, require_sandbox, start_shut_off
from rlhf.reward.verifiers.worker import APART
from rlhf.types import Failed, Invalid, TimedOut

WORKER = "rlhf.reward.verifiers.worker"
GRACE_S = 5.0
"""How much longer a worker may take that ends its own verdicts in time."""


class WorkerPool:
    """`n` workers of one verifier. Made by `start`."""

    def __init__(self, name: str, n: int):
        """The idle ones are in a queue, with None in the place of one that could not be replaced."""
        self._name = name
        self._threads = ThreadPoolExecutor(n, thread_name_prefix=f"verifier-{name}")
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._all: set[_Worker] = set()
        self._closed = False

    @classmethod
    async def start(cls, name: str, n: int) -> WorkerPool:
        """All workers, ready.

        Raises:
            RewardError: the verifier cannot work on this machine.
        """
        pool = cls(name, n)
        loop = asyncio.get_running_loop()
        try:
            if name in (*APART, "code"):
                await loop.run_in_executor(pool._threads, _require_sandbox, name)
            hired = await asyncio.gather(*(loop.run_in_executor(pool._threads, pool._hire) for _ in range(n)))
        except RewardError:
            pool.close()
            raise
        for worker in hired:
            pool._idle.put(worker)
        return pool

    async def verify(self, prompt: str, response: str, payload: dict[str, Any], limit_s: float) -> Any:
        """A worker's number, or `Invalid`, `Failed` or `TimedOut`. Waits until a worker is free.

        Args:
            limit_s: how long the worker may take, in seconds.
        """
        request = {"prompt": prompt, "response": response, "payload": payload, "limit_s": limit_s}
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._verify, request)

    def _verify(self, request: dict[str, Any]) -> Any:
        worker = self._idle.get()
        try:
            if worker is None:
                worker = self._hire()
            return worker.ask(request)
        except RewardError as error:
            return Failed(str(error))
        except _WorkerEnded as error:
            self._all.discard(worker)
            worker = self._replacement()
            if error.timed_out:
                return TimedOut(request["limit_s"])
            return Failed(f"the worker of the verifier {self._name} ended with status {error.status}")
        finally:
            self._idle.put(worker)

    def _replacement(self) -> _Worker | None:
        try:
            return None if self._closed else self._hire()
        except RewardError:
            return None  # whoever comes next tries again, and tells

    def _hire(self) -> _Worker:
        worker = _Worker(self._name)
        self._all.add(worker)
        return worker

    def close(self) -> None:
        """End the workers, whatever they are at."""
        self._closed = True
        for worker in list(self._all):
            worker.end()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _require_sandbox(name: str) -> None:
    try:
        require_sandbox()
    except SandboxError as error:
        raise RewardError(
            f"the verifier `{name}` does not run what a model wrote on this machine, because it cannot be shut off from network and "
            f"files: {error}. That takes pyseccomp with libseccomp 2, and Linux 5.14 or newer on which ordinary users may make user "
            "namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
            "kernel.apparmor_restrict_unprivileged_userns; in a container a seccomp profile that allows unshare and mount)"
        ) from None


class _WorkerEnded(Exception):
    def __init__(self, status: int, timed_out: bool = False):
        self.status, self.timed_out = status, timed_out


class _Worker:
    """One process. Constructing it takes as long as the verifier's packages take to import."""

    def __init__(self, name: str):
        self._grace_s = GRACE_S if name in APART else 0.0
        if name in APART:
            self._process = start_shut_off(WORKER, name)
        else:
            command = [sys.executable, "-m", WORKER, name]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        try:
            first = self._answer()
        except _WorkerEnded as ended:
            raise RewardError(
                f"the worker of the verifier `{name}` ended with status {ended.status} as it started; its log is the server's"
            ) from None
        if "error" in first:
            self.end()
            raise RewardError(first["error"])

    def ask(self, request: dict[str, Any]) -> float | Invalid | Failed | TimedOut:
        """Its verdict.

        Raises:
            _WorkerEnded: it has died, or been ended for want of time.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise _WorkerEnded(self._process.wait()) from None
        answer = self._answer(request["limit_s"] + self._grace_s)
        if "value" in answer:
            return answer["value"]
        if "timed_out" in answer:
            return TimedOut(request["limit_s"])
        return Invalid(answer["invalid"]) if "invalid" in answer else Failed(answer["failed"])

    def _answer(self, limit_s: float | None = None) -> dict[str, Any]:
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        if not poll.poll(None if limit_s is None else limit_s * 1000):
            self.end()
            raise _WorkerEnded(self._process.returncode, timed_out=True)
        line = self._process.stdout.readline()
        if not line:
            raise _WorkerEnded(self._process.wait())
        return json.loads(line)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
