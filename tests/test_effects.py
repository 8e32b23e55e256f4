"""Flags: each changes the numbers that it is about, and nothing else."""

import copy
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import read_scalars
from gymnasium import spaces
from torch import Tensor, nn

import ppo_discrete as ppo

CPU = torch.device("cpu")
BOX, TWO = spaces.Box(-np.inf, np.inf, (4,), np.float32), spaces.Discrete(2)
SHORT = "--num-steps 8 --total-timesteps 128 --no-progress --run-dir run"  # 4 iterations


class Count(gym.Env):
    """Constant observation, 20 steps; the return counts the actions 1."""

    def __init__(self, render_mode: None = None) -> None:
        self.observation_space, self.action_space = spaces.Box(0, 1, (1,)), TWO
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        self.t = 0
        return np.ones(1, np.float32), {}

    def step(self, action: int) -> tuple:
        self.t += 1
        return np.ones(1, np.float32), float(action), self.t == 20, False, {}


class Noise(gym.Env):
    """Small random pixels and rewards; episodes of 9 steps, every other one truncated."""

    def __init__(self, render_mode: None = None) -> None:
        self.observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
        self.action_space, self.render_mode, self.end = TWO, render_mode, 0

    def observe(self) -> np.ndarray:
        return self.np_random.integers(256, size=(36, 36, 1), dtype=np.uint8)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.t, self.end = 0, 1 - self.end
        return self.observe(), {}

    def step(self, action: int) -> tuple:
        self.t += 1
        last, reward = self.t == 9, float(self.np_random.normal())
        return self.observe(), reward, last and self.end == 0, last and self.end == 1, {}


for cls in (Count, Noise):
    gym.register(f"{cls.__name__}-v0", cls)


# ---- ways to look at one part


def prepare(**flags: Any) -> SimpleNamespace:
    """A rollout of CartPole, ready for its update."""
    args = replace(ppo.Args(num_steps=32), **flags)
    torch.manual_seed(args.seed)
    seed = ppo.environment_seed(args.seed, 0)
    envs = ppo.make_envs(args, args.num_envs, seed)
    agent = ppo.Agent(args, envs.single_observation_space, envs.single_action_space)
    rollout = ppo.Rollout(args, agent, envs, seed)
    ppo.collect(agent, envs, rollout, [])
    envs.close()
    rollout.signals = ppo.learning_signals(agent, rollout, args)
    batch = ppo.make_batch(agent, None, rollout, args)
    return SimpleNamespace(args=args, agent=agent, rollout=rollout, batch=batch)


def learn(made: SimpleNamespace, warmup: bool = False, **flags: Any) -> SimpleNamespace:
    """The update of a copy of the agent, with what each call of the loss was given."""
    args, agent = replace(made.args, **flags), copy.deepcopy(made.agent)
    coefs = torch.tensor([1.0, args.vf_coef, -args.ent_coef, args.kl_coef, 0.0])
    loss, calls = ppo.ppo_loss, []

    def spy(agent: ppo.Agent, minibatch: ppo.Batch, coefs: Tensor, args: ppo.Args) -> tuple:
        state = copy.deepcopy(agent.state_dict())
        calls.append(SimpleNamespace(minibatch=minibatch, coefs=[*coefs], state=state))
        return loss(agent, minibatch, coefs, args)

    torch.manual_seed(5)
    optimizer = ppo.Adam(agent, args)
    step, gradients = optimizer.step, []
    optimizer.step = lambda gradient: (gradients.append(gradient.clone()), step(gradient))
    with pytest.MonkeyPatch.context() as patch:
        if not args.compile:
            patch.setattr(ppo, "ppo_loss", spy)
        metrics = ppo.update(agent, optimizer, made.rollout, made.batch, args, coefs, warmup)
    actor, critic = (group["step"] for group in optimizer.param_groups)
    steps = {"trunk": actor if len(agent.trunk) else 0, "actor": actor, "critic": critic}
    gradient = torch.zeros_like(optimizer.weights)
    gradient[-len(gradients[-1]) :] = gradients[-1]
    metrics = dict(zip(ppo.METRICS, metrics.tolist(), strict=True))
    return SimpleNamespace(
        agent=agent, metrics=metrics, calls=calls, steps=steps, gradient=gradient.double()
    )


def parts_that_differ(a: nn.Module, b: nn.Module) -> set[str]:
    """Which of trunk, actor and critic hold different parameters."""
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return {name.split(".")[0] for (name, x), (_, y) in pairs if not torch.equal(x, y)}


def loss_of(made: SimpleNamespace, **flags: Any) -> SimpleNamespace:
    """Loss, metrics and gradients on the whole batch, of an agent that has moved since."""
    args, agent = replace(made.args, **flags), copy.deepcopy(made.agent)
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    batch = made.batch._replace(weights=ppo.normalize(made.batch.weights))
    coefs = torch.tensor([1.0, args.vf_coef, -args.ent_coef, args.kl_coef, 0.0])
    loss, outputs = ppo.ppo_loss(agent, batch, coefs, args)
    loss.backward()
    metrics = ppo.measure(agent, batch, *outputs, args)
    grads = {name: p.grad.clone() for name, p in agent.named_parameters()}
    metrics = dict(zip(ppo.METRICS, metrics.tolist(), strict=False))
    return SimpleNamespace(agent=agent, loss=loss.item(), metrics=metrics, grads=grads)


@pytest.fixture
def iterations(main: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`iterations(flags)`: what every update of a run of 4 iterations was given."""

    def iterations(flags: str) -> list[SimpleNamespace]:
        seen, update = [], ppo.update

        def spy(agent: ppo.Agent, optimizer: ppo.Adam, *rest: Any) -> Tensor:
            groups = [{k: group[k] for k in ("lr", "eps")} for group in optimizer.param_groups]
            _, batch, _, coefs, warmup = rest
            seen.append(SimpleNamespace(groups=groups, batch=batch, coefs=[*coefs], warmup=warmup))
            return update(agent, optimizer, *rest)

        monkeypatch.setattr(ppo, "update", spy)
        code, _, err = main(*SHORT.split(), *flags.split())
        assert code == 0, err
        return seen

    return iterations


@pytest.fixture
def started(main: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`started(flags)`: the arguments, agent and first rollout with which training would begin."""

    def started(flags: str = "") -> SimpleNamespace:
        seen = SimpleNamespace()

        def spy(
            args: ppo.Args, agent: ppo.Agent, envs: gym.vector.VectorEnv, seed: int, *_: Any
        ) -> None:
            seen.args, seen.agent = args, agent
            seen.rollout = ppo.Rollout(args, agent, envs, seed)
            ppo.collect(agent, envs, seen.rollout, [])

        monkeypatch.setattr(ppo, "train", spy)
        code, _, err = main(*flags.split())
        assert code == 0, err
        return seen

    return started


# ---- runs


def test_run_dir(main: Callable, tmp_path: Path) -> None:
    short = SHORT.removesuffix("--run-dir run").split()
    assert main(*short)[0] == 0
    assert main(*short, "--exp-name", "mine", "--seed", 7)[0] == 0
    assert main(*short, "--seed", 7, "--run-dir", "out/{seed}/{exp} of {env}")[0] == 0
    names = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("args.json"))
    assert names[0] == "out/7/ppo_discrete of CartPole-v1"
    assert re.fullmatch(r"runs/CartPole-v1__mine__7__\d{10}", names[1])
    assert re.fullmatch(r"runs/CartPole-v1__ppo_discrete__1__\d{10}", names[2])


@pytest.mark.parametrize("vectorization", ["sync", "native", "envpool"])
def test_seed(started: Callable, vectorization: str) -> None:
    """Weights, environments and actions follow it."""
    if vectorization == "envpool":
        pytest.importorskip("envpool")
    flags = f"--vectorization {vectorization} --seed"
    one, same, other = (started(f"{flags} {seed}") for seed in (1, 1, 2))
    assert not parts_that_differ(one.agent, same.agent)
    assert parts_that_differ(one.agent, other.agent) == {"actor", "critic"}
    assert torch.equal(one.rollout.obs, same.rollout.obs)
    assert not torch.isclose(one.rollout.obs[0], other.rollout.obs[0]).all(-1).any()
    assert torch.equal(one.rollout.actions, same.rollout.actions)
    assert not torch.equal(one.rollout.actions, other.rollout.actions)


@pytest.mark.parametrize("switch", ["", "no-"])
def test_torch_deterministic(
    started: Callable, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", bool(switch))
    started(f"--{switch}torch-deterministic")
    assert torch.backends.cudnn.deterministic == (not switch)


@pytest.mark.parametrize("available", [True, False])
@pytest.mark.parametrize("switch", ["", "no-"])
def test_cuda(
    started: Callable, monkeypatch: pytest.MonkeyPatch, switch: str, available: bool
) -> None:
    """The GPU is used if there is one, unless told otherwise."""
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(ppo.Agent, "to", lambda agent, d: devices.append(str(d)) or agent)
    started(f"--{switch}cuda")
    assert devices == ["cuda:0" if available and not switch else "cpu"]


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_threads(started: Callable, threads: int) -> None:
    torch.set_num_threads(3 - threads)
    started(f"--torch-threads {threads}")
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    assert found == threads


@pytest.mark.parametrize("every, saved", [(0, [4]), (1, [1, 2, 3, 4, 4]), (3, [3, 4])])
def test_checkpoint_every(
    main: Callable, monkeypatch: pytest.MonkeyPatch, every: int, saved: list[int]
) -> None:
    steps, save = [], ppo.save_checkpoint

    def spy(path: Path, state: dict) -> None:
        steps.append(state["step"] // 32)
        save(path, state)

    monkeypatch.setattr(ppo, "save_checkpoint", spy)
    assert main(*SHORT.split(), "--checkpoint-every", every)[0] == 0
    assert steps == saved
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 128


def test_evaluation(main: Callable) -> None:
    """Number of episodes; the mode takes one action all the time, samples take both."""
    assert main(*SHORT.split(), "--env-id", "Count-v0", "--learning-rate", 0)[0] == 0
    for n in (1, 4):
        for switch, possible in (("--", {0.0, 20.0}), ("--no-", set(map(float, range(3, 18))))):
            flags = ("--eval", "run", "--eval-episodes", n, f"{switch}eval-deterministic")
            code, out, err = main(*flags)
            assert code == 0, err
            returns = [float(x) for x in re.findall(r"episode \d+: return ([\d.]+)", out)]
            assert len(returns) == n
            assert set(returns) <= possible
            assert f"of {n} episodes" in out


@pytest.mark.parametrize(
    "envs, steps, total, points", [(4, 8, 128, 4), (2, 5, 49, 4), (3, 4, 12, 1)]
)
def test_size_of_rollouts(
    iterations: Callable, envs: int, steps: int, total: int, points: int
) -> None:
    """Whole rollouts of num-envs x num-steps within total-timesteps."""
    flags = f"--num-envs {envs} --num-steps {steps} --total-timesteps {total} --num-minibatches 1"
    seen = iterations(flags)
    assert [len(it.batch.obs) for it in seen] == [envs * steps] * points
    logged = [step for step, _ in read_scalars("run")["losses/entropy"]]
    assert logged == [envs * steps * (i + 1) for i in range(points)]


# ---- network


@pytest.mark.parametrize("sizes", [(), (16,), (8, 12, 5)])
@pytest.mark.parametrize("shared", [True, False])
def test_hidden_sizes_and_shared_network(sizes: tuple[int, ...], shared: bool) -> None:
    torch.manual_seed(1)
    agent = ppo.Agent(ppo.Args(hidden_sizes=sizes, shared_network=shared), BOX, TWO)
    bodies = [agent.trunk] if shared else [agent.actor[:-1], agent.critic[:-1]]
    for body in bodies:
        layers = [m for m in body if isinstance(m, nn.Linear)]
        assert [(m.in_features, m.out_features) for m in layers] == list(pairwise((4, *sizes)))
        assert [type(m) for m in body] == [nn.Linear, nn.Tanh] * len(sizes)
    assert len(agent.trunk) == (2 * len(sizes) if shared else 0)
    assert [len(agent.actor), len(agent.critic)] == [1 if shared else 2 * len(sizes) + 1] * 2
    assert (agent.actor[-1].out_features, agent.critic[-1].out_features) == (2, 1)
    agent(torch.randn(3, 4))[1].sum().backward()
    touched = {name.split(".")[0] for name, p in agent.named_parameters() if p.grad is not None}
    assert touched == ({"trunk", "critic"} if shared and sizes else {"critic"})


@pytest.mark.parametrize(
    "name, function",
    [
        ("tanh", math.tanh),
        ("relu", lambda x: max(x, 0.0)),
        ("elu", lambda x: x if x > 0 else math.exp(x) - 1),
        ("gelu", lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
        ("silu", lambda x: x / (1 + math.exp(-x))),
    ],
)
def test_activation(name: str, function: Callable) -> None:
    torch.manual_seed(1)
    agent = ppo.Agent(ppo.Args(activation=name), BOX, TWO)
    torch.manual_seed(1)
    assert not parts_that_differ(agent, ppo.Agent(ppo.Args(), BOX, TWO))
    for row in torch.randn(5, 4):
        for net, out in ((agent.actor, agent(row[None])[0]), (agent.critic, agent(row[None])[1])):
            x = row.double().numpy()
            for layer in net:
                if isinstance(layer, nn.Linear):
                    weight, bias = (p.detach().double().numpy() for p in layer.parameters())
                    x = weight @ x + bias
                else:
                    x = np.array([function(v) for v in x])
            if net is agent.actor:
                x = x - np.log(np.exp(x).sum())
            np.testing.assert_allclose(out.detach().flatten(), x, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_ortho_init(shared: bool) -> None:
    """Gains sqrt 2 within, 0.01 for the policy's head and 1 for the critic's; biases 0."""
    for space in (BOX, spaces.Box(0, 255, (4, 84, 84), np.uint8)):
        agent = ppo.Agent(ppo.Args(shared_network=shared), space, TWO)
        gains = {agent.actor[-1]: 0.01, agent.critic[-1]: 1.0}
        layers = [m for m in agent.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        assert len(layers) > 3
        for layer in layers:
            weight = layer.weight.detach().flatten(1).double()
            weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
            gain = gains.get(layer, math.sqrt(2))
            torch.testing.assert_close(
                weight @ weight.T, gain**2 * torch.eye(len(weight)).double(), atol=2e-5, rtol=0
            )
            assert not layer.bias.any()


def test_init_of_pytorch() -> None:
    """Uniform within 1 / sqrt(inputs), for weights and biases."""
    torch.manual_seed(1)
    agent = ppo.Agent(ppo.Args(ortho_init=False), BOX, TWO)
    torch.manual_seed(1)
    net = [nn.Linear(4, 64), nn.Linear(64, 64)]
    net += [nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 2), nn.Linear(64, 1)]
    layers = [m for m in (*agent.actor[:-1], *agent.critic[:-1]) if isinstance(m, nn.Linear)]
    for layer, plain in zip((*layers, agent.actor[-1], agent.critic[-1]), net, strict=True):
        assert torch.equal(layer.weight, plain.weight)
        assert torch.equal(layer.bias, plain.bias)


def test_pixels_change_defaults_but_not_given_flags(started: Callable) -> None:
    args = started("--env-id Noise-v0 --num-steps 2").args
    assert (args.num_envs, args.total_timesteps) == (8, 10_000_000)
    assert (args.clip_coef, args.shared_network) == (0.1, True)
    flags = "--num-envs 2 --clip-coef 0.2 --no-shared-network --total-timesteps 500000"
    args = started(f"--env-id Noise-v0 --num-steps 2 {flags}").args
    assert (args.num_envs, args.total_timesteps) == (2, 500_000)
    assert (args.clip_coef, args.shared_network) == (0.2, False)


# ---- normalisers


@pytest.mark.parametrize(
    "flags, norms",
    [
        ("", set()),
        ("--norm-obs", {"obs_norm"}),
        ("--norm-reward", {"reward_norm"}),
        ("--norm-value running", {"value_norm"}),
        ("--norm-value popart", {"value_norm"}),
    ],
)
def test_normalisers_that_run(main: Callable, flags: str, norms: set[str]) -> None:
    assert main(*SHORT.split(), *flags.split())[0] == 0
    agent = torch.load("run/checkpoint.pt", weights_only=True)["agent"]
    for norm in ("obs_norm", "reward_norm", "value_norm"):
        assert agent[f"{norm}.count"] == (128 if norm in norms else 0)
        plain = (agent[f"{norm}.mean"] == 0).all() and (agent[f"{norm}.std"] == 1).all()
        assert plain == (norm not in norms)


@pytest.mark.parametrize("clip", [None, 10.0, 0.5])
def test_norm_obs_and_clip_obs(clip: float | None) -> None:
    torch.manual_seed(1)
    agent = ppo.Agent(ppo.Args(norm_obs=True, clip_obs=clip), BOX, TWO)
    torch.manual_seed(1)
    plain = ppo.Agent(ppo.Args(clip_obs=clip), BOX, TWO)
    seen, obs = torch.randn(50, 4) * 3 + 2, torch.randn(20, 4) * 90
    for each in (agent, plain):
        each.obs_norm.advance(seen)
    assert torch.equal(plain.preprocess(obs), obs)
    expected = (obs.double().numpy() - seen.double().numpy().mean(0)) / seen.double().numpy().std(0)
    if clip is not None:
        expected = np.clip(expected, -clip, clip)
    np.testing.assert_allclose(agent.preprocess(obs), expected, atol=1e-4)
    ready = torch.as_tensor(expected, dtype=torch.float32)
    for a, b in zip(agent(obs), plain(ready), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    noise = agent.draw_noise(20)
    assert torch.equal(agent.act(obs, noise), plain.act(ready, noise))


@pytest.mark.parametrize("clip", [None, 10.0, 0.25])
def test_norm_reward_and_clip_reward(clip: float | None) -> None:
    made = prepare()
    made.rollout.rewards[:] = np.random.default_rng(1).normal(size=(32, 4)) * 20
    raw = made.rollout.rewards.copy()
    plain = ppo.learning_signals(made.agent, made.rollout, made.args)
    np.testing.assert_array_equal(plain[0], np.float32(raw))
    args = replace(made.args, norm_reward=True, clip_reward=clip)
    scaled = ppo.learning_signals(made.agent, made.rollout, args)
    limit = np.inf if clip is None else clip
    expected = np.clip(raw / made.agent.reward_norm.std.item(), -limit, limit)
    np.testing.assert_allclose(scaled[0], expected, rtol=1e-5)
    assert (np.abs(expected) == clip).any() == (clip == 0.25)
    for a, b in zip(plain[1:], scaled[1:], strict=True):
        assert torch.equal(a, b)
    np.testing.assert_array_equal(made.rollout.rewards, raw)


@pytest.mark.parametrize("epochs", [1, 2])
def test_norm_adv_and_its_scope(epochs: int) -> None:
    """Off: as they are; else mean 0 and deviation 1 in each minibatch, or in the batch."""
    made = prepare()
    for flags, scope in (
        ({"norm_adv": False}, "none"),
        ({}, "minibatch"),
        ({"norm_adv_scope": "batch"}, "batch"),
    ):
        calls = learn(made, update_epochs=epochs, **flags).calls
        parts = [call.minibatch.advantages.double() for call in calls]
        for i in range(epochs):
            rows = torch.cat(parts[4 * i : 4 * i + 4])
            raw = made.batch.advantages.double()
            std = raw if scope == "none" else (raw - raw.mean()) / raw.std()
            if scope != "minibatch":
                torch.testing.assert_close(rows.sort()[0], std.sort()[0], atol=1e-5, rtol=1e-5)
            assert (abs(rows.mean()) < 1e-5) == (scope != "none")
        alike = [abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-4 for x in parts]
        assert all(alike) == (scope == "minibatch")
        assert any(alike) == (scope == "minibatch")


# ---- targets


def test_gamma_and_gae_lambda() -> None:
    """They reach advantages and targets, and leave values and distributions alone."""
    made = prepare()
    rewards, terminated, truncated = made.rollout.signals
    base = ppo.estimate(made.agent, made.rollout, made.args)
    values = ppo.evaluate_rows(made.agent, made.rollout.obs.flatten(0, 1))[1].view(33, 4)
    ended = terminated | truncated
    for gamma, lam in ((0.0, 0.95), (0.99, 0.0), (0.9, 0.5), (0.99, 0.95), (1.0, 1.0)):
        args = replace(made.args, gamma=gamma, gae_lambda=lam)
        dists, olds, advantages, targets = ppo.estimate(made.agent, made.rollout, args)
        assert torch.equal(dists, base[0])
        assert torch.equal(olds, base[1])
        for n in range(4):
            after = 0.0
            for t in reversed(range(32)):
                assert not truncated[t, n]
                going = 1 - float(ended[t, n])
                delta = float(rewards[t, n] + gamma * going * values[t + 1, n] - values[t, n])
                after = delta + gamma * lam * going * after
                assert advantages.view(32, 4)[t, n].item() == pytest.approx(after, abs=1e-4)
                total = after + values[t, n].item()
                assert targets.view(32, 4)[t, n].item() == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("norm_value", ["none", "running"])
def test_recompute_advantages(norm_value: str) -> None:
    """Every epoch but the first takes advantages and targets from the critic as it is then."""
    made = prepare(norm_value=norm_value, norm_adv=False, vf_coef=5.0)
    off, on = (learn(made, recompute_advantages=flag, update_epochs=3) for flag in (False, True))
    norm = made.agent.value_norm
    for result, recomputes in ((off, False), (on, True)):
        for epoch in range(3):
            calls = result.calls[4 * epoch : 4 * epoch + 4]
            now = copy.deepcopy(made.agent)
            if recomputes:
                now.load_state_dict(calls[0].state)
            _, _, advantages, targets = ppo.estimate(now, made.rollout, made.args)
            if epoch == 0 or not recomputes:
                advantages, targets = made.batch.advantages, made.batch.targets
            else:
                assert (advantages - made.batch.advantages).abs().max() > 1e-3
                targets = (targets - norm.mean) / norm.std
            for name, rows in (("advantages", advantages), ("targets", targets)):
                given = torch.cat([getattr(call.minibatch, name) for call in calls])
                torch.testing.assert_close(given.sort()[0], rows.sort()[0])
            for name in ("values", "logprobs"):
                given = torch.cat([getattr(call.minibatch, name) for call in calls])
                assert torch.equal(given.sort()[0], getattr(made.batch, name).sort()[0])


# ---- losses


@pytest.mark.parametrize(
    "flags, metrics, parts",
    [
        ({"clip_coef": None}, "policy_loss clipfrac", "actor"),
        ({"clip_coef": 0.02}, "policy_loss clipfrac", "actor"),
        ({"vclip_coef": 0.02}, "value_loss value_clipfrac", "critic"),
        ({"clip_vloss": False}, "value_loss", "critic"),
        ({"value_loss": "huber"}, "value_loss value_loss_unclipped", "critic"),
        ({"vf_coef": 0.25}, "", "critic"),
        ({"ent_coef": 0.5}, "", "actor"),
        ({"kl_coef": 0.5}, "", "actor"),
        ({"gamma": 0.5}, "", ""),
        ({"max_grad_norm": None}, "", ""),
    ],
)
def test_what_a_flag_changes_in_the_loss(flags: dict, metrics: str, parts: str) -> None:
    """Which metrics and which network's gradient, and no others."""
    made = prepare(vclip_coef=0.2)
    base, other = loss_of(made), loss_of(made, **flags)
    changed = {tag for tag in base.metrics if base.metrics[tag] != other.metrics[tag]}
    assert changed == {f"losses/{name}" for name in metrics.split()}
    grads = {
        name.split(".")[0] for name in base.grads if (base.grads[name] != other.grads[name]).any()
    }
    assert grads == set(parts.split())
    assert (base.loss != other.loss) == bool(parts)


@pytest.mark.parametrize("clip", [None, 0.1, 0.3])
def test_clip_coef(clip: float | None) -> None:
    made = prepare()
    found, loss, clipped = loss_of(made, clip_coef=clip), 0.0, 0
    rows = (made.batch.obs, made.batch.actions, made.batch.logprobs, made.batch.advantages)
    for obs, action, old, advantage in zip(*rows, strict=True):
        ratio = math.exp(found.agent(obs[None])[0][0, action].item() - old.item())
        near = ratio if clip is None else min(max(ratio, 1 - clip), 1 + clip)
        loss -= min(ratio * advantage.item(), near * advantage.item()) / len(rows[0])
        clipped += clip is not None and abs(ratio - 1) > clip
    assert found.metrics["losses/policy_loss"] == pytest.approx(loss, abs=1e-5)
    assert found.metrics["losses/clipfrac"] == pytest.approx(clipped / len(rows[0]))
    assert (clipped > 0) == (clip is not None)


@pytest.mark.parametrize(
    "value, old, target, flags, loss, slope",
    [
        (1.5, 1.0, 2.0, {"vclip_coef": 0.2}, 0.64, 0.0),
        (0.7, 1.0, 2.0, {"vclip_coef": 0.2}, 1.69, -2.6),
        (1.5, 1.0, 2.0, {"vclip_coef": 0.6}, 0.25, -1.0),
        (1.5, 1.0, 2.0, {"clip_coef": 0.2}, 0.64, 0.0),
        (1.5, 1.0, 2.0, {"clip_coef": None}, 0.25, -1.0),
        (1.5, 1.0, 2.0, {"clip_coef": None, "vclip_coef": 0.2}, 0.64, 0.0),
        (1.5, 1.0, 2.0, {"clip_vloss": False}, 0.25, -1.0),
        (1.5, 1.0, 2.0, {"clip_vloss": False, "value_loss": "huber"}, 0.25, -1.0),
        (5.0, 1.0, 2.0, {"clip_vloss": False}, 9.0, 6.0),
        (5.0, 1.0, 2.0, {"clip_vloss": False, "value_loss": "huber"}, 5.0, 2.0),
        (5.0, 1.0, 2.0, {"vclip_coef": 0.2, "value_loss": "huber"}, 5.0, 2.0),
        (5.0, 1.0, 7.0, {"vclip_coef": 0.2, "value_loss": "huber"}, 10.6, 0.0),
    ],
)
def test_value_loss_and_its_clip(
    value: float, old: float, target: float, flags: dict, loss: float, slope: float
) -> None:
    """Twice the loss of one row, and its slope."""
    agent = ppo.Agent(ppo.Args(hidden_sizes=()), BOX, TWO)
    nn.init.constant_(agent.critic[-1].bias, value)
    one, obs = torch.ones(1), torch.zeros(1, 4)
    dists = agent(obs)[0].detach()
    batch = ppo.Batch(
        obs, torch.zeros(1, dtype=torch.int64), dists[:, 0], dists, dists, one, target * one,
        old * one, one,
    )  # fmt: skip
    coefs = torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0])
    total, _ = ppo.ppo_loss(agent, batch, coefs, ppo.Args(**flags))
    total.backward()
    assert total.item() == pytest.approx(loss, rel=1e-5)
    assert agent.critic[-1].bias.grad.item() == pytest.approx(slope, rel=1e-5)


def test_vf_coef_and_ent_coef() -> None:
    """The gradient is that of policy loss + vf-coef x value loss - ent-coef x entropy."""
    made = prepare()
    policy = loss_of(made, vf_coef=0.0, ent_coef=0.0)
    for vf_coef, ent_coef in ((1.0, 0.0), (0.25, 0.0), (0.0, 0.5), (0.3, 0.1)):
        found = loss_of(made, vf_coef=vf_coef, ent_coef=ent_coef)
        value, entropy = loss_of(made, vf_coef=1.0, ent_coef=0.0), copy.deepcopy(found.agent)
        entropy.zero_grad()
        probs = entropy.actor(made.batch.obs).softmax(-1)
        torch.distributions.Categorical(probs).entropy().mean().backward()
        for name, parameter in entropy.named_parameters():
            if name.startswith("critic"):
                expected = vf_coef * value.grads[name]
            else:
                expected = policy.grads[name] - ent_coef * parameter.grad
            torch.testing.assert_close(found.grads[name], expected, atol=1e-6, rtol=1e-4)


# ---- update


@pytest.mark.parametrize(
    "flags, parts",
    [
        ({}, ""),
        ({"actor_adam_eps": 1e-2}, "actor"),
        ({"critic_adam_eps": 1e-2}, "critic"),
        ({"adam_eps": 1e-2}, "actor critic"),
        ({"norm_adv": False}, "actor"),
        ({"norm_adv_scope": "batch"}, "actor"),
        ({"clip_coef": 0.001, "vclip_coef": 0.2}, "actor"),
        ({"clip_vloss": False}, "critic"),
        ({"value_loss": "huber"}, "critic"),
        ({"vf_coef": 0.1}, "critic"),
        ({"ent_coef": 0.1}, "actor"),
        ({"critic_epochs": 2}, "critic"),
        ({"max_grad_norm": 0.01}, "actor critic"),
        ({"update_epochs": 3}, "actor critic"),
        ({"num_minibatches": 2}, "actor critic"),
        ({"gamma": 0.5, "gae_lambda": 0.1}, ""),
        ({"recompute_advantages": True}, "actor critic"),
    ],
)
def test_networks_that_a_flag_changes(flags: dict, parts: str) -> None:
    """Parameters after the update, compared with those without the flag."""
    made = prepare(max_grad_norm=None, update_epochs=2)
    made.batch.targets[::7] += 3.0
    assert parts_that_differ(learn(made).agent, learn(made, **flags).agent) == set(parts.split())


@pytest.mark.parametrize("epochs, minibatches", [(1, 1), (4, 4), (3, 128), (2, 8)])
def test_update_epochs_and_num_minibatches(epochs: int, minibatches: int) -> None:
    """Every epoch shuffles the rows anew and takes each of them once."""
    made = prepare()
    made.batch = made.batch._replace(targets=torch.arange(128.0))
    found = learn(made, update_epochs=epochs, num_minibatches=minibatches)
    assert found.steps == {
        "trunk": 0,
        "actor": epochs * minibatches,
        "critic": epochs * minibatches,
    }
    rows = [call.minibatch.targets.long() for call in found.calls]
    assert {len(part) for part in rows} == {128 // minibatches}
    orders = torch.cat(rows).view(epochs, 128)
    assert torch.equal(orders.sort(-1)[0], torch.arange(128).expand(epochs, -1))
    assert len(orders.unique(dim=0)) == epochs
    assert not (orders == torch.arange(128)).all(-1).any()
    for call, part in zip(found.calls, rows, strict=True):
        assert torch.equal(call.minibatch.obs, made.batch.obs[part])
        assert torch.equal(call.minibatch.actions, made.batch.actions[part])


@pytest.mark.parametrize("shared", [True, False])
def test_critic_epochs(shared: bool) -> None:
    """They come after the policy's, minimise the value loss and move the critic's own layers."""
    made = prepare(shared_network=shared)
    base, found = learn(made), learn(made, critic_epochs=3)
    assert parts_that_differ(base.agent, found.agent) == {"critic"}
    policy = "trunk" if shared else "actor"
    assert (found.steps[policy], found.steps["critic"]) == (16, 28)
    full = [1.0, 0.5, pytest.approx(-0.01), 0.0, 0.0]
    assert [call.coefs for call in found.calls] == [full] * 16 + [[0, 0.5, 0, 0, 0]] * 12


@pytest.mark.parametrize("shared", [True, False])
def test_critic_warmup(shared: bool) -> None:
    """A warm-up trains the critic's own layers alone and leaves the policy's optimiser alone."""
    made = prepare(shared_network=shared, ent_coef=0.5, kl_coef=0.5)
    found = learn(made, warmup=True)
    assert parts_that_differ(made.agent, found.agent) == {"critic"}
    assert found.steps == {"trunk": 0, "actor": 0, "critic": 16}
    dists = made.agent(made.batch.obs)[0]
    assert torch.equal(dists, found.agent(made.batch.obs)[0])


def test_critic_warmup_iterations(iterations: Callable) -> None:
    assert [it.warmup for it in iterations("--critic-warmup-iterations 3")] == [True] * 3 + [False]


@pytest.mark.parametrize("limit", [None, 1e-3, 1e3])
def test_max_grad_norm(limit: float | None) -> None:
    """The gradient of all networks together is scaled down to it; the norm before is logged."""
    made = prepare(update_epochs=1, num_minibatches=1)
    raw, found = learn(made, max_grad_norm=None), learn(made, max_grad_norm=limit)
    assert raw.metrics == found.metrics
    norm = math.sqrt(raw.gradient.square().sum().item())
    assert found.metrics["losses/grad_norm"] == pytest.approx(norm, rel=1e-5)
    scale = 1e-3 / norm if limit == 1e-3 else 1.0
    assert norm > 1e-2
    assert len(raw.gradient) == sum(p.numel() for p in raw.agent.parameters())
    torch.testing.assert_close(found.gradient, scale * raw.gradient, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    "flags, actor, critic",
    [
        ("", 1e-5, 1e-5),
        ("--adam-eps 1e-3", 1e-3, 1e-3),
        ("--actor-adam-eps 1e-4", 1e-4, 1e-5),
        ("--critic-adam-eps 1e-4", 1e-5, 1e-4),
        ("--adam-eps 1e-3 --actor-adam-eps 1e-4 --critic-adam-eps 1e-6", 1e-4, 1e-6),
    ],
)
def test_adam_eps(iterations: Callable, flags: str, actor: float, critic: float) -> None:
    for it in iterations(flags):
        assert [group["eps"] for group in it.groups] == [actor, critic]


@pytest.mark.parametrize("shared", [True, False])
def test_groups_of_the_optimiser(shared: bool) -> None:
    """Policy and trunk, then the critic; no parameter twice or left out."""
    agent = ppo.Agent(ppo.Args(shared_network=shared), BOX, TWO)
    before = {name: p.clone() for name, p in agent.named_parameters()}
    optimizer = ppo.Adam(agent, ppo.Args())
    flats = [group["flat"][0] for group in optimizer.param_groups]
    for flat, parts in zip(flats, ("trunk actor", "critic"), strict=True):
        own = [name for name, _ in agent.named_parameters() if name.split(".")[0] in parts]
        assert torch.equal(flat, torch.cat([before[name].flatten() for name in own]))
        flat.add_(1)
        for name in own:
            assert torch.equal(agent.get_parameter(name), before.pop(name) + 1), name
    assert not before


@pytest.mark.parametrize(
    "flags, actor, critic",
    [
        ("", 2.5e-4, 2.5e-4),
        ("--learning-rate 1e-3", 1e-3, 1e-3),
        ("--actor-learning-rate 1e-2", 1e-2, 2.5e-4),
        ("--critic-learning-rate 0", 2.5e-4, 0.0),
        ("--learning-rate 1e-3 --actor-learning-rate 0 --critic-learning-rate 3e-3", 0.0, 3e-3),
    ],
)
@pytest.mark.parametrize("anneal", [True, False])
def test_learning_rates(
    iterations: Callable, flags: str, actor: float, critic: float, anneal: bool
) -> None:
    seen = iterations(f"--{'' if anneal else 'no-'}anneal-lr {flags}")
    for left, it in zip((1, 0.75, 0.5, 0.25) if anneal else (1, 1, 1, 1), seen, strict=True):
        rates = [group["lr"] for group in it.groups]
        assert rates == pytest.approx([left * actor, left * critic])
    logged = [value for _, value in read_scalars("run")["charts/learning_rate"]]
    assert logged == pytest.approx([it.groups[0]["lr"] for it in seen])


@pytest.mark.parametrize("part", ["actor", "critic"])
def test_learning_rate_zero_stops_one_network(main: Callable, part: str) -> None:
    flags = (*SHORT.split(), f"--{part}-learning-rate", 0)
    torch.manual_seed(1)
    before = ppo.Agent(ppo.Args(), BOX, TWO)
    assert main(*flags)[0] == 0
    after = copy.deepcopy(before)
    after.load_state_dict(torch.load("run/checkpoint.pt", weights_only=True)["agent"])
    assert parts_that_differ(before, after) == {"actor", "critic"} - {part}


def test_coefficients_reach_the_update(iterations: Callable) -> None:
    seen = iterations("--vf-coef 0.7 --ent-coef 0.03 --kl-coef 0.2")
    for it in seen:
        assert it.coefs == pytest.approx([1, 0.7, -0.03, 0.2, 0])


# ---- together

ENVS = ["--env-id CartPole-v1", "--env-id CartPole-v1 --vectorization native", "--env-id Noise-v0"]
OPTIONS = {
    "env_id": ENVS,
    "seed": [f"--seed {i}" for i in range(50)],
    "torch_deterministic": ["", "--no-torch-deterministic"],
    "cuda": ["", "--no-cuda"],
    "checkpoint_every": ["", "--checkpoint-every 1", "--checkpoint-every 0"],
    "num_envs": ["--num-envs 2", "--num-envs 4"],
    "num_steps": ["--num-steps 8", "--num-steps 16"],
    "episodic_life": ["", "--no-episodic-life"],
    "sign_reward": ["", "--no-sign-reward"],
    "hidden_sizes": ["", "--hidden-sizes 7", "--hidden-sizes 16 8 4"],
    "activation": [f"--activation {name}" for name in ppo.ACTIVATIONS],
    "ortho_init": ["", "--no-ortho-init"],
    "shared_network": ["--no-shared-network", "--shared-network"],
    "norm_obs": ["", "--norm-obs"],
    "clip_obs": ["", "--clip-obs none", "--clip-obs 1"],
    "norm_reward": ["", "--norm-reward"],
    "clip_reward": ["", "--clip-reward none", "--clip-reward 1"],
    "norm_value": ["", "--norm-value running", "--norm-value popart"],
    "norm_adv": ["", "--no-norm-adv"],
    "norm_adv_scope": ["", "--norm-adv-scope batch"],
    "gamma": ["", "--gamma 0", "--gamma 1"],
    "gae_lambda": ["", "--gae-lambda 0", "--gae-lambda 1"],
    "value_target": ["", "--value-target mc", "--value-target td"],
    "recompute_advantages": ["", "--recompute-advantages"],
    "bootstrap_truncated": ["", "--no-bootstrap-truncated"],
    "clip_coef": ["", "--clip-coef none", "--clip-coef 0.05"],
    "dual_clip_coef": ["", "--dual-clip-coef 3"],
    "kl_coef": ["", "--kl-coef 0.5"],
    "kl_target": ["", "--kl-target 0.01"],
    "target_kl": ["", "--target-kl 0.001"],
    "vf_coef": ["", "--vf-coef 1"],
    "clip_vloss": ["", "--no-clip-vloss"],
    "vclip_coef": ["", "--vclip-coef 0.5"],
    "value_loss": ["", "--value-loss huber"],
    "critic_epochs": ["", "--critic-epochs 2"],
    "critic_warmup_iterations": ["", "--critic-warmup-iterations 1"],
    "ent_coef": ["", "--ent-coef 0", "--ent-coef 0.1"],
    "ent_coef_final": ["", "--ent-coef-final 0"],
    "learning_rate": ["", "--learning-rate 1e-2"],
    "actor_learning_rate": ["", "--actor-learning-rate 1e-3"],
    "critic_learning_rate": ["", "--critic-learning-rate 1e-3"],
    "anneal_lr": ["", "--no-anneal-lr"],
    "adam_eps": ["", "--adam-eps 1e-8"],
    "actor_adam_eps": ["", "--actor-adam-eps 1e-3"],
    "critic_adam_eps": ["", "--critic-adam-eps 1e-3"],
    "max_grad_norm": ["", "--max-grad-norm none", "--max-grad-norm 0.1"],
    "num_minibatches": ["--num-minibatches 1", "--num-minibatches 4", "--num-minibatches 8"],
    "update_epochs": ["--update-epochs 1", "--update-epochs 3"],
}
ELSEWHERE = """exp_name capture_video run_dir progress resume eval eval_episodes eval_deterministic
    env_kwargs vectorization total_timesteps ref_checkpoint ref_kl_coef compile torch_threads"""


def test_options_name_every_flag() -> None:
    assert {field.name for field in fields(ppo.Args)} == {*OPTIONS, *ELSEWHERE.split()}


@pytest.mark.parametrize("number", range(12))
def test_flags_combine(main: Callable, number: int) -> None:
    """Random combinations of all switches run, log finite numbers and leave finite weights."""
    draw = random.Random(number)
    flags = " ".join(draw.choice(choices) for choices in OPTIONS.values()).split()
    envs, steps = (int(flags[flags.index(f"--num-{name}") + 1]) for name in ("envs", "steps"))
    code, _, err = main(
        *flags, "--total-timesteps", 2 * envs * steps, "--no-progress", "--run-dir", "run"
    )
    assert code == 0, err
    scalars = read_scalars("run")
    assert [step for step, _ in scalars["losses/policy_loss"]] == [envs * steps, 2 * envs * steps]
    for tag, points in scalars.items():
        assert all(math.isfinite(value) for _, value in points), tag
    state = torch.load("run/checkpoint.pt", weights_only=True)
    assert state["step"] == 2 * envs * steps
    assert all(rows.isfinite().all() for rows in state["agent"].values())
    assert json.loads(Path("run/args.json").read_text())["num_envs"] == envs
