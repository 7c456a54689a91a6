"""PPO for language models (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022).

    r_t = -beta log(pi/ref)_t + 1[t last] clip(R, -10, 10)
    A_t = sum_{s >= t} (gamma lam)^(s-t) (r_s + gamma V_{s+1} - V_s)      then whitened over all tokens of the step
    L   = -min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t),             rho_t = pi(y_t) / pi_old(y_t)
    L_V = 1/2 max( (V - G)^2, (V_old + clip(V - V_old, -c, c) - G)^2 ),   G_t = A_t + V_t before whitening

R is a response's reward, ref the fixed starting policy, V the critic. Both losses are means over all response tokens of an update.

Deviations: policy and critic share no weights and no optimizer, so L_V has no coefficient. Log-ratios are not clamped in the KL.
The gap between the engines' and the trainer's log-probs is corrected by truncated importance weights (`correction`). The value
head starts near 0, with standard deviation 1/(H+1).
"""

from __future__ import annotations

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.policy_gradient import Critic
from rlhf.algorithms.policy_gradient_method import policy_gradient_method
from rlhf.config import Settings


def ppo(settings: Settings) -> Algorithm:
    """The declaration: current policy, a learned value baseline, clipped ratio, KL in the reward."""
    chosen = settings.algorithm
    critic = Critic(
        model=chosen.critic_model,
        learning_rate=chosen.critic_learning_rate,
        warmup_steps=chosen.critic_warmup_steps,
        value_clip=chosen.value_clip,
        lam=chosen.lam,
    )
    return policy_gradient_method(settings, critic=critic)
