"""Whole updates against Stable-Baselines3, and against the loop written out in float64."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.logger import configure
from test_loss import ROWS, SPACES, make_agent, make_batch, naive_loss
from test_update import MODULES, iterations, make_optimizer, parts_that_differ  # noqa: F401
from torch import Tensor, nn

EVIDENCE = {
    "losses/policy_loss": (1, "train/policy_gradient_loss"),
    "losses/value_loss": (0.5, "train/value_loss"),
    "losses/entropy": (-1, "train/entropy_loss"),
    "losses/clipfrac": (1, "train/clip_fraction"),
}


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every permutation that is drawn from now on."""
    randperm, seen = torch.randperm, []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(randperm(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(torch, "randperm", spy)
    return seen


def cast(batch: dict, dtype: torch.dtype) -> dict:
    return {k: x.to(dtype) if x.is_floating_point() else x for k, x in batch.items()}


# ---- Stable-Baselines3


class Spaces(gym.Env):
    """Tells spaces and nothing else."""

    def __init__(self, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = spaces.Box(-1, 1, (4,)), action_space


def make_sb3(action_space: spaces.Space, batch: dict, args: Any) -> PPO:
    """Its PPO with the batch in its buffer."""
    model = (MaskablePPO if "masks" in batch else PPO)(
        "MlpPolicy",
        Spaces(action_space),
        n_steps=ROWS,
        n_epochs=args.update_epochs,
        batch_size=ROWS // args.num_minibatches,
        learning_rate=args.learning_rate,
        clip_range=args.clip_coef,
        normalize_advantage=args.norm_adv,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef / 2,  # its loss is the whole square
        max_grad_norm=args.max_grad_norm,
        policy_kwargs={"net_arch": [6], "optimizer_kwargs": {"eps": args.adam_eps}},
        device="cpu",
    )
    model.set_logger(configure(None, []))
    buffer = model.rollout_buffer
    for i in range(ROWS):
        masks = {"action_masks": batch["masks"][i].numpy()} if "masks" in batch else {}
        row = (batch["obs"][i].numpy(), batch["actions"][i].numpy(), np.zeros(1), np.zeros(1))
        buffer.add(*row, batch["values"][i], batch["logprobs"][i].view(1), **masks)
    buffer.advantages = batch["advantages"].view(-1, 1).numpy()
    buffer.returns = batch["targets"].view(-1, 1).numpy()
    return model


def sb3_parameters(model: PPO, agent: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Pairs of the agent's parameters and of its."""
    policy = model.policy
    theirs = [policy.mlp_extractor.policy_net, policy.action_net]
    theirs += [policy.mlp_extractor.value_net, policy.value_net]
    parameters = [p for module in theirs for p in module.parameters()]
    ours = [*agent.actor.parameters(), *agent.critic.parameters()]
    if hasattr(agent, "log_std"):
        ours, parameters = [*ours, agent.log_std], [*parameters, policy.log_std]
    return list(zip(ours, parameters, strict=True))


@pytest.mark.parametrize("policy", ["discrete", "gaussian", "masks"])
@pytest.mark.parametrize(
    "flags", [{}, {"norm_adv": False, "max_grad_norm": 0.05, "ent_coef": 0.2, "num_minibatches": 1}]
)
def test_update_of_stable_baselines(
    policy: str, flags: dict, orders: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs of minibatches in the same order end at the same weights and metrics."""
    settings = {"clip_vloss": False, "num_minibatches": 3, "update_epochs": 3, "ent_coef": 0.01}
    settings |= {"learning_rate": 1e-2, "max_grad_norm": 0.5} | flags
    module, args, agent = make_agent(policy, **settings)
    batch = cast(make_batch(agent), torch.float32)
    agent.float()
    model = make_sb3(SPACES[module], batch, args)
    pairs = sb3_parameters(model, agent)
    start = [ours.detach().clone() for ours, _ in pairs]
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(ours)
    coefs = torch.tensor([args.ent_coef, 0.0])
    metrics = module.update(agent, make_optimizer(agent, args), None, batch, args, coefs)
    permutations = iter([order.numpy() for order in orders])
    monkeypatch.setattr(np.random, "permutation", lambda _: next(permutations))
    model.train()
    assert len(orders) == 3
    assert next(permutations, None) is None
    for (ours, theirs), before in zip(pairs, start, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert (ours - before).abs().max() > 1e-3
    for tag, (factor, name) in EVIDENCE.items():
        expected = factor * model.logger.name_to_value[name]
        assert metrics[tag].item() == pytest.approx(expected, rel=1e-4, abs=1e-6), tag


# ---- the loop written out


def naive_update(
    agent: nn.Module,
    batch: dict,
    args: Any,
    coefs: Tensor,
    orders: list[Tensor],
    groups: list[tuple[float, float]],
    moments: dict,
) -> dict[str, float]:
    """Epochs, minibatches and Adam of a textbook; `groups` are learning rates and eps."""
    valid = batch["loss_mask"] > 0
    orders, history, stop = iter(orders), [], False
    for critic_only in [False] * args.update_epochs + [True] * args.critic_epochs:
        if stop and not critic_only:
            continue
        kls = []
        for rows in next(orders).chunk(args.num_minibatches):
            minibatch = {key: x[rows] for key, x in batch.items()}
            minibatch["weights"] = valid[rows] / valid[rows].sum()
            pool = rows if args.norm_adv_scope == "minibatch" else torch.arange(len(valid))
            pool = batch["advantages"][pool[valid[pool]]]
            if args.norm_adv:
                centered = minibatch["advantages"] - pool.mean()
                minibatch["advantages"] = centered / (pool.std() + 1e-8)
            loss, metrics = naive_loss(agent, minibatch, args, coefs, critic_only)
            named = dict(agent.named_parameters())
            names = [name for name in named if name.startswith("critic.") or not critic_only]
            grads = torch.autograd.grad(loss, [named[name] for name in names])
            norm = sum(grad.square().sum() for grad in grads).sqrt().item()
            limit = np.inf if args.max_grad_norm is None else args.max_grad_norm
            for name, grad in zip(names, grads, strict=True):
                lr, eps = groups[name.startswith("critic.")]
                t, m, v = moments.get(name, (0, 0.0, 0.0))
                grad = grad * min(1.0, limit / (norm + 1e-6))
                t, m, v = t + 1, 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
                moments[name] = (t, m, v)
                step = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + eps)
                named[name].data -= lr * step
            history.append(metrics | {"losses/grad_norm": norm})
            kls.append(metrics["losses/approx_kl"])
        stop = args.target_kl is not None and np.mean(kls) > args.target_kl
    assert next(orders, None) is None
    return {tag: np.mean([row[tag] for row in history]) for tag in history[0]}


UPDATES = [  # flags, and the networks that end elsewhere than without them
    ({}, ""),
    ({"actor_learning_rate": 1e-3}, "actor"),
    ({"critic_learning_rate": 1e-3}, "critic"),
    ({"actor_learning_rate": 0.0}, "actor"),
    ({"critic_learning_rate": 0.0}, "critic"),
    ({"learning_rate": 1e-3}, "actor critic"),
    ({"adam_eps": 1e-2}, "actor critic"),
    ({"actor_adam_eps": 1e-2}, "actor"),
    ({"critic_adam_eps": 0.0}, "critic"),
    ({"max_grad_norm": 0.05}, "actor critic"),
    ({"norm_adv": False}, "actor"),
    ({"norm_adv_scope": "batch"}, "actor"),
    ({"clip_coef": 0.05, "vclip_coef": 0.2}, "actor"),
    ({"clip_coef": None, "vclip_coef": 0.2}, "actor"),
    ({"dual_clip_coef": 1.01}, "actor"),
    ({"clip_vloss": False}, "critic"),
    ({"vclip_coef": 0.05}, "critic"),
    ({"value_loss": "huber"}, "critic"),
    ({"vf_coef": 0.01}, "critic"),
    ({"ent_coef": 0.2}, "actor"),
    ({"kl_coef": 0.5}, "actor"),
    ({"ref_kl_coef": 0.5, "ref_checkpoint": "x"}, "actor"),
    ({"target_kl": 0.0}, "actor critic"),
    ({"target_kl": 1e9}, ""),
    ({"critic_epochs": 2}, "critic"),
    ({"critic_epochs": 2, "target_kl": 0.0}, "actor critic"),
    ({"update_epochs": 3}, "actor critic"),
    ({"num_minibatches": 4}, "actor critic"),
    ({"gamma": 0.5, "gae_lambda": 0.1, "value_target": "td", "critic_warmup_iterations": 1}, ""),
]
CASES = [("discrete", *case) for case in UPDATES]
CASES += [(policy, *UPDATES[-4]) for policy in ("gaussian", "state", "beta", "masks")]


@pytest.mark.parametrize("policy, flags, parts", CASES)
def test_update(policy: str, flags: dict, parts: str, orders: list[Tensor]) -> None:
    """Weights and metrics, with ignored samples; a flag moves the networks that it is about."""
    base = {"num_minibatches": 2, "update_epochs": 2, "max_grad_norm": None, "ent_coef": 0.01}
    base |= {"learning_rate": 1e-2, "adam_eps": 1e-5}
    results = []
    for settings in (base, base | flags):
        orders.clear()
        module, args, agent = make_agent(policy, **settings)
        _, _, naive = make_agent(policy, **settings)
        batch = make_batch(agent)
        batch["loss_mask"][::5] = 0
        coefs = torch.tensor([args.ent_coef, args.kl_coef], dtype=torch.float64)
        optimizer = make_optimizer(agent, args)
        metrics = module.update(agent, optimizer, None, dict(batch), args, coefs)
        groups = [(group["lr"], group["eps"]) for group in optimizer.param_groups]
        expected = naive_update(naive, batch, args, coefs, orders, groups, {})
        for p, q in zip(agent.parameters(), naive.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-8, rtol=0)
        assert {tag: x.item() for tag, x in metrics.items()} == pytest.approx(expected, rel=1e-5)
        results.append(agent)
    assert parts_that_differ(*results) - {"log_std"} == set(parts.split())


@pytest.mark.parametrize("module", MODULES)
def test_iterations_of_training(
    module: Any,
    iterations: Callable,  # noqa: F811
    orders: list[Tensor],
) -> None:
    """The first two updates of a run in float32 stay within 2e-5 of the loop's."""
    flags = "--actor-learning-rate 3e-3 --critic-learning-rate 1e-3 --actor-adam-eps 1e-3"
    flags += " --norm-obs --norm-reward --norm-value popart --kl-coef 0.3 --ent-coef 0.02"
    flags += " --critic-warmup-iterations 1 --critic-epochs 1"
    moments, remaining = {}, list(orders)
    for it in iterations(flags, module)[:2]:
        remaining = remaining or list(orders)
        epochs, remaining = remaining[:3], remaining[3:]
        agent = it.before.double()
        batch = cast(it.batch, torch.float64)
        batch["obs"] = agent.preprocess(batch["obs"])
        groups = list(zip(it.rates, it.eps, strict=True))
        coefs = torch.tensor(it.coefs, dtype=torch.float64)
        naive_update(agent, batch, it.args, coefs, epochs, groups, moments)
        for p, q in zip(it.after.parameters(), agent.parameters(), strict=True):
            torch.testing.assert_close(p.double(), q, atol=2e-5, rtol=0)
