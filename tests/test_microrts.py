"""tests/envs/microrts.py: the mining task and its masks."""

import importlib.util
import shutil
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

NEEDED = [importlib.util.find_spec("jpype"), importlib.util.find_spec("gym_microrts")]
if not all([*NEEDED, shutil.which("java")]):
    pytest.skip("needs jpype, gym_microrts and java", allow_module_level=True)

SIZES = pytest.mark.parametrize("size", [4, 10, 16, 24])
HEADS = [6, 4, 4, 4, 4, 7, 49]
RESOURCE = 14  # plane of an observation
WAIT, MOVE, HARVEST, RETURN = range(4)


def make(size: int) -> Any:
    return gym.make(f"tests.envs.microrts:MicroRTSMining{size}x{size}-v0").unwrapped


game = cache(make)  # one environment for each size of map


def split(row: np.ndarray) -> list[np.ndarray]:
    """The heads of a mask's row, its first column left out."""
    return np.split(row[1:], np.cumsum(HEADS)[:-1])


def draw(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random action that the mask allows."""
    cell = rng.choice(np.flatnonzero(mask[:, 0]))
    return np.array([cell, *(rng.choice(np.flatnonzero(head)) for head in split(mask[cell]))])


def act(cell: int, kind: int = WAIT, **heads: int) -> np.ndarray:
    """An action whose other heads are 0 but for the named ones."""
    names = ["move", "harvest", "returns", "produce", "unit", "attack"]
    return np.array([cell, kind, *(heads.get(name, 0) for name in names)])


@SIZES
def test_random_valid_actions(size: int) -> None:
    env, rng = game(size), np.random.default_rng(size)
    assert env.action_space.nvec.tolist() == [size * size, *HEADS]
    observation, info = env.reset()
    for step in range(1, 201):
        mask = info["action_mask"]
        assert mask.shape == (size * size, 79)
        assert mask[:, 0].any()
        assert all(head.any() for row in mask[mask[:, 0]] for head in split(row))
        assert not mask[~mask[:, 0]].any()
        assert observation in env.observation_space
        for group in np.split(observation, [5, 10, 13, 21], axis=-1):
            assert (group.sum(-1) == 1).all()
        observation, reward, terminated, truncated, info = env.step(draw(mask, rng))
        assert reward in (0, 1)
        assert not info["invalid_action"]
        assert (terminated, truncated) == (False, step == 200)


@pytest.mark.parametrize(
    "cell, order",
    [
        (55, {"kind": MOVE}),  # no unit
        (88, {"kind": MOVE}),  # the opponent's worker
        (11, {"kind": HARVEST, "harvest": 1}),  # nothing there
        (11, {"kind": RETURN, "returns": 1}),  # nothing to return
        (12, {"kind": MOVE}),  # a base
    ],
)
def test_invalid_actions(cell: int, order: dict) -> None:
    env = game(10)
    before = env.reset()[0]
    after, reward, _, _, info = env.step(act(cell, **order))
    assert info["invalid_action"]
    assert (after == before).all()
    assert reward == 0
    after, *_, info = env.step(act(11, MOVE, move=2, harvest=3, unit=6, attack=48))
    assert not info["invalid_action"]  # heads that the type does not use do not count
    assert (after != before).any()


@SIZES
def test_our_pile_brings_40(size: int) -> None:
    """Four steps for each of 20 resources: harvest to the left, go right, return down, go left."""
    env, cell, total = game(size), size + 1, 0.0
    env.reset()
    if size < 16:  # the pile is a row further up
        env.step(act(cell, MOVE, move=0))
        cell = 1
    there = [act(cell, HARVEST, harvest=3), act(cell, MOVE, move=1)]
    back = [act(cell + 1, RETURN, returns=2), act(cell + 1, MOVE, move=3)]
    for order in 20 * (there + back):
        observation, reward, _, _, info = env.step(order)
        assert not info["invalid_action"]
        total += reward
    assert total == 40
    assert not observation[: size // 2, : size // 2, RESOURCE].any()
    assert observation[..., RESOURCE].any()  # the opponent's
