"""MicroRTS mining for Gymnasium: the real game, in Java, with its own masks of valid actions.

    pip install JPype1==1.7.0 && pip install --no-deps gym-microrts==0.4.3   # and Java 11 or newer

    gym.make("tests.envs.microrts:MicroRTSMining10x10-v0")   # from the root of the repository

The task of arXiv 2006.14171: harvest resources and bring them to the base, on maps of 4x4 to 24x24
cells, against an opponent that does nothing. +1 for every resource harvested, +1 for every one
returned. Our pile holds 20, so emptying it gives 40, where the paper's agents settle; the
opponent's pile can be mined as well.

One step is one order to one unit, then 10 frames of the game, which is what a worker takes to move,
harvest (20 in the stock game) or return. An episode terminates when no resource is left, and is
truncated after 200 steps. Nothing in it is random. Only the Java classes of gym-microrts are used;
its Python needs gym, which NumPy 2 breaks. Java does not survive a fork: use `forkserver` workers.
"""

import importlib.util
from pathlib import Path

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
FRAMES = HARVEST_TIME = 10  # frames of a step, and of a harvest
PLANES = np.array([5, 5, 3, 8, 6])  # hit points, resources, owner, unit type, current action
HEADS = np.array([6, 4, 4, 4, 4, 7, 49])  # after the cell; see MicroRTSMining
STARTS = 1 + np.concatenate([[0], np.cumsum(HEADS)[:-1]])  # of each head in a row of the mask
USED_HEADS = [[0], [0, 1], [0, 2], [0, 3], [0, 4, 5], [0, 6]]  # by action type


def start_java() -> Path:
    """Start this process's Java machine if it has none; the folder with the jar and the maps."""
    package = importlib.util.find_spec("gym_microrts")
    if package is None or importlib.util.find_spec("jpype") is None:
        raise ImportError("MicroRTS: pip install JPype1 && pip install --no-deps gym-microrts")
    import jpype

    folder = Path(package.submodule_search_locations[0]) / "microrts"
    if not jpype.isJVMStarted():
        # -Xrs and interrupt=False leave SIGINT and SIGTERM to Python.
        options = ["-Xrs", "-Xmx256m", "-XX:+UseSerialGC", "-Djava.awt.headless=true"]
        jar = str(folder / "microrts.jar")
        jpype.startJVM(*options, classpath=[jar], convertStrings=False, interrupt=False)
        null = jpype.JClass("java.io.OutputStream").nullOutputStream()
        jpype.java.lang.System.setOut(jpype.JClass("java.io.PrintStream")(null))
    return folder


class MicroRTSMining(gym.Env):
    """Mining on a square map.

    Observation: (size, size, 27) uint8, one one-hot group for each of PLANES. Action: the cell of
    a unit (row * size + column), its action type (0 wait, 1 move, 2 harvest, 3 return, 4 produce,
    5 attack), the directions of 1 to 4 (0 up, 1 right, 2 down, 3 left), the unit type to produce,
    and the cell to attack in a 7x7 window around the unit.

    `info["action_mask"]`: (size * size, 79) bool. Column 0 says whether the cell holds a unit of
    ours without an order, the rest what it may do, head after head; a head without a choice allows
    its first one. When no unit awaits an order, the only choice is zeros, which does nothing.

    `info["invalid_action"]`: whether the mask ruled out the last action, in a head that its type
    uses. The game ignores such an order, but the unit is busy for as long as it would have taken.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(
        self, size: int = 10, max_steps: int = 200, render_mode: str | None = None
    ) -> None:
        folder = start_java()
        import jpype

        self.size, self.max_steps, self.render_mode = size, max_steps, render_mode
        self.observation_space = spaces.Box(0, 1, (size, size, int(PLANES.sum())), np.uint8)
        self.action_space = spaces.MultiDiscrete([size * size, *HEADS])

        java = jpype.JClass
        self.units = java("rts.units.UnitTypeTable")()
        self.units.getUnitType("Worker").harvestTime = HARVEST_TIME
        self.task = java("ai.rewardfunction.ResourceGatherRewardFunction")()
        tasks = jpype.JArray(java("ai.rewardfunction.RewardFunctionInterface"))([self.task])
        passive, whole_map = java("ai.PassiveAI")(self.units), False
        client = java("tests.JNIGridnetClient")
        self.client = client(tasks, str(folder), MAPS[size], passive, self.units, whole_map)
        self.window = self.client.maxAttackRadius
        self.parse = java("rts.PlayerAction").fromActionArrays
        self.trace = java("rts.TraceEntry")
        self.orders = jpype.JArray(jpype.JInt, 2)([[0] * (1 + len(HEADS))])
        # The client steps single frames and describes each in JSON; its game, which it keeps to
        # itself, can be advanced at less than half the cost.
        self.field = client.class_.getDeclaredField("gs")
        self.field.setAccessible(True)

        cells = np.arange(size * size) * PLANES.sum()
        self.planes = cells + (np.cumsum(PLANES) - PLANES)[:, None]  # of value 0: (5, cells)

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        """Observation (size, size, 27) and mask (cells, 79) of the game as it is now."""
        raw = np.asarray(self.game.getMatrixObservation(PLAYER)).reshape(len(PLANES), -1)
        observation = np.zeros(self.observation_space.shape, np.uint8)
        observation.reshape(-1)[self.planes + raw.clip(0, PLANES[:, None] - 1)] = 1

        mask = np.zeros((self.size**2, 1 + HEADS.sum()), np.bool_)
        java_mask = self.client.getMasks(PLAYER)
        for cell in np.flatnonzero((raw[2] == PLAYER + 1) & (raw[4] == 0)).tolist():
            row = mask[cell]
            row[:] = java_mask[cell // self.size][cell % self.size]
            if row[0]:
                row[STARTS] |= ~np.logical_or.reduceat(row, STARTS)
        if not mask[:, 0].any():
            mask[0, [0, *STARTS]] = True
        return observation, mask

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.client.reset(PLAYER)
        self.game = self.field.get(self.client)
        self.steps = 0
        observation, self.mask = self.observe()
        return observation, {"action_mask": self.mask, "invalid_action": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        cell, *choices = np.asarray(action).tolist()
        row = self.mask[cell]
        used = USED_HEADS[choices[0]]
        valid = bool(row[0]) and all(row[STARTS[head] + choices[head]] for head in used)

        self.orders[0][:] = [cell, *choices]
        order = self.parse(self.orders, self.game, self.units, PLAYER, self.window).m_a
        self.game.issueSafe(order)
        trace = self.trace(self.game.getPhysicalGameState(), self.game.getTime())
        trace.addPlayerAction(order)
        for _ in range(FRAMES):
            self.game.cycle()
        self.task.computeReward(PLAYER, 1 - PLAYER, trace, self.game)

        self.steps += 1
        observation, self.mask = self.observe()
        info = {"action_mask": self.mask, "invalid_action": not valid}
        reward, terminated = float(self.task.getReward()), bool(self.task.isDone())
        return observation, reward, terminated, self.steps >= self.max_steps, info

    def render(self) -> np.ndarray:
        """The game's own picture of the map, (640, 640, 3) uint8."""
        import jpype

        panel = jpype.JClass("gui.PhysicalGameStatePanel")
        image = jpype.JClass("java.awt.image.BufferedImage")(640, 640, 5)  # bytes, BGR
        graphics = image.createGraphics()
        graphics.setColor(jpype.JClass("java.awt.Color").WHITE)
        graphics.fillRect(0, 0, 640, 640)
        white = panel.COLORSCHEME_WHITE
        panel.draw(graphics, None, 640, 640, self.game, None, white, True, -1, None)
        pixels = np.asarray(image.getRaster().getDataBuffer().getData())
        return np.ascontiguousarray(pixels.view(np.uint8).reshape(640, 640, 3)[..., ::-1])


for map_size in MAPS:
    name, kwargs = f"MicroRTSMining{map_size}x{map_size}-v0", {"size": map_size}
    gym.register(name, f"{__name__}:MicroRTSMining", kwargs=kwargs)
