"""What each trick is worth: runs that differ from a base in one setting, on several tasks.

    python tests/benchmarks/ablation.py run                        # continues where it stopped
    python tests/benchmarks/ablation.py run --tasks Acrobot-v1 --variants "value clip" --seeds 10
    python tests/benchmarks/ablation.py table                      # results/ablation.md
    python tests/benchmarks/ablation.py plot                       # results/ablation.png

`run` trains every variant on every task of its list, first all of them with seed 1, then with seed
2, and so on. A run that has ended is a row of results/ablation.csv and is not repeated; a run that
was interrupted continues from its checkpoint in runs/ablation. One process and one thread a run,
compiled (a C++ compiler is needed), which changes the speed and the rounding.

Columns of the table: `final` is the mean return of the last 100 episodes, `mean` the average of
that number over the training; the others are averages over the training of the tag of that name.

`table` compares each variant with the base of its task, at the end of the training (`final`) and
during it (`mean`, the area under the learning curve): the average over seeds, and its difference to
the base's, divided by the distance between the base and `zero`, which is the return of random
actions (100 episodes) or of a policy that delivers nothing, with a 95% bootstrap interval over
seeds. Over tasks: the difference of the interquartile means (IQM) of the final returns, normalized
so that 0 is `zero` and 1 the base's average, and the probability that a run of the variant ends
better than one of the base (Agarwal et al. 2021, arXiv 2108.13264; stratified bootstrap). Bold: the
interval excludes 0, or 0.5 of the probability. Tasks with fewer than MIN_SEEDS runs are left out.
`plot` draws the differences, and the curves of the task whose values are near 200
(results/value_clip.csv, results/value_clip.png). `pip install scipy matplotlib` for both.
"""

import argparse
import csv
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
CSV = RESULTS / "ablation.csv"
CURVES = RESULTS / "value_clip.csv"
TAGS = ("losses/explained_variance", "losses/value_clipfrac", "losses/clipfrac", "losses/approx_kl")
COLUMNS = ["task", "variant", "seed", "steps", "final", "mean"]
COLUMNS += [tag.split("/")[1] for tag in TAGS] + ["commit"]
SAMPLES = 20_000  # of a bootstrap
MIN_SEEDS = 3
POINTS = 40  # of a curve
SHOWN = (  # in the picture of the value clip
    "base",
    "value clip: off",
    "value clip: on, value norm",
    "value clip: off, value norm",
    "value clip: on, popart",
)


class Task(NamedTuple):
    """A task and its base: the script's defaults, or the flags that the README recommends."""

    script: str
    flags: str
    zero: float  # return with score 0: of random actions, or of a policy that delivers nothing


RECIPE = (  # the recipe of the README for all MuJoCo tasks
    "--num-envs 16 --num-steps 128 --hidden-sizes 128 128 --gamma 0.993 --std fixed "
    "--log-std-init -1 --log-std-final -2 --no-norm-adv --recompute-advantages "
    "--norm-value running --no-norm-reward --no-clip-vloss --vf-coef 0.25 --max-grad-norm None "
    "--target-kl 0.05"
)
MICRORTS = "tests.envs.microrts:MicroRTSMining10x10-v0"
TASKS = {
    "Acrobot-v1": Task("ppo_discrete.py", "--total-timesteps 500000", -500.0),
    "LunarLander-v3": Task(  # flags (b) of the README, which end near the best possible return
        "ppo_discrete.py",
        "--total-timesteps 500000 --num-envs 16 --num-steps 256 --num-minibatches 16 "
        "--update-epochs 10 --gamma 0.999 --gae-lambda 0.98 --learning-rate 1e-3 --norm-reward "
        "--no-clip-vloss",
        -182.0,
    ),
    "CartPoleTimes2-v0": Task("ppo_discrete.py", "--total-timesteps 200000", 45.0),
    "Hopper-v5": Task("ppo_continuous.py", f"--total-timesteps 500000 {RECIPE}", 19.0),
    "HalfCheetah-v5": Task("ppo_continuous.py", f"--total-timesteps 500000 {RECIPE}", -293.0),
    "InvertedPendulum-v5": Task("ppo_continuous.py", f"--total-timesteps 1000000 {RECIPE}", 5.0),
    "TaxiDispatch-v0": Task("ppo_multidiscrete_mask.py", "--total-timesteps 1000000", -20.0),
    MICRORTS: Task(
        "ppo_multidiscrete_mask.py",
        "--total-timesteps 200000 --num-envs 4 --num-steps 256 --update-epochs 8 --gae-lambda 0.97 "
        "--clip-coef 0.2 --learning-rate 5e-4 --ent-coef 0.003 --ent-coef-final 0",
        0.0,
    ),
}
MODULES = {"CartPoleTimes2-v0": "tests.benchmarks.scaled:"}
ACROBOT = ("Acrobot-v1",)
LUNAR = ("LunarLander-v3",)
DISCRETE = (*ACROBOT, *LUNAR)
CONTINUOUS = ("Hopper-v5", "HalfCheetah-v5")
CONTROL = (*DISCRETE, *CONTINUOUS)  # where values, advantages and targets are compared
SCALED = ("CartPoleTimes2-v0",)
SOLVED = ("InvertedPendulum-v5",)  # solved early; some runs then lose the policy in one update
MASKS = ("TaxiDispatch-v0", MICRORTS)
ALL = (*CONTROL, *MASKS)
CLIPPED = (*ACROBOT, *MASKS, *SCALED)  # the base has the value clip: 0.2, TaxiDispatch 0.1
NOT_NORMED = (*DISCRETE, *MASKS, *SCALED)  # tasks whose base does not standardize targets
LEARNED = "--std independent --log-std-final None"  # the base's sigma follows a schedule
# question, variant, flags beside the base, tasks
VARIANTS = [
    ("value clip", "off", "--no-clip-vloss", CLIPPED),
    ("value clip", "on", "--clip-vloss", LUNAR),
    ("value clip", "on, value norm", "--norm-value running --clip-vloss", (*ALL, *SCALED)),
    ("value clip", "off, value norm", "--norm-value running --no-clip-vloss", NOT_NORMED),
    ("value clip", "on, popart", "--norm-value popart --clip-vloss", NOT_NORMED),
    ("value clip", "off, popart", "--norm-value popart --no-clip-vloss", NOT_NORMED),
    ("value clip", "on, no gradient clip", "--max-grad-norm None", SCALED),
    ("value clip", "off, no gradient clip", "--no-clip-vloss --max-grad-norm None", SCALED),
    ("value clip", "on, eps 1e-8", "--adam-eps 1e-8", SCALED),
    ("value clip", "off, eps 1e-8", "--no-clip-vloss --adam-eps 1e-8", SCALED),
    ("value norm", "running, no reward norm", "--norm-value running --no-norm-reward", LUNAR),
    ("value norm", "none", "--norm-value none", CONTINUOUS),
    ("value norm", "none, value clip 0.2", "--norm-value none --clip-vloss", CONTINUOUS),
    ("value norm", "none, but reward norm", "--norm-value none --norm-reward", CONTINUOUS),
    ("value norm", "popart", "--norm-value popart", CONTINUOUS),
    ("advantage norm", "none", "--no-norm-adv", (*DISCRETE, *MASKS)),
    ("advantage norm", "over the minibatch", "--norm-adv", (*CONTINUOUS, *SOLVED)),
    ("advantage norm", "over the batch", "--norm-adv --norm-adv-scope batch", ALL),
    ("observation norm", "on", "--norm-obs", DISCRETE),
    ("observation norm", "on, no clip", "--norm-obs --clip-obs None", DISCRETE),
    ("observation norm", "off", "--no-norm-obs", CONTINUOUS),
    ("observation norm", "no clip", "--clip-obs None", CONTINUOUS),
    ("reward norm", "on", "--norm-reward", (*ACROBOT, *CONTINUOUS)),
    ("reward norm", "on, no clip", "--norm-reward --clip-reward None", (*ACROBOT, *CONTINUOUS)),
    ("reward norm", "off", "--no-norm-reward", LUNAR),
    ("reward norm", "no clip", "--clip-reward None", LUNAR),
    ("critic's target", "Monte-Carlo", "--value-target mc", CONTROL),
    ("critic's target", "one step", "--value-target td", CONTROL),
    ("critic's target", "lambda 0.9", "--gae-lambda 0.9", CONTROL),
    ("critic's target", "lambda 0.95", "--gae-lambda 0.95", LUNAR),
    ("critic's target", "lambda 0.99", "--gae-lambda 0.99", CONTROL),
    ("critic's target", "recomputed", "--recompute-advantages", DISCRETE),
    ("critic's target", "not recomputed", "--no-recompute-advantages", CONTINUOUS),
    ("critic's target", "truncation as an end", "--no-bootstrap-truncated", CONTROL),
    ("policy loss", "clip 0.1", "--clip-coef 0.1 --vclip-coef 0.2", CONTROL),
    ("policy loss", "clip 0.3", "--clip-coef 0.3 --vclip-coef 0.2", CONTROL),
    ("policy loss", "no clip", "--clip-coef None --vclip-coef 0.2", CONTROL),
    ("policy loss", "KL penalty, beta 1", "--clip-coef None --vclip-coef 0.2 --kl-coef 1", CONTROL),
    (
        "policy loss",
        "KL penalty, adaptive",
        "--clip-coef None --vclip-coef 0.2 --kl-coef 1 --kl-target 0.01",
        CONTROL,
    ),
    ("policy loss", "no target KL", "--target-kl None", CONTINUOUS),
    ("policy loss", "target KL 0.02", "--target-kl 0.02", CONTROL),
    ("policy loss", "dual clip 3", "--dual-clip-coef 3", (*CONTROL, *SOLVED)),
    ("critic", "Huber loss", "--value-loss huber", CONTROL),
    ("critic", "learning rate x 3", "--critic-learning-rate 7.5e-4", ACROBOT),
    ("critic", "learning rate x 3", "--critic-learning-rate 3e-3", LUNAR),
    ("critic", "learning rate x 3", "--critic-learning-rate 9e-4", CONTINUOUS),
    ("critic", "epochs x 2", "--critic-epochs 4", ACROBOT),
    ("critic", "epochs x 2", "--critic-epochs 10", (*LUNAR, *CONTINUOUS)),
    ("critic", "warm-up of 10 iterations", "--critic-warmup-iterations 10", CONTROL),
    ("optimizer", "no gradient clip", "--max-grad-norm None", DISCRETE),
    ("optimizer", "gradient clip 0.5", "--max-grad-norm 0.5", (*CONTINUOUS, *SOLVED)),
    ("optimizer", "eps 1e-8", "--adam-eps 1e-8", (*CONTROL, *SOLVED)),
    ("optimizer", "eps 1e-3", "--adam-eps 1e-3", (*CONTROL, *SOLVED)),
    ("optimizer", "constant learning rate", "--no-anneal-lr", CONTROL),
    ("network", "PyTorch's initialization", "--no-ortho-init", CONTROL),
    ("network", "ReLU", "--activation relu", CONTROL),
    ("network", "shared trunk", "--shared-network", CONTROL),
    ("entropy bonus", "none", "--ent-coef 0", DISCRETE),
    ("entropy bonus", "0.01 to 0", "--ent-coef 0.01 --ent-coef-final 0", DISCRETE),
    ("sigma", "constant e^-1", "--log-std-final None", CONTINUOUS),
    ("sigma", "learned", LEARNED, CONTINUOUS),
    ("sigma", "learned, entropy bonus", f"{LEARNED} --ent-coef 0.01", CONTINUOUS),
    ("sigma", "from the state", f"{LEARNED} --std state", CONTINUOUS),
    ("sigma", "beta distribution", f"{LEARNED} --distribution beta", CONTINUOUS),
    ("masks", "none", "--mask none", MASKS),
    ("masks", "independent", "--mask independent", MASKS),
]
BASE = ("base", "base", "", tuple(TASKS))


class Job(NamedTuple):
    """One run."""

    task: str
    variant: str
    flags: str
    seed: int


def key_of(question: str, name: str) -> str:
    """Name of a variant in the table."""
    return name if question == "base" else f"{question}: {name}"


def read_rows() -> list[dict[str, Any]]:
    """Rows of the table."""
    if not CSV.exists():
        return []
    with open(CSV, newline="") as file:
        return list(csv.DictReader(file))


def jobs(tasks: list[str], variants: list[str], seeds: int) -> list[Job]:
    """All runs that are not in the table, all variants with one seed before the next seed."""
    done = {(row["task"], row["variant"], int(row["seed"])) for row in read_rows()}
    found = []
    for seed in range(1, seeds + 1):
        for task in tasks:
            for question, name, flags, where in (BASE, *VARIANTS):
                key = key_of(question, name)
                wanted = question == "base" or any(key.startswith(start) for start in variants)
                if wanted and task in where and (task, key, seed) not in done:
                    found.append(Job(task, key, flags, seed))
    return found


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a table, and the names of its columns to an empty one."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def measure(run_dir: Path) -> tuple[dict[str, float], list[dict[str, float]]]:
    """What the table holds of a run, and its curves."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag in ("charts/return_100", *TAGS):
        points = events.Scalars(tag)
        curves[tag.split("/")[1]] = ([e.step for e in points], [e.value for e in points])
    steps, returns = curves["return_100"]
    row = {"steps": steps[-1], "final": returns[-1]}
    row |= {name: float(np.mean(values)) for name, (_, values) in curves.items()}
    row["mean"] = row.pop("return_100")
    points = []
    for step in np.linspace(steps[0], steps[-1], POINTS).round():
        values = {name: float(np.interp(step, *curve)) for name, curve in curves.items()}
        points.append({"step": int(step)} | values)
    return row, points


def run_script(script: str, env_id: str, seed: int, flags: str, run_dir: Path) -> None:
    """Train a run to its end, from its checkpoint if it has one."""
    command = [sys.executable, str(ROOT / script), "--no-progress", "--no-cuda"]
    if (run_dir / "checkpoint.pt").exists():
        command += ["--resume", str(run_dir)]
    else:
        shutil.rmtree(run_dir, ignore_errors=True)
        command += ["--env-id", env_id, "--seed", str(seed), "--run-dir", str(run_dir)]
        command += ["--compile", *shlex.split(flags)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # a run that was complete before its row was written is refused, and only measured
    if result.returncode and "is complete" not in result.stderr:
        print(f"FAILED {shlex.join(command)}\n{result.stderr}", flush=True)
        raise RuntimeError(f"{run_dir} failed")


def train(job: Job, runs: Path, lock: Lock, commit: str) -> None:
    """Train, or continue, one run and append its row; the run's directory is removed."""
    task = TASKS[job.task]
    slug = "".join(c if c.isalnum() else "-" for c in f"{job.task}-{job.variant}-{job.seed}")
    run_dir = runs / slug
    env_id = MODULES.get(job.task, "") + job.task
    run_script(task.script, env_id, job.seed, f"{task.flags} {job.flags}", run_dir)
    numbers, points = measure(run_dir)
    row = {"task": job.task, "variant": job.variant, "seed": job.seed, "commit": commit}
    row |= {name: round(value, 4) for name, value in numbers.items()}
    names = ("return_100", "explained_variance", "value_clipfrac")
    with lock:
        if job.task in SCALED:
            run = {"variant": job.variant, "seed": job.seed}
            rows = [run | {k: round(point[k], 4) for k in ("step", *names)} for point in points]
            append(CURVES, rows)
        append(CSV, [{name: row[name] for name in COLUMNS}])
    shutil.rmtree(run_dir)
    print(f"{job.task} | {job.variant} | seed {job.seed}: {row['final']}", flush=True)


def returns(column: str) -> dict[str, dict[str, np.ndarray]]:
    """{variant: {task: returns of its seeds}} of a column, for tasks with enough seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in read_rows():
        by_task = found.setdefault(row["variant"], {})
        by_task.setdefault(row["task"], []).append(float(row[column]))
    return {
        variant: {
            task: np.array(by_task[task])
            for task in TASKS
            if min(len(by_task.get(task, [])), len(found["base"].get(task, []))) >= MIN_SEEDS
        }
        for variant, by_task in found.items()
    }


def interval(samples: np.ndarray, seeds: int) -> tuple[float, float]:
    """95% expanded percentile interval of a bootstrap (Hesterberg 2014, arXiv 1411.5279).

    The plain one is too narrow for few seeds: for two samples of the same normal distribution it
    excludes 0 in 11% of the cases with five seeds and 18% with three, this one in 3% and 11%.
    """
    from scipy import stats

    tail = stats.norm.cdf((seeds / (seeds - 1)) ** 0.5 * stats.t.ppf(0.025, seeds - 1))
    low, high = np.quantile(samples, (tail, 1 - tail))
    return float(low), float(high)


def resample(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap samples [SAMPLES, n] of n values."""
    return values[rng.integers(len(values), size=(SAMPLES, len(values)))]


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis."""
    ordered = np.sort(values, -1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def improvement(values: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Probability [...] that one of values [..., n] is above one of base [..., m]."""
    above = values[..., :, None] > base[..., None, :]
    equal = values[..., :, None] == base[..., None, :]
    return (above + 0.5 * equal).mean((-1, -2))


def compare(variant: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, Any]:
    """Differences of normalized returns by task, and what is aggregated, with intervals."""
    rng = np.random.default_rng(1)
    scores, base_scores = {}, {}
    for task, values in variant.items():
        zero = TASKS[task].zero
        scores[task] = (values - zero) / (base[task].mean() - zero)
        base_scores[task] = (base[task] - zero) / (base[task].mean() - zero)
    drawn = {task: resample(values, rng) for task, values in scores.items()}
    drawn_base = {task: resample(values, rng) for task, values in base_scores.items()}
    seeds = {task: min(len(scores[task]), len(base_scores[task])) for task in scores}
    differences = {}
    for task, values in scores.items():
        samples = drawn[task].mean(1) - drawn_base[task].mean(1)
        difference = values.mean() - base_scores[task].mean()
        differences[task] = (difference, *interval(samples, seeds[task]))

    def pooled_iqm(by_task: dict[str, np.ndarray]) -> np.ndarray:
        return interquartile_mean(np.concatenate(list(by_task.values()), -1))

    iqm_samples = pooled_iqm(drawn) - pooled_iqm(drawn_base)
    chances = [improvement(scores[task], base_scores[task]) for task in scores]
    chance_samples = [improvement(drawn[task], drawn_base[task]) for task in scores]
    fewest = min(seeds.values())
    iqm_difference = pooled_iqm(scores) - pooled_iqm(base_scores)
    return {
        "differences": differences,
        "iqm": (iqm_difference, *interval(iqm_samples, fewest)),
        "improvement": (np.mean(chances), *interval(np.mean(chance_samples, 0), fewest)),
    }


def describe(numbers: tuple[float, float, float], without_effect: float = 0.0) -> str:
    """A number with its interval, in bold type if that, as printed, excludes `without_effect`."""
    value, low, high = (round(number, 2) + 0.0 for number in numbers)
    sign = "" if without_effect else "+"
    text = f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"
    return f"**{text}**" if low > without_effect or high < without_effect else text


def table() -> None:
    """Write and print the comparison of every variant with its base."""
    finals, means = returns("final"), returns("mean")
    head = ("variant", "task (seeds)", "end", "difference", "training", "difference")
    lines = [f"| {' | '.join((*head, 'difference of the IQM', 'P(better)'))} |", "|---" * 8 + "|"]
    keys = dict.fromkeys(key_of(question, name) for question, name, _, _ in (BASE, *VARIANTS))
    for key in keys:
        if not finals.get(key):
            continue
        at_end, during = compare(finals[key], finals["base"]), compare(means[key], means["base"])
        rows = []
        for task, values in finals[key].items():
            digits = 1 if abs(values.mean()) < 1000 else 0
            row = [f"{task.split(':')[-1]} ({len(values)})"]
            for found, result in ((values, at_end), (means[key][task], during)):
                row.append(f"{found.mean():.{digits}f}")
                row.append("" if key == "base" else describe(result["differences"][task]))
            rows.append(row)
        cells = [key, *("<br>".join(column) for column in zip(*rows, strict=True))]
        if key != "base":
            cells += [describe(at_end["iqm"]), describe(at_end["improvement"], 0.5)]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (RESULTS / "ablation.md").write_text(text)
    print(text)


def plot() -> None:
    """One row a variant, one panel a task: the differences to the base and their intervals."""
    import matplotlib.pyplot as plt

    found = {"final": returns("final"), "mean": returns("mean")}
    tasks = [task for task in TASKS if task in found["final"]["base"]]
    keys = list(dict.fromkeys(key_of(question, name) for question, name, _, _ in VARIANTS))
    keys = [key for key in keys if found["final"].get(key)][::-1]
    differences = {
        column: {key: compare(runs[key], runs["base"])["differences"] for key in keys}
        for column, runs in found.items()
    }
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(3 + 1.6 * len(tasks), 1 + 0.21 * len(keys)), sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for panel, task in zip(panels[0], tasks, strict=True):
        for y, key in enumerate(keys):
            for column, shift, size in (("final", 0.12, 4), ("mean", -0.2, 2)):
                if task not in differences[column][key]:
                    continue
                mean, low, high = np.round(differences[column][key][task], 2)  # as in the table
                color = "C2" if low > 0 else "C3" if high < 0 else "0.5"
                ends = np.clip((low, high), -1.2, 1.2)
                panel.plot(ends, [y + shift] * 2, color=color, linewidth=size / 3)
                panel.plot(np.clip(mean, -1.2, 1.2), y + shift, "o", color=color, markersize=size)
            if y and key.split(":")[0] != keys[y - 1].split(":")[0]:  # another question
                panel.axhline(y - 0.5, color="black", linewidth=0.4)
        panel.axvline(0, color="black", linewidth=0.6)
        panel.set_xscale("symlog", linthresh=0.1)
        panel.set_xticks((-1, -0.1, -0.05, 0, 0.05, 0.1, 1), ("-1", "-.1", "", "0", "", ".1", "1"))
        panel.set_xlim(-1.3, 1.3)
        seeds = sorted({len(runs[task]) for runs in found["final"].values() if task in runs})
        words = " or ".join(str(number) for number in seeds)
        panel.set_title(f"{task.split(':')[-1]}\n{words} seeds", fontsize=8)
        panel.set_yticks(range(len(keys)), keys, fontsize=7)
        panel.set_ylim(-0.6, len(keys) - 0.4)
        panel.tick_params(axis="x", labelsize=7)
        panel.grid(axis="x", linewidth=0.3)
    words = (
        "difference to the base, linear to 0.1, then logarithmic (-1: random actions, on Taxi "
        "no delivery)\nlarge: at the end, small: during the training; green: better, red: worse, "
        "grey: no difference shown; empty: not run"
    )
    figure.supxlabel(words, fontsize=8)
    figure.savefig(RESULTS / "ablation.png", dpi=110)


def plot_value_clip() -> None:
    """What the value clip does where values are near 200: one panel a quantity.

    Explained variance is that of the runs whose return is below 900, while these are at least half:
    above, targets hardly vary.
    """
    import matplotlib.pyplot as plt

    names = {
        "return_100": "return (at most 1000)",
        "explained_variance": "explained variance",
        "value_clipfrac": "share of values that a clip of 0.2 acts on",
    }
    with open(CURVES, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["variant"] in SHOWN]
    figure, panels = plt.subplots(1, 3, figsize=(12, 2.8), layout="constrained")
    for color, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
        mine = [row for row in rows if row["variant"] == variant]
        steps = np.array([int(row["step"]) for row in mine[:POINTS]])
        run_returns = np.array([float(row["return_100"]) for row in mine]).reshape(-1, POINTS)
        learning = run_returns < 900
        hidden = ~learning | (learning.mean(0) < 0.5)  # targets hardly vary
        label = "value clip: on" if variant == "base" else variant
        for panel, name in zip(panels, names, strict=True):
            values = np.ma.array([float(row[name]) for row in mine]).reshape(-1, POINTS)
            if name == "explained_variance":
                values.mask = hidden
            panel.plot(steps, values.mean(0), color=f"C{color}", label=label)
            panel.fill_between(steps, values.min(0), values.max(0), color=f"C{color}", alpha=0.15)
    for panel, title in zip(panels, names.values(), strict=True):
        panel.set_title(title, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:.0f}k")
    panels[1].set_ylim(-0.5, 1.05)
    panels[1].set_xlim(panels[0].get_xlim())
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.savefig(RESULTS / "value_clip.png", dpi=110)


def main() -> None:
    """Run, table or plot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["run", "table", "plot"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--variants", nargs="+", default=[""], help="how their names begin")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablation")
    args = parser.parse_args()
    if args.what == "table":
        table()
    elif args.what == "plot":
        plot()
        plot_value_clip()
    else:
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT)
        lock, todo = Lock(), jobs(args.tasks, args.variants, args.seeds)
        print(f"{len(todo)} runs to do", flush=True)
        with ThreadPoolExecutor(args.workers) as pool:
            inputs = (args.runs, lock, commit.decode().strip())
            ended = [pool.submit(train, job, *inputs) for job in todo]
        for future in ended:
            future.result()  # raises what a run raised


if __name__ == "__main__":
    main()
