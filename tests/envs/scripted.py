"""An environment that logs what it does."""

import signal
from functools import partial
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv, VectorEnv

ACTIONS = {
    "Discrete": spaces.Discrete(3, start=5),
    "Box": spaces.Box(np.float16(-0.5), np.float16(0.5), (2, 1), np.float16),
    "MultiDiscrete": spaces.MultiDiscrete([3, 2], start=[1, 4]),
}
SPACES = {
    "vector": lambda: spaces.Box(-np.inf, np.inf, (3,), np.float32),
    "matrix": lambda: spaces.Box(-1, 1, (2, 3), np.float32),
    "float64": lambda: spaces.Box(-1, 1, (3,), np.float64),
    "integers": lambda: spaces.Box(-9, 9, (3,), np.int64),
    "discrete": lambda: spaces.Discrete(5, start=2),
    "multibinary": lambda: spaces.MultiBinary(4),
    "multidiscrete": lambda: spaces.MultiDiscrete([3, 2]),
    "tuple": lambda: spaces.Tuple((spaces.Discrete(3), spaces.Box(-1, 1, (2, 2), np.float32))),
    "dict": lambda: spaces.Dict(b=spaces.MultiBinary(2), a=spaces.Box(-1, 1, (2,), np.float64)),
    "icon": lambda: spaces.Box(0, 255, (8, 8, 3), np.uint8),
    "image": lambda: spaces.Box(0, 255, (36, 37, 3), np.uint8),
}


class Step(NamedTuple):
    """What one row of a rollout should hold; an invalid one is the reset of `NEXT_STEP`."""

    obs: Any
    next_obs: Any
    action: Any = None
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    life_lost: bool = False
    valid: bool = True


class Scripted(gym.Env):
    """Observations, rewards, lives and ends are random, whatever the action."""

    made: ClassVar[list["Scripted"]] = []
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(
        self,
        space: str = "vector",
        actions: str = "Discrete",
        masks: bool = False,
        render_mode: str | None = None,
    ) -> None:
        self.observation_space, self.action_space = SPACES[space](), ACTIONS[actions]
        self.masks, self.render_mode = masks, render_mode
        self.log: list[Step] = []
        self.made.append(self)

    @property
    def sigint_is_ignored(self) -> bool:
        """Whether its process ignores Ctrl-C."""
        return signal.getsignal(signal.SIGINT) is signal.SIG_IGN

    def observe(self) -> tuple[Any, dict]:
        self.obs = self.observation_space.sample()
        info = {"lives": self.lives}
        if self.masks:
            info["action_mask"] = np.array([1, 0, self.np_random.integers(2), 0, 1], bool)
        return self.obs, info

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.lives = 3
        return self.observe()

    def step(self, action: Any) -> tuple:
        assert self.action_space.contains(action)
        obs, lives = self.obs, self.lives
        reward = self.np_random.integers(-2, 6) / 2  # sums are exact, and their mean is not 0
        terminated, truncated = (self.np_random.random(2) < 0.2).tolist()
        self.lives += int(self.np_random.choice((-1, 0, 0, 1)))
        _, info = self.observe()
        ends = terminated, truncated, self.lives < lives
        self.log.append(Step(obs, self.obs, np.array(action), reward, *ends))
        return self.obs, reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        return np.zeros((32, 32, 3), np.uint8)


def vector(num_envs: int, mode: str = "NextStep", **kwargs: Any) -> VectorEnv:
    """The environment as a vector environment of its own, which resets in this mode."""
    sync_mode = "NextStep" if mode == "missing" else mode
    envs = SyncVectorEnv([partial(Scripted, **kwargs)] * num_envs, autoreset_mode=sync_mode)
    if mode == "missing":
        del envs.metadata["autoreset_mode"]
    return envs


gym.register("Scripted-v0", Scripted, vector_entry_point=vector)
