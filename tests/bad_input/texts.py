"""Configuration files that are no good YAML, or too much of it; overrides that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from tests.bad_input.place import RUN, Place, as_yaml
from tests.bad_input.walk import Case

GOOD = as_yaml(RUN)
SAME = "it says what the good file says"


def _bomb(levels: int, each: int, form: str) -> str:
    """Anchors that each hold several of the one before: small to write, endless to walk."""
    lines = [f"a0: &a0 {form.format('x')}"]
    for level in range(1, levels):
        inner = (
            ", ".join([f"*a{level - 1}"] * each)
            if "[" in form
            else ", ".join(f"k{n}: *a{level - 1}" for n in range(each))
        )
        lines.append(f"a{level}: &a{level} {form.format(inner)}")
    return "\n".join(lines) + "\n"


FILES: dict[str, str | bytes] = {
    "empty": "",
    "only-comments": "# nothing\n",
    "blank-lines": "\n\n\n",
    "scalar": "banana\n",
    "number": "42\n",
    "list": "- data\n- policy\n",
    "null": "null\n",
    "two-documents": GOOD + "---\n" + GOOD,
    "two-ends": GOOD + "...\nmore: [\n",
    "tab-indent": "data:\n\tprompts: x\n",
    "tab-in-value": GOOD + "tracking: {console:\ttrue,\t\t}\nextra:\t- x\n",
    "unclosed-brace": GOOD + "tracking: {console: true\n",
    "unclosed-quote": GOOD + 'tracking: {project: "x\n',
    "unclosed-list": GOOD + "tracking: [1, 2\n",
    "bad-indent": "data:\n   prompts: a\n  max_prompt_tokens: 1\n",
    "missing-space": GOOD.replace(": ", ":"),
    "duplicate-section": GOOD + 'data: {prompts: "other.jsonl"}\n',
    "duplicate-field": GOOD.replace('"steps": 2', '"steps": 2, "steps": 3'),
    "alias-unknown": GOOD + "tracking: *nowhere\n",
    "alias-to-itself": GOOD + "tracking: &a {console: *a}\n",
    "alias-to-itself-in-a-list": "a: &a [*a]\n",
    "alias-section-to-itself": "&a\ndata: *a\n",
    "anchor-twice": GOOD + "x: &a 1\ny: &a 2\n",
    "bomb-of-lists": _bomb(30, 10, "[{}]"),
    "bomb-of-mappings": _bomb(30, 10, "{{{}}}").replace("{x}", "{k: 1}"),
    "bomb-in-a-field": _bomb(25, 9, "[{}]") + GOOD.replace('"steps": 2', '"steps": *a24'),
    "merge-of-a-bomb": _bomb(25, 9, "{{{}}}").replace("{x}", "{k: 1}") + "data: {<<: *a24}\n",
    "merge-of-a-number": GOOD + "tracking: {<<: 3}\n",
    "deep-lists": "data: " + "[" * 5000 + "]" * 5000 + "\n",
    "deep-mappings": "data: " + "{a: " * 5000 + "1" + "}" * 5000 + "\n",
    "deep-blocks": "".join("  " * n + "a:\n" for n in range(1500)),
    "deep-unclosed": "data: " + "[" * 20000,
    "tag-python-name": GOOD + "tracking: !!python/name:os.system\n",
    "tag-python-call": GOOD + 'tracking: !!python/object/apply:os.system ["touch created"]\n',
    "tag-unknown": GOOD + "tracking: !mine {console: true}\n",
    "tag-int-of-text": GOOD.replace('"steps": 2', '"steps": !!int banana'),
    "tag-float-of-text": GOOD.replace('"steps": 2', '"steps": !!float banana'),
    "tag-bool-of-text": GOOD.replace('"steps": 2', '"steps": !!bool banana'),
    "tag-timestamp-of-text": GOOD.replace('"steps": 2', '"steps": !!timestamp banana'),
    "tag-timestamp-impossible": GOOD.replace('"steps": 2', '"steps": !!timestamp 2020-13-45'),
    "tag-binary-of-text": GOOD.replace('"steps": 2', '"steps": !!binary "****"'),
    "tag-binary": GOOD.replace('"steps": 2', '"steps": !!binary "aGVsbG8="'),
    "tag-set": GOOD.replace('"steps": 2', '"steps": !!set {a, b}'),
    "tag-omap-of-text": GOOD.replace('"steps": 2', '"steps": !!omap banana'),
    "tag-pairs": GOOD.replace('"steps": 2', '"steps": !!pairs [a: 1]'),
    "tag-map-of-list": GOOD + "tracking: !!map [1]\n",
    "tag-null-of-text": GOOD.replace('"steps": 2', '"steps": !!null banana'),
    "tag-str": GOOD.replace('"steps": 2', '"steps": !!str 2'),
    "int-of-5000-digits": GOOD.replace('"steps": 2', '"steps": ' + "9" * 5000),
    "int-of-5000-digits-negative": GOOD.replace('"steps": 2', '"steps": -' + "9" * 5000),
    "float-of-5000-digits": GOOD.replace('"steps": 2', '"steps": 0.' + "9" * 5000),
    "exponent-of-5000-digits": GOOD.replace('"steps": 2', '"steps": 1e' + "9" * 5000),
    "hexadecimal": GOOD.replace('"steps": 2', '"steps": 0x10'),
    "octal": GOOD.replace('"steps": 2', '"steps": 0o17'),
    "sexagesimal": GOOD.replace('"steps": 2', '"steps": 1:30'),
    "underscores-only": GOOD.replace('"steps": 2', '"steps": 1__'),
    "yes-for-true": GOOD + "checkpoint: {export: yes}\n",
    "date": GOOD.replace('"steps": 2', '"steps": 2020-01-01'),
    "nul-byte": GOOD.encode() + b"\0\n",
    "nul-in-a-value": GOOD.replace("prompts.jsonl", "a\\0b"),
    "control-byte": GOOD.encode() + b"\x07: 1\n",
    "latin-1": GOOD.encode() + b"# caf\xe9\n",
    "latin-1-in-a-value": GOOD.replace("prompts.jsonl", "caf\xe9").encode("latin-1"),
    "utf-16": GOOD.encode("utf-16"),
    "utf-32": GOOD.encode("utf-32"),
    "truncated-utf-8": GOOD.encode() + "# \u20ac".encode()[:-1],
    "surrogate-bytes": GOOD.encode() + b"# \xed\xa0\x80\n",
    "surrogate-escape": GOOD.replace("prompts.jsonl", "\\ud800"),
    "key-null": GOOD + "null: 1\n",
    "key-empty": GOOD + '"": 1\n',
    "key-number": GOOD + "3: 1\n",
    "key-list": GOOD + "? [a, b]\n: 1\n",
    "key-mapping": GOOD + "? {a: b}\n: 1\n",
    "key-nan": GOOD + ".nan: 1\n",
    "key-long": GOOD + "x" * 5000 + ": 1\n",
    "key-newline": GOOD + '"a\\nb": 1\n',
    "key-control": GOOD + '"a\\eb": 1\n',
    "key-nul": GOOD + '"a\\0b": 1\n',
    "key-dotted": GOOD + "loop.steps: 3\n",
    "field-key-list": GOOD.replace('"steps": 2', "[a]: 2"),
    "field-key-null": GOOD.replace('"steps": 2', "null: 2"),
    "json-with-comment": "{// data\n}",
    "binary": bytes(range(256)),
    "elf": b"\x7fELF\x02\x01\x01" + bytes(64),
    "gzip": b"\x1f\x8b\x08\x00" + bytes(64),
    "yaml-2-directive": "%YAML 9.9\n---\n" + GOOD,
    "tag-directive": "%TAG ! tag:example.com,2000:\n---\ntracking: !x {}\n" + GOOD,
    "many-sections": GOOD + "".join(f"section{n}: {{a: {n}}}\n" for n in range(300)),
    "one-long-line": GOOD + "tracking: {project: [" + "1, " * 3000 + "]}\n",
    "block-scalar-for-a-section": GOOD + "tracking: |\n  console: true\n",
    "at-sign": GOOD + "tracking: @x\n",
    "backtick": GOOD + "tracking: `x`\n",
    "template-marks": GOOD + "tracking: {{ project }}\n",
    "shell-variable": GOOD.replace('"steps": 2', '"steps": $STEPS'),
    "merge-conflict": GOOD + "<<<<<<< HEAD\nloop: {}\n=======\n>>>>>>> x\n",
    "html": "<!doctype html><html><body>404</body></html>\n",
}
ACCEPTED: dict[str, str | bytes] = {
    "unknown-directive": "%BANANA 3\n---\n" + GOOD,  # YAML says that it is passed over
    "byte-order-mark": "\ufeff" + GOOD,
    "crlf": GOOD.replace("\n", "\r\n"),
    "no-last-newline": GOOD.rstrip("\n"),
    "document-start": "---\n" + GOOD,
    "document-end": GOOD + "...\n",
    "comments": "# a\n" + GOOD.replace("\n", " # b\n"),
    "alias": GOOD.replace('"steps": 2', '"steps": &n 2').replace('"prompts_per_step": 4', '"prompts_per_step": *n'),
    "commented-out-section": GOOD + "tracking:\n  # console: true\n",
    "block-style": "data:\n  prompts: prompts.jsonl\n  max_prompt_tokens: 64\n" + GOOD.replace("data: ", "# "),
}
ACCEPTED["block-style"] = "data:\n  prompts: prompts.jsonl\n  max_prompt_tokens: 64\n" + "".join(
    line for line in GOOD.splitlines(keepends=True) if not line.startswith('"data"')
)

OVERRIDES: dict[str, Sequence[str]] = {
    "no-equals": ["loop.steps"],
    "only-equals": ["="],
    "no-field": ["=3"],
    "no-section": [".steps=3"],
    "only-a-section": ["loop=3"],
    "section-as-mapping": ["loop={steps: 3}"],
    "empty-field": ["loop.=3"],
    "too-deep": ["loop.steps.x=3"],
    "much-too-deep": [".".join("a" * 500) + "=1"],
    "unknown-section": ["lopo.steps=3"],
    "unknown-field": ["loop.stesp=3"],
    "unknown-method-field": ["algorithm.banana=1"],
    "unknown-method": ["algorithm.name=banana"],
    "method-of-a-list": ["algorithm.name=[a]"],
    "spaces": ["loop . steps = = 3"],
    "two-equals": ["loop.steps==3"],
    "empty-value": ["loop.steps="],
    "text": ["loop.steps=three"],
    "unclosed": ["loop.steps=[1"],
    "unclosed-quote": ['loop.steps="1'],
    "two-documents": ["loop.steps=1\n---\n2"],
    "tag": ["loop.steps=!!python/name:os.system"],
    "tag-int": ["loop.steps=!!int x"],
    "alias": ["loop.steps=*x"],
    "alias-to-itself": ["loop.steps=&a [*a]"],
    "bomb": ["loop.steps=" + _bomb(30, 10, "[{}]").replace("\n", " ")],
    "deep": ["loop.steps=" + "[" * 5000],
    "deep-closed": ["data.template_arguments=" + "{a: " * 3000 + "1" + "}" * 3000],
    "int-of-5000-digits": ["loop.steps=" + "9" * 5000],
    "nul": ["loop.steps=\0"],
    "nul-in-the-name": ["loop.st\0eps=1"],
    "not-utf-8": [os.fsdecode(b"loop.steps=\xff\xfe")],
    "not-utf-8-in-the-name": [os.fsdecode(b"loop.st\xffeps=1")],
    "not-utf-8-in-a-text": [os.fsdecode(b"tracking.project=\xff")],
    "not-utf-8-in-a-path": [os.fsdecode(b"data.prompts=\xff.jsonl")],
    "newline-in-the-name": ["loop.st\neps=1"],
    "control-in-the-name": ["loop.st\x1beps=1"],
    "control-in-the-value": ["loop.steps=\x1b[31m"],
    "long-name": ["loop." + "x" * 5000 + "=1"],
    "long-value": ["loop.steps=" + "x" * 5000],
    "nan": ["policy.learning_rate=nan"],
    "dotted-nan": ["policy.learning_rate=.nan"],
    "dot-in-a-list": ["reward.members.0.name=x"],
    "index": ["reward.members[0]=x"],
    "field-of-a-scalar": ["policy.model.name=x"],
    "section-in-a-scalar": ["policy.lora=3", "policy.lora.rank=3"],
    "null-section-then-field": ["policy.lora=null", "policy.lora.banana=3"],
    "dunder": ["loop.__class__=3"],
    "method": ["loop.model_dump=3"],
    "option-after": ["loop.steps=3", "--no-such-option"],
    "dash": ["-loop.steps=3"],
    "double-dash": ["--loop.steps=3"],
    "json-key": ['"loop.steps"=3'],
    "slash": ["loop/steps=3"],
    "colon": ["loop.steps: 3"],
    "env": ["loop.steps=$STEPS"],
    "home-as-a-folder": ["run.dir=~nobody-has-this-name/x"],
    "a-file-for-a-folder": ["run.dir=run.yaml"],
    "below-a-file": ["run.dir=run.yaml/x"],
    "below-dev-null": ["run.dir=/dev/null/x"],
    "in-proc": ["run.dir=/proc/x"],
    "too-long-a-name": ["run.dir=" + "x" * 300],
    "too-long-a-path": ["run.dir=" + "x/" * 3000],
}
GOOD_OVERRIDES: dict[str, Sequence[str]] = {
    "twice": ["loop.steps=1", "loop.steps=2"],
    "nested": ["policy.lora.rank=4"],
    "quoted": ['run.dir="runs/other"'],
    "spaces-in-a-path": ["run.dir=runs/a b"],
    "umlaut-in-a-path": ["run.dir=runs/\u00e4\u20ac\U0001f600"],
    "absolute": ["run.dir=/tmp/no/such/folder"],
    "up": ["run.dir=../up"],
    "tilde": ["run.dir=~/runs"],
}
PATHS: dict[str, Callable[[Place], str]] = {
    "missing": lambda place: "nowhere.yaml",
    "missing-folder": lambda place: "no/such/run.yaml",
    "folder": lambda place: "tiny",
    "empty-name": lambda place: "",
    "nul": lambda place: "run\0.yaml",
    "not-utf-8": lambda place: os.fsdecode(b"run\xff.yaml"),
    "too-long": lambda place: "x" * 300 + ".yaml",
    "much-too-long": lambda place: "x/" * 4000 + ".yaml",
    "control": lambda place: "run\x1b[31m.yaml",
    "newline": lambda place: "run\n.yaml",
    "fifo": lambda place: _fifo(place),
    "socket-device": lambda place: "/dev/null",
    "endless-device": lambda place: "/dev/zero",
    "loop-of-links": lambda place: _link(place, "loop.yaml", "loop.yaml"),
    "dangling-link": lambda place: _link(place, "dangling.yaml", "nowhere.yaml"),
    "an-override": lambda place: "loop.steps=3",
    "prompts": lambda place: "prompts.jsonl",
    "weights": lambda place: "tiny/model.safetensors",
    "python": lambda place: "rewards.py",
    "sft-for-train": lambda place: "sft.yaml",
    "tilde": lambda place: "~/nowhere.yaml",
    "url": lambda place: "https://example.invalid/run.yaml",
}


def _fifo(place: Place) -> str:
    os.mkfifo(place.work / "fifo.yaml")
    return "fifo.yaml"


def _link(place: Place, name: str, target: str) -> str:
    os.symlink(target, place.work / name)
    return name


def cases(every: bool = False) -> Iterator[Case]:
    for name, text in FILES.items():
        yield Case(f"yaml/{name}", _file(text), about=("bad.yaml",))
    for name, text in ACCEPTED.items():
        yield Case(f"yaml/good-{name}", _file(text), about=("bad.yaml",), right=SAME, required=True)
    for name, overrides in OVERRIDES.items():
        about = ("override", "argument", "unrecognized", *(one.split("=")[0] for one in overrides if "=" in one[1:]))
        yield Case(f"override/{name}", _overridden(overrides), about=about)
    for name, overrides in GOOD_OVERRIDES.items():
        right = "a value as good as any"
        yield Case(f"override/good-{name}", _overridden(overrides), about=("override",), right=right, required=True)
    for name, path in PATHS.items():
        yield Case(
            f"config-path/{name}",
            _path(path),
            about=(".yaml", "rewards.py", "CONFIG", "the file", "configuration", "/dev/", name),
        )


def _file(text: str | bytes) -> Callable[[Place], Sequence[str]]:
    return lambda place: ["train", place.write("bad.yaml", text), "--dry-run"]


def _overridden(overrides: Sequence[str]) -> Callable[[Place], Sequence[str]]:
    return lambda place: ["train", "run.yaml", *overrides, "--dry-run"]


def _path(path: Callable[[Place], str]) -> Callable[[Place], Sequence[str]]:
    return lambda place: ["train", path(place), "--dry-run"]
