"""What goes wrong around a run: kills, full disks, broken environments, signals, damaged files.

A process that has imported everything forks one for each run here, which plays the whole script
as `__main__`. It has a pipe of its own to a warm parent of the workers of --vectorization async.
"""

import atexit
import contextlib
import errno
import functools
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from conftest import ROOT, alive, read_scalars
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import FileWriter

import ppo_discrete as ppo

SCRIPTS = {
    "ppo_discrete.py": "Discrete",
    "ppo_continuous.py": "Box",
    "ppo_multidiscrete_mask.py": "MultiDiscrete",
}
ENVS = ROOT / "tests" / "envs"
SIZES = "--num-steps 16 --num-minibatches 2 --update-epochs 2 --hidden-sizes 16"
OWN = f"{SIZES} --no-cuda --no-progress --run-dir r"
FLAGS = f"--num-envs 2 {OWN}"
STEPS = 32  # of an iteration


# ---- runs in forked processes


def serve() -> None:
    """Fork a run for every line of standard input; print its process, then its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored
    sys.argv = sys.argv[:1]
    ppo.parse_args()  # imports what a run does only then
    forkserver.set_forkserver_preload(["gymnasium", "tyro", "torch.utils.tensorboard", "tqdm"])
    forkserver.ensure_running()
    print(forkserver._forkserver._forkserver_pid, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        code_of(job["script"])
        if (pid := os.fork()) == 0:
            play(**job)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


@functools.cache
def code_of(script: str) -> CodeType:
    """Compile a script once for all its runs."""
    return compile(Path(script).read_bytes(), script, "exec")


def play(script: str, flags: list[str], cwd: str, before: list) -> NoReturn:
    """Be the script's process after calls of the functions `before`; for five minutes at most."""
    code = 1
    try:
        signal.alarm(300)
        os.chdir(cwd)
        for number, name in enumerate((os.devnull, "out.txt", "err.txt")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        forkserver._forkserver.ensure_running = lambda: None
        # names of event files have to sort as they were made, in one second too
        name = f"{len(list(Path('r').glob('events*'))):04}"
        event_file_writer.socket = SimpleNamespace(gethostname=lambda: name)
        for function, *args in before:
            globals()[function](*args)
        sys.argv = [script, *flags]
        sys.modules["__main__"] = module = ModuleType("__main__")
        module.__file__ = script
        exec(code_of(script), vars(module))
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The process that forks; what it and the workers say is in `said`."""
    home = tmp_path_factory.mktemp("server")
    paths = map(str, (ROOT, ROOT / "tests", ENVS))
    with open(home / "said", "w") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", "import test_faults; test_faults.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            bufsize=0,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(home)},
        )
    parent = int(process.stdout.readline())  # of the workers
    yield SimpleNamespace(process=process, parent=parent, said=home / "said", run=None)
    process.stdin.close()
    assert process.wait(30) == 0


@pytest.fixture
def start(
    server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., int]]:
    """`start(flags, *before)`: begin a run; the number of its process."""
    monkeypatch.chdir(tmp_path)

    def start(flags: Any, *before: tuple, script: str = "ppo_discrete.py") -> int:
        assert server.run is None
        for name in ("out.txt", "err.txt"):
            Path(name).write_text("")
        flags = flags.split() if isinstance(flags, str) else flags
        job = {"script": str(ROOT / script), "flags": flags, "cwd": str(tmp_path)}
        server.process.stdin.write(json.dumps(job | {"before": before}).encode() + b"\n")
        server.run = int(server.process.stdout.readline())
        return server.run

    yield start
    if server.run:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server.run, signal.SIGKILL)
        finish_run(server)


def finish_run(server: SimpleNamespace) -> int:
    """Exit code of a run, or less than 0 for a signal."""
    code = int(server.process.stdout.readline())
    server.run = None
    return code


@pytest.fixture
def finish(server: SimpleNamespace, start: Callable) -> Callable[[], tuple[int, str, str]]:
    """Wait for the run's end: exit code, standard output and error. No worker stays behind."""
    before = server.said.stat().st_size

    def finish() -> tuple[int, str, str]:
        code = finish_run(server)
        wait_until(lambda: not children(server.parent))
        workers = server.said.read_text()[before:]
        return code, Path("out.txt").read_text(), Path("err.txt").read_text() + workers

    return finish


@pytest.fixture
def run(start: Callable, finish: Callable) -> Callable[..., tuple[int, str, str]]:
    """`run(flags, *before)`: a whole run; exit code, standard output and error."""

    def run(*args: Any, **kwargs: Any) -> tuple[int, str, str]:
        start(*args, **kwargs)
        return finish()

    return run


def children(parent: int) -> list[int]:
    """Processes whose parent this is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def wait_until(happened: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for something that has to happen soon."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.002)


def complain(err: str) -> str:
    """The one line of an error without its `error: `; everything else on stderr is too much."""
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err[len("error: ") : -1]


def checkpoint(run_dir: str | Path = "r") -> dict[str, Any]:
    """Read the checkpoint of a run."""
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Whether two nests hold the same values, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def finite(state: Any) -> bool:
    """Whether all tensors in a nest of dicts are finite."""
    if isinstance(state, dict):
        return all(map(finite, state.values()))
    return not isinstance(state, torch.Tensor) or bool(torch.isfinite(state).all())


def goes_on(before: dict[str, list], after: dict[str, list]) -> bool:
    """Whether curves begin with all the points that they had before."""
    return all(after[tag][: len(rows)] == rows for tag, rows in before.items())


# ---- SIGKILL


def die_in_save(saves: int, place: int) -> None:
    """Be killed in this number of save_checkpoint, at a call that it makes or after it.

    TensorBoard's thread is slow, so that much is still to be written if nothing waits for it.
    """
    count, write = [saves, place], RecordWriter.write
    RecordWriter.write = lambda *args: time.sleep(0.05) or write(*args)

    def watch(frame: Any, event: str, _: Any) -> None:
        if frame.f_code.co_name == "save_checkpoint":
            count[0] -= event == "call"
            count[1] -= count[0] == 0 and event in ("c_call", "c_return")
            if count[1] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)


def note_places() -> None:
    """Write down where save_checkpoint can be killed: in which calls, or after them."""

    def watch(frame: Any, event: str, called: Any) -> None:
        if frame.f_code.co_name == "save_checkpoint" and event in ("c_call", "c_return"):
            places.append(f"{event} {called.__name__}")
            Path("places.json").write_text(json.dumps(places))

    places: list[str] = []
    sys.setprofile(watch)


def die_in_write(limit: int) -> None:
    """Be killed where a file gets longer than this; its first part is on the disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def test_thirty_kills(
    run: Callable, start: Callable, finish: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """A run is killed and resumed thirty times; nothing that it had saved is lost.

    Twelve times at a random moment, ten times at places spread over the calls that put the
    checkpoint into its place, four times in the middle of writing it, and four times in the
    middle of writing an event.
    """
    caplog.set_level("ERROR", "tensorboard")
    rng, flags = random.Random(1), f"{FLAGS} --hidden-sizes 64 64 --checkpoint-every 0"
    assert run(f"{flags} --total-timesteps {STEPS}", ["note_places"])[::2] == (0, "")
    places = json.loads(Path("places.json").read_text())
    for name in ("write", "fsync", "replace"):
        assert any(name in place for place in places), places
    size = Path("r/checkpoint.pt").stat().st_size
    kills = [(1, "die_in_save", rng.randint(1, 3), i * len(places) // 10) for i in range(10)]
    kills += [(1, "die_in_write", rng.randint(size // 4, size - 1)) for _ in range(4)]
    kills += [(1000, "die_in_write", rng.randint(8_000, 16_000)) for _ in range(4)]
    kills += [(1,)] * 12
    rng.shuffle(kills)
    assert len(kills) == 30
    step, leftovers, before = STEPS, 0, read_scalars("r")
    for every, *kill in kills:
        words = f"--resume r --total-timesteps 1000000 --checkpoint-every {every}"
        pid = start(words, *[kill] * bool(kill))
        if not kill:
            time.sleep(rng.uniform(0, 1))
            with contextlib.suppress(ProcessLookupError):  # then it tells why it ended
                os.kill(pid, signal.SIGKILL)
        signum = signal.SIGXFSZ if "die_in_write" in kill else signal.SIGKILL
        assert finish() == (-signum, "", ""), kill
        leftovers += Path("r/checkpoint.tmp").exists()
        last, step = step, checkpoint()["step"]
        after = read_scalars("r")
        assert last <= step <= after["losses/policy_loss"][-1][0]
        assert goes_on(before, after)
        before = {tag: [row for row in rows if row[0] <= step] for tag, rows in after.items()}
    assert leftovers > 5
    total = step + 3 * STEPS
    assert run(f"--resume r --total-timesteps {total}")[::2] == (0, "")
    after = read_scalars("r")
    assert goes_on(before, after)
    for tag, rows in after.items():
        steps = [step for step, _ in rows]
        if tag.startswith(("charts/episodic", "charts/return")):
            assert steps == sorted(set(steps)), tag
        else:
            assert steps == list(range(STEPS, total + 1, STEPS)), tag
    names = [path.name.split(".")[0] for path in Path("r").iterdir()]
    assert sorted(set(names)) == ["args", "checkpoint", "events"]
    assert names.count("checkpoint") == 1


# ---- full disks


def limit_files(size: int) -> None:
    """Let no file get longer than this; errors come as from a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fill_disk_at_fsync() -> None:
    """Notice the full disk only when the data has to go there, as on a network drive."""

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = fsync


def fill_disk_at_checkpoint() -> None:
    """Have the new checkpoint written to a device that is always full."""
    os.symlink("/dev/full", "r/checkpoint.tmp")


def fill_disk_at_events() -> None:
    """Have the next file of events written to a device that is always full."""
    host = event_file_writer.socket.gethostname()
    for second in range(int(time.time()), int(time.time()) + 300):
        os.symlink("/dev/full", f"r/events.out.tfevents.{second:010}.{host}.{os.getpid()}.0")


def has_one_curve(last: int, step: int = STEPS) -> bool:
    """Whether every iteration up to the last step has one point in TensorBoard."""
    points = read_scalars("r")["losses/policy_loss"]
    return [s for s, _ in points] == list(range(step, last + 1, step))


@pytest.mark.parametrize(
    "fill, number",
    [
        (["limit_files", 50_000], errno.EFBIG),
        (["fill_disk_at_checkpoint"], errno.ENOSPC),
        (["fill_disk_at_fsync"], errno.ENOSPC),
    ],
    ids=["limit", "device", "fsync"],
)
def test_no_space_for_a_checkpoint(run: Callable, fill: list, number: int) -> None:
    """The old one stays and goes on once there is space, and no half of a new one is left."""
    flags = f"{FLAGS} --hidden-sizes 64 64 --total-timesteps {2 * STEPS}"
    assert run(flags)[::2] == (0, "")
    before = Path("r/checkpoint.pt").read_bytes()
    flags = f"--resume r --checkpoint-every 2 --total-timesteps {6 * STEPS}"
    code, out, err = run(flags, fill)
    assert (code, out) == (1, "")
    assert os.strerror(number) in complain(err)
    assert re.search(r"\br\b", complain(err))
    assert Path("r/checkpoint.pt").read_bytes() == before
    assert sorted(path.suffix for path in Path("r").glob("checkpoint*")) == [".pt"]
    assert run(flags)[::2] == (0, "")
    assert checkpoint()["step"] == 6 * STEPS
    assert has_one_curve(6 * STEPS)


@pytest.mark.parametrize("mode", ["train", "resume", "eval"])
@pytest.mark.parametrize("how", ["limit", "device"])
def test_no_space_for_events(run: Callable, how: str, mode: str) -> None:
    """The checkpoint stays and goes on once there is space."""
    flags = f"{FLAGS} --total-timesteps {40 * STEPS}"
    if mode == "train":
        Path("r").mkdir()
    else:
        assert run(f"{FLAGS} --total-timesteps {2 * STEPS}")[::2] == (0, "")
        flags = f"--resume r --total-timesteps {40 * STEPS}" if mode == "resume" else "--eval r"
    fill, number = ["limit_files", 100 if mode == "eval" else 8_000], errno.EFBIG
    if how == "device":
        fill, number = ["fill_disk_at_events"], errno.ENOSPC
    code, out, err = run(flags, fill)
    assert (code, bool(out)) == (1, mode == "eval")
    assert os.strerror(number) in complain(err)
    assert re.search(r"\br\b", complain(err))
    for path in Path("r").glob("events*"):
        if path.is_symlink():
            path.unlink()
    if mode == "train":
        assert not list(Path("r").glob("checkpoint*"))
        return
    assert checkpoint()["step"] == 2 * STEPS
    assert run(f"--resume r --total-timesteps {4 * STEPS}")[::2] == (0, "")
    assert has_one_curve(4 * STEPS)


def test_no_space_in_a_whole_process(tmp_path: Path) -> None:
    """One line, with all that an interpreter says when it ends."""
    flags = f"{FLAGS} --total-timesteps {100 * STEPS} --checkpoint-every 0"
    result = subprocess.run(
        [sys.executable, str(ROOT / "ppo_discrete.py"), *flags.split()],
        cwd=tmp_path,
        preexec_fn=lambda: limit_files(12_000),
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert os.strerror(errno.EFBIG) in complain(result.stderr)


# ---- environments

TRAIN = f"--env-id faulty:Faulty-v0 --num-envs 3 {OWN} --checkpoint-every 1"
ROWS = 48  # of an iteration
NOISE = "100%s of the %d joints {broke} at 5% strain"  # on one line


def faulty(flags: str = "", **kwargs: Any) -> list[str]:
    """Flags of a run in such environments."""
    return [*flags.split(), "--env-kwargs", json.dumps(kwargs)]


def weak_one() -> tuple[int, int]:
    """Number of the environment that goes wrong in the last run that began, and its process."""
    rows = [map(int, line.split()) for line in Path("seeds.txt").read_text().splitlines()]
    seeds = dict(rows[-3:])
    weak = next(seed for seed in seeds if seed % 3 == 0)
    return weak - min(seeds), seeds[weak]


def broke(outcome: tuple[int, str, str], first: int, said: str = "") -> None:
    """The run ended with one line that names environment and step and says this."""
    code, out, err = outcome
    assert (code, out) == (1, "")
    line = complain(err)
    assert said in line
    assert [int(n) for n in re.findall(r"\benvironment (\d+)\b", line)] == [weak_one()[0]]
    assert first <= int(re.search(r"\bstep (\d+)", line)[1]) <= first + 3


BOTH = ["sync", "async"]
FAULTS = {  # each with what the error has to say
    "raises": NOISE,
    "raises twice": NOISE,
    "exits": "",
    "is killed": "process",
    "long observation": "(4,)",
    "flat observation": "()",
    "deep observation": "(1, 3)",
    "no observation": "",
    "nan observation": "observation",
    "inf observation": "observation",
    "long reward": "",
    "no reward": "",
    "word for a reward": "one",
    "nan reward": "reward",
    "inf reward": "reward",
}
CASES = [("async", "step", fault) for fault in FAULTS if fault.split()[0] not in ("no", "word")]
CASES += [  # test_runs.py has what is not finite
    ("sync", "step", fault) for fault in FAULTS if fault.split()[0] not in ("is", "nan", "inf")
]
CASES += [(mode, "reset", fault) for mode in BOTH for fault in ("raises", "long observation")]
CASES += [("sync", "reset", "exits"), ("async", "reset", "is killed")]
CASES += [("async", "reset", "nan observation")]


@pytest.mark.parametrize("mode, where, fault", CASES)
def test_environment_breaks(run: Callable, mode: str, where: str, fault: str) -> None:
    """In its third iteration; the checkpoint of the second one goes on."""
    flags = f"{TRAIN} --vectorization {mode} --total-timesteps {4 * ROWS}"
    row, what = (4, fault) if where == "step" else (2, f"reset: {fault}")
    outcome = run(faulty(flags, fault=what, when=33 + row))
    broke(outcome, 2 * ROWS + 3 * row, FAULTS[fault])
    assert checkpoint()["step"] == 2 * ROWS
    assert finite(checkpoint()["agent"])
    assert run(faulty("--resume r --vectorization sync"))[::2] == (0, "")
    assert has_one_curve(4 * ROWS, ROWS)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("mode, fault", [("sync", "raises"), ("async", "is killed")])
def test_environment_breaks_in_every_script(
    run: Callable, script: str, mode: str, fault: str
) -> None:
    flags = f"{TRAIN} --vectorization {mode} --total-timesteps {4 * ROWS}"
    kwargs = {"actions": SCRIPTS[script]}
    outcome = run(faulty(flags, fault=fault, **kwargs), script=script)
    broke(outcome, 2 * ROWS + 12)
    assert run(faulty("--resume r --vectorization sync", **kwargs), script=script)[::2] == (0, "")
    assert has_one_curve(4 * ROWS, ROWS)


@pytest.mark.parametrize(
    "mode, fault", [("sync", "raises"), ("async", "raises"), ("async", "is killed")]
)
def test_first_reset_breaks(run: Callable, mode: str, fault: str) -> None:
    """Nothing is written, and a checkpoint that goes on stays as it is."""
    flags = f"{TRAIN} --vectorization {mode} --total-timesteps {2 * ROWS}"
    outcomes = [run(faulty(flags, fault=f"reset: {fault}", when=0))]
    numbers = [weak_one()[0]]
    assert not Path("r").exists()
    assert run(flags)[::2] == (0, "")
    before = Path("r/checkpoint.pt").read_bytes()
    flags = "--resume r --total-timesteps 999"
    outcomes.append(run(faulty(flags, fault=f"reset: {fault}", when=0)))
    numbers.append(weak_one()[0])
    assert Path("r/checkpoint.pt").read_bytes() == before
    for number, (code, out, err) in zip(numbers, outcomes, strict=True):
        assert (code, out) == (1, "")
        assert f"environment {number}" in complain(err)


def test_first_of_several_that_break(run: Callable) -> None:
    flags = f"{TRAIN} --total-timesteps {4 * ROWS}"
    code, _, err = run(faulty(flags, fault="raises", always=True))
    assert code == 1
    assert "environment 0:" in complain(err)


def test_environment_that_is_its_own_vector_breaks(run: Callable) -> None:
    flags = f"{TRAIN} --vectorization native --total-timesteps {4 * ROWS}"
    code, out, err = run(faulty(flags, fault="raises"))
    assert (code, out) == (1, "")
    assert NOISE in complain(err)
    assert re.search(rf"\bstep {2 * ROWS + 12}\b", err)
    assert checkpoint()["step"] == 2 * ROWS


@pytest.mark.parametrize("mode", BOTH)
def test_environment_with_a_failure_of_its_own(run: Callable, mode: str) -> None:
    """What it tells in `info` is its own affair."""
    flags = f"{TRAIN} --vectorization {mode} --total-timesteps {ROWS}"
    assert run(faulty(flags, fault="own failure"))[::2] == (0, "")


def test_worker_killed_from_outside(start: Callable, finish: Callable) -> None:
    """In the middle of a rollout."""
    flags = f"{TRAIN} --vectorization async --total-timesteps {4 * ROWS}"
    start(faulty(flags, pause=2))
    wait_until(Path("there.txt").exists)
    os.kill(weak_one()[1], signal.SIGKILL)
    broke(finish(), 2 * ROWS + 12, "process")
    assert checkpoint()["step"] == 2 * ROWS


def test_death_of_a_worker_while_others_are_busy(run: Callable) -> None:
    """Nothing waits for them."""
    seed = next(seed for seed in itertools.count() if ppo.environment_seed(seed, 0) % 3 == 0)
    flags = f"{TRAIN} --vectorization async --total-timesteps {4 * ROWS} --seed {seed}"
    begun = time.monotonic()
    broke(run(faulty(flags, fault="is killed", pause_of_others=20)), 2 * ROWS + 12, "process")
    assert time.monotonic() - begun < 15


def kill_worker_at_checkpoint(number: int) -> None:
    """Kill the weak environment's process while the checkpoint of this number is written."""
    fsync, calls = os.fsync, itertools.count(1)

    def fsync_and_kill(file: int) -> None:
        fsync(file)
        if next(calls) == number:
            os.kill(weak_one()[1], signal.SIGKILL)

    os.fsync = fsync_and_kill


def test_worker_killed_between_rollouts(run: Callable) -> None:
    flags = f"{TRAIN} --vectorization async --total-timesteps {4 * ROWS}"
    broke(run(faulty(flags), ["kill_worker_at_checkpoint", 2]), 2 * ROWS, "process")
    assert checkpoint()["step"] == 2 * ROWS


@pytest.mark.parametrize(
    "script, mode, fault",
    [
        *[(script, "sync", "raises") for script in SCRIPTS],
        ("ppo_discrete.py", "async", "raises"),
        ("ppo_discrete.py", "async", "is killed"),
        ("ppo_discrete.py", "sync", "exits"),
        ("ppo_discrete.py", "sync", "reset: raises"),
        ("ppo_discrete.py", "sync", "long observation"),
        ("ppo_discrete.py", "sync", "nan observation"),
        ("ppo_discrete.py", "sync", "inf reward"),
    ],
)
def test_environment_breaks_in_an_evaluation(
    run: Callable, script: str, mode: str, fault: str
) -> None:
    kwargs = {"actions": SCRIPTS[script]}
    flags = f"{TRAIN} --total-timesteps {ROWS}"
    assert run(faulty(flags, **kwargs), script=script)[::2] == (0, "")
    before = Path("r/checkpoint.pt").read_bytes()
    flags = f"--eval r --vectorization {mode}"
    code, out, err = run(faulty(flags, fault=fault, always=True, **kwargs), script=script)
    assert (code, out.count("episode")) == (1, 5)
    line = complain(err)
    assert FAULTS[fault.removeprefix("reset: ")] in line
    assert re.search(r"\benvironment 0\b", line)
    assert Path("r/checkpoint.pt").read_bytes() == before


def test_worker_killed_in_a_whole_process(tmp_path: Path) -> None:
    """One line and no process left, with all that an interpreter does when it ends."""
    flags = f"{TRAIN} --vectorization async --total-timesteps {4 * ROWS} --num-envs 2"
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "ppo_discrete.py"),
            *faulty(flags, fault="is killed", always=True),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ENVS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = process.communicate(timeout=200)
    assert (process.returncode, out) == (1, "")
    assert re.search("process of environment [01] ", complain(err))
    wait_until(lambda: not alive(process.pid))


# ---- what is not finite


@pytest.mark.parametrize("script", ["ppo_continuous.py", "ppo_multidiscrete_mask.py"])
def test_absurd_learning_rate(run: Callable, script: str) -> None:
    """One line says what and in which iteration; the last good checkpoint stays."""
    flags = f"{TRAIN} --activation relu --total-timesteps {ROWS}"
    kwargs = {"actions": SCRIPTS[script]}
    assert run(faulty(flags, **kwargs), script=script)[::2] == (0, "")
    flags = "--resume r --learning-rate 1e9 --max-grad-norm none --no-anneal-lr"
    code, out, err = run(f"{flags} --total-timesteps {99 * ROWS}", script=script)
    assert (code, out) == (1, "")
    match = re.fullmatch(r"losses/\w+ .*\b(?:inf|nan)\b.*\biteration (\d+)", complain(err))
    assert match, err
    state = checkpoint()
    assert state["step"] == (int(match[1]) - 1) * ROWS
    assert finite(state["agent"])
    assert finite(state["optimizer"])
    flags = f"--resume r --total-timesteps {state['step'] + ROWS} --learning-rate"
    assert run(f"{flags} 0", script=script)[::2] == (0, "")


# ---- signals


def ended_by(code: int) -> int:
    """Signal that a process or its shell tells of."""
    return -code if code < 0 else code - 128


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_end_of_the_run_is_the_end_of_its_workers(
    start: Callable, finish: Callable, signum: int
) -> None:
    """Nothing but the process itself is signalled, in the middle of a rollout."""
    flags = f"{TRAIN} --checkpoint-every 0 --vectorization async --total-timesteps {4 * ROWS}"
    pid = start(faulty(flags, pause=2))
    wait_until(Path("there.txt").exists)
    os.kill(pid, signum)
    code, out, err = finish()
    assert (ended_by(code), out) == (signum, "")
    assert err == "" or signum == signal.SIGKILL  # of which a worker may complain
    if signum == signal.SIGKILL:
        assert not Path("r/checkpoint.pt").exists()
    else:
        assert checkpoint()["step"] == 2 * ROWS


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_second_signal(start: Callable, finish: Callable, signum: int, mode: str) -> None:
    """Ends a run that still waits for its environments; the last checkpoint goes on."""
    flags = f"{TRAIN} --vectorization {mode} --total-timesteps {4 * ROWS}"
    pid = start(faulty(flags, pause=3))
    wait_until(Path("there.txt").exists)
    for _ in range(2):
        os.kill(pid, signum)
        time.sleep(0.1)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 2)
    code, out, err = finish()
    assert (ended_by(code), out) == (signum, "")
    assert not re.search("Interrupt|ppo_discrete", err)  # workers may miss the process
    assert checkpoint()["step"] == 2 * ROWS


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_an_evaluation(start: Callable, finish: Callable, signum: int, mode: str) -> None:
    start(faulty(f"{TRAIN} --total-timesteps {ROWS}"))
    assert finish()[::2] == (0, "")
    before = Path("r/checkpoint.pt").read_bytes()
    pid = start(faulty(f"--eval r --vectorization {mode}", pause=2, always=True))
    wait_until(Path("there.txt").exists)
    os.kill(pid, signum)
    code, out, err = finish()
    assert (ended_by(code), err) == (signum, "")
    assert "mean" not in out
    assert Path("r/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["here", "in a worker"])
def test_signal_while_environments_are_made(
    start: Callable, finish: Callable, where: str, signum: int
) -> None:
    """To all processes, as from a terminal."""
    mode = "sync" if where == "here" else "async"
    pid = start(faulty(f"{TRAIN} --vectorization {mode}", start=where))
    wait_until(Path("starting.txt").exists)
    workers = set(map(int, Path("starting.txt").read_text().split())) - {pid}
    for process in (*workers, pid):
        os.kill(process, signum)
    code, out, err = finish()
    assert (ended_by(code), out) == (signum, "")
    assert not re.search("Interrupt|ppo_discrete", err)  # workers may miss the process
    assert err == "" or where == "in a worker"
    assert not Path("r").exists()


ENDS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("signum", ENDS)
@pytest.mark.parametrize("library", ["libtorch_cpu", "multiarray"])
def test_signal_while_packages_are_imported(tmp_path: Path, library: str, signum: int) -> None:
    """Half a second after the start; of a whole process."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "ppo_discrete.py"), "--run-dir", "r"],
        cwd=tmp_path,
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in ENDS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: library in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert (ended_by(process.returncode), out, err) == (signum, "", "")
    assert not Path("r").exists()


# ---- damaged checkpoints


@pytest.fixture
def saved(run: Callable) -> bytes:
    """A checkpoint with everything in it that a run may save."""
    flags = f"{FLAGS} --norm-obs --norm-reward --norm-value popart --total-timesteps {STEPS}"
    assert run(flags)[::2] == (0, "")
    return Path("r/checkpoint.pt").read_bytes()


@pytest.fixture
def load(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[[bytes], dict | None]:
    """What `load_checkpoint` makes of a file with this content; None where it refuses it."""

    def load(content: bytes) -> dict | None:
        path = tmp_path / "checkpoint.pt"
        path.write_bytes(content)
        state, code = {}, 0
        try:
            state = ppo.load_checkpoint("resume", str(path))
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        if state:
            assert (out, err) == ("", "")
            return state | {"args": vars(state["args"])}
        assert (code, out) == (2, "")
        assert complain(err).startswith(f"--resume {path}: ")
        return None

    return load


def test_truncated_checkpoint(saved: bytes, load: Callable) -> None:
    """At any of 20 places."""
    rng = random.Random(2)
    places = [0, 1, len(saved) - 1, *rng.sample(range(2, len(saved) - 1), 17)]
    assert load(saved) is not None
    for place in places:
        assert load(saved[:place]) is None, place


def test_flipped_byte(saved: bytes, load: Callable) -> None:
    """At 200 places: the file is refused, or nothing has changed, for there is padding in it."""
    rng, whole, loaded = random.Random(3), load(saved), []
    for place in rng.sample(range(len(saved)), 200):
        flipped = bytearray(saved)
        flipped[place] ^= rng.randrange(1, 256)
        if state := load(bytes(flipped)):
            assert same(state, whole), place
            loaded.append(place)
    assert 0 < len(loaded) < 100


@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpoint_of_another_script(run: Callable, script: str) -> None:
    """Of the same environment even, but for its actions."""
    flags, kwargs = f"{TRAIN} --total-timesteps {ROWS}", {"actions": SCRIPTS[script]}
    assert run(faulty(flags, **kwargs), script=script)[::2] == (0, "")
    before = Path("r/checkpoint.pt").read_bytes()
    for other in SCRIPTS.keys() - {script}:
        if (script, other) == ("ppo_discrete.py", "ppo_multidiscrete_mask.py"):
            continue  # which knows these actions too
        for words in ("--resume r --total-timesteps 999", "--eval r"):
            code, out, err = run(words, script=other)
            assert (code, out) == (2, "")
            assert words[:8] in complain(err) or script in err
    assert Path("r/checkpoint.pt").read_bytes() == before


# ---- long runs


def measure(every: int) -> None:
    """Write down memory, in KiB, and length of the events, in bytes, every so many steps."""

    def add_summary(writer: FileWriter, summary: Any, step: int | None = None) -> None:
        add(writer, summary, step)
        if step and step % every == 0:
            writer.flush()
            memory = re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1]
            length = next(Path("r").glob("events*")).stat().st_size
            with open("measured.txt", "a") as file:
                file.write(f"{memory} {length}\n")

    add, FileWriter.add_summary = FileWriter.add_summary, add_summary


def test_two_thousand_iterations(run: Callable) -> None:
    """Memory grows by less than 1 MiB from the 200th on; an iteration adds up to 800 bytes."""
    flags = f"{FLAGS} --num-envs 1 --num-steps 8 --num-minibatches 1 --update-epochs 1"
    flags += " --total-timesteps 16000 --checkpoint-every 100"
    assert run(flags, ("measure", 200 * 8))[::2] == (0, "")
    rows = [map(int, row.split()) for row in Path("measured.txt").read_text().splitlines()]
    memory, length = zip(*rows, strict=True)
    assert len(length) == 10
    assert memory[-1] - min(memory) < 1024
    assert length[0] < 200 * 800 + 8_000
    assert 0 < length[-1] - length[0] < 1800 * 800
