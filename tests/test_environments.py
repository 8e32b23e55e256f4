"""Environments: how they are made and stepped."""

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import read_scalars
from envs.scripted import SPACES, Scripted
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from test_rollout import MODULES, Player, make_args

import ppo_continuous
import ppo_discrete as ppo

TINY = "--num-envs 2 --num-steps 8 --total-timesteps 80 --no-progress --run-dir run".split()


# ---- how they are stepped


@pytest.mark.parametrize("space", ["vector", "image"])
@pytest.mark.parametrize("actions", MODULES)
def test_sync_is_gymnasiums(actions: str, space: str) -> None:
    """What its SyncVectorEnv returns in SAME_STEP; arrays of earlier steps stay as they were."""
    module, keys = MODULES[actions], ("lives", "action_mask")[: 1 + (actions == "MultiDiscrete")]
    make = partial(Scripted, space, actions, masks=len(keys) > 1)
    envs = module.SyncEnvs([make] * 3, autoreset_mode="SameStep")
    reference = SyncVectorEnv([make] * 3, autoreset_mode="SameStep")
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    np.testing.assert_array_equal(envs.reset(seed=7)[0], reference.reset(seed=7)[0])
    envs.action_space.seed(7)
    steps = []
    for _ in range(60):
        action = envs.action_space.sample()
        steps.append((envs.step(action), reference.step(action)))
    for (*arrays, infos), (*others, other_infos) in steps:
        for a, b in zip(arrays, others, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
        dones = arrays[2] | arrays[3]
        assert ("final_obs" in infos) == dones.any() == ("final_obs" in other_infos)
        for key in keys:
            np.testing.assert_array_equal(infos[key], other_infos[key])
        for n in np.flatnonzero(dones):
            np.testing.assert_array_equal(infos["final_obs"][n], other_infos["final_obs"][n])
            final_infos = infos["final_info"]["lives"], other_infos["final_info"]["lives"]
            np.testing.assert_array_equal(*(info[n] for info in final_infos))
    assert sum("final_obs" in step[0][4] for step in steps) > 20


@pytest.mark.parametrize(
    "shape, dtype, expected",
    [
        ((84, 84, 4), np.uint8, True),
        ((4, 84, 84), np.uint8, True),
        ((36, 36, 1), np.uint8, True),
        ((35, 36, 3), np.uint8, False),
        ((84, 84), np.uint8, False),
        ((84, 84, 3), np.float32, False),
    ],
)
def test_what_is_an_image(shape: tuple, dtype: type, expected: bool) -> None:
    assert ppo.fits_network(spaces.Box(0, 255, shape, dtype)) == expected
    assert not ppo.fits_network(spaces.Dict(image=spaces.Box(0, 255, shape, dtype)))


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Taxi-v3"])
def test_numbers_that_envpool_observes_are_one_hot(env_id: str) -> None:
    pytest.importorskip("envpool")
    buffers, _ = Player(make_args(mode="envpool", env_id=env_id)).collect()
    assert buffers["obs"].shape == (9, 3, {"FrozenLake-v1": 16, "Taxi-v3": 500}[env_id])
    assert set(np.unique(buffers["obs"])) == {0, 1}
    assert (buffers["obs"].sum(-1) == 1).all()


# ---- how they are made


@pytest.mark.parametrize("mode", ["Disabled", "missing"])
def test_other_autoreset_modes_are_refused(main: Callable, tmp_path: Path, mode: str) -> None:
    flags = "--env-id envs.scripted:Scripted-v0 --vectorization native --env-kwargs".split()
    code, out, err = main(*flags, json.dumps({"mode": mode}))
    assert (code, out) == (2, "")
    assert "Scripted-v0" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["sync", "native"])
def test_module_of_the_environment_is_imported(
    main: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str
) -> None:
    """`module:Id`, with an environment that takes no keyword arguments at all."""
    text = "import gymnasium\nfrom envs.scripted import Scripted, vector\n"
    text += f"gymnasium.register('Own{mode}-v0', lambda: Scripted(),"
    text += " vector_entry_point=lambda num_envs: vector(num_envs))"
    (tmp_path / f"elsewhere_{mode}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--env-id", f"elsewhere_{mode}:Own{mode}-v0", "--vectorization", mode, *TINY]
    code, _, err = main(*flags)
    assert code == 0, err
    assert len(read_scalars("run")["charts/SPS"]) == 5


def test_mujoco_leaves_no_warning_and_no_file(main: Callable, tmp_path: Path) -> None:
    """With the default environment, in a run and where a flag is wrong."""
    flags = "--num-steps 32 --num-minibatches 2 --total-timesteps 64 --no-progress".split()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, _, err = main(*flags, module=ppo_continuous)
        assert (code, err) == (0, "")
        assert [path.name for path in tmp_path.iterdir()] == ["runs"]
        assert main("--num-minibatches", 0, module=ppo_continuous)[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert len(list(tmp_path.glob("runs/*"))) == 1


def test_videos(main: Callable, tmp_path: Path) -> None:
    """Of the first environment's episodes, and of every episode of an evaluation."""
    pytest.importorskip("moviepy")
    flags = [*TINY, "--env-id", "envs.scripted:Scripted-v0"]
    assert main(*flags, "--capture-video")[0] == 0
    videos = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/videos/*/*.mp4")}
    episodes = [path.stem.split("-")[-1] for path in videos]
    assert sorted(map(int, episodes))[:2] == [0, 1]
    assert len(set(episodes)) == len(episodes)
    assert main("--eval", "run", "--eval-episodes", 1)[0] == 0
    assert videos.keys() == set(tmp_path.glob("run/videos/*/*.mp4"))
    assert main("--eval", "run", "--eval-episodes", 3, "--capture-video")[0] == 0
    new = set(tmp_path.glob("run/videos/*/*.mp4")) - videos.keys()
    assert len(new) >= 3
    assert all(path.stat().st_mtime_ns == changed for path, changed in videos.items())


# ---- Atari


class Game(gym.Env):
    """Writes down its actions; lives after each step and ends are given."""

    observation_space = SPACES["image"]()
    action_space = spaces.Discrete(4)

    def __init__(self, lives: list[int], end: tuple[bool, bool] = (True, False)) -> None:
        self.lives, self.end, self.actions = lives, end, []

    def observe(self) -> tuple[np.ndarray, dict]:
        t = len(self.actions)
        return np.full((36, 37, 3), t, np.uint8), {"lives": self.lives[t]}

    def reset(self, **kwargs: Any) -> tuple:
        self.actions = []
        return self.observe()

    def step(self, action: int) -> tuple:
        self.actions.append(action)
        obs, info = self.observe()
        last = len(self.actions) == len(self.lives) - 1
        return obs, float(len(self.actions)), last and self.end[0], last and self.end[1], info


@pytest.mark.parametrize("end", [(True, False), (False, True)])
@pytest.mark.parametrize(
    "lives, fires",
    [([3, 3, 3, 2, 2, 1, 1, 0], 3), ([3, 3, 3, 2, 2], 2), ([0, 0, 0, 0, 0, 0], 1)],
)
def test_fire_starts_a_game_and_every_life(
    lives: list[int], fires: int, end: tuple[bool, bool]
) -> None:
    """Its rewards and ends are not lost; the second game ends while it is pressed."""
    game = Game(lives, end)
    env = ppo.FireReset(game)
    for _ in range(2):
        obs, info = env.reset()
        total, ends = sum(range(len(game.actions) + 1)), (False, False)
        while not any(ends):
            obs, reward, *ends, info = env.step(2)
            total += reward
            assert 1 in game.actions[:2]
            assert obs[0, 0, 0] == len(game.actions)
            assert info["lives"] == lives[len(game.actions)]
        assert tuple(ends) == end
        assert total == sum(range(len(lives)))
        assert game.actions.count(1) == fires
        for t in range(3, len(lives) - 1):
            if lives[t] < lives[t - 1]:
                assert game.actions[t] == 1


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "PongNoFrameskip-v4", "ale_py:ALE/Freeway-v5"])
def test_atari_is_preprocessed(env_id: str) -> None:
    """84 x 84 grey pixels, 4 stacked, 4 (or as told) skipped; FIRE where the game has it."""
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    skip = 3 if "v4" in env_id else 4
    kwargs = {"frameskip": 3} if skip == 3 else {}
    envs = ppo.make_envs(make_args(env_id=env_id, env_kwargs=kwargs), 2, 43)
    assert ppo.is_atari(env_id)
    assert envs.single_observation_space == spaces.Box(0, 255, (4, 84, 84), np.uint8)
    envs.reset(seed=43)
    before, *_ = envs.step(np.array([0, 0]))  # or the next, where FIRE is pressed
    frames = [env.unwrapped.ale.getFrameNumber() for env in envs.envs]
    after, *_ = envs.step(np.array([1, 2]))
    skipped = [env.unwrapped.ale.getFrameNumber() for env in envs.envs]
    assert np.subtract(skipped, frames).tolist() == [skip, skip]
    np.testing.assert_array_equal(after[:, :3], before[:, 1:])
    env, has_fire = envs.envs[0], False
    while env is not env.unwrapped:
        has_fire |= isinstance(env, ppo.FireReset)
        env = env.env
    assert has_fire == ("Pong" in env_id)
    envs.close()


@pytest.mark.parametrize("mode", ["sync", "native"])
def test_breakout_without_a_policy_that_fires(mode: str) -> None:
    """Games go on to their end: five lost lives each, which end no episode.

    Native environments press FIRE at the start alone: the policy has to.
    """
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    player = Player(make_args(mode=mode, env_id="ALE/Breakout-v5", num_envs=2, num_steps=400))
    press = torch.eye(4)[0 if mode == "sync" else 1] * 3
    player.agent.act = lambda obs, noise: (noise * (mode == "native") + press).argmax(-1)
    buffers, episodes = player.collect()
    assert len(episodes) >= 2
    lost = 5 * len(episodes) + np.sum(5 - player.rollout.lives)
    assert buffers["life_lost"].sum() == lost
    ppo.process_rewards(player.agent, player.rollout, player.args)
    ends = buffers["terminated"] | buffers["life_lost"]
    np.testing.assert_array_equal(player.rollout.terminated, ends)


@pytest.mark.parametrize("mode", ["sync", "native"])
def test_returns_of_atari_are_raw_and_signs_are_learned(mode: str) -> None:
    """A pellet of Ms. Pac-Man is worth 10."""
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    player = Player(make_args(mode=mode, env_id="ALE/MsPacman-v5", num_envs=2, num_steps=90))
    player.agent.act = lambda obs, noise: noise.argmax(-1)
    buffers, _ = player.collect()
    assert set(np.unique(buffers["rewards"])) == {0, 10}
    ppo.process_rewards(player.agent, player.rollout, player.args)
    np.testing.assert_array_equal(player.rollout.rewards, buffers["rewards"] / 10)
    assert player.rollout.episode_return.max() > 10


def test_atari_run(main: Callable) -> None:
    """From the pixels to the weights, and back in an evaluation."""
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    kwargs = json.dumps({"max_num_frames_per_episode": 200})
    flags = ["--env-id", "ALE/Pong-v5", "--env-kwargs", kwargs, "--num-minibatches", 2]
    code, _, err = main(*TINY, *flags)
    assert code == 0, err
    assert len(read_scalars("run")["losses/policy_loss"]) == 5
    agent = torch.load("run/checkpoint.pt", weights_only=True)["agent"]
    singular_values = torch.linalg.svdvals(agent["actor.0.weight"].flatten(1))
    assert (singular_values - 2**0.5).abs().max() > 1e-4  # not those of the initialization
    assert main("--eval", "run", "--eval-episodes", 1)[0] == 0
    assert len(read_scalars("run")["eval/episodic_return"]) == 1
