"""Advantages, value targets and the batch against the sums written out step by step."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from test_update import make_optimizer
from torch import Tensor

import ppo_continuous
import ppo_discrete
import ppo_multidiscrete_mask

MODES = ["SameStep", "NextStep"]
ACTIONS = {
    ppo_discrete: spaces.Discrete(2),
    ppo_continuous: spaces.Box(-1, 1, (2,)),
    ppo_multidiscrete_mask: spaces.MultiDiscrete([2, 3]),
}
FLAGS = dict(
    hidden_sizes=(4,), norm_obs=False, norm_reward=False, norm_adv=False, gamma=0.95, gae_lambda=0.8
)
scripts = pytest.mark.parametrize("ppo", ACTIONS, ids=lambda module: module.__name__)


class Step(NamedTuple):
    obs: np.ndarray
    reward: float
    terminated: bool
    truncated: bool
    next_obs: np.ndarray


class Scripted(gym.Env):
    """Random observations, rewards and ends, whatever the action; `log` has every step."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,))

    def __init__(self, action_space: spaces.Space) -> None:
        self.action_space = action_space
        self.log = []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.obs = self.np_random.normal(size=3).astype(np.float32)
        return self.obs, {}

    def step(self, action: Any) -> tuple:
        obs, self.obs = self.obs, self.np_random.normal(size=3).astype(np.float32)
        reward = self.np_random.normal(0.5)
        terminated, truncated = (self.np_random.random(2) < 0.2).tolist()
        self.log.append(Step(obs, reward, terminated, truncated, self.obs))
        return self.obs, reward, terminated, truncated, {}


class Play(NamedTuple):
    agent: Any
    rollout: Any
    collect: Callable[[], list[list[Step]]]  # its steps, environment by environment


def play(args: Any, mode: str = "SameStep", ppo: ModuleType = ppo_discrete) -> Play:
    """An agent in float64 with a value normalizer that is not trivial, and a real rollout."""
    torch.manual_seed(args.seed)
    vector = ppo.SyncEnvs if mode == "SameStep" else SyncVectorEnv
    envs = vector([partial(Scripted, ACTIONS[ppo])] * args.num_envs, autoreset_mode=mode)
    agent = ppo.Agent(args, envs.single_observation_space, envs.single_action_space).double()
    agent.value_norm.mean.fill_(3.0)
    agent.value_norm.std.fill_(2.0)
    rollout = ppo.Rollout(args, agent, envs, args.seed)
    rollout.obs = rollout.obs.astype(np.float64)

    def collect() -> list[list[Step]]:
        for env in envs.envs:
            env.log = []
        rollout.collect(agent, envs)
        return [env.log for env in envs.envs]

    return Play(agent, rollout, collect)


def by_env(rollout: Any, samples: Any) -> list[np.ndarray]:
    """Samples [T, N] or [T * N] of the valid steps, environment by environment."""
    samples = np.asarray(samples).reshape(rollout.rewards.shape)
    return [samples[rollout.valid[:-1, n], n] for n in range(samples.shape[1])]


def forward(agent: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Distributions and critic's outputs of a batch now."""
    return agent(*[batch[key] for key in ("obs", "masks") if key in batch])


def value_of(agent: Any, obs: np.ndarray) -> float:
    """V(obs): the critic's two layers and the value normalizer, by hand."""
    (w1, b1), (w2, b2) = ((layer.weight, layer.bias) for layer in agent.critic[::2])
    hidden = np.tanh(w1.detach().numpy() @ obs.astype(np.float64) + b1.detach().numpy())
    output = float((w2.detach().numpy() @ hidden + b2.detach().numpy())[0])
    return output * agent.value_norm.std.item() + agent.value_norm.mean.item()


def sums(
    steps: list[Step], value: Callable, gamma: float, lam: float, bootstrap: bool = True
) -> dict[str, list[float]]:
    """Advantage and targets of every step of one environment in one rollout."""
    results = {"advantage": [], "gae": [], "mc": [], "td": []}
    for i in range(len(steps)):
        advantage = total = 0.0
        for k, step in enumerate(steps[i:]):
            stops = step.terminated or (step.truncated and not bootstrap)
            next_value = 0.0 if stops else value(step.next_obs)
            one_step = step.reward + gamma * next_value
            advantage += (gamma * lam) ** k * (one_step - value(step.obs))
            total += gamma**k * step.reward
            if k == 0:
                results["td"].append(one_step)
            if step.terminated or step.truncated:
                break
        results["advantage"].append(advantage)
        results["gae"].append(advantage + value(steps[i].obs))
        results["mc"].append(total + gamma ** (k + 1) * next_value)
    return results


@scripts
def test_policy_is_evaluated_in_chunks(ppo: ModuleType) -> None:
    """Of more observations than a chunk holds, and the last one is smaller."""
    agent = play(ppo.Args(**FLAGS, num_steps=1, num_envs=1), ppo=ppo).agent
    inputs = [torch.randn(2500, 3).double()]
    if ppo is ppo_multidiscrete_mask:
        inputs.append(torch.rand(2500, 5) < 0.5)
        inputs[1][:, [0, 2]] = True
    dists, values = ppo.evaluate_policy(agent, *inputs)
    expected_dists, outputs = agent(*inputs)
    torch.testing.assert_close(dists, expected_dists.detach())
    torch.testing.assert_close(values, 3 + 2 * outputs.detach())


@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("t, n", [(1, 1), (1, 4), (2, 2), (7, 1), (16, 2), (23, 5)])
def test_compute_advantages(t: int, n: int, gamma: float, lam: float) -> None:
    """The sum of equation 16 of the GAE paper, term by term; the arguments stay as they are."""
    rng = np.random.default_rng(10 * t + n)
    originals = [*rng.normal(size=(3, t, n)), rng.random((t, n)) < 0.3]
    rewards, values, next_values, dones = originals
    expected = np.zeros((t, n))
    for i in range(t):
        weight = np.ones(n)
        for k in range(i, t):
            expected[i] += weight * (rewards[k] + gamma * next_values[k] - values[k])
            weight *= gamma * lam * (1 - dones[k])
    inputs = [x.copy() for x in originals]
    advantages = ppo_discrete.compute_advantages(*inputs, gamma, lam)
    np.testing.assert_allclose(advantages, expected, atol=1e-12)
    np.testing.assert_array_equal(inputs, originals)


@scripts
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("t, n", [(16, 6), (5, 1), (1, 7)])
def test_targets_of_rollouts(ppo: ModuleType, mode: str, bootstrap: bool, t: int, n: int) -> None:
    args = ppo.Args(**FLAGS, num_steps=t, num_envs=n, bootstrap_truncated=bootstrap)
    agent, rollout, collect = play(args, mode, ppo)
    value = partial(value_of, agent)
    kinds = set()
    for _ in range(4):
        logs = collect()
        ppo.process_rewards(agent, rollout, args)
        expected = [sums(steps, value, 0.95, 0.8, bootstrap) for steps in logs]
        for target in ("gae", "mc", "td"):
            results = ppo.compute_targets(agent, rollout, replace(args, value_target=target))
            assert [x.shape for x in results[1:]] == [(t * n,)] * 3
            for j, columns in enumerate(zip(*(by_env(rollout, x) for x in results[1:]))):
                values, advantages, targets = columns
                np.testing.assert_allclose(values, [value(s.obs) for s in logs[j]], rtol=1e-9)
                np.testing.assert_allclose(advantages, expected[j]["advantage"], atol=1e-5)
                np.testing.assert_allclose(targets, expected[j][target], atol=1e-5)
        for steps in logs:
            kinds |= {(s.terminated, s.truncated, s is steps[-1]) for s in steps}
    for last in {16: [False], 1: [True]}.get(t, []):
        assert kinds >= {(x, y, last) for x in (False, True) for y in (False, True)}


@pytest.mark.parametrize("mode", MODES)
def test_environments_and_episodes_do_not_mix(mode: str) -> None:
    """A reward changes no advantage of another environment or of another episode."""
    args = ppo_discrete.Args(**FLAGS, num_steps=12, num_envs=3)
    agent, rollout, collect = play(args, mode)
    logs = collect()
    ends = [step.terminated or step.truncated for step in logs[1]]
    second_episode = ends.index(True) + 1
    assert 0 < second_episode < len(ends)
    for first in (0, second_episode):
        before = by_env(rollout, ppo_discrete.compute_targets(agent, rollout, args)[2])
        rollout.rewards[np.flatnonzero(rollout.valid[:-1, 1])[first], 1] += 100.0
        after = by_env(rollout, ppo_discrete.compute_targets(agent, rollout, args)[2])
        np.testing.assert_array_equal(before[0], after[0])
        np.testing.assert_array_equal(before[2], after[2])
        difference = after[1] - before[1]
        assert difference[first] == pytest.approx(100.0, abs=1e-4)
        assert not np.delete(difference, first).any()


@scripts
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm_value", ["none", "running", "popart"])
def test_make_batch(ppo: ModuleType, mode: str, norm_value: str) -> None:
    """Samples in the critic's units and metrics in the rewards' units, of valid steps alone."""
    args = ppo.Args(**FLAGS, num_steps=20, num_envs=4, norm_value=norm_value)
    agent, rollout, collect = play(args, mode, ppo)
    fresh = np.random.default_rng(0).normal(size=(10, 3))
    history = []
    for _ in range(3):
        collect()
        valid = rollout.valid[:-1].ravel()
        assert valid.all() == (mode == "SameStep")
        rollout.rewards[~rollout.valid[:-1]] = -1e6  # must have no effect
        _, values, advantages, targets = ppo.compute_targets(agent, rollout, args)
        fresh_values = [value_of(agent, obs) for obs in fresh]
        fresh_outputs = agent.critic(torch.tensor(fresh))
        batch, metrics = ppo.make_batch(agent, None, rollout, args)

        x, v, a = (y.numpy()[valid] for y in (targets, values, advantages))
        history += x.tolist()
        mean, std = 3.0, 2.0
        if norm_value != "none":
            mean, std = np.mean(history), np.sqrt(np.var(history) + 1e-8)
            assert agent.value_norm.count == len(history)
        dists, outputs = forward(agent, batch)
        np.testing.assert_allclose(batch["targets"][valid], (x - mean) / std, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(batch["advantages"], advantages)
        torch.testing.assert_close(batch["values"], outputs.detach())
        torch.testing.assert_close(batch["dists"], dists.detach())
        np.testing.assert_array_equal(batch["loss_mask"], valid)
        np.testing.assert_array_equal(batch["obs"], rollout.obs[:-1].reshape(-1, 3))
        np.testing.assert_array_equal(batch["actions"].ravel(), rollout.actions.ravel())
        logprobs = agent.log_prob(dists, batch["actions"])
        torch.testing.assert_close(batch["logprobs"], logprobs.detach())

        new_values = [value_of(agent, obs) for obs in fresh]
        if norm_value == "running":  # the network stays, and what it predicts is read anew
            assert torch.equal(agent.critic(torch.tensor(fresh)), fresh_outputs)
            assert not np.allclose(new_values, fresh_values, atol=1e-2)
        else:
            np.testing.assert_allclose(new_values, fresh_values, rtol=1e-6)

        expected = {
            "advantages/mean": a.mean(),
            "advantages/std": a.std(ddof=1),
            "values/old_mean": v.mean(),
            "values/target_mean": x.mean(),
            "losses/explained_variance": 1 - np.var(x - v) / np.var(x),
        }
        for tag, number in expected.items():
            assert float(metrics[tag]) == pytest.approx(number, rel=1e-6), tag


@pytest.mark.parametrize("norm_value", ["none", "running", "popart"])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_recompute_advantages(
    mode: str, recompute: bool, norm_value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Advantages and targets of an epoch are those of the critic at its start, or the first's."""
    ppo = ppo_discrete
    flags = dict(num_minibatches=1, update_epochs=3, norm_value=norm_value)
    args = ppo.Args(**FLAGS, **flags, num_steps=6, num_envs=3, recompute_advantages=recompute)
    agent, rollout, collect = play(args, mode)
    collect()
    valid = rollout.valid[:-1].ravel()
    expected, epochs, ppo_loss = [], [], ppo.ppo_loss

    def spy(agent: Any, batch: dict[str, Tensor], *rest: Any) -> Any:
        expected.append(ppo.compute_targets(agent, rollout, args)[2:])
        flat_obs = torch.tensor(rollout.obs[:-1]).flatten(0, 1)
        order = [(batch["obs"] == obs).all(-1).nonzero().item() for obs in flat_obs]
        epochs.append({key: x[order] for key, x in batch.items()})
        return ppo_loss(agent, batch, *rest)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    first = ppo.compute_targets(agent, rollout, args)[2:]  # before `make_batch` changes value_norm
    batch, _ = ppo.make_batch(agent, None, rollout, args)
    optimizer = make_optimizer(agent, replace(args, learning_rate=0.05))
    coefs = torch.tensor([0.01, 0.0], dtype=torch.float64)
    ppo.update(agent, optimizer, rollout, dict(batch), args, coefs)
    assert len(epochs) == 3
    for i, epoch in enumerate(epochs):
        advantages, targets = expected[i] if recompute and i else first
        targets = (targets - agent.value_norm.mean) / agent.value_norm.std
        torch.testing.assert_close(epoch["advantages"][valid], advantages[valid])
        torch.testing.assert_close(epoch["targets"][valid], targets[valid])
        for key in ("values", "logprobs", "dists", "actions"):  # of the old policy and critic
            assert torch.equal(epoch[key], batch[key])
    assert (expected[2][0] - first[0]).abs().max() > 0.01
