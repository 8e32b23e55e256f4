"""Training speed beside CleanRL, Stable-Baselines3 and sb3-contrib, one thread each.

    python tests/benchmarks/speed.py --cleanrl PATH_TO_A_CHECKOUT [--workloads cartpole masks]
        [--cleanrl-python PYTHON_WITH_GYMNASIUM_0.29] [--repeats 5]

Runs alternate, so that a slow minute of the machine meets all of them. Every row of
results/speed.csv is one run; workloads that were not asked for keep their rows. The last lines
printed are medians and their ratios. Steps per second are counted from the first environment step
to the last update; starting Python and importing are left out. CleanRL's ppo_continuous_action.py
needs an interpreter with gymnasium 0.29.
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
PEER = """
import time, torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
torch.set_num_threads(1)
steps, seed = {steps}, {seed}
{model}
start = time.perf_counter()
model.learn(steps)
print("SPS:", model.num_timesteps / (time.perf_counter() - start))
"""
CARTPOLE = """
model = PPO(
    "MlpPolicy", make_vec_env("CartPole-v1", 4, seed=seed), seed=seed, device="cpu",
    learning_rate=lambda left: 2.5e-4 * left, n_steps=128, batch_size=128, n_epochs=4,
    clip_range=0.2, clip_range_vf=0.2, ent_coef=0.01,
)
"""
HALFCHEETAH = """
env = VecNormalize(make_vec_env("HalfCheetah-v5", 1, seed=seed), gamma=0.99)
model = PPO(
    "MlpPolicy", env, seed=seed, device="cpu",
    learning_rate=lambda left: 3e-4 * left, n_steps=2048, batch_size=64, n_epochs=10,
    clip_range=0.2, clip_range_vf=0.2, ent_coef=0.0,
)
"""
MASKS = """
from sb3_contrib import MaskablePPO
import tests.envs.invalid_actions
model = MaskablePPO(
    "MlpPolicy", make_vec_env("InvalidActionMultiDiscrete-v0", 8, seed=seed), seed=seed,
    device="cpu", learning_rate=lambda left: 2.5e-4 * left, n_steps=128, batch_size=256,
    n_epochs=4, clip_range=0.1, clip_range_vf=0.1, ent_coef=0.01,
)
"""
MASKS_ID = "tests.envs.invalid_actions:InvalidActionMultiDiscrete-v0"
WORKLOADS = {  # name: our script and flags, CleanRL's script, the other peer and its model, steps
    "cartpole": ("ppo_discrete.py", "ppo.py", "Stable-Baselines3", CARTPOLE, 100_000),
    "halfcheetah": (
        "ppo_continuous.py",
        "ppo_continuous_action.py",
        "Stable-Baselines3",
        HALFCHEETAH,
        20_480,
    ),
    "masks": (
        f"ppo_multidiscrete_mask.py --env-id {MASKS_ID}",
        None,
        "sb3-contrib",
        MASKS,
        50_000,
    ),
}


def measure(command: list[str]) -> float:
    """Steps per second that a command reports last, in an empty directory and with one thread."""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            command,
            cwd=directory,
            env=os.environ | one_thread | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stderr}")
    return float(re.findall(r"SPS: [\d.]+|[\d.]+ SPS", done.stdout)[-1].strip(" SP:"))


def main() -> None:
    """Measure, write results/speed.csv and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cleanrl", type=Path, help="checkout of vwxyzjn/cleanrl; without: no run")
    parser.add_argument("--cleanrl-python", default=sys.executable, help="for MuJoCo's script")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for workload in options.workloads:
        script, cleanrl, peer, model, steps = WORKLOADS[workload]
        ours, *flags = script.split()
        flags += ["--no-progress", "--total-timesteps", str(steps)]
        for seed in range(1, options.repeats + 1):
            commands = {
                "ours": [sys.executable, str(ROOT / ours), *flags, "--seed", str(seed)],
                peer: [sys.executable, "-c", PEER.format(steps=steps, seed=seed, model=model)],
            }
            if cleanrl and options.cleanrl:
                python = options.cleanrl_python if workload == "halfcheetah" else sys.executable
                file = str(options.cleanrl / "cleanrl" / cleanrl)
                commands["CleanRL"] = [
                    *(python, file, "--total-timesteps", str(steps)),
                    *("--seed", str(seed)),
                ]
            for name, command in commands.items():
                sps = round(measure(command))
                rows.append({"workload": workload, "who": name, "seed": seed, "sps": sps})
                print(*rows[-1].values(), flush=True)
    table = HERE / "results" / "speed.csv"
    before = list(csv.DictReader(table.open())) if table.exists() else []
    before = [row for row in before if row["workload"] not in options.workloads]
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(before + rows)
    for workload in options.workloads:
        mine = [row for row in rows if row["workload"] == workload]
        medians = {
            name: statistics.median(row["sps"] for row in mine if row["who"] == name)
            for name in dict.fromkeys(row["who"] for row in mine)
        }
        for name, sps in medians.items():
            ratio = medians["ours"] / sps
            print(f"{workload}: {name} {sps:.0f} SPS, ours is {ratio:.2f} times that")


if __name__ == "__main__":
    main()
