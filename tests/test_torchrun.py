"""Several processes: equal to one that has all their environments, and what goes wrong in them."""

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, read_scalars
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import ppo_discrete as ppo

# ---- the processes: this file as a script starts them, without the time that imports take


def serve() -> None:
    """Run the jobs on standard input, one a line; answer each with its processes' exit codes."""
    del sys.modules["ppo_discrete"]  # each process is to read a RANK of its own
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = {}
        for rank in range(job["processes"]):
            pid = os.fork()
            if pid == 0:
                become(rank, port, job)
            children[pid] = rank
        codes: dict[int, int] = {}
        failed_at = float("inf")
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
                failed_at = min(failed_at, time.monotonic()) if status else failed_at
            elif time.monotonic() > failed_at + job["patience"]:  # as torchrun does
                failed_at = float("inf")
                for other in children:
                    os.kill(other, signal.SIGTERM)
            else:
                time.sleep(0.01)
        print(json.dumps([codes[rank] for rank in sorted(codes)]), flush=True)


def become(rank: int, port: int, job: dict[str, Any]) -> None:
    """Do this process's part of a job in the job's directory, and end."""
    signal.alarm(120)  # if it hangs
    os.chdir(job["cwd"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(
            os.open(f"{job['files']}/{name}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number
        )
    if job["processes"] > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"]}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        world |= {"LOCAL_WORLD_SIZE": job["processes"]}
        os.environ |= {name: str(value) for name, value in (world | job["env"]).items()}
    time.sleep(rank * job["delay"])
    script = importlib.import_module(job["script"])
    code, seen = 1, []
    try:
        part = play if "variant" in job else sum_up if "sums" in job else run_main
        code = part(script, job, seen)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    torch.save(seen, f"{job['files']}/seen.{rank}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gloo_threads() -> list[int]:
    """Scheduling of the threads by which gloo listens."""
    names = Path("/proc/self/task").glob("*/comm")
    threads = [int(name.parent.name) for name in names if "gloo_tcp" in name.read_text()]
    return [os.sched_getscheduler(thread) for thread in threads]


def addends(processes: int) -> list[list[Tensor]]:
    """What each process adds: one number, none, a gradient's worth, whole numbers."""
    rng = torch.Generator().manual_seed(0)
    sizes = ((), (0,), (12_345,), (3, 5))
    return [
        [*(torch.randn(size, generator=rng) for size in sizes), torch.tensor([rank, 1])]
        for rank in range(processes)
    ]


def sum_up(ppo: ModuleType, job: dict[str, Any], seen: list) -> int:
    """The sums over all processes, and the cores that this one may use."""
    if job["bound"] > ppo.RANK:
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    space = ACTION_SPACES["ppo_discrete"]
    ppo.join_processes(ppo.Agent(ppo.Args(), OBS_SPACE, space), 5)
    seen += [ppo.all_sum(values.clone()) for values in addends(ppo.PROCESSES)[ppo.RANK]]
    seen.append(sorted(os.sched_getaffinity(0)))
    return 0


def run_main(ppo: ModuleType, job: dict[str, Any], seen: list) -> int:
    """Run the script with the job's flags; what the first update finds is seen.

    The process of the rank `target` is sent the signal `signum` twice, in its fourth update.
    """
    update, draw, noise, updates = ppo.update, ppo.Agent.draw_noise, [], []

    def spy_draw(*args: Any) -> Tensor:
        noise.append(draw(*args))
        return noise[-1]

    def spy_update(agent: Any, *args: Any) -> Tensor:
        updates.append(None)
        if not seen:
            weights = {name: value.clone() for name, value in agent.state_dict().items()}
            seen.append({"agent": weights, "noise": noise[0].clone(), "gloo": gloo_threads()})
        if len(updates) == 4 and job.get("target") == ppo.RANK:
            signal.raise_signal(job["signum"])
            signal.raise_signal(job["signum"])  # as torchrun may
        return update(agent, *args)

    ppo.Agent.draw_noise, ppo.update = spy_draw, spy_update
    sys.argv = [f"{job['script']}.py", *job["flags"]]
    try:
        ppo.main()
    except SystemExit as stop:
        return stop.code
    return 0


# ---- the same rollouts and minibatches for any number of processes

N, T, PARTS, MINIBATCHES = 8, 16, 4, 4  # environments, steps, groups of environments
OBS_SPACE = spaces.Box(-np.inf, np.inf, (5,), np.float32)
ACTION_SPACES = {
    "ppo_discrete": spaces.Discrete(3),
    "ppo_continuous": spaces.Box(-1, 1, (2,), np.float32),
    "ppo_multidiscrete_mask": spaces.MultiDiscrete([3, 4]),
}
FLAGS = dict(
    num_envs=N,
    num_steps=T,
    num_minibatches=MINIBATCHES,
    update_epochs=4,
    total_timesteps=3 * N * T,
    hidden_sizes=(16,),
    learning_rate=3e-3,
    anneal_lr=False,
    norm_obs=False,
    norm_reward=False,
    ent_coef=0.01,
    progress=False,
    run_dir="run",
)
MIXED = dict(norm_obs=True, norm_reward=True, norm_value="popart", recompute_advantages=True)
SHORT = dict(total_timesteps=2 * N * T)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "advantages as they are": dict(norm_adv=False),
    "advantages by batch": dict(norm_adv_scope="batch"),
    "running": dict(norm_value="running"),
    "popart": dict(norm_value="popart"),
    "observations": dict(norm_obs=True),
    "rewards": dict(norm_reward=True),
    "penalty": dict(kl_coef=3.0),
    "adaptive": dict(kl_target=0.0006, kl_coef=1.0),
    "stop": dict(target_kl=0.0012),
    "stop, by batch": dict(target_kl=0.0003, norm_adv_scope="batch", critic_epochs=1),
    "value clip": dict(vclip_coef=0.02),
    "no value clip": dict(clip_vloss=False, value_loss="huber"),
    "recompute": dict(recompute_advantages=True, norm_value="running"),
    "critic epochs": dict(critic_epochs=2, critic_warmup_iterations=1),
    "reference": dict(ref_checkpoint="given", ref_kl_coef=0.5, shared_network=True),
    "mixed": MIXED,
    "next step": SHORT,
    "next step, by batch": dict(norm_adv_scope="batch", kl_target=0.0006, **SHORT),
    "next step, mixed": MIXED | SHORT,
    "next step, many episodes": {},
}
OTHERS: dict[tuple[str, str], dict[str, Any]] = {
    ("ppo_continuous", "plain"): {},
    ("ppo_continuous", "mixed"): dict(std="state"),
    ("ppo_multidiscrete_mask", "plain"): {},
    ("ppo_multidiscrete_mask", "next step"): dict(mask="none"),
}


class Playback:
    """Plays a part of N environments' seeded steps, whatever the actions are."""

    single_observation_space = OBS_SPACE

    def __init__(self, action_space: spaces.Space, part: slice, next_step: bool) -> None:
        mode = AutoresetMode.NEXT_STEP if next_step else AutoresetMode.SAME_STEP
        self.metadata, self.single_action_space = {"autoreset_mode": mode}, action_space
        self.unwrapped, self.part, self.num_envs = self, part, part.stop - part.start
        self.next_step, self.random = next_step, np.random.default_rng(3)
        self.resetting = np.zeros(N, bool)

    def reset(self, seed: int) -> tuple:
        """Begin."""
        return self.draw()[0][self.part], self.infos()

    def step(self, actions: np.ndarray) -> tuple:
        """Many ends of both kinds; the environments differ in the sizes of all that they give."""
        assert len(actions) == self.num_envs
        obs, size = self.draw()
        rewards = self.random.normal(size, size)
        ends = self.random.random((2, N)) < (0.35 if self.next_step else 0.1)
        final_obs = self.draw()[0]
        infos = self.infos()
        if self.next_step:
            rewards[self.resetting], ends[:, self.resetting] = 0, False
            self.resetting = ends.any(0)
        else:
            infos["final_obs"] = np.array([*final_obs, None], object)[:-1][self.part]
        return obs[self.part], rewards[self.part], *ends[:, self.part], infos

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Observations of all, and their sizes."""
        size = np.geomspace(0.1, 3, N)
        obs = self.random.normal(size[:, None], size[:, None], (N, *OBS_SPACE.shape))
        return obs.astype(np.float32), size

    def infos(self) -> dict[str, np.ndarray]:
        """Masks by the first choice, if there are two choices."""
        if not isinstance(self.single_action_space, spaces.MultiDiscrete):
            return {}
        first, second = self.single_action_space.nvec
        masks = self.random.random((N, first, 1 + second)) < 0.6
        masks[:, 0, 0] = masks[..., -1] = True
        return {"action_mask": masks[self.part]}


def matched_order(epoch: int, weights: Tensor, rank: int, processes: int) -> Tensor:
    """A process's rows, such that its minibatches are its part of those of a single process.

    Rows that are no step come first in the later half of the environments.
    """
    width, parts = N // processes, range(rank * PARTS // processes, (rank + 1) * PARTS // processes)
    orders = []
    for part in parts:
        rows = np.random.default_rng((epoch, part)).permutation(T * N // PARTS)
        t, n = np.divmod(rows, N // PARTS)
        rows = t * width + (part - parts[0]) * (N // PARTS) + n
        if part >= PARTS // 2:
            rows = rows[np.argsort(weights.numpy()[rows], kind="stable")]
        orders.append(rows.reshape(MINIBATCHES, -1))
    return torch.as_tensor(np.concatenate(orders, 1).flatten())


def play(ppo: ModuleType, job: dict[str, Any], seen: list) -> int:
    """Train on the recorded steps; what every update does is seen, and what is logged."""
    ppo.torch.set_num_threads(1)
    args = replace(ppo.Args(), **FLAGS | job["flags"])
    width = N // ppo.PROCESSES
    part = slice(ppo.RANK * width, (ppo.RANK + 1) * width)
    space = ACTION_SPACES[job["script"]]
    envs = Playback(space, part, job["variant"].startswith("next step"))
    torch.manual_seed(7)
    reference = ppo.Agent(args, OBS_SPACE, space) if args.ref_checkpoint else None
    agent = ppo.Agent(args, OBS_SPACE, space)
    if ppo.PROCESSES > 1:
        for tensor in agent.state_dict().values():
            tensor += ppo.RANK  # which the first process's values will replace
        ppo.join_processes(agent, 5)
    update, loss, draw, log = ppo.update, ppo.ppo_loss, ppo.Agent.draw_noise, ppo.log
    rounds = []

    def draw_part(agent: Any, steps: int, _: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(len(seen))
            return draw(agent, steps, N)[:, part]

    def spy_loss(agent: Any, batch: Any, *args: Any) -> tuple:
        inputs = (batch.obs, batch.masks) if hasattr(batch, "masks") else (batch.obs,)
        with torch.no_grad():
            logratio = agent.log_prob(agent(*inputs)[0], batch.actions) - batch.logprobs
            kl = (logratio.exp() - 1 - logratio) @ batch.weights
        rounds.append((batch.weights.sum().item(), kl.item()))
        return loss(agent, batch, *args)

    def spy_update(
        agent: Any, optimizer: Any, rollout: Any, batch: Any, args: Any, coefs: list, *rest: Any
    ) -> Tensor:
        epochs = iter(range(100 * len(seen), 100 * len(seen) + 100))
        torch.randperm = lambda n, device: matched_order(
            next(epochs), batch.weights, ppo.RANK, ppo.PROCESSES
        )
        rounds.clear()
        metrics = update(agent, optimizer, rollout, batch, args, coefs, *rest)
        seen.append(
            {
                "metrics": dict(zip(ppo.METRICS, metrics.tolist(), strict=True)),
                "beta": coefs[3],
                "steps": [group["step"] for group in optimizer.param_groups],
                "kl": [kl for _, kl in rounds],
                "weights": [weight for weight, _ in rounds],
                "agent": {name: value.clone() for name, value in agent.state_dict().items()},
            }
        )
        return metrics

    def spy_log(writer: Any, step: int, scalars: dict[str, float]) -> None:
        log(writer, step, scalars)
        seen[-1]["scalars"] = {tag: float(scalars[tag]) for tag in scalars if "SPS" not in tag}

    ppo.Agent.draw_noise, ppo.ppo_loss = draw_part, spy_loss
    ppo.update, ppo.log = spy_update, spy_log
    ppo.train(args, agent, envs, 5, reference, {})
    seen.append({"agent": agent.state_dict()})
    return 0


# ---- ways to start them


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """Run a job in some processes: exit codes, outputs, errors, what was seen, and the place."""
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def launch(processes: int, flags: Any, cwd: Path | None = None, **job: Any) -> SimpleNamespace:
        files, cwd = tmp_path_factory.mktemp("files"), cwd or tmp_path_factory.mktemp("run")
        flags = flags.split() if isinstance(flags, str) else flags
        default = {"script": "ppo_discrete", "patience": 60, "env": {}, "delay": 0}
        job = default | {"flags": flags} | job
        job |= {"processes": processes, "cwd": str(cwd), "files": str(files)}
        print(json.dumps(job), file=server.stdin, flush=True)
        codes = json.loads(server.stdout.readline())
        ranks = range(processes)
        out, err = ([(files / f"{s}.{r}").read_text() for r in ranks] for s in ("out", "err"))
        seen = [torch.load(file) for file in sorted(files.glob("seen.*"))]
        return SimpleNamespace(codes=codes, out=out, err=err, seen=seen, cwd=cwd)

    yield launch
    server.stdin.close()
    server.wait(timeout=60)


@pytest.fixture(scope="module")
def played(launch: Callable) -> Callable:
    """What each of some processes sees in a variant, which is played once."""
    kept: dict[tuple, list] = {}

    def played(processes: int, variant: str, script: str = "ppo_discrete") -> list[list[dict]]:
        key = processes, variant, script
        if key not in kept:
            flags = VARIANTS[variant] | OTHERS.get((script, variant), {})
            done = launch(processes, flags, script=script, variant=variant)
            assert (done.codes, done.err) == ([0] * processes, [""] * processes)
            kept[key] = done.seen
        return kept[key]

    return played


def torchrun(cwd: Path, flags: str, *options: str) -> subprocess.Popen:
    """Start two processes as users do."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options]
    command += ["--nproc-per-node", "2", str(ROOT / "ppo_discrete.py"), *flags.split()]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=cwd, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """Output and errors of a torchrun that ends by itself within a minute."""
    try:
        return process.communicate(timeout=60)
    finally:
        process.terminate()  # and with it what it has started


# ---- equal to one process

CASES = [(2, name, "ppo_discrete") for name in VARIANTS]
CASES += [(2, name, script) for script, name in OTHERS]
CASES += [(4, name, "ppo_discrete") for name in ("plain", "mixed", "next step")]


@pytest.mark.parametrize("processes, variant, script", CASES)
def test_equal_to_one_process(played: Callable, processes: int, variant: str, script: str) -> None:
    """Weights and normalisers after each iteration, and decisions in it."""
    (one,), first = played(1, variant, script), played(processes, variant, script)[0]
    assert len(one) == len(first) >= 3
    for mine, theirs in zip(one, first, strict=True):
        assert (theirs.get("beta"), theirs.get("steps")) == (mine.get("beta"), mine.get("steps"))
        assert mine["agent"].keys() == theirs["agent"].keys()
        for name, value in mine["agent"].items():
            rtol, atol = (1e-6, 1e-9) if "norm" in name else (0, 1e-5)
            rtol, atol = (0, 0) if name.endswith("count") else (rtol, atol)
            torch.testing.assert_close(theirs["agent"][name], value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("processes, variant, script", CASES)
def test_equal_curves(played: Callable, processes: int, variant: str, script: str) -> None:
    """All that is logged but the speed, and the metrics of `update`."""
    (one,), first = played(1, variant, script), played(processes, variant, script)[0]
    for mine, theirs in zip(one[:-1], first[:-1], strict=True):
        assert theirs["metrics"] == pytest.approx(mine["metrics"], rel=1e-4, abs=1e-6)
        assert len(mine["scalars"]) >= len(ppo.METRICS) + 7
        if variant == "next step, many episodes":  # whose last 100 come process by process
            del mine["scalars"]["charts/return_100"], theirs["scalars"]["charts/return_100"]
        assert theirs["scalars"] == pytest.approx(mine["scalars"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("processes, variant, script", CASES)
def test_processes_stay_equal(played: Callable, processes: int, variant: str, script: str) -> None:
    """Bit by bit, in every iteration."""
    first, *others = played(processes, variant, script)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            for name in ("agent", "beta", "steps", "metrics"):
                assert same(mine.get(name), theirs.get(name)), name


def same(a: Any, b: Any) -> bool:
    """Whether two values or dicts of tensors are the same, bit by bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("variant, epochs", [("stop", 3), ("stop, by batch", 2)])
def test_one_decision_to_stop(played: Callable, variant: str, epochs: int) -> None:
    """By the KL of all, where that of one process alone would have stopped earlier or later."""
    target = VARIANTS[variant]["target_kl"]
    first, second = (
        2 * np.reshape(seen[0]["kl"], (-1, MINIBATCHES)).mean(1)[:epochs]
        for seen in played(2, variant)
    )
    (one,), both = played(1, variant), (first + second) / 2
    assert (both > target).tolist() == [False] * (epochs - 1) + [True]
    assert ((first > target) != (both > target)).any()
    assert ((second > target) != (both > target)).any()
    assert one[0]["steps"][0] == epochs * MINIBATCHES


@pytest.mark.parametrize("variant", ["adaptive", "next step, by batch"])
def test_one_decision_on_beta(played: Callable, variant: str) -> None:
    """It has moved at all."""
    betas = [[round["beta"] for round in seen[:-1]] for seen in played(2, variant)]
    assert betas[0] == betas[1]
    assert betas[0][0] == 1
    assert betas[0][1] in (0.5, 2)


@pytest.mark.parametrize("processes", [2, 4])
def test_minibatch_without_a_step(played: Callable, processes: int) -> None:
    """Half of the processes have such ones, the others do not, and weights sum to 1 over all."""
    rounds = [seen[0] for seen in played(processes, "next step")]
    empty = [0 in round["weights"] for round in rounds]
    assert empty == [False] * (processes // 2) + [True] * (processes // 2)
    sums = np.sum([round["weights"] for round in rounds], 0)
    np.testing.assert_allclose(sums, 1, rtol=1e-6)


# ---- runs

RUN = """--env-id tests.envs.recorded:Recorded-v0 --num-envs 4 --num-steps 16 --num-minibatches 2
--update-epochs 2 --hidden-sizes 16 --no-progress --run-dir r --total-timesteps 640"""
STEPS, ITERATIONS = 64, 10


def record(cwd: Path) -> list[tuple[int, str, float]]:
    """What the environments wrote down: which one, what, and a value."""
    if not (cwd / "record").exists():
        return []
    lines = (cwd / "record").read_text().splitlines()
    return [(int(name), what, float(value)) for name, what, value in map(str.split, lines)]


def seeds(cwd: Path) -> list[int]:
    """Seeds of the environments."""
    return [name for name, what, _ in record(cwd) if what == "process"]


def returns(cwd: Path) -> list[float]:
    """Returns of all finished episodes."""
    return [value for _, what, value in record(cwd) if what == "return"]


def checkpoint(cwd: Path) -> dict[str, Any]:
    """Read the checkpoint of a run."""
    return torch.load(cwd / "r" / "checkpoint.pt", weights_only=True)


def curves(run_dir: Path) -> dict[str, list[tuple[int, str]]]:
    """All bits of all scalars but the speed."""
    scalars = read_scalars(run_dir)
    del scalars["charts/SPS"]
    return {tag: [(step, value.hex()) for step, value in rows] for tag, rows in scalars.items()}


def read_events(run_dir: Path, tag: str) -> list[Any]:
    """Events of a tag, which have their times."""
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return events.Scalars(tag)


def check_curves(cwd: Path, iterations: int) -> None:
    """A point an iteration and none doubled or missing; no episode may have ended in one."""
    for tag, rows in read_scalars(cwd / "r").items():
        steps, due = [step for step, _ in rows], [STEPS * (i + 1) for i in range(iterations)]
        some = tag.startswith("charts/episodic") or tag == "charts/return_100"
        assert steps == ([step for step in due if step in steps] if some else due), tag


def check_gone(cwd: Path) -> None:
    """No process that held an environment is left."""
    pids = {int(value) for _, what, value in record(cwd) if what == "process"}
    deadline = time.monotonic() + 20
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def next_second() -> None:
    """Wait until the time in the name of an event file changes."""
    time.sleep(1 - time.time() % 1)


def test_torchrun(tmp_path: Path) -> None:
    """One directory, event file, bar, curve and line for all; speed and episodes are of all."""
    flags = f'{RUN} --progress --env-kwargs {{"pause":0.005}}'
    process = torchrun(tmp_path, flags)
    out, err = finish(process)
    assert process.returncode == 0, err
    assert err.count(" 0/640 [") == 1
    line = r"r: mean return of the last (\d+) episodes ([\d.]+), (\d+) SPS\n"
    match = re.fullmatch(line, out)
    assert match, out
    assert {path.name for path in tmp_path.iterdir()} == {"r", "record"}
    names = sorted(path.name.split(".")[0] for path in (tmp_path / "r").iterdir())
    assert names == ["args", "checkpoint", "events"]
    check_curves(tmp_path, ITERATIONS)
    found = returns(tmp_path)
    assert int(match[1]) == len(found) < 100
    assert match[2] == f"{np.mean(found):.2f}"
    rates = read_events(tmp_path / "r", "charts/SPS")
    seconds = [event.step / event.value for event in rates]
    passed = rates[-1].wall_time - rates[0].wall_time
    assert seconds[-1] - seconds[0] == pytest.approx(passed, rel=0.1)
    assert int(match[3]) == pytest.approx(rates[-1].value, rel=0.1)
    assert len({value for _, what, value in record(tmp_path) if what == "process"}) == 2
    check_gone(tmp_path)


def test_start(launch: Callable) -> None:
    """Weights and all environments' seeds are those of one process; every noise is another."""
    one, two = launch(1, RUN), launch(2, RUN)
    assert (one.codes, two.codes) == ([0], [0, 0])
    assert len(set(seeds(one.cwd))) == len(seeds(one.cwd)) == 4
    assert sorted(seeds(two.cwd)) == sorted(seeds(one.cwd))
    (alone,), (first, second) = one.seen[0], (seen[0] for seen in two.seen)
    assert same(first["agent"], alone["agent"])
    assert same(second["agent"], alone["agent"])
    assert first["noise"].shape == second["noise"].shape == (16, 2, 2)
    values = torch.cat([first["noise"].flatten(), second["noise"].flatten()])
    assert len(values.unique()) == len(values)
    assert [bool(out) for out in two.out] == [True, False]
    assert two.err == ["", ""]
    if sys.platform == "linux":  # where they would spin on a core that the others need
        assert first["gloo"] == second["gloo"] == [os.SCHED_IDLE]


@pytest.mark.parametrize("processes", [2, 3, 4, 5])
def test_sums(launch: Callable, processes: int) -> None:
    """The same bits in all processes, and what float64 says."""
    done = launch(processes, "", sums=True, bound=0)
    assert (done.codes, done.err) == ([0] * processes, [""] * processes)
    for number, values in enumerate(zip(*addends(processes), strict=True)):
        expected = torch.stack(values).double().sum(0)
        for seen in done.seen:
            assert same(seen[number], done.seen[0][number])
            assert seen[number].dtype == values[0].dtype
            torch.testing.assert_close(seen[number].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="no cores of their own")
@pytest.mark.parametrize("bound", [0, 1])
def test_cores(launch: Callable, bound: int) -> None:
    """Each process has its share, all of them together; if somebody has bound one, it stays so."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("there is one core")
    first, second = (seen[-1] for seen in launch(2, "", sums=True, bound=bound).seen)
    if bound:
        assert (first, second) == (cores[:1], cores)
    else:
        assert len(first) == len(second) == len(cores) // 2
        assert set(first) | set(second) <= set(cores)
        assert not set(first) & set(second)


@pytest.mark.parametrize("before, after", [(2, 1), (2, 4), (1, 2)])
def test_resume_with_another_number(launch: Callable, before: int, after: int) -> None:
    """On from the step that was reached, in the same directory, with environments of its own."""
    cwd = launch(before, f"{RUN} --norm-obs").cwd
    assert len(checkpoint(cwd)["rng"]) == before
    count = checkpoint(cwd)["agent"]["obs_norm.count"]
    next_second()
    done = launch(after, "--resume r --total-timesteps 1280", cwd)
    assert done.codes == [0] * after, done.err
    assert same(done.seen[0][0]["agent"], done.seen[-1][0]["agent"])
    check_curves(cwd, 2 * ITERATIONS)
    assert checkpoint(cwd)["step"] == 1280
    assert checkpoint(cwd)["agent"]["obs_norm.count"] == 2 * count == 1280
    assert len(checkpoint(cwd)["rng"]) == after
    assert len(set(seeds(cwd))) == len(seeds(cwd)) == 8
    noises = [seen[0]["noise"].flatten() for seen in done.seen]
    assert len(torch.cat(noises).unique()) == 16 * 4 * 2


def test_same_seed_same_scalars(launch: Callable) -> None:
    """Bit by bit, in two runs and in two resumptions of one."""
    flags = f"{RUN} --norm-obs --norm-reward --norm-value popart --target-kl 0.001"
    runs = [launch(2, flags) for _ in range(2)]
    assert [run.codes for run in runs] == [[0, 0]] * 2
    assert curves(runs[0].cwd / "r") == curves(runs[1].cwd / "r")
    assert same(checkpoint(runs[0].cwd)["agent"], checkpoint(runs[1].cwd)["agent"])
    cwd, noises = runs[0].cwd, []
    for name in "ab":
        done = launch(2, f"--resume r --run-dir {name} --total-timesteps 1280", cwd)
        assert done.codes == [0, 0], done.err
        noises.append([seen[0]["noise"] for seen in done.seen])
    assert curves(cwd / "a") == curves(cwd / "b")
    assert len(curves(cwd / "a")["losses/policy_loss"]) == ITERATIONS
    assert same(dict(enumerate(noises[0])), dict(enumerate(noises[1])))
    before = [seen[0]["noise"] for seen in runs[0].seen]
    assert len(torch.cat([*before, *noises[0]]).unique()) == 2 * 16 * 4 * 2


# ---- faults


def faulty(fault: str, number: int, step: int = 0) -> str:
    """Flag that has one environment of all do a fault in its 37th step after this one."""
    which = ppo.environment_seed(1, step) + number
    return f'--env-kwargs {{"fault":"{fault}","which":{which}}}'


def only_line(done: SimpleNamespace) -> str:
    """What all processes together have to say, which is one line."""
    assert done.out == [""] * len(done.out)
    text = "".join(done.err)
    assert re.fullmatch(r"error: [^\n]+\n", text), text
    return text


@pytest.mark.parametrize("target", [0, 1])
def test_killed_process(launch: Callable, target: int) -> None:
    """The other one ends by itself, with a line, and leaves the checkpoint whole."""
    done = launch(2, f"{RUN} --checkpoint-every 2", target=target, signum=signal.SIGKILL)
    assert done.codes[target] == -signal.SIGKILL
    assert done.codes[1 - target] == 1
    assert done.err[target] == ""
    only_line(done)
    assert checkpoint(done.cwd)["step"] == 2 * STEPS
    assert [path.name for path in (done.cwd / "r").glob("checkpoint*")] == ["checkpoint.pt"]


def test_killed_process_leaves_no_worker(launch: Callable) -> None:
    flags = f"{RUN} --num-envs 2 --vectorization async"
    done = launch(2, flags, target=1, signum=signal.SIGKILL)
    assert done.codes == [1, -signal.SIGKILL], done.err
    assert len(seeds(done.cwd)) == 2
    check_gone(done.cwd)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("target", [0, 1])
def test_signal_to_one_process(launch: Callable, target: int, signum: int) -> None:
    """It ends all, with a checkpoint of the same iteration."""
    done = launch(2, f"{RUN} --checkpoint-every 0", target=target, signum=signum)
    assert done.codes == [128 + signum] * 2
    assert (done.out, done.err) == (["", ""], ["", ""])
    assert checkpoint(done.cwd)["step"] == 4 * STEPS
    check_curves(done.cwd, 4)


def test_restart(launch: Callable) -> None:
    """A second life meets in torchrun's store, which holds what the first one wrote."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    first = env | {"TORCHELASTIC_RESTART_COUNT": 0}
    cwd = launch(2, f"{RUN} --checkpoint-every 1", target=1, signum=signal.SIGKILL, env=first).cwd
    second = env | {"TORCHELASTIC_RESTART_COUNT": 1}
    done = launch(2, "--resume r", cwd, env=second, delay=0.5, patience=5)
    assert (done.codes, done.err) == ([0, 0], ["", ""])
    assert checkpoint(cwd)["step"] == 640


@pytest.mark.parametrize("restarts", [0, 1])
def test_killed_process_under_torchrun(launch: Callable, restarts: int) -> None:
    """All end, and not with 0; after a restart they go on to the end."""
    cwd = launch(2, f"{RUN} --checkpoint-every 1").cwd
    (cwd / "record").unlink()
    next_second()
    flags = f"--resume r --total-timesteps 1280 {faulty('kill', 3, 640)}"
    process = torchrun(cwd, flags, f"--max-restarts={restarts}")
    out, err = finish(process)
    assert (cwd / "killed").exists()
    check_gone(cwd)
    if restarts:
        assert process.returncode == 0, err
        assert out.count("mean return") == 1
        assert checkpoint(cwd)["step"] == 1280
        check_curves(cwd, 2 * ITERATIONS)
    else:
        assert process.returncode == 1
        assert out == ""
        assert checkpoint(cwd)["step"] == 640 + 2 * STEPS


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_torchrun(tmp_path: Path, signum: int) -> None:
    """A checkpoint of one step, of both processes, and nothing that the script has to say."""
    flags = f'{RUN} --checkpoint-every 0 --total-timesteps 16000 --env-kwargs {{"pause":0.01}}'
    process = torchrun(tmp_path, flags)
    while process.poll() is None and len(returns(tmp_path)) < 8:  # in the second iteration
        time.sleep(0.05)
    process.send_signal(signum)
    out, err = finish(process)
    assert process.returncode != 0
    assert out == ""
    assert "error:" not in err, err
    assert "ppo_discrete.py" not in re.sub(r"(?s)=====.*", "", err), err  # torchrun's own summary
    check_gone(tmp_path)
    state = checkpoint(tmp_path)
    assert state["step"] > 0
    assert len(state["rng"]) == 2
    check_curves(tmp_path, state["step"] // STEPS)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_before_all_are_there(tmp_path: Path, signum: int) -> None:
    """A process that waits for another one ends at once, and has written nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    world = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": address[0]}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "ppo_discrete.py"), *RUN.split()],
        cwd=tmp_path,
        env=os.environ | world | {"MASTER_PORT": str(address[1])},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with socket.socket() as other:
            while other.connect_ex(address) and process.poll() is None:
                time.sleep(0.1)
            time.sleep(1)
            process.send_signal(signum)
            _, err = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode in (-signum, 128 + signum)
    assert "Traceback" not in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("fault", ["step", "nan", "inf", "reset"])
def test_failing_environment(launch: Callable, fault: str, number: int) -> None:
    """Both end with 1, and one line names it among those of all processes, and the step."""
    done = launch(2, f"{RUN} --checkpoint-every 1 {faulty(fault, number)}")
    line = only_line(done)
    assert done.codes == [1, 1]
    match = re.search(r"\benvironment (\d+)\b.*?(?:\bstep (\d+))?$", line)
    assert int(match[1]) == number
    if fault == "reset":
        assert not (done.cwd / "r" / "checkpoint.pt").exists()
    else:
        assert 2 * STEPS + 4 * 4 <= int(match[2]) <= 2 * STEPS + 4 * 5  # its 37th, of every one
        assert checkpoint(done.cwd)["step"] == 2 * STEPS


def test_loss_not_finite(launch: Callable) -> None:
    done = launch(2, f"{RUN} --checkpoint-every 1 {faulty('large', 3)}")
    assert done.codes == [1, 1]
    assert re.search(r"losses/\w+ is (inf|nan) in iteration 3$", only_line(done))
    assert checkpoint(done.cwd)["step"] == 2 * STEPS


def test_no_place_for_the_run(launch: Callable, tmp_path: Path) -> None:
    """One line, though only the first process writes."""
    (tmp_path / "file").touch()
    done = launch(2, f"{RUN} --run-dir file/r", tmp_path, patience=0.1)
    assert "--run-dir file/r" in only_line(done)
    assert done.codes[0] == 2
    assert done.codes[1] != 0


def test_directory_of_another_run(launch: Callable, tmp_path: Path) -> None:
    launch(2, RUN, tmp_path)
    before = (tmp_path / "r" / "checkpoint.pt").read_bytes()
    done = launch(2, RUN, tmp_path, patience=0.1)
    assert "--run-dir r: holds a run" in only_line(done)
    assert done.codes[0] == 2
    assert done.codes[1] != 0
    assert (tmp_path / "r" / "checkpoint.pt").read_bytes() == before


def test_checkpoint_that_cannot_be_written(launch: Callable, tmp_path: Path) -> None:
    (tmp_path / "r" / "checkpoint.tmp").mkdir(parents=True)
    done = launch(2, f"{RUN} --checkpoint-every 1", tmp_path, patience=0.1)
    assert "cannot write to r: " in only_line(done)
    assert done.codes[0] == 1
    assert done.codes[1] != 0


# ---- bad input


@pytest.mark.parametrize(
    "processes, flags, words",
    [
        (2, "--num-envs 3", ["--num-envs 3", "2 processes"]),
        (3, "--num-envs 4", ["--num-envs 4", "3 processes"]),
        (2, "--num-minibatches 64", ["--num-minibatches 64", "64 steps", "32 a process"]),
        (4, "--num-minibatches 32", ["--num-minibatches 32", "64 steps", "16 a process"]),
        (2, "--eval {run}", ["--eval", "one process"]),
        (3, "--resume {run} --total-timesteps 1280", ["--num-envs 4", "3 processes"]),
        (2, "--resume {run}", ["--resume", "complete"]),
        (2, "--env-id Pendulum-v1", ["--env-id Pendulum-v1", "ppo_continuous.py"]),
        (2, "--learning-rate fast", ["learning-rate", "fast"]),
    ],
)
def test_bad_flag(
    launch: Callable, finished: Path, tmp_path: Path, processes: int, flags: str, words: list[str]
) -> None:
    """Exit 2, one line from one process, and nothing is written."""
    flags = flags.format(run=finished) if "{run}" in flags else f"{RUN} {flags}"
    done = launch(processes, flags, tmp_path)
    line = only_line(done)
    assert done.codes == [2] * processes
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def finished(launch: Callable) -> Path:
    """Directory of a run of two processes."""
    return launch(2, RUN).cwd / "r"


if __name__ == "__main__":
    serve()
