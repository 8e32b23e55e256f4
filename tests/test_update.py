"""`update`: minibatches, gradients, epochs; what flags of losses and optimizer change."""

import copy
import math
import random
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from conftest import read_scalars
from torch import nn
from torch.distributions import Categorical, kl_divergence

import ppo_continuous
import ppo_discrete
import ppo_multidiscrete_mask as ppo_mask

MODULES = [ppo_discrete, ppo_continuous, ppo_mask]
ENVS = {
    ppo_discrete: "CartPole-v1",
    ppo_continuous: "Pendulum-v1",
    ppo_mask: "TaxiDispatch-v0",
}
T, N = 16, 4
B = T * N


def make_optimizer(agent: nn.Module, args: Any) -> torch.optim.Optimizer:
    """Adam on a vector of the policy's and one of the critic's parameters."""
    groups = []
    for name in ("actor", "critic"):
        named = agent.named_parameters()
        parts = [p for key, p in named if key.startswith("critic.") == (name == "critic")]
        vector = nn.Parameter(torch.cat([p.detach().flatten() for p in parts]))
        nn.utils.vector_to_parameters(vector, parts)
        vector.parts = parts
        lr, eps = getattr(args, f"{name}_learning_rate"), getattr(args, f"{name}_adam_eps")
        lr, eps = args.learning_rate if lr is None else lr, args.adam_eps if eps is None else eps
        groups.append({"params": [vector], "lr": lr, "eps": eps})
    return torch.optim.Adam(groups)


def prepare(module: ModuleType = ppo_discrete, **flags: Any) -> SimpleNamespace:
    """A rollout of T steps of N environments, ready for its update."""
    settings = {"env_id": ENVS[module], "num_envs": N, "num_steps": T, "norm_obs": False}
    settings |= {"num_minibatches": 4, "update_epochs": 2, "clip_coef": 0.2} | flags
    args = module.Args(**settings)
    torch.manual_seed(1)
    envs = module.make_envs(args, N, 1)
    agent = module.Agent(args, envs.single_observation_space, envs.single_action_space)
    rollout = module.Rollout(args, agent, envs, 1)
    rollout.collect(agent, envs)
    envs.close()
    batch, _ = module.make_batch(agent, None, rollout, args)
    return SimpleNamespace(module=module, args=args, agent=agent, rollout=rollout, batch=batch)


def learn(made: SimpleNamespace, **flags: Any) -> SimpleNamespace:
    """The update of a copy of the agent, with every call of the loss."""
    module, args, agent = made.module, replace(made.args, **flags), copy.deepcopy(made.agent)
    coefs = torch.tensor([args.ent_coef, args.kl_coef])
    loss_function, calls = module.ppo_loss, []

    def spy(agent: nn.Module, minibatch: dict, *rest: Any) -> tuple:
        state = copy.deepcopy(agent.state_dict())
        loss, metrics = loss_function(agent, minibatch, *rest)
        means = {tag: x.detach() @ minibatch["weights"] for tag, x in metrics.items()}
        call = {"minibatch": minibatch, "critic_only": rest[-1], "metrics": means}
        calls.append(SimpleNamespace(**call, state=state, training=agent.training))
        return loss, metrics

    torch.manual_seed(5)
    optimizer = make_optimizer(agent, args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ppo_loss", spy)
        metrics = module.update(agent, optimizer, made.rollout, dict(made.batch), args, coefs)
    metrics = {tag: x.item() for tag, x in metrics.items()}
    return SimpleNamespace(agent=agent, metrics=metrics, calls=calls)


def parts_that_differ(a: nn.Module, b: nn.Module) -> set[str]:
    """Which of trunk, actor and critic hold different parameters."""
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return {name.split(".")[0] for (name, x), (_, y) in pairs if not torch.equal(x, y)}


def rows_of(batch: dict, minibatches: list[dict]) -> list[int]:
    """Indices in the batch of the samples of minibatches; old values tell them apart."""
    marks = torch.cat([minibatch["values"] for minibatch in minibatches])
    return [(batch["values"] == mark).nonzero().item() for mark in marks]


# ---- minibatches


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("epochs, minibatches", [(1, 1), (3, 4), (2, B // 2)])
def test_minibatches_partition_the_batch(module: ModuleType, epochs: int, minibatches: int) -> None:
    """Every epoch shuffles the samples anew and takes each of them once, whole."""
    made = prepare(module, norm_adv=False)
    made.batch["values"] = torch.arange(float(B))
    found = learn(made, update_epochs=epochs, num_minibatches=minibatches)
    assert len(found.calls) == epochs * minibatches
    assert {len(call.minibatch["obs"]) for call in found.calls} == {B // minibatches}
    orders = []
    for epoch in range(epochs):
        calls = found.calls[epoch * minibatches : (epoch + 1) * minibatches]
        order = rows_of(made.batch, [call.minibatch for call in calls])
        assert sorted(order) == list(range(B)) != order
        for key, x in made.batch.items():
            assert torch.equal(torch.cat([call.minibatch[key] for call in calls]), x[order])
        orders.append(tuple(order))
    assert len(set(orders)) == epochs
    for call in found.calls:
        weights = torch.full((B // minibatches,), minibatches / B)
        torch.testing.assert_close(call.minibatch["weights"], weights)
        assert call.training


@pytest.mark.parametrize("scope", ["minibatch", "batch"])
@pytest.mark.parametrize(
    "advantages, valid",
    [(-4.0, B), (0.1, B), (123.4, B), (0.1, 7), (3.0, 1), (None, 1), (None, 0)],
)
def test_advantages_without_spread(scope: str, advantages: float | None, valid: int) -> None:
    """Identical samples, one sample, and none: advantages stay finite and never grow."""
    made = prepare()
    if advantages is not None:
        made.batch["advantages"] = torch.full((B,), advantages)
    made.batch["loss_mask"] = (torch.arange(B) < valid).float()
    found = learn(made, norm_adv_scope=scope)
    for call in found.calls:
        counted = call.minibatch["advantages"][call.minibatch["loss_mask"] > 0]
        assert (counted.abs() <= 1).all()
        assert call.minibatch["advantages"].isfinite().all()
    assert all(math.isfinite(x) for x in found.metrics.values())
    assert all(p.isfinite().all() for p in found.agent.parameters())
    assert bool(parts_that_differ(made.agent, found.agent)) == (valid > 0)


# ---- gradients and epochs


@pytest.mark.parametrize(
    "kls, policy_epochs",
    [
        ([0.0, 0.0, 0.0, 0.015, 0.03, 0.0, 9.0, 9.0], 3),  # means 0, 0.0075, 0.015
        ([0.019, 0.0, 0.0, 0.019, 0.0, 0.0, 0.0, 0.0], 4),  # always below, single ones above
        ([9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], 1),
        ([-9.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0], 2),  # only this epoch's count
    ],
)
@pytest.mark.parametrize("critic_epochs", [0, 2])
def test_target_kl(
    kls: list[float], policy_epochs: int, critic_epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The epoch whose minibatches have a mean KL above it is the last; the critic's go on."""
    loss_function, kinds, told = ppo_discrete.ppo_loss, [], []

    def fake(agent: nn.Module, minibatch: dict, *rest: Any) -> tuple:
        loss, metrics = loss_function(agent, minibatch, *rest)
        told.append(7.0 if rest[-1] else kls[len(kinds)])
        kinds.append("critic" if rest[-1] else "policy")
        return loss, metrics | {"losses/approx_kl": torch.full_like(minibatch["weights"], told[-1])}

    made = prepare(target_kl=0.01, num_minibatches=2, update_epochs=4)
    monkeypatch.setattr(ppo_discrete, "ppo_loss", fake)
    found = learn(made, critic_epochs=critic_epochs)
    assert kinds == ["policy"] * 2 * policy_epochs + ["critic"] * 2 * critic_epochs
    assert found.metrics["losses/approx_kl"] == pytest.approx(np.mean(told), rel=1e-5)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("shared", [True, False])
def test_critic_epochs(module: ModuleType, shared: bool) -> None:
    """They come after the policy's and move the critic's own layers, by no old momentum others."""
    made = prepare(module, shared_network=shared, kl_coef=0.5)
    base, found = learn(made), learn(made, critic_epochs=3)
    assert parts_that_differ(base.agent, found.agent) == {"critic"}
    assert parts_that_differ(made.agent, base.agent) >= {"critic", "actor"}
    assert [call.critic_only for call in found.calls] == [False] * 8 + [True] * 12
    value_losses = [call.metrics["losses/value_loss"].item() for call in found.calls]
    assert np.mean(value_losses[-4:]) < np.mean(value_losses[:4])


# ---- what training makes of the flags


@pytest.fixture
def iterations(main: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`iterations(flags)`: what every update of a run of 4 iterations was given and did."""
    originals = {module: (module.update, module.ppo_loss) for module in MODULES}
    runs = []

    def iterations(flags: str, module: ModuleType = ppo_discrete) -> list[SimpleNamespace]:
        seen = []
        update, loss_function = originals[module]

        def spy_update(*inputs: Any) -> dict:
            agent, optimizer, _, batch, args, coefs = inputs
            names = {p: name for name, p in agent.named_parameters()}
            it = SimpleNamespace(args=args, coefs=coefs.tolist(), moves=[], shapes=set())
            it.batch = {key: x.clone() for key, x in batch.items()}
            pairs = [(group, v) for group in optimizer.param_groups for v in group["params"]]
            it.rates, it.eps = ([group[key] for group, _ in pairs] for key in ("lr", "eps"))
            it.groups = [[names[p] for p in vector.parts] for _, vector in pairs]
            it.before = copy.deepcopy(agent)
            seen.append(it)
            metrics = update(*inputs)
            it.after = copy.deepcopy(agent)
            return metrics

        def spy_loss(agent: nn.Module, batch: dict, *rest: Any) -> tuple:
            it = seen[-1]
            with torch.no_grad():
                dist, values = agent(*(batch[key] for key in ("obs", "masks") if key in batch))
            ratio = (agent.log_prob(dist, batch["actions"]) - batch["logprobs"]).exp()
            change = (values - batch["values"]) * (batch["weights"] > 0)
            it.moves.append(((ratio - 1).abs().max().item(), change.abs().max().item()))
            keys = ("values", "targets", "advantages", "logprobs", "weights")
            it.shapes |= {batch[key].shape for key in keys} | {values.shape}
            return loss_function(agent, batch, *rest)

        monkeypatch.setattr(module, "update", spy_update)
        monkeypatch.setattr(module, "ppo_loss", spy_loss)
        runs.append(f"run{len(runs)}")
        short = f"--num-envs {N} --num-steps {T} --total-timesteps {4 * B} --no-progress --no-cuda"
        short += f" --num-minibatches 4 --update-epochs 2 --env-id {ENVS[module]}"
        short += f" --run-dir {runs[-1]} {flags}"
        code, _, err = main(*short.split(), module=module)
        assert code == 0, err
        assert len(seen) == 4
        return seen

    return iterations


POPART = "--norm-obs --norm-value popart --norm-reward --recompute-advantages --critic-epochs 1"
IMAGES = '{"space":"image","actions":"Box"}'
RUNNING = "--norm-obs --norm-value running --shared-network --critic-warmup-iterations 2"


@pytest.mark.parametrize(
    "module, flags",
    [
        *((module, flags) for module in MODULES for flags in (POPART, RUNNING)),
        (ppo_discrete, "--vectorization native --norm-value running"),
        (ppo_continuous, "--std state"),
        (ppo_continuous, "--distribution beta"),
        (ppo_discrete, "--env-id ALE/Pong-v5 --shared-network"),
        (ppo_continuous, f"--env-id envs.scripted:Scripted-v0 --env-kwargs {IMAGES}"),
    ],
)
def test_first_step_starts_at_ratio_one(
    module: ModuleType, flags: str, iterations: Callable
) -> None:
    """At an iteration's first minibatch policy and critic are the rollout's; shapes are [M]."""
    for it in iterations(f"--learning-rate 0.01 {flags}", module):
        assert it.moves[0] == pytest.approx((0, 0), abs=1e-4)
        assert max(it.moves)[0] > 1e-3 or it.args.update_epochs == 0
        assert it.shapes == {(B // 4,)}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("shared", [True, False])
def test_critic_warmup(module: ModuleType, shared: bool, iterations: Callable) -> None:
    """The first iterations train the critic's group alone, in all epochs, and adapt no penalty."""
    flags = "--critic-warmup-iterations 2 --critic-epochs 1 --kl-target 0.1 --kl-coef 4"
    seen = iterations(f"{flags} {'--shared-network' if shared else ''}", module)
    names = [name for name, _ in seen[0].before.named_parameters()]
    critic = [name for name in names if name.startswith("critic.")]
    assert seen[0].groups == [[name for name in names if name not in critic], critic]
    for i, it in enumerate(seen):
        changed = parts_that_differ(it.before, it.after)
        assert changed == {"critic"} if i < 2 else changed >= {"actor", "critic"}
        assert len(it.moves) == 12
    assert [it.coefs[1] for it in seen] == [4, 4, 4, 2]


BOTH_RATES = "--learning-rate 1 --actor-learning-rate 1e-2 --critic-learning-rate 1e-3"


@pytest.mark.parametrize(
    "flags, rates, eps",
    [
        ("--learning-rate 1e-3", (1e-3, 1e-3), (1e-5, 1e-5)),
        (f"{BOTH_RATES} --critic-adam-eps 0", (1e-2, 1e-3), (1e-5, 0)),
        ("--learning-rate 1e-3 --critic-learning-rate 0 --adam-eps 0.1", (1e-3, 0), (0.1, 0.1)),
        ("--learning-rate 1e-3 --actor-learning-rate 0 --actor-adam-eps 1", (0, 1e-3), (1, 1e-5)),
    ],
)
def test_learning_rates_and_eps(flags: str, rates: tuple, eps: tuple, iterations: Callable) -> None:
    """Each group has its own, 0 included; rates decrease linearly to above zero."""
    anneal = rates[0] != rates[1]
    seen = iterations(f"{flags} --{'' if anneal else 'no-'}anneal-lr")
    for left, it in zip((1, 0.75, 0.5, 0.25) if anneal else (1, 1, 1, 1), seen, strict=True):
        assert it.rates == pytest.approx([left * rate for rate in rates])
        assert it.eps == list(eps)
    logged = [value for _, value in read_scalars("run0")["charts/learning_rate"]]
    assert logged == pytest.approx([it.rates[0] for it in seen])
    moving = {part for part, rate in zip(("actor", "critic"), rates, strict=True) if rate}
    assert parts_that_differ(seen[0].before, seen[-1].after) == moving


@pytest.mark.parametrize("own", [True, False])
def test_reference_policy(own: bool, iterations: Callable) -> None:
    """The checkpoint's policy as it was trained, under other flags too, for the batch."""
    flags = "--norm-obs --activation relu --clip-obs 1.5"
    iterations(f"--learning-rate 0.01 {flags}")
    state = torch.load("run0/checkpoint.pt", weights_only=True)["agent"]
    flags = f"--ref-checkpoint run0 --ref-kl-coef 1000 {flags if own else ''}"
    seen = iterations(f"--seed 2 --no-anneal-lr --learning-rate 0.002 {flags}")
    for it in seen:
        x = (it.batch["obs"] - state["obs_norm.mean"]) / state["obs_norm.std"]
        x = x.clip(-1.5, 1.5)
        for i in (0, 2):
            x = torch.relu(x @ state[f"actor.{i}.weight"].T + state[f"actor.{i}.bias"])
        logits = x @ state["actor.4.weight"].T + state["actor.4.bias"]
        expected = logits.log_softmax(-1)
        torch.testing.assert_close(it.batch["ref_dists"], expected, atol=1e-5, rtol=1e-4)
        policies = [agent(it.batch["obs"])[0] for agent in (it.before, it.after)]
        target = Categorical(logits=expected)
        kls = [kl_divergence(Categorical(logits=logits), target) for logits in policies]
        assert kls[0].mean() > 1.1 * kls[1].mean()


# ---- together

VALUES = """
    num_envs=2,4 num_steps=8,16 hidden_sizes=7,16 clip_obs=None,1 clip_reward=None,1 gamma=0,1
    gae_lambda=0,1 clip_coef=None,0.05 dual_clip_coef=None,3 kl_coef=0,0.5 kl_target=None,0.01
    target_kl=None,0.001 vclip_coef=None,0.5 critic_epochs=0,2 critic_warmup_iterations=0,1
    ent_coef=0,0.1 ent_coef_final=None,0 critic_learning_rate=None,0.001 max_grad_norm=None,0.1
    num_minibatches=1,4 update_epochs=1,3 vectorization=sync
"""
OFF = ("capture_video", "progress", "cuda", "compile")


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("number", range(3))
def test_flags_combine(main: Callable, module: ModuleType, number: int) -> None:
    """Random combinations of switches run, log finite numbers and leave finite weights."""
    draw = random.Random(number)
    values = dict(pair.split("=") for pair in VALUES.split())
    sizes = {name: draw.choice(values.pop(name).split(",")) for name in ("num_envs", "num_steps")}
    flags = [f"--{name}={size}" for name, size in sizes.items()]
    for name, kind in get_type_hints(module.Args).items():
        if name in values or get_origin(kind) is Literal:
            choices = values[name].split(",") if name in values else get_args(kind)
            flags.append(f"--{name}={draw.choice(choices)}")
        elif kind is bool:
            on = name not in OFF and draw.random() < 0.5
            flags.append(f"--{'' if on else 'no-'}{name.replace('_', '-')}")
    step = 2 * math.prod(map(int, sizes.values()))
    flags += ["--env-id", ENVS[module], "--run-dir", "run", "--total-timesteps", step]
    code, _, err = main(*flags, module=module)
    assert code == 0, (flags, err)
    for tag, points in read_scalars("run").items():
        assert all(math.isfinite(value) for _, value in points), tag
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == step
    assert all(x.isfinite().all() for x in checkpoint["agent"].values())
