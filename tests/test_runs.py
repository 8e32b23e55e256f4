"""Whole runs: repeatable, resumed, interrupted, broken off, evaluated."""

import copy
import gc
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, alive, read_scalars
from gymnasium.envs.classic_control import CartPoleEnv
from tensorboard.summary.writer import event_file_writer

import ppo_discrete as ppo

SIZES = "--num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 2 --hidden-sizes 16"
FLAGS = f"{SIZES} --no-progress --run-dir r"
STEPS = 32  # of an iteration
ITERATIONS = 8
TOTAL = f"--total-timesteps {STEPS * ITERATIONS}"

KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import ppo_discrete as ppo

log, update, updates = ppo.log, ppo.update, []

def log_and_flush(writer, step, scalars):
    log(writer, step, scalars)
    writer.flush()

def update_and_die(*args):
    updates.append(update(*args))
    if len(updates) == {updates}:
        os.kill(os.getpid(), signal.SIGKILL)
    return updates[-1]

ppo.log, ppo.update = log_and_flush, update_and_die
ppo.main()
"""


SLOW = """
import time
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

class Slow(CartPoleEnv):
    def __init__(self, pause=0, render_mode=None):
        super().__init__(render_mode=render_mode)
        self.pause = pause

    def step(self, action):
        time.sleep(self.pause)
        return super().step(action)

gym.register("Slow-v0", Slow)
"""


class Recorded(CartPoleEnv):
    """CartPole of at most fifty steps that writes down what happens to it."""

    seeds: list[int] = []
    steps: list[tuple[np.ndarray, int]] = []
    returns: list[float] = []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Write down the seed."""
        if seed is not None:
            self.seeds.append(seed)
        self.total = 0.0
        self.before, info = super().reset(seed=seed, options=options)
        return self.before, info

    def step(self, action: int) -> tuple:
        """Write down observation and action, and the return at the end."""
        self.steps.append((self.before, int(action)))
        self.before, reward, terminated, truncated, info = super().step(action)
        self.total += reward
        truncated = self.total == 50
        if terminated or truncated:
            self.returns.append(self.total)
        return self.before, reward, terminated, truncated, info


class Broken(gym.Env):
    """One of three environments goes wrong in its 37th step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Discrete(2)
    seeds: list[int] = []

    def __init__(self, what: str = "", value: str = "nan", render_mode: None = None) -> None:
        self.what, self.value, self.t = what, float(value), 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Begin an episode; with "reset" its first observation is wrong."""
        super().reset(seed=seed)
        if seed is not None:
            self.seeds.append(seed)
            self.weak = seed % 3 == 0
        return self.draw(self.what == "reset"), {}

    def step(self, action: int) -> tuple:
        """Truncated every seventh step; with "final" that observation is wrong."""
        self.t += 1
        truncated, now = self.t % 7 == 0, self.t == 37
        wrong = (self.what == "observation" and now) or (self.what == "final" and truncated)
        reward = self.value if self.what == "reward" and now and self.weak else 1.0
        return self.draw(wrong), reward, False, truncated, {}

    def draw(self, wrong: bool) -> np.ndarray:
        """Noise, perhaps with a wrong number in it."""
        obs = self.np_random.normal(size=3).astype(np.float32)
        obs[1] = self.value if wrong and self.weak else obs[1]
        return obs


gym.register("Recorded-v0", Recorded)
gym.register("Broken-v0", Broken)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty records, and names of event files that sort as they are made, in one second too."""
    for name in ("seeds", "steps", "returns"):
        monkeypatch.setattr(Recorded, name, [])
    monkeypatch.setattr(Broken, "seeds", [])
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(10_000))


@pytest.fixture
def train(main: Callable) -> Callable[[str], str]:
    """`train(flags)`: a run that has to succeed, and to say nothing on stderr; its output."""

    def train(flags: str = "", code: int = 0) -> str:
        got, out, err = main(*flags.split())
        assert (got, err) == (code, "")
        return out

    return train


def curves(run_dir: str | Path = "r", last: float = math.inf) -> dict[str, list[tuple[int, str]]]:
    """All bits of all scalars but the speed."""
    scalars = read_scalars(run_dir)
    del scalars["charts/SPS"]
    return {
        tag: [(step, value.hex()) for step, value in rows if step <= last]
        for tag, rows in scalars.items()
    }


def curve(tag: str, run_dir: str | Path = "r") -> list[float]:
    """Values of one tag, a point an iteration and none doubled or missing."""
    steps, values = zip(*read_scalars(run_dir)[tag], strict=True)
    assert list(steps) == [STEPS * (i + 1) for i in range(len(steps))]
    return list(values)


def checkpoint(run_dir: str | Path = "r") -> dict[str, Any]:
    """Read the checkpoint of a run."""
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def next_second() -> None:
    """Wait until the time in the name of an event file changes."""
    time.sleep(1 - time.time() % 1)


def after_update(patch: pytest.MonkeyPatch, number: int, do: Callable[[], object]) -> None:
    """Have something done at the end of the update of this number."""
    update, calls = ppo.update, []

    def counted(*args: Any) -> torch.Tensor:
        metrics = update(*args)
        calls.append(None)
        if len(calls) == number:
            do()
        return metrics

    patch.setattr(ppo, "update", counted)


def interrupted(train: Callable, patch: pytest.MonkeyPatch, updates: int, flags: str) -> None:
    """Train, with a Ctrl-C in the update of this number."""
    with patch.context() as inner:
        after_update(inner, updates, lambda: signal.raise_signal(signal.SIGINT))
        assert train(flags, code=130) == ""
    assert checkpoint()["step"] % STEPS == 0


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dicts and lists hold the same values, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def finite(state: Any) -> bool:
    """Whether all tensors in a nest of dicts are finite."""
    if isinstance(state, dict):
        return all(map(finite, state.values()))
    return not isinstance(state, torch.Tensor) or bool(torch.isfinite(state).all())


# ---- seeds


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--norm-obs --norm-reward --norm-value popart --shared-network --recompute-advantages",
        "--vectorization native --target-kl 0.001 --critic-epochs 1",
    ],
)
def test_same_seed_same_scalars(train: Callable, flags: str) -> None:
    """Bit for bit; and another seed gives others."""
    for run_dir, seed in (("a", 5), ("b", 5), ("c", 6)):
        train(f"{FLAGS} {TOTAL} {flags} --run-dir {run_dir} --seed {seed}")
    assert curves("a") == curves("b")
    assert same(checkpoint("a")["agent"], checkpoint("b")["agent"])
    assert curves("a").keys() == curves("c").keys()
    for tag in ("losses/policy_loss", "losses/value_loss", "values/mean", "losses/grad_norm"):
        assert all(a != c for a, c in zip(curves("a")[tag], curves("c")[tag], strict=True))


def test_seeds_of_environments(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """All different, in a run, after its resumption and in another run; equal for equal seed."""
    seeds = {}
    interrupted(train, monkeypatch, 2, f"{FLAGS} {TOTAL} --env-id Recorded-v0 --num-envs 4")
    seeds["first"] = Recorded.seeds.copy()
    flags = [
        ("resumed", "--resume r"),
        ("other", f"{FLAGS} {TOTAL} --env-id Recorded-v0 --num-envs 4 --run-dir s --seed 2"),
        ("equal", f"{FLAGS} {TOTAL} --env-id Recorded-v0 --num-envs 4 --run-dir t --seed 1"),
        ("evaluated", "--eval r"),
    ]
    for name, words in flags:
        Recorded.seeds.clear()
        train(words)
        seeds[name] = Recorded.seeds.copy()
    assert seeds["first"] == seeds["equal"]
    assert len(seeds["evaluated"]) == 1
    distinct = seeds["first"] + seeds["resumed"] + seeds["other"]
    assert len(set(distinct)) == len(distinct) == 12


def test_first_rollout(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal for equal seed under other flags of the update; different in each environment."""
    rollouts = []
    collect = ppo.collect

    def spy(agent: Any, envs: Any, rollout: Any, *args: Any) -> None:
        collect(agent, envs, rollout, *args)
        rollouts.append((rollout.obs.clone(), rollout.actions.clone()))

    monkeypatch.setattr(ppo, "collect", spy)
    for name, flags in (("a", ""), ("b", "--learning-rate 0.1 --gamma 0.5"), ("c", "--seed 2")):
        train(f"{FLAGS} --total-timesteps {STEPS} --run-dir {name} {flags}")
    a, b, c = rollouts
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], c[0])
    assert not torch.equal(a[0][0, 0], a[0][0, 1])
    assert not torch.equal(a[1][:, 0], a[1][:, 1])


# ---- the loop


@pytest.mark.parametrize("minibatches", [1, 4, 32])
def test_minibatches_partition_the_batch(
    train: Callable, monkeypatch: pytest.MonkeyPatch, minibatches: int
) -> None:
    """Every epoch has each row once, whole, and in another order (trap 28)."""
    batches, seen = [], []
    make_batch, ppo_loss = ppo.make_batch, ppo.ppo_loss

    def rows(batch: ppo.Batch) -> list[tuple]:
        names = ("obs", "actions", "logprobs", "dists", "targets", "values")
        parts = [getattr(batch, name).reshape(len(batch.obs), -1).double() for name in names]
        return [tuple(row) for row in torch.cat(parts, 1).tolist()]

    def spy_batch(*args: Any) -> ppo.Batch:
        batch = make_batch(*args)
        batches.append(rows(batch))
        return batch

    def spy_loss(agent: Any, batch: ppo.Batch, *args: Any) -> tuple:
        seen.append(rows(batch))
        assert batch.weights.sum().item() == pytest.approx(1)
        return ppo_loss(agent, batch, *args)

    monkeypatch.setattr(ppo, "make_batch", spy_batch)
    monkeypatch.setattr(ppo, "ppo_loss", spy_loss)
    train(f"{FLAGS} --total-timesteps 64 --num-minibatches {minibatches} --update-epochs 3")
    assert len(batches) == 2
    assert len(seen) == 2 * 3 * minibatches
    orders = []
    for i, batch in enumerate(batches):
        for epoch in range(3):
            first = (3 * i + epoch) * minibatches
            parts = seen[first : first + minibatches]
            assert {len(part) for part in parts} == {STEPS // minibatches}
            orders.append([row for part in parts for row in part])
            assert sorted(orders[-1]) == sorted(batch)
            assert len(set(orders[-1])) == STEPS
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def down(rate: float) -> list[float]:
    """Line from `rate` towards zero, which the iteration after the last would reach."""
    return [rate * (ITERATIONS - i) / ITERATIONS for i in range(ITERATIONS)]


def flat(rate: float) -> list[float]:
    """The same all the time."""
    return [rate] * ITERATIONS


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    "flags, actor, critic, entropy",
    [
        ("--learning-rate 0.002", down(0.002), down(0.002), flat(0.01)),
        ("--learning-rate 0.002 --no-anneal-lr", flat(0.002), flat(0.002), flat(0.01)),
        ("--actor-learning-rate 0.003", down(0.003), down(2.5e-4), flat(0.01)),
        ("--critic-learning-rate 0.003 --no-anneal-lr", flat(2.5e-4), flat(0.003), flat(0.01)),
        ("--actor-learning-rate 0 --critic-learning-rate 0.001", flat(0), down(0.001), flat(0.01)),
        (
            "--ent-coef 0.05 --ent-coef-final 0",
            down(2.5e-4),
            down(2.5e-4),
            [0.05 * (1 - i / (ITERATIONS - 1)) for i in range(ITERATIONS)],
        ),
        (
            "--ent-coef 0 --ent-coef-final 0.07 --no-anneal-lr",
            flat(2.5e-4),
            flat(2.5e-4),
            [0.01 * i for i in range(ITERATIONS)],
        ),
    ],
)
def test_schedules(
    train: Callable,
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
    actor: list[float],
    critic: list[float],
    entropy: list[float],
    resumed: bool,
) -> None:
    """What the update gets and what is logged lie on the line, across a resumption too (29)."""
    got = []
    update = ppo.update

    def spy(*args: Any) -> torch.Tensor:
        rates = [group["lr"] for group in args[1].param_groups]
        got.append([*rates, -args[5][2]])
        return update(*args)

    monkeypatch.setattr(ppo, "update", spy)
    if resumed:
        interrupted(train, monkeypatch, 3, f"{FLAGS} {TOTAL} {flags}")
        train("--resume r")
    else:
        train(f"{FLAGS} {TOTAL} {flags}")
    assert len(got) == ITERATIONS
    np.testing.assert_allclose(got, np.transpose([actor, critic, entropy]), rtol=1e-6, atol=1e-9)
    assert curve("charts/learning_rate") == pytest.approx(actor, rel=1e-6)
    assert curve("charts/ent_coef") == pytest.approx(entropy, rel=1e-6)
    assert min(critic) > 0


def test_steps_beyond_whole_iterations(train: Callable) -> None:
    """Total timesteps are an upper bound."""
    train(f"{FLAGS} --total-timesteps {3 * STEPS + STEPS - 1}")
    assert len(curve("losses/policy_loss")) == 3
    assert checkpoint()["step"] == 3 * STEPS


@pytest.mark.parametrize("every, steps", [(3, [96, 192, 256]), (0, [256]), (100, [256])])
def test_checkpoint_every(
    train: Callable, monkeypatch: pytest.MonkeyPatch, every: int, steps: list[int]
) -> None:
    saved = []
    save = ppo.save_checkpoint
    monkeypatch.setattr(
        ppo, "save_checkpoint", lambda path, state: saved.append(state["step"]) or save(path, state)
    )
    train(f"{FLAGS} {TOTAL} --checkpoint-every {every}")
    assert saved == steps


@pytest.mark.parametrize(
    "factor, beta", [(1.7, 0.5), (1.4, 1.0), (1.0, 1.0), (1 / 1.4, 1.0), (1 / 1.6, 2.0)]
)
@pytest.mark.parametrize("first", [0.0, 0.3])
def test_kl_target_adapts_beta(
    train: Callable, monkeypatch: pytest.MonkeyPatch, factor: float, beta: float, first: float
) -> None:
    """Beta doubles above 1.5 x target, halves below target / 1.5, and holds between."""
    kls = []
    update = ppo.update

    def spy(agent: Any, optimizer: Any, rollout: Any, batch: Any, *args: Any) -> Any:
        old, obs = agent(batch.obs)[0].detach().double(), batch.obs
        metrics = update(agent, optimizer, rollout, batch, *args)
        new = agent(obs)[0].detach().double()
        categorical = torch.distributions.Categorical
        kl = torch.distributions.kl_divergence(categorical(logits=old), categorical(logits=new))
        kls.append(kl.mean().item())
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "update", spy)
        train(f"{FLAGS} --total-timesteps {STEPS} --kl-coef {first} --kl-target 1 --run-dir a")
    target = kls[0] * factor
    assert target > 0
    train(f"{FLAGS} --total-timesteps {2 * STEPS} --kl-coef {first} --kl-target {target}")
    start = first or 1.0
    assert curve("charts/kl_coef") == pytest.approx([start, start * beta])


def test_beta_goes_on(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps halving when nothing moves, and resumed it goes on where it was."""
    interrupted(train, monkeypatch, 3, f"{FLAGS} {TOTAL} --kl-target 0.1 --learning-rate 0")
    train("--resume r")
    assert curve("charts/kl_coef") == [0.5**i for i in range(ITERATIONS)]
    train(f"{FLAGS} {TOTAL} --kl-coef 0.25 --run-dir s")
    assert curve("charts/kl_coef", "s") == [0.25] * ITERATIONS


def test_beta_waits_for_the_policy(train: Callable) -> None:
    """While the critic warms up there is no KL to aim at a target."""
    train(f"{FLAGS} {TOTAL} --kl-target 0.1 --learning-rate 0 --critic-warmup-iterations 2")
    assert curve("charts/kl_coef") == [1, 1] + [0.5**i for i in range(ITERATIONS - 2)]


def test_reference_policy(train: Callable) -> None:
    """A weight on the KL to a reference pulls the policy to it, which stays as it is."""
    train(f"{FLAGS} --total-timesteps 2048 --learning-rate 0.01 --run-dir ref --seed 2")
    before = Path("ref/checkpoint.pt").read_bytes()
    for name, coef in (("with", 10), ("without", 0)):
        train(
            f"{FLAGS} --total-timesteps 2048 --learning-rate 0.01 --run-dir {name} --seed 3"
            f" --ref-checkpoint ref --ref-kl-coef {coef}"
        )
    near, far = (np.array(curve("losses/ref_kl", name)) for name in ("with", "without"))
    assert far.min() > 0
    assert near[-10:].mean() < 0.1 * min(near[0], far[-10:].mean())
    assert Path("ref/checkpoint.pt").read_bytes() == before
    shutil.rmtree("ref")
    assert "of 10 episodes" in train("--eval with")  # which needs no reference


# ---- what a run writes


def test_args_json(train: Callable) -> None:
    """All flags, as they were used."""
    Path("x-1").mkdir()
    train(f"{FLAGS} {TOTAL} --clip-obs none --gamma 0.9 --exp-name x --run-dir {{exp}}-{{seed}}")
    given = dict(
        num_envs=2,
        num_steps=16,
        num_minibatches=2,
        update_epochs=2,
        hidden_sizes=[16],
        progress=False,
        total_timesteps=256,
        clip_obs=None,
        gamma=0.9,
        exp_name="x",
        run_dir="x-1",
    )
    args = json.loads(Path("x-1/args.json").read_text())
    assert args == asdict(ppo.Args()) | given
    assert sorted(p.name.split(".")[0] for p in Path("x-1").iterdir()) == [
        "args",
        "checkpoint",
        "events",
    ]


def test_checkpoint_content(train: Callable) -> None:
    """It loads without running code, and holds all that goes on."""
    train(f"{FLAGS} {TOTAL} --norm-obs --norm-reward --norm-value running")
    state = checkpoint()
    assert state["args"] == vars(ppo.Args(**state["args"]))
    assert (state["args"]["num_steps"], state["args"]["norm_obs"]) == (16, True)
    assert state["step"] == 256
    for name in ("obs_norm", "reward_norm", "value_norm"):
        assert state["agent"][f"{name}.count"] == 256
    assert state["optimizer"]["steps"] == [ITERATIONS * 2 * 2] * 2
    assert state["optimizer"]["average"].any()
    assert state["optimizer"]["square"].any()
    generator = torch.Generator()
    generator.set_state(state["rng"][0])
    assert finite(state)


def test_end_line(train: Callable) -> None:
    """Directory, mean return of the last 100 episodes, steps a second."""
    start = time.perf_counter()
    out = train(f"{FLAGS} --total-timesteps 1024 --env-id Recorded-v0")
    longest = time.perf_counter() - start
    line = re.fullmatch(r"r: mean return of the last (\d+) episodes ([\d.]+), (\d+) SPS\n", out)
    assert int(line[1]) == len(Recorded.returns) < 100
    assert float(line[2]) == pytest.approx(np.mean(Recorded.returns), abs=0.051)
    assert int(line[3]) > 1024 / longest - 1


def test_end_line_counts_the_last_hundred(train: Callable) -> None:
    out = train(f"{FLAGS} --total-timesteps 4096 --env-id Recorded-v0 --learning-rate 0")
    assert len(Recorded.returns) > 110
    mean = np.mean(Recorded.returns[-100:])
    assert re.search(rf"the last 100 episodes {mean:.2f},", out)


def test_end_line_without_episodes(train: Callable) -> None:
    out = train(f"{SIZES} --no-progress --run-dir r --num-steps 4 --total-timesteps 8")
    assert re.fullmatch(r"r: mean return of the last 0 episodes unknown, \d+ SPS\n", out)


def test_progress_bar(main: Callable) -> None:
    """One bar with steps, rate, time left and the return that the last line tells too."""
    code, out, err = main(*f"{SIZES} {TOTAL} --run-dir r --progress".split())
    assert code == 0
    mean = re.search(r"episodes ([\d.]+),", out)[1]
    bar = err.split("\r")[-1]
    assert re.fullmatch(
        rf"100%\|.*\| 256/256 \[\d\d:\d\d<\d\d:\d\d, .*step/s, return {mean}\]\n", bar
    )
    assert err.count("\n") == 1


def test_save_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that breaks off leaves the old checkpoint whole."""
    path, save = tmp_path / "checkpoint.pt", torch.save
    ppo.save_checkpoint(path, {"step": 1})

    def half(state: dict, file: Any) -> None:
        assert torch.load(path, weights_only=True) == {"step": 1}
        save(state, tmp_path / "whole")
        whole = (tmp_path / "whole").read_bytes()
        if isinstance(file, (str, Path)):
            Path(file).write_bytes(whole[:100])
        else:
            file.write(whole[:100])
            file.flush()
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="disk full"):
            ppo.save_checkpoint(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}
    ppo.save_checkpoint(path, {"step": 3})
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "whole"]


# ---- resume


def test_resumed_state(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks, normalisers, moments of Adam and random states are those of the checkpoint."""
    flags = f"{FLAGS} {TOTAL} --norm-obs --norm-reward --norm-value popart"
    interrupted(train, monkeypatch, 3, flags)
    state, got = checkpoint(), []
    assert state["step"] == 3 * STEPS
    collect, update = ppo.collect, ppo.update

    def spy_collect(agent: Any, *args: Any) -> None:
        got.append({k: v.clone() for k, v in agent.state_dict().items()})
        got.append(torch.get_rng_state())
        collect(agent, *args)

    def spy_update(agent: Any, optimizer: Any, *args: Any) -> Any:
        got.append(copy.deepcopy(optimizer.state_dict()))
        return update(agent, optimizer, *args)

    monkeypatch.setattr(ppo, "collect", spy_collect)
    monkeypatch.setattr(ppo, "update", spy_update)
    train("--resume r")
    assert same(got[0], state["agent"])
    assert torch.equal(got[1], state["rng"][0])
    assert same(got[2], state["optimizer"])
    assert checkpoint()["agent"]["obs_norm.count"] == ITERATIONS * STEPS


def test_resume_of_a_resumed_run(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """One curve; the bar's returns go on; a complete run goes on with more timesteps."""
    interrupted(train, monkeypatch, 2, f"{FLAGS} {TOTAL} --env-id Recorded-v0")
    interrupted(train, monkeypatch, 3, "--resume r/checkpoint.pt")
    assert checkpoint()["step"] == 5 * STEPS
    before = curves()
    train("--resume r")
    out = train(f"--resume r --total-timesteps {STEPS * (ITERATIONS + 2)}")
    assert len(curve("losses/value_loss")) == ITERATIONS + 2
    assert curves(last=5 * STEPS) == before
    mean = np.mean(Recorded.returns)
    assert f"the last {len(Recorded.returns)} episodes {mean:.2f}," in out
    assert [p.name for p in Path.cwd().iterdir()] == ["r"]


def test_resume_keeps_flags_but_for_those_given(
    train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flag that is given at its default counts as given."""
    flags = "--gamma 0.9 --ent-coef 0.02 --norm-obs --clip-coef none --target-kl 0.5 --seed 4"
    interrupted(train, monkeypatch, 3, f"{FLAGS} {TOTAL} {flags}")
    train("--resume r --ent-coef 0.01 --clip-coef 0.3 --target-kl none --total-timesteps 320")
    args = json.loads(Path("r/args.json").read_text())
    assert (args["gamma"], args["norm_obs"], args["seed"], args["num_envs"]) == (0.9, True, 4, 2)
    assert (args["ent_coef"], args["clip_coef"], args["target_kl"]) == (0.01, 0.3, None)
    assert args["total_timesteps"] == 320
    assert curve("charts/ent_coef") == pytest.approx([0.02] * 3 + [0.01] * 7)
    stored = checkpoint()["args"]
    assert (stored["ent_coef"], stored["gamma"], stored["resume"]) == (0.01, 0.9, None)


def test_two_resumes_are_equal(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a run go on alike, and not as the run began."""
    noises: list[torch.Tensor] = []
    draw = ppo.Agent.draw_noise
    monkeypatch.setattr(
        ppo.Agent, "draw_noise", lambda *args: noises.append(draw(*args)) or noises[-1]
    )
    interrupted(train, monkeypatch, 3, f"{FLAGS} {TOTAL} --norm-obs --norm-reward")
    for name in ("a", "b"):
        shutil.copytree("r", name)
        train(f"--resume {name}")
    assert curves("a") == curves("b")
    assert len(curve("losses/value_loss", "a")) == ITERATIONS
    assert same(checkpoint("a")["agent"], checkpoint("b")["agent"])
    first, a, b = noises[:3], noises[-10:-5], noises[-5:]
    assert same(a, b)
    assert not any(torch.equal(new, old) for new in a for old in first)


def test_resume_with_another_batch(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """More environments: on from the step that was reached, and not beyond the total."""
    interrupted(train, monkeypatch, 3, f"{FLAGS} {TOTAL}")
    train("--resume r --num-envs 4")
    steps = [step for step, _ in read_scalars("r")["charts/learning_rate"]]
    assert steps == [32, 64, 96, 160, 224]


def test_resume_after_sigkill(run: Callable, train: Callable, tmp_path: Path) -> None:
    """Points beyond the last checkpoint are learnt anew: one curve, none doubled or missing."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=str(ROOT), updates=6))
    result = run(*f"{FLAGS} {TOTAL} --checkpoint-every 3".split(), script=script)
    assert (result.returncode, result.stderr) == (-signal.SIGKILL, "")
    assert checkpoint()["step"] == 3 * STEPS
    killed = curves()
    assert [step for step, _ in killed["losses/policy_loss"]] == [32, 64, 96, 128, 160]
    train(f"{FLAGS} {TOTAL} --run-dir whole")
    assert curves("whole", last=160) == killed  # in another process
    next_second()
    train("--resume r")
    assert curves(last=96) == curves("whole", last=96)
    assert curves()["losses/policy_loss"][3:5] != killed["losses/policy_loss"][3:5]
    scalars = read_scalars("r")
    for tag, rows in scalars.items():
        steps = [step for step, _ in rows]
        if tag.startswith("charts/episodic"):
            assert steps == sorted(set(steps)), tag
        else:
            assert steps == [STEPS * (i + 1) for i in range(ITERATIONS)], tag
    assert checkpoint()["step"] == 256


# ---- signals


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal(
    train: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    vectorization: str,
    signum: int,
) -> None:
    """A checkpoint that resumes, 130 or 143, no traceback and no process that stays behind."""
    (tmp_path / "slow.py").write_text(SLOW)  # the signal comes in the middle of a step
    flags = f"{SIZES} --run-dir r --env-id slow:Slow-v0 --checkpoint-every 0"
    flags += f' --env-kwargs {{"pause":0.05}} --vectorization {vectorization}'
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "ppo_discrete.py"), *flags.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        bar, read = b"", b" "
        while read and not bar.endswith(b"return"):
            bar += (read := process.stderr.read(1))
        assert re.search(rb"[1-9]\d*/500000 \[.*step/s, return$", bar), bar
        time.sleep(0.2)  # into the next rollout
        # a terminal and most job schedulers signal the whole group, `kill` the process alone
        alone = (signum, vectorization) == (signal.SIGTERM, "sync")
        (os.kill if alone else os.killpg)(process.pid, signum)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signum
        assert out == b""
        assert not re.search(rb"Traceback|Error|Exception|Interrupt", err), err
        deadline = time.monotonic() + 20
        while alive(process.pid):
            assert time.monotonic() < deadline, "processes stay behind"
            time.sleep(0.1)
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    step = checkpoint()["step"]
    assert step > 0
    assert len(curve("losses/policy_loss")) == step // STEPS
    next_second()
    monkeypatch.syspath_prepend(tmp_path)
    flags = "--vectorization sync --env-kwargs {} --no-progress"
    train(f"--resume r {flags} --total-timesteps {step + 2 * STEPS}")
    assert len(curve("losses/policy_loss")) == step // STEPS + 2


# ---- evaluation


def by_hand(state: dict[str, Any], obs: np.ndarray, norm: bool = True) -> np.ndarray:
    """Probabilities of the actions, from the tensors in a checkpoint."""
    agent = {name: tensor.double().numpy() for name, tensor in state["agent"].items()}
    x = obs.astype(np.float64)
    if norm:
        deviation = np.sqrt(agent["obs_norm.squares"] / agent["obs_norm.count"] + 1e-8)
        x = ((x - agent["obs_norm.centre"]) / deviation).clip(-10, 10)
    x = np.tanh(x @ agent["actor.0.weight"].T + agent["actor.0.bias"])
    x = x @ agent["actor.2.weight"].T + agent["actor.2.bias"]
    exp = np.exp(x - x.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def played() -> tuple[np.ndarray, np.ndarray]:
    """Observations and actions since the records were emptied."""
    obs, actions = zip(*Recorded.steps, strict=True)
    return np.stack(obs), np.array(actions)


def test_evaluation(train: Callable) -> None:
    """Most probable actions under the saved normalisers; the same twice; nothing changes."""
    train(f"{FLAGS} --total-timesteps 1024 --env-id Recorded-v0 --norm-obs --learning-rate 0.001")
    before = Path("r/checkpoint.pt").read_bytes(), Path("r/args.json").read_text()
    outs = []
    for _ in range(2):
        Recorded.steps.clear()
        Recorded.returns.clear()
        outs.append(train("--eval r --eval-episodes 5"))
        obs, actions = played()
        np.testing.assert_array_equal(actions, by_hand(checkpoint(), obs).argmax(1))
        assert (actions != by_hand(checkpoint(), obs, norm=False).argmax(1)).any()
    assert outs[0] == outs[1]
    returns = [float(x) for x in re.findall(r"episode \d+: return ([\d.]+)\n", outs[0])]
    assert returns == Recorded.returns
    assert len(returns) == 5
    assert len(set(returns)) > 1
    mean, std = np.mean(returns), np.std(returns)
    assert outs[0].endswith(f"\nmean return {mean:.2f} +- {std:.2f} of 5 episodes\n")
    assert read_scalars("r")["eval/episodic_return"] == [(1024, pytest.approx(mean))] * 2
    assert (Path("r/checkpoint.pt").read_bytes(), Path("r/args.json").read_text()) == before
    assert len(curve("losses/policy_loss")) == 1024 // STEPS


def test_sampled_evaluation(train: Callable) -> None:
    """Actions are drawn from the policy instead."""
    train(f"{FLAGS} {TOTAL} --env-id Recorded-v0 --norm-obs")
    Recorded.steps.clear()
    train("--eval r --eval-episodes 30 --no-eval-deterministic")
    obs, actions = played()
    probs = by_hand(checkpoint(), obs)
    assert 0.2 < (actions != probs.argmax(1)).mean() < 0.6
    p = probs[:, 1]
    assert len(p) > 300
    assert abs((actions - p).sum()) < 4 * np.sqrt((p * (1 - p)).sum())


def test_evaluation_takes_flags(train: Callable) -> None:
    """Another seed gives other episodes; the environment's arguments may change."""
    train(f"{FLAGS} {TOTAL}")
    one, two = train("--eval r"), train("--eval r --seed 2")
    assert one != two
    out = train('--eval r --eval-episodes 2 --env-kwargs {"max_episode_steps":5}')
    assert "mean return 5.00 +- 0.00 of 2 episodes" in out


def videos(prefix: str) -> dict[str, int]:
    """Names of the videos and their frames."""
    count = pytest.importorskip("imageio_ffmpeg").count_frames_and_secs
    return {p.stem: count(str(p))[0] for p in Path("r/videos").glob(f"{prefix}*.mp4")}


def test_video(main: Callable) -> None:
    """Some of the first environment's episodes in training, and all of an evaluation."""
    flags = f"{FLAGS} --num-envs 1 --total-timesteps 128 --env-id Recorded-v0 --capture-video"
    assert main(*flags.split())[0] == 0
    expected = {f"train-episode-{i}": Recorded.returns[i] for i in (0, 1)}
    lengths = videos("train")
    Recorded.returns.clear()
    assert main("--eval", "r", "--eval-episodes", 3, "--capture-video")[0] == 0
    expected |= {f"eval-episode-{i}": Recorded.returns[i] for i in range(3)}
    lengths |= videos("eval")
    assert lengths.keys() == expected.keys()
    for name, steps in expected.items():
        assert lengths[name] in (steps, steps + 1), name  # encoders may drop the last frame


# ---- what is not finite

BROKEN = f"{FLAGS} --num-envs 3 --env-id Broken-v0 --checkpoint-every 1 --total-timesteps 480"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "what, iteration, row",
    [("reward", 3, 4), ("observation", 3, 4), ("final", 1, 6), ("reset", 1, 0)],
)
def test_broken_environment(
    main: Callable, what: str, iteration: int, row: int, value: str
) -> None:
    """Exit 1 and a line that says what, in which environment and at which step."""
    kwargs = json.dumps({"what": what, "value": value}, separators=(",", ":"))
    code, out, err = main(*BROKEN.split(), "--env-kwargs", kwargs)
    assert (code, out) == (1, "")
    name = "reward" if what == "reward" else "observation"
    line = rf"error: [^\n]*\b{name} [^\n]*environment (\d+)\b[^\n]*\bstep (\d+)\b[^\n]*\n"
    match = re.fullmatch(line, err)
    assert match, err
    weak = next(seed for seed in Broken.seeds[-3:] if seed % 3 == 0)
    assert int(match[1]) == weak - min(Broken.seeds[-3:])
    first = 48 * (iteration - 1) + 3 * row
    assert first <= int(match[2]) <= first + 3
    if iteration > 1:
        state = checkpoint()
        assert state["step"] == 48 * (iteration - 1)
        assert finite(state["agent"])
        assert main("--resume", "r", "--env-kwargs", "{}")[0] == 0
    else:
        assert not Path("r/checkpoint.pt").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--learning-rate 1e9 --max-grad-norm none",
        '--env-kwargs {"what":"reward","value":"1e38"}',
    ],
)
def test_loss_not_finite(main: Callable, train: Callable, flags: str) -> None:
    """Exit 1 and a line that names loss and iteration; the last checkpoint stays."""
    train(f"{BROKEN} --total-timesteps 48 --activation relu")
    code, out, err = main(*f"--resume r {flags}".split(), "--total-timesteps", 4800)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: losses/\w+ [^\n]*\b(inf|nan)\b[^\n]*\biteration \d+\n", err), err
    state = checkpoint()
    assert state["step"] >= 48
    assert finite(state["agent"])
    assert finite(state["optimizer"])


def test_error_has_a_line_of_its_own(main: Callable) -> None:
    """The progress bar does not run into it."""
    flags = BROKEN.replace("--no-progress", "--progress")
    code, _, err = main(*flags.split(), "--env-kwargs", '{"what": "reward"}')
    assert code == 1
    assert re.search(r"[\r\n]error: [^\r\n]*reward[^\r\n]*\n", err), err


def test_resume_takes_a_new_kl_coef_and_keeps_an_adapted_one(train: Callable) -> None:
    flags = f"{FLAGS} --total-timesteps 96 --run-dir r --kl-coef 0.5"
    train(f"{flags} --kl-target 10")
    adapted = checkpoint()["beta"]
    assert adapted == 0.5 / 2**3
    train("--resume r --total-timesteps 128")
    assert curve("charts/kl_coef")[-1] == adapted
    train("--resume r --total-timesteps 160 --kl-coef 3 --kl-target none")
    assert curve("charts/kl_coef")[-1] == 3


def test_resume_does_not_write_over_another_run(train: Callable, main: Callable) -> None:
    for name in "rs":
        train(f"{FLAGS} --total-timesteps 64 --run-dir {name}")
    before = Path("s/checkpoint.pt").read_bytes()
    code, _, err = main("--resume", "r", "--run-dir", "s", "--total-timesteps", "128")
    assert code == 2
    assert err == "error: --run-dir s: holds a run; --resume it or name another directory\n"
    assert Path("s/checkpoint.pt").read_bytes() == before
    train("--resume r --run-dir new --total-timesteps 128")
    assert checkpoint("new")["step"] == 128
    assert checkpoint("r")["step"] == 64


def test_checkpoint_without_a_part_is_refused(train: Callable, main: Callable) -> None:
    train(f"{FLAGS} --total-timesteps 64 --run-dir r")
    state = checkpoint()
    del state["rng"]
    torch.save(state, "r/checkpoint.pt")
    code, _, err = main("--resume", "r", "--total-timesteps", "128")
    assert code == 2
    assert err.startswith("error: --resume r: no checkpoint of this script")
    assert "rng" in err


def test_a_reference_can_be_left_behind(train: Callable) -> None:
    """On resumption `none` is no file."""
    train(f"{FLAGS} --total-timesteps 32 --run-dir first")
    train(f"{FLAGS} {TOTAL} --ref-checkpoint first --ref-kl-coef 0.1")
    train("--resume r --ref-checkpoint none --ref-kl-coef 0 --total-timesteps 320")
    assert checkpoint()["args"]["ref_checkpoint"] is None
    assert checkpoint()["step"] == 320


def test_a_directory_may_be_spelt_in_another_way(train: Callable) -> None:
    train(f"{FLAGS} {TOTAL}")
    train(f"--resume {Path('r').resolve()} --run-dir ./r/ --total-timesteps 320")
    assert checkpoint()["step"] == 320
    assert len(list(Path().iterdir())) == 1


MEMORY = """
import resource, sys, torch
import ppo_discrete as ppo
if sys.argv[1] == "kept":
    ppo.keep_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other systems do as they like")
def test_freed_memory_is_kept() -> None:
    """So 64 MiB that were there before come without asking the kernel for each of their pages."""
    pages = [
        int(subprocess.check_output([sys.executable, "-c", MEMORY, how], cwd=ROOT, text=True))
        for how in ("kept", "returned")
    ]
    size = 2**26 // resource.getpagesize()  # of 12 times, a few come before there is a place
    assert pages[0] < 5 * size < 12 * size <= pages[1]


COLLECTED = """
import gc
import gymnasium as gym

class Watched(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def __init__(self):
        assert gc.get_freeze_count() > 100_000

    def reset(self, **kwargs):
        assert gc.isenabled()
        return self.observation_space.sample(), {}

    def step(self, action):
        return *self.reset()[:1], 0.0, False, True, {}

gym.register("Watched-v0", Watched)
"""


def test_garbage_is_collected(run: Callable, tmp_path: Path) -> None:
    """While environments step; what the imports made is not looked through again."""
    (tmp_path / "watched.py").write_text(COLLECTED)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    start = "--env-id watched:Watched-v0 --num-steps 64 --no-progress --total-timesteps 512"
    result = run(*start.split(), "--run-dir", "r", env=env)
    assert (result.returncode, result.stderr) == (0, "")
    result = run("--eval", "r", env=env)
    assert (result.returncode, result.stderr) == (0, "")


def test_no_garbage_is_looked_for_in_updates(
    train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first one the compiler makes hundreds of thousands of objects that stay."""
    seen, update = [], ppo.update
    monkeypatch.setattr(ppo, "update", lambda *args: seen.append(gc.isenabled()) or update(*args))
    train(f"{FLAGS} {TOTAL}")
    assert seen == [False] * ITERATIONS
    assert gc.isenabled()
