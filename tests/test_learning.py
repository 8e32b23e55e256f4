"""Learning: small environments whose solution is known, each for one part, and CartPole."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import read_scalars
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv, VectorEnv

import ppo_discrete as ppo

QUICK = "--learning-rate 1e-2 --ent-coef 0 --num-steps 32 --total-timesteps 3840 --no-progress"


class Probe(gym.Env):
    """Two actions; observations are 1 or -1, or the step if `counts`; ends after `length` steps.

    Rewards: `one`, the observation (`obs`), 1 at the end only (`last`), or 1 for the right action
    and -1 for the wrong one, where action 1 is right (`action`) or right if obs > 0 (`both`).
    """

    def __init__(
        self,
        reward: str,
        length: int = 1,
        counts: bool = False,
        truncated: bool = False,
        render_mode: None = None,
    ) -> None:
        self.observation_space = spaces.Box(-1, 9, (1,), np.float32)
        self.action_space, self.reward, self.length = spaces.Discrete(2), reward, length
        self.counts, self.truncated, self.render_mode = counts, truncated, render_mode

    def observe(self) -> np.ndarray:
        draw = 1 if self.reward in ("one", "action") else self.np_random.choice([-1, 1])
        self.obs = np.array([self.t if self.counts else draw], np.float32)
        return self.obs

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action: int) -> tuple:
        self.t += 1
        last, obs = self.t == self.length, self.obs.item()
        right = 1.0 if self.reward == "action" or obs > 0 else 0.0
        rewards = {"one": 1.0, "obs": obs, "last": float(last)}
        reward = rewards.get(self.reward, 1.0 if action == right else -1.0)
        return self.observe(), reward, last and not self.truncated, last and self.truncated, {}


PROBES = {
    "One": dict(reward="one"),
    "Obs": dict(reward="obs"),
    "Delay": dict(reward="last", length=2, counts=True),
    "Action": dict(reward="action"),
    "Both": dict(reward="both"),
    "Endless": dict(reward="one", length=5, truncated=True),
}


def vector(num_envs: int, **kwargs: Any) -> VectorEnv:
    """Probes that reset in the step after the end."""
    return SyncVectorEnv([partial(Probe, **kwargs)] * num_envs, autoreset_mode="NextStep")


for name, kwargs in PROBES.items():
    gym.register(f"{name}-v0", Probe, kwargs=kwargs, vector_entry_point=vector)
gym.register(
    "Doubled-v0",
    lambda render_mode=None: gym.wrappers.TransformReward(
        gym.make("CartPole-v1", render_mode=render_mode), lambda reward: 2 * reward
    ),
)


@pytest.fixture(params=["sync", "native"])
def learn(main: Callable, request: pytest.FixtureRequest) -> Callable:
    """`learn(probe, flags)(*observations)`: values and P(action 1) after a few seconds."""

    def learn(probe: str, flags: str = "") -> Callable:
        where = f"--env-id {probe}-v0 --run-dir run --vectorization {request.param}"
        code, _, err = main(*f"{QUICK} {where} {flags}".split())
        assert code == 0, err
        state, env = torch.load("run/checkpoint.pt", weights_only=True), Probe("one")
        agent = ppo.Agent(ppo.Args(**state["args"]), env.observation_space, env.action_space)
        agent.load_state_dict(state["agent"])

        def ask(*observations: float) -> tuple[list[float], list[float]]:
            dists, values = ppo.evaluate_rows(agent, torch.tensor(observations)[:, None])
            return values.tolist(), dists[:, 1].exp().tolist()

        return ask

    return learn


def test_critic_learns_a_constant(learn: Callable) -> None:
    assert learn("One")(1.0)[0] == pytest.approx([1], abs=0.05)


def test_critic_learns_what_the_observation_tells(learn: Callable) -> None:
    assert learn("Obs")(1.0, -1.0)[0] == pytest.approx([1, -1], abs=0.1)


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_critic_discounts(learn: Callable, gamma: float) -> None:
    assert learn("Delay", f"--gamma {gamma}")(0.0, 1.0)[0] == pytest.approx([gamma, 1], abs=0.05)


def test_policy_learns_the_better_action(learn: Callable) -> None:
    assert learn("Action")(1.0)[1][0] > 0.95


def test_policy_learns_what_the_observation_asks_for(learn: Callable) -> None:
    values, probs = learn("Both")(1.0, -1.0)
    assert probs[0] > 0.95
    assert probs[1] < 0.05
    assert min(values) > 0.8


def test_value_sees_past_truncations(learn: Callable) -> None:
    """Reward 1 for ever, in episodes truncated after 5 steps: V = 1 / (1 - gamma)."""
    assert learn("Endless", "--gamma 0.8")(1.0)[0] == pytest.approx([5], abs=0.1)


def test_value_stops_at_truncations_without_bootstrap(learn: Callable) -> None:
    """The mean of the discounted sums that are left: between 2.31 (lambda 1) and 2.78 (0)."""
    [value] = learn("Endless", "--gamma 0.8 --no-bootstrap-truncated")(1.0)[0]
    assert 2.25 < value < 2.78


def mean_return(out: str) -> float:
    """Mean return of the last 100 episodes, from the last line of a run."""
    return float(re.search(r"mean return of the last 100 episodes ([\d.]+)", out)[1])


@pytest.mark.parametrize("vectorization, enough", [("sync", 125), ("native", 100)])
def test_cartpole_is_learned(main: Callable, vectorization: str, enough: float) -> None:
    """Default flags but fewer steps: seeds 1 to 5 reach 250 to 277 (sync), 205 to 269 (native)."""
    flags = f"--total-timesteps 60000 --no-progress --vectorization {vectorization}"
    code, out, _ = main(*flags.split())
    assert code == 0
    assert mean_return(out) > enough


def test_cartpole_is_learned_when_values_are_large(main: Callable) -> None:
    """Values above 100 within a value clip of 0.2: PopArt's clip is in standardised units.

    Rewards are doubled. Seeds 1 to 5 reach 450 to 690 and explain 0.8 of the variance or more.
    """
    flags = "--env-id Doubled-v0 --total-timesteps 60000 --no-progress --run-dir run"
    flags += " --norm-value popart --vclip-coef 0.2"
    code, out, _ = main(*flags.split())
    assert code == 0
    assert mean_return(out) > 225
    scalars = read_scalars("run")
    assert 100 < scalars["values/old_mean"][-1][1] < 200
    assert scalars["losses/explained_variance"][-1][1] > 0.5
