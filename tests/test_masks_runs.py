"""Whole runs under masks: dead ends, invalid actions, wrong masks, and that they are repeatable."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import read_scalars
from gymnasium import spaces
from test_masks import SHAPES, Ruled

import ppo_multidiscrete_mask as ppo

QUICK = "--num-envs 3 --num-steps 16 --num-minibatches 2 --no-progress".split()


@pytest.fixture
def train(main: Callable, tmp_path: Path) -> Callable:
    """Three iterations of 48 steps, or what the flags say; keyword arguments are the environment's.

    Returns exit code, standard output and error.
    """

    def train(*flags: Any, env_id: str = "Ruled-v0", steps: int = 144, **kwargs: Any) -> tuple:
        Ruled.record.clear()
        words = ["--env-id", env_id, "--env-kwargs", json.dumps(kwargs), "--total-timesteps", steps]
        words += ["--run-dir", tmp_path / "run"]
        return main(*QUICK, *words, *flags, module=ppo)

    return train


def curve(tag: str) -> list[float]:
    return [value for _, value in read_scalars("run")[tag]]


def refused(outcome: tuple, *said: str) -> bool:
    """Whether it ended with a wrong flag's one line, which says this, and wrote nothing."""
    code, out, err = outcome
    return (
        (code, out) == (2, "")
        and err.startswith("error: ")
        and err.count("\n") == 1
        and all(words in err for words in said)
        and not list(Path().iterdir())
    )


# ---- dead ends


@SHAPES
@pytest.mark.parametrize("kind", ["independent", "conditional"])
@pytest.mark.parametrize("head", [0, 1, 2])
@pytest.mark.parametrize(
    "mode, env, clock", [("sync", 1, 0), ("sync", 2, 5), ("sync", 0, 21), ("native", 1, 7)]
)
def test_a_mask_that_allows_nothing_ends_the_run(
    mode: str, env: int, clock: int, head: int, kind: str, conditional: bool, train: Callable
) -> None:
    """One line names environment and head, and no action of that step is played."""
    tags = [(ppo.environment_seed(1, 0) + n) % 7 for n in range(3)]
    kwargs = {"dead": [tags[env], clock, head], "conditional": conditional, "single": False}
    code, out, err = train("--mask", kind, "--vectorization", mode, strict=False, **kwargs)
    assert (code, out) == (1, "")
    assert err.count("error:") == err.count("\n") == 1
    assert f"environment {env} " in err
    assert f"head {head} " in err
    played = [sum(row[0] == tag for row in Ruled.record) for tag in tags]
    assert played == [clock] * 3 if mode == "sync" else played[env] == clock
    if kind == "conditional" or not conditional:
        assert all(ok for *_, ok in Ruled.record)


@SHAPES
@pytest.mark.parametrize("flag", ["--eval-deterministic", "--no-eval-deterministic"])
@pytest.mark.parametrize("head", [0, 2])
def test_a_mask_that_allows_nothing_ends_an_evaluation(
    head: int, flag: str, conditional: bool, train: Callable, main: Callable
) -> None:
    assert train(conditional=conditional, steps=48)[0] == 0
    Ruled.record.clear()
    tag = ppo.environment_seed(1, 48) % 7
    kwargs = json.dumps({"dead": [tag, 2, head], "conditional": conditional})
    code, _, err = main("--eval", "run", flag, "--env-kwargs", kwargs, module=ppo)
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert len(Ruled.record) == 2
    assert all(ok for *_, ok in Ruled.record)
    assert "environment 0 " in err
    assert f"head {head}" in err


def test_a_dead_end_leaves_the_last_checkpoint(train: Callable) -> None:
    dead = [ppo.environment_seed(1, 0) % 7, 33, 1]  # in the third iteration
    assert train("--checkpoint-every", 1, dead=dead)[0] == 1
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 96


# ---- what reaches the environment


@SHAPES
@pytest.mark.parametrize(
    "mode, where",
    [("sync", "info"), ("sync", "two keys"), ("native", "method"), ("native", "one key")],
)
def test_whole_runs_play_only_what_is_allowed(
    mode: str, where: str, conditional: bool, train: Callable, main: Callable
) -> None:
    """One joint action in each step; in training and in evaluation."""
    outcome = train("--vectorization", mode, where=where, conditional=conditional)
    assert outcome[0] == 0, outcome
    assert curve("policy/invalid_fraction") == [0, 0, 0]
    assert curve("charts/episodic_return") == [0, 0, 0]
    assert curve("losses/entropy") == [0, 0, 0]
    resets = len(Ruled.record)
    assert resets == 144 if mode == "sync" else 90 < resets < 144
    for flag in ("--eval-deterministic", "--no-eval-deterministic"):
        code, out, _ = main("--eval", "run", "--eval-episodes", 9, flag, module=ppo)
        assert code == 0
        assert list(map(float, re.findall(r"[\d.]+", out.splitlines()[-1]))) == [0, 0, 9]
    assert len(Ruled.record) > resets + 18
    assert all(ok for *_, ok in Ruled.record)


@SHAPES
@pytest.mark.parametrize("kind", ["none", "independent", "conditional"])
def test_invalid_fraction_is_what_the_environments_count(
    kind: str, conditional: bool, train: Callable
) -> None:
    kwargs = {"conditional": conditional, "strict": False, "single": False}
    assert train("--mask", kind, **kwargs)[0] == 0
    wrong = np.reshape([not ok for *_, ok in Ruled.record], (3, 48)).mean(1)
    assert curve("policy/invalid_fraction") == pytest.approx(wrong, abs=1e-6)
    assert (wrong > 0).all() == (kind == "none" or (kind, conditional) == ("independent", True))
    assert (wrong < 1).all()


def test_invalid_fraction_where_environments_reset_in_the_next_step(train: Callable) -> None:
    kwargs = {"strict": False, "single": False}
    assert train("--vectorization", "native", "--mask", "none", steps=48, **kwargs)[0] == 0
    wrong = [not ok for *_, ok in Ruled.record]
    assert 0 < sum(wrong) < len(wrong) < 48
    assert curve("policy/invalid_fraction") == [pytest.approx(np.mean(wrong), abs=1e-6)]


# ---- masks and spaces that fit no action


@pytest.mark.parametrize("where", ["info", "method", "one key", "two keys"])
@pytest.mark.parametrize("mode", ["sync", "native"])
def test_a_mask_of_a_wrong_shape_is_refused(mode: str, where: str, train: Callable) -> None:
    outcome = train("--vectorization", mode, where=where, cut=1)
    assert refused(outcome, "(8,)", "(9,) or (3, 7)"), outcome
    outcome = train("--vectorization", mode, where=where, conditional=True, cut=1)
    assert refused(outcome, "(3, 6)", "(9,) or (3, 7)"), outcome


def test_an_action_space_of_another_script_is_named(main: Callable) -> None:
    assert refused(main("--env-id", "Pendulum-v1", module=ppo), "ppo_continuous.py")


class Echo(gym.Env):
    """Wants the action that it shows; `masked`: allows no other."""

    def __init__(self, space: str, masked: bool = False) -> None:
        self.action_space = SPACES[space]
        self.observation_space = spaces.Box(0, 1, (len(self.flat(self.action_space.sample())),))
        self.masked = masked

    def flat(self, action: Any) -> np.ndarray:
        return spaces.flatten(self.action_space, action).astype(np.float32)

    def look(self) -> tuple:
        self.wanted = self.action_space.sample()
        obs = self.flat(self.wanted)
        return obs, {"action_mask": obs.astype(np.int8)} if self.masked else {}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        if seed is not None:
            self.action_space.seed(seed)
        self.steps = 0
        return self.look()

    def step(self, action: Any) -> tuple:
        assert self.action_space.contains(action)
        self.steps += 1
        reward = float(np.array_equal(action, self.wanted))
        obs, info = self.look()
        return obs, reward, False, self.steps == 10, info


SPACES = {
    "Discrete": spaces.Discrete(4, start=-2),
    "MultiDiscrete": spaces.MultiDiscrete([3, 2], start=[1, 5]),
    "matrix": spaces.MultiDiscrete([[2, 3], [3, 1]]),
}
gym.register("Echo-v0", Echo)


@pytest.mark.parametrize("space", SPACES)
def test_environments_without_masks(space: str, train: Callable) -> None:
    """They are learned, so that choices, their log-probs and what is played belong together."""
    flags = "--num-steps 32 --learning-rate 1e-2 --update-epochs 8 --gamma 0".split()
    outcome = train(*flags, env_id="Echo-v0", space=space, steps=96 * 30)
    assert outcome[0] == 0, outcome
    assert set(curve("policy/invalid_fraction")) == {0}
    returns = curve("charts/episodic_return")
    assert returns[0] < 5
    assert returns[-1] > 9


@pytest.mark.parametrize("space", SPACES)
def test_masks_of_all_spaces(space: str, train: Callable) -> None:
    """The mask allows what is wanted alone."""
    assert train(env_id="Echo-v0", space=space, masked=True)[0] == 0
    assert curve("policy/invalid_fraction") == [0, 0, 0]
    assert curve("charts/episodic_return") == [10, 10, 10]


# ---- planes


class Planes(gym.Env):
    """Noise of a shape, with a mask that allows one action."""

    def __init__(self, shape: tuple, dtype: str = "uint8") -> None:
        self.observation_space = spaces.Box(0, 1, tuple(shape), dtype)
        self.action_space = spaces.MultiDiscrete([2, 3])

    def look(self) -> tuple:
        mask = np.zeros((2, 4), bool)
        mask[self.np_random.integers(2), [0, 2]] = True
        return self.observation_space.sample(), {"action_mask": mask}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.steps = 0
        return self.look()

    def step(self, action: np.ndarray) -> tuple:
        self.steps += 1
        obs, info = self.look()
        return obs, 1.0, False, self.steps == 10, info


gym.register("Planes-v0", Planes)


@pytest.mark.parametrize(
    "shape, dtype, flags, sizes",
    [
        ((5, 5, 3), "uint8", [], {"trunk": (16, 3, 3, 3)}),
        ((3, 5, 5), "float32", ["--norm-obs"], {"trunk": (16, 3, 3, 3)}),
        (
            (5, 5, 3),
            "uint8",
            ["--no-shared-network"],
            {"actor": (16, 3, 3, 3), "critic": (16, 3, 3, 3)},
        ),
        ((36, 36, 3), "uint8", [], {"trunk": (32, 3, 8, 8)}),
    ],
    ids=str,
)
def test_planes_train(shape: tuple, dtype: str, flags: list, sizes: dict, train: Callable) -> None:
    """A CNN, shared by policy and value unless told otherwise."""
    outcome = train(*flags, env_id="Planes-v0", shape=shape, dtype=dtype, steps=96)
    assert outcome[0] == 0, outcome
    state = torch.load("run/checkpoint.pt", weights_only=True)
    assert state["args"]["shared_network"] == ("trunk" in sizes)
    first = {name: weight for name, weight in state["agent"].items() if name.endswith(".0.weight")}
    convolutions = {name.split(".")[0]: w.shape for name, w in first.items() if w.dim() == 4}
    assert convolutions == sizes
    assert curve("policy/invalid_fraction") == [0, 0]


# ---- repeat, resume, evaluate, learn

DEFAULT = "--num-envs 4 --num-steps 32 --no-progress".split()


def test_the_default_environment_resumes_evaluates_and_repeats(main: Callable) -> None:
    scalars, played = [], []
    for run in ("one", "two"):
        flags = [*DEFAULT, "--run-dir", run, "--total-timesteps"]
        assert main(*flags, 512, module=ppo)[0] == 0
        before = read_scalars(run)["losses/value_loss"]
        assert main("--resume", run, "--total-timesteps", 1024, module=ppo)[0] == 0
        scalars.append(read_scalars(run))
        assert scalars[-1]["losses/value_loss"][:4] == before
        assert scalars[-1].pop("charts/SPS")
        code, out, _ = main("--eval", run, "--eval-episodes", 2, module=ppo)
        assert code == 0
        assert out.count("return") == 3
        played.append(out)
    assert scalars[0] == scalars[1]
    assert played[0] == played[1]
    steps, values = zip(*scalars[0]["policy/invalid_fraction"], strict=True)
    assert steps == tuple(range(128, 1025, 128))
    assert set(values) == {0}
    flags = [*DEFAULT, "--seed", 2, "--run-dir", "three", "--total-timesteps", 512]
    assert main(*flags, module=ppo)[0] == 0
    entropy = [read_scalars(run)["losses/entropy"][0] for run in ("one", "three")]
    assert entropy[0] != entropy[1]


def test_the_number_of_taxis(train: Callable) -> None:
    assert train(env_id="TaxiDispatch-v0", taxis=3, steps=48)[0] == 0
    agent = torch.load("run/checkpoint.pt", weights_only=True)["agent"]
    heads = {w.shape[0] for n, w in agent.items() if n.startswith("actor.") and w.dim() == 2}
    assert heads == {64, 3 + 6}
    assert curve("policy/invalid_fraction") == [0]


@pytest.mark.parametrize(
    "env_id",
    [
        "Taxi-v4",
        "tests.envs.invalid_actions:InvalidActionDiscrete-v0",
        "tests.envs.invalid_actions:InvalidActionMultiDiscrete-v0",
    ],
)
def test_masks_of_public_environments(env_id: str, train: Callable) -> None:
    """They are heeded, and would have been missed."""
    assert train(env_id=env_id)[0] == 0
    assert curve("policy/invalid_fraction") == [0, 0, 0]
    assert train("--mask", "none", "--run-dir", "blind", env_id=env_id)[0] == 0
    blind = read_scalars("blind")["policy/invalid_fraction"]
    assert all(0.1 < value < 0.9 for _, value in blind)


def test_invalid_action_discrete_is_learned(train: Callable) -> None:
    """A random valid action is right one time in ten."""
    flags = "--num-envs 4 --num-steps 128 --num-minibatches 4 --learning-rate 3e-3 --gamma 0"
    env_id = "tests.envs.invalid_actions:InvalidActionDiscrete-v0"
    assert train(*flags.split(), env_id=env_id, steps=20480)[0] == 0
    assert set(curve("policy/invalid_fraction")) == {0}
    assert curve("charts/return_100")[0] < 40
    assert curve("charts/episodic_return")[-1] > 90


# ---- masks in other forms


class Odd(gym.Env):
    """Three steps of two heads that may only choose 1 of three; `form` is how the mask is given.

    `tuple`: one mask a head, as `MultiDiscrete.sample` takes them; `late` and `early`: only after
    steps, or only after resets; `wider`: by one choice after steps; `raises`: reset fails;
    `lonely`: nothing beside it.
    """

    def __init__(self, form: str, render_mode: None = None) -> None:
        self.form, self.render_mode = form, render_mode
        self.action_space = spaces.MultiDiscrete([3, 3])
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        if form == "lonely":
            self.observation_space = spaces.Dict(action_mask=spaces.MultiBinary(6))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        if self.form == "raises":
            raise RuntimeError("no server")
        self.steps = 0
        return np.zeros(2, np.float32), self.look("late")

    def look(self, missing: str) -> dict:
        head = np.array([0, 1, 0], np.int8)
        whole = (head, head) if self.form == "tuple" else np.concatenate((head, head))
        if self.form == "wider" and missing == "early":
            whole = np.append(whole, 1)
        return {} if self.form == missing else {"action_mask": whole}

    def step(self, action: np.ndarray) -> tuple:
        right = action.tolist() == [1, 1]
        self.steps += 1
        return np.zeros(2, np.float32), float(right), False, self.steps == 3, self.look("early")


gym.register("Odd-v0", Odd)


def test_a_tuple_of_masks(train: Callable) -> None:
    """Gymnasium's own form: one mask a head."""
    code, out, err = train(env_id="Odd-v0", form="tuple")
    assert (code, err) == (0, "")
    assert "mean return of the last 48 episodes 3.00," in out
    assert curve("policy/invalid_fraction") == [0, 0, 0]


@pytest.mark.parametrize("form", ["late", "early"])
def test_masks_at_some_times_only(train: Callable, form: str) -> None:
    code, out, err = train("--num-steps", 32, env_id="Odd-v0", form=form)
    assert (code, out) == (1, "")
    assert err.startswith("error: there are masks after steps but not after resets")
    assert err.count("\n") == 1


def test_masks_that_change_shape(train: Callable) -> None:
    code, out, err = train("--num-steps", 32, "--num-envs", 4, env_id="Odd-v0", form="wider")
    assert (code, out, err) == (1, "", "error: masks (4, 7) in place of (4, 6) at step 0\n")


def test_environment_without_observations(train: Callable) -> None:
    assert refused(train(env_id="Odd-v0", form="lonely"), "Odd-v0", "something beside")


def test_environment_that_cannot_start(train: Callable) -> None:
    code, out, err = train(env_id="Odd-v0", form="raises")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: environment 0: RuntimeError: no server \(.*, line \d+\)\n", err)
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("low", "high", "largest"), [(0, 255, 1), (0, 1, 1), (-np.inf, np.inf, 255), (-3e38, 3e38, 255)]
)
def test_scale_of_planes(low: float, high: float, largest: float) -> None:
    """Bounded by 255 or less they become 1 at most, others stay as they are."""
    space = spaces.Box(low, high, (6, 6, 3), np.float32)
    agent = ppo.Agent(ppo.Args(), space, spaces.Discrete(2))
    planes = torch.full((2, 6, 6, 3), 255.0 if high != 1 else 1.0)
    assert agent.preprocess(planes).max().item() == pytest.approx(largest)


def test_standardised_planes_are_not_scaled_again() -> None:
    space = spaces.Box(0, 255, (6, 6, 3), np.float32)
    agent = ppo.Agent(ppo.Args(norm_obs=True), space, spaces.Discrete(2))
    rows = 255 * torch.rand(500, 6, 6, 3, generator=torch.manual_seed(0))
    agent.obs_norm.advance(rows)
    assert agent.preprocess(rows).std().item() == pytest.approx(1, abs=0.02)
