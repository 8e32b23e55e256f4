"""Whole runs of a script within milliseconds: forks of a process that has imported everything.

Each run is the script as `__main__` in a directory of its own, alone or under torchrun's agent.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
ENV = "--env-id tests.envs.user:User-v0"


def serve() -> dict[str, Any] | None:
    """Fork for every job on standard input, and tell process and exit code; a fork returns."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    forkserver.set_forkserver_preload(["ppo_discrete"])
    forkserver.ensure_running()
    forkserver._forkserver.ensure_running = lambda: None  # one for the workers of all runs
    tqdm.monitor_interval = 0  # no thread beside the one that forks
    tqdm.set_lock(threading.RLock())  # its own one is shared, and a killed run would keep it
    sys.argv = "ppo_discrete.py --total-timesteps 512 --no-progress --run-dir warm".split()
    importlib.import_module("ppo_discrete").main()  # imports what a run imports late
    importlib.import_module("torch.distributed.run")
    for handled in (signal.SIGINT, signal.SIGTERM):
        signal.signal(handled, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("ready", flush=True)
    for line in iter(sys.stdin.readline, ""):
        if (pid := os.fork()) == 0:
            return json.loads(line)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def play(job: dict[str, Any]) -> NoReturn:
    """Run a job and exit; without the seconds that an interpreter takes to tear torch down."""
    code: Any = 1
    try:
        launch(job)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


def launch(job: dict[str, Any]) -> None:
    """Run a job in this process, or in several that torchrun's agent forks."""
    signal.alarm(60)  # if it hangs
    os.chdir(job["cwd"])
    sys.path.insert(0, job["cwd"])
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    exec(job["before"], {})
    if job["processes"] == 1:
        return run_script(job)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(os.getpid())}
    config |= {"max_restarts": 0, "monitor_interval": 0.05, "start_method": "fork"}
    elastic_launch(LaunchConfig(1, 1, job["processes"], **config), run_script)(job)


def run_script(job: dict[str, Any]) -> None:
    """Be the script, or call the function of a test file in its place."""
    signal.alarm(60)
    sys.argv = [job["script"], *job["flags"]]
    if job["call"]:
        del sys.modules["ppo_discrete"]  # it has read another RANK
        module, function = job["call"].split(":")
        getattr(importlib.import_module(module), function)(job)
    else:
        runpy.run_path(job["script"], run_name="__main__")


@functools.cache
def server() -> subprocess.Popen:
    """Start the process that forks."""
    home = tempfile.TemporaryDirectory()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, __file__], cwd=home.name, env=env, **pipes)
    atexit.register(home.cleanup)
    atexit.register(process.stdin.close)
    process.running = None
    while process.stdout.readline() not in ("ready\n", ""):
        pass
    return process


def start(
    cwd: Path,
    flags: str,
    *more: Any,
    script: Path | str = "ppo_discrete.py",
    before: str = "",
    processes: int = 1,
    call: str = "",
) -> int:
    """Begin a run; the number of its process. `before` is code that runs first."""
    if server().running:  # of a test that failed
        kill(server().running[0], signal.SIGKILL)
        finish()
    job = {"cwd": str(cwd), "flags": [*flags.split(), *map(str, more)]}
    job |= {"script": str(ROOT / script), "before": before, "processes": processes, "call": call}
    server().stdin.write(json.dumps(job) + "\n")
    server().stdin.flush()
    server().running = int(server().stdout.readline()), cwd
    return server().running[0]


def finish() -> tuple[int, str, str]:
    """Wait for the end of the run: exit code (below 0: a signal), standard output and error."""
    _, cwd = server().running
    code = int(server().stdout.readline())
    server().running = None
    return code, (cwd / "out.txt").read_text(), (cwd / "err.txt").read_text()


def run(*args: Any, **kwargs: Any) -> tuple[int, str, str]:
    """A run from beginning to end."""
    start(*args, **kwargs)
    return finish()


def kill(pid: int, signum: int) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def exists(pid: int) -> bool:
    """Whether a process is alive; one that nobody has waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(happened: Callable[[], Any], seconds: float = 30) -> None:
    """Wait for something that has to happen soon."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


def checkpoint(run_dir: Path) -> dict[str, Any]:
    """The checkpoint of a run."""
    import torch

    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def record(cwd: Path, what: str) -> list[tuple[int, str]]:
    """(process, rest of the line) of the lines about `what` that the user's environments wrote."""
    path = cwd / "record"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(int(pid), " ".join(rest)) for pid, word, *rest in lines if word == what]


def workers_of(cwd: Path) -> set[int]:
    """Those that hold environments."""
    return {pid for pid, _ in record(cwd, "seed")}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two dicts hold the same tensors, bit by bit."""
    assert a
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


if __name__ == "__main__" and (job := serve()):
    play(job)
