"""`ppo_loss` of the three scripts against naive formulas in float64 and finite differences."""

import copy
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Beta, Categorical, Distribution, Normal, kl_divergence

import ppo_continuous
import ppo_discrete
import ppo_multidiscrete_mask as ppo_mask

POLICIES: dict[str, tuple[ModuleType, dict]] = {
    "discrete": (ppo_discrete, {}),
    "gaussian": (ppo_continuous, {}),
    "state": (ppo_continuous, {"std": "state"}),
    "beta": (ppo_continuous, {"distribution": "beta"}),
    "masks": (ppo_mask, {"mask": "independent"}),
    "conditional": (ppo_mask, {"mask": "conditional"}),
}
SPACES = {
    ppo_discrete: spaces.Discrete(3),
    ppo_continuous: spaces.Box(-1, 1, (2,)),
    ppo_mask: spaces.MultiDiscrete([3, 2, 4]),
}
COEFS = torch.tensor([0.3, 0.7], dtype=torch.float64)
ROWS = 24


def make_agent(policy: str = "discrete", seed: int = 0, **flags: Any) -> tuple:
    """Module, flags, and an agent in float64 whose policy is not uniform."""
    module, own_flags = POLICIES[policy]
    settings = {"hidden_sizes": (6,), "norm_obs": False, "clip_coef": 0.2} | own_flags | flags
    args = module.Args(**settings)
    torch.manual_seed(seed)
    agent = module.Agent(args, spaces.Box(-1, 1, (4,)), SPACES[module]).double()
    with torch.no_grad():
        agent.actor[-1].weight.mul_(100)
    agent.value_norm.mean.fill_(0.5)
    agent.value_norm.std.fill_(2.0)
    agent.conditional = policy == "conditional"
    return module, args, agent


def moved(agent: nn.Module, scale: float, seed: int) -> nn.Module:
    """Copy of an agent with other parameters."""
    torch.manual_seed(seed)
    agent = copy.deepcopy(agent)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += scale * torch.randn_like(parameter)
    return agent


@torch.no_grad()
def make_batch(agent: nn.Module, rows: int = ROWS, seed: int = 1, spread: float = 0.15) -> dict:
    """Samples whose old policy, old values and reference are those of moved agents."""
    old, reference = moved(agent, spread, seed), moved(agent, 0.5, seed + 1)
    torch.manual_seed(seed + 2)
    inputs = [torch.randn(rows, 4, dtype=torch.float64)]
    if hasattr(agent, "nvec"):
        masks = torch.rand(rows, sum(agent.nvec)) < 0.6
        for first in torch.tensor([0, *agent.nvec]).cumsum(0)[:-1]:
            masks[:, first] |= ~masks[:, first : first + 2].any(-1)
        inputs.append(masks)
    actions = old.act(*inputs, agent.noise.sample((rows,)))
    dists, values = old(*inputs)
    return {
        "obs": inputs[0],
        "actions": actions,
        "dists": dists,
        "ref_dists": reference(*inputs)[0],
        "logprobs": old.log_prob(dists, actions),
        "advantages": torch.randn(rows, dtype=torch.float64),
        "values": values,
        "targets": values + 1.5 * torch.randn(rows, dtype=torch.float64),
        "loss_mask": torch.ones(rows, dtype=torch.float64),
        "weights": torch.full((rows,), 1 / rows, dtype=torch.float64),
    } | ({"masks": inputs[1]} if len(inputs) > 1 else {})


def gradient(loss: Tensor, agent: nn.Module) -> Tensor:
    """Gradient of all parameters, one after the other; 0 where the loss does not depend on one."""
    parameters = list(agent.parameters())
    if not loss.requires_grad:
        return torch.cat([torch.zeros_like(p).flatten() for p in parameters])
    parts = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def heads(agent: nn.Module, numbers: Tensor, mask: Tensor | None) -> list[Distribution]:
    """Distributions of PyTorch for the numbers [D] of one sample, over valid choices alone."""
    if mask is not None:
        pairs = zip(numbers.split(agent.nvec), mask.split(agent.nvec), strict=True)
        return [Categorical(logits=logits[valid]) for logits, valid in pairs]
    if hasattr(agent, "beta"):
        first, second = numbers.chunk(2)
        return [Beta(first, second) if agent.beta else Normal(first, second.exp())]
    return [Categorical(logits=numbers)]


def policy_numbers(agent: nn.Module, obs: Tensor) -> Tensor:
    """What `heads` takes, from the output of the policy network."""
    outputs = agent.actor(agent.trunk(obs))
    if not hasattr(agent, "beta"):
        return outputs
    if agent.beta:
        return 1 + (1 + outputs.exp()).log()
    return outputs if agent.std == "state" else torch.cat((outputs, agent.log_std))


def log_prob(agent: nn.Module, dists: list, action: Tensor, mask: Tensor | None) -> Tensor:
    """Log-probability of an action; its index counts valid choices alone."""
    if mask is None:
        return dists[0].log_prob(action).sum()
    valid = zip(mask.split(agent.nvec), action, strict=True)
    index = [head[:choice].sum() for head, choice in valid]
    return sum(dist.log_prob(i) for dist, i in zip(dists, index, strict=True))


def naive_loss(
    agent: nn.Module, batch: dict, args: Any, coefs: Tensor, critic_only: bool
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics sample by sample, with the distributions of PyTorch."""
    clip = math.inf if args.clip_coef is None else args.clip_coef
    vclip = clip if args.vclip_coef is None else args.vclip_coef

    def value_error(value: Tensor, target: Tensor) -> Tensor:
        error = (value - target).abs()
        if args.value_loss == "huber" and error > 1:
            return error - 0.5
        return 0.5 * error**2

    loss, metrics = torch.zeros(()), {}
    for i, weight in enumerate(batch["weights"].tolist()):
        row = {key: x[i] for key, x in batch.items()}
        mask, a, target = row.get("masks"), row["advantages"], row["targets"]
        new = heads(agent, policy_numbers(agent, row["obs"]), mask)
        old = heads(agent, row["dists"], mask)
        value = agent.critic(agent.trunk(row["obs"])).squeeze()
        logprob = log_prob(agent, new, row["actions"], mask)
        ratio = (logprob - row["logprobs"]).exp()
        path = [1.0] * len(new)
        if getattr(agent, "conditional", False):  # the other heads are samples of the old path
            first = mask[: row["actions"][0]].sum()
            path[1:] = [(new[0].log_prob(first) - old[0].log_prob(first)).exp()] * (len(new) - 1)
        objective = torch.min(ratio * a, ratio.clip(1 - clip, 1 + clip) * a)
        if args.dual_clip_coef is not None and a < 0:
            objective = torch.max(objective, args.dual_clip_coef * a)
        value_loss = unclipped = value_error(value, target)
        if args.clip_vloss:
            near = row["values"] + (value - row["values"]).clip(-vclip, vclip)
            value_loss = torch.max(unclipped, value_error(near, target))
        entropy = sum(f * dist.entropy().sum() for f, dist in zip(path, new, strict=True))
        kl = sum(kl_divergence(p, q).sum() for p, q in zip(old, new, strict=True))
        ref_kl = torch.zeros(())
        if args.ref_checkpoint:
            pairs = zip(path, new, heads(agent, row["ref_dists"], mask), strict=True)
            ref_kl = sum(f * kl_divergence(p, q).sum() for f, p, q in pairs)
        total = args.vf_coef * value_loss
        if not critic_only:
            bonus = coefs[0] * entropy if args.ent_coef or args.ent_coef_final else 0.0
            total = total - objective - bonus + args.ref_kl_coef * ref_kl
            if args.kl_coef or args.kl_target:
                total = total + coefs[1] * kl
        loss = loss + weight * total
        terms = {
            "losses/policy_loss": -objective,
            "losses/value_loss": value_loss,
            "losses/value_loss_unclipped": unclipped,
            "losses/value_clipfrac": abs(value - row["values"]).item() > vclip,
            "losses/entropy": entropy,
            "losses/kl": kl,
            "losses/ref_kl": ref_kl,
            "losses/old_approx_kl": row["logprobs"] - logprob,
            "losses/approx_kl": ratio - 1 - ratio.log(),
            "losses/clipfrac": abs(ratio - 1).item() > clip,
            "values/mean": agent.value_norm.std * value + agent.value_norm.mean,
        }
        for tag, term in terms.items():
            metrics[tag] = metrics.get(tag, 0.0) + weight * torch.as_tensor(term).item()
    return loss, metrics


ALL = {
    "ent_coef": -0.1,  # on; the number is that of `coefs`
    "dual_clip_coef": 1.5,
    "vclip_coef": 0.2,
    "value_loss": "huber",
    "kl_coef": 0.7,
    "ref_kl_coef": 0.3,
    "ref_checkpoint": "x",
}
VARIANTS = {
    "default": {},
    "unclipped": {"clip_coef": None},
    "dual clip": {"dual_clip_coef": 1.2, "clip_coef": 0.1},
    "values unclipped": {"clip_vloss": False},
    "own value clip": {"vclip_coef": 0.05},
    "value clip alone": {"clip_coef": None, "vclip_coef": 0.3},
    "huber": {"value_loss": "huber"},
    "penalty": {"kl_coef": 0.7},
    "penalty with target": {"kl_target": 0.01},
    "reference": {"ref_kl_coef": 0.3, "ref_checkpoint": "x"},
    "coefficients": {"vf_coef": 0.1, "ent_coef": 0.0, "ent_coef_final": 0.1},
    "shared": {"shared_network": True},
    "all": ALL,
}
CASES = [("discrete", variant) for variant in VARIANTS]
CASES += [(policy, variant) for policy in list(POLICIES)[1:] for variant in ("default", "all")]


@pytest.mark.parametrize("policy, variant", CASES)
@pytest.mark.parametrize("critic_only", [False, True])
def test_loss_gradient_and_metrics(policy: str, variant: str, critic_only: bool) -> None:
    """Those of the formulas, with weights that differ from sample to sample."""
    module, args, agent = make_agent(policy, **VARIANTS[variant])
    batch = make_batch(agent)
    batch["weights"] = torch.rand(ROWS, dtype=torch.float64).softmax(0)
    loss, metrics = module.ppo_loss(agent, batch, args, COEFS, critic_only)
    expected, evidence = naive_loss(agent, batch, args, COEFS, critic_only)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected.double())
    torch.testing.assert_close(gradient(loss, agent), gradient(expected, agent))
    means = {tag: (x.detach().double() @ batch["weights"]).item() for tag, x in metrics.items()}
    assert means == pytest.approx(evidence, rel=1e-6)
    if variant == "default":
        assert 0.1 < evidence["losses/clipfrac"] < 0.9
        assert 0.1 < evidence["losses/value_clipfrac"] < 0.9
        assert evidence["losses/value_loss"] > evidence["losses/value_loss_unclipped"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("variant", ["default", "all", "shared"])
def test_gradient_by_finite_differences(policy: str, variant: str) -> None:
    """Slopes of the loss in random directions of all parameters."""
    module, args, agent = make_agent(policy, **VARIANTS[variant])
    batch = make_batch(agent)
    exact = gradient(module.ppo_loss(agent, batch, args, COEFS, False)[0], agent)
    start = nn.utils.parameters_to_vector(agent.parameters()).detach().clone()
    torch.manual_seed(0)
    for _ in range(3):
        direction, h = torch.randn_like(start), 1e-6
        sides = []
        for step in (h, -h):
            nn.utils.vector_to_parameters(start + step * direction, agent.parameters())
            sides.append(module.ppo_loss(agent, batch, args, COEFS, False)[0].item())
        slope = (sides[0] - sides[1]) / (2 * h)
        assert slope == pytest.approx((exact @ direction).item(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_policy_loss(clip: float | None, dual_clip: float | None, advantage: float) -> None:
    """Value and slope at given ratios; the dual clip changes nothing at positive advantages."""
    flags = {"vf_coef": 0.0, "clip_coef": clip, "dual_clip_coef": dual_clip}
    module, args, agent = make_agent(**flags)
    batch = make_batch(agent, rows=1)
    logprob = agent.log_prob(agent(batch["obs"])[0], batch["actions"])
    slope_of_logprob = gradient(logprob.sum(), agent)
    batch["advantages"] = torch.tensor([advantage], dtype=torch.float64)
    for ratio in (0.1, 0.79, 0.81, 1.0, 1.1, 1.21, 2.9, 3.1, 50.0):
        batch["logprobs"] = logprob.detach() - math.log(ratio)
        loss, _ = module.ppo_loss(agent, batch, args, 0 * COEFS, False)
        bound, free = ratio, True
        if clip is not None and advantage > 0 and ratio > 1 + clip:
            bound, free = 1 + clip, False
        if clip is not None and advantage < 0 and ratio < 1 - clip:
            bound, free = 1 - clip, False
        if dual_clip is not None and advantage < 0 and ratio > dual_clip:
            bound, free = dual_clip, False
        assert loss.item() == pytest.approx(-bound * advantage, rel=1e-12)
        expected = -advantage * ratio * slope_of_logprob * free
        torch.testing.assert_close(gradient(loss, agent), expected)


@pytest.mark.parametrize(
    "value, target, flags, loss, slope",
    [
        (1.5, 2.0, {"vclip_coef": 0.2}, 0.64, 0.0),
        (0.7, 2.0, {"vclip_coef": 0.2}, 1.69, -2.6),
        (1.5, 2.0, {"vclip_coef": 0.6}, 0.25, -1.0),
        (1.5, 2.0, {"clip_coef": 0.2}, 0.64, 0.0),
        (1.5, 2.0, {"clip_coef": 0.9, "vclip_coef": 0.2}, 0.64, 0.0),
        (1.5, 2.0, {"clip_coef": None}, 0.25, -1.0),
        (1.5, 2.0, {"clip_coef": None, "vclip_coef": 0.2}, 0.64, 0.0),
        (1.5, 2.0, {"clip_vloss": False}, 0.25, -1.0),
        (0.5, 0.0, {"vclip_coef": 0.2}, 0.64, 0.0),
        (1.5, 2.0, {"clip_vloss": False, "value_loss": "huber"}, 0.25, -1.0),
        (5.0, 2.0, {"clip_vloss": False}, 9.0, 6.0),
        (5.0, 2.0, {"clip_vloss": False, "value_loss": "huber"}, 5.0, 2.0),
        (5.0, 2.0, {"vclip_coef": 0.2, "value_loss": "huber"}, 5.0, 2.0),
        (5.0, 7.0, {"vclip_coef": 0.2, "value_loss": "huber"}, 10.6, 0.0),
    ],
)
@pytest.mark.parametrize("policy", ["discrete", "gaussian", "masks"])
def test_value_loss(
    policy: str, value: float, target: float, flags: dict, loss: float, slope: float
) -> None:
    """The loss of one sample with old value 1, in numbers worked out by hand, and its slope."""
    module, args, agent = make_agent(policy, vf_coef=2.0, **flags)
    nn.init.zeros_(agent.critic[-1].weight)
    nn.init.constant_(agent.critic[-1].bias, value)
    batch = make_batch(agent, rows=1)
    batch["values"] = torch.ones(1, dtype=torch.float64)
    batch["targets"] = torch.full((1,), target, dtype=torch.float64)
    total, metrics = module.ppo_loss(agent, batch, args, COEFS, True)
    total.backward()
    assert total.item() == pytest.approx(loss)
    assert agent.critic[-1].bias.grad.item() == pytest.approx(slope, abs=1e-12)
    assert metrics["losses/value_loss"].item() == pytest.approx(loss / 2)


@pytest.mark.parametrize("policy", POLICIES)
def test_samples_of_weight_zero_count_for_nothing(policy: str) -> None:
    """Loss, gradient and metrics are those of the other samples, whatever these hold."""
    module, args, agent = make_agent(policy, **ALL)
    batch, other = make_batch(agent), make_batch(agent, seed=77, spread=0.4)
    dead = torch.arange(ROWS) % 3 == 1
    weights = (~dead).double() / (~dead).sum()
    mixed = {
        key: torch.where(dead.view(-1, *[1] * (x.ndim - 1)), other[key], x)
        for key, x in batch.items()
    }
    mixed["advantages"] = torch.where(dead, 1e3, batch["advantages"])
    alone = {key: x[~dead] for key, x in batch.items()} | {"weights": weights[~dead]}
    results = []
    for rows in (batch | {"weights": weights}, mixed | {"weights": weights}, alone):
        loss, metrics = module.ppo_loss(agent, rows, args, COEFS, False)
        means = [x.detach().double() @ rows["weights"] for x in metrics.values()]
        results.append((gradient(loss, agent), torch.stack([loss.detach(), *means])))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
