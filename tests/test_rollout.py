"""Rollouts: buffers, finished episodes, and the rewards and ends to learn from."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import read_scalars
from envs.scripted import SPACES, Scripted, Step
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

import ppo_continuous
import ppo_discrete as ppo
import ppo_multidiscrete_mask

MODULES = {
    "Discrete": ppo,
    "Box": ppo_continuous,
    "MultiDiscrete": ppo_multidiscrete_mask,
}
MODES = ["sync", "native", "native SameStep"]
LEARN = {"norm_reward": True, "sign_reward": True, "clip_reward": 0.5, "bootstrap_truncated": False}
ATARI = {"env_id": "FakeNoFrameskip-v4", "env_kwargs": {"space": "image"}}
BUFFERS = "obs actions rewards terminated truncated life_lost valid".split()


def make_args(module: ModuleType = ppo, mode: str = "sync", **flags: Any) -> Any:
    """Flags of a tiny run; mode: sync, async, envpool, native, native SameStep."""
    vectorization, *autoreset = mode.split()
    env_kwargs = dict(flags.pop("env_kwargs", {}))
    if autoreset:
        env_kwargs["mode"] = autoreset[0]
    defaults = {"env_id": "envs.scripted:Scripted-v0", "num_envs": 3, "num_steps": 8}
    flags = defaults | {"hidden_sizes": (4,), "gamma": 0.9} | flags
    return module.Args(vectorization=vectorization, env_kwargs=env_kwargs, **flags)


class Player:
    """An agent, its environments and its rollout."""

    def __init__(self, args: Any, module: ModuleType = ppo, envs: VectorEnv | None = None) -> None:
        self.args, self.module = args, module
        self.envs = envs or module.make_envs(args, args.num_envs, 43)
        torch.manual_seed(1)
        space = self.envs.single_observation_space
        self.agent = module.Agent(args, space, self.envs.single_action_space)
        self.rollout = module.Rollout(args, self.agent, self.envs, 43)

    def collect(self) -> tuple[dict[str, Any], list[tuple[float, int]]]:
        """Copies of the buffers, and the episodes that ended."""
        episodes = self.rollout.collect(self.agent, self.envs)
        buffers = {name: np.copy(x) for name, x in vars(self.rollout).items() if name in BUFFERS}
        return buffers | {"final_obs": list(self.rollout.final_obs)}, episodes

    def expected(self, num_rollouts: int) -> list[list[list[Step]]]:
        """Rows of [rollout][environment] by the environments' own logs."""
        num_steps = self.args.num_steps
        rollouts = [[] for _ in range(num_rollouts)]
        for env in self.envs.unwrapped.envs:
            rows = []
            for step in env.unwrapped.log:
                rows.append(step)
                if self.rollout.next_step and (step.terminated or step.truncated):
                    rows.append(Step(step.next_obs, None, valid=False))
            for i, rollout in enumerate(rollouts):
                rollout.append(rows[num_steps * i : num_steps * (i + 1)])
        return rollouts


def check_buffers(player: Player, played: list[tuple[dict, list]]) -> None:
    """Buffers and episodes are what the environments' own logs say."""
    space = SPACES[player.args.env_kwargs.get("space", "vector")]()
    is_image = space.shape == (36, 37, 3)
    rollouts = player.expected(len(played))
    ends_seen, totals = set(), [(0.0, 0)] * player.args.num_envs

    def flat(obs: Any) -> np.ndarray:
        return obs if is_image else np.float32(spaces.flatten(space, obs))

    for (buffers, episodes), envs_rows in zip(played, rollouts, strict=True):
        ended, final_obs = [], []
        for n, rows in enumerate(envs_rows):
            for t, row in enumerate(rows):
                ends = (row.terminated, row.truncated)
                np.testing.assert_array_equal(buffers["obs"][t, n], flat(row.obs))
                assert buffers["valid"][t, n] == row.valid
                assert buffers["rewards"][t, n] == row.reward
                assert (buffers["terminated"][t, n], buffers["truncated"][t, n]) == ends
                if row.valid:
                    action = player.agent.to_env(buffers["actions"][t])[n]
                    np.testing.assert_array_equal(action, row.action)
                    total, length = totals[n]
                    totals[n] = (total + row.reward, length + 1)
                if any(ends):
                    ended.append(totals[n])
                    totals[n] = (0.0, 0)
                if ends == (False, True) and not player.rollout.next_step:
                    final_obs.append((t, n, row.next_obs))
                ends_seen.add((t == len(rows) - 1, *ends))
        assert sorted(episodes) == sorted(ended)
        found = sorted(buffers["final_obs"], key=lambda item: (item[1], item[0]))
        assert [item[:2] for item in found] == [item[:2] for item in final_obs]
        for (_, _, obs), (_, _, expected) in zip(found, final_obs, strict=True):
            np.testing.assert_array_equal(np.asarray(obs, np.float32), flat(expected))
    for (before, _), (after, _) in pairwise(played):
        np.testing.assert_array_equal(before["obs"][-1], after["obs"][0])
        np.testing.assert_array_equal(before["valid"][-1], after["valid"][0])
    assert len(ends_seen) == (8 if player.args.num_steps > 1 else 4)


@pytest.mark.parametrize("num_steps", [8, 1])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("actions", MODULES)
def test_buffers_and_episodes_are_the_environments(actions: str, mode: str, num_steps: int) -> None:
    """Also at the rollouts' borders, and although learning changes rewards in between."""
    module = MODULES[actions]
    kwargs = {"actions": actions}
    args = make_args(module, mode, num_steps=num_steps, env_kwargs=kwargs, **LEARN)
    player, played = Player(args, module), []
    for _ in range(80 // num_steps):
        played.append(player.collect())
        module.process_rewards(player.agent, player.rollout, args)
    check_buffers(player, played)
    assert sum(len(episodes) for _, episodes in played) > 30
    assert all(type(x) is float and type(n) is int for _, e in played for x, n in e)


@pytest.mark.parametrize("mode", ["sync", "native"])
@pytest.mark.parametrize("space", [name for name in SPACES if name != "vector"])
def test_observations_are_flattened_as_gymnasium_does(space: str, mode: str) -> None:
    """Final observations too; images stay as they are."""
    player = Player(make_args(mode=mode, env_kwargs={"space": space}))
    played = [player.collect() for _ in range(10)]
    check_buffers(player, played)
    assert played[0][0]["obs"].dtype == (np.uint8 if space == "image" else np.float32)


def test_native_same_step_observations_are_flattened_or_refused() -> None:
    """Gymnasium's vector wrapper refuses them, with a word on the mode."""
    args = make_args(mode="native SameStep", env_kwargs={"space": "matrix"})
    with pytest.raises(ValueError, match="autoreset_mode"):
        Player(args)


def test_async_and_sync_are_equal() -> None:
    """Also in lost lives, with buffers that workers write to; workers leave Ctrl-C to the run."""
    played = []
    for mode in ("sync", "async"):
        args = make_args(mode=mode, num_envs=2, num_steps=20, env_kwargs={"space": "image"})
        envs = ppo.make_envs(args, 2, 43)
        assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        assert list(envs.get_attr("sigint_is_ignored")) == [mode == "async"] * 2
        player = Player(replace(args, env_id=ATARI["env_id"]), envs=envs)
        played.append([player.collect() for _ in range(3)])
        envs.close()
    for (a, a_episodes), (b, b_episodes) in zip(*played, strict=True):
        assert a_episodes == b_episodes
        assert len(a["final_obs"]) == len(b["final_obs"]) > 0
        for (*where, obs), (*there, same) in zip(a["final_obs"], b["final_obs"], strict=True):
            assert where == there
            np.testing.assert_array_equal(obs, same)
        for name in a.keys() - {"final_obs"}:
            np.testing.assert_array_equal(a[name], b[name])
        assert a["life_lost"].any()


class Recorder(gym.vector.VectorWrapper):
    """Remembers what the steps returned."""

    def __init__(self, envs: VectorEnv) -> None:
        super().__init__(envs)
        self.steps: list[list[np.ndarray]] = []

    def step(self, actions: np.ndarray) -> tuple:
        result = self.env.step(actions)
        self.steps.append([np.copy(x) for x in result[1:4]])
        return result


def count_episodes(envs: Recorder, next_step: bool) -> list[tuple[float, int]]:
    """Episodes of the raw steps, counted one environment at a time."""
    episodes = []
    for n in range(envs.num_envs):
        total, length, resets = 0.0, 0, False
        for rewards, terminated, truncated in envs.steps:
            if resets and next_step:
                resets = False
                continue
            total, length, resets = total + rewards[n], length + 1, terminated[n] or truncated[n]
            if resets:
                episodes.append((total, length))
                total, length = 0.0, 0
    return episodes


@pytest.mark.parametrize("mode", ["sync", "native", "envpool"])
def test_cartpole_with_a_time_limit(mode: str) -> None:
    """Terminated and truncated episodes are counted; a final observation is no reset's."""
    if mode == "envpool":
        pytest.importorskip("envpool")
    kwargs = {"max_episode_steps": 20}
    args = make_args(mode=mode, env_id="CartPole-v1", num_steps=25, num_envs=4, env_kwargs=kwargs)
    envs = Recorder(ppo.make_envs(args, 4, 43))
    player, counted = Player(args, envs=envs), []
    for _ in range(6):
        buffers, episodes = player.collect()
        counted += episodes
        truncated = buffers["truncated"] & ~buffers["terminated"]
        assert truncated.any()
        if mode == "sync":
            final_obs = [obs for _, _, obs in buffers["final_obs"]]
            assert buffers["valid"].all()
        else:
            final_obs = buffers["obs"][1:][truncated]
            dones = buffers["terminated"] | buffers["truncated"]
            np.testing.assert_array_equal(buffers["valid"][1:], ~dones)
            started = buffers["obs"][1:][~buffers["valid"][:-1]]
            assert len(started) > 0
            assert np.abs(started).max() <= 0.05  # where CartPole starts
        assert np.abs(final_obs).max(1).min() > 0.05
    assert sorted(counted) == sorted(count_episodes(envs, mode != "sync"))
    assert {length for _, length in counted} >= {20}
    assert min(length for _, length in counted) < 20
    envs.close()


@pytest.mark.parametrize("mode", ["sync", "native", "envpool"])
def test_seeds(mode: str) -> None:
    """The same seed plays the same; all environments of two seeds differ."""
    if mode == "envpool":
        pytest.importorskip("envpool")
    args, played = make_args(mode=mode, env_id="CartPole-v1", num_envs=4), []
    for seed in (43, 43, 77):
        envs = ppo.make_envs(args, 4, seed)
        torch.manual_seed(seed)
        agent = ppo.Agent(args, envs.single_observation_space, envs.single_action_space)
        rollout = ppo.Rollout(args, agent, envs, seed)
        rollout.collect(agent, envs)
        played.append((rollout.obs, rollout.actions))
        envs.close()
    for a, b in zip(played[0], played[1], strict=True):
        np.testing.assert_array_equal(a, b)
    first = np.concatenate([obs[0] for obs, _ in played[1:]])
    assert len(np.unique(first, axis=0)) == 8


def test_sampled_and_most_probable_actions() -> None:
    for actions, module in MODULES.items():
        args = make_args(module, num_steps=200, num_envs=2, env_kwargs={"actions": actions})
        player = Player(args, module)
        with torch.no_grad():
            player.agent.actor[-1].weight.mul_(30)
        rollout, results = player.rollout, []
        for sample in (False, True):
            rollout.collect(player.agent, player.envs, sample)
            obs = torch.from_numpy(rollout.obs[:-1]).flatten(0, 1)
            masks = [torch.ones(len(obs), 5, dtype=torch.bool)] * (actions == "MultiDiscrete")
            with torch.no_grad():
                modes = player.agent.act(obs, *masks, None).view(rollout.actions.shape).numpy()
            results.append(np.isclose(rollout.actions, modes, atol=1e-5).mean())
        assert results[0] == 1.0
        assert results[1] < 0.9


def test_environment_that_reuses_its_arrays() -> None:
    """Observations that are views with negative strides, overwritten in every step."""
    envs = SyncVectorEnv([Scripted] * 3, copy=False, autoreset_mode="SameStep")
    turned = gym.vector.VectorWrapper(envs)
    turned.step = lambda actions: (lambda obs, *rest: (obs[:, ::-1], *rest))(*envs.step(actions))
    player = Player(make_args(), envs=turned)
    buffers, _ = player.collect()
    for n, env in enumerate(envs.envs):
        for t, row in enumerate(env.log[1:8], start=1):
            if not (env.log[t - 1].terminated or env.log[t - 1].truncated):
                np.testing.assert_array_equal(buffers["obs"][t, n], row.obs[::-1])


# ---- rewards and ends to learn from


def fake_atari(mode: str) -> VectorEnv:
    """Images with lives, as Atari games give them."""
    env_fns = [partial(Scripted, "image")] * 3
    if mode == "sync":
        return ppo.SyncEnvs(env_fns, autoreset_mode="SameStep")
    return SyncVectorEnv(env_fns, autoreset_mode="NextStep")


@pytest.mark.parametrize("mode", ["sync", "native"])
def test_lost_lives(mode: str) -> None:
    """Also on the step that ends or truncates the game; a new game's lives are no loss."""
    player = Player(make_args(**ATARI), envs=fake_atari(mode))
    played = [player.collect()[0] for _ in range(15)]
    kinds = set()
    for buffers, rollout in zip(played, player.expected(15), strict=True):
        for n, rows in enumerate(rollout):
            for t, row in enumerate(rows):
                if row.valid:
                    assert buffers["life_lost"][t, n] == row.life_lost
                    kinds.add((row.life_lost, row.terminated, row.truncated))
    assert len(kinds) == 8


def test_lives_of_other_environments_are_not_read() -> None:
    for space in ("vector", "image"):
        player = Player(make_args(env_kwargs={"space": space}))
        buffers, _ = player.collect()
        ppo.process_rewards(player.agent, player.rollout, player.args)
        np.testing.assert_array_equal(player.rollout.rewards, buffers["rewards"])
        np.testing.assert_array_equal(player.rollout.terminated, buffers["terminated"])
        assert np.abs(buffers["rewards"]).max() > 1
        assert any(row.life_lost for env in player.expected(1)[0] for row in env)


@pytest.mark.parametrize(
    "flags",
    [
        {"episodic_life": False, "sign_reward": False},
        {"sign_reward": False},
        {"episodic_life": False},
        {"sign_reward": False, "norm_reward": True},
        {"norm_reward": True, "clip_reward": None},
        {"sign_reward": False, "norm_reward": True, "episodic_life": False, "clip_reward": 0.5},
        {"norm_reward": True, "bootstrap_truncated": False, "gamma": 1.0},
    ],
)
@pytest.mark.parametrize("mode", ["sync", "native"])
def test_process_rewards(mode: str, flags: dict) -> None:
    """Signs, lost lives, rewards over the std of the discounted returns, and no bootstrap."""
    args = make_args(**ATARI | flags)
    player = Player(args, envs=fake_atari(mode))
    running, history = [0.0] * 3, []
    for i in range(6):
        _, episodes = player.collect()
        ppo.process_rewards(player.agent, player.rollout, args)
        rewards = np.zeros((8, 3))
        for n, rows in enumerate(player.expected(i + 1)[i]):
            for t, row in enumerate(rows):
                if not row.valid:
                    continue
                rewards[t, n] = np.sign(row.reward) if args.sign_reward else row.reward
                lost = row.life_lost and args.episodic_life
                running[n] = rewards[t, n] + args.gamma * running[n]
                history.append(running[n])
                if row.terminated or row.truncated or lost:
                    running[n] = 0.0
                cut = row.truncated and not args.bootstrap_truncated
                assert player.rollout.terminated[t, n] == (row.terminated or lost or cut)
                assert player.rollout.truncated[t, n] == row.truncated
        if args.norm_reward:
            limit = math.inf if args.clip_reward is None else args.clip_reward
            rewards = (rewards / np.std(history)).clip(-limit, limit)
            assert player.agent.reward_norm.count == len(history)
        np.testing.assert_allclose(player.rollout.rewards, rewards, rtol=1e-6)
        assert all(length == int(length) and 2 * total % 1 == 0 for total, length in episodes)
    assert np.mean(history) > 0.5  # a mean that must not be subtracted


def test_rewards_stay_zero_without_a_reward() -> None:
    """All rewards equal 0: a standard deviation of 0 gives no NaN."""
    player = Player(make_args(norm_reward=True))
    player.collect()
    player.rollout.rewards[:] = 0.0
    ppo.process_rewards(player.agent, player.rollout, player.args)
    assert not player.rollout.rewards.any()


# ---- what is not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_check_finite(bad: float) -> None:
    fine = {"rewards": np.zeros((3, 2)), "observations": np.zeros(2, np.uint8), "loss": 1.0}
    ppo.check_finite(7, **fine)
    rewards = np.zeros((3, 2))
    rewards[2, 1] = bad
    for values in ({"rewards": rewards}, {"rewards": bad}):
        with pytest.raises(FloatingPointError, match=r"7.*rewards"):
            ppo.check_finite(7, **fine | values)


# ---- what a run makes of it


@pytest.mark.parametrize("mode", ["sync", "native"])
@pytest.mark.parametrize("actions", MODULES)
def test_run_counts_valid_rows_and_logs_raw_returns(
    main: Callable, monkeypatch: pytest.MonkeyPatch, actions: str, mode: str
) -> None:
    """Normalisers see each valid row once; rows after an end are in no statistics."""
    monkeypatch.setattr(Scripted, "made", [])
    flags = "--env-id envs.scripted:Scripted-v0 --num-envs 3 --num-steps 10 --total-timesteps 90"
    flags += " --num-minibatches 3 --norm-obs --norm-reward --norm-value running --no-progress"
    kwargs = ["--env-kwargs", json.dumps({"actions": actions}), "--run-dir", "run"]
    flags = [*flags.split(), "--vectorization", mode, *kwargs]
    code, _, err = main(*flags, module=MODULES[actions])
    assert code == 0, err
    envs = [env for env in Scripted.made if env.log]
    scalars, rows, returns = read_scalars("run"), [], []
    ended = [([], []) for _ in range(3)]
    for env in envs:
        t, total, length = 0, 0.0, 0
        for row in env.log:
            total, length = total + row.reward, length + 1
            rows.append(row)
            if row.terminated or row.truncated:
                returns.append(total)
                ended[t // 10][0].append(total)
                ended[t // 10][1].append(length)
                total, length = 0.0, 0
                t += mode == "native"
            t += 1
    assert len(envs) == 3
    for i, (totals, lengths) in enumerate(ended):
        for tag, values in (("return", totals), ("length", lengths)):
            step, value = scalars[f"charts/episodic_{tag}"][i]
            assert (step, value) == (30 * (i + 1), pytest.approx(np.mean(values), rel=1e-6))
    assert scalars["charts/return_100"][-1][1] == pytest.approx(np.mean(returns), rel=1e-6)
    agent = torch.load("run/checkpoint.pt", weights_only=True)["agent"]
    norms = ("obs_norm", "reward_norm", "value_norm")
    assert {int(agent[f"{norm}.count"]) for norm in norms} == {len(rows)}
    mean = np.mean([np.float32(row.obs) for row in rows], 0, dtype=np.float64)
    np.testing.assert_allclose(agent["obs_norm.mean64"], mean, atol=1e-6)
    assert (len(rows) < 90) == (mode == "native")
