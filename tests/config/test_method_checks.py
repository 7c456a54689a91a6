"""The checks of the methods' own fields: each fires on its mistake, names the field, and its remedy works."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlhf.algorithms.policy_gradient import PolicyGradient, importance_correction
from rlhf.config import ConfigError, Settings
from rlhf.config.algorithm import METHODS
from rlhf.config.checks import largest_assignment
from rlhf.config.method_checks import UNUSED, method_warnings, used_responses
from rlhf.config.methods.gradient import correction_bounds

LoadWith = Callable[..., Settings]

# (method, overrides that are wrong, what the message must say, overrides that put it right)
CASES = [
    ("online_dpo", ["algorithm.label_temperature=2"], ["`algorithm.labels` is hard"], ["algorithm.labels=soft"]),
    ("slic", ["algorithm.label_temperature=2"], ["`algorithm.labels` is hard"], ["algorithm.labels=sampled"]),
    (
        "online_dpo",
        ["algorithm.labels=soft", "algorithm.label_smoothing=0.1"],
        ["`algorithm.label_smoothing`", "`algorithm.labels: hard`"],
        ["algorithm.labels=hard"],
    ),
    (
        "xpo",
        ["algorithm.labels=sampled", "algorithm.label_smoothing=0.1"],
        ["`algorithm.labels` is sampled"],
        ["algorithm.label_smoothing=0"],
    ),
    ("ppo", ["loop.refill=1"], ["every prompt with a reward teaches something"], ["loop.refill=0"]),
    ("raft", ["loop.refill=1"], ["`loop.refill: 0`"], ["loop.refill=0"]),
    ("grpo", ["loop.refill=1"], ["Set `algorithm.kl_placement: none`, or"], ["algorithm.kl_placement=none"]),
    (
        "reinforce_pp_baseline",
        ["loop.refill=1", "algorithm.entropy_coef=0.1"],
        ["`algorithm.kl_placement: none` and `algorithm.entropy_coef: 0` and `algorithm.whiten: false`"],
        ["algorithm.kl_placement=none", "algorithm.entropy_coef=0", "algorithm.whiten=false"],
    ),
    ("selm", ["algorithm.loss=robust"], ["`algorithm.label_smoothing`"], ["algorithm.label_smoothing=0.1"]),
    (
        "online_dpo",
        ["algorithm.loss=robust", "algorithm.labels=soft"],
        ["corrects hard labels"],
        ["algorithm.loss=logistic"],
    ),
    ("rdpo", ["algorithm.loss=hinge", "algorithm.labels=soft"], ["hinge knows a winner"], ["algorithm.labels=hard"]),
    ("nash_md", ["loop.updates_per_step=2"], ["`loop.updates_per_step`", "no clipping"], ["loop.updates_per_step=1"]),
    ("nash_ema", ["loop.epochs_per_step=2"], ["`loop.epochs_per_step`"], ["loop.epochs_per_step=1"]),
    (
        "grpo",
        ["algorithm.correction=sequence_mask", "algorithm.correction_low=1.1"],
        ["1.1 is not below", "1.05"],
        ["algorithm.correction_low=0.9"],
    ),
    (
        "online_dpo",
        ["algorithm.reference_every=3"],
        ["`algorithm.reference` is fixed"],
        ["algorithm.reference=previous"],
    ),
    ("online_ipo", ["algorithm.reference_decay=0.5"], ["`algorithm.reference: ema`"], ["algorithm.reference=ema"]),
    ("iterative_dpo", ["algorithm.reference_alpha=1"], ["is previous"], ["algorithm.reference=extrapolated"]),
    (
        "iterative_dpo",
        ["algorithm.pairs=dataset", "algorithm.pairing=all"],
        ["is dataset"],
        ["algorithm.pairs=sampled"],
    ),
    ("iterative_dpo", ["algorithm.pairs=dataset", "algorithm.labels=soft"], ["is dataset"], ["algorithm.labels=hard"]),
    ("selm", ["algorithm.fresh_samples=3"], ["`algorithm.ranked_with` is dataset"], ["algorithm.ranked_with=samples"]),
    ("selm", ["algorithm.alpha=0", "algorithm.bonus_scale=alpha"], ["above 0"], ["algorithm.alpha=0.001"]),
    (
        "ppo",
        ["algorithm.kl_placement=none", "algorithm.kl_coef=1"],
        ["`algorithm.kl_coef`"],
        ["algorithm.kl_coef=0.01"],
    ),
    (
        "dr_grpo",
        ["algorithm.reference=previous"],
        ["`algorithm.kl_placement` is none"],
        ["algorithm.kl_placement=reward"],
    ),
    ("dr_grpo", ["algorithm.kl_target=6"], ["`algorithm.kl_placement` is none"], ["algorithm.kl_placement=reward"]),
    ("ppo", ["algorithm.kl_horizon=5"], ["`algorithm.kl_target` is null"], ["algorithm.kl_target=6"]),
    ("ppo", ["algorithm.kl_target=6", "algorithm.kl_coef=0"], ["0 stays 0"], ["algorithm.kl_coef=0.1"]),
    ("ppo", ["algorithm.kl_placement=loss"], ["k1", "no gradient", "k2"], ["algorithm.kl_estimator=k3"]),
    ("ppo", ["algorithm.kl_estimator=k2"], ["k2 in the reward", "k1"], ["algorithm.kl_estimator=k1"]),
    ("rloo", ["algorithm.kl_estimator=k3"], ["k3 in the reward"], ["algorithm.kl_placement=loss"]),
    ("grpo", ["algorithm.kl_placement=reward"], ["k3 in the reward"], ["algorithm.kl_estimator=k1"]),
    (
        "reinforce_pp_baseline",
        ["algorithm.kl_placement=reward"],
        ["k2 in the reward"],
        ["algorithm.kl_estimator=k1"],
    ),
    (
        "rloo",
        ["algorithm.kl_placement=loss", "algorithm.kl_estimator=k2", "algorithm.kl_before_baseline=false"],
        ["`algorithm.kl_before_baseline`", "part of the reward"],
        ["algorithm.kl_before_baseline=true"],
    ),
    (
        "grpo",
        ["algorithm.correction=none", "algorithm.correction_high=2"],
        ["`algorithm.correction` is none"],
        ["algorithm.correction=icepop"],
    ),
    ("grpo", ["algorithm.correction_low=5"], ["not below", "5"], ["algorithm.correction_high=6"]),
    ("ppo", ["algorithm.critic_warmup_steps=4", "loop.steps=4"], ["never would"], ["loop.steps=5"]),
    ("rloo", ["rollout.top_p=0.9"], ["`rollout.top_p: 1`"], ["rollout.top_p=1.0"]),
    ("ipo_md", ["rollout.top_k=40"], ["mixture", "`rollout.top_k: 0`"], ["rollout.top_k=0"]),
    (
        "online_ipo",
        ["reward.kind=pairwise_function", "algorithm.label_temperature=2"],
        ["`algorithm.label_temperature`", "give probabilities"],
        ["reward.kind=function"],
    ),
    (
        "ppo",
        ["reward.kind=pairwise_function"],
        ["`algorithm.samples_per_prompt`", "2 or more"],
        ["algorithm.samples_per_prompt=2"],
    ),
]


@pytest.mark.parametrize(
    ("method", "wrong", "words", "remedy"), CASES, ids=[f"{case[0]}-{case[1][-1]}" for case in CASES]
)
def test_check(load_with: LoadWith, method: str, wrong: list[str], words: list[str], remedy: list[str]) -> None:
    roomy = [f"algorithm.name={method}", "policy.micro_batch_tokens=9999"]
    with pytest.raises(ConfigError) as caught:
        load_with(*roomy, *wrong)
    assert "problems" not in str(caught.value), "one mistake, one message"
    for word in words:
        assert word in str(caught.value)
    load_with(*roomy, *wrong, *remedy)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_sound_as_it_comes(load_with: LoadWith, method: str) -> None:
    settings = load_with(f"algorithm.name={method}", "policy.micro_batch_tokens=9999")
    assert settings.algorithm.name == method
    assert list(type(settings.algorithm).model_fields)[0] == "name", "shown first"


@pytest.mark.parametrize(
    ("method", "override", "words"),
    [
        ("online_ipo", "rollout.temperature=0.9", "Nash equilibrium"),
        ("online_ipo", "rollout.top_p=0.95", "`rollout.top_p: 1`"),
        ("ipo_md", "rollout.temperature=0.7", "Nash equilibrium"),
        ("raft", "rollout.temperature=0.7", "gradient of the KL"),
    ],
)
def test_what_costs_a_method_its_promise_is_a_warning(
    load_with: LoadWith, method: str, override: str, words: str
) -> None:
    base = [f"algorithm.name={method}", "policy.micro_batch_tokens=9999"]
    base += ["algorithm.kl_weight=0.1"] * (method == "raft")
    (warning,) = method_warnings(load_with(*base, override))
    assert words in warning
    assert not list(method_warnings(load_with(*base)))


def test_a_temperature_that_vllm_does_not_take_is_refused(load_with: LoadWith) -> None:
    load_with("rollout.temperature=2.0")
    with pytest.raises(ConfigError, match=r"`rollout\.temperature`"):
        load_with("rollout.temperature=2.5")


def test_each_correction_has_bounds_that_work(load_with: LoadWith) -> None:
    """Truncation raises no weight; a response's geometric mean is far closer to 1 than a token's weight."""

    def bounds(correction: str) -> tuple[float, float]:
        return correction_bounds(load_with("algorithm.name=rloo", f"algorithm.correction={correction}").algorithm)

    assert bounds("tis") == (0.0, 5.0)
    assert bounds("icepop") == (0.5, 5.0)
    objective = PolicyGradient(correction="sequence_mask", correction_low=bounds("sequence_mask")[0],
                               correction_high=bounds("sequence_mask")[1])  # fmt: skip
    old, response = torch.zeros(40), torch.zeros(40, dtype=torch.int64)
    assert importance_correction(objective, old, old - 0.02, response).weights.all()
    assert not importance_correction(objective, old, old - 0.2, response).weights.any()


def test_the_rules_name_fields_that_exist() -> None:
    known = {field for method in METHODS.values() for field in method.model_fields}
    for rule in UNUSED:
        assert {rule.switch, *rule.fields} <= known
        classes = [method for method in METHODS.values() if rule.switch in method.model_fields]
        assert any(set(rule.fields) & set(method.model_fields) for method in classes)


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (["algorithm.name=online_dpo", "algorithm.samples_per_prompt=6"], 2),
        (["algorithm.name=online_dpo", "algorithm.samples_per_prompt=6", "algorithm.pairing=all"], 6),
        (["algorithm.name=iterative_dpo", "algorithm.pairs=dataset"], 2),
        (["algorithm.name=rdpo", "algorithm.samples_per_prompt=4"], 2),
        (["algorithm.name=simpo", "algorithm.pairing=all"], 4),
        (["algorithm.name=cispo"], 8),
        (["algorithm.name=selm"], 3),
        (["algorithm.name=selm", "algorithm.ranked_with=samples", "algorithm.fresh_samples=1"], 2),
        (["algorithm.name=selm", "algorithm.ranked_with=samples", "algorithm.fresh_samples=7"], 3),
        (["algorithm.name=xpo"], 2),
        (["algorithm.name=grpo", "algorithm.samples_per_prompt=5"], 5),
        (["algorithm.name=ppo"], 1),
        (["algorithm.name=nash_md"], 1),
        (["algorithm.name=raft"], 1),
        (["algorithm.name=raft", "algorithm.kl_weight=0.1"], 8),
        (["algorithm.name=my.module:mine"], 2),
    ],
)
def test_the_largest_assignment_follows_the_method(load_with: LoadWith, overrides: list[str], count: int) -> None:
    settings = load_with(*overrides, "policy.micro_batch_tokens=9999", "rollout.max_tokens=100")
    assert used_responses(settings.algorithm) == count
    assert largest_assignment(settings) == 512 + 100 * count
    with pytest.raises(ConfigError, match=rf"512 \+ {count} x 100 = {512 + 100 * count}"):
        load_with(*overrides, "rollout.max_tokens=100", f"policy.micro_batch_tokens={511 + 100 * count}")


def test_an_own_algorithm_checks_itself(load_with: LoadWith) -> None:
    settings = load_with("algorithm.name=my.module:mine", "algorithm.options={beta: 0.3}", "rollout.top_p=0.9")
    assert settings.algorithm.options == {"beta": 0.3}
