"""Compiled and eager training agree, in every script."""

import copy
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor

import ppo_continuous
import ppo_discrete
import ppo_multidiscrete_mask

ROWS = 160
ACTIONS = {
    ppo_discrete: spaces.Discrete(3),
    ppo_continuous: spaces.Box(-1, 1, (2,)),
    ppo_multidiscrete_mask: spaces.MultiDiscrete([2, 3]),
}
# Every term of the loss has a weight, so that all of it is compiled.
FLAGS = {"ent_coef": 0.01, "kl_coef": 0.1, "vclip_coef": 0.2, "hidden_sizes": (16, 16)}


def make_agent(ppo: ModuleType) -> tuple[Any, Any, Any]:
    """Flags, an agent, and a batch that an earlier state of it might have left."""
    torch.manual_seed(3)
    args = ppo.Args(**FLAGS, num_envs=8, num_steps=ROWS // 8, num_minibatches=5, update_epochs=2)
    agent = ppo.Agent(args, spaces.Box(-1, 1, (4,)), ACTIONS[ppo])
    obs, masks = torch.randn(ROWS, 4), {}
    with torch.no_grad():
        if ppo is ppo_multidiscrete_mask:
            masks = {"masks": torch.rand(ROWS, 5) < 0.7}
            masks["masks"][:, [0, 2]] = True
            actions, *_ = agent.act(obs, masks["masks"], agent.draw_noise(ROWS))
        else:
            actions = agent.act(obs, agent.draw_noise(ROWS))
        dists, values = agent(obs, *masks.values())
        for parameter in agent.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    batch = ppo.Batch(
        obs=obs,
        actions=actions,
        logprobs=agent.log_prob(dists, actions),
        dists=dists,
        ref_dists=dists,
        advantages=torch.randn(ROWS),
        targets=values + torch.randn(ROWS),
        values=values,
        weights=(torch.arange(ROWS) % 9 > 0).float(),
        **masks,
    )
    return args, agent, batch


def coefs(args: Any) -> Tensor:
    """Weights of the terms, as `train` has them."""
    return torch.tensor([1.0, args.vf_coef, -args.ent_coef, args.kl_coef, 0.0])


@pytest.fixture
def compiled_functions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is compiled, by a compiler that starts anew."""
    names, compiler = [], torch.compile
    torch._dynamo.reset()
    for ppo in ACTIONS:
        ppo.compiled.cache_clear()
    torch._dynamo.config.trace_autograd_ops = True
    monkeypatch.setattr(
        torch, "compile", lambda f, **kwargs: names.append(f.__name__) or compiler(f, **kwargs)
    )
    return names


@pytest.mark.parametrize("ppo", ACTIONS, ids=lambda ppo: ppo.__name__)
def test_compiled_as_eager(ppo: ModuleType, compiled_functions: list[str]) -> None:
    """Loss, gradient and outputs of a batch, metrics and weights after ten steps, to 1e-5."""
    args, agent, batch = make_agent(ppo)
    rows = batch._replace(weights=ppo.normalize(batch.weights))
    parameters = list(p for p in agent.parameters() if p.requires_grad)
    loss = ppo.ppo_loss(agent, rows, coefs(args), args)[0]
    eager, outputs = ppo.loss_gradient(agent, parameters, rows, coefs(args), args)
    assert not compiled_functions
    function = ppo.compiled(ppo.loss_gradient)
    fast, fast_outputs = function(agent, parameters, rows, coefs(args), args)
    near = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(fast, eager, **near)
    torch.testing.assert_close(fast_outputs, outputs, **near)
    mean = [ppo.measure(agent, rows, *out, args) for out in (outputs, fast_outputs)]
    torch.testing.assert_close(mean[1], mean[0], **near)
    assert loss.item() == pytest.approx((coefs(args) @ mean[1][:5]).item(), rel=1e-5, abs=1e-5)
    found = []
    for compile_too in (False, True):
        torch.manual_seed(4)
        copied = copy.deepcopy(agent)
        settings = replace(args, compile=compile_too)
        optimizer = ppo.Adam(copied, settings)
        metrics = ppo.update(copied, optimizer, None, batch, settings, coefs(args), False)
        assert [group["step"] for group in optimizer.param_groups] == [10, 10]
        found.append((optimizer.weights, metrics))
    start = torch.cat([p.detach().flatten() for p in parameters])
    assert (found[0][0] - start).abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], **near)
    assert compiled_functions == ["loss_gradient", "measure"]
