"""One set of flags on ten tasks of MuJoCo, beside Stable-Baselines3 and published figures.

    python tests/benchmarks/one_recipe.py run                      # continues where it stopped
    python tests/benchmarks/one_recipe.py run --who sb3 zoo --seeds 3
    python tests/benchmarks/one_recipe.py table                    # results/one_recipe.md

1M steps, one thread a run. `ours`: ppo_continuous.py with RECIPE. `sb3`: Stable-Baselines3 with the
same settings as far as it has them: no recomputed advantages, a learned std in place of the
schedule, normalized rewards in place of standardized targets. `zoo`: Stable-Baselines3 with the
tuned settings of rl-baselines3-zoo, those of the newest earlier version of the task if it has one
(`pip install --no-deps rl_zoo3 pyyaml`). A run that has ended is a row of
results/one_recipe.csv; `final` is the mean return of the last 100 episodes. One of ours that was
interrupted continues from its checkpoint.
"""

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
from ablation import RECIPE, ROOT, measure, run_script

RESULTS = Path(__file__).resolve().parent / "results"
CSV = RESULTS / "one_recipe.csv"
STEPS = 1_000_000
SAME = {  # RECIPE and our defaults in the words of Stable-Baselines3
    "n_envs": 16,
    "normalize": True,
    "n_steps": 128,
    "batch_size": 64,
    "n_epochs": 10,
    "gamma": 0.993,
    "gae_lambda": 0.95,
    "clip_range": 0.2,
    "normalize_advantage": False,
    "ent_coef": 0.0,
    "vf_coef": 0.25,
    "max_grad_norm": 1e9,
    "target_kl": 0.05 / 1.5,  # it stops at 1.5 times this number
    "learning_rate": "lin_3e-4",
    "policy_kwargs": "dict(net_arch=[128, 128], log_std_init=-1, optimizer_kwargs=dict(eps=1e-5))",
}
# task: mean and deviation of the better published figure, and its source
PUBLISHED = {
    "HalfCheetah-v5": (5784.0, 1244.0, "Tianshou, v3"),
    "Hopper-v5": (2609.0, 701.0, "Tianshou, v3"),
    "Walker2d-v5": (3589.0, 757.0, "Tianshou, v3"),
    "Ant-v5": (1007.0, 130.0, "Tianshou, v4"),
    "Humanoid-v5": (787.0, 194.0, "Tianshou, v3"),
    "Swimmer-v5": (67.0, 99.0, "Tianshou, v3"),
    "Pusher-v5": (-40.4, 7.2, "CleanRL"),
    "InvertedPendulum-v5": (1000.0, 0.0, "Tianshou, v2"),
    "InvertedDoublePendulum-v5": (9231.0, 270.0, "Tianshou, v2"),
}
TASKS = [*PUBLISHED, "Reacher-v5"]
SB3 = """
import sys, json
import numpy as np, torch
from torch import nn
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

task, seed, steps, settings = json.loads(sys.argv[1])
torch.set_num_threads(1)
env = make_vec_env(task, settings.pop("n_envs", 1), seed=seed)
if settings.pop("normalize", False):
    env = VecNormalize(env, gamma=settings.get("gamma", 0.99))
for name in ("learning_rate", "clip_range"):
    if isinstance(value := settings.get(name), str):
        start = float(value.removeprefix("lin_"))
        settings[name] = start if value[0].isdigit() else (lambda left, start=start: left * start)
if "policy_kwargs" in settings:
    settings["policy_kwargs"] = eval(settings["policy_kwargs"])
model = PPO(settings.pop("policy", "MlpPolicy"), env, seed=seed, device="cpu", **settings)
model.learn(steps)
print("FINAL", np.mean([episode["r"] for episode in model.ep_info_buffer]))
"""


def settings_of_zoo(task: str) -> dict | None:
    """Tuned settings of rl-baselines3-zoo for the newest earlier version of a task, if any."""
    import yaml

    package = importlib.util.find_spec("rl_zoo3")  # importing it would need all it depends on
    path = Path(package.origin).parent / "hyperparams" / "ppo.yml"
    tuned = yaml.safe_load(path.read_text())
    name = task.removesuffix("5")
    for version in "432":
        if settings := tuned.get(name + version):
            return {key: value for key, value in settings.items() if key != "n_timesteps"}
    return None


def final_return(who: str, task: str, seed: int, runs: Path) -> float:
    """Train, and read the mean return of the last 100 episodes."""
    if who == "ours":
        run_dir = runs / f"{task}-{seed}"
        flags = f"--total-timesteps {STEPS} {RECIPE}"
        run_script("ppo_continuous.py", task, seed, flags, run_dir)
        return measure(run_dir)[0]["final"]
    settings = SAME if who == "sb3" else settings_of_zoo(task)
    command = [sys.executable, "-c", SB3, json.dumps([task, seed, STEPS, settings])]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{who} {task} {seed} failed\n{result.stderr}")
    return float(result.stdout.split()[-1])


def run(who: list[str], tasks: list[str], seeds: int, workers: int, runs: Path) -> None:
    """Train what is not in the table, all tasks with one seed before the next seed."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.check_output(command, cwd=ROOT, text=True).strip()
    rows = list(csv.DictReader(CSV.open())) if CSV.exists() else []
    done = {(row["who"], row["task"], int(row["seed"])) for row in rows}
    todo = [(w, t, seed) for seed in range(1, seeds + 1) for t in tasks for w in who]
    todo = [job for job in todo if job[0] != "zoo" or settings_of_zoo(job[1])]
    lock = Lock()

    def work(job: tuple[str, str, int]) -> None:
        value = final_return(*job, runs)
        with lock, open(CSV, "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not file.tell():
                writer.writerow(("who", "task", "seed", "final", "commit"))
            writer.writerow((*job, round(value, 2), commit))
        print(*job, value, flush=True)

    with ThreadPoolExecutor(workers) as pool:
        ended = [pool.submit(work, job) for job in todo if job not in done]
    for future in ended:
        future.result()  # raises what a run raised


def table() -> None:
    """Write and print mean and standard deviation over seeds beside the published figures."""
    finals: dict[tuple[str, str], list[float]] = {}
    for row in csv.DictReader(CSV.open()):
        finals.setdefault((row["who"], row["task"]), []).append(float(row["final"]))

    def cell(who: str, task: str) -> str:
        values = finals.get((who, task), [])
        spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        return f"{np.mean(values):.1f}{spread} ({len(values)})" if values else ""

    lines = [
        "| task | ours (seeds) | SB3, the same | SB3, zoo | published |",
        "|---|---|---|---|---|",
    ]
    for task in TASKS:
        published = "{:.1f} ± {:.1f} ({})".format(*PUBLISHED[task]) if task in PUBLISHED else ""
        cells = [cell(who, task) for who in ("ours", "sb3", "zoo")]
        lines.append(f"| {task} | {' | '.join(cells)} | {published} |")
    text = "\n".join(lines) + "\n"
    (RESULTS / "one_recipe.md").write_text(text)
    print(text)


def main() -> None:
    """Run or table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--who", nargs="+", default=["ours"], choices=["ours", "sb3", "zoo"])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "one_recipe")
    args = parser.parse_args()
    if args.what == "table":
        table()
    else:
        run(args.who, args.tasks, args.seeds, args.workers, args.runs)


if __name__ == "__main__":
    main()
