"""Several processes: they make the update of one that has all their environments."""

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import read_scalars
from forks import (
    ENV,
    checkpoint,
    exists,
    finish,
    kill,
    record,
    run,
    same,
    start,
    wait_until,
    workers_of,
)
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor

# ---- the same rollouts and minibatches for any number of processes

N, T, PARTS, MINIBATCHES = 8, 16, 4, 4  # environments, steps, groups of environments
OBS_SPACE = spaces.Box(-np.inf, np.inf, (5,), np.float32)
ACTION_SPACES = {
    "ppo_discrete": spaces.Discrete(3),
    "ppo_continuous": spaces.Box(-1, 1, (2,), np.float32),
    "ppo_multidiscrete_mask": spaces.MultiDiscrete([3, 4]),
}
FLAGS = dict(num_envs=N, num_steps=T, num_minibatches=MINIBATCHES, update_epochs=4)
FLAGS |= dict(total_timesteps=3 * N * T, hidden_sizes=(16,), learning_rate=3e-3, anneal_lr=False)
FLAGS |= dict(norm_obs=False, norm_reward=False, ent_coef=0.01, progress=False)
MIXED = dict(norm_obs=True, norm_reward=True, norm_value="popart", recompute_advantages=True)
MIXED |= dict(norm_adv_scope="batch", kl_target=0.0006, critic_epochs=1)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "advantages as they are": dict(norm_adv=False, kl_coef=3.0),
    "advantages by batch": dict(norm_adv_scope="batch", vclip_coef=0.02),
    "running": dict(norm_value="running", norm_obs=True),
    "popart": dict(norm_value="popart", norm_reward=True),
    "stop": dict(target_kl=0.0012),
    "critic": dict(critic_epochs=2, critic_warmup_iterations=1, value_loss="huber"),
    "reference": dict(ref_checkpoint="given", ref_kl_coef=0.5, shared_network=True),
    "mixed": MIXED,
    "next step": dict(total_timesteps=2 * N * T),
    "next step, mixed": MIXED,
}
CASES = [("ppo_discrete", name) for name in VARIANTS]
CASES += [("ppo_continuous", "plain"), ("ppo_continuous", "mixed")]
CASES += [("ppo_multidiscrete_mask", name) for name in ("plain", "mixed", "next step")]
FOUR = [("ppo_discrete", "mixed"), ("ppo_discrete", "next step")]


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
        return self.draw()[0][self.part], self.infos()

    def step(self, actions: np.ndarray) -> tuple:
        """Many ends of both kinds; the environments differ in the sizes of all that they give."""
        obs, size = self.draw()
        rewards = self.random.normal(size, size)
        ends = self.random.random((2, N)) < (0.35 if self.next_step else 0.1)
        final_obs = self.draw()[0]
        infos = self.infos()
        if self.next_step:
            rewards[self.resetting], ends[:, self.resetting] = 0, False
            self.resetting = ends.any(0)
        elif ends.any():
            infos["final_obs"] = [*final_obs[self.part]]
        return obs[self.part], rewards[self.part], *ends[:, self.part], infos

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
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


def matched_order(epoch: int, loss_mask: Tensor, rank: int, processes: int) -> Tensor:
    """A process's samples, such that its minibatches are its part of those of a single process.

    Samples that are no step come first in the later half of the environments, so that some
    processes have minibatches without a step.
    """
    width, orders = N // processes, []
    parts = range(rank * PARTS // processes, (rank + 1) * PARTS // processes)
    for part in parts:
        samples = np.random.default_rng((epoch, part)).permutation(T * N // PARTS)
        t, n = np.divmod(samples, N // PARTS)
        samples = t * width + (part - parts[0]) * (N // PARTS) + n
        if part >= PARTS // 2:
            samples = samples[np.argsort(loss_mask.numpy()[samples], kind="stable")]
        orders.append(samples.reshape(MINIBATCHES, -1))
    return torch.as_tensor(np.concatenate(orders, 1).flatten())


def play(job: dict[str, Any]) -> None:
    """Train in the cases of the job, in this process's part of the environments."""
    for number, (script, variant) in enumerate(json.loads(job["flags"][0])):
        sys.modules.pop(script, None)
        ppo = importlib.import_module(script)
        if ppo.WORLD_SIZE > 1 and number == 0:
            torch.distributed.init_process_group("gloo")
        torch.save(play_one(ppo, script, variant), f"{number}.{ppo.RANK}")


def play_one(ppo: ModuleType, script: str, variant: str) -> dict[str, Any]:
    """The agent, and the number of its steps, after the training of a case."""
    run_dir = f"{script}, {variant}"
    args = replace(ppo.Args(), **FLAGS | VARIANTS[variant], run_dir=run_dir)
    width = N // ppo.WORLD_SIZE
    part = slice(ppo.RANK * width, (ppo.RANK + 1) * width)
    space = ACTION_SPACES[script]
    envs = Playback(space, part, variant.startswith("next step"))
    torch.manual_seed(7)
    reference = ppo.Agent(args, OBS_SPACE, space).eval() if args.ref_checkpoint else None
    agent = ppo.Agent(args, OBS_SPACE, space)
    noise, update, randperm, steps = agent.noise, ppo.update, torch.randperm, []

    def matched_update(agent: Any, optimizer: Any, rollout: Any, batch: Any, *rest: Any) -> Any:
        epochs = iter(range(100 * len(steps), 100 * len(steps) + 100))
        torch.randperm = lambda n, device: matched_order(
            next(epochs), batch["loss_mask"], ppo.RANK, ppo.WORLD_SIZE
        )
        metrics = update(agent, optimizer, rollout, batch, *rest)
        torch.randperm = randperm
        steps.append(max(int(state["step"]) for state in optimizer.state.values()))
        return metrics

    agent.noise, ppo.update = (
        SimpleNamespace(sample=lambda _: noise.sample((T, N))[:, part]),
        matched_update,
    )
    ppo.train(args, agent, reference, envs, 5, {})
    return {"agent": agent.state_dict(), "steps": steps}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Directory and what each process has in the end, for each case."""
    places: dict[int, Path] = {}

    def played(processes: int, script: str, variant: str) -> tuple[Path, list[dict]]:
        cases = FOUR if processes == 4 else CASES
        if processes not in places:
            places[processes] = tmp_path_factory.mktemp("played")
            flags, call = json.dumps(cases), "test_torchrun:play"
            code, _, err = run(places[processes], "", flags, processes=processes, call=call)
            assert code == 0, err
        files = places[processes].glob(f"{cases.index((script, variant))}.*")
        seen = [torch.load(file) for file in sorted(files)]
        assert len(seen) == processes
        return places[processes] / f"{script}, {variant}", seen

    return played


ALL = [(2, *case) for case in CASES] + [(4, *case) for case in FOUR]


@pytest.mark.parametrize("processes, script, variant", ALL)
def test_equal_to_one_process(played: Callable, processes: int, script: str, variant: str) -> None:
    """Weights, normalisers, decisions, and what is logged but speed and order of the episodes."""
    (alone, (one,)), (together, seen) = (
        played(1, script, variant),
        played(processes, script, variant),
    )
    for other in seen:
        assert other["steps"] == one["steps"]
        for name, value in one["agent"].items():
            assert torch.equal(other["agent"][name], seen[0]["agent"][name]), name  # bit by bit
            torch.testing.assert_close(other["agent"][name], value, rtol=1e-6, atol=1e-5)
    assert checkpoint(together)["args"]["kl_coef"] == checkpoint(alone)["args"]["kl_coef"]
    mine, theirs = read_scalars(alone), read_scalars(together)
    assert mine.keys() == theirs.keys()
    assert len(mine) > 15
    for tag in mine.keys() - {"charts/SPS", "charts/return_100"}:
        np.testing.assert_allclose(theirs[tag], mine[tag], rtol=2e-4, atol=2e-6, err_msg=tag)


def test_decisions_are_made(played: Callable) -> None:
    """Else the cases above would say nothing about one decision for all."""
    _, (one,) = played(1, "ppo_discrete", "stop")
    assert 0 < np.diff(one["steps"], prepend=0).min() < 4 * MINIBATCHES
    run_dir, _ = played(2, "ppo_discrete", "mixed")
    assert len({value for _, value in read_scalars(run_dir)["charts/kl_coef"]}) > 1


# ---- whole runs

STEPS = 64  # of an iteration
SIZES = "--num-envs 4 --num-steps 16 --num-minibatches 2 --update-epochs 2 --hidden-sizes 16"
RUN = f"{ENV} {SIZES} --no-cuda --no-progress --run-dir r --total-timesteps"


def spy(job: dict[str, Any]) -> None:
    """Run the script; the agent before and after training is saved."""
    ppo = importlib.import_module("ppo_discrete")
    train = ppo.train

    def spy_train(args: Any, agent: Any, *rest: Any) -> Any:
        start = {name: value.clone() for name, value in agent.state_dict().items()}
        result = train(args, agent, *rest)
        torch.save([start, agent.state_dict()], f"seen.{ppo.RANK}")
        return result

    ppo.train = spy_train
    ppo.main()


def check_points(cwd: Path, last: int) -> None:
    """One point an iteration."""
    points = [step for step, _ in read_scalars(cwd / "r")["losses/policy_loss"]]
    assert points == list(range(STEPS, last + 1, STEPS))


def test_whole_run(tmp_path: Path) -> None:
    """Equal weights, different environments, one writer; then resumed by one process, and by 4."""
    flags = f"{RUN} 256 --norm-obs"
    code, out, err = run(tmp_path, flags, processes=2, call="test_torchrun:spy")
    assert code == 0, err
    assert out.count("mean return") == 1
    (start_0, end_0), (start_1, end_1) = (torch.load(tmp_path / f"seen.{rank}") for rank in (0, 1))
    assert same(start_0, start_1)
    assert same(end_0, end_1)
    assert not same(start_0, end_0)
    seeds = record(tmp_path, "seed")
    assert len({pid for pid, _ in seeds}) == 2
    assert len({seed for _, seed in seeds}) == len(seeds) == 4
    names = sorted(path.name.split(".")[0] for path in (tmp_path / "r").iterdir())
    assert names == ["args", "checkpoint", "events"]
    check_points(tmp_path, 256)
    assert checkpoint(tmp_path / "r")["agent"]["obs_norm.count"] == 256
    for processes, total in ((1, 384), (4, 512)):
        resume = f"--resume r --total-timesteps {total}"
        assert run(tmp_path, resume, processes=processes)[0] == 0
        assert checkpoint(tmp_path / "r")["step"] == total
        assert checkpoint(tmp_path / "r")["agent"]["obs_norm.count"] == total
    check_points(tmp_path, 512)
    assert len({seed for _, seed in record(tmp_path, "seed")}) == 4 * 3
    _, out, _ = run(tmp_path, "--eval r --eval-episodes 1", processes=2)
    assert out.count("mean return") == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_agent(tmp_path: Path, signum: int) -> None:
    """Torchrun's agent passes it on; a checkpoint is saved, and all processes end."""
    flags = f"{RUN} 64000000 --checkpoint-every 0"
    pid = start(tmp_path, flags, "--env-kwargs", '{"pause": 0.005}', processes=2)
    wait_until(lambda: list((tmp_path / "r").glob("events*")))
    wait_until(lambda: len(record(tmp_path, "seed")) == 4)
    os.kill(pid, signum)
    code, _, err = finish()
    assert code != 0
    assert "FloatingPointError" not in err
    assert not any(map(exists, workers_of(tmp_path)))
    check_points(tmp_path, checkpoint(tmp_path / "r")["step"])


@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_dies(tmp_path: Path, rank: int) -> None:
    """All end, and the last checkpoint is whole."""
    flags = f"{RUN} 64000000 --checkpoint-every 1"
    start(tmp_path, flags, "--env-kwargs", '{"pause": 0.002}', processes=2)
    wait_until(lambda: (tmp_path / "r/checkpoint.pt").exists())
    pids = sorted(workers_of(tmp_path))
    kill(pids[rank], signal.SIGKILL)
    code, out, _ = finish()
    assert code == 1
    assert "mean return" not in out
    assert not any(map(exists, pids))
    assert checkpoint(tmp_path / "r")["step"] % STEPS == 0


@pytest.mark.parametrize("fault, words", [("step", "no step"), ("reward", "reward")])
def test_error_in_an_environment(tmp_path: Path, fault: str, words: str) -> None:
    """In an iteration of both processes; nothing is saved after it."""
    flags = f"{RUN} 6400 --num-envs 6 --checkpoint-every 1"
    code, _, err = run(tmp_path, flags, "--env-kwargs", f'{{"fault": "{fault}"}}', processes=2)
    assert code == 1
    assert words in err
    if fault == "step":
        assert "in environment" in err
        assert Path("envs", "user.py").as_posix() in err
    assert checkpoint(tmp_path / "r")["step"] == 6 * 16
    assert not any(map(exists, workers_of(tmp_path)))


@pytest.mark.parametrize(
    "processes, flags, words",
    [(2, "--num-envs 3", "3"), (3, "", "4"), (2, "--num-minibatches 64", "64")],
)
def test_bad_flag(tmp_path: Path, processes: int, flags: str, words: str) -> None:
    code, _, err = run(tmp_path, f"{RUN} 256 {flags}", processes=processes)
    assert code != 0
    assert any(line.startswith("error:") and words in line for line in err.splitlines())
    assert not (tmp_path / "r").exists()
