"""What goes wrong around a run: kills, signals, the user's own errors, numbers, full disks."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, read_scalars
from forks import ENV, checkpoint, exists, finish, kill, record, run, start, wait_until, workers_of

STEPS = 24  # of an iteration
FLAGS = "--num-envs 3 --num-steps 8 --num-minibatches 2 --update-epochs 1 --hidden-sizes 8 "
FLAGS += "--no-cuda --no-progress --run-dir r --checkpoint-every 1"
FOREVER = f"{ENV} {FLAGS} --total-timesteps 24000000"
TEN = f"{ENV} {FLAGS} --total-timesteps 240"

SCRIPTS = {
    "Discrete": "ppo_discrete.py",
    "Box": "ppo_continuous.py",
    "MultiDiscrete": "ppo_multidiscrete_mask.py",
}


def user(**kwargs: Any) -> tuple[str, str]:
    """The flag with the arguments of the user's environment."""
    return "--env-kwargs", json.dumps(kwargs)


def bad_environment(cwd: Path) -> int:
    """Number of the environment that goes wrong, among the three of the last run."""
    lines = (cwd / "record").read_text().splitlines()
    seeds = sorted(int(line.split()[2]) for line in lines if " seed " in line)[-3:]
    return next(n for n, seed in enumerate(seeds) if seed % 3 == 0)


# Killed in its second checkpoint, of which a part is written
DIE_IN_SAVE = """
import os, signal, torch
save, saves = torch.save, []
def save_a_part(state, path):
    saves.append(path)
    save(state, path)
    if len(saves) == 2:
        os.truncate(path, int(os.path.getsize(path) * {part}))
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_a_part
"""


def test_thirty_kills(tmp_path: Path) -> None:
    """A run is killed and resumed thirty times; its last checkpoint is whole and goes on.

    Twenty times at a random moment, ten times while the checkpoint is written.
    """
    rng = random.Random(1)
    kills = [{"before": DIE_IN_SAVE.format(part=rng.random())} for _ in range(10)] + [{}] * 20
    rng.shuffle(kills)
    assert run(tmp_path, f"{ENV} {FLAGS} --total-timesteps {STEPS}")[0] == 0
    steps = [STEPS]
    for how in kills:
        (tmp_path / "record").unlink(missing_ok=True)
        pid = start(tmp_path, "--resume r --total-timesteps 24000000", **how)
        if not how:
            wait_until(lambda: rng.random() < 0.01 or record(tmp_path, "seed"))
            time.sleep(rng.uniform(0, 0.2))
            kill(pid, signal.SIGKILL)
        code, _, err = finish()
        assert (code, err) == (-signal.SIGKILL, "")
        steps.append(checkpoint(tmp_path / "r")["step"])
    assert steps == sorted(steps)
    assert all(step % STEPS == 0 for step in steps)
    assert len(set(steps)) > 10
    total = steps[-1] + 2 * STEPS
    code, _, err = run(tmp_path, f"--resume r --total-timesteps {total}")
    assert (code, err) == (0, "")
    assert checkpoint(tmp_path / "r")["step"] == total
    points = [step for step, _ in read_scalars(tmp_path / "r")["losses/policy_loss"]]
    assert points == sorted(set(points))  # none twice
    assert points[-2:] == [total - STEPS, total]


def test_points_survive_a_kill(tmp_path: Path) -> None:
    """The curves have all points up to the checkpoint, for no resumed run makes them again."""
    run(tmp_path, TEN, before=DIE_IN_SAVE.format(part=0.5))
    assert checkpoint(tmp_path / "r")["step"] == STEPS
    assert run(tmp_path, "--resume r")[0] == 0
    points = [step for step, _ in read_scalars(tmp_path / "r")["losses/policy_loss"]]
    assert points == list(range(STEPS, 241, STEPS))


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves(tmp_path: Path, signum: int, mode: str) -> None:
    """In the middle of the third rollout; a terminal sends Ctrl-C to the workers as well."""
    flags = f"{FOREVER} --checkpoint-every 0 --vectorization {mode}"
    pid = start(tmp_path, flags, *user(wait=20))
    wait_until(lambda: record(tmp_path, "there"))
    workers = workers_of(tmp_path) - {pid}
    assert len(workers) == (3 if mode == "async" else 0)
    for process in (pid, *(workers if signum == signal.SIGINT else ())):
        os.kill(process, signum)
    (tmp_path / "go").touch()
    code, out, err = finish()
    assert (code, err) == (128 + signum, "")
    assert "--resume r" in out
    assert checkpoint(tmp_path / "r")["step"] == 3 * STEPS
    assert len(read_scalars(tmp_path / "r")["losses/policy_loss"]) == 3
    wait_until(lambda: not any(map(exists, workers)))
    assert run(tmp_path, f"--resume r --total-timesteps {5 * STEPS}")[0] == 0
    assert len(read_scalars(tmp_path / "r")["losses/policy_loss"]) == 5


def test_ctrl_c_in_a_terminal(tmp_path: Path) -> None:
    """It goes to all processes of a group, among them that which starts the workers."""
    command = [sys.executable, str(ROOT / "ppo_discrete.py"), *FOREVER.split(), *user(wait=60)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        [*command, "--vectorization", "async"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        **pipes,
    )
    try:
        wait_until(lambda: record(tmp_path, "there") or process.poll() is not None, 120)
        os.killpg(process.pid, signal.SIGINT)
        (tmp_path / "go").touch()
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "")
    assert "--resume r" in out
    assert checkpoint(tmp_path / "r")["step"] == 3 * STEPS


def catches(pid: int, signum: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    text = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", text)[1], 16) >> signum - 1 & 1)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_second_signal(tmp_path: Path, signum: int, mode: str) -> None:
    """Ends a run that still waits for its environment; the last checkpoint stays."""
    pid = start(tmp_path, f"{FOREVER} --vectorization {mode}", *user(wait=20))
    wait_until(lambda: record(tmp_path, "there"))
    begun = time.monotonic()
    os.kill(pid, signum)
    wait_until(lambda: not catches(pid, signum))  # the first one has arrived
    os.kill(pid, signum)
    code, out, _ = finish()
    assert time.monotonic() - begun < 5
    assert code in (-signum, 128 + signum)
    assert "mean return" not in out
    assert checkpoint(tmp_path / "r")["step"] == 2 * STEPS
    for worker in workers_of(tmp_path):  # which sleeps
        kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("actions", SCRIPTS)
@pytest.mark.parametrize("fault", ["step", "reset"])
def test_error_in_an_environment(tmp_path: Path, fault: str, actions: str) -> None:
    """In the third iteration: the traceback has the user's file, and the note the environment."""
    script = SCRIPTS[actions]
    code, _, err = run(tmp_path, TEN, *user(fault=fault, actions=actions), script=script)
    assert code == 1
    assert f"ValueError: no {fault}" in err
    assert f'{Path("envs", "user.py")}", line' in err
    assert f"environment {bad_environment(tmp_path)}" in err.splitlines()[-1]
    assert checkpoint(tmp_path / "r")["step"] == 2 * STEPS
    flags = "--resume r --total-timesteps 96"
    code, _, err = run(tmp_path, flags, *user(actions=actions), script=script)
    assert (code, err) == (0, "")


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_error_in_the_first_reset(tmp_path: Path, mode: str) -> None:
    """Only one of the seeds has it; Gymnasium resets, so that only workers are named."""
    flags = f"{TEN} --vectorization {mode}"
    code, _, err = run(tmp_path, flags, *user(fault="first reset"))
    assert code == 1
    assert f'{Path("envs", "user.py")}", line' in err
    assert not (tmp_path / "r/checkpoint.pt").exists()
    assert mode == "sync" or f"Worker-{bad_environment(tmp_path)}" in err


@pytest.mark.parametrize("fault", ["constructor", "import", "no package"])
def test_error_before_there_is_an_environment(tmp_path: Path, fault: str) -> None:
    """It is no wrong flag, and nothing is written."""
    (tmp_path / "of_user.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "as_user.py").write_text("def broken(:\n")
    module = {"import": "as_user", "no package": "of_user"}.get(fault, "tests.envs.user")
    flags = f"{TEN} --env-id {module}:User-v0 --vectorization async"
    code, _, err = run(tmp_path, flags, *user(fault=fault))
    assert code == 1
    assert f'{module.rpartition(".")[2]}.py", line' in err
    names = {"import": "def broken(:", "no package": "nothing_of_that_name"}
    assert names.get(fault, "no constructor") in err
    assert not (tmp_path / "r").exists()


def test_error_in_a_worker(tmp_path: Path) -> None:
    """The same of an environment in another process, which is named; no process is left."""
    code, _, err = run(tmp_path, f"{TEN} --vectorization async", *user(fault="step"))
    assert code == 1
    assert f'{Path("envs", "user.py")}", line' in err
    assert "no step" in err
    assert f"Worker-{bad_environment(tmp_path)}" in err
    assert checkpoint(tmp_path / "r")["step"] == 2 * STEPS
    wait_until(lambda: not any(map(exists, workers_of(tmp_path))))


@pytest.mark.parametrize("whose", ["own", "of another"])
def test_dead_worker(tmp_path: Path, whose: str) -> None:
    """It does not hang: killed by itself or from outside, in the third rollout."""
    fault = {"fault": "killed"} if whose == "own" else {"wait": 20}
    start(tmp_path, f"{TEN} --vectorization async", *user(**fault))
    if whose == "of another":
        wait_until(lambda: record(tmp_path, "there"))
        kill(record(tmp_path, "there")[0][0], signal.SIGKILL)
    code, out, err = finish()
    assert code == 1
    assert "Error" in err
    assert "mean return" not in out
    assert checkpoint(tmp_path / "r")["step"] == 2 * STEPS
    wait_until(lambda: not any(map(exists, workers_of(tmp_path))))
    assert run(tmp_path, "--resume r --vectorization sync", *user())[0] == 0


@pytest.mark.parametrize("actions", SCRIPTS)
@pytest.mark.parametrize("fault", ["reward", "observation", "losses/"])
def test_not_finite(tmp_path: Path, fault: str, actions: str) -> None:
    """The error says what, in which iteration, step and environment; nothing is saved after it."""
    kwargs = {"fault": "large reward" if fault == "losses/" else fault, "actions": actions}
    flags = f"{TEN} --norm-obs --no-norm-reward"
    code, _, err = run(tmp_path, flags, *user(**kwargs), script=SCRIPTS[actions])
    assert code == 1
    assert fault in err.splitlines()[-1]
    number = bad_environment(tmp_path)
    place = {"reward": [1, number], "observation": [2, number, 1]}.get(fault, [])
    assert [int(n) for n in re.findall(r"\d+", err.splitlines()[-1])] == [2, *place]
    state = checkpoint(tmp_path / "r")
    assert state["step"] == 2 * STEPS
    assert all(torch.isfinite(value).all() for value in state["agent"].values())
    assert len(read_scalars(tmp_path / "r")["losses/policy_loss"]) == 2


def test_final_observation_not_finite(tmp_path: Path) -> None:
    """One that only V(final observation) reads."""
    code, _, err = run(tmp_path, TEN, *user(fault="observation", at=20))
    assert (code, "observation" in err.splitlines()[-1]) == (1, True)
    assert checkpoint(tmp_path / "r")["step"] == 2 * STEPS


FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"


def test_no_space_for_a_checkpoint(tmp_path: Path) -> None:
    """The last one stays, and goes on once there is space."""
    flags = f"{TEN} --hidden-sizes 64 64"
    assert run(tmp_path, f"{flags} --total-timesteps 48")[0] == 0
    before = (tmp_path / "r/checkpoint.pt").read_bytes()
    resume = "--resume r --total-timesteps 240"
    code, _, err = run(tmp_path, resume, before=FULL.format(len(before) // 2))
    assert code == 1
    assert "Traceback" in err
    assert (tmp_path / "r/checkpoint.pt").read_bytes() == before
    assert run(tmp_path, resume)[0] == 0
    assert checkpoint(tmp_path / "r")["step"] == 240
    assert sorted(path.suffix for path in (tmp_path / "r").glob("checkpoint*")) == [".pt"]
    points = [step for step, _ in read_scalars(tmp_path / "r")["losses/policy_loss"]]
    assert points == sorted(set(points))
