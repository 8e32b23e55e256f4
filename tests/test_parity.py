"""The update against Stable-Baselines3, and against the loop written out in float64."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import configure
from torch import Tensor, nn
from torch.distributions import Categorical

import ppo_discrete as ppo

T, N = 16, 4
OBS = spaces.Box(-5, 5, (4,))
COEFS = [1.0, 0.5, -0.01, 0.0, 0.0]


def make_agent(args: ppo.Args, seed: int = 0) -> ppo.Agent:
    torch.manual_seed(seed)
    agent = ppo.Agent(args, OBS, spaces.Discrete(2))
    with torch.no_grad():
        agent.actor[-1].weight.mul_(100)
    return agent


def make_batch(agent: ppo.Agent, seed: int = 1, dtype: torch.dtype = torch.float32) -> ppo.Batch:
    """T x N rows, a step after the other, of a policy and a critic near the agent's."""
    draw = torch.manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    obs = normal(T * N, 4)
    with torch.no_grad():
        dists, values = agent(obs)
    dists = (dists + 0.3 * normal(T * N, 2)).log_softmax(-1)
    actions = (normal(T * N) > 0).long()
    values = values + 0.3 * normal(T * N)
    advantages = 1 + 2 * normal(T * N)
    return ppo.Batch(
        obs=obs,
        actions=actions,
        logprobs=ppo.Agent.log_prob(dists, actions),
        dists=dists,
        ref_dists=dists,
        advantages=advantages,
        targets=values + advantages,
        values=values,
        weights=torch.ones(T * N, dtype=dtype),
    )


def run_update(
    agent: ppo.Agent, batch: ppo.Batch, args: ppo.Args, coefs: list[float], warmup: bool = False
) -> Tensor:
    """`update` with the learning rates that `train` would set in its first iteration."""
    optimizer = ppo.Adam(agent, args)
    rates = (args.actor_learning_rate, args.critic_learning_rate)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = args.learning_rate if rate is None else rate
    weights = torch.tensor(coefs, dtype=batch.advantages.dtype)
    return ppo.update(agent, optimizer, None, batch, args, weights, warmup)


def snapshot(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def identical(module: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every permutation that is drawn from now on."""
    randperm, seen = torch.randperm, []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(randperm(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(torch, "randperm", spy)
    return seen


# ---- Stable-Baselines3


def make_sb3(agent: ppo.Agent, batch: ppo.Batch, args: ppo.Args, **kwargs: Any) -> PPO:
    """SB3's PPO with the agent's weights, and the batch in its buffer."""
    settings = dict(
        n_steps=T * N,
        n_epochs=args.update_epochs,
        batch_size=T * N // args.num_minibatches,
        learning_rate=args.learning_rate,
        clip_range=args.clip_coef,
        normalize_advantage=args.norm_adv,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef / 2,  # SB3's loss is the whole square
        max_grad_norm=args.max_grad_norm,
        policy_kwargs=dict(optimizer_kwargs=dict(eps=args.adam_eps)),
        device="cpu",
    )
    model = PPO("MlpPolicy", "CartPole-v1", **(settings | kwargs))
    model.set_logger(configure(None, []))
    copy = {"policy_net": agent.actor, "value_net": agent.critic}
    with torch.no_grad():
        for name, layers in copy.items():
            head = model.policy.action_net if name == "policy_net" else model.policy.value_net
            modules = [*getattr(model.policy.mlp_extractor, name), head]
            for target, source in zip(modules, layers, strict=True):
                if isinstance(source, nn.Linear):
                    target.weight.copy_(source.weight)
                    target.bias.copy_(source.bias)
    buffer = RolloutBuffer(T, OBS, spaces.Discrete(2), "cpu", n_envs=N)
    columns = (batch.obs, batch.actions, batch.values, batch.logprobs)
    for obs, actions, values, logprobs in zip(*(x.unflatten(0, (T, N)) for x in columns)):
        zeros = np.zeros(N)
        buffer.add(obs.numpy(), actions.numpy(), zeros, zeros, values, logprobs)
    buffer.advantages = batch.advantages.view(T, N).numpy()
    buffer.returns = batch.targets.view(T, N).numpy()
    model.rollout_buffer = buffer
    return model


def sb3_layers(model: PPO) -> list[Tensor]:
    """Its parameters in the order of the agent's actor and critic."""
    policy = model.policy
    modules = (policy.mlp_extractor.policy_net, policy.action_net)
    modules += (policy.mlp_extractor.value_net, policy.value_net)
    return [p for module in modules for p in module.parameters()]


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6])
def test_loss_and_gradient_of_stable_baselines(norm_adv: bool, max_grad_norm: float) -> None:
    args = ppo.Args(
        clip_vloss=False,
        norm_adv=norm_adv,
        max_grad_norm=max_grad_norm,
        num_minibatches=1,
        update_epochs=1,
    )
    agent = make_agent(args)
    batch = make_batch(agent)
    model, grads = make_sb3(agent, batch, args), []
    model.policy.optimizer.step = lambda: grads.extend(p.grad.clone() for p in sb3_layers(model))
    model.train()
    logged = model.logger.name_to_value

    if norm_adv:
        batch = batch._replace(advantages=ppo.standardize(batch.advantages, batch.weights))
    batch = batch._replace(weights=ppo.normalize(batch.weights))
    loss, outputs = ppo.ppo_loss(agent, batch, torch.tensor(COEFS), args)
    loss.backward()
    metrics = ppo.measure(agent, batch, *outputs, args)
    norm = torch.cat([p.grad.flatten() for p in agent.parameters()]).norm().item()
    assert norm > 0.6
    scale = min(1.0, max_grad_norm / norm)
    assert loss.item() == pytest.approx(logged["train/loss"], rel=1e-5)
    for p, expected in zip(agent.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad * scale, expected, atol=1e-6, rtol=1e-5)
    evidence = dict(zip(ppo.METRICS, metrics.tolist(), strict=False))
    names = {
        "losses/policy_loss": (1, "train/policy_gradient_loss"),
        "losses/value_loss": (0.5, "train/value_loss"),
        "losses/entropy": (-1, "train/entropy_loss"),
        "losses/approx_kl": (1, "train/approx_kl"),
        "losses/clipfrac": (1, "train/clip_fraction"),
    }
    for ours, (factor, theirs) in names.items():
        assert evidence[ours] == pytest.approx(factor * logged[theirs], rel=1e-4, abs=1e-6), ours


def test_update_of_stable_baselines(orders: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three epochs of four minibatches in the same order end at the same weights."""
    args = ppo.Args(clip_vloss=False, update_epochs=3, learning_rate=1e-3)
    agent = make_agent(args)
    batch, start = make_batch(agent), snapshot(agent)
    model = make_sb3(agent, batch, args)
    run_update(agent, batch, args, COEFS)
    # SB3's rows go environment by environment: row (t, n) is n * T + t there and t * N + n here
    perms = iter([(order % N * T + order // N).numpy() for order in orders])
    monkeypatch.setattr(np.random, "permutation", lambda _: next(perms))
    model.train()
    assert len(orders) == 3
    assert next(perms, None) is None
    for p, theirs, before in zip(agent.parameters(), sb3_layers(model), start, strict=True):
        torch.testing.assert_close(p.detach(), theirs.detach(), atol=1e-5, rtol=0)
        assert (p - before).abs().max() > 1e-3


@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (0.9, 1.0), (1.0, 0.0)])
def test_advantages_of_stable_baselines(gamma: float, lam: float) -> None:
    """SB3 adds gamma V(final observation) to the reward of a truncated step."""
    rng = np.random.default_rng(0)
    rewards, values, finals = rng.normal(size=(3, T, N)).astype(np.float32)
    terminated, truncated = rng.random((2, T, N)) < 0.2
    truncated &= ~terminated
    terminated[-1, 0] = truncated[-1, 1] = True
    terminated[-1, 1] = terminated[-1, 2] = truncated[-1, 2] = False
    ended, last = terminated | truncated, rng.normal(size=N).astype(np.float32)
    buffer = RolloutBuffer(T, OBS, spaces.Discrete(2), "cpu", lam, gamma, N)
    starts = np.zeros(N)
    for t in range(T):
        reward = rewards[t] + gamma * finals[t] * truncated[t]
        row = (np.zeros((N, 4)), np.zeros(N), reward, starts)
        buffer.add(*row, torch.as_tensor(values[t]), torch.zeros(N))
        starts = ended[t]
    buffer.compute_returns_and_advantage(torch.as_tensor(last), ended[-1])

    following = np.concatenate((values[1:], last[None]))
    following[truncated] = finals[truncated]
    following[terminated] = 0
    arrays = map(torch.as_tensor, (rewards, values, following, ended))
    advantages = ppo.compute_gae(*arrays, gamma, lam)
    np.testing.assert_allclose(advantages, buffer.advantages, atol=1e-5)
    np.testing.assert_allclose(advantages + torch.as_tensor(values), buffer.returns, atol=1e-5)


# ---- the loop written out


def naive_update(
    agent: ppo.Agent,
    batch: ppo.Batch,
    args: ppo.Args,
    coefs: list[float],
    orders: list[Tensor],
    warmup: bool = False,
) -> dict[str, float]:
    """Epochs, minibatches, losses and optimisers of a textbook PPO; means of some metrics."""
    actor, critic = [*agent.trunk.parameters(), *agent.actor.parameters()], agent.critic
    lr, eps = args.learning_rate, args.adam_eps

    def adam(params: Any, lr: float | None, eps: float | None, default: tuple) -> torch.optim.Adam:
        lr, eps = default[0] if lr is None else lr, default[1] if eps is None else eps
        return torch.optim.Adam(params, lr, eps=eps, foreach=False)

    actor_adam = adam(actor, args.actor_learning_rate, args.actor_adam_eps, (lr, eps))
    critic_adam = adam(
        critic.parameters(), args.critic_learning_rate, args.critic_adam_eps, (lr, eps)
    )
    rows, history = len(batch.obs) // args.num_minibatches, []
    kinds = ["critic" if warmup else "both"] * args.update_epochs + ["critic"] * args.critic_epochs
    for kind, order in zip(kinds, orders, strict=True):
        for start in range(0, len(order), rows):
            b = ppo.Batch(*(x[order[start : start + rows]] for x in batch))
            a = b.advantages
            if args.norm_adv:
                pool = a if args.norm_adv_scope == "minibatch" else batch.advantages
                a = (a - pool.mean()) / (pool.std() + 1e-8)
            features = agent.trunk(b.obs)
            dist, values = Categorical(logits=agent.actor(features)), critic(features).flatten()
            ratio = (dist.log_prob(b.actions) - b.logprobs).exp()
            clipped = ratio.clip(1 - args.clip_coef, 1 + args.clip_coef)
            policy_loss = -torch.min(ratio * a, clipped * a).mean()
            errors = (values - b.targets) ** 2
            if args.clip_vloss:
                eps = args.clip_coef if args.vclip_coef is None else args.vclip_coef
                near = b.values + (values - b.values).clip(-eps, eps)
                errors = torch.max(errors, (near - b.targets) ** 2)
            value_loss = 0.5 * errors.mean()
            kl = torch.distributions.kl_divergence(Categorical(logits=b.dists), dist).mean()
            entropy = dist.entropy().mean()
            loss = coefs[1] * value_loss
            if kind == "both":
                loss = loss + coefs[0] * policy_loss + coefs[2] * entropy + coefs[3] * kl
            params = [*(actor if kind == "both" else []), *critic.parameters()]
            grads = torch.autograd.grad(loss, params)
            norm = torch.cat([g.flatten() for g in grads]).norm()
            limit = np.inf if args.max_grad_norm is None else args.max_grad_norm
            for p, g in zip(params, grads, strict=True):
                p.grad = g * min(1.0, limit / (norm.item() + 1e-6))
            for adam_ in (actor_adam, critic_adam) if kind == "both" else (critic_adam,):
                adam_.step()
            approx_kl = (ratio - 1 - ratio.log()).mean()
            row = (policy_loss, value_loss, entropy, kl, approx_kl, norm)
            history.append([x.item() for x in row])
    names = ("policy_loss", "value_loss", "entropy", "kl", "approx_kl", "grad_norm")
    means = np.mean(history, 0)
    return {f"losses/{name}": mean for name, mean in zip(names, means, strict=True)}


UPDATES = {
    "default": dict(),
    "learning rates": dict(actor_learning_rate=1e-4, critic_learning_rate=5e-3),
    "epsilons": dict(actor_adam_eps=1e-3, critic_adam_eps=1e-8),
    "one rate": dict(critic_learning_rate=0.0, actor_adam_eps=0.1),
    "gradient unclipped": dict(max_grad_norm=None),
    "gradient clipped": dict(max_grad_norm=0.05),
    "advantages as they are": dict(norm_adv=False),
    "advantages of the batch": dict(norm_adv_scope="batch"),
    "values unclipped": dict(clip_vloss=False),
    "own value clip": dict(vclip_coef=0.05),
    "penalty": dict(kl_coef=0.5),
    "critic epochs": dict(critic_epochs=3),
    "shared": dict(shared_network=True, critic_epochs=2),
    "one minibatch": dict(num_minibatches=1, update_epochs=1),
}


@pytest.mark.parametrize("variant", UPDATES)
@pytest.mark.parametrize("warmup", [False, True])
def test_update(variant: str, warmup: bool, orders: list[Tensor]) -> None:
    """Weights and metrics after all epochs, in float64, in the same order of minibatches."""
    args = replace(ppo.Args(hidden_sizes=(8, 8), learning_rate=1e-3), **UPDATES[variant])
    agent, naive = make_agent(args).double(), make_agent(args).double()
    batch, coefs = make_batch(agent, dtype=torch.float64), [*COEFS[:3], args.kl_coef, 0.0]
    start = snapshot(agent)
    metrics = run_update(agent, batch, args, coefs, warmup)
    for order in orders:
        assert sorted(order.tolist()) == list(range(T * N))
    expected = naive_update(naive, batch, args, coefs, orders, warmup)
    for p, q in zip(agent.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), atol=1e-8, rtol=0)
    evidence = dict(zip(ppo.METRICS, metrics.tolist(), strict=True))
    assert {key: evidence[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    moved = args.critic_learning_rate != 0 or not warmup
    assert identical(agent, start) != moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_in_float32(dtype: torch.dtype, orders: list[Tensor]) -> None:
    """The precision that training has stays within 1e-5 of the textbook's."""
    args = ppo.Args(learning_rate=1e-3, critic_epochs=1)
    agent, naive = make_agent(args).to(dtype), make_agent(args).double()
    batch = make_batch(naive, dtype=torch.float64)
    ours = ppo.Batch(*(x if x.dtype == torch.int64 else x.to(dtype) for x in batch))
    run_update(agent, ours, args, COEFS)
    naive_update(naive, batch, args, COEFS, orders)
    for p, q in zip(agent.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), atol=1e-5, rtol=0)


def test_every_row_is_seen_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In minibatches of the same size that differ from epoch to epoch, row by row intact."""
    args, seen, loss_fn = ppo.Args(num_minibatches=4, update_epochs=3), [], ppo.ppo_loss

    def spy(agent: ppo.Agent, minibatch: ppo.Batch, *rest: Any) -> Any:
        seen.append(minibatch)
        return loss_fn(agent, minibatch, *rest)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    agent = make_agent(args)
    batch = make_batch(agent)
    run_update(agent, batch, replace(args, norm_adv=False), COEFS)
    epochs = []
    for i in range(3):
        rows = [
            (batch.obs == obs).all(-1).nonzero().item() for b in seen[4 * i :][:4] for obs in b.obs
        ]
        assert sorted(rows) == list(range(T * N))
        epochs.append(tuple(rows))
        for column in ("actions", "logprobs", "dists", "advantages", "targets", "values"):
            given = torch.cat([getattr(b, column) for b in seen[4 * i :][:4]])
            assert torch.equal(given, getattr(batch, column)[list(rows)])
    assert len(seen) == 12
    assert {len(b.obs) for b in seen} == {T * N // 4}
    assert len(set(epochs)) == 3


# ---- the critic alone


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["warm-up", "critic epochs"])
def test_the_critic_alone(kind: str, shared: bool) -> None:
    """Not a bit of policy or trunk moves, by old momentum neither, while the critic learns."""
    args = ppo.Args(shared_network=shared, learning_rate=1e-3, kl_coef=0.5)
    coefs = [*COEFS[:3], 0.5, 0.0]
    agent = make_agent(args)
    batch = make_batch(agent)
    torch.manual_seed(0)
    run_update(agent, batch, args, coefs)
    optimizer = ppo.Adam(agent, args)
    policy = nn.ModuleList([agent.trunk, agent.actor])
    before, critic = snapshot(policy), snapshot(agent.critic)
    if kind == "warm-up":
        weights = torch.tensor(coefs)
        ppo.update(agent, optimizer, None, batch, args, weights, True)
        assert identical(policy, before)
        assert not identical(agent.critic, critic)
        ppo.update(agent, optimizer, None, batch, args, weights, False)
        assert not identical(policy, before)
        return
    other = make_agent(args)
    torch.manual_seed(0)
    run_update(other, batch, replace(args, critic_epochs=2), coefs)
    assert identical(nn.ModuleList([other.trunk, other.actor]), before)
    assert not identical(other.critic, critic)


def test_warm_up_lasts_for_its_iterations(main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first two of four iterations the policy stands still, with the momentum of none."""
    policies, critics, update = [], [], ppo.update

    def spy(agent: ppo.Agent, *rest: Any) -> Tensor:
        for seen, module in ((policies, agent.actor), (critics, agent.critic)):
            seen.append(snapshot(module))
        metrics = update(agent, *rest)
        policies[-1] = identical(agent.actor, policies[-1])
        critics[-1] = identical(agent.critic, critics[-1])
        return metrics

    monkeypatch.setattr(ppo, "update", spy)
    flags = ["--num-steps", 16, "--total-timesteps", 256, "--no-progress", "--no-cuda"]
    code, _, error = main(*flags, "--critic-warmup-iterations", 2)
    assert (code, error) == (0, "")
    assert policies == [True, True, False, False]
    assert critics == [False] * 4


# ---- when the epochs stop


@pytest.mark.parametrize(
    "kls, policy_epochs",
    [
        ([0.0, 0.0, 0.0, 0.015, 0.03, 0.0, 9.0, 9.0], 3),  # 0, 0.0075, 0.015
        ([0.019, 0.0, 0.0, 0.019, 0.0, 0.0, 0.0, 0.0], 4),  # always below, single ones above
        ([9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], 1),
        ([-9.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0], 2),  # only this epoch's count
    ],
)
@pytest.mark.parametrize("critic_epochs", [0, 2])
def test_target_kl(
    kls: list[float], policy_epochs: int, critic_epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The epoch whose minibatches have a mean KL above 0.01 is the last; the critic's go on."""
    args = ppo.Args(target_kl=0.01, num_minibatches=2, update_epochs=4, critic_epochs=critic_epochs)
    column, kinds, means = ppo.METRICS.index("losses/approx_kl"), [], []
    loss_fn, measure = ppo.ppo_loss, ppo.measure

    def spy(agent: ppo.Agent, minibatch: ppo.Batch, coefs: Tensor, args: ppo.Args) -> Any:
        kinds.append("policy" if coefs[0] else "critic")
        return loss_fn(agent, minibatch, coefs, args)

    def told(*args: Any) -> Tensor:
        """Metrics of an epoch of two minibatches, with the KL that the case has for them."""
        metrics = measure(*args)
        pair = kls[len(kinds) - 2 : len(kinds)] if kinds[-1] == "policy" else [7.0, 7.0]
        metrics[column] = np.mean(pair)
        means.append(metrics[column].item())
        return metrics

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    monkeypatch.setattr(ppo, "measure", told)
    agent = make_agent(args)
    metrics = run_update(agent, make_batch(agent), args, COEFS)
    assert kinds == ["policy"] * 2 * policy_epochs + ["critic"] * 2 * critic_epochs
    assert metrics[column].item() == pytest.approx(np.mean(means), rel=1e-5)


def test_target_kl_in_numbers(orders: list[Tensor]) -> None:
    """With real losses: without a target more epochs, with a tiny one a single one."""
    args = ppo.Args(learning_rate=1e-3, update_epochs=5)
    for target, epochs in ((None, 5), (1e9, 5), (1e-9, 1)):
        orders.clear()
        agent = make_agent(args)
        run_update(agent, make_batch(agent), replace(args, target_kl=target), COEFS)
        assert len(orders) == epochs


# ---- learning rates in training


@pytest.mark.parametrize("anneal", [True, False])
def test_learning_rates(anneal: bool, main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group has its own; annealed from the full rate, linearly, to above zero."""
    groups, update = [], ppo.update

    def spy(agent: ppo.Agent, optimizer: ppo.Adam, *rest: Any) -> Tensor:
        groups.append([(group["lr"], group["eps"]) for group in optimizer.param_groups])
        sizes = [len(group["flat"][0]) for group in optimizer.param_groups]
        parts = (agent.actor, agent.critic)
        assert sizes == [sum(p.numel() for p in part.parameters()) for part in parts]
        return update(agent, optimizer, *rest)

    monkeypatch.setattr(ppo, "update", spy)
    flags = ["--num-steps", 16, "--total-timesteps", 270, "--no-progress", "--no-cuda"]
    flags += ["--learning-rate", 0.01, "--critic-learning-rate", 0.002, "--critic-adam-eps", 1e-7]
    flags += [] if anneal else ["--no-anneal-lr"]
    code, _, error = main(*flags)
    assert (code, error) == (0, "")
    left = [1.0, 0.75, 0.5, 0.25] if anneal else [1.0] * 4
    expected = [[(0.01 * x, 1e-5), (0.002 * x, 1e-7)] for x in left]
    np.testing.assert_allclose(groups, expected, rtol=1e-6)


def test_optimizer_holds_every_parameter_once() -> None:
    """Policy and trunk in one group, the critic in the other, normalisers in none."""
    for shared in (True, False):
        agent = make_agent(ppo.Args(shared_network=shared))
        optimizer = ppo.Adam(agent, ppo.Args())
        flats = [group["flat"][0] for group in optimizer.param_groups]
        policy = [*agent.trunk.parameters(), *agent.actor.parameters()]
        for flat, parts in zip(flats, (policy, list(agent.critic.parameters())), strict=True):
            memory = sorted((p.data_ptr(), p.numel()) for p in parts)
            start, end = flat.data_ptr(), flat.data_ptr() + 4 * flat.numel()
            assert [pointer for pointer, _ in memory] == [
                start + 4 * sum(n for _, n in memory[:i]) for i in range(len(memory))
            ]
            assert memory[-1][0] + 4 * memory[-1][1] == end


def test_invalid_rows_move_no_weight() -> None:
    """Rows of weight 0 may hold anything: the update ends at the same weights."""
    args = ppo.Args(learning_rate=1e-3, critic_epochs=1, norm_adv=True)
    results = []
    for seed in (5, 6):
        agent = make_agent(args)
        batch, other = make_batch(agent), make_batch(agent, seed)
        dead = torch.arange(T * N) % 7 == 3
        columns = zip(batch, other, strict=True)
        mixed = [torch.where(dead.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in columns]
        torch.manual_seed(0)
        batch = ppo.Batch(*mixed)._replace(weights=(~dead).float())
        metrics = run_update(agent, batch, args, COEFS)
        results.append([*snapshot(agent), metrics])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


# ---- optimiser


@pytest.mark.parametrize("shared", [True, False])
def test_adam_is_torchs(shared: bool) -> None:
    """Both groups with rates and epsilons of their own, the critic at times alone: torch's Adam."""
    args = ppo.Args(shared_network=shared, actor_adam_eps=1e-3, critic_adam_eps=1e-8)
    ours, theirs = make_agent(args), make_agent(args)
    actor = [*theirs.trunk.parameters(), *theirs.actor.parameters()]
    groups = [{"params": actor}, {"params": theirs.critic.parameters()}]
    peer = torch.optim.Adam(groups, foreach=False)
    peer.param_groups[0]["eps"], peer.param_groups[1]["eps"] = 1e-3, 1e-8
    optimizer, generator = ppo.Adam(ours, args), torch.manual_seed(3)
    for i in range(60):
        if i == 30:  # as after a resumption
            saved = optimizer.state_dict()
            saved = {k: v.clone() if torch.is_tensor(v) else v for k, v in saved.items()}
            optimizer = ppo.Adam(ours, args)
            optimizer.load_state_dict(saved)
        rates = (0.01 / (1 + i), 0.003)
        for group, other, rate in zip(
            optimizer.param_groups, peer.param_groups, rates, strict=True
        ):
            group["lr"] = other["lr"] = rate
        alone, parts = i < 3 or i % 4 == 0, []
        for group in peer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (i % 5 - 3)
                if alone and group is peer.param_groups[0]:
                    p.grad = None
                else:
                    parts.append(p.grad.flatten())
        optimizer.step(torch.cat(parts))
        peer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("limit", [None, 0.5, 100.0])
def test_clip_norm_is_torchs(limit: float | None) -> None:
    gradient = torch.randn(50, generator=torch.manual_seed(0))
    parameter = nn.Parameter(torch.zeros(50))
    parameter.grad = gradient.clone()
    expected = nn.utils.clip_grad_norm_(parameter, math.inf if limit is None else limit)
    assert ppo.clip_norm(gradient, limit).item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, parameter.grad, atol=1e-7, rtol=1e-5)
