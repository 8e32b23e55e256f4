"""Policies and networks: distributions, actions, shapes and initialization."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import read_scalars
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Beta, Categorical, Independent, Normal, kl_divergence

import ppo_continuous
import ppo_discrete

OBS = spaces.Box(-np.inf, np.inf, (3,))
BOX = spaces.Box(-2, 2, (2,))
KINDS = ["categorical", "gaussian", "beta"]
SHORT = ["--env-id", "Pendulum-v1", "--num-steps", 64, "--num-minibatches", 2, "--no-progress"]


def discrete(obs_space: spaces.Box = OBS, **flags: Any) -> Any:
    torch.manual_seed(0)
    return ppo_discrete.Agent(ppo_discrete.Args(**flags), obs_space, spaces.Discrete(4))


def continuous(space: spaces.Box = BOX, obs_space: spaces.Box = OBS, **flags: Any) -> Any:
    torch.manual_seed(0)
    return ppo_continuous.Agent(ppo_continuous.Args(**flags), obs_space, space)


def make_agent(kind: str, **flags: Any) -> Any:
    return discrete(**flags) if kind == "categorical" else continuous(distribution=kind, **flags)


def reference(kind: str, dist: Tensor) -> Any:
    if kind == "categorical":
        return Categorical(logits=dist)
    first, second = dist.chunk(2, -1)
    return Independent(Beta(first, second) if kind == "beta" else Normal(first, second.exp()), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_distributions_and_gradients_are_those_of_torch(kind: str) -> None:
    agent = make_agent(kind)
    leaf = torch.randn(2, 7, 4).double().requires_grad_()
    transforms = {"categorical": lambda x: (3 * x).log_softmax(-1), "beta": lambda x: 1 + x.exp()}
    p, q = transforms.get(kind, torch.clone)(leaf)
    actions = reference(kind, p).sample()
    for ours, theirs in (
        (agent.log_prob(p, actions), reference(kind, p).log_prob(actions)),
        (agent.entropy(p), reference(kind, p).entropy()),
        (agent.kl_divergence(p, q), kl_divergence(reference(kind, p), reference(kind, q))),
    ):
        assert ours.shape == (7,)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        grads = [torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind, action", [("categorical", 0), ("beta", [0.0]), ("beta", [1.0])])
def test_probabilities_of_zero_have_finite_terms_and_gradients(kind: str, action: Any) -> None:
    agent = make_agent(kind)
    leaf = torch.tensor([[0.0, -200.0, -1000.0, 0.0]], requires_grad=True)
    p = leaf.log_softmax(-1) if kind == "categorical" else 1 + leaf.exp()
    logprob = agent.log_prob(p, torch.tensor([action]))
    terms = logprob + agent.entropy(p) + agent.kl_divergence(p, p.detach().roll(1))
    assert terms.isfinite().all()
    assert torch.autograd.grad(terms.sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_and_mode(kind: str) -> None:
    """Samples follow the distribution of `forward`; without noise they are its mode."""
    flags = dict(std="state") if kind == "gaussian" else {}
    agent = make_agent(kind, hidden_sizes=(), ortho_init=False, norm_obs=False, **flags)
    obs, n = torch.randn(1, 3), 100_000
    with torch.no_grad():
        agent.actor[-1].bias += torch.randn(4)
        dist = agent(obs)[0]
        mode = agent.act(obs, None)
        samples = agent.act(obs.expand(n, 3), agent.noise.sample((n,)))
    if kind == "categorical":
        frequencies = samples.bincount(minlength=4) / n
        torch.testing.assert_close(frequencies, dist[0].exp(), rtol=0, atol=0.007)
        assert mode.tolist() == dist.argmax(-1).tolist()
        return
    truth = reference(kind, dist)
    torch.testing.assert_close(samples.mean(0), truth.mean[0], rtol=0, atol=0.02)
    torch.testing.assert_close(samples.std(0), truth.stddev[0], rtol=0.02, atol=0)
    entropy = -agent.log_prob(dist, samples).mean()
    torch.testing.assert_close(entropy, truth.entropy()[0], atol=0.02, rtol=0)
    assert abs(np.corrcoef(samples.T)[0, 1]) < 0.02
    grid = torch.linspace(0.0, 1.0, 20_001) if kind == "beta" else torch.linspace(-4, 4, 20_001)
    for i in range(2):
        points = mode.repeat(len(grid), 1)
        points[:, i] = grid
        peak = grid[agent.log_prob(dist.double(), points.double()).argmax()]
        assert mode[0, i].item() == pytest.approx(peak.item(), abs=1e-3)


class Recorder(gym.Env):
    """Keeps every action that it receives."""

    observation_space = OBS

    def __init__(self, space: spaces.Box) -> None:
        self.action_space = space
        self.seen = []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        return np.zeros(3, np.float32), {}

    def step(self, action: np.ndarray) -> tuple:
        assert self.action_space.contains(action)  # bounds, shape and dtype
        self.seen.append(np.array(action))
        return np.zeros(3, np.float32), 0.0, False, False, {}


BOUNDS = {
    "half": ([-np.inf, 0.0], [0.0, np.inf]),
    "none": ([-np.inf, -np.inf], [np.inf, np.inf]),
    "matrix": ([[-1.0, -2.0], [-3.0, 0.0]], [[1.0, 2.0], [3.0, 0.5]]),
}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind, name", [("gaussian", x) for x in BOUNDS] + [("beta", "matrix")])
def test_actions_are_clipped_only_for_the_environment(kind: str, name: str, dtype: type) -> None:
    """The environment's are in its bounds, shape and dtype; those of the loss are the samples."""
    low, high = (np.array(bound, dtype) for bound in BOUNDS[name])
    space = spaces.Box(low, high, dtype=dtype)
    args = ppo_continuous.Args(num_envs=2, num_steps=50, distribution=kind, log_std_init=1.5)
    envs = ppo_continuous.SyncEnvs([partial(Recorder, space)] * 2, autoreset_mode="SameStep")
    agent = continuous(space, distribution=kind, log_std_init=1.5)
    rollout = ppo_continuous.Rollout(args, agent, envs, 0)
    rollout.collect(agent, envs)
    seen = np.stack([env.seen for env in envs.envs], 1).astype(np.float64)
    stored = rollout.actions.reshape(50, 2, *low.shape)
    batch, _ = ppo_continuous.make_batch(agent, None, rollout, args)
    np.testing.assert_array_equal(batch["actions"].numpy().ravel(), stored.ravel())
    tolerance = 1e-2 if dtype == np.float16 else 1e-5
    if kind == "beta":
        assert ((stored >= 0) & (stored <= 1)).all()
        np.testing.assert_allclose(seen, low + (high - low) * stored, atol=tolerance)
    else:
        np.testing.assert_allclose(seen, stored.clip(low, high), rtol=tolerance)
        assert name == "none" or ((stored < low) | (stored > high)).any()
    stds = agent.action_std(batch["dists"])
    assert stds.dtype == torch.float32
    scale = torch.tensor(high - low).float().flatten() if kind == "beta" else 1.0
    torch.testing.assert_close(stds, reference(kind, batch["dists"]).stddev * scale)


@pytest.mark.parametrize("std", ["fixed", "independent", "state"])
def test_what_the_std_depends_on(std: str, main: Callable, tmp_path: Path) -> None:
    agent = continuous(std=std, log_std_init=-0.5)
    log_std = agent(torch.randn(4, 3))[0][:, 2:]
    torch.testing.assert_close(log_std, torch.full((4, 2), -0.5), rtol=0, atol=0.05)
    nn.init.normal_(agent.actor[-1].weight)
    log_std = agent(torch.randn(4, 3))[0][:, 2:]
    assert bool((log_std.std(0) > 1e-3).all()) == (std == "state")
    assert ("log_std" in dict(agent.named_parameters())) == (std == "independent")

    flags = ["--std", std, "--log-std-init", -1, "--run-dir", "run", "--total-timesteps", 256]
    assert main(*SHORT, *flags, module=ppo_continuous)[0] == 0
    curve = [value for _, value in read_scalars(tmp_path / "run")["policy/std_0"]]
    assert curve[0] == pytest.approx(np.exp(-1), rel=0.02)
    assert len(set(curve)) == (1 if std == "fixed" else 4)


@pytest.mark.parametrize("sizes", [(), (16,), (8, 12, 5)])
@pytest.mark.parametrize("shared", [True, False])
def test_hidden_sizes_shared_network_and_ortho_init(sizes: tuple, shared: bool) -> None:
    flags = dict(hidden_sizes=sizes, shared_network=shared)
    for make, outputs in ((discrete, 4), (continuous, 2)):
        agent, plain = make(**flags), make(**flags, ortho_init=False)
        widths = [*zip((3, *sizes), sizes)]
        body, head = [] if shared else widths, (3, *sizes)[-1]
        for network, shapes, gain in (
            (agent.trunk, widths if shared else [], None),
            (agent.actor, [*body, (head, outputs)], 0.01),
            (agent.critic, [*body, (head, 1)], 1.0),
        ):
            layers = [layer for layer in network if isinstance(layer, nn.Linear)]
            assert [(x.in_features, x.out_features) for x in layers] == shapes
            for layer in layers:
                expected = gain if gain and layer is layers[-1] else 2**0.5
                singular_values = torch.linalg.svdvals(layer.weight).detach().numpy()
                np.testing.assert_allclose(singular_values, expected, rtol=1e-5)
                assert not layer.bias.any()
        assert plain.actor[-1].bias.any()
        agent(torch.randn(5, 3))[1].sum().backward()
        trained = {name.split(".")[0] for name, p in agent.named_parameters() if p.grad is not None}
        assert trained == ({"trunk", "critic"} if shared and sizes else {"critic"})


@pytest.mark.parametrize(
    "name, function",
    [
        ("tanh", np.tanh),
        ("relu", lambda x: x.clip(0)),
        ("elu", lambda x: np.where(x > 0, x, np.exp(x) - 1)),
        ("gelu", lambda x: x * Normal(0, 1).cdf(torch.tensor(x)).numpy()),
        ("silu", lambda x: x / (1 + np.exp(-x))),
    ],
)
def test_activation(name: str, function: Callable) -> None:
    agent = discrete(hidden_sizes=(8, 8), activation=name).double()
    nn.init.normal_(agent.critic[0].bias)
    obs = torch.randn(5, 3).double()
    x = obs.numpy()
    for layer in agent.critic[:-1:2]:
        x = function(x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy())
    x = x @ agent.critic[-1].weight.detach().numpy()[0]
    np.testing.assert_allclose(agent(obs)[1].detach(), x, rtol=1e-9)


@pytest.mark.parametrize("size", [36, 84])
def test_images(size: int) -> None:
    """The Nature CNN reads bytes / 255, in both orders of the axes, without statistics."""
    frames = torch.randint(0, 256, (5, 4, size, size), dtype=torch.uint8)
    for make in (discrete, continuous):
        results = []
        for shape in ((4, size, size), (size, size, 4)):
            agent = make(obs_space=spaces.Box(0, 255, shape, np.uint8), norm_obs=True)
            obs = frames if shape[0] == 4 else frames.permute(0, 2, 3, 1)
            torch.testing.assert_close(agent.preprocess(obs), frames / 255.0)
            results.append(agent(obs))
        convolutions = [x for x in agent.actor if isinstance(x, nn.Conv2d)]
        sizes = [(*x.weight.shape, *x.stride) for x in convolutions]
        assert sizes == [(32, 4, 8, 8, 4, 4), (64, 32, 4, 4, 2, 2), (64, 64, 3, 3, 1, 1)]
        for x in convolutions:
            singular_values = torch.linalg.svdvals(x.weight.flatten(1)).detach().numpy()
            np.testing.assert_allclose(singular_values, 2**0.5, rtol=1e-5)
        dists, values = results[0]
        assert (dists.shape, values.shape) == ((5, 4), (5,))
        assert values.std() > 0
        torch.testing.assert_close(results[1], results[0])
