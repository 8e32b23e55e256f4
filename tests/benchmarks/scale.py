"""Speed-up of two processes on two cores, and what they spend on talking to each other.

    python tests/benchmarks/scale.py [--repeats 3] [--num-minibatches 32 4 2 1]

HalfCheetah-v5, 8 environments x 2048 steps a rollout, 10 epochs, one thread a process, the same
total work: one process steps all 8 environments, two step 4 each, left to the kernel and pinned to
a core each (taskset). Runs alternate; rates are those from the second iteration to the last. The
share of communication is the time within collective calls, waiting for the other process included,
over the time of the iterations. Every run is a row of results/scale.csv.
"""

import argparse
import csv
import re
import statistics
import sys
from pathlib import Path

from speed import RESULTS, ROOT, run

FLAGS = "--num-envs 8 --num-steps 2048 --total-timesteps 81920 --no-progress --torch-threads 1"
CODE = """
import sys, time
sys.path.insert(0, {root!r})
import ppo_continuous as script
talk, log = script.talk, script.log
spent, logged = [0.0, 0], []
def timed(function):
    def call(*args):
        start = time.perf_counter()
        result = function(*args)
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
    iterations = (last - first) / 16384
    print("SPS:", (last - first) / (end - begin))
    print("share", (after - before) / (end - begin))
    print("calls", (more - calls) / iterations)
    print("microseconds", (after - before) / max(more - calls, 1) * 1e6)
"""


def main() -> None:
    """Measure, store and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-minibatches", type=int, nargs="+", default=[32, 4, 2, 1])
    options = parser.parse_args()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "--no-python"]
    pin = ["bash", "-c", 'exec taskset -c "$LOCAL_RANK" "$0" "$@"']
    launchers = {"one": [], "two": torchrun, "two, pinned": torchrun + pin}
    rows = []
    for number in options.num_minibatches:
        flags = f"{FLAGS} --num-minibatches {number}"
        command = [sys.executable, "-c", CODE.format(root=str(ROOT), flags=flags)]
        for repeat in range(1, options.repeats + 1):
            for processes, launcher in launchers.items():
                text = run([*launcher, *command], 1, Path(__file__).parent)[0]
                row = {"minibatches": number, "processes": processes, "repeat": repeat}
                for name in ("SPS:", "share", "calls", "microseconds"):
                    value = float(re.findall(rf"^{name} ([\d.e-]+)", text, re.MULTILINE)[-1])
                    row[name.strip(":").lower()] = round(value, 4 if name == "share" else 0)
                rows.append(row)
                print(*row.values(), flush=True)
    with open(RESULTS / "scale.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for number in options.num_minibatches:
        medians = {}
        for processes in launchers:
            chosen = [r for r in rows if (r["minibatches"], r["processes"]) == (number, processes)]
            medians[processes] = [
                statistics.median(row[name] for row in chosen)
                for name in ("sps", "share", "calls", "microseconds")
            ]
        for processes, (speed, share, calls, wait) in medians.items():
            print(
                f"{number} minibatches, {processes}: {speed:.0f} SPS, "
                f"{speed / medians['one'][0]:.2f} times one process; {share:.1%} of the time in "
                f"{calls:.0f} calls an iteration of {wait:.0f} us"
            )


if __name__ == "__main__":
    main()
