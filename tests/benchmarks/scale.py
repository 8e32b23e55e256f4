"""Speed-up of two processes on two cores, and what they spend on communication.

    python tests/benchmarks/scale.py [--repeats 3] [--num-minibatches 32 8 2]

HalfCheetah-v5, 8 environments x 2048 steps a rollout, 10 epochs, one thread a process, the same
total work: one process steps all 8 environments, two step 4 each; with and without --compile. Runs
alternate; rates are those from the second iteration to the last. The share of communication is the
time within collective calls, waiting for the other process included, over the time of the
iterations. Every run is a row of results/scale.csv.
"""

import argparse
import csv
import re
import statistics
import sys
from pathlib import Path

from speed import RESULTS, ROOT, run

CODE = """
import sys, time
sys.path.insert(0, {root!r})
import ppo_continuous as script
spent, ends = [0.0], []
def timed(owner, name):
    function = getattr(owner, name)
    def call(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent[0] += time.perf_counter() - start
        return result
    setattr(owner, name, call)
timed(script.distributed, "all_reduce")
timed(script.distributed, "all_gather_object")
update = script.update
def timed_update(*args):
    result = update(*args)
    ends.append((time.perf_counter(), spent[0]))
    return result
script.update = timed_update
sys.argv = [script.__file__, *{flags!r}.split()]
script.main()
if script.RANK == 0:
    (begin, before), (end, after) = ends[0], ends[-1]
    print("SPS:", (len(ends) - 1) * 8 * 2048 / (end - begin))
    print("share", (after - before) / (end - begin))
"""


def command(processes: int, flags: str) -> list[str]:
    """Start one process or two."""
    total = 5 * 8 * 2048
    flags = f"--num-envs 8 --num-steps 2048 --total-timesteps {total} --no-progress {flags}"
    code = CODE.format(root=str(ROOT), flags=flags)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(processes), "--no-python"]
    return [*(torchrun if processes > 1 else []), sys.executable, "-c", code]


def main() -> None:
    """Measure, store and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-minibatches", type=int, nargs="+", default=[32, 8, 2])
    options = parser.parse_args()
    rows = []
    for number in options.num_minibatches:
        for compiled in ("", "--compile"):
            speeds = {1: [], 2: []}
            for repeat in range(1, options.repeats + 1):
                for processes, values in speeds.items():
                    flags = f"--num-minibatches {number} {compiled}"
                    text = run(command(processes, flags), 1, Path(__file__).parent)[0]
                    numbers = dict(re.findall(r"^(SPS:|share) ([\d.e-]+)", text, re.MULTILINE))
                    values.append(float(numbers["SPS:"]))
                    row = {"minibatches": number, "compile": bool(compiled)}
                    row |= {"processes": processes, "repeat": repeat, "sps": round(values[-1])}
                    rows.append(row | {"share": round(float(numbers["share"]), 4)})
            one, two = (statistics.median(values) for values in speeds.values())
            print(f"{number} minibatches {compiled}: {one:.0f}, {two:.0f} SPS, {two / one:.2f} x")
    with open(RESULTS / "scale.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
