"""Distribution, losses and what `ppo_loss` puts together, against formulas in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch.distributions import Categorical
from torch.distributions import kl_divergence as torch_kl

import ppo_discrete as ppo

COEFS = torch.tensor([1.0, 0.5, -0.01, 0.7, 0.3], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(seed), dtype=torch.float64)


def make_agent(args: ppo.Args, seed: int = 0) -> ppo.Agent:
    """Four numbers to observe, three actions, in float64; a policy that is not uniform."""
    torch.manual_seed(seed)
    agent = ppo.Agent(args, spaces.Box(-1, 1, (4,)), spaces.Discrete(3)).double()
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300)
    return agent


def make_batch(agent: ppo.Agent, rows: int = 24, seed: int = 1, spread: float = 0.3) -> ppo.Batch:
    """Rows whose old policy, reference and old values are near the agent's, but not at them."""
    obs = normal(rows, 4, seed=seed)
    with torch.no_grad():
        dists, values = agent(obs)
    old = (dists + spread * normal(rows, 3, seed=seed + 1)).log_softmax(-1)
    actions = Categorical(logits=old).sample()
    return ppo.Batch(
        obs=obs,
        actions=actions,
        logprobs=Categorical(logits=old).log_prob(actions),
        dists=old,
        ref_dists=(dists + normal(rows, 3, seed=seed + 2)).log_softmax(-1),
        advantages=normal(rows, seed=seed + 3),
        targets=values + normal(rows, seed=seed + 4),
        values=values + spread * normal(rows, seed=seed + 5),
        weights=torch.full((rows,), 1 / rows, dtype=torch.float64),
    )


def gradient(loss: Tensor, agent: ppo.Agent) -> Tensor:
    """Gradient of all parameters, one after the other; 0 where the loss does not depend on one."""
    parts = torch.autograd.grad(loss, list(agent.parameters()), allow_unused=True)
    named = zip(parts, agent.parameters(), strict=True)
    return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in named])


def naive_loss(
    agent: ppo.Agent, batch: ppo.Batch, coefs: Tensor, args: ppo.Args
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics row by row, with the distributions of PyTorch."""
    names = ("policy_loss", "value_loss", "entropy", "kl", "ref_kl", "old_approx_kl", "approx_kl")
    names += ("clipfrac", "value_loss_unclipped", "value_clipfrac")
    total = {f"losses/{name}": 0.0 for name in names} | {"values/mean": 0.0}
    logits, outputs = agent.actor(agent.trunk(batch.obs)), agent.critic(agent.trunk(batch.obs))
    vclip = args.clip_coef if args.vclip_coef is None else args.vclip_coef

    def squared(value: Tensor, target: Tensor) -> Tensor:
        error = (value - target).abs()
        if args.value_loss == "huber" and error > 1:
            return error - 0.5
        return 0.5 * error**2

    for i, weight in enumerate(batch.weights.tolist()):
        dist, old = Categorical(logits=logits[i]), Categorical(logits=batch.dists[i])
        a, v, v_old, target = batch.advantages[i], outputs[i, 0], batch.values[i], batch.targets[i]
        new_logprob = dist.log_prob(batch.actions[i])
        ratio = (new_logprob - batch.logprobs[i]).exp()
        surrogate = ratio * a
        if args.clip_coef is not None:
            clipped = ratio.clip(1 - args.clip_coef, 1 + args.clip_coef) * a
            surrogate = min(surrogate, clipped)
        if args.dual_clip_coef is not None and a < 0:
            surrogate = max(surrogate, args.dual_clip_coef * a)
        value_loss = unclipped = squared(v, target)
        outside = vclip is not None and abs(v - v_old).item() > vclip
        if args.clip_vloss and outside:
            value_loss = max(unclipped, squared(v_old + vclip * (v - v_old).sign(), target))
        row = {
            "losses/policy_loss": -surrogate,
            "losses/value_loss": value_loss,
            "losses/entropy": dist.entropy(),
            "losses/kl": torch_kl(old, dist),
            "losses/ref_kl": torch_kl(dist, Categorical(logits=batch.ref_dists[i])),
            "losses/old_approx_kl": batch.logprobs[i] - new_logprob,
            "losses/approx_kl": ratio - 1 - ratio.log(),
            "losses/clipfrac": float(abs(ratio.item() - 1) > (args.clip_coef or np.inf)),
            "losses/value_loss_unclipped": unclipped,
            "losses/value_clipfrac": float(outside),
            "values/mean": v,
        }
        total = {key: total[key] + weight * value for key, value in row.items()}
    terms = [total[name] for name in ppo.METRICS[:5]]
    loss = sum(coef * term for coef, term in zip(coefs.tolist(), terms, strict=True))
    return loss, {key: torch.as_tensor(x).item() for key, x in total.items()}


# ---- the distribution


LOGITS = {
    "spread": normal(50, 5, seed=3) * 3,
    "extreme": normal(50, 5, seed=4) * 60,
    "uniform": torch.zeros(1, 5, dtype=torch.float64),
    "two": normal(7, 2, seed=5),
    "batched": normal(3, 4, 6, seed=6),
}


@pytest.mark.parametrize("name", LOGITS)
def test_distribution(name: str) -> None:
    """Log-prob, entropy, KL and mode are those of torch.distributions; shapes too."""
    logits, other = LOGITS[name], LOGITS[name].flip(-1) + 0.5
    dist, reference = logits.log_softmax(-1), Categorical(logits=logits)
    torch.manual_seed(0)
    actions = reference.sample()
    torch.testing.assert_close(ppo.Agent.log_prob(dist, actions), reference.log_prob(actions))
    torch.testing.assert_close(ppo.Agent.entropy(dist), reference.entropy())
    expected = torch_kl(reference, Categorical(logits=other))
    torch.testing.assert_close(ppo.Agent.kl_divergence(dist, other.log_softmax(-1)), expected)
    assert torch.equal(ppo.Agent.mode(dist), reference.mode)
    assert torch.equal(ppo.Agent.mode(logits), reference.mode)
    assert ppo.Agent.kl_divergence(dist, dist).abs().max() == 0


def test_distribution_gradients_are_finite() -> None:
    """A probability of 0 in float leaves entropy, KL and their gradients finite."""
    logits = torch.tensor([[0.0, 500.0, -500.0]], requires_grad=True)
    dist = logits.log_softmax(-1)
    for term in (ppo.Agent.entropy(dist), ppo.Agent.kl_divergence(dist, dist.detach().flip(-1))):
        assert term.isfinite().all()
        assert torch.autograd.grad(term.sum(), logits, retain_graph=True)[0].isfinite().all()


def test_sampling_frequencies() -> None:
    """Chi-square of 200,000 draws, from logits and from log-probs alike."""
    probs = torch.tensor([0.001, 0.049, 0.15, 0.3, 0.5])
    logits, n = probs.log() + 7.0, 200_000
    agent = ppo.Agent(ppo.Args(), spaces.Box(-1, 1, (4,)), spaces.Discrete(5))
    torch.manual_seed(0)
    noise = agent.draw_noise(n)
    assert noise.shape == (n, 5)
    actions = ppo.Agent.sample(logits.expand(n, 5), noise)
    assert torch.equal(actions, ppo.Agent.sample(logits.log_softmax(-1).expand(n, 5), noise))
    counts = torch.bincount(actions, minlength=5)
    chi_square = ((counts - n * probs) ** 2 / (n * probs)).sum().item()
    assert chi_square < 18.5  # 4 degrees of freedom: above in 1 of 1,000 runs
    assert chi_square > 0.05  # draws, not quotas
    pairs = torch.bincount(5 * actions[0::2] + actions[1::2], minlength=25)
    expected = (n / 2 * probs[:, None] * probs).flatten()
    assert ((pairs - expected) ** 2 / expected).sum() < 51.2  # independent: 24 degrees of freedom


def test_noise_has_the_shape_asked_for() -> None:
    agent = ppo.Agent(ppo.Args(), spaces.Box(-1, 1, (4,)), spaces.Discrete(3))
    noise = agent.draw_noise(6, 2)
    assert noise.shape == (6, 2, 3)
    assert noise.isfinite().all()
    assert len(noise.unique()) > 30


def test_act_draws_from_the_policy() -> None:
    """With noise it samples what `forward` says; without, it takes the most probable action."""
    agent = make_agent(ppo.Args(hidden_sizes=(8,), norm_obs=True))
    agent.obs_norm.mean.fill_(0.5)
    agent.obs_norm.std.fill_(2.0)
    obs = (0.2 * normal(1, 4, seed=11)).expand(20_000, 4)
    dists, _ = agent(obs)
    torch.manual_seed(3)
    actions = agent.act(obs, agent.draw_noise(20_000))
    frequency = torch.bincount(actions, minlength=3) / 20_000
    torch.testing.assert_close(frequency, dists[0].exp().float(), atol=0.015, rtol=0)
    assert frequency.min() > 0.05
    rows = normal(100, 4, seed=10)
    assert torch.equal(agent.act(rows, None), Categorical(logits=agent(rows)[0]).mode)


def test_actions_of_the_environment_start_where_its_space_does() -> None:
    agent = ppo.Agent(ppo.Args(), spaces.Box(-1, 1, (4,)), spaces.Discrete(3, start=-1))
    assert agent.to_env(torch.tensor([0, 1, 2])).tolist() == [-1, 0, 1]


# ---- the losses by themselves


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
@pytest.mark.parametrize("ratio", [0.1, 0.79, 1.0, 1.1, 1.21, 2.9, 3.1, 50.0])
def test_policy_loss(
    clip: float | None, dual_clip: float | None, advantage: float, ratio: float
) -> None:
    """Value and slope in the ratio; the dual clip changes nothing where the advantage is positive.

    The slope is that of the ratio's own line or 0: clipped where the ratio has gone far enough.
    """
    r = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    loss = ppo.policy_loss(r, torch.tensor([advantage], dtype=torch.float64), clip, dual_clip)
    (slope,) = torch.autograd.grad(loss.sum(), r)
    objective, free = ratio * advantage, True
    if clip is not None and advantage > 0 and ratio > 1 + clip:
        objective, free = (1 + clip) * advantage, False
    if clip is not None and advantage < 0 and ratio < 1 - clip:
        objective, free = (1 - clip) * advantage, False
    if dual_clip is not None and advantage < 0 and ratio > dual_clip:
        objective, free = dual_clip * advantage, False
    assert loss.item() == pytest.approx(-objective, rel=1e-12)
    assert slope.item() == pytest.approx(-advantage if free else 0.0, rel=1e-12)


@pytest.mark.parametrize("error", [-3.0, -1.01, -0.5, 0.0, 0.99, 7.0])
def test_value_loss(error: float) -> None:
    """Half the square, and Huber's linear tails; values and slopes, row by row."""
    values = torch.tensor([5.0 + error, 5.0], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([5.0, 5.0], dtype=torch.float64)
    tail = abs(error) > 1
    cases = {False: (error**2 / 2, error)}
    cases[True] = (abs(error) - 0.5, np.sign(error)) if tail else cases[False]
    for huber, (expected, slope) in cases.items():
        loss = ppo.value_loss(values, targets, huber)
        assert loss.tolist() == pytest.approx([expected, 0.0])
        assert torch.autograd.grad(loss.sum(), values)[0].tolist() == pytest.approx([slope, 0.0])


@pytest.mark.parametrize("old, target", [(1.0, 2.0), (1.0, 0.0)])
@pytest.mark.parametrize("value", [0.7, 0.9, 1.1, 1.5, 3.5])
@pytest.mark.parametrize("clip_coef, vclip_coef", [(0.2, None), (0.9, 0.2), (None, 0.2)])
def test_clipped_value_loss(
    old: float, target: float, value: float, clip_coef: float | None, vclip_coef: float | None
) -> None:
    """Elementwise maximum of both losses; no gradient where the clipped one is the larger."""
    args = ppo.Args(hidden_sizes=(), clip_coef=clip_coef, vclip_coef=vclip_coef)
    agent = make_agent(args)
    with torch.no_grad():
        agent.critic[-1].weight.zero_()
        agent.critic[-1].bias.fill_(value)
    one = torch.ones(1, dtype=torch.float64)
    batch = make_batch(agent, rows=1)._replace(values=old * one, targets=target * one)
    coefs = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    loss, outputs = ppo.ppo_loss(agent, batch, coefs, args)
    metrics = ppo.measure(agent, batch, *outputs, args)
    (slope,) = torch.autograd.grad(loss, agent.critic[-1].bias)
    full, near = (value - target) ** 2, (min(max(value, old - 0.2), old + 0.2) - target) ** 2
    assert loss.item() == pytest.approx(max(full, near) / 2)
    assert slope.item() == pytest.approx(0.0 if near > full + 1e-9 else value - target)
    evidence = dict(zip(ppo.METRICS, metrics.tolist(), strict=False))
    assert evidence["losses/value_loss_unclipped"] == pytest.approx(full / 2)
    assert evidence["losses/value_clipfrac"] == (abs(value - old) > 0.2)
    loss, _ = ppo.ppo_loss(agent, batch, coefs, replace(args, clip_vloss=False))
    assert loss.item() == pytest.approx(full / 2)
    (slope,) = torch.autograd.grad(loss, agent.critic[-1].bias)
    assert slope.item() == pytest.approx(value - target)


def test_clipped_value_loss_of_the_known_cases() -> None:
    """Old 1, target 2, epsilon 0.2: 1.5 costs 0.64 and 0.7 costs 1.69, as squares."""
    agent = make_agent(ppo.Args(hidden_sizes=()))
    args = ppo.Args(hidden_sizes=(), clip_coef=0.2)
    with torch.no_grad():
        agent.critic[-1].weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    two = torch.ones(2, dtype=torch.float64)
    batch = make_batch(agent, rows=2)._replace(
        obs=torch.tensor([[1.5, 1, 0, 0], [0.7, 0, 1, 0]], dtype=torch.float64),
        values=two,
        targets=2 * two,
        weights=two,
    )
    coefs = torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    loss, _ = ppo.ppo_loss(agent, batch, coefs, args)
    assert loss.item() == pytest.approx(0.64 + 1.69)
    (slopes,) = torch.autograd.grad(loss, agent.critic[-1].weight)
    assert slopes[0, 1:3].tolist() == pytest.approx([0.0, 2 * (0.7 - 2.0)])


# ---- the whole loss

VARIANTS = {
    "default": {},
    "unclipped": dict(clip_coef=None),
    "dual clip": dict(dual_clip_coef=1.2, clip_coef=0.1),
    "values unclipped": dict(clip_vloss=False),
    "own value clip": dict(vclip_coef=0.05),
    "value clip alone": dict(clip_coef=None, vclip_coef=0.3),
    "huber": dict(value_loss="huber"),
    "penalty": dict(kl_coef=0.7),
    "penalty with target": dict(kl_target=0.01),
    "reference": dict(ref_kl_coef=0.3, ref_checkpoint="x"),
    "shared": dict(shared_network=True),
    "all": dict(
        dual_clip_coef=1.5,
        vclip_coef=0.2,
        value_loss="huber",
        kl_coef=0.7,
        ref_kl_coef=0.3,
        ref_checkpoint="x",
    ),
}


def loss_coefs(args: ppo.Args) -> Tensor:
    """COEFS, with the penalties that the flags leave out at 0, as `train` has them."""
    on = [1.0, 1.0, 1.0, args.kl_coef > 0 or args.kl_target is not None, args.ref_kl_coef > 0]
    return COEFS * torch.tensor(on, dtype=torch.float64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_gradient_and_metrics(variant: str) -> None:
    """Those of the formulas row by row, weights that differ included."""
    args = ppo.Args(hidden_sizes=(6,), **VARIANTS[variant])
    agent, coefs = make_agent(args), loss_coefs(args)
    batch = make_batch(agent)
    weights = ppo.normalize(torch.rand(24, generator=torch.manual_seed(5), dtype=torch.float64))
    batch = batch._replace(weights=weights)
    loss, outputs = ppo.ppo_loss(agent, batch, coefs, args)
    metrics = ppo.measure(agent, batch, *outputs, args)
    expected, evidence = naive_loss(agent, batch, coefs, args)
    if not args.ref_checkpoint:
        evidence["losses/ref_kl"] = 0.0
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, agent), gradient(expected, agent))
    assert len(metrics) == len(ppo.METRICS) - 1
    assert dict(zip(ppo.METRICS, metrics.tolist(), strict=False)) == pytest.approx(evidence)
    assert loss.requires_grad
    assert not metrics.requires_grad


def test_metrics_of_several_minibatches() -> None:
    """Means over them, of whatever shape they are stacked in."""
    args = ppo.Args(hidden_sizes=(6,), clip_coef=0.1)
    agent, rows = make_agent(args), []
    for seed in range(6):
        batch = make_batch(agent, seed=seed)
        weights = ppo.normalize(normal(24, seed=seed).abs())
        rows.append((batch._replace(weights=weights), *agent(batch.obs)))
    single = torch.stack([ppo.measure(agent, *row, args) for row in rows])
    batches, dists, values = zip(*rows, strict=True)
    whole = ppo.Batch(*(torch.stack(column).unflatten(0, (2, 3)) for column in zip(*batches)))
    dists, values = (torch.stack(column).unflatten(0, (2, 3)) for column in (dists, values))
    torch.testing.assert_close(ppo.measure(agent, whole, dists, values, args), single.mean(0))
    assert (single.std(0)[[0, 1, 2, 5, 6, 7, 8, 9, 10]] > 1e-4).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_by_finite_differences(variant: str) -> None:
    """Slopes of the loss in random directions of all parameters."""
    args = ppo.Args(hidden_sizes=(6,), **VARIANTS[variant])
    agent, coefs = make_agent(args), loss_coefs(args)
    batch = make_batch(agent)
    exact = gradient(ppo.ppo_loss(agent, batch, coefs, args)[0], agent)
    start = nn_vector(agent)
    for seed in range(4):
        direction, h = normal(len(start), seed=seed), 1e-6
        sides = []
        for step in (h, -h):
            torch.nn.utils.vector_to_parameters(start + step * direction, agent.parameters())
            sides.append(ppo.ppo_loss(agent, batch, coefs, args)[0].item())
        torch.nn.utils.vector_to_parameters(start, agent.parameters())
        slope = (sides[0] - sides[1]) / (2 * h)
        assert slope == pytest.approx((exact @ direction).item(), rel=1e-6, abs=1e-7)


def nn_vector(agent: ppo.Agent) -> Tensor:
    return torch.nn.utils.parameters_to_vector(agent.parameters()).detach().clone()


@pytest.mark.parametrize("variant", ["default", "all", "shared", "unclipped"])
@pytest.mark.parametrize("norm_adv", [True, False])
def test_rows_of_weight_zero_count_for_nothing(variant: str, norm_adv: bool) -> None:
    """Whatever they hold, loss, gradient and metrics stay, and are those of the other rows."""
    args = ppo.Args(hidden_sizes=(6,), **VARIANTS[variant])
    agent, coefs = make_agent(args), loss_coefs(args)
    batch, other = make_batch(agent), make_batch(agent, seed=77, spread=2.0)
    dead = torch.arange(24) % 3 == 1

    def evaluate(rows: ppo.Batch) -> tuple[Tensor, Tensor, Tensor]:
        if norm_adv:
            rows = rows._replace(advantages=ppo.standardize(rows.advantages, rows.weights))
        rows = rows._replace(weights=ppo.normalize(rows.weights))
        loss, outputs = ppo.ppo_loss(agent, rows, coefs, args)
        metrics = ppo.measure(agent, rows, *outputs, args)
        return loss.detach(), gradient(loss, agent), metrics

    columns = zip(batch, other, strict=True)
    mixed = ppo.Batch(*(torch.where(dead.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in columns))
    mixed = mixed._replace(advantages=torch.where(dead, 1e3 * mixed.advantages, mixed.advantages))
    weights = (~dead).double()
    first = evaluate(batch._replace(weights=weights))
    second = evaluate(mixed._replace(weights=weights))
    alone = evaluate(ppo.Batch(*(rows[~dead] for rows in batch)))
    for a, b, c in zip(first, second, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9)


def test_a_minibatch_without_valid_rows_is_harmless() -> None:
    args = ppo.Args(hidden_sizes=(6,))
    agent = make_agent(args)
    batch = make_batch(agent)
    weights = ppo.normalize(torch.zeros(24, dtype=torch.float64))
    advantages = ppo.standardize(batch.advantages, weights)
    assert advantages.isfinite().all()
    batch = batch._replace(weights=weights, advantages=advantages)
    loss, _ = ppo.ppo_loss(agent, batch, loss_coefs(args), args)
    assert loss.item() == 0.0
    assert gradient(loss, agent).abs().max() == 0.0


@pytest.mark.parametrize("flags", [dict(kl_coef=0.7), dict(kl_target=0.01)])
def test_kl_penalty_moves_the_gradient(flags: dict) -> None:
    """By beta times the gradient of the exact KL(old, new), which is not that of KL(new, old)."""
    plain = ppo.Args(hidden_sizes=(6,))
    agent = make_agent(plain)
    batch = make_batch(agent, spread=1.0)
    without = gradient(ppo.ppo_loss(agent, batch, loss_coefs(plain), plain)[0], agent)
    args = replace(plain, **flags)
    loss, _ = ppo.ppo_loss(agent, batch, loss_coefs(args), args)
    old = Categorical(logits=batch.dists)
    expected, reverse = (
        0.7 * gradient(kl.mean(), agent)
        for kl in (
            torch_kl(old, Categorical(logits=agent(batch.obs)[0])),
            torch_kl(Categorical(logits=agent(batch.obs)[0]), old),
        )
    )
    assert expected.abs().max() > 0.01
    assert (expected - reverse).abs().max() > 0.01
    torch.testing.assert_close(gradient(loss, agent) - without, expected)


def test_reference_kl_moves_the_gradient() -> None:
    """By its weight times the gradient of KL(new, reference)."""
    plain = ppo.Args(hidden_sizes=(6,))
    agent = make_agent(plain)
    batch = make_batch(agent)
    without = gradient(ppo.ppo_loss(agent, batch, loss_coefs(plain), plain)[0], agent)
    args = replace(plain, ref_kl_coef=0.3, ref_checkpoint="x")
    loss, _ = ppo.ppo_loss(agent, batch, loss_coefs(args), args)
    new, ref = (Categorical(logits=x) for x in (agent(batch.obs)[0], batch.ref_dists))
    expected = 0.3 * gradient(torch_kl(new, ref).mean(), agent)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(gradient(loss, agent) - without, expected)


def test_entropy_bonus_pulls_towards_the_uniform_policy() -> None:
    """Gradient steps on the entropy term alone raise the entropy to log 3."""
    args = ppo.Args(hidden_sizes=(6,))
    agent = make_agent(args)
    batch = make_batch(agent)
    coefs = torch.tensor([0.0, 0.0, -1.0, 0.0, 0.0], dtype=torch.float64)
    optimizer, entropies = torch.optim.SGD(agent.actor.parameters(), 0.2), []
    for _ in range(200):
        loss, outputs = ppo.ppo_loss(agent, batch, coefs, args)
        metrics = ppo.measure(agent, batch, *outputs, args)
        entropies.append(metrics[ppo.METRICS.index("losses/entropy")].item())
        assert loss.item() == pytest.approx(-entropies[-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert entropies[0] < 0.9 < 1.08 < entropies[-1] < np.log(3) + 1e-9


# ---- standardised advantages


@pytest.mark.parametrize("rows", [2, 3, 64])
def test_standardize(rows: int) -> None:
    """Mean and unbiased deviation of every minibatch by itself, as NumPy has them."""
    advantages = 5 + 3 * normal(4, rows)
    expected = [(x - x.mean()) / (x.std(ddof=1) + 1e-8) for x in advantages.numpy()]
    result = ppo.standardize(advantages, torch.ones(4, rows, dtype=torch.float64))
    np.testing.assert_allclose(result, expected, rtol=1e-9)


def test_standardize_leaves_out_rows_of_weight_zero() -> None:
    advantages, weights = 5 + 3 * normal(4, 16), torch.ones(4, 16, dtype=torch.float64)
    weights[:, ::3] = 0.0
    advantages[:, ::3] = 1e4
    result = ppo.standardize(advantages, weights)
    for row, x, w in zip(result, advantages, weights, strict=True):
        kept = x[w > 0].numpy()
        expected = (kept - kept.mean()) / (kept.std(ddof=1) + 1e-8)
        np.testing.assert_allclose(row[w > 0], expected, rtol=1e-9)


@pytest.mark.parametrize(
    "advantages, weights",
    [
        ([3.0], [1.0]),
        ([0.1, 7.0, 9.0], [1.0, 0.0, 0.0]),
        ([-4.0] * 8, [1.0] * 8),
        ([0.1] * 7, [1.0] * 7),
        ([123.4] * 100, [1.0] * 100),
        ([1.0, 2.0], [0.0, 0.0]),
    ],
)
def test_standardize_without_spread(advantages: list[float], weights: list[float]) -> None:
    """One sample, identical samples and none stay finite and never grow."""
    result = ppo.standardize(torch.tensor([advantages]), torch.tensor([weights]))
    counted = result[torch.tensor([weights]) > 0]
    assert result.isfinite().all()
    assert (counted.abs() <= 1).all()


@pytest.mark.parametrize("scope", ["minibatch", "batch"])
@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("dead_rows", [True, False])
def test_scope_of_standardised_advantages(
    scope: str, norm_adv: bool, dead_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `update` hands to the loss: rows of a minibatch or of the batch have mean 0, std 1."""
    args = ppo.Args(hidden_sizes=(6,), num_minibatches=4, update_epochs=2)
    args = replace(args, norm_adv=norm_adv, norm_adv_scope=scope)
    agent = make_agent(args)
    batch, seen, loss_fn = make_batch(agent), [], ppo.ppo_loss
    raw = 5 + 3 * batch.advantages.numpy()
    weights = (torch.arange(24) % 5 > 0).double() if dead_rows else torch.ones(24).double()

    def spy(agent: ppo.Agent, minibatch: ppo.Batch, *rest: Any) -> Any:
        seen.append(minibatch)
        return loss_fn(agent, minibatch, *rest)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    batch = batch._replace(advantages=torch.as_tensor(raw), weights=weights)
    ppo.update(agent, ppo.Adam(agent, args), None, batch, args, COEFS, False)
    assert len(seen) == 8
    for minibatch in seen:
        rows = [(batch.obs == obs).all(-1).nonzero().item() for obs in minibatch.obs]
        pool = raw[weights.numpy() > 0] if scope == "batch" else raw[rows][weights[rows] > 0]
        expected = raw[rows]
        if norm_adv:
            expected = (expected - pool.mean()) / (pool.std(ddof=1) + 1e-8)
        kept = (weights[rows] > 0).numpy()
        np.testing.assert_allclose(minibatch.advantages[kept], expected[kept], rtol=1e-6)
        np.testing.assert_allclose(minibatch.weights, weights[rows] / weights[rows].sum())


# ---- what training makes of the flags

FLAGS = ["--num-steps", 32, "--total-timesteps", 640, "--no-progress", "--no-cuda"]  # 5 iterations


@pytest.fixture
def updates(main: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`updates(*flags)`: the coefs, the batch and the exact KL(old, new) of every iteration."""
    update, runs = ppo.update, []

    def updates(*flags: object) -> list[tuple[list[float], ppo.Batch, float]]:
        seen = []

        def spy(*args: Any) -> Any:
            metrics = update(*args)
            agent, coefs = args[0], args[5]
            batch = ppo.Batch(*(rows.clone() for rows in args[3]))  # the next rollout overwrites it
            old, new = Categorical(logits=batch.dists), Categorical(logits=agent(batch.obs)[0])
            seen.append(([*coefs], batch, torch_kl(old, new).mean().item()))
            return metrics

        monkeypatch.setattr(ppo, "update", spy)
        runs.append(f"run{len(runs)}")
        code, _, error = main(*FLAGS, "--run-dir", runs[-1], *flags)
        assert (code, error) == (0, "")
        return seen

    return updates


def test_coefs(updates: Callable) -> None:
    """Policy 1, value vf-coef, entropy minus ent-coef, KL beta, reference its weight."""
    flags = ["--vf-coef", 0.7, "--ent-coef", 0.1, "--kl-coef", 0.3]
    coefs = [row[0] for row in updates(*flags)]
    np.testing.assert_allclose(coefs, [[1, 0.7, -0.1, 0.3, 0]] * 5)


@pytest.mark.parametrize("final", [0.0, 0.5])
def test_entropy_schedule(final: float, updates: Callable) -> None:
    """Linear from the first iteration's coefficient to the last one's."""
    coefs = [row[0] for row in updates("--ent-coef", 0.1, "--ent-coef-final", final)]
    np.testing.assert_allclose(np.negative(coefs)[:, 2], np.linspace(0.1, final, 5), atol=1e-7)


def test_adaptive_kl_coefficient(updates: Callable) -> None:
    """Twice as large above 1.5 x target, half below target / 1.5, and the same between."""
    rate = ["--learning-rate", 0.01]
    assert [row[0][3] for row in updates(*rate, "--kl-target", 1e-9)] == [1, 2, 4, 8, 16]
    halved = updates(*rate, "--kl-target", 1e3, "--kl-coef", 3)
    assert [row[0][3] for row in halved] == [3, 1.5, 0.75, 0.375, 0.1875]
    kl = updates(*rate, "--kl-target", 1.0)[0][2]
    assert kl > 1e-4
    for factor, expected in ((0.665, 2), (0.668, 1), (1.0, 1), (1.497, 1), (1.503, 0.5)):
        assert updates(*rate, "--kl-target", kl * factor)[1][0][3] == expected


@pytest.mark.parametrize("own", [True, False])
def test_reference_policy(own: bool, updates: Callable) -> None:
    """The checkpoint's policy as it was trained, under other flags too, for the rollout's rows."""
    flags = ["--norm-obs", "--activation", "relu", "--clip-obs", 1.5]
    updates("--run-dir", "reference", "--learning-rate", 0.01, *flags)
    state = torch.load("reference/checkpoint.pt", weights_only=True)["agent"]
    flags = ["--ref-checkpoint", "reference", "--ref-kl-coef", 0.1, *(flags if own else [])]
    for coefs, batch, _ in updates(*flags, "--seed", 2):
        assert coefs[4] == pytest.approx(0.1)
        x = ((batch.obs - state["obs_norm.mean"]) / state["obs_norm.std"]).clip(-1.5, 1.5)
        for i in (0, 2):
            x = torch.relu(x @ state[f"actor.{i}.weight"].T + state[f"actor.{i}.bias"])
        logits = x @ state["actor.4.weight"].T + state["actor.4.bias"]
        probs = Categorical(logits=batch.ref_dists).probs
        torch.testing.assert_close(probs, logits.softmax(-1), atol=1e-5, rtol=1e-4)
        assert (batch.ref_dists - batch.dists).abs().max() > 0.01


# ---- shapes, and the first gradient step

SWITCHES = {
    "default": [],
    "norm-obs": ["--norm-obs"],
    "norm-reward": ["--norm-reward"],
    "running": ["--norm-value", "running"],
    "popart": ["--norm-value", "popart", "--norm-obs", "--norm-reward"],
    "shared": ["--shared-network", "--norm-obs"],
    "warm-up": ["--critic-warmup-iterations", "2", "--norm-obs", "--shared-network"],
    "native": ["--vectorization", "native", "--norm-obs", "--norm-value", "popart"],
    "recompute": ["--recompute-advantages", "--norm-value", "running", "--critic-epochs", "1"],
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_first_step_starts_at_ratio_one(
    switch: str, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before an iteration's first gradient step policy and critic are still the rollout's."""
    first, shapes, update, loss_fn = [], [], ppo.update, ppo.ppo_loss

    def spy_update(*args: Any) -> Any:
        first.append(None)
        return update(*args)

    def spy_loss(agent: ppo.Agent, batch: ppo.Batch, *rest: Any) -> Any:
        with torch.no_grad():
            dists, values = agent(batch.obs)
        if first[-1] is None:
            ratio = (ppo.Agent.log_prob(dists, batch.actions) - batch.logprobs).exp()
            moved = (values - batch.values) * (batch.weights > 0)
            first[-1] = ((ratio - 1).abs().max().item(), moved.abs().max().item())
        shapes.append({x.shape for x in (values, batch.values, batch.targets, batch.advantages)})
        shapes[-1] |= {x.shape for x in (batch.actions, batch.logprobs, batch.weights)}
        return loss_fn(agent, batch, *rest)

    monkeypatch.setattr(ppo, "update", spy_update)
    monkeypatch.setattr(ppo, "ppo_loss", spy_loss)
    code, _, error = main(*FLAGS, "--learning-rate", 0.01, *SWITCHES[switch])
    assert (code, error) == (0, "")
    assert len(first) == 5
    assert max(ratio for ratio, _ in first) < 1e-5
    assert max(moved for _, moved in first) < 1e-4
    assert all(shape == {(32,)} for shape in shapes)
