"""A picture of runs: the mean over seeds of one tag, with the spread between the seeds.

    pip install matplotlib
    python tests/benchmarks/curves.py OUT.png TAG "LABEL=RUNS" ["LABEL=RUNS" ...]

RUNS is a pattern of run directories, one a seed, such as "runs/TaxiDispatch-v0__conditional__*".
"""

import argparse
from glob import glob
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read(run: str, tag: str, steps: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a tag, smoothed over a fiftieth of the run; at `steps` if given."""
    events = EventAccumulator(run, size_guidance={"scalars": 0})
    events.Reload()
    points = np.array([(event.step, event.value) for event in events.Scalars(tag)])
    width = max(len(points) // 50, 1)
    values = np.convolve(points[:, 1], np.ones(width) / width, "valid")
    at = points[width - 1 :, 0]
    return (at, values) if steps is None else (steps, np.interp(steps, at, values))


def main() -> None:
    """Draw one line a label."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("tag")
    parser.add_argument("groups", nargs="+", metavar="LABEL=RUNS")
    options = parser.parse_args()
    _, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for group in options.groups:
        label, pattern = group.split("=", 1)
        runs = sorted(glob(pattern))
        if not runs:
            raise SystemExit(f"error: no run matches {pattern}")
        steps, _ = read(runs[0], options.tag, None)
        values = np.stack([read(run, options.tag, steps)[1] for run in runs])
        (line,) = axes.plot(steps, values.mean(0), label=f"{label} ({len(runs)} seeds)")
        low, high = values.min(0), values.max(0)
        axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(xlabel="environment steps", ylabel=options.tag)
    axes.grid(alpha=0.3)
    axes.legend()
    plt.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
