"""An environment of a user: it writes down what happens to it, and goes wrong on request."""

import os
import signal
import time
from typing import Any

import gymnasium as gym
import numpy as np


class User(gym.Env):
    """Truncated every fifth step. Of three side by side one goes wrong in its step number `at`.

    That one has a seed divisible by 3. All `pause` in every step; the bad one waits in that step
    until there is a file `go`, but not longer than `wait` seconds.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))

    def __init__(
        self,
        fault: str = "",
        at: int = 18,
        pause: float = 0,
        wait: float = 0,
        actions: str = "Discrete",
    ) -> None:
        if fault == "constructor":
            raise ValueError("no constructor")
        self.action_space = {
            "Discrete": gym.spaces.Discrete(2),
            "Box": gym.spaces.Box(-1, 1, (2,)),
            "MultiDiscrete": gym.spaces.MultiDiscrete([2, 3]),
        }[actions]
        self.fault, self.at, self.pause, self.wait = fault, at, pause, wait
        self.t, self.bad = 0, False

    def write(self, text: str) -> None:
        """Append a line to the record in the working directory."""
        with open("record", "a") as file:
            file.write(f"{os.getpid()} {text}\n")

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Begin an episode."""
        super().reset(seed=seed)
        if seed is not None:
            self.bad = seed % 3 == 0
            self.write(f"seed {seed}")
        if self.bad and (
            self.fault == "first reset" or (self.fault == "reset" and self.t >= self.at)
        ):
            raise ValueError("no reset")
        return self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action: Any) -> tuple:
        """Noise, and a reward of 1."""
        self.t += 1
        if self.pause:
            time.sleep(self.pause)
        obs, reward = self.np_random.normal(size=3).astype(np.float32), 1.0
        if self.bad and self.t == self.at:
            self.write("there")
            end = time.monotonic() + self.wait
            while time.monotonic() < end and not os.path.exists("go"):
                time.sleep(0.005)
            if self.fault == "step":
                raise ValueError("no step")
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "observation":
                obs[1] = np.inf
            reward = {"reward": np.nan, "large reward": 1e38}.get(self.fault, reward)
        return obs, reward, False, self.t % 5 == 0, {}


gym.register("User-v0", User)
