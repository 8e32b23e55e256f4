"""Training: what a run writes, its schedules, that it is repeatable, and that it learns."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import read_scalars
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.vector import SyncVectorEnv
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.distributions import Categorical, kl_divergence

import ppo_continuous
import ppo_discrete
import ppo_multidiscrete_mask

ENV_IDS = {
    ppo_discrete: "Counted-v0",
    ppo_continuous: "Pendulum-v1",
    ppo_multidiscrete_mask: "TaxiDispatch-v0",
}
STEPS = 32  # of an iteration
ITERATIONS = 6
FLAGS = "--num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 2 --hidden-sizes 16"
FLAGS += f" --no-progress --total-timesteps {STEPS * ITERATIONS} --run-dir r"
CHARTS = """
charts/SPS charts/learning_rate charts/ent_coef charts/kl_coef losses/policy_loss
losses/value_loss losses/entropy losses/old_approx_kl losses/approx_kl losses/clipfrac
losses/explained_variance losses/value_loss_unclipped losses/value_clipfrac losses/grad_norm
losses/kl losses/ref_kl advantages/mean advantages/std values/mean values/old_mean
values/target_mean
""".split()
EPISODE_CHARTS = ["charts/episodic_return", "charts/episodic_length", "charts/return_100"]
OWN_CHARTS = {
    ppo_discrete: [],
    ppo_continuous: ["policy/std_0"],
    ppo_multidiscrete_mask: ["policy/invalid_fraction"],
}


class Counted(CartPoleEnv):
    """CartPole, truncated after 20 steps, with reward 2, that writes down what happens."""

    seeds: list[int] = []
    episodes: list[tuple[int, int]] = []  # (steps of all environments so far, length)
    actions: list[tuple[np.ndarray, int]] = []  # with the observation before
    steps = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        self.t = 0
        if seed is not None:
            self.seeds.append(seed)
        self.obs, info = super().reset(seed=seed)
        return self.obs, info

    def step(self, action: int) -> tuple:
        self.actions.append((self.obs, int(action)))
        self.obs, _, terminated, truncated, info = super().step(action)
        Counted.steps += 1
        self.t += 1
        truncated = self.t == 20
        if terminated or truncated:
            self.episodes.append((Counted.steps, self.t))
        return self.obs, 2.0, terminated, truncated, info


class Probe(gym.Env):
    """Reward 1 - |action - target| in episodes of one step; the observation is the target."""

    def __init__(self, continuous: bool = False) -> None:
        self.observation_space = spaces.Box(-1, 1, (1,))
        self.action_space = spaces.Box(-2, 2, (1,)) if continuous else spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.target = self.np_random.choice([-1, 1])
        return np.array([self.target], np.float32), {}

    def step(self, action: Any) -> tuple:
        if isinstance(self.action_space, spaces.Discrete):
            action = 2 * action - 1
        reward = 1 - abs(float(np.squeeze(action)) - self.target)
        return np.zeros(1, np.float32), reward, True, False, {}


def make_vector(num_envs: int, **kwargs: Any) -> SyncVectorEnv:
    return SyncVectorEnv([partial(Probe, **kwargs)] * num_envs, autoreset_mode="NextStep")


gym.register("Counted-v0", Counted)
gym.register("Probe-v0", Probe, vector_entry_point=make_vector)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "seeds", [])
    monkeypatch.setattr(Counted, "episodes", [])
    monkeypatch.setattr(Counted, "steps", 0)


@pytest.fixture
def train(main: Callable) -> Callable:
    """`train(flags, module)`: standard output of a run that succeeds."""

    def train(flags: str = "", module: ModuleType = ppo_discrete) -> str:
        env = "" if "--env-id" in flags else f"--env-id {ENV_IDS[module]}"
        code, out, err = main(*f"{FLAGS} {env} {flags}".split(), module=module)
        assert code == 0, err
        return out

    return train


def curve(tag: str, run_dir: str = "r") -> list[float]:
    """Values of a tag, one an iteration."""
    steps, values = zip(*read_scalars(run_dir)[tag], strict=True)
    assert list(steps) == [STEPS * (i + 1) for i in range(len(steps))]
    return list(values)


def checkpoint(run_dir: str = "r") -> dict[str, Any]:
    return torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)


def events(run_dir: str = "r") -> list[Any]:
    """All events of a run with one event file."""
    [path] = Path(run_dir).glob("events*")
    return list(EventFileLoader(str(path)).Load())


# ---- what a run writes


def test_directory(train: Callable) -> None:
    """Its name, files, flags and checkpoint; first and last line of the console."""
    start = int(time.time())
    flags = FLAGS.removesuffix("--run-dir r").split()
    out = train("--run-dir None --exp-name x --seed 4 --clip-coef None --env-kwargs {}")
    [run_dir] = Path("runs").iterdir()
    match = re.fullmatch(r"Counted-v0__x__4__(\d+)", run_dir.name)
    assert start <= int(match[1]) <= time.time()
    names = [path.name.split(".")[0] for path in run_dir.iterdir()]
    assert sorted(names) == ["args", "checkpoint", "events"]
    given = {"exp_name": "x", "seed": 4, "clip_coef": None, "env_id": "Counted-v0"}
    given |= {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2}
    given |= {"hidden_sizes": (16,), "progress": False, "total_timesteps": int(flags[-1])}
    args = asdict(ppo_discrete.Args()) | given | {"run_dir": str(run_dir)}
    assert json.loads((run_dir / "args.json").read_text()) == args | {"hidden_sizes": [16]}
    state = checkpoint(str(run_dir))
    assert state["args"] == args
    assert state["step"] == STEPS * ITERATIONS
    first, last = out.splitlines()
    assert all(word in first for word in (str(run_dir), "cpu", "Discrete(2)"))
    lengths = [length for _, length in Counted.episodes]
    assert len(lengths) < 100
    assert str(run_dir) in last
    assert re.search(rf"\b{2 * np.mean(lengths):.2f}\b.* {len(lengths)} .*\b\d+ SPS", last)


@pytest.mark.parametrize("module", ENV_IDS)
def test_scalars(train: Callable, module: ModuleType) -> None:
    """All tags, once an iteration and in one event; values are those of all minibatches."""
    seen = []
    loss_function = module.ppo_loss

    def ppo_loss(*args: Any) -> Any:
        loss, metrics = loss_function(*args)
        weights = args[1]["weights"]
        seen.append({tag: float(value.detach() @ weights) for tag, value in metrics.items()})
        return loss, metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ppo_loss", ppo_loss)
        train("--learning-rate 0.01", module)
    assert len(seen) == ITERATIONS * 2 * 2
    scalars = read_scalars("r")
    tags = set(CHARTS + OWN_CHARTS[module])
    optional = set(EPISODE_CHARTS)
    assert tags <= scalars.keys() <= tags | optional
    points = [event for event in events() if event.summary.value and event.step > 0]
    assert [point.step for point in points] == [STEPS * (i + 1) for i in range(ITERATIONS)]
    for point in points:
        found = [value.tag for value in point.summary.value]
        assert len(found) == len(set(found))
        assert tags <= set(found) <= tags | optional
    for tag in seen[0]:
        means = np.reshape([metrics[tag] for metrics in seen], (ITERATIONS, 4)).mean(1)
        np.testing.assert_allclose(curve(tag), means, rtol=1e-4, atol=1e-6, err_msg=tag)
    assert all(np.isfinite(curve(tag)).all() for tag in tags)
    assert min(curve("losses/approx_kl")) >= 0
    assert min(curve("losses/kl")) >= 0
    assert max(curve("losses/kl")) > 0
    assert set(curve("losses/ref_kl")) == set(curve("charts/kl_coef")) == {0.0}
    for tag in ("losses/clipfrac", "losses/value_clipfrac"):
        assert all(0 <= value <= 1 for value in curve(tag))
    assert max(curve("losses/explained_variance")) <= 1
    for tag in ("charts/SPS", "losses/grad_norm", "advantages/std"):
        assert min(curve(tag)) > 0
    clipped = np.subtract(curve("losses/value_loss"), curve("losses/value_loss_unclipped"))
    assert clipped.min() >= -1e-6
    if module is ppo_discrete:
        assert all(0.4 < value < 0.6932 for value in curve("losses/entropy"))
    if module is ppo_continuous:
        assert curve("policy/std_0")[0] == pytest.approx(1)
    if module is ppo_multidiscrete_mask:
        assert set(curve("policy/invalid_fraction")) == {0.0}


def test_hparams_and_layout(train: Callable) -> None:
    """All flags with the return as a metric; charts that belong together on one board."""
    train("--clip-coef None --hidden-sizes 8 4")
    found = {value.tag: value for event in events() for value in event.summary.value}

    def plugin_data(tag: str) -> HParamsPluginData:
        return HParamsPluginData.FromString(found[tag].metadata.plugin_data.content)

    flags = plugin_data("_hparams_/session_start_info").session_start_info.hparams
    args = json.loads(Path("r/args.json").read_text())
    assert flags.keys() == args.keys()
    for name, value in {"num_envs": 2, "gamma": 0.99}.items():
        assert flags[name].number_value == value
    texts = {"env_id": "Counted-v0", "clip_coef": "None", "hidden_sizes": "(8, 4)"}
    for name, value in texts.items():
        assert flags[name].string_value == value
    shown = {x.name.tag for x in plugin_data("_hparams_/experiment").experiment.metric_infos}
    assert {"charts/return_100", "eval/episodic_return"} <= shown
    layout = Layout.FromString(found["custom_scalars__config__"].tensor.string_val[0])
    tags = read_scalars("r").keys()
    boards = [
        {tag for tag in tags for pattern in chart.multiline.tag if re.match(pattern, tag)}
        for category in layout.category
        for chart in category.chart
    ]
    names = ("mean", "old_mean", "target_mean")
    assert {f"values/{name}" for name in names} in boards
    assert {"losses/value_loss", "losses/value_loss_unclipped"} in boards
    names = ("kl", "ref_kl", "approx_kl", "old_approx_kl")
    assert {f"losses/{name}" for name in names} in boards
    assert {"losses/clipfrac", "losses/value_clipfrac"} in boards


def test_runs_of_one_second(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them have three directories."""
    monkeypatch.setattr(ppo_discrete.time, "time", lambda: 1.7e9)
    for pid in (7, 8, 9):
        monkeypatch.setattr(ppo_discrete.os, "getpid", lambda pid=pid: pid)
        train("--run-dir None --total-timesteps 32")
    names = [path.name for path in Path("runs").iterdir()]
    assert len(names) == 3
    assert all(name.startswith("Counted-v0__ppo_discrete__1__1700000000") for name in names)


@pytest.mark.parametrize("every, steps", [(2, [64, 128, 192]), (4, [128, 192]), (0, [192])])
def test_checkpoint_every(
    train: Callable, monkeypatch: pytest.MonkeyPatch, every: int, steps: list[int]
) -> None:
    """Saved aside and renamed: what is under the name is always whole."""
    saved = []
    save = torch.save

    def save_and_look(state: dict, path: Path) -> None:
        save(state, path)
        assert Path("r/checkpoint.pt").exists() == bool(saved)
        if saved:
            assert checkpoint()["step"] == saved[-1]
        saved.append(state["step"])

    monkeypatch.setattr(torch, "save", save_and_look)
    train(f"--checkpoint-every {every}")
    assert saved == steps
    assert checkpoint()["step"] == 192
    assert len(list(Path("r").iterdir())) == 3


# ---- schedules


def test_entropy_coefficient(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line from the first iteration to the last, or constant."""
    seen = []
    update = ppo_discrete.update

    def spy(*inputs: Any) -> dict:
        seen.append(inputs[-1][0].item())
        return update(*inputs)

    monkeypatch.setattr(ppo_discrete, "update", spy)
    train("--ent-coef 0.05 --ent-coef-final 0")
    train("--ent-coef 0.05 --run-dir s")
    expected = np.concatenate([np.linspace(0.05, 0, ITERATIONS), [0.05] * ITERATIONS])
    np.testing.assert_allclose(seen, expected, rtol=1e-6, atol=1e-9)
    logged = curve("charts/ent_coef") + curve("charts/ent_coef", "s")
    np.testing.assert_allclose(logged, expected, rtol=1e-6, atol=1e-9)


def test_kl_coef_follows_the_target(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """It doubles above 1.5 x target, halves below target / 1.5, and waits while none is made."""
    kls = []
    update = ppo_discrete.update

    def spy(agent: Any, optimizer: Any, rollout: Any, batch: Any, *args: Any) -> dict:
        metrics = update(agent, optimizer, rollout, batch, *args)
        with torch.no_grad():
            old, new = (Categorical(logits=x) for x in (batch["dists"], agent(batch["obs"])[0]))
        kls.append(kl_divergence(old, new).mean().item())
        return metrics

    monkeypatch.setattr(ppo_discrete, "update", spy)
    flags = "--kl-coef 1e-4 --critic-warmup-iterations 1 --learning-rate 0.01 --norm-obs"
    train(f"{flags} --kl-target 9 --total-timesteps 480 --run-dir q")
    assert kls[0] == 0
    target = float(np.median(kls))
    kls.clear()
    train(f"{flags} --kl-target {target} --total-timesteps 480")
    expected = [1e-4, 1e-4]
    for kl in kls[1:]:
        factor = 2 if kl > 1.5 * target else 0.5 if kl < target / 1.5 else 1
        expected.append(expected[-1] * factor)
    assert set(np.divide(expected[2:], expected[1:-1])) == {0.5, 1, 2}
    np.testing.assert_allclose(curve("charts/kl_coef"), expected[:-1], rtol=1e-6)
    train("--kl-target 1 --run-dir s")
    assert curve("charts/kl_coef", "s") == [0.5**i for i in range(ITERATIONS)]
    train("--kl-coef 0.25 --run-dir t")
    assert curve("charts/kl_coef", "t") == [0.25] * ITERATIONS


def test_return_100(train: Callable) -> None:
    """The mean of the last 100 episodes, which are those of 5 iterations; also after a resume."""
    flags = "--env-id Probe-v0 --num-envs 4 --num-steps 5 --num-minibatches 1 --total-timesteps"
    train(f"{flags} 160")
    train(f"{flags} 240 --resume r")
    scalars = read_scalars("r")
    returns = [value for _, value in scalars["charts/episodic_return"]]
    expected = [np.mean(returns[max(0, i - 4) : i + 1]) for i in range(12)]
    logged = [value for _, value in scalars["charts/return_100"]]
    np.testing.assert_allclose(logged, expected, rtol=1e-5, atol=1e-6)


def test_total_timesteps_is_an_upper_bound(train: Callable) -> None:
    train(f"--total-timesteps {3 * STEPS - 1}")
    assert len(curve("losses/policy_loss")) == 2
    assert checkpoint()["step"] == 2 * STEPS == Counted.steps


# ---- seeds

TRICKS = "--norm-obs --norm-reward --norm-value popart --recompute-advantages --critic-epochs 1"


@pytest.mark.parametrize("module", ENV_IDS)
def test_same_seed_same_scalars(train: Callable, module: ModuleType) -> None:
    """Bit for bit, and the weights too; another seed gives others."""
    curves, weights, seeds = [], [], []
    for run_dir, seed in (("a", 5), ("b", 5), ("c", 6)):
        Counted.seeds.clear()
        train(f"{TRICKS} --target-kl 0.1 --seed {seed} --run-dir {run_dir}", module)
        scalars = read_scalars(run_dir)
        del scalars["charts/SPS"]
        curves.append(scalars)
        weights.append(checkpoint(run_dir)["agent"])
        seeds.append(Counted.seeds.copy())
    assert curves[0] == curves[1]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    for tag in ("losses/policy_loss", "losses/value_loss", "values/mean", "losses/grad_norm"):
        pairs = zip(curves[0][tag], curves[2][tag], strict=True)
        assert all(a != c for a, c in pairs), tag
    if module is ppo_discrete:
        assert seeds[0] == seeds[1]
        assert len({*seeds[0], *seeds[2]}) == len(seeds[0] + seeds[2]) == 4


# ---- learning


def last_return() -> float:
    return read_scalars("r")["charts/return_100"][-1][1]


def test_cartpole(train: Callable) -> None:
    """Random play has a return of 22. Seeds 1 to 3 reach 86 to 92."""
    flags = "--env-id CartPole-v1 --num-envs 4 --num-steps 64 --num-minibatches 4 --norm-adv"
    train(f"{flags} --learning-rate 0.003 --hidden-sizes 32 --total-timesteps 10240")
    assert last_return() > 60


@pytest.mark.parametrize(
    "vectorization, distribution, enough",
    [("native", "", 0.8), ("sync", "gaussian", 0.6), ("native", "beta", 0.2)],
)
def test_probe(train: Callable, vectorization: str, distribution: str, enough: float) -> None:
    """Random play has a return of 0 or less. Seeds 1 to 3 reach 1, 0.81 to 0.84, 0.39 to 0.44."""
    flags = f"--env-id Probe-v0 --vectorization {vectorization} --learning-rate 0.02 --ent-coef 0"
    flags += " --num-steps 32 --total-timesteps 2560"
    module = ppo_discrete
    if distribution:
        module = ppo_continuous
        flags += f' --distribution {distribution} --env-kwargs {{"continuous":true}}'
    train(flags, module)
    assert last_return() > enough


# ---- --compile


def test_compiled_run(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """It agrees with the eager one, and compiles nothing after the first iteration."""
    graphs = []
    collect = ppo_discrete.Rollout.collect

    def spy(*args: Any) -> list:
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return collect(*args)

    monkeypatch.setattr(ppo_discrete.Rollout, "collect", spy)
    flags = "--ent-coef-final 0 --kl-target 0.01 --num-minibatches 1"
    train(f"{flags} --run-dir eager")
    before = graphs[0]  # of other tests of this process
    assert graphs == [before] * ITERATIONS
    train(f"{flags} --compile --run-dir compiled")
    graphs = graphs[ITERATIONS:]
    assert graphs[0] == before < graphs[1]
    assert set(graphs[1:]) == {graphs[1]}
    eager, compiled = read_scalars("eager"), read_scalars("compiled")
    assert eager.keys() == compiled.keys()
    for tag in eager.keys() - {"charts/SPS"}:
        np.testing.assert_allclose(compiled[tag], eager[tag], rtol=1e-5, atol=1e-5, err_msg=tag)
    for key, weight in checkpoint("eager")["agent"].items():
        torch.testing.assert_close(checkpoint("compiled")["agent"][key], weight, atol=1e-5, rtol=0)
