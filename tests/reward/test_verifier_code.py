"""The verifier of programs, and programs that try to get out of the sandbox or to pass without being right."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.reward.errors import RewardError
from rlhf.reward.serving.pool import RewardPool
from rlhf.reward.verifiers import sandbox, workers
from rlhf.reward.verifiers.code import CodeVerifier
from rlhf.reward.verifiers.sandbox import Limits, SandboxError, run_program
from rlhf.reward.verifiers.workers import WorkerPool
from rlhf.types import Score

pytestmark = pytest.mark.engine

RIGHT = "def square(x):\n    return x * x\n"
TESTS = ["assert square(3) == 9", "assert square(-2) == 4"]


def score(code: str, **payload: object) -> float:
    """The score of a response with this program in its last fenced block."""
    verifier = CodeVerifier()
    response = f"First I thought:\n```\nraise SystemExit\n```\nBetter:\n```python\n{code}\n```\nDone."
    return verifier.score("?", response, verifier.read({"tests": TESTS, "time_limit_s": 30.0} | payload))


def test_statements() -> None:
    assert score(RIGHT) == 1.0
    wrong = "def square(x):\n    return 3 * x\n"
    assert score(wrong) == 0.0
    assert score(wrong, strict=False) == 0.5
    assert score("def square(x)") == 0.0, "it is not Python"


def test_a_response_without_a_program_is_wrong() -> None:
    verifier = CodeVerifier()
    for response in ("", RIGHT, f"```python\n{RIGHT}"):
        assert verifier.score("?", response, verifier.read({"tests": TESTS})) == 0.0


def test_input_and_output() -> None:
    pairs = [{"stdin": "4\n", "stdout": "8\n\n"}, {"stdin": "5\n", "stdout": "10"}]
    assert score("n = int(input())\nprint(2 * n, '')", tests=pairs) == 1.0
    assert score("input(); print(8)", tests=pairs, strict=False) == 0.5
    assert score("input(); print(8)", tests=pairs) == 0.0
    assert score("print(int(input()) * 2); exit(1)", tests=pairs[:1]) == 0.0, "a program that fails has failed"


@pytest.mark.parametrize(
    "ending",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "print('1' * 50)",
        "import os\nfor number in range(3, 4096):\n    try: os.write(number, b'1' * 40)\n    except OSError: pass\nos._exit(0)",
        "import os; os.closerange(3, 4096)",
        "import builtins; builtins.exec = builtins.compile = lambda *a, **k: None",
        "import os; os.write = os._exit = lambda *a: None",
        "import json; json.loads = json.dumps = lambda *a, **k: {}",
        "import builtins; builtins.AssertionError = type('Never', (BaseException,), {})",
        "class Quiet(BaseException): pass\nraise Quiet",
        "globals().clear()",
        "__builtins__ = {}",
        "while True: pass",
        "def square(x):\n    while True: pass",
        "def square(x):\n    raise SystemExit(0)",
        "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()",
    ],
)
def test_a_wrong_program_does_not_pass_by_tricks(ending: str) -> None:
    wrong = "def square(x):\n    return None\n"
    limit = {"time_limit_s": 1.0} if "while True" in ending else {}
    assert score(f"{wrong}{ending}", **limit) == 0.0


def test_a_right_program_passes_in_spite_of_threads_and_noise() -> None:
    noisy = "import sys, threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nprint('x' * 10**7)\n"
    assert score(noisy + RIGHT) == 1.0


LIMITS = Limits(wall_s=30.0)
FORKING = Limits(wall_s=30.0, forks=True)


def output(code: str, limits: Limits = LIMITS) -> str:
    """What a program prints, in the sandbox."""
    return run_program(code, "", limits).output.decode()


def test_time_is_limited() -> None:
    assert run_program("while True: pass", "", Limits(wall_s=0.5)).status is None
    assert run_program("import time; time.sleep(60)", "", Limits(wall_s=0.5)).status is None
    assert run_program("while True: pass", "", Limits(wall_s=60.0, cpu_s=1)).status > 128


def test_nothing_is_left_of_a_program_that_hides_its_children() -> None:
    """They leave its session and forget the signal that is to come; still they end with it."""
    marker = f"rlhf-{os.getpid()}"
    code = f"""
import ctypes, os, time
if os.fork() == 0:
    os.setsid()
    ctypes.CDLL(None).prctl(1, 0)
    os.execv("/bin/sh", ["{marker}", "-c", "sleep 300"])
time.sleep(0.2)
"""
    assert run_program(code, "", FORKING).status == 0
    commands = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                commands.append((entry / "cmdline").read_text())
            except OSError:
                continue  # it has just ended
    assert not [command for command in commands if marker in command]


def test_memory_is_limited() -> None:
    text = output("try:\n    print(len(bytearray(10**9)))\nexcept MemoryError:\n    print('no')")
    assert text == "no\n"


def test_a_fork_bomb_stays_small() -> None:
    code = """
import os
forked = 0
try:
    while forked < 100:
        if os.fork() == 0:
            import time
            time.sleep(60)
        forked += 1
except OSError:
    pass
print(forked)
"""
    assert int(output(code, FORKING)) == LIMITS.processes - 1


def test_the_disk_is_limited() -> None:
    code = """
total = 0
try:
    for number in range(10):
        with open(f"file{number}", "wb") as file:
            for _ in range(20):
                total += file.write(bytes(2**20))
                file.flush()
except OSError:
    pass
print(total)
"""
    assert 16 * 2**20 <= int(output(code)) <= LIMITS.disk_bytes


def test_too_much_output_ends_the_program() -> None:
    ran = run_program("while True: print('x' * 1000)", "", Limits(wall_s=30.0, output_bytes=10_000))
    assert ran.status is None and len(ran.output) == 10_000


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        code = f"""
import socket
for address in (("{host}", {port}), ("10.0.0.1", 80)):
    try:
        socket.create_connection(address, timeout=1)
        print("reached")
    except OSError as error:
        print("cut off")
"""
        assert output(code) == "cut off\ncut off\n"


def test_files_and_secrets_of_the_machine_are_not_there(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    (tmp_path / "token").write_text("sk-secret")
    paths = [
        str(tmp_path / "token"),
        "/etc/passwd",
        "/etc/shadow",
        "/proc/1/environ",
        "/proc/self/environ",
        "/tmp",
        __file__,
    ]
    code = f"""
import os
print("sk-secret" in repr(os.environ), [path for path in {paths!r} if os.path.exists(path)], os.listdir("/sandbox"))
for path in ("/usr/written", "/written", "/dev/written"):
    try:
        open(path, "w")
        print("wrote", path)
    except OSError:
        pass
print(os.getuid() != 0, os.getpid() < 10)
"""
    assert output(code) == "False [] ['solution.py']\nTrue True\n"


def test_rights_cannot_be_won_back() -> None:
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
try:
    os.setuid(0)
    print("root")
except OSError:
    pass
print(libc.mount(b"none", b"/sandbox", b"tmpfs", 0, None), libc.umount2(b"/usr", 2))
os.kill(1, 9)
print("still here")
"""
    assert output(code).splitlines()[-2:] == ["-1 -1", "still here"]


def test_a_program_that_cannot_be_started_is_no_wrong_program(monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "_python", lambda: "/usr/bin/no-python")
    with pytest.raises(SandboxError, match="starting the program: .*No such file"):
        run_program("print('ran')", "", LIMITS)


def test_where_nothing_can_be_shut_off_nothing_is_run(run, monkeypatch, tmp_path) -> None:
    broken = tmp_path / "jail.py"
    broken.write_text(sandbox.JAIL.read_text().replace("libc.unshare(CLONE_NEWUSER | others)", "libc.unshare(-1)"))
    monkeypatch.setattr(sandbox, "JAIL", broken)
    with pytest.raises(SandboxError, match="namespace: Invalid argument"):
        run_program("print('ran')", "", LIMITS)
    monkeypatch.setattr(workers, "require_sandbox", sandbox.require_sandbox)
    with pytest.raises(RewardError, match=r"`code` does not run what a model wrote.*user\.max_user_namespaces"):
        run(WorkerPool.start("code", 1))


def test_a_ray_server_verifies_programs(run, scratch_runtime, tiny_settings, make_text_rollout) -> None:
    import ray

    wrong = RIGHT.replace("*", "+")
    rollout = make_text_rollout([f"```\n{code}```" for code in (RIGHT, wrong)], keep=ray.put)
    rollout = replace(rollout, prompt=replace(rollout.prompt, payload={"tests": TESTS, "time_limit_s": 30.0}))

    async def scenario():
        pool = await RewardPool.start(scratch_runtime, tiny_settings(reward={"kind": "verifier", "path": "code"}))
        return await pool.judge(rollout)

    assert run(scenario()).outcomes == (Score(1.0), Score(0.0))
