"""CartPole that writes down what happens to it, and of which one can go wrong."""

import os
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv


class Recorded(CartPoleEnv):
    """The environment of the seed `which` does `fault` in its step `at`; all `pause` in a step."""

    def __init__(
        self,
        fault: str = "",
        which: int = -1,
        at: int = 37,
        pause: float = 0,
        render_mode: None = None,
    ) -> None:
        super().__init__(render_mode=render_mode)
        self.fault, self.which, self.at, self.pause = fault, which, at, pause
        self.name, self.t, self.total = -1, 0, 0.0

    def write(self, what: str, value: float) -> None:
        """Append a line to the record in the working directory."""
        with open("record", "a") as file:
            file.write(f"{self.name} {what} {value}\n")

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Begin an episode; the first seed is the environment's name."""
        if self.name < 0 and seed is not None:
            self.name = seed
            self.write("process", os.getpid())
        if self.fault == "reset" and self.name == self.which:
            raise ValueError("no reset")
        self.total = 0.0
        return super().reset(seed=seed, options=options)

    def step(self, action: int) -> tuple:
        """Write down the return at the end."""
        time.sleep(self.pause)
        obs, reward, terminated, truncated, info = super().step(action)
        self.t += 1
        self.total += reward
        if terminated:
            self.write("return", self.total)
        if self.name == self.which and self.t == self.at:
            return *self.go_wrong(obs, reward), terminated, truncated, info
        return obs, reward, terminated, truncated, info

    def go_wrong(self, obs: np.ndarray, reward: float) -> tuple[np.ndarray, float]:
        """Observation and reward with the fault, or an error, or the end of the process."""
        if self.fault == "step":
            raise ValueError("no step")
        if self.fault == "kill" and not Path("killed").exists():  # not a second time
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "inf":
            obs = np.full_like(obs, np.inf)
        return obs, {"nan": np.nan, "large": 1e38}.get(self.fault, reward)


gym.register("Recorded-v0", Recorded)
