"""Masks: the policy under them, where they come from, whole runs, TaxiDispatch."""

import itertools
import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import read_scalars
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv
from torch import Tensor, nn

import ppo_multidiscrete_mask as ppo

SHAPES = pytest.mark.parametrize("conditional", [False, True], ids=["flat", "conditional"])
HEADS = pytest.mark.parametrize("nvec", [[3, 2, 3], [4, 3], [2, 1, 2, 2], [5]], ids=str)
KINDS = ["none", "independent", "conditional"]


def random_masks(nvec: list[int], n: int, conditional: bool) -> Tensor:
    """Masks of n rows, from a single allowed choice a head to all of them."""

    def some(*shape: int) -> Tensor:
        mask = torch.rand(shape) < torch.rand(*shape[:-1], 1)
        return mask.scatter(-1, torch.randint(shape[-1], (*shape[:-1], 1)), True)

    if not conditional:
        return torch.cat([some(n, k) for k in nvec], -1)
    first, *rest = nvec
    masks = torch.cat([some(n, first)[..., None], *(some(n, first, k) for k in rest)], -1)
    masks[..., 1:] &= masks[..., :1] | (torch.rand(n, first, 1) < 0.5)  # some rows allow nothing
    return masks


def path(mask: Tensor, first: int) -> Tensor:
    """The mask [D] of all heads once the first one has chosen."""
    return mask if mask.ndim == 1 else torch.cat((mask[:, 0], mask[first, 1:]))


def allows(mask: Tensor, action: Any, nvec: list[int]) -> bool:
    """Whether the mask of either shape allows this joint action."""
    heads = path(mask, action[0]).split(nvec)
    return all(head[choice] for head, choice in zip(heads, action, strict=True))


def union(mask: Tensor) -> Tensor:
    """What any allowed first choice allows: the mask [D] of independent heads."""
    return mask if mask.ndim == 1 else torch.cat((mask[:, 0], mask[mask[:, 0], 1:].any(0)))


def agent_for(nvec: list[int], seed: int = 0, **flags: Any) -> ppo.Agent:
    """An agent in float64, whose policy is far from uniform."""
    torch.manual_seed(seed)
    box = spaces.Box(-np.inf, np.inf, (6,))
    agent = ppo.Agent(ppo.Args(**flags), box, spaces.MultiDiscrete(nvec)).double()
    nn.init.normal_(agent.actor[-1].weight, std=0.5)
    nn.init.normal_(agent.actor[-1].bias)
    return agent


def agent_of_logits(nvec: list[int], **flags: Any) -> ppo.Agent:
    """An agent whose observations are its logits."""
    box = spaces.Box(-np.inf, np.inf, (sum(nvec),))
    agent = ppo.Agent(ppo.Args(hidden_sizes=(), **flags), box, spaces.MultiDiscrete(nvec))
    with torch.no_grad():
        agent.actor[-1].weight.copy_(torch.eye(sum(nvec)))
    return agent


def enumerate_actions(agent: ppo.Agent, obs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """All joint actions, and their log-probs as written in a book; -inf for invalid ones."""
    actions = list(itertools.product(*map(range, agent.nvec)))
    logprobs = []
    for action in actions:
        logprob = torch.tensor(0.0, dtype=torch.float64)
        heads = path(mask, action[0]).split(agent.nvec)
        for logits, head, i in zip(agent.actor(obs).split(agent.nvec), heads, action, strict=True):
            allowed = head[i] if allows(mask, action, agent.nvec) else torch.tensor(False)
            logprob = logprob + (logits[i] - logits[head].logsumexp(0) if allowed else -torch.inf)
        logprobs.append(logprob)
    return torch.tensor(actions), torch.stack(logprobs)


def assert_same(agent: ppo.Agent, ours: Tensor, exact: Tensor) -> None:
    """Equal numbers with equal gradients."""
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-10)
    weights = list(agent.actor.parameters())
    if exact.requires_grad:
        grads = [torch.autograd.grad(x, weights, retain_graph=True) for x in (ours, exact)]
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-9)


# ---- distribution


@SHAPES
@HEADS
def test_policy_equals_the_enumeration_of_all_joint_actions(
    nvec: list[int], conditional: bool
) -> None:
    """Log-probs, mode, and in expectation over paths of the old policy entropy and KLs."""
    new, old, ref = (agent_for(nvec, seed) for seed in range(3))
    new.conditional = conditional  # as `Rollout` sets it
    greedy_is_wrong = factor_matters = 0
    for obs, mask in zip(
        torch.randn(8, 6, dtype=torch.float64), random_masks(nvec, 8, conditional), strict=True
    ):
        actions, p = enumerate_actions(new, obs, mask)
        o, r = (enumerate_actions(agent, obs, mask)[1].detach() for agent in (old, ref))
        n, valid = len(actions), p.isfinite()
        mode = new.act(obs[None], mask[None], None)[0]
        assert mode.tolist() == actions[p.argmax()].tolist()
        first = new.actor(obs)[: nvec[0]].masked_fill(~path(mask, 0)[: nvec[0]], -torch.inf)
        greedy_is_wrong += bool(first.argmax() != mode[0])

        masks = new.path_masks(mask.expand(n, *mask.shape), actions[:, 0])
        dist, old_dist, ref_dist = (a(obs.expand(n, -1), masks)[0] for a in (new, old, ref))
        logprobs = new.log_prob(dist, actions)
        assert (logprobs[~valid].exp() == 0).all()
        assert_same(new, logprobs[valid].sum(), p[valid].sum())
        assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-12)

        batch = {"actions": actions, "dists": old_dist.detach()}
        ratio = new.path_ratio(dist, batch)
        p, o, r = p[valid], o[valid], r[valid]
        for estimates, exact in (
            (new.entropy(dist, ratio), -p.exp() @ p),
            (new.kl_divergence(dist, ref_dist.detach(), ratio), p.exp() @ (p - r)),
            (new.kl_divergence(old_dist.detach(), dist), o.exp() @ (o - p)),
        ):
            assert_same(new, o.exp() @ estimates[valid], exact)
            if not conditional:  # every path has the same masks
                torch.testing.assert_close(estimates, exact.expand(n))
        factor_matters += bool(
            ((o.exp() @ new.entropy(dist, 1.0)[valid]) + p.exp() @ p).abs() > 0.01
        )
    several = conditional and len(nvec) > 1
    assert (greedy_is_wrong > 0, factor_matters > 0) == (several, several)


@pytest.mark.parametrize("nvec", [[3, 2, 4], [16, 6, 4, 4, 4, 4, 7, 49]], ids=str)
def test_parity_with_sb3_contrib(nvec: list[int]) -> None:
    from sb3_contrib.common.maskable.distributions import MaskableMultiCategoricalDistribution

    agent = agent_for(nvec)
    obs, masks = torch.randn(50, 6, dtype=torch.float64), random_masks(nvec, 50, False)
    with torch.no_grad():
        actions = agent.act(obs, masks, agent.noise.sample((50,)))
        dist, logits = agent(obs, masks)[0], agent.actor(obs)
    theirs = MaskableMultiCategoricalDistribution(nvec).proba_distribution(logits)
    theirs.apply_masking(masks.numpy())
    torch.testing.assert_close(agent.log_prob(dist, actions), theirs.log_prob(actions))
    torch.testing.assert_close(agent.entropy(dist, 1.0), theirs.entropy())


@SHAPES
@HEADS
def test_actions_are_drawn_as_often_as_probable(nvec: list[int], conditional: bool) -> None:
    agent, n = agent_for(nvec), 30_000
    for obs, mask in zip(
        torch.randn(2, 6, dtype=torch.float64), random_masks(nvec, 2, conditional), strict=True
    ):
        probs = enumerate_actions(agent, obs, mask)[1].exp().detach().numpy()
        with torch.no_grad():
            noise = agent.noise.sample((n,))
            drawn = agent.act(obs.expand(n, -1), mask.expand(n, *mask.shape), noise)
        counts = np.bincount(np.ravel_multi_index(drawn.T.numpy(), nvec), minlength=len(probs))
        assert (counts[probs == 0] == 0).all()
        likely = probs * n > 5
        chi = ((counts - probs * n)[likely] ** 2 / (probs * n)[likely]).sum()
        assert chi <= likely.sum() + 5 * (2 * likely.sum()) ** 0.5 + 20  # one in 10 ** 7


@SHAPES
@pytest.mark.parametrize("nvec", [[3, 2, 4], [5], [16, 6, 4, 4, 4, 4, 7, 49], [1, 1]], ids=str)
def test_extreme_logits_leave_everything_finite(nvec: list[int], conditional: bool) -> None:
    """Masked: probability and gradient are 0. One choice alone: so is all that it would add."""
    torch.manual_seed(0)
    for dtype, scale in itertools.product((torch.float32, torch.float64), (1.0, 1e2, 1e4)):
        agent = agent_of_logits(nvec).to(dtype)
        p, q = (torch.randn(60, sum(nvec), dtype=dtype) * scale for _ in range(2))
        env_masks = random_masks(nvec, 60, conditional)
        actions = agent.act(p, env_masks, agent.noise.sample((60,)))
        assert all(allows(*row, nvec) for row in zip(env_masks, actions, strict=True))
        masks = agent.path_masks(env_masks, actions[:, 0])
        p.requires_grad_(), q.requires_grad_()
        dists = agent(p, masks)[0], agent(q, masks)[0]
        assert (dists[0].exp()[~masks] == 0).all()
        alone = [h & (h.sum(-1, keepdim=True) == 1) for h in masks.split(nvec, -1)]
        alone = torch.cat(alone, -1)
        assert alone.any()
        assert (dists[0][alone] == 0).all()
        one_way = alone.sum(-1) == len(nvec)
        for value, inputs in (
            (agent.log_prob(dists[0], actions), [p]),
            (agent.entropy(dists[0], 1.0), [p]),
            (agent.kl_divergence(*dists), [p, q]),
        ):
            assert value.isfinite().all()
            assert (value[one_way] == 0).all()
            for grad in torch.autograd.grad(value.sum(), inputs, retain_graph=True):
                assert grad.isfinite().all()
                assert (grad[~masks | alone] == 0).all()


@SHAPES
def test_heads_with_one_choice_add_nothing(conditional: bool) -> None:
    """The same numbers, bit for bit, as without the second and the last head."""
    nvec, kept = [3, 4, 2, 5], [0, 1, 2, 7, 8]
    long, short = agent_of_logits(nvec), agent_of_logits([3, 2])
    torch.manual_seed(0)
    logits, masks = torch.randn(50, 14), random_masks(nvec, 50, conditional)
    for start, stop in ((1, 5), (7, 12)) if conditional else ((3, 7), (9, 14)):
        masks[..., start:stop] = False
        masks[..., start + 1] = True
    with torch.no_grad():
        actions = long.act(logits, masks, long.noise.sample((50,)))
        masks = long.path_masks(masks, actions[:, 0])
        dist, less = long(logits, masks)[0], short(logits[:, kept], masks[:, kept])[0]
    assert (actions[:, [1, 3]] == 1).all()
    assert torch.equal(long.log_prob(dist, actions), short.log_prob(less, actions[:, [0, 2]]))
    ratio = torch.rand(50)
    torch.testing.assert_close(long.entropy(dist, ratio), short.entropy(less, ratio))
    torch.testing.assert_close(
        long.kl_divergence(dist, dist.roll(1, -1), ratio)[:0], short.kl_divergence(less, less)[:0]
    )


def test_what_each_kind_of_policy_respects() -> None:
    torch.manual_seed(0)
    nvec = [4, 3, 5]
    flat, masks = random_masks(nvec, 40, False), random_masks(nvec, 40, True)
    none, independent, conditional = (agent_for(nvec, mask=kind) for kind in KINDS)
    assert none.respected(flat).all()
    assert none.respected(masks).shape == (40, 12)
    assert none.respected(masks).all()
    assert torch.equal(independent.respected(flat), flat)
    assert torch.equal(conditional.respected(flat), flat)
    assert torch.equal(conditional.respected(masks), masks)
    assert (masks[..., 1:] & ~masks[..., :1]).any()  # forbidden first choices do not count
    expected = torch.stack([union(mask) for mask in masks])
    assert torch.equal(independent.respected(masks), expected)


@SHAPES
@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("kind", ["independent", "conditional"])
def test_no_valid_action_names_environment_and_head(
    kind: str, sample: bool, conditional: bool
) -> None:
    nvec = [3, 4, 2]
    agent = agent_of_logits(nvec, mask=kind)
    for head, start, stop in ((0, 0, 3), (1, 3, 7), (2, 7, 9)):
        masks = random_masks(nvec, 6, conditional)
        columns = slice(start - 2, stop - 2) if conditional else slice(start, stop)
        masks[4, ..., 0 if conditional and head == 0 else columns] = False
        noise = agent.noise.sample((6,)) if sample else None
        with pytest.raises(ValueError, match=rf"environment 4\b.*head {head}\b"):
            agent.act(torch.randn(6, 9) * 100, masks, noise)


# ---- masks of environments


def rule(tag: int, episode: int, t: int, conditional: bool, single: bool) -> np.ndarray:
    """Mask of a step for nvec [3, 2, 4]: one allowed joint action if `single`, else some."""
    rng = np.random.default_rng((tag, episode, t))

    def some(k: int) -> np.ndarray:
        mask = rng.random(k) < (0 if single else 0.4)
        mask[rng.integers(k)] = True
        return mask

    if not conditional:
        return np.concatenate([some(3), some(2), some(4)])
    rows = np.array([np.concatenate([[False], some(2), some(4)]) for _ in range(3)])
    rows[:, 0] = some(3)
    return rows


class Ruled(gym.Env):
    """An action that `rule` forbids costs 1 and ends the episode; nothing is allowed after an end.

    An observation is (tag, episode, step), where tag is the seed's remainder. `where` says how the
    mask is handed over, or when it is missing; `dead` is a (tag, step, head) whose mask allows
    nothing; `strict=False` lets episodes go on; `cut` takes columns from the mask.
    """

    record: list[tuple[int, bool]] = []  # tag, allowed; of this process

    def __init__(
        self,
        where: str = "info",
        conditional: bool = False,
        single: bool = True,
        strict: bool = True,
        dead: tuple[int, int, int] = (-1, 0, 0),
        cut: int = 0,
    ) -> None:
        self.where, self.conditional, self.strict, self.cut = where, conditional, strict, cut
        self.rule = partial(rule, conditional=conditional, single=single)
        self.dead, self.tag, self.episode, self.clock = dead, 0, -1, 0
        self.action_space = spaces.MultiDiscrete([3, 2, 4])
        if where == "method":
            self.action_masks = lambda: self.mask
        if where == "tuple":
            self.action_masks = lambda: tuple(np.split(self.mask, [3, 5]))
        box = partial(spaces.Box, -np.inf, np.inf)
        mask = spaces.MultiBinary(self.rule(0, 0, 0)[..., cut:].shape)
        self.observation_space = {
            "one key": spaces.Dict(action_mask=mask, observation=box((3,))),
            "two keys": spaces.Dict(action_mask=mask, tag=box((1,)), when=box((2,))),
        }.get(where, box((3,)))

    def look(self, missing: str) -> tuple[Any, dict]:
        self.mask = self.rule(self.tag, self.episode, self.t)
        tag, clock, head = self.dead
        if self.over:
            self.mask[:] = False
        elif (self.tag, self.clock) == (tag, clock):
            columns = [slice(0, 3), slice(3, 5), slice(5, 9)][head]
            if self.conditional:
                columns = [slice(0, 1), slice(1, 3), slice(3, 7)][head]
            self.mask[..., columns] = False
        self.mask = self.mask[..., self.cut :]
        obs = np.array([self.tag, self.episode, self.t], np.float32)
        mask = self.mask.astype(np.int8)
        if self.where == "one key":
            return {"action_mask": mask, "observation": obs}, {}
        if self.where == "two keys":
            return {"action_mask": mask, "tag": obs[:1], "when": obs[1:]}, {}
        given = self.where in ("info", "late", "early", "not at ends") and self.where != missing
        return obs, {"action_mask": mask} if given else {}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        if seed is not None:
            self.tag, self.episode, self.clock = seed % 7, -1, 0
        self.episode, self.t, self.over = self.episode + 1, 0, False
        return self.look("late")

    def step(self, action: np.ndarray) -> tuple:
        assert not self.over
        mask = torch.from_numpy(self.rule(self.tag, self.episode, self.t))
        ok = allows(mask, action, [3, 2, 4])
        self.record.append((self.tag, ok))
        self.t, self.clock = self.t + 1, self.clock + 1
        last, odd = self.t == 1 + (2 * self.tag + 3 * self.episode) % 5, self.episode % 2 == 1
        wrong = self.strict and not ok
        self.over = last or wrong
        obs, info = self.look("not at ends" if self.over else "early")
        return obs, -float(not ok), (last and not odd) or wrong, last and odd, info


class MethodOfWrapper(gym.Wrapper):
    def action_masks(self) -> np.ndarray:
        return self.unwrapped.mask


class RuledVector(SyncVectorEnv):
    """Many of them as one vector environment of its own."""

    def __init__(self, num_envs: int, mode: str = "NextStep", **kwargs: Any) -> None:
        super().__init__([partial(Ruled, **kwargs)] * num_envs, autoreset_mode=mode)
        if kwargs.get("where") == "method":
            self.action_masks = lambda: np.array([env.mask for env in self.envs])


gym.register("Ruled-v0", Ruled, vector_entry_point=RuledVector)
gym.register("RuledWrapped-v0", lambda **kwargs: MethodOfWrapper(Ruled("wrapper", **kwargs)))


def play(
    vectorization: str = "sync",
    flags: dict | None = None,
    env_id: str = f"{__name__}:Ruled-v0",
    num_envs: int = 3,
    **kwargs: Any,
) -> Iterator[tuple[ppo.Args, ppo.Agent, ppo.Rollout]]:
    """Three rollouts of 16 steps; the seeds are 8, 9, 10."""
    args = ppo.Args(
        env_id=env_id,
        vectorization=vectorization,
        env_kwargs=kwargs,
        num_envs=num_envs,
        num_steps=16,
        num_minibatches=2,
        **(flags or {}),
    )
    envs = ppo.make_envs(args, num_envs, 8)
    torch.manual_seed(8)
    agent = ppo.Agent(args, envs.single_observation_space, envs.single_action_space)
    nn.init.normal_(agent.actor[-1].weight, std=0.1)
    rollout = ppo.Rollout(args, agent, envs, 8)
    Ruled.record.clear()
    for _ in range(3):
        rollout.collect(agent, envs)
        yield args, agent, rollout
        Ruled.record.clear()
    envs.close()


@SHAPES
@pytest.mark.parametrize(
    "mode, where",
    [
        *itertools.product(["sync", "native"], ["info", "method", "one key", "two keys"]),
        *itertools.product(["native SameStep"], ["info", "method", "one key"]),
        ("sync", "wrapper"),
        ("async", "two keys"),
    ],
)
def test_masks_belong_to_their_observations(mode: str, where: str, conditional: bool) -> None:
    """At the reset, after steps, at autoreset, and over the ends of rollouts."""
    if mode == "async" and not conditional:
        pytest.skip("once is enough")
    vectorization, *same_step = mode.split()
    kwargs = {"conditional": conditional}
    kwargs |= {"mode": "SameStep"} if same_step else {}
    kwargs |= {"env_id": "RuledWrapped-v0"} if where == "wrapper" else {"where": where}
    starts = finals = resets = 0
    for args, agent, rollout in play(vectorization, **kwargs):
        assert rollout.obs.shape == (17, 3, 3)  # the mask is not among them
        assert (rollout.rewards == 0).all()
        assert all(ok for _, ok in Ruled.record)
        for t, n in np.argwhere(rollout.valid):
            tag, episode, step = map(int, rollout.obs[t, n])
            assert tag == (8 + n) % 7
            expected = rule(tag, episode, step, conditional, single=True)
            np.testing.assert_array_equal(rollout.masks[t, n], expected)
            starts += step == 0
        for t, n, obs in rollout.final_obs:
            tag, episode, step = rollout.obs[t, n].tolist()
            assert np.array(obs).tolist() == [tag, episode, step + 1]
        finals += len(rollout.final_obs)
        resets += (~rollout.valid).sum()
        assert ppo.make_batch(agent, None, rollout, args)[1]["policy/invalid_fraction"] == 0
    assert starts > 20
    assert (finals > 5, resets > 20) == (mode != "native", mode == "native")


def test_no_mask_where_an_episode_ends() -> None:
    """There is nothing to choose, so that environments may leave it out."""
    for vectorization in ("sync", "native"):
        for _, _, rollout in play(vectorization, where="not at ends"):
            assert (rollout.rewards == 0).all()


@pytest.mark.parametrize("vectorization, conditional", [("sync", True), ("native", False)])
def test_only_actions_that_were_played_can_be_invalid(
    vectorization: str, conditional: bool
) -> None:
    """The row after an end counts for nothing."""
    kwargs = {"conditional": conditional, "strict": False, "single": False}
    for args, agent, rollout in play(vectorization, {"mask": "none"}, **kwargs):
        wrong = [not ok for _, ok in Ruled.record]
        assert len(wrong) == rollout.valid[:-1].sum()
        assert (len(wrong) < 48) == (vectorization == "native")
        metrics = ppo.make_batch(agent, None, rollout, args)[1]
        assert metrics["policy/invalid_fraction"].item() == pytest.approx(np.mean(wrong), abs=1e-6)
        assert 0.2 < np.mean(wrong) < 0.98
        assert rollout.masks[~rollout.valid].all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "vectorization, kwargs",
    [
        ("sync", {"conditional": False}),
        ("sync", {"conditional": True}),
        ("native", {"conditional": True}),
        ("sync", {"env_id": "TaxiDispatch-v0"}),
    ],
    ids=str,
)
def test_ratio_is_one_before_the_first_gradient_step(
    vectorization: str, kwargs: dict, kind: str
) -> None:
    """In every iteration, and the old log-probs are those under the masks that were respected."""
    if "conditional" in kwargs:
        kwargs = kwargs | {"single": False, "strict": False}
    optimizer, spread, coefs = None, 0, torch.tensor([0.01, 0.0])
    for args, agent, rollout in play(vectorization, {"mask": kind}, **kwargs):
        assert agent.conditional == (kind == "conditional" and rollout.masks.ndim == 4)
        if not optimizer:
            critic = list(agent.critic.parameters())
            policy = [*agent.trunk.parameters(), *agent.actor.parameters()]
            optimizer = torch.optim.Adam([{"params": policy}, {"params": critic}], lr=1e-2)
        batch, _ = ppo.make_batch(agent, None, rollout, args)
        weights = batch["loss_mask"] / batch["loss_mask"].sum()
        _, metrics = ppo.ppo_loss(agent, batch | {"weights": weights}, args, coefs, False)
        assert metrics["losses/clipfrac"] == 0
        assert metrics["losses/approx_kl"].item() == pytest.approx(0, abs=1e-6)
        with torch.no_grad():
            dists = agent(batch["obs"], batch["masks"])[0]
            logits = agent.actor(batch["obs"])
        ratio = (agent.log_prob(dists, batch["actions"]) - batch["logprobs"]).exp()
        torch.testing.assert_close(ratio, torch.ones(48), rtol=0, atol=1e-5)
        torch.testing.assert_close(dists, batch["dists"], rtol=1e-5, atol=1e-5)
        spread += batch["logprobs"].std()
        env_masks = torch.from_numpy(rollout.masks[:-1]).flatten(0, 1)
        for row in batch["loss_mask"].nonzero().flatten():
            action = batch["actions"][row].tolist()
            mask = path(env_masks[row], action[0])
            if kind == "independent":
                mask = union(env_masks[row])
            mask = torch.ones_like(mask) if kind == "none" else mask
            heads = zip(logits[row].split(agent.nvec), mask.split(agent.nvec), action, strict=True)
            expected = sum(float(x[i] - x[head].logsumexp(0)) for x, head, i in heads)
            assert batch["logprobs"][row].item() == pytest.approx(expected, abs=1e-4)
        ppo.update(agent, optimizer, rollout, batch, args, coefs)
        changed = agent.log_prob(agent(batch["obs"], batch["masks"])[0], batch["actions"])
        assert (changed - batch["logprobs"]).abs().max() > 1e-3
    assert spread > 0.1


@SHAPES
@pytest.mark.parametrize(
    "vectorization, n, clock", [("sync", 2, 0), ("sync", 1, 21), ("native", 1, 7)]
)
def test_dead_ends(vectorization: str, n: int, clock: int, conditional: bool) -> None:
    """Environment and head are named, and no action of that step is played."""
    for head in range(3):
        dead = ((8 + n) % 7, clock, head)
        kwargs = {"conditional": conditional, "strict": False, "single": False, "dead": dead}
        rollouts = play(vectorization, **kwargs)
        with pytest.raises(ValueError, match=rf"environment {n}\b.*head {head}\b"):
            for _ in rollouts:
                Ruled.record.clear()
        assert sum(tag == (8 + n) % 7 for tag, _ in Ruled.record) == clock % 16
        assert all(ok for _, ok in Ruled.record)


# ---- whole runs

QUICK = "--num-envs 3 --num-steps 16 --num-minibatches 2 --no-progress --run-dir".split()


@pytest.fixture
def train(main: Callable) -> Callable:
    """Iterations of 48 steps; keyword arguments are the environment's."""

    def train(
        *flags: Any, env_id: str = "Ruled-v0", steps: int = 144, run: str = "run", **kwargs: Any
    ) -> tuple[int, str, str]:
        Ruled.record.clear()
        words = ["--env-id", env_id, "--env-kwargs", json.dumps(kwargs), "--total-timesteps", steps]
        return main(*QUICK, run, *words, *flags, module=ppo)

    return train


def curve(tag: str, run: str = "run") -> list[float]:
    return [value for _, value in read_scalars(run)[tag]]


@SHAPES
@pytest.mark.parametrize(
    "mode, where", [("sync", "info"), ("sync", "two keys"), ("native", "method")]
)
def test_training_resuming_and_evaluating_play_only_what_is_allowed(
    mode: str, where: str, conditional: bool, train: Callable, main: Callable
) -> None:
    """One joint action in each step."""
    outcome = train("--vectorization", mode, where=where, conditional=conditional)
    assert outcome[0] == 0, outcome
    assert main("--resume", "run", "--total-timesteps", 240, module=ppo)[0] == 0
    for tag in ("policy/invalid_fraction", "charts/episodic_return", "losses/entropy"):
        assert curve(tag) == [0] * 5
    played = len(Ruled.record)
    assert played == 240 if mode == "sync" else 150 < played < 240
    for flag in ("--eval-deterministic", "--no-eval-deterministic"):
        assert main("--eval", "run", "--eval-episodes", 9, flag, module=ppo)[0] == 0
    assert set(curve("eval/episodic_return")) == {0}
    assert len(Ruled.record) > played + 18
    assert all(ok for _, ok in Ruled.record)


@SHAPES
@pytest.mark.parametrize("kind", KINDS)
def test_invalid_fraction_is_what_the_environments_count(
    kind: str, conditional: bool, train: Callable
) -> None:
    kwargs = {"conditional": conditional, "strict": False, "single": False}
    assert train("--mask", kind, **kwargs)[0] == 0
    wrong = np.reshape([not ok for _, ok in Ruled.record], (3, 48)).mean(1)
    assert curve("policy/invalid_fraction") == pytest.approx(wrong, abs=1e-6)
    assert (wrong > 0).all() == (kind == "none" or (kind, conditional) == ("independent", True))


@pytest.mark.parametrize("where", ["info", "method", "one key"])
@pytest.mark.parametrize("mode", ["sync", "async", "native"])
def test_a_mask_of_another_shape_is_refused(mode: str, where: str, train: Callable) -> None:
    for conditional, shape in ((False, "(8,)"), (True, "(3, 6)")):
        code, out, err = train("--vectorization", mode, where=where, conditional=conditional, cut=1)
        assert (code, out) == (2, "")
        assert all(words in err for words in (shape, "(9,)", "(3, 7)"))
    assert not list(Path().iterdir())


@pytest.mark.parametrize("where", ["late", "early"])
def test_masks_after_steps_or_resets_only(where: str, train: Callable) -> None:
    with pytest.raises(ValueError, match="mask"):
        train(where=where)
    assert not Path("run/checkpoint.pt").exists()


def test_tuples_of_masks(train: Callable) -> None:
    assert train(where="tuple")[0] == 0
    assert curve("charts/episodic_return") == [0, 0, 0]


def test_a_dead_end_ends_the_run_and_leaves_the_last_checkpoint(train: Callable) -> None:
    for tag in range(7):  # the seed's remainder is one of them
        try:
            train("--checkpoint-every", 1, run=f"run-{tag}", dead=(tag, 33, 1))
        except ValueError:
            assert torch.load(f"run-{tag}/checkpoint.pt", weights_only=True)["step"] == 96
            break
    else:
        pytest.fail("no run ended")


class Echo(gym.Env):
    """Wants the action that it shows, in a vector or in the first cells of a grid or image.

    `masked`: allows no other.
    """

    def __init__(self, space: str, masked: bool = False, shape: tuple | None = None) -> None:
        self.action_space = SPACES[space]
        size = spaces.flatdim(self.action_space)
        dtype = np.uint8 if shape else np.float32
        self.observation_space = spaces.Box(0, 1, shape or (size,), dtype)
        self.masked = masked

    def look(self) -> tuple:
        self.wanted = self.action_space.sample()
        hot = spaces.flatten(self.action_space, self.wanted)
        obs = np.zeros(self.observation_space.shape, self.observation_space.dtype)
        obs.flat[: len(hot)] = hot
        return obs, {"action_mask": hot.astype(np.int8)} if self.masked else {}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.action_space.seed(seed)
        self.steps = 0
        return self.look()

    def step(self, action: Any) -> tuple:
        assert self.action_space.contains(action)
        self.steps += 1
        reward = float(np.array_equal(action, self.wanted))
        obs, info = self.look()
        return obs, reward, False, self.steps == 10, info


SPACES = {
    "Discrete": spaces.Discrete(4, start=-2),
    "MultiDiscrete": spaces.MultiDiscrete([3, 2], start=[1, 5]),
    "matrix": spaces.MultiDiscrete([[2, 3], [3, 1]], start=[[1, 0], [0, 7]]),
}
gym.register("Echo-v0", Echo)


@pytest.mark.parametrize("space", SPACES)
def test_all_action_spaces(space: str, train: Callable) -> None:
    """They are learned without masks, and the first line says so; a mask shows what is wanted."""
    flags = "--num-steps 32 --learning-rate 1e-2 --update-epochs 8 --gamma 0".split()
    code, out, _ = train(*flags, env_id="Echo-v0", space=space, steps=96 * 30)
    assert code == 0
    assert "no mask" in out.splitlines()[0].lower()
    assert set(curve("policy/invalid_fraction")) == {0}
    returns = curve("charts/episodic_return")
    assert returns[0] < 6
    assert returns[-1] > 9
    code, out, _ = train(env_id="Echo-v0", run="masked", space=space, masked=True)
    assert code == 0
    assert "no mask" not in out.splitlines()[0].lower()
    assert curve("charts/episodic_return", "masked") == [10, 10, 10]


@pytest.mark.parametrize("shape", [(5, 5, 3), (36, 36, 3)], ids=str)
def test_grids_and_images_train_with_masks(shape: tuple, train: Callable) -> None:
    flags = ["--shared-network"] if shape[0] == 5 else []
    code, out, _ = train(
        *flags, env_id="Echo-v0", space="MultiDiscrete", masked=True, shape=shape, steps=96
    )
    assert code == 0
    assert "CNN" in out.splitlines()[0]
    assert curve("charts/episodic_return") == [10, 10]
    assert curve("policy/invalid_fraction") == [0, 0]


@pytest.mark.parametrize(
    "env_id",
    [
        "Taxi-v4",
        "tests.envs.invalid_actions:InvalidActionDiscrete-v0",
        "tests.envs.invalid_actions:InvalidActionMultiDiscrete-v0",
    ],
)
def test_masks_of_public_environments(env_id: str, train: Callable) -> None:
    """They are respected, and would have been missed."""
    assert train(env_id=env_id)[0] == 0
    assert curve("policy/invalid_fraction") == [0, 0, 0]
    assert train("--mask", "none", run="blind", env_id=env_id)[0] == 0
    assert all(0.1 < value < 0.9 for value in curve("policy/invalid_fraction", "blind"))


def test_the_default_environment_repeats(main: Callable) -> None:
    scalars, evaluations = [], []
    for run in ("one", "two"):
        flags = "--num-envs 4 --num-steps 32 --no-progress --total-timesteps 256 --run-dir".split()
        assert main(*flags, run, module=ppo)[0] == 0
        assert main("--resume", run, "--total-timesteps", 512, module=ppo)[0] == 0
        scalars.append(read_scalars(run))
        assert scalars[-1].pop("charts/SPS")
        code, out, _ = main("--eval", run, "--eval-episodes", 1, module=ppo)
        assert code == 0
        evaluations.append(out.splitlines()[1:])
    assert scalars[0] == scalars[1]
    assert evaluations[0] == evaluations[1]
    steps, invalid = zip(*scalars[0]["policy/invalid_fraction"], strict=True)
    assert steps == (128, 256, 384, 512)
    assert set(invalid) == {0}


def test_an_action_space_of_another_script_is_named(main: Callable) -> None:
    code, _, err = main("--env-id", "Pendulum-v1", module=ppo)
    assert code == 2
    assert "ppo_continuous.py" in err
    assert not list(Path().iterdir())


# ---- networks for grids


@pytest.mark.parametrize(
    "shape, dtype, last",
    [
        ((5, 5, 3), np.uint8, True),
        ((3, 5, 5), np.uint8, False),
        ((10, 10, 27), np.uint8, True),
        ((27, 10, 10), np.float32, False),
        ((4, 6, 3), np.float32, True),
        ((40, 40, 3), np.float32, True),
    ],
    ids=str,
)
def test_grids_are_read_by_a_cnn(shape: tuple, dtype: type, last: bool) -> None:
    """In the order of axes that the space says, and on the scale of the environment."""
    space = spaces.Box(0, 4, shape, dtype)
    agent = ppo.Agent(ppo.Args(shared_network=True), space, spaces.MultiDiscrete([3, 2]))
    assert agent.trunk[0].in_channels == (shape[-1] if last else shape[0])
    obs = torch.arange(2.0 * np.prod(shape)).view(2, *shape)
    expected = obs.permute(0, 3, 1, 2) if last else obs
    torch.testing.assert_close(agent.preprocess(obs), expected)
    dist, values = agent(obs, torch.ones(2, 5, dtype=torch.bool))
    assert (dist.shape, values.shape) == ((2, 5), (2,))
    agent = ppo.Agent(ppo.Args(norm_obs=True, clip_obs=None), space, spaces.Discrete(2))
    rows = 9 * torch.rand(500, *shape, generator=torch.manual_seed(0))
    agent.obs_norm.update(rows)
    assert agent.preprocess(rows).std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("shape", [(36, 36, 3), (4, 84, 84)], ids=str)
def test_images_are_read_by_the_nature_cnn(shape: tuple) -> None:
    space = spaces.Box(0, 255, shape, np.uint8)
    agent = ppo.Agent(ppo.Args(shared_network=True), space, spaces.MultiDiscrete([3, 2]))
    convolutions = [layer for layer in agent.trunk if isinstance(layer, nn.Conv2d)]
    assert [conv.kernel_size for conv in convolutions] == [(8, 8), (4, 4), (3, 3)]
    assert convolutions[0].in_channels == min(shape)
    obs = torch.full((2, *shape), 255, dtype=torch.uint8)
    assert (agent.preprocess(obs) == 1).all()
    assert agent(obs, torch.ones(2, 5, dtype=torch.bool))[0].shape == (2, 5)


# ---- TaxiDispatch

TAXI = gym.make("Taxi-v4").unwrapped


@cache
def best_returns() -> np.ndarray:
    """The largest undiscounted return of Taxi-v4 from every state, by value iteration."""
    values = np.full(500, -1000.0)
    while True:
        new = values.copy()
        for state, action in itertools.product(range(500), range(6)):
            [(_, after, reward, done)] = TAXI.P[state][action]
            new[state] = max(new[state], reward + (0 if done else values[after]))
        if (new == values).all():
            return values
        values = new


def best_move(state: int) -> int:
    """The first move on a best way."""
    options = [TAXI.P[state][action][0] for action in range(6)]
    return int(np.argmax([r + (0 if done else best_returns()[s]) for _, s, r, done in options]))


def states(env: gym.Env) -> list[tuple[int, bool]]:
    """State in Taxi-v4's numbers, and whether it has delivered, of every taxi."""
    env = env.unwrapped
    return [(int(taxi.s), bool(done)) for taxi, done in zip(env.taxis, env.delivered, strict=True)]


def view(env: gym.Env) -> np.ndarray:
    """What is to be observed of the taxis' states."""
    rows = []
    for state, delivered in states(env):
        row, column, passenger, destination = TAXI.decode(state)
        pad = passenger if passenger < 4 else destination
        places = [np.eye(k)[i] for k, i in ((5, row), (5, column), (4, pad))]
        rows.append(np.concatenate([*places, [passenger == 4, delivered]]))
    return np.concatenate(rows)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("taxis", [1, 3])
def test_taxi_dispatch_is_an_environment(taxis: int) -> None:
    """Gymnasium's checks, distinct seeded starts, and pictures side by side."""
    env = gym.make("TaxiDispatch-v0", taxis=taxis, render_mode="rgb_array").unwrapped
    check_env(env)
    assert env.action_space == spaces.MultiDiscrete([taxis, 6])
    starts = []
    for seed in (*range(6), *range(6)):
        for options in ({"seed": seed}, {}):
            env.reset(**options)
            starts.append(str(states(env)))
    assert starts[:12] == starts[12:]
    assert len(set(starts)) > 9
    pictures = np.split(env.render(), taxis, axis=1)
    for picture, taxi in zip(pictures, env.taxis, strict=True):
        np.testing.assert_array_equal(picture, taxi.render())
    assert len({picture.tobytes() for picture in pictures}) == taxis
    env.close()


def test_rules_of_taxi_dispatch() -> None:
    """Half random play: observations, masks, rewards and ends against Taxi-v4's own table."""
    env, rng, endings = gym.make("TaxiDispatch-v0"), np.random.default_rng(0), set()
    for episode, skill in enumerate((0.0, 0.5, 0.5)):
        obs, info = env.reset(seed=episode)
        for t in itertools.count(1):
            np.testing.assert_array_equal(obs, view(env))
            before = states(env)
            for (state, delivered), row in zip(before, info["action_mask"], strict=True):
                assert row[0] == (not delivered)
                assert row[1:].tolist() == TAXI.action_mask(state).astype(bool).tolist()
                if not delivered:
                    changes = [TAXI.P[state][a][0][1] != state for a in range(6)]
                    assert row[1:].tolist() == changes
            taxi, move = rng.integers(2), rng.integers(6)  # a taxi that has delivered as well
            if rng.random() < skill:
                move = best_move(before[taxi][0])
            obs, reward, terminated, truncated, info = env.step(np.array([taxi, move]))
            after = states(env)
            assert after[1 - taxi] == before[1 - taxi]
            [(_, new, points, done)] = TAXI.P[before[taxi][0]][move]
            if before[taxi][1]:
                new, points, done = *before[taxi][:1], -1, True
            assert after[taxi] == (new, done)
            assert reward == pytest.approx(points / 20)
            assert terminated == all(delivered for _, delivered in after)
            assert truncated == (t == 400)
            if terminated or truncated:
                endings.add((terminated, truncated))
                break
    assert endings == {(True, False), (False, True)}


@pytest.mark.parametrize("taxis", [1, 3])
def test_the_best_play_of_taxi_dispatch_gets_the_optimum(taxis: int) -> None:
    """The taxis' best returns in Taxi-v4, over 20; the mask allows the way there."""
    env = gym.make("TaxiDispatch-v0", taxis=taxis)
    for seed in range(4):
        _, info = env.reset(seed=seed)
        optimum = sum(best_returns()[state] for state, _ in states(env)) / 20
        total, terminated = 0.0, False
        while not terminated:
            taxi = np.flatnonzero(info["action_mask"][:, 0])[-1]
            move = best_move(states(env)[taxi][0])
            assert info["action_mask"][taxi, 1 + move]
            _, reward, terminated, truncated, info = env.step(np.array([taxi, move]))
            assert not truncated
            total += reward
        assert total == pytest.approx(optimum, abs=1e-9)
        assert 0 < optimum < taxis
