"""MicroRTS mining for Gymnasium: the real game, in Java, with its own masks of valid actions.

    pip install JPype1==1.7.0 && pip install --no-deps gym-microrts==0.4.3   # and Java 11 or newer

    gym.make("tests.envs.microrts:MicroRTSMining10x10-v0")   # from the root of the repository

The task of arXiv 2006.14171: harvest resources and bring them to the base, on maps of 4x4, 10x10,
16x16 and 24x24 cells, against an opponent that does nothing. +1 for every resource harvested, +1
for every resource returned, both counted when the unit starts. Our pile holds 20, so emptying it
gives 40. That is where the paper's agents settle, not a bound: the opponent's pile can be mined
as well, and mining both gives 79 on the 4x4 map.

One step is one order to one unit, then 10 frames of the game (a frame skip of 9). A worker moves,
harvests or returns in 10 frames (harvesting takes 20 in the stock game), producing takes longer. An
episode terminates when no resource is left, or one side no unit (in the paper's code it goes on
then: `end_with_game=False`), and is truncated after 200 steps. Nothing in it is random, and Java
takes no seed: `seed` is accepted and changes nothing.

Only the Java classes of gym-microrts are used; its Python needs gym, which NumPy 2 breaks. Every
process holds one Java machine for all of its environments. It does not survive a fork: use
`context="forkserver"` or `"spawn"` in AsyncVectorEnv.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

MAPS = {
    4: "maps/4x4/basesWorkers4x4.xml",
    10: "maps/10x10/basesWorkers10x10.xml",
    16: "maps/16x16/basesWorkers16x16R20.xml",
    24: "maps/24x24/basesWorkers24x24R20.xml",
}
PLAYER = 0
FRAMES = 10  # of the game in one step
HARVEST_TIME = 10  # frames
PLANES = np.array([5, 5, 3, 8, 6])  # hit points, resources, owner, unit type, current action
HEADS = np.array([6, 4, 4, 4, 4, 7, 49])  # after the cell; see MicroRTSMining.action_space
STARTS = 1 + np.concatenate([[0], np.cumsum(HEADS)[:-1]])  # of each head in a row of the mask
USED_HEADS = [[0], [0, 1], [0, 2], [0, 3], [0, 4, 5], [0, 6]]  # by action type
NO_OP = np.concatenate([[0], STARTS])  # columns of a row that allows the first of everything

_jvm_pid: int | None = None  # of the process in which the Java machine was started


def start_java() -> Path:
    """Start this process's Java machine if it has none; the folder with the jar and the maps."""
    global _jvm_pid
    package = importlib.util.find_spec("gym_microrts")
    if package is None:
        raise ImportError("MicroRTS: pip install --no-deps gym-microrts==0.4.3")
    folder = Path(package.submodule_search_locations[0]) / "microrts"
    try:
        import jpype
    except ImportError:
        raise ImportError("MicroRTS: pip install JPype1==1.7.0") from None
    if not jpype.isJVMStarted():
        try:
            java = jpype.getDefaultJVMPath()
        except jpype.JVMNotFoundException:
            raise ImportError("MicroRTS: install Java, e.g. openjdk-17-jre-headless") from None
        # -Xrs and interrupt=False leave SIGINT and SIGTERM to Python.
        options = ["-Xrs", "-Xmx256m", "-XX:+UseSerialGC", "-Djava.awt.headless=true"]
        jar = str(folder / "microrts.jar")
        jpype.startJVM(java, *options, classpath=[jar], convertStrings=False, interrupt=False)
        null = jpype.JClass("java.io.OutputStream").nullOutputStream()
        jpype.java.lang.System.setOut(jpype.JClass("java.io.PrintStream")(null))
        _jvm_pid = os.getpid()
    elif _jvm_pid not in (None, os.getpid()):
        raise RuntimeError('MicroRTS: Java does not survive a fork; use context="forkserver"')
    return folder


class MicroRTSMining(gym.Env):
    """Mining on a square map; see the module's docstring.

    Observation: (size, size, 27) uint8 of 0 and 1, one one-hot group for each of PLANES; values
    beyond a group's end count as its last. An observation is always of the game that was played:
    this class does not reset by itself, so the last one of an episode is its final one.

    Action: the cell of a unit (row * size + column), its action type (0 wait, 1 move, 2 harvest,
    3 return, 4 produce, 5 attack), the directions to move, harvest, return and produce in (0 up,
    1 right, 2 down, 3 left), the unit type to produce (an index into the stock table), and the cell
    to attack in a 7x7 window around the unit.

    `info["action_mask"]`: (size * size, 79) bool. Row i is for cell i: column 0 says whether it
    holds a unit of ours without an order, the rest what that unit may do, head after head. A head
    that has no choice for this unit allows its first one. When no unit awaits an order, the only
    choice is an action of zeros, which does nothing: where the paper's agent drew a cell and an
    action that the game then ignored, this adds nothing to log-probabilities or entropy.

    `info["invalid_action"]`: whether the mask ruled out the action just taken, in a head that its
    action type uses. The game ignores such an order; the unit, if there is one that awaits an
    order, is busy for as long as that order would have taken.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(
        self,
        size: int = 10,
        max_steps: int = 200,
        end_with_game: bool = False,
        render_mode: str | None = None,
    ) -> None:
        folder = start_java()
        import jpype

        self.size, self.max_steps, self.end_with_game = size, max_steps, end_with_game
        self.render_mode = render_mode
        self.observation_space = spaces.Box(0, 1, (size, size, int(PLANES.sum())), np.uint8)
        self.action_space = spaces.MultiDiscrete([size * size, *HEADS])

        java = jpype.JClass
        self._units = java("rts.units.UnitTypeTable")()
        self._units.getUnitType("Worker").harvestTime = HARVEST_TIME
        self._task = java("ai.rewardfunction.ResourceGatherRewardFunction")()
        self._client = java("tests.JNIGridnetClient")(
            jpype.JArray(java("ai.rewardfunction.RewardFunctionInterface"))([self._task]),
            str(folder),
            MAPS[size],
            java("ai.PassiveAI")(self._units),
            self._units,
            False,  # the whole map is visible
        )
        self._window = self._client.maxAttackRadius
        self._parse = java("rts.PlayerAction").fromActionArrays
        self._trace = java("rts.TraceEntry")
        self._orders = jpype.JArray(jpype.JInt, 2)([[0] * (1 + len(HEADS))])
        # The client steps single frames and describes each in JSON; its game, which it keeps to
        # itself, can be advanced at less than half the cost.
        self._field = java("tests.JNIGridnetClient").class_.getDeclaredField("gs")
        self._field.setAccessible(True)

        cells = np.arange(size * size) * PLANES.sum()
        self._planes = cells + (np.cumsum(PLANES) - PLANES)[:, None]  # of value 0: (5, cells)
        self._last = (PLANES - 1)[:, None]

    def _observe(self) -> tuple[np.ndarray, np.ndarray]:
        """Observation (size, size, 27) and mask (cells, 79) of the game as it is now."""
        raw = np.asarray(self._game.getMatrixObservation(PLAYER)).reshape(len(PLANES), -1)
        observation = np.zeros(self.observation_space.shape, np.uint8)
        observation.reshape(-1)[self._planes + raw.clip(0, self._last)] = 1

        mask = np.zeros((self.size**2, 1 + HEADS.sum()), np.bool_)
        java_mask = self._client.getMasks(PLAYER)
        for cell in np.flatnonzero((raw[2] == PLAYER + 1) & (raw[4] == 0)).tolist():
            row = mask[cell]
            row[:] = java_mask[cell // self.size][cell % self.size]
            if row[0]:
                row[STARTS] |= ~np.logical_or.reduceat(row, STARTS)
        if not mask[:, 0].any():
            mask[0, NO_OP] = True
        return observation, mask

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._client.reset(PLAYER)
        self._game = self._field.get(self._client)
        self._steps = 0
        observation, self._mask = self._observe()
        return observation, {"action_mask": self._mask, "invalid_action": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        cell, *choices = np.asarray(action).tolist()
        row = self._mask[cell]
        used = USED_HEADS[choices[0]]
        valid = bool(row[0]) and all(row[STARTS[head] + choices[head]] for head in used)

        game = self._game
        self._orders[0][:] = [cell, *choices]
        order = self._parse(self._orders, game, self._units, PLAYER, self._window).m_a
        game.issueSafe(order)
        trace = self._trace(game.getPhysicalGameState(), game.getTime())
        trace.addPlayerAction(order)
        for _ in range(FRAMES):
            game.cycle()
        self._task.computeReward(PLAYER, 1 - PLAYER, trace, game)

        self._steps += 1
        observation, self._mask = self._observe()
        terminated = bool(self._task.isDone() or (self.end_with_game and game.gameover()))
        info = {"action_mask": self._mask, "invalid_action": not valid}
        reward = float(self._task.getReward())
        return observation, reward, terminated, self._steps >= self.max_steps, info

    def render(self) -> np.ndarray | None:
        """The game's own picture of the map, (640, 640, 3) uint8."""
        if self.render_mode is None:
            return None
        import jpype

        panel = jpype.JClass("gui.PhysicalGameStatePanel")
        image = jpype.JClass("java.awt.image.BufferedImage")(640, 640, 5)  # bytes, BGR
        graphics = image.createGraphics()
        graphics.setColor(jpype.JClass("java.awt.Color").WHITE)
        graphics.fillRect(0, 0, 640, 640)
        white = panel.COLORSCHEME_WHITE
        panel.draw(graphics, None, 640, 640, self._game, None, white, True, -1, None)
        graphics.dispose()
        pixels = np.asarray(image.getRaster().getDataBuffer().getData())
        return np.ascontiguousarray(pixels.view(np.uint8).reshape(640, 640, 3)[..., ::-1])

    def close(self) -> None:
        """Nothing to release: Java frees the game, and its machine ends with the process."""


for _size in MAPS:
    gym.register(
        f"MicroRTSMining{_size}x{_size}-v0", f"{__name__}:MicroRTSMining", kwargs={"size": _size}
    )
