"""Speed-up of two processes on two cores, and what they spend on talking to each other.

    python tests/benchmarks/scale.py [--repeats 3] [--num-minibatches 32 4 2 1]

HalfCheetah-v5, 8 environments x 2048 steps a rollout, 10 epochs, one thread a process, the same
total work: one process steps all 8 environments, two step 4 each; with and without --compile. Runs
alternate; rates are those from the second iteration to the last. The share of communication is the
time within collective calls, waiting for the other process included, over the time of the
iterations. "apart" is what two processes reach that step 4 environments each and know nothing of
each other: no communication can do better. Every run is a row of results/scale.csv.
"""

import argparse
import csv
import re
import statistics
import sys
from pathlib import Path

from speed import RESULTS, ROOT, run

FLAGS = "--num-steps 2048 --no-progress --torch-threads 1"
CODE = """
import sys, time
sys.path.insert(0, {root!r})
import ppo_continuous as script
talk, log = script.talk, script.log
spent, logged = [0.0, 0], []
def timed(function):
    def call(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent[0] += time.perf_counter() - start
        spent[1] += 1
        return result
    return call
script.talk = timed(talk)
def mark(writer, step, scalars):
    logged.append((time.perf_counter(), step, *spent))
    log(writer, step, scalars)
script.log = mark
sys.argv = [script.__file__, *{flags!r}.split()]
script.main()
if script.RANK == 0:
    (begin, first, before, calls), (end, last, after, more) = logged[0], logged[-1]
    iterations = (last - first) / (2048 * {envs})
    print("SPS:", (last - first) / (end - begin))
    print("share", (after - before) / (end - begin))
    print("calls", (more - calls) / iterations)
    print("microseconds", (after - before) / max(more - calls, 1) * 1e6)
"""


APART = """
import os
rank, _ = os.environ.pop("RANK"), os.environ.pop("WORLD_SIZE")
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, cores[int(rank)::2])
"""


def command(processes: str, flags: str) -> list[str]:
    """What starts one process, two, or two apart."""
    envs = 4 if processes == "apart" else 8
    flags = f"{FLAGS} --num-envs {envs} --total-timesteps {5 * 2048 * envs} {flags}"
    code = CODE.format(root=str(ROOT), flags=flags, envs=envs)
    if processes == "apart":
        code = APART + code.replace("*'", "*f'--seed {rank} ", 1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "--no-python"]
    return [*([] if processes == "one" else torchrun), sys.executable, "-c", code]


def main() -> None:
    """Measure, store and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-minibatches", type=int, nargs="+", default=[32, 8, 2])
    options = parser.parse_args()
    rows = []
    cases = [(n, f) for n in options.num_minibatches for f in ("", "--compile")]
    launchers = ("one", "two", "apart")
    for number, compiled in cases:
        flags = f"--num-minibatches {number} {compiled}"
        for repeat in range(1, options.repeats + 1):
            for processes in launchers:
                text = run(command(processes, flags), 1, Path(__file__).parent)[0]
                row = {"minibatches": number, "compile": bool(compiled), "processes": processes}
                row["repeat"] = repeat
                for name in ("SPS:", "share", "calls", "microseconds"):
                    values = re.findall(rf"^{name} ([\d.e-]+)", text, re.MULTILINE)
                    value = sum(map(float, values))
                    row[name.strip(":").lower()] = round(value, 4 if name == "share" else 0)
                rows.append(row)
                print(*row.values(), flush=True)
    with open(RESULTS / "scale.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for number, compiled in cases:
        medians = {}
        for processes in launchers:
            wanted = number, bool(compiled), processes
            medians[processes] = [
                statistics.median(
                    row[name]
                    for row in rows
                    if (row["minibatches"], row["compile"], row["processes"]) == wanted
                )
                for name in ("sps", "share", "calls", "microseconds")
            ]
        for processes, (speed, share, calls, wait) in medians.items():
            print(
                f"{number} minibatches {compiled}, {processes}: {speed:.0f} SPS, "
                f"{speed / medians['one'][0]:.2f} times one process; {share:.1%} of the time in "
                f"{calls:.0f} calls an iteration of {wait:.0f} us"
            )


if __name__ == "__main__":
    main()
