"""Trajectories -> the scalar whose gradient is the policy gradient, one per task: chapters "Policy gradients" and
"Meta-reinforcement learning".

All are *maximised*; all have the same value of the gradient at the parameters that acted, the REINFORCE estimate. They
differ in their second derivative there, which is what a meta-gradient passes through. Call I the return after a step
along the *expected* gradient, II the return after a step along the *sampled* one, which is what is deployed:

==========================  ========================================================================================
``log_likelihood``          biased for I at any number of episodes; unbiased for II together with ``sampling_term``
``ratio``                   consistent for I at horizon 1; beyond it drops the terms between different steps
``low_variance_curvature``  the same derivatives as ``ratio`` at the parameters that acted; also defined elsewhere
``dice``                    consistent for I at any horizon; the largest variance of the four
==========================  ========================================================================================

The statements are proved by enumeration in ``tests/equations/test_meta_rl.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .policies import Policy
from .rollout import Trajectories

Surrogate = Callable[[Policy, list[Tensor], Trajectories, Tensor], Tensor]
"""(policy, parameters, data, advantage (T, M, N)) -> (M,), mean over episodes of a sum over steps, to be maximised."""


def log_likelihood(policy: Policy, parameters: list[Tensor], data: Trajectories, advantage: Tensor) -> Tensor:
    """(M,) mean over episodes of sum_t log pi(a_t | s_t) A_t, equation (eq-surrogate). Maximise it.

    Its gradient at the parameters that acted is the REINFORCE estimate of each task's policy gradient (Williams
    1992); its *value* means nothing. ``advantage`` is (T, M, N) and is held constant.
    """
    log_prob = policy.log_prob(parameters, data.observation, data.action)
    return (log_prob * advantage.detach() * data.mask).sum(0).mean(-1)


def ratio(policy: Policy, parameters: list[Tensor], data: Trajectories, advantage: Tensor) -> Tensor:
    """(M,) mean over episodes of sum_t pi(a_t | s_t) / pi_old(a_t | s_t) A_t, where pi_old acted (``data.log_prob``).

    Each step is reweighted by its own likelihood ratio only, as in TRPO and PPO (Schulman et al. 2015) and the inner
    loop of ProMP's code (Rothfuss et al. 2019).
    """
    log_prob = policy.log_prob(parameters, data.observation, data.action)
    return ((log_prob - data.log_prob).exp() * advantage.detach() * data.mask).sum(0).mean(-1)


def low_variance_curvature(policy: Policy, parameters: list[Tensor], data: Trajectories, advantage: Tensor) -> Tensor:
    """(M,) as ``ratio``, with the log-probability at ``parameters`` themselves, held constant, in the denominator
    (LVC; Rothfuss et al. 2019). Differs from ``ratio`` only away from the parameters that acted."""
    log_prob = policy.log_prob(parameters, data.observation, data.action)
    return ((log_prob - log_prob.detach()).exp() * advantage.detach() * data.mask).sum(0).mean(-1)


def dice(policy: Policy, parameters: list[Tensor], data: Trajectories, advantage: Tensor) -> Tensor:
    """(M,) mean over episodes of sum_t (m_t - m_{t-1}) A_t, with m_t = prod_{k <= t} pi(a_k | s_k) / pi_old(a_k | s_k):
    DiCE (Foerster et al. 2018) written with advantages (Loaded DiCE with lambda = 1, Farquhar et al. 2019).

    Its derivatives of every order at the parameters that acted are unbiased for those of the expected return. The
    constant in the denominator is the acting policy's probability, as in ``ratio``, so that the surrogate is a function
    of the parameters elsewhere too; DiCE's "magic box" holds the current one constant, with the same derivatives there.
    """
    log_prob = policy.log_prob(parameters, data.observation, data.action)
    magic = ((log_prob - data.log_prob) * data.mask).cumsum(0).exp()
    before = torch.cat((torch.ones_like(magic[:1]), magic[:-1]))
    return ((magic - before) * advantage.detach() * data.mask).sum(0).mean(-1)


def sampling_term(policy: Policy, parameters: list[Tensor], data: Trajectories, score: Tensor) -> Tensor:
    """(M,) score times the log-probability of *all* support episodes, sum over episodes and steps: what E-MAML adds
    (Stadie et al. 2018), because the initial parameters also decide which support episodes are drawn.

    ``score`` (M,) is the return after adaptation less a baseline that does not depend on the task's support; held
    constant. ``parameters`` are those that collected ``data``, with their dependence on the meta-parameters kept.
    """
    log_prob = policy.log_prob(parameters, data.observation, data.action)
    return (log_prob * data.mask).sum(0).sum(-1) * score.detach()
