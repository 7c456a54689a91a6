"""Times by hand, and layouts: whatever is proposed fits, can be placed, and loads as a configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rlhf.algorithms import make
from rlhf.cli import main
from rlhf.cluster.gpus import GPUS, gpu_kind, visible_gpu
from rlhf.config import UserError, load
from rlhf.preflight.estimate import Cluster, estimate, work_of
from rlhf.preflight.propose import CannotFit, propose, seats
from rlhf.preflight.report import as_json, make_plan, text, typical
from rlhf.preflight.speed import (
    Assumptions,
    Learners,
    StepTime,
    Work,
    gather_s,
    generate_s,
    learn_flops,
    learn_s,
    publish_s,
    turns_s,
)
from rlhf.preflight.table import PAGE, with_table
from rlhf.training.shapes import known_shape

H100 = GPUS["h100-80gb"]
CONFIGS = Path(__file__).parents[2] / "configs"
PERFECT = Assumptions(learn=1, prefill=1, decode=1, link=1, decode_overhead_s=0, hop_s=0)
LLAMA, QWEN = known_shape("llama-3.1-8b"), known_shape("qwen2.5-0.5b")
WORK = Work(64, prompt=512, response=1000, sampled=2, learned=2, updates=1, epochs=1, micro_batch=8192, at_once=128)
LEARNERS = Learners(8, 3, checkpointing=False, offloaded_optimizer=False, offloaded_weights=False, nodes=1)


def test_a_reward_model_on_the_policys_gpu_is_counted(tmp_path: Path) -> None:
    """8 GB of weights, on 24 GB that policy and engine share already: for the engine's turn, not for the policy's."""
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(8 * 10**9)  # sparse: it takes no room
    path, gpu = CONFIGS / "single_gpu" / "0.5b_24gb.yaml", Cluster(1, 1, GPUS["rtx4090-24gb"])
    judged = load(path, ["policy.model=qwen2.5-0.5b", "reward.kind=model", f"reward.path={tmp_path}"])
    alone, both = (
        make_plan(settings, gpu, configured=True) for settings in (load(path, ["policy.model=qwen2.5-0.5b"]), judged)
    )
    assert both.configured.judge == 8e9
    assert both.configured.generating - alone.configured.generating > 8e9
    assert 0 < both.configured.learning - alone.configured.learning < 2e9, "a process of its own is all that stays"
    assert both.configured.time.turns > alone.configured.time.turns
    assert "a reward server on a rank's GPU: weights 8.0 GB" in text(both)
    assert [proposal.settings.cluster.placement for proposal in both.proposals] == ["colocated"]
    assert (
        both.proposals[0].settings.rollout.gpu_memory_utilization
        < alone.proposals[0].settings.rollout.gpu_memory_utilization
    )
    assert [problem for problem in both.configured.problems if "while engines generate" in problem]
    large = make_plan(judged, Cluster(1, 1, H100), configured=True)
    assert not large.configured.problems


def test_gpus_are_found_by_name() -> None:
    assert gpu_kind("H100") is H100 and gpu_kind("a10").name == "a10-24gb"
    with pytest.raises(UserError, match=r"Did you mean a100-40gb or a100-80gb\?"):
        gpu_kind("a100")
    with pytest.raises(UserError, match=r"no GPU kind `h300`.*Known: a100-40gb"):
        gpu_kind("h300")
    assert visible_gpu(["NVIDIA H100 80GB HBM3"]) is H100
    assert visible_gpu(["NVIDIA A100-SXM4-40GB"]).name == "a100-40gb"
    assert visible_gpu(["NVIDIA GeForce RTX 4090"]).name == "rtx4090-24gb"
    assert visible_gpu(["NVIDIA A10"]).name == "a10-24gb"
    assert visible_gpu(["Tesla T4"]) is None and visible_gpu([]) is None


def test_a_step_that_samples_ahead_takes_as_long_as_its_longer_part() -> None:
    apart = StepTime(generate=5.0, learn=3.0, publish=1.0)
    assert (apart.total, replace(apart, ahead=True).total) == (9.0, 6.0)
    path, cluster = CONFIGS / "8b" / "online_dpo.yaml", Cluster(2, 8, H100)
    settings = (load(path, ["policy.model=llama-3.1-8b", f"loop.staleness={k}"]) for k in (0, 1))
    one, other = (make_plan(each, cluster, configured=True).configured for each in settings)
    assert other.time == replace(one.time, ahead=True) and other.time.total < one.time.total


def test_decoding_is_bound_by_memory() -> None:
    """One engine, 128 sequences at once: each of 1,000 steps reads 16.06 GB of weights and 128 caches of 1,012 tokens on average."""
    seconds = generate_s(LLAMA, H100, WORK, 1, 1, room=10**9, size=2, assumed=PERFECT)
    read = 2 * 8_030_261_248 + 128 * 131_072 * 1_012
    prefill = 2 * 8_030_261_248 * 64 * 512 / 989e12
    assert seconds == pytest.approx(1000 * read / 3350e9 + prefill)
    half = generate_s(LLAMA, H100, WORK, 1, 1, room=64 * 1512, size=2, assumed=PERFECT)
    assert half == pytest.approx(2 * 1000 * (2 * 8_030_261_248 + 64 * 131_072 * 1_012) / 3350e9 + prefill), (
        "room for half of them: two waves"
    )
    two = generate_s(LLAMA, H100, WORK, 1, 2, room=10**9, size=2, assumed=PERFECT)
    sent = 2 * 128 * 4096 * 2 / 450e9
    assert two == pytest.approx((1000 * read / 3350e9 + prefill) / 2 + 1000 * 2 * 32 * sent)


def test_learning_costs_eight_operations_per_weight_and_token() -> None:
    flops = learn_flops(LLAMA, WORK, LEARNERS)
    tokens = 64 * (512 + 2000)
    attention = 4 * 4 * 32 * 4096 * 1512 / 2 * tokens
    head = 8 * 128256 * 4096 * 64 * 2000
    assert flops == pytest.approx(8 * 6_979_321_856 * tokens + head + attention, rel=1e-6)
    checkpointed = learn_flops(LLAMA, WORK, replace(LEARNERS, checkpointing=True))
    assert checkpointed / flops == pytest.approx(10 / 8)
    adapters = learn_flops(LLAMA, WORK, replace(LEARNERS, trained=0.0))
    assert flops - adapters == pytest.approx(2 * 6_979_321_856 * tokens + head / 4), "no gradient of the weights"
    assert learn_flops(LLAMA, replace(WORK, epochs=2), LEARNERS) / flops == pytest.approx(14 / 8), (
        "the reference is asked once"
    )


def test_zero_3_waits_for_its_network() -> None:
    near = learn_s(LLAMA, H100, WORK, LEARNERS, 2, PERFECT)
    assert near == pytest.approx(learn_flops(LLAMA, WORK, LEARNERS) / (8 * 989e12)), "hidden behind arithmetic"
    slow = replace(H100, network=1e9)
    far = learn_s(LLAMA, slow, WORK, replace(LEARNERS, nodes=2), 2, PERFECT)
    batches = -(-64 * 2512 // (8 * 8192))
    assert far == pytest.approx(batches * (2 + 1 + 1) * 16.060522496 * 7 / 8), (
        "two gathers, the reference's and the gradient, each batch"
    )
    assert publish_s(16.06e9, H100, True, "nccl", PERFECT) == pytest.approx(16.06 / 450)
    assert publish_s(16.06e9, H100, True, "gloo", PERFECT) == pytest.approx(16.06), (
        "engines of which some share GPUs receive through host memory"
    )
    assert publish_s(16.06e9, H100, True, "ipc", PERFECT) == pytest.approx(2 * 16.06 / 3350)
    assert gather_s(16e9, H100, LEARNERS, PERFECT) == pytest.approx(16 * 7 / 8 / 450), (
        "weights are made whole before they leave"
    )
    assert gather_s(16e9, slow, replace(LEARNERS, nodes=2), PERFECT) == pytest.approx(16 * 7 / 8)
    assert gather_s(16e9, H100, replace(LEARNERS, zero_stage=1), PERFECT) == 0
    assert turns_s(H100, 16e9, 48e9, PERFECT) == pytest.approx(2.0)


def test_work_is_read_from_the_settings() -> None:
    settings = typical("llama-3.1-8b", ["loop.prompts_per_step=32", "loop.epochs_per_step=2"])
    work = work_of(settings, make(settings))
    assert (work.prompts, work.sampled, work.learned, work.epochs, work.models) == (32, 2, 2, 2, 1)
    assert work.sampled_tokens == 32 * 2 * 1024 and work.learned_tokens == 32 * (512 + 2048)


@pytest.mark.parametrize(
    ("model", "cluster", "overrides"),
    [
        ("llama-3.1-8b", Cluster(1, 8, H100), []),
        ("llama-3.1-70b", Cluster(2, 8, H100), []),
        ("llama-3.1-405b", Cluster(16, 8, GPUS["h200-141gb"]), []),
        ("qwen2.5-0.5b", Cluster(1, 1, GPUS["rtx4090-24gb"]), []),
        ("qwen2.5-7b", Cluster(1, 1, GPUS["l40s-48gb"]), ["policy.lora.rank=16"]),
        ("llama-3.1-8b", Cluster(1, 8, H100), ["reward.gpus=0.5", "reward.servers=2"]),
    ],
)
def test_what_is_proposed_fits_and_loads(model: str, cluster: Cluster, overrides: list[str]) -> None:
    settings = typical(model, overrides)
    shape, algorithm = known_shape(model), make(settings)
    proposals = propose(settings, shape, algorithm, cluster)
    assert [one.estimate.time.total for one in proposals] == sorted(one.estimate.time.total for one in proposals)
    for proposal in proposals:
        again = typical(model, [*overrides, *proposal.overrides])
        assert again == proposal.settings
        assert not estimate(again, shape, algorithm, cluster).problems
        assert proposal.seats, "the run's own placement has a seat for every actor"
        own = (
            0 if again.cluster.placement == "colocated" else again.rollout.engines * again.rollout.tensor_parallel_size
        )
        assert own + again.policy.ranks + again.reward.servers * again.reward.gpus <= cluster.gpus


def test_one_gpu_is_shared() -> None:
    (only,) = propose(typical("qwen2.5-0.5b", []), QWEN, make(typical("m", [])), Cluster(1, 1, H100))
    assert "cluster.placement=colocated" in only.overrides and "policy.zero_stage=1" in only.overrides


def test_an_engine_larger_than_a_node_straddles() -> None:
    """70B in bf16 are 141 GB: more than two GPUs of 40 GB hold, so engines take four nodes each."""
    settings = typical("llama-3.1-70b", [])
    proposals = propose(settings, known_shape("llama-3.1-70b"), make(settings), Cluster(24, 2, GPUS["a100-40gb"]))
    assert {"rollout.tensor_parallel_size=8", "rollout.straddle_nodes=true"} <= set(proposals[0].overrides)
    assert "cluster.placement=disaggregated" in proposals[0].overrides


def test_what_cannot_fit_is_said() -> None:
    settings = typical("llama-3.1-70b", [])
    with pytest.raises(CannotFit, match=r"no layout fits 1 x 2 a10-24gb.*gives an engine.*`policy.lora.rank`"):
        propose(settings, known_shape("llama-3.1-70b"), make(settings), Cluster(1, 2, GPUS["a10-24gb"]))
    crowded = typical("qwen2.5-0.5b", ["reward.gpus=1"])
    with pytest.raises(CannotFit, match=r"the reward servers leave no GPU"):
        propose(crowded, QWEN, make(crowded), Cluster(1, 1, H100))


@hypothesis_settings(max_examples=12)
@given(
    model=st.sampled_from(["qwen2.5-0.5b", "llama-3.1-8b", "llama-3.1-70b"]),
    kind=st.sampled_from(sorted(GPUS)),
    nodes=st.integers(1, 3),
    gpus=st.sampled_from([1, 2, 4, 8]),
)
def test_more_gpus_never_fit_worse(model: str, kind: str, nodes: int, gpus: int) -> None:
    settings = typical(model, [])
    shape, algorithm = known_shape(model), make(settings)

    def fits(cluster: Cluster) -> bool:
        try:
            return bool(propose(settings, shape, algorithm, cluster))
        except CannotFit:
            return False

    if fits(Cluster(nodes, gpus, GPUS[kind])):
        assert fits(Cluster(nodes + 1, gpus, GPUS[kind]))
        roomier = replace(GPUS[kind], memory=1.5 * GPUS[kind].memory)
        assert fits(Cluster(nodes, gpus, roomier))


@pytest.mark.parametrize("path", sorted((CONFIGS / "8b").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_runs_for_eight_gpus_fit_them(path: Path) -> None:
    settings = load(path)
    assert not estimate(settings, LLAMA, make(settings), Cluster(1, 8, H100)).problems
    assert seats(settings, Cluster(1, 8, H100)).seats


def test_the_report_in_words_and_numbers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    arguments = ["plan", "--model", "llama-3.1-8b", "--nodes", "1", "--gpus-per-node", "8", "--gpu", "h100"]
    assert main([*arguments, "loop.steps=7", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    for words in (
        "8.03 billion parameters, 16.1 GB in bf16",
        "128 KiB of key-value cache",
        "7 steps",
        "while models are loaded: ",
        "an export takes 16.1 GB on the first rank's host",
        "Proposed: ",
        "Assumed",
    ):
        assert words in out
    numbers = json.loads(file.read_text())
    assert numbers["shape"]["parameters"] == 8_030_261_248
    assert numbers["stages"]["0"]["plain"]["policy"] == 2 * 8_030_261_248
    assert numbers["proposals"][0]["time"]["total"] <= numbers["proposals"][-1]["time"]["total"]


@pytest.mark.parametrize("ahead", ["loop.staleness=1", "loop.stream=always"])
def test_who_samples_while_the_policy_learns_gets_gpus_of_its_own(ahead: str) -> None:
    plan = make_plan(typical("qwen2.5-1.5b", [ahead]), Cluster(1, 4, H100), configured=False)
    assert [one.settings.cluster.placement for one in plan.proposals] == ["disaggregated"]
    words = text(make_plan(typical("qwen2.5-1.5b", [ahead]), Cluster(1, 1, H100), configured=False))
    assert "need GPUs of their own" in words and "`loop.staleness: 0`" in words


def test_a_configured_layout_is_judged() -> None:
    settings = typical("llama-3.1-8b", ["policy.zero_stage=0", "rollout.gpu_memory_utilization=0.1"])
    plan = make_plan(settings, Cluster(1, 8, H100), configured=True)
    words = text(plan)
    assert "does not fit: a policy rank needs" in words and "no sequence of full length fits" in words
    assert json.loads(as_json(plan))["configured"]["problems"]
    crowded = make_plan(typical("llama-3.1-8b", ["rollout.engines=9"]), Cluster(1, 8, H100), configured=True)
    assert any("GPUs" in problem and "rollout.engines" in problem for problem in crowded.configured.problems)
    without = text(make_plan(settings, None, configured=True))
    assert "--gpu h100-80gb" in without and "Proposed" not in without


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan"], "needs a CONFIG, or --model"),
        (["plan", "run.yaml", "--model", "llama-3.1-8b"], "not both"),
        (["plan", "--model", "./none"], "there is no folder `./none`"),
        (["plan", "--model", "llama-3.1-8b", "--gpu", "h300"], "no GPU kind"),
        (["plan", "--model", "llama-3.1-8b", "loop.stepz=1"], "loop.steps"),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_sizes_that_make_no_model_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 0,
        "num_hidden_layers": 2,
        "vocab_size": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | sizes))
    assert main(["plan", "--model", str(tmp_path)]) == 2
    assert "config.json says `num_key_value_heads: 0`, but it must be a whole number" in capsys.readouterr().err


def test_the_documented_table_is_what_the_planner_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, "run `python -m rlhf.preflight.table`"
