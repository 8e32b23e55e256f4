"""Learning curves of runs, kept in a table and drawn as one picture with a panel for each task.

    python tests/benchmarks/curves.py add "Hopper-v5=runs/Hopper-v5__*" ["TASK=PATTERN" ...]
    python tests/benchmarks/curves.py draw            # results/curves.csv -> results/curves.png

`add` reads charts/return_100 of every run that matches the pattern, replaces the rows of the task
in the table, and prints the final returns. `draw` shows the mean over seeds and their range, the
published figure that the README compares with as a dashed line, and what the trained agents of
one_recipe.py reach without sampling as a star; it needs matplotlib.
"""

import argparse
import csv
from glob import glob
from pathlib import Path

import numpy as np
from one_recipe import CSV as EVALUATED
from one_recipe import PUBLISHED as MUJOCO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESULTS = Path(__file__).resolve().parent / "results"
POINTS = 60  # of a curve
PUBLISHED = {  # sources in the README of this directory
    "CartPole-v1": (490.0, "CleanRL"),
    "Acrobot-v1": (-86.4, "CleanRL"),
    "LunarLander-v3 (b)": (242.1, "SB3 zoo"),
    "MountainCar-v0 (a)": (-110.4, "SB3 zoo"),
    "TaxiDispatch-v0": (0.793, "optimum"),
    "MicroRTS 10x10": (40.0, "all harvested"),
}
PUBLISHED |= {task: (mean, source) for task, (mean, _, source) in MUJOCO.items()}


def read(run: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and mean returns of the last 100 episodes of a run, at equal distances."""
    events = EventAccumulator(run, size_guidance={"scalars": 0})
    events.Reload()
    points = np.array([(e.step, e.value) for e in events.Scalars("charts/return_100")])
    steps = np.linspace(points[0, 0], points[-1, 0], POINTS).round()
    return steps, np.interp(steps, points[:, 0], points[:, 1])


def add(groups: list[str]) -> None:
    """Put runs into the table."""
    path = RESULTS / "curves.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    tasks = [row["task"] for row in rows] + [group.split("=")[0] for group in groups]
    order = list(dict.fromkeys(tasks))  # a task that is replaced keeps its place
    for group in groups:
        task, pattern = group.split("=", 1)
        runs = sorted(glob(pattern))
        if not runs:
            raise SystemExit(f"error: no run matches {pattern}")
        rows = [row for row in rows if row["task"] != task]
        final = []
        for number, run in enumerate(runs, 1):
            steps, returns = read(run)
            final.append(returns[-1])
            for step, value in zip(steps, returns, strict=True):
                row = {"task": task, "run": number, "step": int(step)}
                rows.append(row | {"return_100": round(float(value), 3)})
        std = np.std(final, ddof=1) if len(final) > 1 else 0.0
        print(task, *np.round(final, 2), f"mean {np.mean(final):.2f} +- {std:.2f}")
    rows.sort(key=lambda row: order.index(row["task"]))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["task", "run", "step", "return_100"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw() -> None:
    """Draw the table."""
    import matplotlib.pyplot as plt

    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in csv.DictReader((RESULTS / "curves.csv").open()):
        point = (float(row["step"]), float(row["return_100"]))
        curves.setdefault(row["task"], {}).setdefault(row["run"], []).append(point)
    evaluated: dict[str, list[float]] = {}
    for row in csv.DictReader(EVALUATED.open()):
        if row["who"] == "ours":
            evaluated.setdefault(row["task"], []).append(float(row["evaluated"]))
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(3 * columns, 2.4 * rows), layout="constrained", squeeze=False
    )
    for panel in panels.flat[len(curves) :]:
        panel.axis("off")
    for panel, (task, runs) in zip(panels.flat, curves.items(), strict=False):
        values = np.array([[value for _, value in points] for points in runs.values()])
        steps = np.array(next(iter(runs.values())))[:, 0]
        panel.plot(steps, values.mean(0), color="C0")
        panel.fill_between(steps, values.min(0), values.max(0), alpha=0.25, linewidth=0)
        panel.set_title(f"{task} ({len(runs)} seeds)", fontsize=9)
        if task in evaluated:
            star = np.mean(evaluated[task])
            panel.plot(steps[-1], star, "*", color="C1", markersize=9, label="evaluated")
        if task in PUBLISHED:
            value, source = PUBLISHED[task]
            panel.axhline(value, color="0.3", linewidth=1, linestyle="--", label=source)
            panel.legend(loc="best", fontsize=8)
        panel.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:.0f}k")
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    figure.supxlabel("environment steps", fontsize=9)
    figure.supylabel("mean return of 100 episodes", fontsize=9)
    plt.savefig(RESULTS / "curves.png", dpi=110)


def main() -> None:
    """Read the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["add", "draw"])
    parser.add_argument("groups", nargs="*", metavar="TASK=PATTERN")
    options = parser.parse_args()
    if options.command == "add":
        add(options.groups)
    else:
        draw()


if __name__ == "__main__":
    main()
