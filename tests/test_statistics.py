"""Statistics of observations, rewards and values: what they are, and when they change."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_targets import FLAGS, play
from test_update import make_optimizer
from torch import Tensor

import ppo_continuous
import ppo_discrete
import ppo_multidiscrete_mask

NORMS = ("obs_norm", "reward_norm", "value_norm")
ALL_NORMS = ["--norm-obs", "--norm-reward", "--norm-value", "popart"]


def statistics(agent: Any) -> dict[str, Tensor]:
    """A copy of everything that the normalizers hold."""
    return {key: x.clone() for key, x in agent.state_dict().items() if key.startswith(NORMS)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-7.0, 0.01), (1e6, 1.0), (0.0, 1e6)])
@pytest.mark.parametrize("sizes", [[1], [0, 1, 1], [3, 1, 200, 0, 70, 1]])
def test_running_statistics(shape: tuple, mean: float, std: float, sizes: list[int]) -> None:
    """Merged piece by piece, in any order, they are NumPy's of all samples at once."""
    rng = np.random.default_rng(len(shape))
    pieces = [rng.normal(mean, std, (size, *shape)).astype(np.float32) for size in sizes]
    samples = np.concatenate(pieces).astype(np.float64)
    for order in (pieces, pieces[::-1]):
        norm = ppo_discrete.RunningMeanStd(shape)
        for piece in order:
            norm.add(torch.tensor(piece))
        assert norm.count.item() == len(samples)
        assert norm.mean.shape == norm.std.shape == shape
        np.testing.assert_allclose(norm.mean, samples.mean(0), rtol=1e-6, atol=1e-6 * std)
        np.testing.assert_allclose(norm.std, np.sqrt(samples.var(0) + 1e-8), rtol=1e-5)


@pytest.mark.parametrize("count", [2**24, 2**32])
def test_counts_beyond_float32(count: int) -> None:
    """Single samples still count, and change mean and m2 by what they should."""
    norm = ppo_discrete.RunningMeanStd()
    norm.count.fill_(count)
    norm.mean64.fill_(1000.0)
    norm.m2.fill_(float(count))
    for _ in range(10):
        norm.add(torch.tensor([1001.0]))
    assert norm.count.item() == count + 10
    assert norm.mean64.item() == pytest.approx(1000 + 10 / (count + 10), abs=1e-12)
    assert norm.m2.item() - count == pytest.approx(10.0, abs=1e-3)


def test_masked_mean_std() -> None:
    """NumPy's of the valid entries of each row; 0 for the std of one entry, and for no entry."""
    rng = np.random.default_rng(0)
    x = rng.normal(100, 5, (4, 50))
    mask = (rng.random((4, 50)) < 0.6).astype(float)
    mask[2] = np.arange(50) == 7
    mask[3] = 0
    x[mask == 0] = 1e9
    mean, std = ppo_discrete.masked_mean_std(torch.tensor(x), torch.tensor(mask))
    assert mean.shape == std.shape == (4, 1)
    for k in range(2):
        entries = x[k, mask[k] == 1]
        assert mean[k].item() == pytest.approx(entries.mean(), rel=1e-12)
        assert std[k].item() == pytest.approx(entries.std(ddof=1), rel=1e-12)
    assert torch.cat((mean[2:], std[2:])).flatten().tolist() == [x[2, 7], 0, 0, 0]


@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize("norm_obs", [True, False])
def test_normalized_observations(norm_obs: bool, clip: float | None) -> None:
    """The networks read (obs - mean) / std, clipped, or the observation itself."""
    args = ppo_discrete.Args(norm_obs=norm_obs, clip_obs=clip)
    agent = ppo_discrete.Agent(args, spaces.Box(-1, 1, (3,)), spaces.Discrete(2))
    samples = 5 + 2 * np.random.default_rng(0).normal(size=(400, 3))
    agent.obs_norm.add(torch.tensor(samples))
    expected = samples[:50]
    if norm_obs:
        expected = (expected - samples.mean(0)) / samples.std(0)
        assert np.abs(expected).max() > 1.5
        expected = expected if clip is None else expected.clip(-clip, clip)
    obs = torch.tensor(samples[:50]).float()
    inputs = torch.tensor(expected).float()
    logprobs, values = agent(obs)
    torch.testing.assert_close(logprobs, agent.actor(inputs).log_softmax(-1))
    torch.testing.assert_close(values, agent.critic(inputs)[:, 0])
    assert torch.equal(agent.act(obs, None), logprobs.argmax(-1))


@pytest.mark.parametrize("norm_value", ["running", "popart"])
def test_a_rollout_without_valid_steps(norm_value: str) -> None:
    """One step in which every environment is reset changes no statistic and breaks no network."""
    flags = FLAGS | dict(norm_reward=True, norm_adv=True, norm_value=norm_value, num_minibatches=1)
    args = ppo_discrete.Args(**flags, num_steps=1, num_envs=4)
    agent, rollout, collect = play(args, "NextStep")
    collect()
    rollout.valid[0] = False
    before = statistics(agent)
    ppo_discrete.process_rewards(agent, rollout, args)
    batch, metrics = ppo_discrete.make_batch(agent, None, rollout, args)
    optimizer = make_optimizer(agent, replace(args, learning_rate=0.1))
    coefs = torch.tensor([0.01, 0.0], dtype=torch.float64)
    metrics |= ppo_discrete.update(agent, optimizer, rollout, batch, args, coefs)
    assert same(statistics(agent), before)
    assert all(p.isfinite().all() for p in agent.parameters())
    assert all(np.isfinite(float(value)) for value in metrics.values())


@pytest.mark.parametrize(
    "ppo, env_id, vectorization",
    [
        (ppo_discrete, "CartPole-v1", "sync"),
        (ppo_discrete, "CartPole-v1", "native"),
        (ppo_continuous, "InvertedPendulum-v5", "sync"),
        (ppo_multidiscrete_mask, "TaxiDispatch-v0", "sync"),
    ],
)
def test_statistics_advance_once_an_iteration(
    ppo: ModuleType, env_id: str, vectorization: str, main: Callable, monkeypatch: Any
) -> None:
    """With the valid samples of its rollout; they are frozen in a rollout and in an update.

    Observations: those acted on. Rewards: discounted returns. Values: targets.
    """
    agents, rollouts, updates = [], [], []
    collect, update, update_norm = ppo.Rollout.collect, ppo.update, ppo.RunningMeanStd.add

    def spy_norm(norm: Any, samples: Tensor) -> None:
        name = next(name for name in NORMS if getattr(agents[-1], name) is norm)
        assert name not in updates[-1]
        updates[-1][name] = samples.clone()
        update_norm(norm, samples)

    def spy_collect(rollout: Any, agent: Any, *rest: Any) -> list:
        agents.append(agent)
        updates.append({})
        before = statistics(agent)
        episodes = collect(rollout, agent, *rest)
        assert same(statistics(agent), before)
        arrays = (rollout.obs, rollout.rewards, rollout.terminated | rollout.truncated)
        rollouts.append([x.copy() for x in arrays])
        return episodes

    def spy_update(agent: Any, *rest: Any) -> dict[str, Tensor]:
        before = statistics(agent)
        metrics = update(agent, *rest)
        assert same(statistics(agent), before)
        return metrics

    monkeypatch.setattr(ppo.Rollout, "collect", spy_collect)
    monkeypatch.setattr(ppo, "update", spy_update)
    monkeypatch.setattr(ppo.RunningMeanStd, "add", spy_norm)
    flags = ["--env-id", env_id, "--num-envs", 4, "--num-steps", 64, "--total-timesteps", 1280]
    flags += [*ALL_NORMS, "--gamma", 0.9, "--vectorization", vectorization, "--no-progress"]
    flags += ["--num-minibatches", 2, "--update-epochs", 2, "--recompute-advantages"]
    code, _, error = main(*flags, module=ppo)
    assert code == 0, error
    assert [set(names) for names in updates] == [set(NORMS)] * 5

    reset, discounted, history = np.zeros(4, bool), np.zeros(4), {"obs_norm": [], "reward_norm": []}
    for (obs, rewards, dones), samples in zip(rollouts, updates, strict=True):
        observations, returns = [], []
        for t in range(64):
            observations += list(obs[t, ~reset])
            discounted[~reset] = rewards[t, ~reset] + 0.9 * discounted[~reset]
            returns += list(discounted[~reset])
            discounted[dones[t]] = 0
            reset = dones[t] if vectorization == "native" else reset
        np.testing.assert_allclose(samples["obs_norm"], observations, rtol=1e-6)
        np.testing.assert_allclose(np.sort(samples["reward_norm"]), np.sort(returns), rtol=1e-5)
        assert len(samples["value_norm"]) == len(observations)
        history["obs_norm"] += observations
        history["reward_norm"] += returns
    assert (len(history["obs_norm"]) < 1280) == (vectorization == "native")
    for name, samples in history.items():
        norm = getattr(agents[0], name)
        assert norm.count == len(samples)
        np.testing.assert_allclose(norm.mean, np.mean(samples, 0), rtol=1e-4, atol=1e-6)
        std = np.sqrt(np.var(np.asarray(samples, np.float64), 0) + 1e-8)
        np.testing.assert_allclose(norm.std, std, rtol=1e-4)


@pytest.mark.parametrize("off", NORMS)
def test_a_normalizer_that_is_off_takes_no_samples(
    off: str, main: Callable, tmp_path: Path
) -> None:
    on = {"obs_norm": ["--norm-obs"], "reward_norm": ["--norm-reward"]}
    on["value_norm"] = ["--norm-value", "running"]
    flags = [flag for name, words in on.items() if name != off for flag in words]
    flags += ["--num-steps", 8, "--total-timesteps", 64, "--no-progress", "--run-dir", "run"]
    assert main(*flags)[0] == 0
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    for name in NORMS:
        assert saved[f"{name}.count"] == (0 if name == off else 64)
        assert bool((saved[f"{name}.std"] == 1).all()) == (name == off)
