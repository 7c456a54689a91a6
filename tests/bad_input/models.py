"""Model folders of which one file is damaged, as a policy and as a reward model."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bad_input.place import SFT, Place
from tests.bad_input.walk import Case

Damage = Callable[[Path], object]

WEIGHTS, CONFIG, TOKENIZER, TEMPLATE = "model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"


def _write(name: str, content: str | bytes) -> Damage:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _json(name: str, **changes: Any) -> Damage:
    """`...` removes a key."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return damage


def _header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """The header of the weights, rewritten; the data as it was."""

    def damage(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return _bytes(WEIGHTS, damage)


def _first(header: Mapping[str, Any]) -> str:
    return sorted(name for name in header if name != "__metadata__")[0]


def _set_first(**values: Any) -> Damage:
    return _header(lambda header: header[_first(header)].update(values))


def _tensors(change: Callable[[dict[str, Any]], object]) -> Damage:
    """The weights, changed and saved anew."""

    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def _fill(value: float) -> Damage:
    def change(tensors: dict[str, Any]) -> None:
        tensors[_layer(tensors)][0] = value

    return _tensors(change)


def _layer(tensors: Mapping[str, Any]) -> str:
    return next(name for name in sorted(tensors) if "layers.0" in name and tensors[name].dim() == 2)


def _replace(to: Callable[[Any], Any]) -> Damage:
    return _tensors(lambda tensors: tensors.update({_layer(tensors): to(tensors[_layer(tensors)])}))


def _index(content: Any) -> Damage:
    def damage(folder: Path) -> None:
        os.rename(folder / WEIGHTS, folder / "model-00001-of-00001.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(content if isinstance(content, str) else json.dumps(content))

    return damage


def _pickle(folder: Path) -> None:
    import pickle

    class Call:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("created-by-a-pickle",)

    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Call()}))


BOTH: dict[str, Damage] = {
    "weights/missing": lambda folder: (folder / WEIGHTS).unlink(),
    "weights/empty": _write(WEIGHTS, b""),
    "weights/seven-bytes": _bytes(WEIGHTS, lambda data: data[:7]),
    "weights/half": _bytes(WEIGHTS, lambda data: data[: len(data) // 2]),
    "weights/without-the-last-byte": _bytes(WEIGHTS, lambda data: data[:-1]),
    "weights/longer": _bytes(WEIGHTS, lambda data: data + b"\0" * 100),
    "weights/header-cut": _bytes(WEIGHTS, lambda data: data[:100]),
    "weights/header-size-zero": _bytes(WEIGHTS, lambda data: bytes(8) + data[8:]),
    "weights/header-size-huge": _bytes(WEIGHTS, lambda data: b"\xff" * 8 + data[8:]),
    "weights/header-not-json": _bytes(WEIGHTS, lambda data: data[:8] + b"x" * (len(data) - 8)),
    "weights/header-a-list": _write(WEIGHTS, struct.pack("<Q", 2) + b"[]"),
    "weights/header-empty": _write(WEIGHTS, struct.pack("<Q", 2) + b"{}"),
    "weights/zeros": _bytes(WEIGHTS, lambda data: bytes(len(data))),
    "weights/html": _write(WEIGHTS, "<!doctype html><html>404</html>"),
    "weights/lfs-pointer": _write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 380176\n"),
    "weights/folder": lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
    "weights/dangling-link": lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).symlink_to("nowhere")),
    "weights/fifo": lambda folder: ((folder / WEIGHTS).unlink(), os.mkfifo(folder / WEIGHTS)),
    "weights/pickle-with-a-call": _pickle,
    "weights/offsets-beyond": _set_first(data_offsets=[0, 10**9]),
    "weights/offsets-reversed": _set_first(data_offsets=[100, 0]),
    "weights/offsets-negative": _set_first(data_offsets=[-5, 5]),
    "weights/shape-negative": _set_first(shape=[-1, 64]),
    "weights/shape-huge": _set_first(shape=[2**40, 2**40]),
    "weights/type-unknown": _set_first(dtype="BANANA"),
    "weights/type-of-whole-numbers": _replace(lambda tensor: tensor.long()),
    "weights/tensor-missing": _tensors(lambda tensors: tensors.pop(_layer(tensors))),
    "weights/tensor-renamed": _tensors(lambda tensors: tensors.update({"banana": tensors.pop(_layer(tensors))})),
    "weights/tensor-of-another-shape": _replace(lambda tensor: tensor[:-1].clone()),
    "weights/tensor-transposed": _replace(lambda tensor: tensor.flatten().clone()),
    "weights/index-of-missing-shard": _index({"weight_map": {"a": "model-00009-of-00009.safetensors"}}),
    "weights/index-empty": _index({"weight_map": {}}),
    "weights/index-without-map": _index({}),
    "weights/index-a-list": _index([]),
    "weights/index-not-json": _index("{"),
    "weights/index-up": _index({"weight_map": {"a": "../../../../etc/passwd"}}),
    "weights/index-of-numbers": _index({"weight_map": {"a": 3}}),
    "config/missing": lambda folder: (folder / CONFIG).unlink(),
    "config/empty": _write(CONFIG, ""),
    "config/not-json": _write(CONFIG, "{"),
    "config/a-list": _write(CONFIG, "[]"),
    "config/null": _write(CONFIG, "null"),
    "config/text": _write(CONFIG, '"x"'),
    "config/empty-object": _write(CONFIG, "{}"),
    "config/half": _bytes(CONFIG, lambda data: data[: len(data) // 2]),
    "config/binary": _write(CONFIG, bytes(range(256))),
    "config/utf-16": _bytes(CONFIG, lambda data: data.decode().encode("utf-16")),
    "config/deep": _write(CONFIG, '{"model_type": "llama", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "config/int-of-5000-digits": _write(CONFIG, '{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}"),
    "config/folder": lambda folder: ((folder / CONFIG).unlink(), (folder / CONFIG).mkdir()),
    "config/fifo": lambda folder: ((folder / CONFIG).unlink(), os.mkfifo(folder / CONFIG)),
    "config/no-model-type": _json(CONFIG, model_type=...),
    "config/unknown-model-type": _json(CONFIG, model_type="banana"),
    "config/model-type-a-number": _json(CONFIG, model_type=3),
    "config/model-type-null": _json(CONFIG, model_type=None),
    "config/an-encoder": _json(CONFIG, model_type="bert", architectures=["BertModel"]),
    "config/vision": _json(CONFIG, model_type="vit", architectures=["ViTForImageClassification"]),
    "config/encoder-decoder": _json(
        CONFIG, model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True
    ),
    "config/another-architecture": _json(CONFIG, model_type="gpt2", architectures=["GPT2LMHeadModel"]),
    "config/code-of-its-own": _json(
        CONFIG, auto_map={"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}, model_type="mine"
    ),
    "config/architectures-a-text": _json(CONFIG, architectures="LlamaForCausalLM"),
    "config/dtype-unknown": _json(CONFIG, dtype="banana"),
    "config/rope-unknown": _json(CONFIG, rope_parameters={"rope_type": "banana", "rope_theta": 1e4}),
    "config/activation-unknown": _json(CONFIG, hidden_act="banana"),
    "tokenizer/missing": lambda folder: [(folder / name).unlink() for name in (TOKENIZER, "tokenizer_config.json")],
    "tokenizer/json-missing": lambda folder: (folder / TOKENIZER).unlink(),
    "tokenizer/empty": _write(TOKENIZER, ""),
    "tokenizer/not-json": _write(TOKENIZER, "{"),
    "tokenizer/a-list": _write(TOKENIZER, "[]"),
    "tokenizer/empty-object": _write(TOKENIZER, "{}"),
    "tokenizer/half": _bytes(TOKENIZER, lambda data: data[: len(data) // 2]),
    "tokenizer/binary": _write(TOKENIZER, bytes(range(256))),
    "tokenizer/model-unknown": _json(TOKENIZER, model={"type": "banana"}),
    "tokenizer/vocabulary-empty": _json(TOKENIZER, model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]),
    "tokenizer/vocabulary-negative": _json(TOKENIZER, model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
    "tokenizer/config-not-json": _write("tokenizer_config.json", "{"),
    "tokenizer/config-a-list": _write("tokenizer_config.json", "[]"),
    "tokenizer/class-a-number": _json("tokenizer_config.json", tokenizer_class=3),
    "tokenizer/code-of-its-own": _json(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}, tokenizer_class="Mine"
    ),
    "folder/empty": lambda folder: [file.unlink() for file in folder.iterdir()],
}
"""Whatever reads the folder must refuse these."""

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "head_dim",
)
NO_DAMAGE = (
    ("head_dim", "null"),
    ("num_key_value_heads", "null"),
    ("max_position_embeddings", "odd"),
    ("max_position_embeddings", "huge"),
)
for _size in SIZES:
    for _how, _value in {
        "zero": 0,
        "negative": -4,
        "text": "64",
        "fraction": 64.5,
        "null": None,
        "huge": 2**62,
        "list": [64],
        "odd": 7,
    }.items():
        if (_size, _how) not in NO_DAMAGE:
            BOTH[f"config/{_size}-{_how}"] = _json(CONFIG, **{_size: _value})
MAY: dict[str, tuple[Damage, str]] = {
    "weights/nan": (_fill(float("nan")), "the dry run reads no weights; a run refuses it when it loads them"),
    "weights/inf": (_fill(float("inf")), "the dry run reads no weights; a run refuses it when it loads them"),
    "tokenizer/class-unknown": (
        _json("tokenizer_config.json", tokenizer_class="Banana"),
        "tokenizer.json holds the tokens",
    ),
    "tokenizer/token-beyond-the-embedding": (
        _json("tokenizer_config.json", added_tokens_decoder={"5000": {"content": "<new>", "special": True}}),
        "no prompt holds it, and all are looked at",
    ),
    "config/num_key_value_heads-null": (
        _json(CONFIG, num_key_value_heads=None),
        "as many as heads, which the weights must agree with",
    ),
    "config/eos-beyond-the-vocabulary": (_json(CONFIG, eos_token_id=10**6), "the tokenizer's is used"),
    "config/pad-beyond-the-vocabulary": (_json(CONFIG, pad_token_id=10**6), "no text holds it"),
    "config/eos-a-text": (_json(CONFIG, eos_token_id="x"), "the tokenizer's is used"),
    "config/pad-negative": (_json(CONFIG, pad_token_id=-1), "no text holds it"),
    "config/no-architectures": (_json(CONFIG, architectures=...), "the type and the weights say what it is"),
    "config/unknown-key": (_json(CONFIG, banana=3), "others may read it"),
    "config/norm-negative": (_json(CONFIG, rms_norm_eps=-1.0), "a number of the model's own"),
    "weights/more-tensors": (
        _tensors(
            lambda tensors: tensors.update(
                {"model.layers.0.self_attn.rotary_emb.inv_freq": tensors[_layer(tensors)][0].clone()}
            )
        ),
        "buffers of older versions, which transformers passes over",
    ),
    "weights/type-half": (_replace(lambda tensor: tensor.half()), "converted when it is loaded"),
    "tokenizer/config-missing": (
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        "tokenizer.json holds the tokens",
    ),
    "tokenizer/no-eos": (_json("tokenizer_config.json", eos_token=...), "the model's configuration names one"),
    "tokenizer/no-pad": (
        _json("tokenizer_config.json", pad_token=...),
        "nothing is padded, or the end of the sequence pads",
    ),
    "tokenizer/max-length-zero": (_json("tokenizer_config.json", model_max_length=0), "the model's context counts"),
    "tokenizer/max-length-text": (_json("tokenizer_config.json", model_max_length="x"), "the model's context counts"),
    "generation/not-json": (_write("generation_config.json", "{"), "only its end-of-sequence tokens are read"),
    "generation/eos-beyond": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [257, 1000000]}'),
        "the model never writes it",
    ),
    "template/missing": (lambda folder: (folder / TEMPLATE).unlink(), "a reward model may have none"),
}
"""May be accepted, for the reason given; a policy's or a reward model's."""
TEMPLATES = {
    "empty": "",
    "does-not-parse": "{% for m in messages %}",
    "bad-expression": "{{ messages[ }}",
    "raises": "{{ raise_exception('no') }}",
    "unknown-filter": "{{ messages | banana }}",
    "unknown-function": "{{ banana() }}",
    "unknown-attribute": "{{ messages[0].a.b.c }}",
    "power": "{{ 9**9**9 }}",
    "long-text": "{{ 'x' * 10**11 }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "ignores-the-messages": "always the same",
    "ignores-the-content": "{% for m in messages %}<|{{ m['role'] }}|>{% endfor %}",
    "division": "{{ 1 / 0 }}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "includes": "{% include 'x' %}",
    "binary": "\x00\x01\x02",
    "surrogate": "{{ messages[0]['content'] }}\ud800",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}
ENDLESS = {
    "endless": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "endless-text": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
}
"""Tried in a process of their own, for some seconds each."""


def _policy(damage: Damage) -> Callable[[Place], Sequence[str]]:
    def prepare(place: Place) -> Sequence[str]:
        damage(place.model())
        return ["train", "run.yaml", "policy.model=model", "--dry-run"]

    return prepare


def _judge(damage: Damage) -> Callable[[Place], Sequence[str]]:
    def prepare(place: Place) -> Sequence[str]:
        damage(place.model(source="judge"))
        return ["train", place.configuration({"reward": {"kind": "model", "path": "model"}}), "--dry-run"]

    return prepare


def _sft(damage: Damage) -> Callable[[Place], Sequence[str]]:
    def prepare(place: Place) -> Sequence[str]:
        damage(place.model())
        return ["sft", place.configuration({"policy": {"model": "model"}}, SFT), "--dry-run"]

    return prepare


def _encoder(damage: Damage) -> Callable[[Place], Sequence[str]]:
    def prepare(place: Place) -> Sequence[str]:
        damage(place.model())
        return [
            "reward",
            "train",
            "--model",
            "model",
            "--train",
            "ratings.jsonl",
            "--output",
            "judge-out",
            "--device",
            "cpu",
        ]

    return prepare


NAMES = {
    "missing": "nowhere",
    "empty": "",
    "a-file": "prompts.jsonl",
    "weights-file": "tiny/model.safetensors",
    "missing-below": "no/such/folder/model",
    "missing-absolute": "/no/such/folder",
    "hub-name-unknown": "nobody/no-such-model",
    "unknown-asset": "asset:banana",
    "asset-up": "asset:tiny-llama/../../..",
    "nul": "tiny\0",
    "surrogate": "tiny\ud800",
    "control": "tiny\x1b[31m",
    "too-long": "x" * 300,
    "much-too-long": "x/" * 3000,
    "tilde": "~/tiny",
    "unknown-user": "~no-such-user/tiny",
    "url": "https://example.invalid/model",
    "blank": " ",
    "dots": "..",
    "slashes": "///",
    "device": "/dev/null",
    "spaces": " tiny ",
}


def cases(every: bool = False) -> Iterator[Case]:
    about = ("model/", "policy.model", "reward.path", "--model", "`model`", "'model'")
    for who, command in {"policy": _policy, "judge": _judge}.items():
        for name, damage in BOTH.items():
            again = who == "judge" and not name.startswith("weights/")
            yield Case(f"model/{who}/{name}", command(damage), about, _rightly(who, name), again=again)
        for name, (damage, right) in MAY.items():
            yield Case(f"model/{who}/{name}", command(damage), about, right=right)
    for name, text in TEMPLATES.items():
        yield Case(f"model/policy/template/{name}", _policy(_write(TEMPLATE, text)), (*about, "template"))
    for name in (
        "weights/missing",
        "weights/half",
        "config/not-json",
        "config/an-encoder",
        "tokenizer/missing",
        "tokenizer/not-json",
    ):
        yield Case(f"model/sft/{name}", _sft(BOTH[name]), about)
        yield Case(f"model/reward-train/{name}", _encoder(BOTH[name]), about)
    yield Case("model/policy/good", _policy(lambda folder: None), about, right="a good model", required=True)
    yield Case("model/judge/good", _judge(lambda folder: None), about, right="a good model", required=True)
    yield Case(
        "model/policy/a-classifier", lambda place: ["train", "run.yaml", "policy.model=judge", "--dry-run"], ("judge",)
    )
    for how, name in NAMES.items():
        for field, changes in {
            "policy.model": {"policy": {"model": name}},
            "reward.path": {"reward": {"kind": "model", "path": name}},
            "algorithm.critic_model": {"algorithm": {"name": "ppo", "critic_model": name}},
        }.items():
            yield Case(
                f"model/name/{field}/{how}",
                lambda place, c=changes: ["train", place.configuration(c), "--dry-run"],
                (field, "asset:", "bad.yaml, line"),
                leaves=("home/cache",),  # where assets are made
                again=field == "algorithm.critic_model",
            )


def _rightly(who: str, name: str) -> str | None:
    """Why a reward model may have what a policy may not."""
    if who == "judge" and name == "config/max_position_embeddings-odd":
        return "what does not fit is cut"
    return None


def calls() -> Iterator[Case]:
    """Templates that do not end: these cases take some seconds each."""
    for name, text in ENDLESS.items():
        yield Case(f"call/template/{name}", _policy(_write(TEMPLATE, text)), ("model/", "template"))
