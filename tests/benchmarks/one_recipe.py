"""One set of flags on ten tasks of MuJoCo, beside Stable-Baselines3 and published figures.

    python tests/benchmarks/one_recipe.py run                      # continues where it stopped
    python tests/benchmarks/one_recipe.py run --who sb3 zoo --seeds 3
    python tests/benchmarks/one_recipe.py table                    # results/one_recipe.md

1M steps, one thread a run. `ours`: ppo_continuous.py with RECIPE. `sb3`: Stable-Baselines3 with the
same settings as far as it has them: no recomputed advantages, a learned std in place of the
schedule, normalized rewards in place of standardized targets, and the first minibatch with a larger
KL than `target_kl` ends the epochs of policy and critic. `zoo`: Stable-Baselines3 with the tuned
settings of rl-baselines3-zoo, those of the newest earlier version of the task if it has one
(`pip install --no-deps rl_zoo3 pyyaml`), but 1M steps.

A run that has ended is a row of results/one_recipe.csv and is not repeated (delete its row to
repeat it). `final` is the mean return of the last 100 training episodes, `evaluated` the mean
return of EPISODES episodes of the trained agent with the most probable actions. One of ours that
was interrupted continues from its checkpoint.
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
EPISODES = 20  # of an evaluation
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
    "vf_coef": 0.125,  # of the squared error, not of half of it
    "max_grad_norm": 1e9,
    "target_kl": 0.05 / 1.5,  # it stops at 1.5 times this number
    "learning_rate": "lin_3e-4",
    "policy_kwargs": "dict(net_arch=[128, 128], log_std_init=-1, optimizer_kwargs=dict(eps=1e-5))",
}
# task: mean and std of the better published figure, and its source
PUBLISHED = {
    "HalfCheetah-v5": (5784.0, 1244.0, "Tianshou, v3"),
    "Hopper-v5": (2609.0, 701.0, "Tianshou, v3"),
    "Walker2d-v5": (3589.0, 757.0, "Tianshou, v3"),
    "Ant-v5": (3258.4, 1079.3, "Tianshou, v3"),
    "Humanoid-v5": (787.0, 194.0, "Tianshou, v3"),
    "Swimmer-v5": (67.0, 99.0, "Tianshou, v3"),
    "Pusher-v5": (-40.4, 7.2, "CleanRL"),
    "InvertedPendulum-v5": (1000.0, 0.0, "Tianshou, v2"),
    "InvertedDoublePendulum-v5": (9231.0, 270.0, "Tianshou, v2"),
    "Reacher-v5": (-4.1, 0.3, "Tianshou, v2"),
}
TASKS = list(PUBLISHED)
SB3 = """
import sys, json
import numpy as np, torch
from torch import nn
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

task, seed, steps, episodes, settings = json.loads(sys.argv[1])
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
final = np.mean([episode["r"] for episode in model.ep_info_buffer])
env.training = False  # the returns are those of Monitor, so without normalization
print(final, evaluate_policy(model, env, episodes)[0])
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


def train(who: str, task: str, seed: int, runs: Path) -> tuple[float, float]:
    """Train and evaluate: mean returns of the last 100 training episodes and of the evaluation."""
    if who == "ours":
        run_dir = runs / f"{task}-{seed}"
        flags = f"--total-timesteps {STEPS} {RECIPE}"
        run_script("ppo_continuous.py", task, seed, flags, run_dir)
        command = [sys.executable, str(ROOT / "ppo_continuous.py"), "--eval", str(run_dir)]
        command += ["--eval-episodes", str(EPISODES), "--no-cuda"]
    else:
        settings = SAME if who == "sb3" else settings_of_zoo(task)
        command = [sys.executable, "-c", SB3, json.dumps([task, seed, STEPS, EPISODES, settings])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{who} {task} {seed} failed\n{result.stderr}")
    if who == "ours":
        evaluated = result.stdout.rpartition("mean return ")[2].split()[0]
        return measure(run_dir)[0]["final"], float(evaluated)
    final, evaluated = result.stdout.split()[-2:]
    return float(final), float(evaluated)


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
        final, evaluated = train(*job, runs)
        with lock, open(CSV, "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not file.tell():
                writer.writerow(("who", "task", "seed", "final", "evaluated", "commit"))
            writer.writerow((*job, round(final, 2), round(evaluated, 2), commit))
        print(*job, final, evaluated, flush=True)

    with ThreadPoolExecutor(workers) as pool:
        ended = [pool.submit(work, job) for job in todo if job not in done]
    for future in ended:
        future.result()  # raises what a run raised


def table() -> None:
    """Write and print mean and standard deviation over seeds beside the published figures."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in csv.DictReader(CSV.open()):
        for column in ("final", "evaluated"):
            values = found.setdefault((row["who"], row["task"], column), [])
            values.append(float(row[column]))

    def cell(who: str, task: str, column: str) -> str:
        values = found.get((who, task, column), [])
        if not values:
            return ""
        digits = 0 if abs(np.mean(values)) >= 100 else 1
        std = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{std} ({len(values)})"

    lines = [
        "| task | ours (seeds) | evaluated | SB3, the same | evaluated | SB3, zoo | evaluated "
        "| published |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        cells = [task]
        for who in ("ours", "sb3", "zoo"):
            cells += [cell(who, task, "final"), cell(who, task, "evaluated")]
        cells.append("{:g} ± {:g} ({})".format(*PUBLISHED[task]))
        lines.append(f"| {' | '.join(cells)} |")
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
