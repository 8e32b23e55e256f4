"""Returns, advantages and value targets against the sums written out step by step."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

import ppo_discrete as ppo

MODES = ["SameStep", "NextStep"]


class Step(NamedTuple):
    obs: np.ndarray
    reward: float
    terminated: bool
    truncated: bool
    next_obs: np.ndarray


class Scripted(gym.Env):
    """Random observations, rewards and ends, whatever the action; `log` is what it did."""

    def __init__(self, chance: float) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,))
        self.action_space = spaces.Discrete(2)
        self.chance, self.log = chance, []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.obs = self.np_random.normal(size=3).astype(np.float32)
        return self.obs, {}

    def step(self, action: int) -> tuple:
        obs, self.obs = self.obs, self.np_random.normal(size=3).astype(np.float32)
        reward = float(np.float32(self.np_random.normal(0.5)))
        terminated, truncated = map(bool, self.np_random.random(2) < self.chance)
        self.log.append(Step(obs, reward, terminated, truncated, self.obs))
        return self.obs, reward, terminated, truncated, {}


class Play(NamedTuple):
    agent: ppo.Agent
    rollout: ppo.Rollout
    collect: Callable[[], list[list[Step]]]  # next rollout; its steps, environment by environment


def play(args: ppo.Args, mode: str, chance: float = 0.2) -> Play:
    """An agent in float64 with a value normaliser that is not trivial, and a real rollout."""
    torch.manual_seed(args.seed)
    envs = SyncVectorEnv([partial(Scripted, chance)] * args.num_envs, autoreset_mode=mode)
    agent = ppo.Agent(args, envs.single_observation_space, envs.single_action_space).double()
    agent.value_norm.mean.fill_(3.0)
    agent.value_norm.std.fill_(2.0)
    rollout = ppo.Rollout(args, agent, envs, args.seed)
    rollout.obs = rollout.obs.double()
    rollout.rows = list(zip(rollout.obs[:-1], rollout.obs[1:], rollout.actions, strict=True))

    def collect() -> list[list[Step]]:
        seen = [len(env.log) for env in envs.envs]
        ppo.collect(agent, envs, rollout, [])
        return [env.log[start:] for env, start in zip(envs.envs, seen, strict=True)]

    return Play(agent, rollout, collect)


def by_env(rollout: ppo.Rollout, rows: Any) -> list[np.ndarray]:
    """Rows [T, N] or [T * N] of the steps that count, environment by environment."""
    rows = np.asarray(rows).reshape(rollout.rewards.shape)
    return [rows[rollout.valid[:-1, n], n] for n in range(rows.shape[1])]


def value_of(agent: ppo.Agent, obs: np.ndarray) -> float:
    """V(obs): the critic's two layers and the value normaliser, by hand."""
    (w1, b1), (w2, b2) = ((p.weight, p.bias) for p in (agent.critic[0], agent.critic[2]))
    hidden = np.tanh(w1.detach().numpy() @ obs.astype(np.float64) + b1.detach().numpy())
    output = float((w2.detach().numpy() @ hidden + b2.detach().numpy())[0])
    return output * agent.value_norm.std.item() + agent.value_norm.mean.item()


def sums(
    steps: list[Step], value: Callable, gamma: float, lam: float, bootstrap: bool = True
) -> dict[str, list[float]]:
    """Advantage and targets of every step of one environment in one rollout."""
    rows = {"advantage": [], "gae": [], "mc": [], "td": []}
    for i in range(len(steps)):
        advantage = total = 0.0
        for k, step in enumerate(steps[i:]):
            stops = step.terminated or (step.truncated and not bootstrap)
            next_value = 0.0 if stops else value(step.next_obs)
            one_step = step.reward + gamma * next_value
            advantage += (gamma * lam) ** k * (one_step - value(step.obs))
            total += gamma**k * step.reward
            if k == 0:
                rows["td"].append(one_step)
            if step.terminated or step.truncated:
                break
        rows["advantage"].append(advantage)
        rows["gae"].append(advantage + value(steps[i].obs))
        rows["mc"].append(total + gamma ** (k + 1) * next_value)
    return rows


# ---- the pure functions


def random_ends(rng: np.random.Generator, t: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Terminated and truncated [t, n], sometimes both, and both at the last step of the first."""
    terminated, truncated = rng.random((2, t, n)) < 0.3
    terminated[-1, 0] = truncated[-1, 0] = True
    return terminated, truncated


@pytest.mark.parametrize("t, n", [(1, 1), (1, 4), (7, 1), (23, 5)])
def test_discounted_sum(t: int, n: int) -> None:
    rng = np.random.default_rng(t)
    terms, decay = rng.normal(size=(t, n)), rng.random((t, n))
    expected = [
        [sum(terms[k, j] * decay[i:k, j].prod() for k in range(i, t)) for j in range(n)]
        for i in range(t)
    ]
    result = ppo.discounted_sum(torch.as_tensor(terms), torch.as_tensor(decay))
    np.testing.assert_allclose(result, expected, rtol=1e-12)


@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("t, n", [(1, 1), (1, 4), (7, 1), (23, 5)])
def test_gae_and_returns(t: int, n: int, gamma: float, lam: float) -> None:
    rng = np.random.default_rng(10 * t + n)
    rewards, values, next_values = rng.normal(size=(3, t, n))
    terminated, truncated = random_ends(rng, t, n)
    next_values[terminated] = 0.0
    tables = []
    for j in range(n):  # observations are the values that they have
        flags = zip(terminated[:, j].tolist(), truncated[:, j].tolist(), strict=True)
        numbers = zip(values[:, j], rewards[:, j], next_values[:, j], flags, strict=True)
        steps = [Step(v, r, *ends, following) for v, r, following, ends in numbers]
        tables.append(sums(steps, lambda obs: obs, gamma, lam))
    arrays = map(torch.as_tensor, (rewards, values, next_values, terminated | truncated))
    rewards, values, next_values, ended = arrays
    advantages = ppo.compute_gae(rewards, values, next_values, ended, gamma, lam)
    returns = ppo.compute_returns(rewards, next_values, ended, gamma)
    expected = np.transpose([table["advantage"] for table in tables])
    np.testing.assert_allclose(advantages, expected, atol=1e-6)  # the decay is in float32
    np.testing.assert_allclose(returns, np.transpose([x["mc"] for x in tables]), atol=1e-6)


def test_targets_leave_their_inputs_alone() -> None:
    rewards, values, next_values = torch.randn(3, 5, 2, generator=torch.manual_seed(0))
    ended = torch.tensor([[False, True]] * 5)
    inputs = (rewards, values, next_values, ended)
    before = [x.clone() for x in inputs]
    ppo.compute_gae(*inputs, 0.99, 0.95)
    ppo.compute_returns(rewards, next_values, ended, 0.99)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


# ---- rollouts of real environments


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("target", ["gae", "mc", "td"])
@pytest.mark.parametrize("t, n", [(16, 6), (5, 1), (1, 7)])
def test_estimate(mode: str, bootstrap: bool, target: str, t: int, n: int) -> None:
    args = ppo.Args(
        hidden_sizes=(4,),
        num_steps=t,
        num_envs=n,
        gamma=0.95,
        gae_lambda=0.8,
        value_target=target,
        bootstrap_truncated=bootstrap,
    )
    agent, rollout, collect = play(args, mode)
    value, kinds = partial(value_of, agent), set()
    for _ in range(4):
        logs = collect()
        rollout.signals = ppo.learning_signals(agent, rollout, args)
        _, values, advantages, targets = ppo.estimate(agent, rollout, args)
        assert values.shape == advantages.shape == targets.shape == (t * n,)
        columns = [by_env(rollout, rows) for rows in (values, advantages, targets)]
        for steps, *rows in zip(logs, *columns, strict=True):
            expected = sums(steps, value, args.gamma, args.gae_lambda, bootstrap)
            np.testing.assert_allclose(rows[0], [value(s.obs) for s in steps], rtol=1e-9)
            np.testing.assert_allclose(rows[1], expected["advantage"], atol=1e-5)
            np.testing.assert_allclose(rows[2], expected[target], atol=1e-5)
            kinds |= {(s.terminated, s.truncated) for s in steps[:-1]}
            kinds |= {(s.terminated, s.truncated, "last") for s in steps[-1:]}
    both = {(x, y) for x in (False, True) for y in (False, True)}
    assert kinds >= (both if t == 16 else {(*ends, "last") for ends in both if t * n == 7})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "terminated, truncated, following",
    [(True, False, None), (False, True, "final"), (True, True, None), (False, False, "next")],
)
@pytest.mark.parametrize("last", [True, False])
def test_value_after_the_end(
    mode: str, terminated: bool, truncated: bool, following: str | None, last: bool
) -> None:
    """One step of reward 1 with V(obs) = obs[0]: what the target adds to the reward."""
    args = ppo.Args(hidden_sizes=(), value_target="td", gamma=0.5)
    agent = ppo.Agent(args, spaces.Box(-1, 1, (1,)), spaces.Discrete(2))
    with torch.no_grad():
        agent.critic[-1].weight.fill_(1.0)
    obs = torch.tensor([[[10.0]], [[30.0]], [[70.0]]])  # s, reset or next, the one after
    final_obs, same_step = [], mode == "SameStep"
    t, ended = int(last), terminated or truncated
    if truncated and not terminated and same_step:
        final_obs = [(t, 0, np.array([50.0], np.float32))]
    if truncated and not same_step:
        obs[t + 1] = 50.0
    ends = torch.zeros(2, 2, 1, dtype=torch.bool)
    ends[0, t], ends[1, t] = terminated, truncated
    valid = np.array([[True], [last or same_step or not ended], [True]])
    rollout = SimpleNamespace(
        obs=obs, valid=valid, final_obs=final_obs, signals=(torch.ones(2, 1), *ends)
    )
    targets = ppo.estimate(agent, rollout, args)[3]
    expected = {None: 0.0, "final": 50.0, "next": [30.0, 70.0][t]}[following]
    assert targets[t].item() == 1.0 + 0.5 * expected


@pytest.mark.parametrize("mode", MODES)
def test_environments_and_episodes_do_not_mix(mode: str) -> None:
    """What one environment got, or an earlier or later episode, moves no other advantage."""
    args = ppo.Args(hidden_sizes=(4,), num_steps=12, num_envs=3)
    agent, rollout, collect = play(args, mode)
    logs = collect()
    rewards, terminated, truncated = ppo.learning_signals(agent, rollout, args)
    ends = [[s.terminated or s.truncated for s in steps] for steps in logs]
    results = []
    for bonus in (0.0, 100.0):
        rewards = rewards.clone()
        rewards[np.flatnonzero(rollout.valid[:-1, 1])[0], 1] += bonus  # the first step of env 1
        rollout.signals = (rewards, terminated, truncated)
        results.append(by_env(rollout, ppo.estimate(agent, rollout, args)[2]))
    for n in (0, 2):
        np.testing.assert_array_equal(results[0][n], results[1][n])
    assert results[1][1][0] - results[0][1][0] == pytest.approx(100.0, abs=1e-4)
    first = ends[1].index(True) + 1
    assert first < len(ends[1])
    np.testing.assert_array_equal(results[0][1][1:], results[1][1][1:])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("t, n", [(16, 4), (1, 5)])
def test_finished_episodes(mode: str, t: int, n: int) -> None:
    """Each is counted once, whole, in the rollout in which it ends; invalid rows add no step."""
    args = ppo.Args(hidden_sizes=(4,), num_steps=t, num_envs=n)
    agent, rollout, collect = play(args, mode)
    under_way = [(0.0, 0)] * n
    counted = 0
    for _ in range(8):
        expected = []
        for j, steps in enumerate(collect()):
            total, length = under_way[j]
            for step in steps:
                total, length = total + step.reward, length + 1
                if step.terminated or step.truncated:
                    expected.append((total, length))
                    total, length = 0.0, 0
            under_way[j] = (total, length)
        ppo.learning_signals(agent, rollout, args)
        episodes = ppo.finished_episodes(rollout)
        assert len(episodes) == len(expected)
        np.testing.assert_allclose(sorted(episodes), sorted(expected), atol=1e-9)
        counted += len(episodes)
    assert counted > 5


def test_episode_returns_are_undiscounted_and_unnormalised() -> None:
    """Neither the reward normaliser nor its clip touches what is reported."""
    args = ppo.Args(hidden_sizes=(4,), num_steps=32, num_envs=2, norm_reward=True, clip_reward=0.1)
    agent, rollout, collect = play(args, "SameStep")
    logs = collect()
    ppo.learning_signals(agent, rollout, args)
    first = [s.reward for s in logs[0]]
    end = next(i for i, s in enumerate(logs[0]) if s.terminated or s.truncated)
    episodes = ppo.finished_episodes(rollout)
    assert min(abs(e[0] - sum(first[: end + 1])) for e in episodes) < 1e-9


# ---- the signals to learn from


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_scaled_rewards(mode: str, bootstrap: bool, clip: float | None) -> None:
    """Over the deviation of all discounted returns so far, which start at 0 in each episode."""
    args = ppo.Args(
        hidden_sizes=(4,),
        num_steps=9,
        num_envs=4,
        gamma=0.9,
        norm_reward=True,
        clip_reward=clip,
        bootstrap_truncated=bootstrap,
    )
    agent, rollout, collect = play(args, mode)
    running, history = [0.0] * 4, []
    for _ in range(5):
        logs = collect()
        for n, steps in enumerate(logs):
            for step in steps:
                running[n] = step.reward + args.gamma * running[n]
                history.append(running[n])
                if step.terminated or step.truncated:
                    running[n] = 0.0
        rewards, *_ = ppo.learning_signals(agent, rollout, args)
        for steps, scaled in zip(logs, by_env(rollout, rewards), strict=True):
            expected = np.array([s.reward for s in steps]) / np.std(history)
            limit = np.inf if clip is None else clip
            np.testing.assert_allclose(scaled, expected.clip(-limit, limit), rtol=1e-5)
    assert agent.reward_norm.count == len(history)
    assert np.mean(history) > 0.5  # a mean that must not be subtracted


def test_scaled_rewards_keep_their_sign() -> None:
    """Rewards of one sign with a large mean stay of one sign, and zero stays zero."""
    args = ppo.Args(hidden_sizes=(4,), num_steps=4, num_envs=2, norm_reward=True)
    agent, rollout, collect = play(args, "SameStep")
    collect()
    rollout.rewards[:] = [[1000.0, 1001.0], [0.0, 1002.0], [999.0, 1.0], [0.5, 1000.0]]
    rewards, *_ = ppo.learning_signals(agent, rollout, args)
    np.testing.assert_array_equal(rewards.sign(), np.sign(rollout.rewards))


@pytest.mark.parametrize("bootstrap", [True, False])
def test_signals_are_the_rollouts(bootstrap: bool) -> None:
    """Rewards as they are; without bootstrap a truncation counts as a termination."""
    args = ppo.Args(hidden_sizes=(4,), num_steps=30, num_envs=2, bootstrap_truncated=bootstrap)
    agent, rollout, collect = play(args, "SameStep")
    collect()
    assert (rollout.truncated & ~rollout.terminated).any()
    rewards, terminated, truncated = ppo.learning_signals(agent, rollout, args)
    np.testing.assert_array_equal(rewards, rollout.rewards)
    stops = rollout.terminated if bootstrap else rollout.terminated | rollout.truncated
    np.testing.assert_array_equal(terminated, stops)
    np.testing.assert_array_equal(terminated | truncated, rollout.terminated | rollout.truncated)


@pytest.mark.parametrize("pixels", [True, False])
@pytest.mark.parametrize("episodic_life", [True, False])
@pytest.mark.parametrize("sign_reward", [True, False])
def test_lives_and_signs(pixels: bool, episodic_life: bool, sign_reward: bool) -> None:
    """Pixels with lives: a lost one ends the chain, but not the game; a gained one does not."""
    args = ppo.Args(episodic_life=episodic_life, sign_reward=sign_reward)
    ends = np.array([[False], [False], [True], [False]])
    rollout = SimpleNamespace(
        rewards=np.array([[3.0], [-7.0], [0.0], [0.25]]),
        terminated=ends,
        truncated=np.zeros((4, 1), bool),
        lives=np.array([[3], [3], [2], [3], [4]]),
        atari=pixels,
        valid=np.ones((5, 1), bool),
        so_far=np.zeros((2, 1)),
        obs=torch.zeros(5, 1, 1),
    )
    agent = SimpleNamespace(pixels=pixels)
    rewards, terminated, _ = ppo.learning_signals(agent, rollout, args)
    lost = [[False], [pixels and episodic_life], [True], [False]]
    np.testing.assert_array_equal(terminated, lost)
    shown = np.array([[3.0], [-7.0], [0.0], [0.25]])
    np.testing.assert_array_equal(rewards, np.sign(shown) if pixels and sign_reward else shown)
    assert ppo.finished_episodes(rollout) == [(-4.0, 3)]


def test_signs_of_rewards_are_kept_for_pixels_without_lives() -> None:
    """An environment that tells of no lives is no Atari game: its rewards are its own."""
    rollout = SimpleNamespace(
        rewards=np.array([[3.0], [-0.5]]),
        terminated=np.zeros((2, 1), bool),
        truncated=np.zeros((2, 1), bool),
        lives=np.zeros((3, 1), np.int64),
        atari=False,
        obs=torch.zeros(3, 1, 1),
    )
    rewards, *_ = ppo.learning_signals(SimpleNamespace(pixels=True), rollout, ppo.Args())
    assert rewards.tolist() == [[3.0], [-0.5]]


# ---- advantages anew in every epoch


@pytest.mark.parametrize("norm_value", ["none", "running", "popart"])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_recompute_advantages(
    mode: str, recompute: bool, norm_value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each epoch's advantages and targets are the critic's of its start, or the first's."""
    args = ppo.Args(
        hidden_sizes=(4,),
        num_steps=6,
        num_envs=3,
        num_minibatches=1,
        update_epochs=3,
        norm_adv=False,
        norm_value=norm_value,
        recompute_advantages=recompute,
        max_grad_norm=None,
    )
    agent, rollout, collect = play(args, mode)
    logs = collect()
    rollout.signals = ppo.learning_signals(agent, rollout, args)
    if norm_value != "none":
        agent.advance_value_norm(torch.randn(50, generator=torch.manual_seed(1)) * 2 + 3, False)
    critics, epochs, loss_fn = [], [], ppo.ppo_loss
    valid = rollout.valid[:-1].ravel()

    def naive() -> dict[str, np.ndarray]:
        value = partial(value_of, agent)
        tables = [sums(steps, value, args.gamma, args.gae_lambda) for steps in logs]
        grid = {key: np.zeros(rollout.rewards.shape) for key in ("advantage", "gae")}
        for n, table in enumerate(tables):
            for key, rows in grid.items():
                rows[rollout.valid[:-1, n], n] = table[key]
        return {key: rows.ravel()[valid] for key, rows in grid.items()}

    def spy(agent: ppo.Agent, batch: ppo.Batch, *rest: Any) -> Any:
        critics.append(naive())
        rows = [(batch.obs == obs).all(-1).nonzero().item() for obs in flat_obs]
        epochs.append(ppo.Batch(*(x[rows] for x in batch)))
        return loss_fn(agent, batch, *rest)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    flat_obs = rollout.obs[:-1].flatten(0, 1)
    critics.append(naive())  # make_batch may advance the value normaliser
    batch = ppo.make_batch(agent, None, rollout, args)
    batch = batch._replace(weights=batch.weights.double())
    optimizer = ppo.Adam(agent, args)
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    coefs = torch.tensor([1.0, 0.5, -0.01, 0.0, 0.0], dtype=torch.float64)
    ppo.update(agent, optimizer, rollout, batch, args, coefs, False)
    first, epoch_critics = critics[0], critics[1:]
    assert len(epochs) == 3
    norm = agent.value_norm
    for i, epoch in enumerate(epochs):
        expected = epoch_critics[i] if recompute and i else first
        np.testing.assert_allclose(epoch.advantages[valid], expected["advantage"], atol=1e-5)
        targets = epoch.targets[valid] * norm.std + norm.mean
        np.testing.assert_allclose(targets, expected["gae"], atol=1e-4)
        for name in ("values", "logprobs", "dists", "actions"):  # the old policy and critic stay
            assert torch.equal(getattr(epoch, name), getattr(batch, name))
    change = np.abs(epoch_critics[2]["advantage"] - first["advantage"]).max()
    assert change > 0.01
