"""Continuous actions: distributions, deviations, bounds, and that Pendulum is learned."""

from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import read_scalars
from gymnasium import spaces
from torch.distributions import Beta, Independent, Normal, kl_divergence

import ppo_continuous as ppo

BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Box(-2, 2, (2,), np.float32)
SHORT = ["--env-id", "Pendulum-v1", "--num-steps", 64, "--num-minibatches", 2, "--no-progress"]


def make_agent(action_space: spaces.Box = ACTIONS, **flags: object) -> ppo.Agent:
    torch.manual_seed(0)
    return ppo.Agent(ppo.Args(**flags), BOX, action_space)


def random_dist(kind: str, rows: int = 7, dims: int = 2) -> torch.Tensor:
    """Parameters [rows, 2 * dims] in float64 as Agent.distribution returns them."""
    first, second = torch.randn(2, rows, dims, dtype=torch.float64).unbind(0)
    if kind == "beta":
        first, second = 1 + first.exp(), 1 + second.exp()
    return torch.cat((first, second), -1).requires_grad_()


def reference(kind: str, dist: torch.Tensor) -> Independent:
    first, second = dist.chunk(2, -1)
    return Independent(Beta(first, second) if kind == "beta" else Normal(first, second.exp()), 1)


@pytest.mark.parametrize("kind", ["gaussian", "beta"])
def test_distribution_equals_torch(kind: str) -> None:
    agent, p, q = make_agent(distribution=kind), random_dist(kind), random_dist(kind)
    actions = reference(kind, p).sample()
    for ours, theirs in (
        (agent.log_prob(p, actions), reference(kind, p).log_prob(actions)),
        (agent.entropy(p), reference(kind, p).entropy()),
        (agent.kl_divergence(p, q), kl_divergence(reference(kind, p), reference(kind, q))),
    ):
        assert ours.shape == (7,)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        grads = [torch.autograd.grad(x.sum(), p, retain_graph=True)[0] for x in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["gaussian", "beta"])
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    agent, p, q = make_agent(distribution=kind), random_dist(kind, 2), random_dist(kind, 2)
    actions = reference(kind, p).sample()
    assert torch.autograd.gradcheck(lambda d: agent.log_prob(d, actions), p)
    assert torch.autograd.gradcheck(agent.entropy, p)
    assert torch.autograd.gradcheck(agent.kl_divergence, (p, q))


@pytest.mark.parametrize("kind", ["gaussian", "beta"])
def test_mode_is_the_peak_of_the_density(kind: str) -> None:
    agent, dist = make_agent(distribution=kind), random_dist(kind, 5, 1).detach()
    low, high = (0.0, 1.0) if kind == "beta" else (-6.0, 6.0)
    grid = torch.linspace(low, high, 200_001, dtype=torch.float64)[:, None, None]
    density = agent.log_prob(dist[None], grid.expand(-1, 5, 1))
    peaks = grid[density.argmax(0), 0]
    torch.testing.assert_close(agent.mode(dist), peaks, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["gaussian", "beta"])
def test_samples_follow_the_distribution(kind: str) -> None:
    agent, dist = make_agent(distribution=kind), random_dist(kind, 3).detach().float()
    torch.manual_seed(1)
    draws = agent.sample(dist.expand(100_000, 3, 4), agent.draw_noise(100_000, 3))
    truth = reference(kind, dist)
    torch.testing.assert_close(draws.mean(0), truth.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(draws.std(0), truth.stddev, rtol=0.02, atol=0)


def test_beta_is_finite_at_its_end_points_and_flat_in_the_middle() -> None:
    agent = make_agent(distribution="beta")
    dist = torch.tensor([[1.0, 3.0, 1.0, 3.0]], requires_grad=True)
    for end in (0.0, 1.0):
        logprob = agent.log_prob(dist, torch.full((1, 2), end))
        assert logprob.isfinite().all()
        assert torch.autograd.grad(logprob.sum(), dist)[0].isfinite().all()
    assert agent.mode(dist)[0, 0].item() == pytest.approx(0.5)


def test_what_the_deviation_depends_on() -> None:
    obs = torch.randn(2, 4, 3)
    for std in ("fixed", "independent", "state"):
        agent = make_agent(std=std, log_std_init=-0.5)
        torch.nn.init.normal_(agent.actor[-1].weight)
        log_std = torch.stack([agent(x)[0][:, 2:] for x in obs])
        depends = std == "state"
        assert bool((log_std.std((0, 1)) > 1e-3).all()) == depends
        if not depends:
            assert (log_std == -0.5).all()
        assert agent.log_std.requires_grad == (std == "independent")
    untouched = make_agent(std="state", log_std_init=-0.5)(obs[0])[0][:, 2:]
    torch.testing.assert_close(untouched, torch.full((4, 2), -0.5), rtol=0, atol=0.05)


@pytest.mark.parametrize("std", ["fixed", "independent", "state"])
def test_what_of_the_deviation_is_trained(std: str, main: Callable, tmp_path: Path) -> None:
    flags = ["--std", std, "--log-std-init", -1, "--run-dir", "run", "--total-timesteps", 256]
    assert main(*SHORT, *flags, module=ppo)[0] == 0
    curve = [value for _, value in read_scalars(tmp_path / "run")["policy/std_0"]]
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    assert (state["log_std"] == -1).all() == (std != "independent")
    assert len(set(curve)) == (1 if std == "fixed" else 4)


def test_a_fixed_deviation_decays_on_a_line(main: Callable, tmp_path: Path) -> None:
    flags = ["--std", "fixed", "--log-std-init", 0, "--log-std-final", -2, "--run-dir", "run"]
    assert main(*SHORT, *flags, "--total-timesteps", 320, module=ppo)[0] == 0
    curve = [value for _, value in read_scalars(tmp_path / "run")["policy/std_0"]]
    assert np.log(curve) == pytest.approx([0, -0.5, -1, -1.5, -2])


class Recorder(gym.Env):
    """Keeps every action that reaches it; bounds and shape are its arguments."""

    observation_space = BOX
    seen: list = []

    def __init__(self, low: list, high: list) -> None:
        self.action_space = spaces.Box(np.float32(low), np.float32(high))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action: np.ndarray) -> tuple:
        self.seen.append(np.array(action))
        return np.zeros(3, np.float32), 0.0, False, False, {}


class Whole(Recorder):
    """Wants whole numbers."""

    def __init__(self) -> None:
        self.action_space = spaces.Box(-100, 100, (1,), np.int8)


gym.register("Recorder-v0", Recorder, max_episode_steps=10)
gym.register("Whole-v0", Whole)
INF = np.inf
BOUNDS = {
    "one": ([-2.0], [2.0]),
    "each its own": ([-1.0, 0.0, 5.0], [1.0, 0.1, 9.0]),
    "half": ([-INF, 0.0], [0.0, INF]),
    "none": ([-INF, -INF], [INF, INF]),
    "matrix": ([[-1.0, -2.0], [-3.0, 0.0]], [[1.0, 2.0], [3.0, 0.5]]),
}


@pytest.mark.parametrize("kind", ["gaussian", "beta"])
@pytest.mark.parametrize("name", BOUNDS)
def test_actions_arrive_in_bounds_and_are_stored_unclipped(kind: str, name: str) -> None:
    low, high = map(np.float32, BOUNDS[name])
    if kind == "beta" and not np.isfinite([low, high]).all():
        pytest.skip("a beta needs bounds")
    args = ppo.Args(
        env_id="Recorder-v0", num_envs=2, num_steps=50, log_std_init=1.5, distribution=kind,
        env_kwargs=f'{{"low": {low.tolist()}, "high": {high.tolist()}}}'.replace("inf", "Infinity"),
    )  # fmt: skip
    envs = ppo.make_envs(args, 2, 0)
    agent = make_agent(envs.single_action_space, distribution=kind, log_std_init=1.5)
    rollout = ppo.Rollout(args, agent, envs, 0)
    Recorder.seen.clear()
    ppo.collect(agent, envs, rollout, [])
    seen = np.stack(Recorder.seen).reshape(50, 2, *low.shape)
    assert (seen >= low).all()
    assert (seen <= high).all()
    stored = rollout.actions.view(50, 2, *low.shape).numpy()
    if kind == "beta":
        assert ((stored >= 0) & (stored <= 1)).all()
        np.testing.assert_allclose(seen, low + (high - low) * stored, rtol=1e-5, atol=1e-6)
        assert seen.std() > 0
    else:
        np.testing.assert_allclose(seen, np.clip(stored, low, high), rtol=1e-6)
        assert name == "none" or ((stored < low) | (stored > high)).any()


def test_probability_ratio_is_one_before_the_first_step() -> None:
    for flags in ({}, {"distribution": "beta"}, {"std": "state", "norm_value": "popart"}):
        args = ppo.Args(env_id="Pendulum-v1", num_envs=2, num_steps=32, **flags)
        envs = ppo.make_envs(args, 2, 0)
        agent = ppo.Agent(args, envs.single_observation_space, envs.single_action_space)
        rollout = ppo.Rollout(args, agent, envs, 0)
        for _ in range(2):
            ppo.collect(agent, envs, rollout, [])
            rollout.signals = ppo.learning_signals(agent, rollout, args)
            batch = ppo.make_batch(agent, None, rollout, args)
            ratio = (agent.log_prob(agent(batch.obs)[0], batch.actions) - batch.logprobs).exp()
            torch.testing.assert_close(ratio, torch.ones(64), rtol=0, atol=1e-5)
            agent.obs_norm.advance(batch.obs)


def test_evaluation_uses_the_saved_normalisers_bit_for_bit(
    main: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(*SHORT, "--total-timesteps", 256, "--run-dir", "run", module=ppo)[0] == 0
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["agent"]["obs_norm.count"] == 256
    assert state["agent"]["reward_norm.std"] != 1
    taken = []
    to_env = ppo.Agent.to_env
    monkeypatch.setattr(
        ppo.Agent, "to_env", lambda self, a: taken.append(a.clone()) or to_env(self, a)
    )
    code, *_ = main("--eval", "run", "--eval-episodes", 1, module=ppo)
    assert code == 0
    args = ppo.Args(**state["args"])
    env = gym.make("Pendulum-v1")
    agent = ppo.Agent(args, env.observation_space, env.action_space)
    agent.load_state_dict(state["agent"])
    obs, _ = env.reset(seed=ppo.environment_seed(args.seed, state["step"]))
    for action in taken:
        with torch.no_grad():
            ours = agent.act(torch.as_tensor(obs)[None], None)
        assert torch.equal(ours, action)
        obs, *_ = env.step(to_env(agent, ours)[0])
    assert len(taken) == 200
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    assert all(torch.equal(after[name], state["agent"][name]) for name in after)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--env-id", "CartPole-v1"], "ppo_discrete.py"),
        (["--env-id", "Pendulum-v1", "--log-std-final", "-1"], "--std fixed"),
        (["--env-id", "Pendulum-v1", "--log-std-init", "nan"], "--log-std-init nan"),
        (["--env-id", "Pendulum-v1", "--std", "free"], "'independent'"),
        (["--env-id", "Whole-v0"], "floating-point"),
        (
            [
                "--env-id",
                "Recorder-v0",
                "--distribution",
                "beta",
                "--env-kwargs",
                '{"low":[-1],"high":[Infinity]}',
            ],
            "bounded",
        ),
    ],
)
def test_wrong_flags(flags: list, said: str, main: Callable, tmp_path: Path) -> None:
    code, _, err = main(*flags, "--no-progress", module=ppo)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not list(tmp_path.iterdir())


def test_a_reference_of_another_distribution_is_refused(main: Callable, tmp_path: Path) -> None:
    flags = [*SHORT, "--total-timesteps", 64]
    assert main(*flags, "--distribution", "beta", "--run-dir", "r", module=ppo)[0] == 0
    code, _, err = main(*flags, "--ref-checkpoint", "r", "--run-dir", "s", module=ppo)
    assert (code, err) == (2, "error: --ref-checkpoint: its distribution is beta\n")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "first, then, said",
    [
        ("--std fixed", "--resume r --std independent", "--resume: the trained parameters differ"),
        ("--std independent", "--resume r --std fixed", "--resume: the trained parameters differ"),
        ("--std state", "--resume r --distribution beta", "--resume: its distribution is gaussian"),
        ("--std state", "--eval r --distribution beta", "--eval: its distribution is gaussian"),
    ],
)
def test_a_checkpoint_of_another_policy_is_refused(
    first: str, then: str, said: str, main: Callable, tmp_path: Path
) -> None:
    flags = [*SHORT, "--total-timesteps", 64, *first.split()]
    assert main(*flags, "--run-dir", "r", module=ppo)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    more = () if "eval" in then else ("--total-timesteps", 4096)
    code, _, err = main(*then.split(), *more, module=ppo)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {said}")
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before


def test_bounds_in_double_precision() -> None:
    """The deviation of a beta is in the precision of the networks."""
    space = spaces.Box(-2, 2, (2,), np.float64)
    agent, dist = make_agent(space, distribution="beta"), torch.full((5, 4), 2.0)
    deviation = agent.deviation(dist)
    assert deviation.dtype == torch.float32
    torch.testing.assert_close(deviation, torch.full((5, 2), 4 * 0.05**0.5))


class Broken(gym.Env):
    """Its third observation is not a number."""

    observation_space, action_space = BOX, ACTIONS

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: np.ndarray) -> tuple:
        self.steps += 1
        obs = np.full(3, np.nan if self.steps == 3 else 0, np.float32)
        return obs, 0.0, False, self.steps == 20, {}


gym.register("BrokenBox-v0", Broken)


@pytest.mark.parametrize("kind", ["gaussian", "beta"])
def test_a_broken_observation_ends_in_one_line(kind: str, main: Callable) -> None:
    flags = [
        "--env-id",
        "BrokenBox-v0",
        "--distribution",
        kind,
        *SHORT[2:],
        "--total-timesteps",
        64,
    ]
    code, out, err = main(*flags, module=ppo)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "error: the observation of environment 0 is not finite at step 2"


def test_pendulum_is_learned(main: Callable, tmp_path: Path) -> None:
    """A random policy gets -1200 on average."""
    flags = "--env-id Pendulum-v1 --total-timesteps 61440 --num-envs 4 --num-steps 256 --gamma 0.9 "
    flags += "--learning-rate 1e-3 --num-minibatches 16 --run-dir run --no-progress"
    assert main(*flags.split(), module=ppo)[0] == 0
    assert read_scalars(tmp_path / "run")["charts/return_100"][-1][1] > -500
