"""The user's own code: reward functions and algorithms that do not import, are none, or raise; and judges that are no code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.bad_input.place import Place
from tests.bad_input.walk import Case

FUNCTION = "def score(prompt, response, payload):\n    {}\n"
MODULES = {
    "empty": "",
    "does-not-parse": "def score(:\n",
    "bad-indent": "def score(prompt, response, payload):\nreturn 1\n",
    "tabs-and-spaces": "def score(p, r, d):\n\tif p:\n        return 1\n",
    "nul-byte": "x = 1\0\n",
    "latin-1": "# caf\udce9\nx = 1\n",
    "raises": "raise ValueError('no such thing')\n",
    "raises-a-key-error": "{}['anwser']\n",
    "exits": "import sys\nsys.exit(0)\n",
    "exits-with-a-text": "raise SystemExit('bye')\n",
    "raises-generator-exit": "raise GeneratorExit\n",
    "raises-a-base-exception": "class Own(BaseException):\n    pass\nraise Own('x')\n",
    "raises-an-exception-group": "raise ExceptionGroup('several', [ValueError('x')])\n",
    "raises-without-words": "raise Exception\n",
    "raises-what-cannot-be-shown": "class Bad(Exception):\n    def __str__(self):\n        raise ValueError\nraise Bad\n",
    "raises-a-surrogate": "raise ValueError('half \\ud83d')\n",
    "raises-a-long-text": "raise ValueError('x' * 100000)\n",
    "recursion": "def f():\n    return f()\nf()\n",
    "imports-nothing-there": "import no_such_package_at_all\n",
    "imports-itself": "import bad_rewards\nbad_rewards.nothing\n",
    "no-function": "x = 1\n",
    "a-number": "score = 3\n",
    "none": "score = None\n",
    "a-text": "score = 'score'\n",
    "a-module": "import math as score\n",
    "no-parameters": "def score():\n    return 1.0\n",
    "one-parameter": "def score(response):\n    return 1.0\n",
    "too-many-parameters": "def score(a, b, c, d):\n    return 1.0\n",
    "keyword-only": "def score(*, prompt, response, payload):\n    return 1.0\n",
    "no-return": FUNCTION.format("len(response)"),
    "bare-return": FUNCTION.format("return"),
    "always-none": FUNCTION.format("return None"),
    "generator": FUNCTION.format("yield 1.0"),
    "async-generator": "async " + FUNCTION.format("yield 1.0"),
    "a-property": "class C:\n    @property\n    def score(self):\n        raise ValueError('property')\nscore = C().score\n",
    "module-getattr-raises": "def __getattr__(name):\n    raise ValueError(name)\n",
    "changes-the-directory-that-is-gone": "import os\nos.chdir('/no/such/folder')\n",
}
CALLS = {
    "raises": FUNCTION.format("return payload['anwser']"),
    "raises-a-base-exception": FUNCTION.format("raise GeneratorExit('x')"),
    "ends-the-process": FUNCTION.format("import os; os._exit(3)"),
    "stop-iteration": FUNCTION.format("return next(iter(()))"),
    "recursion": FUNCTION.format("return score(prompt, response, payload)"),
    "a-text": FUNCTION.format("return 'good'"),
    "a-list": FUNCTION.format("return [1.0]"),
    "huge": FUNCTION.format("return 10**400"),
    "itself": FUNCTION.format("return score"),
    "endless": FUNCTION.format("while True: pass"),
    "a-class-that-raises": "class score:\n    def __init__(self, prompt, response, payload):\n        raise ValueError\n",
    "a-wrong-decorator": "import contextlib\n@contextlib.contextmanager\n" + FUNCTION.format("yield 1.0"),
}
"""What shows when the function is called, in a process of its own."""
CALLED_PATHS = ("builtins:dict", "builtins:exec", "_thread:start_new_thread")
PATHS = {
    "empty": "",
    "no-colon": "rewards",
    "dot-for-colon": "rewards.score",
    "only-colon": ":",
    "no-module": ":score",
    "no-name": "rewards:",
    "two-colons": "rewards:score:x",
    "file": "rewards.py:score",
    "file-in-a-folder": "./rewards.py:score",
    "relative": ".rewards:score",
    "far-relative": "...rewards:score",
    "slash": "a/rewards:score",
    "absolute": "/tmp/rewards:score",
    "up": "../rewards:score",
    "spaces": " rewards : score ",
    "dash": "my-rewards:score",
    "keyword": "class:score",
    "digit": "1rewards:score",
    "unknown-module": "no_such_module:score",
    "unknown-package": "no.such.module:score",
    "unknown-name": "rewards:banana",
    "near-name": "rewards:scroe",
    "dunder": "rewards:__class__",
    "attribute": "rewards:score.__code__",
    "call": "rewards:score()",
    "len": "builtins:len",
    "exit": "builtins:exit",
    "system": "os:system",
    "main": "__main__:score",
    "nul": "rewards\0:score",
    "nul-in-the-name": "rewards:sco\0re",
    "surrogate": "rewards\ud800:score",
    "surrogate-in-the-name": "rewards:sc\ud800re",
    "newline": "rewards\n:score",
    "control": "rewards\x1b:score",
    "long": "x" * 5000 + ":score",
    "long-name": "rewards:" + "x" * 5000,
    "deep": ".".join("a" * 1000) + ":score",
    "antigravity": "this.that:score",
}
URLS = {
    "empty": "",
    "text": "banana",
    "no-scheme": "localhost:8000",
    "unknown-scheme": "ftp://localhost:8000",
    "file": "file:///etc/passwd",
    "no-host": "http://",
    "only-port": "http://:8000",
    "port-text": "http://localhost:port",
    "port-too-high": "http://localhost:99999",
    "port-negative": "http://localhost:-1",
    "bracket": "http://[::1",
    "spaces": "http://local host:8000",
    "newline": "http://localhost:8000\nx",
    "nul": "http://localhost\0:8000",
    "control": "http://localhost\x1b:8000",
    "surrogate": "http://localhost\ud800:8000",
    "password": "http://user:secret@localhost:8000",
    "fragment": "http://localhost:8000/#x",
    "query": "http://localhost:8000/?token=secret",
    "long-host": "http://" + "x" * 5000 + ":8000",
    "long-label": "http://" + "x" * 100 + ".example:8000",
    "two-dots": "http://a..b:8000",
    "backslash": "http:\\\\localhost:8000",
    "one-slash": "http:/localhost:8000",
    "javascript": "javascript:alert(1)",
    "list": "http://a:1,http://b:2",
}
VERIFIERS = {
    "empty": "",
    "unknown": "banana",
    "near": "maths",
    "upper": "MATH",
    "a-function": "rewards:score",
    "nul": "math\0",
}
ALGORITHMS = {
    "empty": "",
    "does-not-parse": "def make(:\n",
    "raises": "raise ValueError('x')\n",
    "exits": "import sys\nsys.exit(0)\n",
    "no-function": "x = 1\n",
    "a-number": "make = 3\n",
    "no-parameters": "def make():\n    return None\n",
    "returns-none": "def make(settings):\n    return None\n",
    "returns-a-text": "def make(settings):\n    return 'x'\n",
    "returns-a-mapping": "def make(settings):\n    return {}\n",
    "raises-in-the-call": "def make(settings):\n    raise KeyError('anwser')\n",
    "exits-in-the-call": "import sys\ndef make(settings):\n    sys.exit(0)\n",
    "base-exception-in-the-call": "def make(settings):\n    raise GeneratorExit\n",
    "recursion-in-the-call": "def make(settings):\n    return make(settings)\n",
    "generator": "def make(settings):\n    yield 1\n",
    "async": "async def make(settings):\n    return 1\n",
    "a-class": "class make:\n    def __init__(self, settings):\n        pass\n",
    "imports-nothing-there": "import no_such_package_at_all\n",
}
ALGORITHM_PATHS = {name: PATHS[name].replace("rewards", "own").replace("score", "make") for name in PATHS}


def _rewarded(reward: Mapping[str, Any], module: str | None = None) -> Any:
    def prepare(place: Place) -> Sequence[str]:
        if module is not None:
            place.write("bad_rewards.py", module.encode("utf-8", "surrogateescape"))
        return ["train", place.configuration({"reward": reward}), "--dry-run"]

    return prepare


def _own(name: str, module: str | None) -> Any:
    def prepare(place: Place) -> Sequence[str]:
        if module is not None:
            place.write("bad_algorithm.py", module)
        return ["train", place.configuration({"algorithm": {"name": name}}), "--dry-run"]

    return prepare


def cases(every: bool = False) -> Iterator[Case]:
    about = ("reward.path", "bad_rewards")
    for name, module in MODULES.items():
        reward = {"kind": "function", "path": "bad_rewards:score"}
        yield Case(f"code/reward/{name}", _rewarded(reward, module), about)
    for kind in ("function", "pairwise_function"):
        for name, path in PATHS.items():
            prepare = _rewarded({"kind": kind, "path": path})
            about = ("reward.path", "bad.yaml, line")
            yield Case(f"code/{kind}-path/{name}", prepare, about, again=kind != "function")
    for kind in ("remote", "pairwise_remote"):
        for name, url in URLS.items():
            prepare = _rewarded({"kind": kind, "path": None, "url": url})
            yield Case(f"code/{kind}-url/{name}", prepare, ("reward.url", "bad.yaml, line"), again=kind != "remote")
    for name, url in URLS.items():
        reward = {"kind": "llm_judge", "path": "judge", "url": url}
        yield Case(f"code/llm_judge-url/{name}", _rewarded(reward), ("reward.url", "bad.yaml, line"))
    for name, verifier in VERIFIERS.items():
        yield Case(
            f"code/verifier/{name}",
            _rewarded({"kind": "verifier", "path": verifier}),
            ("reward.path", "bad.yaml, line"),
        )
    for name, module in ALGORITHMS.items():
        yield Case(f"code/algorithm/{name}", _own("bad_algorithm:make", module), ("algorithm.name", "bad_algorithm"))
    for name, path in ALGORITHM_PATHS.items():
        yield Case(f"code/algorithm-path/{name}", _own(path, None), ("algorithm.name", "`algorithm`", "bad.yaml, line"))


def calls() -> Iterator[Case]:
    """Functions that are called: these cases start a process each."""
    about = ("reward.path",)
    for name, module in CALLS.items():
        reward = {"kind": "function", "path": "bad_rewards:score", "deadline_s": 1.0}
        yield Case(f"call/{name}", _rewarded(reward, module), about)
    for path in CALLED_PATHS:
        yield Case(f"call/{path}", _rewarded({"kind": "function", "path": path}), about)
    good = {"kind": "function", "path": "bad_rewards:score"}
    right = "a good one"
    yield Case("call/good", _rewarded(good, FUNCTION.format("return 1.0 * len(response)")), about, right, required=True)
