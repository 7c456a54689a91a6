"""A model folder that cannot be used is refused by the dry run, through the command line, by field, file and remedy, whoever names it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rlhf.cli import main

Harm = Callable[[Path], Any]
RUN = """
data: {prompts: prompts.jsonl, max_prompt_tokens: 64}
policy: {model: POLICY, dtype: fp32}
rollout: {max_tokens: 16}
cluster: {device: cpu}
reward: REWARD
loop: {prompts_per_step: 2, steps: 1}
"""
FUNCTION = "{kind: function, path: 'rlhf.reward.functions:negative_length'}"
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def judge(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with the tiny model's body and tokenizer."""
    folder = tmp_path_factory.mktemp("judge")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tiny_model, num_labels=1)
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`dry_run(policy, reward)`: the exit status and what is said on standard error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Say a."}\n{"prompt": "Say b."}\n')

    def run(policy: str, reward: str = FUNCTION) -> tuple[int, str]:
        (tmp_path / "run.yaml").write_text(RUN.replace("POLICY", policy).replace("REWARD", reward))
        return main(["train", "run.yaml", "--dry-run"]), capsys.readouterr().err

    return run


def write(name: str, text: str) -> Harm:
    return lambda folder: (folder / name).write_text(text)


def fields(name: str = "config.json", **changed: Any) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changed))

    return harm


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Harm:
    def harm(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return harm


def to_nowhere(name: str) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/nowhere/at/all")

    return harm


def emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def no_vocabulary(folder: Path) -> None:
    file = folder / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["model"]["vocab"] = {}
    file.write_text(json.dumps(stored))


def pickled(content: Any) -> Harm:
    def harm(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        if isinstance(content, bytes):
            (folder / "pytorch_model.bin").write_bytes(content)
        else:
            torch.save(content, folder / "pytorch_model.bin")

    return harm


DEEP = "[" * 100_000
HARMS: dict[str, tuple[Harm, str]] = {
    "empty folder": (emptied, "no config.json; it holds nothing"),
    "null": (write("config.json", "null"), "config.json holds null, no JSON object"),
    "list": (write("config.json", "[]"), r"config.json holds \[\], no JSON object"),
    "deep": (write("config.json", DEEP), "config.json is no JSON"),
    "pointer": (write("config.json", "version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "no type": (fields(model_type=None), "has no `model_type`"),
    "architectures": (fields(architectures=[5]), r"says `architectures: \[5\]`"),
    "sizes": (fields(vocab_size=10**30), "`vocab_size: 1000000000000000000000000000000`.* from 1 to 2147483647"),
    "positions": (fields(max_position_embeddings=10**30), "from 1 to 2147483647"),
    "no heads": (fields(num_attention_heads=0), "config.json does not describe a model: integer modulo by zero"),
    "words": (fields(hidden_size="many"), "'hidden_size' expected int"),
    "text": (fields(text_config=5), "`text_config: 5` is no configuration"),
    "type": (fields(dtype=5), "says `dtype: 5`"),
    "quantization": (fields(quantization_config={}), "quantiz"),
    "link": (to_nowhere("tokenizer_config.json"), "is a link to /nowhere/at/all, which is not there"),
    "tokenizer null": (write("tokenizer.json", "null"), "no tokenizer can be loaded"),
    "tokenizer settings": (write("tokenizer_config.json", "[]"), "no tokenizer can be loaded"),
    "tokenizer deep": (write("tokenizer.json", DEEP), "no tokenizer can be loaded"),
    "tokenizer length": (fields("tokenizer_config.json", model_max_length="x"), "no tokenizer can be loaded"),
    "special token": (fields("tokenizer_config.json", eos_token=5), "no tokenizer can be loaded"),
    "no vocabulary": (no_vocabulary, "it makes no tokens of a text"),
    "template": (write("chat_template.jinja", "{% for %}"), "the chat template of .* refuses"),
    "template loops": (
        write("chat_template.jinja", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        "the chat template of .* does not end",
    ),
    "template grows": (
        write("chat_template.jinja", "{{ ('a' * 10000)|replace('a', 'b' * 1000000) }}"),
        "needs more than 512 MiB of memory",
    ),
    "template is deaf": (write("chat_template.jinja", "hello"), "the same text for different conversations"),
    "whole numbers": (
        tensors(lambda found: found.update({WEIGHT: found[WEIGHT].int()})),
        r"q_proj.weight` \(I32\) in .* does not hold bf16, fp16 or fp32 numbers",
    ),
    "a tensor too many": (
        tensors(lambda found: found.update(extra=torch.zeros(3))),
        "`extra` is not part of the model",
    ),
    "not a pickle": (pickled(b""), "pytorch_model.bin cannot be read"),
    "another pickle": (pickled({"a": 5}), "it holds other things than tensors"),
    "a list": (pickled([1, 2]), "pytorch_model.bin cannot be read"),
    "index": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "pytorch_model.bin.index.json").write_text("[]"),
        ),
        "is no index of weight files",
    ),
}


@pytest.mark.parametrize("role", ["policy", "reward"])
@pytest.mark.parametrize("kind", HARMS)
def test_a_folder_that_is_not_whole_is_refused(
    kind: str,
    role: str,
    tiny_model: Path,
    judge: Path,
    tmp_path: Path,
    dry_run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlhf.data.template_trial.CPU_SECONDS", 1)  # the template that loops takes all of them
    harm, words = HARMS[kind]
    shutil.copytree(tiny_model if role == "policy" else judge, tmp_path / "model")
    harm(tmp_path / "model")
    if role == "policy":
        status, said = dry_run("model")
    else:
        status, said = dry_run(str(tiny_model), "{kind: model, path: model, input: conversation}")
    assert status == 2, said
    field = "policy.model" if role == "policy" else "reward.path"
    assert said.startswith((f"rlhf: `{field}`: ", f"rlhf: {field}: ")) and "model" in said
    assert re.search(words, said), said


POLICIES: dict[str, tuple[Harm, str]] = {
    "stop": (fields("generation_config.json", eos_token_id=[257, 10**6]), r"`eos_token_id: \[257, 1000000\]`"),
    "stop in words": (fields("generation_config.json", eos_token_id="x"), "`eos_token_id: x`"),
    "generation": (write("generation_config.json", "{"), "generation_config.json is no JSON"),
    "padding": (fields(pad_token_id=-400), "`pad_token_id: -400`"),
    "quantized": (
        fields(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"its weights are quantized \(gptq\)",
    ),
    "both": (fields(is_encoder_decoder=True), "`is_encoder_decoder: true`"),
}


@pytest.mark.parametrize("kind", POLICIES)
def test_a_policy_that_cannot_be_trained_is_refused(
    kind: str, tiny_model: Path, tmp_path: Path, dry_run: Callable[..., Any]
) -> None:
    harm, words = POLICIES[kind]
    shutil.copytree(tiny_model, tmp_path / "model")
    harm(tmp_path / "model")
    status, said = dry_run("model")
    assert status == 2 and re.search(words, said), said


def test_a_file_is_no_folder_and_home_is_known(
    tiny_model: Path, tmp_path: Path, dry_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    assert dry_run(f"~/{tiny_model.name}")[0] == 0
    for name, words in (
        ("prompts.jsonl", "`prompts.jsonl` is a file"),
        ("./none", "there is no folder `./none`"),
        ("a/b/c", "there is no folder `a/b/c`"),
    ):
        for status, said in (dry_run(name), dry_run(str(tiny_model), f"{{kind: model, path: {name}}}")):
            assert status == 2 and words in said, said
