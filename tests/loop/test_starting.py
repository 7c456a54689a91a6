"""How the roles of a run start and end: whatever one of them does, the others are not left behind, and the user reads why."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.cluster import ActorDied
from rlhf.config import Settings
from rlhf.loop import starting

POLICY, ROLLOUTS, REWARDS = "PolicyGroup", "RolloutPool", "RewardPool"
STARTS = [f"{role}.start" for role in (POLICY, ROLLOUTS, REWARDS)]


class Role:
    """A role that notes what is asked of it; a start or a call of its own may fail, or not end."""

    def __init__(self, name: str, calls: list[str], failing: dict[str, Exception], silent: set[str]):
        self.name, self.calls, self.failing, self.silent = name, calls, failing, silent

    async def enter(self, method: str, result: Any = None) -> Any:
        call = f"{self.name}.{method}"
        self.calls.append(call)
        if call in self.silent:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if call in self.failing:
            raise self.failing[call]
        return result

    async def start(self, *_: Any) -> Role:
        return await self.enter("start", self)

    async def transfer_address(self) -> tuple[str, int]:
        return await self.enter("transfer_address", ("127.0.0.1", 1))

    def new_session(self, host: str, port: int) -> tuple[str, int]:
        return host, port

    async def open_transfer(self, session: Any) -> None:
        await self.enter("open_transfer")

    async def connect(self, session: Any) -> None:
        await self.enter("connect")

    async def offload(self) -> None:
        await self.enter("offload")

    async def close(self) -> None:
        await self.enter("close")


@pytest.fixture
def roles(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The calls, what fails and what is silent; three stand-ins take the places of the real roles."""
    calls, failing, silent = [], {}, set()
    for name in (POLICY, ROLLOUTS, REWARDS):
        monkeypatch.setattr(starting, name, Role(name, calls, failing, silent))
    return SimpleNamespace(calls=calls, failing=failing, silent=silent)


def run(tmp_path: Path, body: Exception | None = None) -> None:
    settings = Settings.model_validate(
        {
            "run": {"dir": str(tmp_path)},
            "data": {"prompts": "unused.jsonl"},
            "policy": {"model": "unused"},
            "reward": {"kind": "function", "path": "my_rewards:score"},
            "algorithm": {"name": "online_dpo"},
        }
    )
    runtime: Any = SimpleNamespace(local=True, check_files=lambda files: None)
    algorithm: Any = SimpleNamespace(mixes=False)

    async def scenario() -> None:
        try:
            async with starting.started_roles(runtime, settings, algorithm):
                if body is not None:
                    raise body
        finally:
            assert asyncio.all_tasks() == {asyncio.current_task()}, "a task is left that nobody waits for"

    asyncio.run(scenario())


def closed(roles: Any) -> list[str]:
    return [call.removesuffix(".close") for call in roles.calls if call.endswith(".close")]


def test_all_start_are_connected_and_close_in_the_opposite_order(roles: Any, tmp_path: Path) -> None:
    run(tmp_path)
    assert sorted(roles.calls[:3]) == sorted(STARTS)
    assert roles.calls[3:6] == [f"{POLICY}.transfer_address", f"{POLICY}.open_transfer", f"{ROLLOUTS}.connect"]
    started = [call.removesuffix(".start") for call in roles.calls[:3]]
    assert closed(roles) == started[::-1]


@pytest.mark.parametrize("shared", [False, True])
def test_on_shared_devices_each_settles_before_an_engine_takes_stock(
    roles: Any, tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "takes_turns", lambda settings, debug: True)
    monkeypatch.setattr(starting, "shared_rewards", lambda settings, debug: shared)
    run(tmp_path)
    assert roles.calls[:4] == [f"{POLICY}.start", f"{POLICY}.offload", f"{REWARDS}.start", f"{ROLLOUTS}.start"]


@pytest.mark.parametrize(
    "call", [*STARTS, f"{POLICY}.transfer_address", f"{POLICY}.open_transfer", f"{ROLLOUTS}.connect"]
)
def test_what_fails_at_the_start_is_raised_alone_and_what_had_started_is_closed(
    roles: Any, tmp_path: Path, call: str
) -> None:
    roles.failing[call] = error = RuntimeError("the reason")
    with pytest.raises(RuntimeError) as caught:
        run(tmp_path)
    assert caught.value is error
    if call in STARTS:
        assert call.removesuffix(".start") not in closed(roles)
    else:
        assert len(closed(roles)) == 3


@pytest.mark.parametrize("failing", STARTS)
@pytest.mark.parametrize("silent", STARTS)
def test_nobody_waits_for_a_role_that_starts_while_another_has_failed(
    roles: Any, tmp_path: Path, failing: str, silent: str
) -> None:
    roles.silent |= {silent} - {failing}
    roles.failing[failing] = ActorDied("out of memory")
    with pytest.raises(ActorDied, match="out of memory"):
        run(tmp_path)


def test_a_role_that_cannot_close_does_not_hide_why_the_run_ended(roles: Any, tmp_path: Path) -> None:
    roles.failing[f"{ROLLOUTS}.close"] = ActorDied("it is what ended the run")
    with pytest.raises(ValueError, match="the reason"):
        run(tmp_path, ValueError("the reason"))
    assert sorted(closed(roles)) == sorted([POLICY, ROLLOUTS, REWARDS])
