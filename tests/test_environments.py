"""Environments: ends of episodes in both autoreset modes, observations, and how they are made."""

import copy
import json
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import read_scalars
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv, VectorEnv

import ppo_discrete as ppo

CPU = torch.device("cpu")
MARKED = False  # workers that are forked would see this set

# ---- environments


def plan(
    seed: int, length: int | None = None, end: str | None = None
) -> Iterator[tuple[list[float], bool, bool]]:
    """Rewards, terminated and truncated of the episodes that `Scripted` plays after this seed."""
    rng = np.random.default_rng(seed)
    while True:
        rewards = rng.integers(-3, 4, length or rng.integers(1, 7)) / 2
        kind = end or ("terminated", "truncated", "both")[rng.integers(3)]
        yield rewards.tolist(), kind != "truncated", kind != "terminated"


class Scripted(gym.Env):
    """Ignores the action; an observation is (seed % 10, episode, step), so no two are alike."""

    def __init__(
        self, length: int | None = None, end: str | None = None, render_mode: None = None
    ) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.length, self.end, self.render_mode = length, end, render_mode

    def observe(self) -> np.ndarray:
        return np.array([self.tag, self.episode, self.t], np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        if seed is not None:
            self.plan, self.tag, self.episode = plan(seed, self.length, self.end), seed % 10, -1
        self.rewards, self.terminated, self.truncated = next(self.plan)
        self.episode, self.t = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action: int) -> tuple:
        reward, self.t = self.rewards[self.t], self.t + 1
        last = self.t == len(self.rewards)
        return self.observe(), reward, last and self.terminated, last and self.truncated, {}


IMAGE = partial(spaces.Box, 0, 255, dtype=np.uint8)
SPACES = {
    "discrete": lambda: spaces.Discrete(5, start=2),
    "multibinary": lambda: spaces.MultiBinary(4),
    "multidiscrete": lambda: spaces.MultiDiscrete([3, 2]),
    "matrix": lambda: spaces.Box(-1, 1, (2, 3), np.float32),
    "float64": lambda: spaces.Box(-1, 1, (3,), np.float64),
    "integers": lambda: spaces.Box(-9, 9, (3,), np.int64),
    "tuple": lambda: spaces.Tuple((spaces.Discrete(3), spaces.Box(-1, 1, (2, 2), np.float32))),
    "dict": lambda: spaces.Dict(
        b=spaces.MultiBinary(2), a=spaces.Box(-1, 1, (2,), np.float64), c=spaces.Discrete(3)
    ),
    "icon": lambda: IMAGE((8, 8, 3)),
    "channels last": lambda: IMAGE((40, 44, 3)),
    "channels first": lambda: IMAGE((3, 40, 44)),
}


class Sampled(gym.Env):
    """Samples its observations; every episode is truncated after three steps without reward."""

    def __init__(self, space: str, render_mode: None = None) -> None:
        self.observation_space, self.render_mode = SPACES[space](), render_mode
        self.action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: int) -> tuple:
        self.t += 1
        return self.observation_space.sample(), 0.0, False, self.t == 3, {}


class Worker(Scripted):
    """Observes where it runs: whether in a forked process, and whether that ignores SIGINT."""

    def observe(self) -> np.ndarray:
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return np.array([MARKED, ignored, 0], np.float32)


class Shifted(Scripted):
    """Actions 5 to 7; the reward is the action."""

    def __init__(self, render_mode: None = None) -> None:
        super().__init__(render_mode=render_mode)
        self.action_space = spaces.Discrete(3, start=5)

    def step(self, action: int) -> tuple:
        obs, _, *ends = super().step(action)
        assert self.action_space.contains(action)
        return obs, float(action), *ends


class Bare(Scripted):
    """Takes no keyword arguments at all."""

    def __init__(self) -> None:
        super().__init__(length=2)


class Lives(gym.Env):
    """Pixels; episodes of 2 steps, with rewards of 5, 0 and -5 in turn, and `lives` in the info."""

    def __init__(self, lives: int | str, render_mode: None = None) -> None:
        self.observation_space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
        self.action_space, self.lives, self.render_mode = spaces.Discrete(2), lives, render_mode
        self.total = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        self.t = 0
        return np.zeros((1, 36, 36), np.uint8), {"lives": self.lives}

    def step(self, action: int) -> tuple:
        self.t, self.total = self.t + 1, self.total + 1
        reward, left = (-5.0, 5.0, 0.0)[self.total % 3], self.lives
        info = {"lives": left if isinstance(left, str) else max(left - self.t, 0)}
        return np.zeros((1, 36, 36), np.uint8), reward, self.t == 2, False, info


def vector(env: type, num_envs: int, mode: str = "NextStep", **kwargs: Any) -> VectorEnv:
    """The environment as a vector environment of its own, which resets in this mode."""
    sync = "SameStep" if mode == "missing" else mode
    envs = SyncVectorEnv([partial(env, **kwargs)] * num_envs, autoreset_mode=sync)
    if mode == "missing":
        del envs.metadata["autoreset_mode"]
    return envs


class Recorder:
    """Remembers what the steps of a vector environment returned."""

    def __init__(self, envs: VectorEnv) -> None:
        self.envs, self.steps = envs, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.envs, name)

    def step(self, actions: np.ndarray) -> tuple:
        result = self.envs.step(actions)
        self.steps.append([np.copy(x) for x in result[1:4]] + [np.copy(result[4].get("lives", 0))])
        return result


for cls in (Scripted, Sampled, Worker, Shifted, Bare, Lives):
    gym.register(f"{cls.__name__}-v0", cls, vector_entry_point=partial(vector, cls))


# ---- what should come out of them


class Row(NamedTuple):
    """A row of a rollout, for one environment."""

    obs: tuple[int, int, int]
    valid: bool
    reward: float
    next_obs: tuple[int, int, int]
    terminated: bool
    truncated: bool
    episode: tuple[float, int] | None


def walk(seed: int, num_rows: int, next_step: bool, **kwargs: Any) -> list[Row]:
    """The first rows of `Scripted` after this seed."""
    rows, tag = [], seed % 10
    for episode, (rewards, terminated, truncated) in enumerate(plan(seed, **kwargs)):
        n = len(rewards)
        for t, reward in enumerate(rewards):
            ends = (terminated, truncated) if t == n - 1 else (False, False)
            done = (sum(rewards), n) if t == n - 1 else None
            rows.append(
                Row((tag, episode, t), True, reward, (tag, episode, t + 1), *ends, episode=done)
            )
        if next_step:
            row = (tag, episode, n), False, 0.0, (tag, episode + 1, 0), False, False, None
            rows.append(Row(*row))
        if len(rows) >= num_rows:
            return rows[:num_rows]
    raise AssertionError


def count_episodes(steps: list, next_step: bool) -> list[list[tuple[float, int]]]:
    """Episodes that ended in each step, counted one environment at a time over raw steps."""
    ended = [[] for _ in steps]
    for n in range(len(steps[0][0])):
        total, length, resets = 0.0, 0, False
        for t, (rewards, terminated, truncated, _) in enumerate(steps):
            if resets and next_step:
                resets = False
                continue
            total, length, resets = total + rewards[n], length + 1, terminated[n] or truncated[n]
            if resets:
                ended[t].append((float(total), length))
                total, length = 0.0, 0
    return ended


GAMMA, LAM, WEIGHTS, BIAS = 0.9, 0.8, (0.25, -0.5, 0.75), 0.125
N, T, ROLLOUTS, SEED = 2, 7, 6, 43


def value(obs: tuple) -> float:
    """What the critic of `make_agent` says."""
    return sum(w * x for w, x in zip(WEIGHTS, obs, strict=True)) + BIAS


def make_args(env_id: str, mode: str = "sync", **flags: Any) -> ppo.Args:
    """Flags for one of the environments above; mode: sync, async, native or native SameStep."""
    vectorization, *same = mode.split()
    kwargs = flags.pop("env_kwargs", {}) | ({"mode": same[0]} if same else {})
    defaults = dict(num_envs=N, num_steps=T, hidden_sizes=(), gamma=GAMMA, gae_lambda=LAM)
    flags = defaults | flags | dict(env_kwargs=json.dumps(kwargs), vectorization=vectorization)
    return ppo.Args(env_id=env_id, **flags)


def make_agent(args: ppo.Args, envs: VectorEnv) -> ppo.Agent:
    """An agent whose critic is linear, by seeded weights that `value` knows if there are three."""
    torch.manual_seed(1)
    agent = ppo.Agent(args, envs.single_observation_space, envs.single_action_space)
    with torch.no_grad():
        head = agent.critic[-1]
        if head.weight.shape == (1, 3):
            head.weight[0], head.bias[0] = torch.tensor(WEIGHTS), BIAS
        else:
            head.weight.normal_()
    return agent


def play(
    args: ppo.Args, rollouts: int, seed: int = SEED
) -> tuple[ppo.Agent, list[tuple[ppo.Rollout, list]]]:
    """The agent, and every rollout with the episodes that ended in it."""
    envs = ppo.make_envs(args, args.num_envs, seed)
    agent = make_agent(args, envs)
    rollout = ppo.Rollout(args, agent, envs, seed)
    played = []
    for _ in range(rollouts):
        ppo.collect(agent, envs, rollout, [])
        episodes = ppo.finished_episodes(rollout)
        rollout.signals = ppo.learning_signals(agent, rollout, args)
        played.append((copy.deepcopy(rollout), episodes))
    envs.close()
    return agent, played


MODES = ["sync", "async", "native", "native SameStep"]


@pytest.fixture(scope="module", params=MODES)
def played(request: pytest.FixtureRequest) -> tuple:
    """Arguments, agent, rollouts and the rows that they should hold [rollout][environment]."""
    args = make_args(f"{__name__}:Scripted-v0", request.param)
    agent, rollouts = play(args, ROLLOUTS)
    rows = [walk(SEED + n, T * ROLLOUTS, request.param == "native") for n in range(N)]
    parts = [[env[T * i : T * (i + 1)] for env in rows] for i in range(ROLLOUTS)]
    return args, agent, rollouts, parts


# ---- ends of episodes


def test_rows_are_what_the_environments_played(played: tuple) -> None:
    _, _, rollouts, parts = played
    for (rollout, _), part in zip(rollouts, parts, strict=True):
        for n, rows in enumerate(part):
            for t, row in enumerate(rows):
                assert tuple(rollout.obs[t, n].tolist()) == row.obs
                assert rollout.valid[t, n] == row.valid
                assert rollout.rewards[t, n] == row.reward
                assert rollout.terminated[t, n] == row.terminated
                assert rollout.truncated[t, n] == row.truncated
    ends = {(row.terminated, row.truncated) for part in parts for rows in part for row in rows}
    assert len(ends) == 4
    assert any(rows[-1].episode for part in parts for rows in part)


def test_every_episode_is_counted_once(played: tuple) -> None:
    _, _, rollouts, parts = played
    for (_, episodes), part in zip(rollouts, parts, strict=True):
        assert sorted(episodes) == sorted(row.episode for rows in part for row in rows if row[-1])


@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("target", ["gae", "mc", "td"])
def test_targets_use_the_final_observation(played: tuple, target: str, bootstrap: bool) -> None:
    """Advantages and targets of every valid row, written out one environment at a time."""
    args, agent, rollouts, parts = played
    args = replace(args, value_target=target, bootstrap_truncated=bootstrap)
    for (rollout, _), part in zip(rollouts, parts, strict=True):
        rollout.signals = ppo.learning_signals(agent, rollout, args)
        _, values, advantages, targets = (x.tolist() for x in ppo.estimate(agent, rollout, args))
        for n, rows in enumerate(part):
            link = mc = None
            for t, row in reversed(list(enumerate(rows))):
                if not row.valid:
                    continue
                ended = row.terminated or row.truncated
                dead = row.terminated or (row.truncated and not bootstrap)
                next_value = 0.0 if dead else value(row.next_obs)
                delta = row.reward + GAMMA * next_value - value(row.obs)
                first = ended or link is None
                link = delta if first else delta + GAMMA * LAM * link
                mc = row.reward + GAMMA * (next_value if first else mc)
                td = row.reward + GAMMA * next_value
                expected = {"gae": link + value(row.obs), "mc": mc, "td": td}[target]
                assert values[t * N + n] == pytest.approx(value(row.obs), abs=1e-4)
                assert advantages[t * N + n] == pytest.approx(link, abs=1e-4)
                assert targets[t * N + n] == pytest.approx(expected, abs=1e-4)


def test_end_on_the_last_step_carries_over() -> None:
    """Episodes as long as the rollout: the row after the end is row 0 of the next one."""
    for mode, lengths, invalid in (
        ("sync", ([4], [4], [4], [4]), ([], [], [], [])),
        ("native", ([4], [], [4], [4]), ([], [0], [1], [2])),
    ):
        script = dict(length=4, end="truncated")
        args = make_args("Scripted-v0", mode, num_envs=1, num_steps=4, env_kwargs=script)
        _, rollouts = play(args, 4)
        assert [[n for _, n in episodes] for _, episodes in rollouts] == list(lengths)
        rows = [np.flatnonzero(~rollout.valid[:-1]).tolist() for rollout, _ in rollouts]
        assert rows == list(invalid)
        for (before, _), (after, _) in pairwise(rollouts):
            assert torch.equal(after.obs[0], before.obs[-1])
            assert after.valid[0] == before.valid[-1]


@pytest.mark.parametrize("mode", ["sync", "native"])
def test_episodes_longer_than_rollouts(mode: str) -> None:
    args = make_args("Scripted-v0", mode, num_envs=1, num_steps=2, env_kwargs={"length": 5})
    _, rollouts = play(args, 6)
    plans = plan(SEED, 5)
    first, second = (sum(next(plans)[0]) for _ in range(2))
    ends = [[], [], [(first, 5)], [], [(second, 5)], []]
    if mode == "native":
        ends = [[], [], [(first, 5)], [], [], [(second, 5)]][: len(ends)]
    assert [episodes for _, episodes in rollouts] == ends


@pytest.mark.parametrize("mode", ["sync", "native"])
def test_environments_do_not_influence_each_other(mode: str) -> None:
    """The first environment learns the same whether or not others end beside it."""
    alone = make_args("Scripted-v0", mode, num_envs=1)
    agent, one = play(alone, 3)
    _, three = play(replace(alone, num_envs=3), 3)
    for (a, _), (b, _) in zip(one, three, strict=True):
        lone, crowd = ppo.estimate(agent, a, alone), ppo.estimate(agent, b, alone)
        for x, y in zip(lone[1:], crowd[1:], strict=True):
            torch.testing.assert_close(x, y.view(T, 3)[:, 0])


@pytest.mark.parametrize("flags", [{}, {"norm_adv_scope": "batch"}, {"norm_adv": False}])
def test_row_after_an_end_contributes_nothing(flags: dict) -> None:
    """Whatever such rows hold, update, description and normalisers are the same bit for bit."""
    args = make_args("Scripted-v0", "native", num_envs=4, norm_value="popart", **flags)
    agent, rollouts = play(args, 3)
    rollout = rollouts[-1][0]
    results, other = [], copy.deepcopy(rollout)
    bad = torch.as_tensor(~rollout.valid[:-1])
    assert bad.sum() > 3
    other.actions[bad] = 1 - other.actions[bad]
    for played, poison in ((rollout, 0.0), (other, 3.0)):
        learner = copy.deepcopy(agent)
        batch = ppo.make_batch(learner, None, played, args)
        spoilt = {
            name: torch.where(bad.flatten(), rows + poison, rows)
            for name, rows in batch._asdict().items()
            if name in ("advantages", "targets", "values", "logprobs")
        }
        batch = batch._replace(**spoilt, obs=batch.obs + poison * bad.flatten()[:, None])
        torch.manual_seed(3)
        optimizer = ppo.Adam(learner, args)
        coefs = torch.tensor([1.0, 0.5, -0.01, 0.0, 0.0])
        metrics = ppo.update(learner, optimizer, played, batch, args, coefs, False)
        values = played.values + poison * bad.flatten()
        told = ppo.describe(batch, values, metrics, learner.value_norm)
        results.append((learner.state_dict(), told))
    for name, rows in results[0][0].items():
        assert torch.equal(rows, results[1][0][name]), name
    assert results[0][1] == results[1][1]
    assert not torch.equal(results[0][0]["critic.0.weight"], agent.critic[0].weight)


@pytest.mark.parametrize("mode", ["sync", "native"])
def test_run_counts_valid_rows_and_logs_raw_returns(main: Callable, mode: str) -> None:
    flags = "--env-id Scripted-v0 --num-envs 3 --num-steps 10 --total-timesteps 90 --run-dir run"
    flags += " --num-minibatches 3 --norm-obs --norm-reward --norm-value running --no-progress"
    flags += " --vectorization "
    code, out, _ = main(*flags.split(), mode)
    assert code == 0
    seed = ppo.environment_seed(1, 0)
    rows = [row for n in range(3) for row in walk(seed + n, 30, mode == "native")]
    valid, episodes = [row for row in rows if row.valid], [row.episode for row in rows if row[-1]]
    agent = torch.load("run/checkpoint.pt", weights_only=True)["agent"]
    for norm in ("obs_norm", "reward_norm", "value_norm"):
        assert agent[f"{norm}.count"] == len(valid)
    centre = np.mean([row.obs for row in valid], 0)
    np.testing.assert_allclose(agent["obs_norm.centre"], centre, atol=1e-9)
    scalars = read_scalars("run")
    for i in range(3):
        part = [
            row.episode
            for n in range(3)
            for row in walk(seed + n, 30, mode == "native")[10 * i : 10 * i + 10]
            if row.episode
        ]
        for tag, mean in zip(("return", "length"), np.mean(part, 0), strict=True):
            logged = scalars[f"charts/episodic_{tag}"][i]
            assert logged == (30 * (i + 1), pytest.approx(mean, rel=1e-6))
    mean = np.mean([total for total, _ in episodes])
    assert f"mean return of the last {len(episodes)} episodes {mean:.2f}" in out


@pytest.mark.parametrize("mode", ["sync", "native", "envpool"])
def test_episodes_of_cartpole(mode: str) -> None:
    if mode == "envpool":
        pytest.importorskip("envpool")
    args = make_args("CartPole-v1", mode, num_envs=4, num_steps=50)
    envs = Recorder(ppo.make_envs(args, 4, SEED))
    agent = make_agent(args, envs)
    rollout = ppo.Rollout(args, agent, envs, SEED)
    counted = []
    for _ in range(6):
        ppo.collect(agent, envs, rollout, [])
        counted.append(ppo.finished_episodes(rollout))
    raw = count_episodes(envs.steps, mode != "sync")
    for i, episodes in enumerate(counted):
        assert sorted(episodes) == sorted(chain.from_iterable(raw[50 * i : 50 * i + 50]))
    assert sum(map(len, counted)) > 20
    envs.close()


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Taxi-v3"])
def test_numbers_that_envpool_observes_are_one_hot(env_id: str) -> None:
    pytest.importorskip("envpool")
    args = make_args(env_id, "envpool", num_envs=3, num_steps=8)
    rows = play(args, 1)[1][0][0].obs
    assert rows.shape == (9, 3, {"FrozenLake-v1": 16, "Taxi-v3": 500}[env_id])
    assert set(rows.flatten().tolist()) == {0, 1}
    assert (rows.sum(-1) == 1).all()


# ---- observations and actions


def test_observations_in_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vector environment may return views of its arrays with negative strides."""
    args = make_args("CartPole-v1", "native", num_envs=3, num_steps=4)
    envs = ppo.make_envs(args, 3, SEED)
    for name in ("reset", "step"):
        call = getattr(envs, name)

        def turned(*given: Any, call: Callable = call, **kwargs: Any) -> tuple:
            obs, *others = call(*given, **kwargs)
            return obs[::-1], *others

        monkeypatch.setattr(envs, name, turned)
    rollout = ppo.Rollout(args, make_agent(args, envs), envs, SEED)
    expected, _ = gym.make_vec("CartPole-v1", 3, "vector_entry_point").reset(seed=SEED)
    np.testing.assert_array_equal(rollout.obs[-1], expected[::-1])
    ppo.collect(make_agent(args, envs), envs, rollout, [])
    assert rollout.stuck is None
    assert len(rollout.obs.unique(dim=0)) == 5


@pytest.mark.parametrize("mode", ["sync", "native"])
@pytest.mark.parametrize("name", [name for name in SPACES if not name.startswith("channels")])
def test_observations_are_flattened_as_gymnasium_does(name: str, mode: str) -> None:
    args = make_args("Sampled-v0", mode, env_kwargs={"space": name}, gamma=1.0, value_target="td")
    agent, [(rollout, _)] = play(args, 1)
    targets = ppo.estimate(agent, rollout, args)[3].view(T, N)
    assert rollout.obs.dtype == torch.float32
    for n in range(N):
        space, rows = SPACES[name](), []
        space.seed(SEED + n)
        while len(rows) < T:
            episode = [np.float32(spaces.flatten(space, space.sample())) for _ in range(4)]
            rows += pairwise(episode)
            if mode == "native":
                rows.append((episode[-1], None))
        for t, (row, following) in enumerate(rows[:T]):
            np.testing.assert_array_equal(rollout.obs[t, n], row)
            assert rollout.valid[t, n] == (following is not None)
            if following is not None:
                final = torch.as_tensor(following)
                torch.testing.assert_close(
                    targets[t, n], agent(final[None])[1][0], rtol=1e-3, atol=1e-5
                )
        assert rollout.truncated[2, n]


@pytest.mark.parametrize("mode", ["sync", "native"])
@pytest.mark.parametrize("name", ["channels last", "channels first"])
def test_pixels_are_scaled_and_channels_come_first(name: str, mode: str) -> None:
    args = make_args("Sampled-v0", mode, num_steps=3, env_kwargs={"space": name})
    agent, [(rollout, _)] = play(args, 1)
    assert agent.pixels
    assert rollout.obs.dtype == torch.uint8
    assert rollout.obs.shape[2:] == SPACES[name]().shape
    frames = rollout.obs[0].numpy().astype(np.float64) / 255
    if name == "channels last":
        frames = frames.transpose(0, 3, 1, 2)
    assert frames.max() > 0.9
    images = agent.preprocess(rollout.obs[0])
    np.testing.assert_allclose(images, frames, rtol=1e-6)
    assert images.is_contiguous(memory_format=torch.channels_last)  # which convolutions like
    dists, values = agent(rollout.obs[0])
    assert dists.shape == (N, 3)
    assert values.shape == (N,)


def test_layout_of_channels_does_not_matter() -> None:
    agents = []
    for name in ("channels last", "channels first"):
        torch.manual_seed(1)
        args = make_args("Sampled-v0")
        agents.append(ppo.Agent(args, SPACES[name](), spaces.Discrete(3)))
    images = torch.randint(256, (5, 40, 44, 3), dtype=torch.uint8)
    for a, b in zip(agents[0](images), agents[1](images.permute(0, 3, 1, 2)), strict=True):
        torch.testing.assert_close(a, b)


def test_actions_of_a_space_that_starts_elsewhere() -> None:
    agent, [(rollout, _)] = play(make_args("Shifted-v0", num_steps=40), 1)
    assert agent.num_actions == 3
    assert set(rollout.actions.flatten().tolist()) == {0, 1, 2}
    np.testing.assert_array_equal(rollout.rewards, rollout.actions + 5)


def test_environment_without_keyword_arguments(main: Callable) -> None:
    flags = "--env-id Bare-v0 --num-steps 8 --total-timesteps 32 --no-progress --run-dir run"
    code, out, err = main(*flags.split())
    assert (code, err) == (0, "")
    assert "mean return of the last 16 episodes" in out


# ---- how they are made


def test_workers_are_not_forked_and_ignore_sigint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "MARKED", True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    args = make_args(f"{__name__}:Worker-v0", "async", num_envs=1, num_steps=3)
    for mode, where in (("async", [0, 1]), ("sync", [1, 0])):
        _, [(rollout, _)] = play(replace(args, vectorization=mode), 1)
        assert rollout.obs[:, 0, :2].tolist() == [where] * 4
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.mark.parametrize("worker", [True, False])
def test_sigint_is_ignored_in_workers_alone(monkeypatch: pytest.MonkeyPatch, worker: bool) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: worker or None)
    ppo.make_env(make_args("Scripted-v0")).close()
    found = signal.signal(signal.SIGINT, before)
    assert found is (signal.SIG_IGN if worker else signal.default_int_handler)


@pytest.mark.parametrize("mode", ["sync", "async", "native"])
def test_module_of_the_environment_is_imported(
    main: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str
) -> None:
    """`module:Id`, in worker processes too, where only the module knows the environment."""
    name = f"elsewhere_{mode}"
    text = f"import gymnasium, {__name__} as t\n"
    text += f"gymnasium.register('Own{mode}-v0', t.Scripted, "
    text += "vector_entry_point=t.partial(t.vector, t.Scripted))"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    flags = "--num-envs 1 --num-steps 8 --total-timesteps 8 --no-progress --run-dir run"
    code, _, err = main("--env-id", f"{name}:Own{mode}-v0", "--vectorization", mode, *flags.split())
    assert code == 0, err
    [(step, length)] = read_scalars("run")["charts/episodic_length"]
    rows = walk(ppo.environment_seed(1, 0), 8, mode == "native")
    assert (step, length) == (8, np.float32(np.mean([r.episode[1] for r in rows if r.episode])))


@pytest.mark.parametrize(
    "mode, env_id, kwargs, length",
    [
        ("sync", "Scripted-v0", {"length": 3}, 3),
        ("native", "Scripted-v0", {"length": 3}, 3),
        ("sync", "CartPole-v1", {"max_episode_steps": 6}, 6),
        ("native", "CartPole-v1", {"max_episode_steps": 6}, 6),
        ("envpool", "CartPole-v1", {"max_episode_steps": 6}, 6),
    ],
)
def test_env_kwargs_arrive(mode: str, env_id: str, kwargs: dict, length: int) -> None:
    if mode == "envpool":
        pytest.importorskip("envpool")
    _, rollouts = play(make_args(env_id, mode, num_steps=20, env_kwargs=kwargs), 1)
    episodes = rollouts[0][1]
    assert len(episodes) >= 4
    assert {n for _, n in episodes} == {length}


@pytest.mark.parametrize("mode", ["native", "envpool"])
def test_truncation_of_cartpole_bootstraps(mode: str) -> None:
    """V(final observation), which is the row after the end, is the target's next value."""
    if mode == "envpool":
        pytest.importorskip("envpool")
    args = make_args("CartPole-v1", mode, env_kwargs={"max_episode_steps": 4}, value_target="td")
    agent, [(rollout, _)] = play(args, 1)
    targets = ppo.estimate(agent, rollout, args)[3].view(T, N)
    assert rollout.truncated[3].all()
    assert not rollout.valid[4].any()
    final = agent(rollout.obs[4])[1]
    assert final.abs().min() > 1e-4
    torch.testing.assert_close(targets[3], 1 + GAMMA * final)


@pytest.mark.parametrize("mode", ["Disabled", "missing"])
def test_other_autoreset_modes_are_refused(main: Callable, tmp_path: Path, mode: str) -> None:
    kwargs = json.dumps({"mode": mode})
    flags = "--env-id Scripted-v0 --vectorization native --env-kwargs"
    code, out, err = main(*flags.split(), kwargs)
    lines = [line for line in err.splitlines() if "WARN" not in line and "logger" not in line]
    assert (code, out) == (2, "")
    assert len(lines) == 1
    assert lines[0].startswith("error: --env-id Scripted-v0 --vectorization native: autoreset mode")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["sync", "native", "envpool"])
def test_each_environment_gets_its_own_seed(mode: str) -> None:
    if mode == "envpool":
        pytest.importorskip("envpool")
    args = make_args("CartPole-v1", mode, num_envs=4, num_steps=1)
    first = {}
    for name, seed in (("a", 5), ("again", 5), ("b", ppo.environment_seed(1, 0))):
        envs = ppo.make_envs(args, 4, seed)
        first[name] = ppo.Rollout(args, make_agent(args, envs), envs, seed).obs[-1]
        envs.close()
    assert torch.equal(first["a"], first["again"])
    assert len(torch.cat((first["a"], first["b"])).unique(dim=0)) == 8


# ---- Atari


@pytest.fixture
def game(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Lives-v0 taken for one of Atari's games, preprocessed as it is."""

    def make_env(args: ppo.Args, video_dir: None) -> gym.Env:
        return ppo.Guard(gym.make(args.env_id, **json.loads(args.env_kwargs)))

    monkeypatch.setattr(ppo, "make_env", make_env)
    monkeypatch.setattr(ppo, "is_atari", lambda args: True)


def test_lost_lives_and_signs_of_rewards(game: None) -> None:
    """Lives 3, 2, 1 then 3 again: only the drop ends the chain; rewards of 5 count as 1."""
    args = make_args("Lives-v0", num_envs=1, num_steps=4, env_kwargs={"lives": 3})
    agent, [(rollout, episodes)] = play(args, 1)
    assert rollout.lives[:, 0].tolist() == [3, 2, 3, 2, 3]
    assert rollout.rewards[:, 0].tolist() == [5, 0, -5, 5]
    assert episodes == [(5.0, 2), (0.0, 2)]
    for life, sign in ((True, True), (True, False), (False, True), (False, False)):
        flags = replace(args, episodic_life=life, sign_reward=sign)
        rewards, terminated, truncated = ppo.learning_signals(agent, rollout, flags)
        assert terminated[:, 0].tolist() == [life, True, life, True]
        assert rewards[:, 0].tolist() == ([1, 0, -1, 1] if sign else [5, 0, -5, 5])
        assert not truncated.any()


def test_signs_of_rewards_without_lives(game: None) -> None:
    """Games without lives (Bowling, Skiing) report 0 all the time."""
    args = make_args("Lives-v0", num_envs=1, num_steps=4, env_kwargs={"lives": 0})
    agent, [(rollout, _)] = play(args, 1)
    rewards, terminated, _ = ppo.learning_signals(agent, rollout, args)
    assert rewards[:, 0].tolist() == [1, 0, -1, 1]
    assert terminated[:, 0].tolist() == [False, True, False, True]


def test_rewards_of_other_pixels_stay() -> None:
    args = make_args("Sampled-v0", num_envs=1, num_steps=4, env_kwargs={"space": "channels last"})
    agent, [(rollout, _)] = play(args, 1)
    rollout.rewards[:, 0] = [7, -7, 0.5, 0]
    rewards = ppo.learning_signals(agent, rollout, args)[0]
    assert rewards[:, 0].tolist() == [7, -7, 0.5, 0]


def test_lives_of_other_pixels_are_no_game() -> None:
    args = make_args("Lives-v0", num_envs=1, num_steps=4, env_kwargs={"lives": 3})
    agent, [(rollout, _)] = play(args, 1)
    rewards, terminated, _ = ppo.learning_signals(agent, rollout, args)
    assert rewards[:, 0].tolist() == [5, 0, -5, 5]
    assert terminated[:, 0].tolist() == [False, True, False, True]


def test_lives_that_are_no_number() -> None:
    """Of several players, say: nobody's business outside of Atari."""
    args = make_args("Lives-v0", num_envs=1, num_steps=4, env_kwargs={"lives": "many"})
    [(rollout, episodes)] = play(args, 1)[1]
    assert rollout.stuck is None
    assert episodes == [(5.0, 2), (0.0, 2)]
    assert not rollout.lives.any()


@pytest.mark.parametrize(
    "mode, env_id",
    [
        ("sync", "ALE/Pong-v5"),
        ("native", "ALE/Pong-v5"),
        ("sync", "PongNoFrameskip-v4"),
        ("sync", "ale_py:ALE/Pong-v5"),
    ],
)
def test_atari_is_stacked_and_skips_frames(mode: str, env_id: str) -> None:
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    args = make_args(env_id, mode, num_steps=6)
    envs = ppo.make_envs(args, N, SEED)
    assert envs.single_observation_space.shape == (4, 84, 84)
    assert envs.single_observation_space.dtype == np.uint8
    obs, before = envs.reset(seed=SEED)
    obs = np.copy(obs)
    after, _, _, _, info = envs.step(np.array([2, 3]))
    if mode == "sync":
        info["frame_number"] = [env.unwrapped.ale.getFrameNumber() for env in envs.envs]
    assert (info["frame_number"] - np.asarray(before["frame_number"])).tolist() == [4, 4]
    np.testing.assert_array_equal(after[:, :3], obs[:, 1:])
    envs.close()
    agent, [(rollout, _)] = play(args, 1)
    assert rollout.obs.dtype == torch.uint8
    assert rollout.obs.shape == (7, N, 4, 84, 84)
    assert agent.pixels
    assert not agent.channels_last
    assert agent.num_actions == 6


@pytest.mark.parametrize("mode", ["sync", "native"])
def test_breakout_ends_chains_with_lives_and_episodes_with_games(mode: str) -> None:
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    args = make_args("ALE/Breakout-v5", mode, num_steps=150 if mode == "sync" else 400)
    envs = Recorder(ppo.make_envs(args, N, SEED))
    agent = make_agent(args, envs)
    rollout = ppo.Rollout(args, agent, envs, SEED)
    agent.act = lambda obs, noise: torch.randint(4, (len(obs),))
    lives, steps = rollout.lives[-1].tolist(), []
    assert lives == [5, 5]
    ppo.collect(agent, envs, rollout, [])
    episodes = ppo.finished_episodes(rollout)
    _, terminated, truncated = ppo.learning_signals(agent, rollout, args)
    for rewards, ended, _, left in envs.steps:
        steps.append([bool(e) or int(x) < y for e, x, y in zip(ended, left, lives, strict=True)])
        lives = left.tolist()
    assert terminated.tolist() == steps
    assert not truncated.any()
    raw = count_episodes(envs.steps, mode == "native")
    assert sorted(episodes) == sorted(chain.from_iterable(raw))
    assert sum(map(sum, steps)) >= (2 if mode == "sync" else 8)
    assert len(episodes) >= (0 if mode == "sync" else 2)
    envs.close()


@pytest.mark.parametrize("mode", ["sync", "native"])
def test_returns_of_atari_are_raw_and_signs_are_learned(mode: str) -> None:
    """A pellet of Ms. Pac-Man is worth 10."""
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    args = make_args("ALE/MsPacman-v5", mode, num_steps=90)
    agent, [(rollout, _)] = play(args, 1)
    assert set(np.unique(rollout.rewards)) == {0, 10}
    np.testing.assert_array_equal(rollout.signals[0], rollout.rewards / 10)
    assert rollout.so_far[0].max() >= 50
    raw = ppo.learning_signals(agent, rollout, replace(args, sign_reward=False))[0]
    np.testing.assert_array_equal(raw, rollout.rewards)


@pytest.mark.parametrize("game, last", [("Breakout", 1), ("Freeway", 0)])
def test_fire_is_pressed_where_the_game_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, game: str, last: int
) -> None:
    atari = pytest.importorskip("ale_py.env")
    pytest.importorskip("cv2")
    pressed, step = [], atari.AtariEnv.step

    def spy(env: gym.Env, action: int, *args: Any) -> tuple:
        pressed.append(int(action))
        return step(env, action, *args)

    monkeypatch.setattr(atari.AtariEnv, "step", spy)
    envs = ppo.make_envs(make_args(f"ALE/{game}-v5", num_envs=1), 1, SEED)
    envs.reset(seed=SEED)
    assert len(pressed) >= 4
    fires = 4 if last else 0
    assert pressed == [0] * (len(pressed) - fires) + [1] * fires
    envs.close()
