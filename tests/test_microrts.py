"""tests/envs/microrts.py: the mining task, its masks, and its agreement with the game's client."""

import importlib.util
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv

MISSING = [name for name in ("jpype", "gym_microrts") if importlib.util.find_spec(name) is None]
MISSING += [] if shutil.which("java") else ["java"]
if MISSING:
    pytest.skip(f"MicroRTS needs {' and '.join(MISSING)}", allow_module_level=True)

from tests.envs import microrts  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SIZES = [4, 10, 16, 24]
HEADS = [6, 4, 4, 4, 4, 7, 49]
OWN, BASE, WORKER, RESOURCE = 11, 15, 17, 14  # planes of an observation
DIRECTIONS = [(-1, 0), (0, 1), (1, 0), (0, -1)]
WAIT, MOVE, HARVEST, RETURN, PRODUCE = range(5)
BARRACKS = 2  # in the table of unit types


@pytest.fixture(scope="module")
def games() -> Iterator[dict[int, microrts.MicroRTSMining]]:
    """One environment for each size of map."""
    envs = {n: gym.make(f"tests.envs.microrts:MicroRTSMining{n}x{n}-v0") for n in SIZES}
    yield {n: env.unwrapped for n, env in envs.items()}
    for env in envs.values():
        env.close()


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


def find(observation: np.ndarray, kind: int) -> int:
    """The cell of our first unit of this type."""
    return int(np.flatnonzero(observation[..., kind] & observation[..., OWN])[0])


def mine(observation: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The next order to our first worker: harvest, return, or a step towards that."""
    size = len(observation)
    cell = find(observation, WORKER)
    heads = split(mask[cell])
    if heads[0][HARVEST]:
        return act(cell, HARVEST, harvest=int(heads[2].argmax()))
    if heads[0][RETURN]:
        return act(cell, RETURN, returns=int(heads[3].argmax()))
    carries = not observation.reshape(-1, 27)[cell, 5]
    base = observation[..., BASE] & observation[..., OWN]
    goal = base if carries else observation[..., RESOURCE]
    free = observation[..., 13]
    start = divmod(cell, size)
    first, queue = {start: None}, deque([start])
    while queue:
        y, x = queue.popleft()
        for direction, (dy, dx) in enumerate(DIRECTIONS):
            there = y + dy, x + dx
            if there in first or min(there) < 0 or max(there) >= size:
                continue
            if goal[there]:
                return act(cell, MOVE, move=first[y, x])
            if free[there]:
                first[there] = direction if first[y, x] is None else first[y, x]
                queue.append(there)
    return act(cell)


# ---- spaces and masks


@pytest.mark.parametrize("size", SIZES)
def test_spaces(games: dict, size: int) -> None:
    env = games[size]
    assert env.observation_space == gym.spaces.Box(0, 1, (size, size, 27), np.uint8)
    assert env.action_space.nvec.tolist() == [size * size, *HEADS]
    observation, info = env.reset(seed=1)
    assert observation in env.observation_space
    for group in np.split(observation, [5, 10, 13, 21], axis=-1):
        assert (group.sum(-1) == 1).all()
    assert info["action_mask"].shape == (size * size, 79)
    assert info["action_mask"].dtype == np.bool_
    choosable = np.flatnonzero(info["action_mask"][:, 0])
    assert sorted(choosable) == sorted([find(observation, BASE), find(observation, WORKER)])


@pytest.mark.parametrize("size", SIZES)
def test_random_valid_actions(games: dict, size: int) -> None:
    env, rng = games[size], np.random.default_rng(size)
    info = env.reset()[1]
    for _ in range(300):
        mask = info["action_mask"]
        assert mask[:, 0].any()
        for row in mask[mask[:, 0]]:
            assert all(head.any() for head in split(row))
        assert not mask[~mask[:, 0]].any()
        observation, reward, terminated, truncated, info = env.step(draw(mask, rng))
        assert observation in env.observation_space
        assert reward in (0, 1)
        assert not info["invalid_action"]
        if terminated or truncated:
            info = env.reset()[1]


def test_heads_that_do_not_apply_allow_their_first_choice(games: dict) -> None:
    observation, info = games[10].reset()
    heads = split(info["action_mask"][find(observation, BASE)])
    assert heads[0].tolist() == [1, 0, 0, 0, 1, 0]
    assert [np.flatnonzero(heads[i]).tolist() for i in (1, 2, 3, 6)] == [[0]] * 4
    assert np.flatnonzero(heads[5]).tolist() == [3]


@pytest.mark.parametrize(
    "cell, order",
    [
        (55, {"kind": MOVE}),  # no unit
        (88, {"kind": MOVE}),  # the opponent's worker
        (11, {"kind": HARVEST, "harvest": 1}),  # nothing there
        (11, {"kind": RETURN, "returns": 1}),  # nothing to return
        (12, {"kind": MOVE}),  # a base
        (12, {"kind": PRODUCE, "produce": 1, "unit": BARRACKS}),
    ],
)
def test_invalid_actions(games: dict, cell: int, order: dict) -> None:
    env = games[10]
    before = env.reset()[0]
    after, reward, _, _, info = env.step(act(cell, **order))
    assert info["invalid_action"]
    assert (after == before).all()
    assert reward == 0


def test_heads_that_the_type_does_not_use_are_not_judged(games: dict) -> None:
    env = games[10]
    before = env.reset()[0]
    after, *_, info = env.step(act(11, MOVE, move=2, harvest=3, unit=6, attack=48))
    assert not info["invalid_action"]
    assert (after != before).any()


def test_no_unit_awaits_an_order(games: dict) -> None:
    env = games[10]
    env.reset()
    env.step(act(12, PRODUCE, unit=BARRACKS))  # invalid: the base waits for 200 frames
    observation, _, _, _, info = env.step(act(11, PRODUCE, produce=2, unit=BARRACKS))
    assert not info["invalid_action"]
    mask = info["action_mask"]
    assert np.flatnonzero(mask[:, 0]).tolist() == [0]
    assert all(np.flatnonzero(head).tolist() == [0] for head in split(mask[0]))
    after, reward, _, _, info = env.step(act(0))
    assert (after == observation).all()
    assert reward == 0
    assert not info["invalid_action"]
    assert env.step(act(11))[4]["invalid_action"]  # busy
    for _ in range(20):
        observation, info = (step := env.step(act(0)))[0], step[4]
    assert info["action_mask"][11, 0]
    assert observation[2, 1, [OWN, 16]].all()  # the barracks


# ---- the task


@pytest.mark.parametrize("size", SIZES)
def test_harvest_time(games: dict, size: int) -> None:
    worker = games[size]._units.getUnitType("Worker")
    assert (worker.harvestTime, worker.moveTime) == (10, 10)


@pytest.mark.parametrize("size, total", [(4, 79), (10, 48), (16, 44), (24, 42)])
def test_returns_of_a_miner(games: dict, size: int, total: int) -> None:
    """One worker: four steps for a resource from our pile of 20, so 40 after 80 steps; then it
    walks to the opponent's. The last harvest on the 4x4 map terminates.
    """
    env = games[size]
    observation, info = env.reset()
    rewards, done = [], False
    while not done:
        step = env.step(mine(observation, info["action_mask"]))
        observation, reward, terminated, truncated, info = step
        rewards.append(reward)
        assert not info["invalid_action"]
        done = terminated or truncated
        if len(rewards) == 80:
            assert not observation[: size // 2, : size // 2, RESOURCE].any()
    assert set(rewards) == {0, 1}
    assert sum(rewards[:80]) == 40
    assert sum(rewards) == total
    assert (terminated, truncated) == (size == 4, size > 4)
    assert observation[..., RESOURCE].any() == (size > 4)
    assert len(rewards) == (160 if size == 4 else 200)


def test_the_worker_carries_what_it_harvested(games: dict) -> None:
    env = games[10]
    env.reset()
    env.step(act(11, MOVE, move=0))
    observation, reward, *_ = env.step(act(1, HARVEST, harvest=3))
    assert reward == 1
    assert observation[0, 1, [6, WORKER]].all()  # plane 6: one resource


@pytest.mark.parametrize("end_with_game", [True, False])
def test_game_over(end_with_game: bool) -> None:
    """The worker kills the opponent's worker with one attack and its base with ten."""
    env = gym.make(
        "tests.envs.microrts:MicroRTSMining4x4-v0", end_with_game=end_with_game
    ).unwrapped
    env.reset()
    env.step(act(5, MOVE, move=3))  # to the left of the base at (2, 1): from (1, 1) to (1, 0)
    env.step(act(4, MOVE, move=2))
    ends = [env.step(act(8, 5, attack=3 * 7 + 4))[2] for _ in range(10)]  # one cell to the right
    ends += [env.step(act(8, MOVE, move=1))[2], env.step(act(9, 5, attack=3 * 7 + 4))[2]]
    assert ends == [False] * 11 + [end_with_game]
    env.close()


def test_truncation_and_a_fresh_game(games: dict) -> None:
    env, rng = games[10], np.random.default_rng(0)
    first, info = env.reset()
    fresh_mask = info["action_mask"].copy()
    for step in range(200):
        last, _, terminated, truncated, info = env.step(draw(info["action_mask"], rng))
        assert (terminated, truncated) == (False, step == 199)
    assert (last != first).any()  # not yet the next episode
    again, info = env.reset()
    assert (again == first).all()
    assert (info["action_mask"] == fresh_mask).all()
    assert not env.step(act(11))[3]


@pytest.mark.parametrize("size", SIZES)
def test_like_the_games_own_client(games: dict, size: int) -> None:
    """Frame by frame through JNIGridnetClient: the same observations, rewards and masks."""
    import jpype

    env, rng = games[size], np.random.default_rng(size)
    one = gym.make(f"tests.envs.microrts:MicroRTSMining{size}x{size}-v0").unwrapped
    client, task = one._client, one._task
    nothing = jpype.JArray(jpype.JInt, 2)([[0] * 8])[0:0]
    info = env.reset()[1]
    client.reset(0)
    for i in range(150):
        action = draw(info["action_mask"], rng) if i % 5 else env.action_space.sample()
        _, reward, _, _, info = env.step(action)
        response = client.gameStep(jpype.JArray(jpype.JInt, 2)([action.tolist()]), 0)
        rewards = [response.reward[0]]
        for _ in range(9):
            rewards.append(client.gameStep(nothing, 0).reward[0])
        raw = np.array(response.observation)
        assert (raw == np.array(env._game.getMatrixObservation(0))).all()
        assert reward == sum(rewards)
        idle = np.array(client.getMasks(0))[..., 0].ravel().astype(bool)
        if idle.any():
            assert (info["action_mask"][:, 0] == idle).all()
        assert not task.isDone()
    one.close()


# ---- as an environment


def test_two_in_one_process_are_independent(games: dict) -> None:
    ours, other = games[10], gym.make("tests.envs.microrts:MicroRTSMining10x10-v0").unwrapped
    start = ours.reset()[0]
    other.reset()
    moved = other.step(act(11, MOVE, move=2))[0]
    other.close()
    waited = ours.step(act(11))[0]
    assert (waited == start).all()
    assert (moved != start).any()
    assert (other.step(act(21, MOVE, move=0))[0] == start).all()


def test_checker() -> None:
    """All of it: the game is not random, so that equal seeds give equal episodes."""
    env = gym.make("tests.envs.microrts:MicroRTSMining4x4-v0", render_mode="rgb_array")
    check_env(env.unwrapped)
    env.reset()
    image = env.render()
    assert image.shape == (640, 640, 3)
    assert image.dtype == np.uint8
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 4
    env.close()


def test_workers_of_a_forkserver() -> None:
    make = partial(gym.make, "tests.envs.microrts:MicroRTSMining4x4-v0")
    envs = AsyncVectorEnv([make, make], context="forkserver")
    rng = np.random.default_rng(0)
    info = envs.reset(seed=1)[1]
    for _ in range(5):
        assert info["action_mask"].shape == (2, 16, 79)
        actions = np.stack([draw(mask, rng) for mask in info["action_mask"]])
        observation, *_, info = envs.step(actions)
        assert observation.shape == (2, 4, 4, 27)
        assert not info["invalid_action"].any()
    envs.close()


def run(code: str, timeout: float = 30) -> str:
    """Standard output of Python code run from the root of the repository."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=True
    ).stdout


def test_signals_stay_with_python() -> None:
    code = """
import os, signal, time
import gymnasium as gym
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: got.append(number))
gym.make("tests.envs.microrts:MicroRTSMining4x4-v0").reset()
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.1)
print(sorted(got) == [signal.SIGINT, signal.SIGTERM])
"""
    assert run(code) == "True\n"


def test_a_fork_is_refused() -> None:
    code = """
import os
import gymnasium as gym
gym.make("tests.envs.microrts:MicroRTSMining4x4-v0")
if os.fork() == 0:
    try:
        gym.make("tests.envs.microrts:MicroRTSMining4x4-v0")
    except RuntimeError as error:
        os.write(1, str(error).encode())
    os._exit(0)
os.wait()
"""
    assert "forkserver" in run(code)


@pytest.mark.parametrize("name", ["jpype", "gym_microrts"])
def test_what_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == name else find_spec(x))
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"^MicroRTS: pip install .*$") as error:
        microrts.MicroRTSMining()
    assert "\n" not in str(error.value)


def test_java_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import jpype

    def absent() -> str:
        raise jpype.JVMNotFoundException

    monkeypatch.setattr(jpype, "isJVMStarted", lambda: False)
    monkeypatch.setattr(jpype, "getDefaultJVMPath", absent)
    with pytest.raises(ImportError, match=r"^MicroRTS: install Java.*$"):
        microrts.MicroRTSMining()
