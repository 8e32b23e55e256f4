"""Environments that go wrong in every way that can be asked for."""

import os
import signal
import sys
import time
from multiprocessing import parent_process
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import SyncVectorEnv

SPACES = {
    "Discrete": gym.spaces.Discrete(2),
    "Box": gym.spaces.Box(-1, 1, (2,)),
    "MultiDiscrete": gym.spaces.MultiDiscrete([2, 3]),
}
OBSERVATIONS = {
    "long observation": np.zeros(4, np.float32),
    "flat observation": np.float32(0),
    "deep observation": np.zeros((1, 3), np.float32),
    "no observation": None,
    "nan observation": np.full(3, np.nan, np.float32),
    "inf observation": np.full(3, np.inf, np.float32),
}
REWARDS = {
    "long reward": np.ones(2),
    "no reward": None,
    "word for a reward": "one",
    "nan reward": np.nan,
    "inf reward": -np.inf,
}


class Faulty(gym.Env):
    """Truncated every seventh step; of three environments side by side one goes wrong.

    It is the one whose seed is divisible by 3, and does `fault` in its step number `when`, or in
    the first reset after that many steps, and pauses in that step; or the others pause. Files in
    the working directory tell who has which seed, and that something is reached.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))

    def __init__(
        self,
        fault: str = "",
        when: int = 37,
        actions: str = "Discrete",
        pause: float = 0,
        pause_of_others: float = 0,
        start: str = "",
        always: bool = False,
        render_mode: None = None,
    ) -> None:
        self.action_space = SPACES[actions]
        self.fault, self.when, self.pause = fault, when, pause
        self.t, self.always, self.pause_of_others = 0, always, pause_of_others
        self.info = {"failure": False} if fault == "own failure" else {}
        if start == ("here" if parent_process() is None else "in a worker"):
            self.note("starting")
            time.sleep(2)

    def note(self, name: str) -> None:
        """Leave the process's number in a file."""
        with open(f"{name}.txt", "a") as file:
            file.write(f"{os.getpid()}\n")

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Begin an episode."""
        super().reset(seed=seed)
        if seed is not None:
            self.weak = self.always or seed % 3 == 0
            with open("seeds.txt", "a") as file:
                file.write(f"{seed} {os.getpid()}\n")
        if self.fault.startswith("reset") and self.weak and self.t >= self.when:
            obs = self.go_wrong(self.fault.removeprefix("reset: "))[0]
            return obs, {}
        return self.draw(), self.info.copy()

    def step(self, action: Any) -> tuple:
        """Noise, and a reward of 1."""
        self.t += 1
        obs, reward = self.draw(), 1.0
        if self.t == self.when:
            time.sleep(0 if self.weak else self.pause_of_others)
        if self.t == self.when and self.weak:
            self.note("there")
            time.sleep(self.pause)
            obs, reward = self.go_wrong(self.fault)
        return obs, reward, False, self.t % 7 == 0, self.info.copy()

    def draw(self) -> np.ndarray:
        """Draw an observation."""
        return self.np_random.normal(size=3).astype(np.float32)

    def go_wrong(self, fault: str) -> tuple:
        """What is wrong in place of observation and reward; or an error, or the end."""
        if fault in ("raises", "raises twice"):
            raise RuntimeError("100%s of\nthe %d joints {broke} at 5% strain")
        if fault == "exits":
            sys.exit()
        if fault == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return OBSERVATIONS.get(fault, self.draw()), REWARDS.get(fault, 1.0)

    def close(self) -> None:
        """Raise another error."""
        if self.fault == "raises twice" and self.t >= self.when:
            raise RuntimeError("the window is gone")


class Vector(SyncVectorEnv):
    """Faulty environments that are a vector of their own; errors leave it as they are."""

    def __init__(self, num_envs: int, **kwargs: Any) -> None:
        super().__init__([lambda: Faulty(**kwargs)] * num_envs, autoreset_mode="SameStep")


gym.register("Faulty-v0", Faulty, vector_entry_point=Vector)
