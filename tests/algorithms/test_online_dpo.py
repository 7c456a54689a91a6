"""Online DPO as a whole: the declaration, and that it reaches its optimum in a world of three actions."""

from __future__ import annotations

import random

import pytest
import torch

from rlhf.algorithms import AlgorithmError, make
from rlhf.algorithms.builders import Dropped
from rlhf.algorithms.contrast import contrast_loss
from rlhf.config.algorithm import AlgorithmSettings
from tests.helpers import make_feedback, make_rollout

REWARDS = [1.0, 0.2, -0.5]
REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()


def test_settings_reach_the_declaration() -> None:
    algorithm = make(AlgorithmSettings(samples_per_prompt=4, beta=0.3, logp_reduce="mean"))
    assert (algorithm.samples_per_prompt, algorithm.objective.scale, algorithm.objective.reduce) == (4, 0.3, "mean")
    robust = make(AlgorithmSettings(loss="robust", label_smoothing=0.1))
    assert (robust.objective.link, robust.objective.flip_rate) == ("robust", 0.1)
    built = robust.build(make_rollout([[1], [2]]), make_feedback([1, 0]), random.Random(0))
    assert built[0].target == 1.0, "the robust loss corrects for flips itself"
    smooth = make(AlgorithmSettings(label_smoothing=0.1))
    assert smooth.build(make_rollout([[1], [2]]), make_feedback([1, 0]), random.Random(0))[0].target == pytest.approx(0.9)
    assert make(AlgorithmSettings(pairing="random")).build.func.__name__ == "random_pair"


def train(settings: AlgorithmSettings, steps: int) -> torch.Tensor:
    """Log-probs of a softmax policy over three actions after online DPO on sampled responses, through builder and kernel."""
    algorithm = make(settings)
    logits = REFERENCE.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    for _ in range(steps):
        probabilities = logits.detach().softmax(0)
        actions = torch.multinomial(probabilities, 64 * settings.samples_per_prompt, True, generator=generator)
        scores, losses = logits.log_softmax(0) - REFERENCE, []
        for group in actions.view(64, -1).tolist():
            rollout, feedback = make_rollout([[a] for a in group]), make_feedback([REWARDS[a] for a in group])
            built = algorithm.build(rollout, feedback, rng)
            if isinstance(built, Dropped):
                continue
            for item in built:
                members = scores[[group[m] for m in item.members]]
                coefficients = torch.tensor([item.coefficients], dtype=torch.float64)
                target, weight = (torch.tensor([v], dtype=torch.float64) for v in (item.target, item.weight))
                losses.append(contrast_loss(algorithm.objective, members, coefficients, target, weight))
        if not losses:  # every prompt of this step gave identical responses
            continue
        optimizer.zero_grad()
        (torch.cat(losses).sum() / len(losses)).backward()
        optimizer.step()
        schedule.step()
    return logits.detach().log_softmax(0)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_soft_labels_reach_the_regularised_optimum(beta: float) -> None:
    """With p = s(r_i - r_j) the loss is least where beta h = r_i - r_j: pi* is proportional to ref exp(r / beta)."""
    learned = train(AlgorithmSettings(beta=beta, labels="soft", pairing="random"), steps=300)
    optimum = (REFERENCE + torch.tensor(REWARDS, dtype=torch.float64) / beta).log_softmax(0)
    assert torch.allclose(learned.exp(), optimum.exp(), atol=0.01)


def test_hard_labels_put_the_mass_on_the_best_action() -> None:
    learned = train(AlgorithmSettings(beta=0.1, samples_per_prompt=4), steps=300)
    assert learned.exp()[0].item() > 0.95


def test_an_own_algorithm_by_import_path() -> None:
    algorithm = make(AlgorithmSettings(name="rlhf.algorithms.online_dpo:online_dpo"))
    assert algorithm.name == "online_dpo"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("onlin_dpo", "online_dpo"),
        ("no_such_module:make", "cannot import"),
        ("rlhf.algorithms:nothing", "cannot import"),
        ("rlhf.types:Score", "not an Algorithm"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, says: str) -> None:
    with pytest.raises(AlgorithmError, match=says):
        make(AlgorithmSettings(name=name))
