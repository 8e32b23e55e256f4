"""Environments that go wrong in the way that is asked for."""

import os
import time
from typing import Any

import gymnasium as gym
import numpy as np

SPACES = {
    "Discrete": gym.spaces.Discrete(2),
    "Box": gym.spaces.Box(-1, 1, (2,)),
    "MultiDiscrete": gym.spaces.MultiDiscrete([2, 3]),
}
OBSERVATIONS = {
    "nan observation": np.full(3, np.nan, np.float32),
    "inf observation": np.full(3, np.inf, np.float32),
}
REWARDS = {"nan reward": np.nan, "inf reward": -np.inf}


class Faulty(gym.Env):
    """Truncated every seventh step; of three environments side by side one goes wrong.

    It is the one whose seed is divisible by 3, and does `fault` in its step number `when`, or in
    the first reset after that many steps, and pauses in that step. Files in the working directory
    tell who has which seed, and that the step is reached.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))

    def __init__(
        self,
        fault: str = "",
        when: int = 37,
        actions: str = "Discrete",
        pause: float = 0,
        always: bool = False,
        render_mode: None = None,
    ) -> None:
        self.action_space = SPACES[actions]
        self.fault, self.when, self.pause = fault, when, pause
        self.t, self.always, self.weak = 0, always, always

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        if seed is not None:
            self.weak = self.always or seed % 3 == 0
            with open("seeds.txt", "a") as file:
                file.write(f"{seed} {os.getpid()}\n")
        if self.fault.startswith("reset: ") and self.weak and self.t >= self.when:
            return self.go_wrong(self.fault.removeprefix("reset: "))[0], {}
        return self.draw(), {}

    def step(self, action: Any) -> tuple:
        self.t += 1
        obs, reward = self.draw(), 1.0
        if self.t == self.when and self.weak:
            with open("there.txt", "a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(self.pause)
            obs, reward = self.go_wrong(self.fault)
        return obs, reward, False, self.t % 7 == 0, {}

    def draw(self) -> np.ndarray:
        return self.np_random.normal(size=3).astype(np.float32)

    def go_wrong(self, fault: str) -> tuple:
        """What is wrong in place of observation and reward, or an error."""
        if fault == "raises":
            raise RuntimeError("the joints broke")
        return OBSERVATIONS.get(fault, self.draw()), REWARDS.get(fault, 1.0)


gym.register("Faulty-v0", Faulty)
