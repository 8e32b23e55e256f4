"""Speed-up of two processes on two cores, and what they spend on talking to each other.

    python tests/benchmarks/scale.py [--repeats 5] [--num-minibatches 32]

HalfCheetah-v5, 8 environments x 2048 steps a rollout, 10 epochs, one thread a process, the same
total work: one process steps all 8 environments, two step 4 each. Runs alternate; rates are those
from the second iteration to the last. The share of communication is the time within collective
calls, waiting for the other process included, over the time of the iterations. Every run is a row
of results/scale.csv.
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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-minibatches", type=int, default=32)
    options = parser.parse_args()
    flags = f"{FLAGS} --num-minibatches {options.num_minibatches}"
    code = CODE.format(root=str(ROOT), flags=flags)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    commands = {
        1: [sys.executable, "-c", code],
        2: [*torchrun, "--nproc-per-node", "2", "--no-python", sys.executable, "-c", code],
    }
    rows = []
    for repeat in range(1, options.repeats + 1):
        for processes, command in commands.items():
            text = run(command, 1, Path(__file__).parent)[0]
            row = {"processes": processes, "repeat": repeat}
            for name in ("SPS:", "share", "calls", "microseconds"):
                value = float(re.findall(rf"^{name} ([\d.e-]+)", text, re.MULTILINE)[-1])
                row[name.strip(":").lower()] = round(value, 4 if name == "share" else 0)
            rows.append(row)
            print(*row.values(), flush=True)
    with open(RESULTS / "scale.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    speeds = [
        statistics.median(row["sps"] for row in rows if row["processes"] == processes)
        for processes in (1, 2)
    ]
    share = statistics.median(row["share"] for row in rows if row["processes"] == 2)
    print(f"{speeds[0]:.0f} and {speeds[1]:.0f} SPS: {speeds[1] / speeds[0]:.2f} times", end="; ")
    print(f"{share:.1%} of the time goes into communication")


if __name__ == "__main__":
    main()
