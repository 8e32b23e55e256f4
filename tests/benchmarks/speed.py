"""Training speed beside CleanRL and Stable-Baselines3, with equal settings and one thread each.

    python tests/benchmarks/speed.py --cleanrl PATH_TO_A_CHECKOUT [--steps 100000] [--repeats 5]

Runs alternate, so that a slow minute of the machine meets all of them. Every row of the result is
one run; the last lines printed are medians and their ratios. Steps per second are counted from
the first environment step to the last update; starting Python and importing are left out.
"""

import argparse
import csv
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SB3 = """
import time, torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
torch.set_num_threads(1)
steps = {steps}
model = PPO(
    "MlpPolicy", make_vec_env("CartPole-v1", 4, seed={seed}), seed={seed}, device="cpu",
    learning_rate=lambda left: 2.5e-4 * left, n_steps=128, batch_size=128, n_epochs=4,
    clip_range=0.2, clip_range_vf=0.2, ent_coef=0.01,
)
start = time.perf_counter()
model.learn(steps)
print("SPS:", steps / (time.perf_counter() - start))
"""


def measure(command: list[str]) -> float:
    """Steps per second that a command reports last, in an empty directory and with one thread."""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            command,
            cwd=directory,
            env=os.environ | one_thread,
            capture_output=True,
            text=True,
            check=True,
        )
    return float(re.findall(r"SPS: [\d.]+|[\d.]+ SPS", done.stdout)[-1].strip(" SP:"))


def main() -> None:
    """Measure, write results/speed.csv and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cleanrl", type=Path, required=True, help="checkout of vwxyzjn/cleanrl")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    python, steps = sys.executable, str(options.steps)
    ours = [python, str(ROOT / "ppo_discrete.py"), "--no-progress", "--total-timesteps", steps]
    cleanrl = [python, str(options.cleanrl / "cleanrl" / "ppo.py"), "--total-timesteps", steps]
    rows = []
    for seed in range(1, options.repeats + 1):
        commands = {
            "ppo_discrete.py": [*ours, "--seed", str(seed)],
            "CleanRL ppo.py": [*cleanrl, "--seed", str(seed)],
            "Stable-Baselines3": [python, "-c", SB3.format(steps=steps, seed=seed)],
        }
        for name, command in commands.items():
            rows.append({"who": name, "seed": seed, "sps": round(measure(command))})
            print(rows[-1], flush=True)
    (HERE / "results").mkdir(exist_ok=True)
    with open(HERE / "results" / "speed.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    medians = {
        name: statistics.median(row["sps"] for row in rows if row["who"] == name)
        for name in dict.fromkeys(row["who"] for row in rows)
    }
    for name, sps in medians.items():
        print(f"{name}: {sps:.0f} SPS, ours is {medians['ppo_discrete.py'] / sps:.2f} times that")


if __name__ == "__main__":
    main()
