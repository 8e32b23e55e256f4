"""Training speed and memory beside CleanRL, Stable-Baselines3, sb3-contrib and an older commit.

    python tests/benchmarks/speed.py --cleanrl PATH_TO_A_CHECKOUT [--workloads cartpole masks]
        [--old CHECKOUT_OF_ANOTHER_COMMIT] [--cleanrl-python PYTHON_WITH_GYMNASIUM_0.29]
        [--repeats 5]
    python tests/benchmarks/speed.py --picture

Runs alternate, so that a slow minute of the machine affects all of them, and every run is a process
of its own. Steps per second of ours and of the older commit are counted from the second iteration
on, because --compile compiles in the first one; those of the others from the first environment
step. Starting Python and importing are left out. "environment" steps the environments alone, with
random actions: no training can be faster. Memory is the peak resident size. Every run is a row of
results/speed.csv, and every part of an iteration one of results/split.csv; workloads that were not
asked for keep their rows. CleanRL's files are run as they are; its ppo_continuous_action.py and
ppo_atari.py need an interpreter with gymnasium 0.29 (ale-py 0.10, stable-baselines3 2.3).
--picture needs matplotlib.
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
RESULTS = HERE / "results"
PARTS = "make_batch update"
BATCH = {"cartpole": 512, "halfcheetah": 2048, "masks": 1024, "cartpole64": 8192, "pong": 1024}
SB3 = """
import time, torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize
torch.set_num_threads({threads})
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
CARTPOLE64 = CARTPOLE.replace('"CartPole-v1", 4', '"CartPole-v1", 64').replace(
    "=128, n_e", "=2048, n_e"
)
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
PONG = """
import ale_py
env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", 8, seed=seed), 4)
model = PPO(
    "CnnPolicy", env, seed=seed, device="cpu",
    learning_rate=lambda left: 2.5e-4 * left, n_steps=128, batch_size=256, n_epochs=4,
    clip_range=0.1, clip_range_vf=0.1, ent_coef=0.01,
)
"""
MASKS_ID = "tests.envs.invalid_actions:InvalidActionMultiDiscrete-v0"
WORKLOADS = {  # ours, CleanRL's, the other peer, its model, steps of a run, threads
    "cartpole": ("ppo_discrete.py", "ppo.py", "Stable-Baselines3", CARTPOLE, 100_000, 1),
    "halfcheetah": (
        *("ppo_continuous.py", "ppo_continuous_action.py"),
        *("Stable-Baselines3", HALFCHEETAH, 20_480, 1),
    ),
    "masks": (
        f"ppo_multidiscrete_mask.py --env-id {MASKS_ID}",
        *(None, "sb3-contrib", MASKS, 50_000, 1),
    ),
    "cartpole64": (
        "ppo_discrete.py --num-envs 64 --vectorization native",
        *(None, "Stable-Baselines3", CARTPOLE64, 200_000, 2),
    ),
    "pong": (
        "ppo_discrete.py --env-id ALE/Pong-v5 --vectorization native --num-envs 8 "
        "--shared-network --clip-coef 0.1",
        *("ppo_atari.py --env-id PongNoFrameskip-v4", "Stable-Baselines3", PONG, 5_120, 2),
    ),
}
# Our script, with times of its parts, and the rate from the second iteration on.
TIMED = """
import importlib, sys, time
sys.path.insert(0, {root!r})
script = importlib.import_module({script!r})
times, ends = {{}}, []
def timed(owner, name):
    function = getattr(owner, name)
    def call(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        end = time.perf_counter()
        times.setdefault(name, []).append(end - start)
        if name == "update":
            ends.append(end)
        return result
    setattr(owner, name, call)
for name in {parts!r}.split():
    timed(script, name)
timed(script if hasattr(script, "collect") else script.Rollout, "collect")
sys.argv = [script.__file__, *{flags!r}]
script.main()
print("SPS:", (len(ends) - 1) * {batch} / (ends[-1] - ends[0]))
for name, values in times.items():
    print("part", name, sorted(values)[len(values) // 2] * 1e3)
"""
FLOOR = """
import importlib, sys, time
sys.path.insert(0, {root!r})
script = importlib.import_module({script!r})
args = script.tyro.cli(script.Args, args={flags!r})
envs = script.make_envs(args, args.num_envs, 1)
envs.reset(seed=1)
envs.action_space.seed(1)
actions = [envs.action_space.sample() for _ in range(500)]
start, steps = time.perf_counter(), max({steps} // args.num_envs, 1)
for t in range(steps):
    envs.step(actions[t % 500])
print("SPS:", steps * args.num_envs / (time.perf_counter() - start))
"""
CLEANRL = """
import runpy, sys
sys.argv = {argv!r}
if "atari" in sys.argv[0]:
    import ale_py  # which registers its environments with gymnasium 0.29
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(command: list[str], threads: int, path: Path = ROOT) -> tuple[str, float]:
    """Output and peak megabytes of a command, in an empty directory, without a GPU."""
    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    env = os.environ | limits | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{path}"}
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=directory, env=env, stdout=out, stderr=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(f"{command}\n{text}")
    return text, usage.ru_maxrss / 1024


def sps(text: str) -> int:
    """Steps per second that were reported last."""
    return round(float(re.findall(r"SPS: [\d.]+|[\d.]+ SPS", text)[-1].strip(" SP:")))


def commands(name: str, seed: int, options: argparse.Namespace) -> dict[str, list[str]]:
    """{who: command} of a workload."""
    ours, cleanrl, peer, model, steps, threads = WORKLOADS[name]
    script, *flags = ours.split()
    flags += ["--total-timesteps", str(steps), "--seed", str(seed)]
    flags += ["--torch-threads", str(threads), "--no-progress"]
    batch = BATCH[name]
    ours = {"script": script.removesuffix(".py"), "parts": PARTS, "batch": batch}
    compiled = [*flags, "--compile"]
    python = [sys.executable, "-c"]
    result = {
        "ours": [*python, TIMED.format(flags=flags, root=str(ROOT), **ours)],
        "ours compiled": [*python, TIMED.format(flags=compiled, root=str(ROOT), **ours)],
        peer: [*python, SB3.format(steps=steps, seed=seed, model=model, threads=threads)],
    }
    if options.old:
        old = {"root": str(options.old), **ours}
        result["old"] = [*python, TIMED.format(flags=flags, **old)]
        result["old compiled"] = [*python, TIMED.format(flags=compiled, **old)]
    if cleanrl and options.cleanrl:
        file, *flags = cleanrl.split()
        argv = [str(options.cleanrl / "cleanrl" / file), *flags]
        argv += ["--total-timesteps", str(steps), "--seed", str(seed)]
        python = sys.executable if name == "cartpole" else options.cleanrl_python
        result["CleanRL"] = [python, "-c", CLEANRL.format(argv=argv)]
    floor = ["--total-timesteps", str(steps), *WORKLOADS[name][0].split()[1:]]
    result["environment"] = [
        *(sys.executable, "-c"),
        FLOOR.format(root=str(ROOT), script=ours["script"], flags=floor, steps=steps),
    ]
    return result


def measure(options: argparse.Namespace) -> None:
    """All workloads that were asked for, into the tables; prints medians and their ratios."""
    for name in options.workloads:
        rows, parts, threads = [], [], WORKLOADS[name][-1]
        for seed in range(1, options.repeats + 1):
            for who, command in commands(name, seed, options).items():
                text, megabytes = run(command, threads, options.cleanrl or ROOT)
                row = {"workload": name, "who": who, "seed": seed, "sps": sps(text)}
                rows.append(row | {"megabytes": round(megabytes)})
                print(*rows[-1].values(), flush=True)
                for part, ms in re.findall(r"^part (\w+) ([\d.]+)", text, re.MULTILINE):
                    split = {"workload": name, "who": who, "seed": seed, "part": part}
                    parts.append(split | {"milliseconds": round(float(ms), 3)})
        store("speed.csv", rows, [name])
        store("split.csv", parts, [name])
        report(name, rows)


def report(name: str, rows: list[dict]) -> None:
    """Medians of a workload, and their ratios."""
    medians = {
        who: [
            statistics.median(row[column] for row in rows if row["who"] == who)
            for column in ("sps", "megabytes")
        ]
        for who in dict.fromkeys(row["who"] for row in rows)
    }
    for who, (speed, memory) in medians.items():
        eager, fast = (medians[x][0] / speed for x in ("ours", "ours compiled"))
        print(
            f"{name}: {who} {speed:.0f} SPS, {memory:.0f} MB; "
            f"ours {eager:.2f} x, compiled {fast:.2f} x",
            flush=True,
        )


def store(name: str, rows: list[dict], workloads: list[str]) -> None:
    """Replace these workloads' rows of a table."""
    table = RESULTS / name
    before = list(csv.DictReader(table.open())) if table.exists() else []
    before = [row for row in before if row["workload"] not in workloads]
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(before + rows)


def draw() -> None:
    """Steps per second: a panel for each workload, a bar for each program."""
    import matplotlib.pyplot as plt

    titles = {
        "cartpole": "CartPole, 4 environments",
        "cartpole64": "CartPole, 64 environments",
        "halfcheetah": "HalfCheetah, 1 environment",
        "masks": "masked actions, 8 environments",
        "pong": "Atari Pong, 8 environments",
    }
    rows = {
        "these scripts, --compile": "ours compiled",
        "these scripts": "ours",
        "CleanRL": "CleanRL",
        "Stable-Baselines3 (contrib)": "Stable-Baselines3",
    }
    rates = {}
    for row in csv.DictReader((RESULTS / "speed.csv").open()):
        who = row["who"].replace("sb3-contrib", "Stable-Baselines3")
        rates.setdefault((row["workload"], who), []).append(float(row["sps"]))
    figure, panels = plt.subplots(
        1, len(titles), figsize=(12, 1.8), layout="constrained", sharey=True
    )
    for panel, (workload, title) in zip(panels, titles.items(), strict=True):
        medians = [statistics.median(rates.get((workload, who), [0])) for who in rows.values()]
        bars = panel.barh(list(rows), medians, color=["C0", "C0", "0.65", "0.65"])
        labels = [f"{m:,.0f} ({m / medians[-1]:.1f} x)" if m else "not measured" for m in medians]
        panel.bar_label(bars, labels, fontsize=8, padding=3)
        panel.set_xlim(0, 1.9 * max(medians))
        panel.set_title(title, fontsize=9)
        panel.tick_params(axis="y", labelsize=8, length=0)
        panel.set_xticks([])
        panel.spines[["top", "right", "bottom"]].set_visible(False)
    panels[0].invert_yaxis()
    words = "steps of training per second on the CPU; in brackets: compared with Stable-Baselines3"
    figure.supxlabel(words, fontsize=8)
    figure.savefig(RESULTS / "speed.png", dpi=110)


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cleanrl", type=Path, help="checkout of vwxyzjn/cleanrl; without: no run")
    parser.add_argument("--old", type=Path, help="checkout of another commit; without: no run")
    parser.add_argument("--cleanrl-python", default=sys.executable, help="for MuJoCo's script")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--picture", action="store_true")
    options = parser.parse_args()
    if options.picture:
        draw()
    else:
        measure(options)


if __name__ == "__main__":
    main()
