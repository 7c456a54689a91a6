"""The learning-rate schedule at its corners."""

from __future__ import annotations

import pytest

from rlhf.config.policy import PolicySettings
from rlhf.training.deepspeed import learning_rate_factor


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1.0, 1.0, 0.88284, 0.6, 0.31716, 0.2]),
    ],
)
def test_warm_up_shape_and_end(schedule: str, expected: list[float]) -> None:
    settings = PolicySettings(model="m", schedule=schedule, warmup_steps=2, min_learning_rate_ratio=0.2)
    factor = learning_rate_factor(settings, total_updates=6)
    assert [factor(update) for update in range(7)] == pytest.approx(expected, abs=1e-4)
    assert factor(100) == pytest.approx(expected[-1])
