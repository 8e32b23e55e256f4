"""Multi-discrete actions under masks: distribution, where masks come from, TaxiDispatch, planes."""

import itertools
import json
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

import ppo_multidiscrete_mask as ppo

NVECS = [[3, 2, 4], [5], [4, 4], [2, 1, 3, 1], [16, 6, 4, 4, 4, 4, 7, 49]]
SHAPES = pytest.mark.parametrize("conditional", [False, True], ids=["independent", "conditional"])


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


def walked(mask: np.ndarray, first: int) -> np.ndarray:
    """The mask [D] of all heads once the first one has chosen."""
    return mask if mask.ndim == 1 else np.concatenate((mask[:, 0], mask[first, 1:]))


def allows(mask: np.ndarray, action: tuple[int, ...], nvec: list[int]) -> bool:
    """Whether the mask of either shape allows this joint action."""
    heads = np.split(walked(mask, action[0]), np.cumsum(nvec)[:-1])
    return all(head[choice] for head, choice in zip(heads, action, strict=True))


def agent_for(space: spaces.Space | list[int], seed: int = 0, **flags: Any) -> ppo.Agent:
    """An agent in float64, whose policy is far from uniform."""
    torch.manual_seed(seed)
    space = spaces.MultiDiscrete(space) if isinstance(space, list) else space
    agent = ppo.Agent(ppo.Args(**flags), spaces.Box(-np.inf, np.inf, (6,)), space).double()
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


def reference(agent: ppo.Agent, obs: Tensor, masks: Tensor) -> list[list[Categorical]]:
    """[row][head]: what torch makes of the logits of the allowed choices alone."""
    logits = agent.actor(obs).split(agent.nvec, -1)
    return [
        [Categorical(logits=row[mask]) for row, mask in zip(rows, heads, strict=True)]
        for rows, heads in zip(
            zip(*logits, strict=True), zip(*masks.split(agent.nvec, -1), strict=True), strict=True
        )
    ]


def total(rows: list[list[Tensor]]) -> Tensor:
    """Sums over the heads."""
    return torch.stack([torch.stack(heads).sum() for heads in rows])


def assert_same(agents: list[ppo.Agent], ours: Tensor, theirs: Tensor) -> None:
    """Equal numbers with equal gradients by the actors' parameters."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    weights = [p for agent in agents for p in agent.actor.parameters()]
    factors = torch.linspace(-1, 2, len(ours), dtype=torch.float64)
    grads = [torch.autograd.grad(x @ factors, weights, retain_graph=True) for x in (ours, theirs)]
    assert max(g.abs().max() for g in grads[1]) > 1e-3
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


# ---- distribution

SPACES = [*map(spaces.MultiDiscrete, NVECS), spaces.Discrete(5, start=3)]


@SHAPES
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_distribution_equals_torch_head_by_head(space: spaces.Space, conditional: bool) -> None:
    p, q = agent_for(space, 0), agent_for(space, 1)
    obs, all_masks = torch.randn(9, 6, dtype=torch.float64), random_masks(p.nvec, 9, conditional)
    actions, masks, _ = p.act(obs, all_masks, p.draw_noise(9))
    for mask, action, used in zip(all_masks.numpy(), actions.numpy(), masks.numpy(), strict=True):
        np.testing.assert_array_equal(used, walked(mask, action[0]))
        assert allows(mask, action, p.nvec)
    dists = p(obs, masks)[0], q(obs, masks)[0]
    theirs = reference(p, obs, masks), reference(q, obs, masks)
    ranks = [
        [mask[:choice].sum() for mask, choice in zip(heads, row, strict=True)]
        for heads, row in zip(
            zip(*masks.split(p.nvec, -1), strict=True), actions.tolist(), strict=True
        )
    ]
    pairs = zip(theirs[0], ranks, strict=True)
    expected = [[h.log_prob(r) for h, r in zip(*pair, strict=True)] for pair in pairs]
    assert_same([p], p.log_prob(dists[0], actions), total(expected))
    expected = [[head.entropy() for head in heads] for heads in theirs[0]]
    assert_same([p], p.entropy(dists[0]), total(expected))
    pairs = zip(*theirs, strict=True)
    expected = [[kl_divergence(a, b) for a, b in zip(*pair, strict=True)] for pair in pairs]
    assert_same([p, q], p.kl_divergence(*dists), total(expected))


@pytest.mark.parametrize("nvec", NVECS, ids=str)
def test_parity_with_sb3_contrib(nvec: list[int]) -> None:
    from sb3_contrib.common.maskable.distributions import MaskableMultiCategoricalDistribution

    agent = agent_for(nvec)
    obs, masks = torch.randn(50, 6, dtype=torch.float64), random_masks(nvec, 50, False)
    with torch.no_grad():
        actions, masks, _ = agent.act(obs, masks, agent.draw_noise(50))
        dist, logits = agent(obs, masks)[0], agent.actor(obs)
    theirs = MaskableMultiCategoricalDistribution(nvec).proba_distribution(logits)
    theirs.apply_masking(masks.numpy())
    torch.testing.assert_close(agent.log_prob(dist, actions), theirs.log_prob(actions))
    torch.testing.assert_close(agent.entropy(dist), theirs.entropy())


SMALL = [[3, 2, 3], [4, 3], [2, 1, 2, 2], [5]]


def joint_probabilities(
    agent: ppo.Agent, obs: Tensor, mask: Tensor
) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """All joint actions and their probabilities for one observation and the environment's mask."""
    actions = list(itertools.product(*map(range, agent.nvec)))
    chosen, n = torch.tensor(actions), len(actions)
    masks = agent.path(agent.heed(mask.expand(n, *mask.shape)), chosen[:, 0])
    with torch.no_grad():
        dists = agent(obs.expand(n, -1), masks)[0]
    return actions, agent.log_prob(dists, chosen).exp().numpy()


@SHAPES
@pytest.mark.parametrize("nvec", SMALL, ids=str)
def test_valid_joint_actions_have_all_the_probability(nvec: list[int], conditional: bool) -> None:
    agent = agent_for(nvec)
    rows = torch.randn(30, 6, dtype=torch.float64), random_masks(nvec, 30, conditional)
    for obs, mask in zip(*rows, strict=True):
        actions, probs = joint_probabilities(agent, obs, mask)
        valid = np.array([allows(mask.numpy(), action, nvec) for action in actions])
        assert (probs[valid] > 0).all()
        assert (probs[~valid] == 0).all()
        assert probs.sum() == pytest.approx(1, abs=1e-12)


@SHAPES
@pytest.mark.parametrize("nvec", SMALL, ids=str)
def test_actions_are_drawn_as_often_as_probable(nvec: list[int], conditional: bool) -> None:
    agent, n = agent_for(nvec), 100_000
    for obs, mask in zip(
        torch.randn(4, 6, dtype=torch.float64), random_masks(nvec, 4, conditional), strict=True
    ):
        actions, probs = joint_probabilities(agent, obs, mask)
        with torch.no_grad():
            logits = agent.actor(obs).float().expand(n, -1)
            drawn, *_ = agent.sample(logits, mask.expand(n, *mask.shape), agent.draw_noise(n))
        index = np.ravel_multi_index(drawn.T.numpy(), nvec)
        counts = np.bincount(index, minlength=len(actions))
        assert (counts[probs == 0] == 0).all()
        likely = probs * n > 5
        chi = ((counts - probs * n)[likely] ** 2 / (probs * n)[likely]).sum()
        free = likely.sum() - 1
        assert chi <= free + 5 * (2 * free) ** 0.5 + 20  # one in 10 ** 7
        assert abs(counts[~likely].sum() - probs[~likely].sum() * n) <= 30


@SHAPES
@pytest.mark.parametrize("nvec", SMALL, ids=str)
def test_the_deterministic_action_is_the_most_probable_one(
    nvec: list[int], conditional: bool
) -> None:
    agent, greedy_is_wrong = agent_for(nvec), 0
    rows = torch.randn(60, 6, dtype=torch.float64), random_masks(nvec, 60, conditional)
    with torch.no_grad():
        modes, *_ = agent.act(*rows, None)
        logits = agent.actor(rows[0])[:, : nvec[0]].numpy()
    for obs, mask, mode, first in zip(*rows, modes.tolist(), logits, strict=True):
        actions, probs = joint_probabilities(agent, obs, mask)
        best = actions[probs.argmax()]
        assert tuple(mode) == best
        allowed = mask[:, 0] if conditional else mask[: nvec[0]]
        greedy_is_wrong += np.where(allowed, first, -np.inf).argmax() != best[0]
    assert (greedy_is_wrong > 0) == (conditional and len(nvec) > 1)


def test_the_mode_weighs_what_follows_the_first_choice() -> None:
    """The first choice 0 is the more probable one, but must share with six second choices."""
    agent = agent_of_logits([2, 6])
    mask = torch.tensor([[[1] * 7, [1, 0, 0, 0, 1, 0, 0]]], dtype=torch.bool)
    obs = torch.tensor([[0.1, 0.0] + [0.0] * 6])
    assert agent.act(obs, mask, None)[0].tolist() == [[1, 3]]
    obs[0, 0] = 2.0
    assert agent.act(obs, mask, None)[0].tolist() == [[0, 0]]


@SHAPES
def test_a_choice_without_a_choice_scores_minus_infinity(conditional: bool) -> None:
    """So it is known, before the environment is, and nowhere else does anything score that."""
    nvec = [3, 4, 2]
    agent, masks = agent_of_logits(nvec), random_masks(nvec, 40, conditional)
    barred = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) < 0.3
    for n, h in barred.nonzero().tolist():
        columns = slice(sum(nvec[:h]), sum(nvec[: h + 1]))
        if not conditional:
            masks[n, columns] = False
        elif h == 0:
            masks[n, :, 0] = False
        else:
            masks[n, :, 1 + columns.start - nvec[0] : 1 + columns.stop - nvec[0]] = False
    for noise in (agent.draw_noise(40), None):
        _, used, scores = agent.act(torch.randn(40, sum(nvec)) * 100, masks, noise)
        allowed = torch.stack([h.any(-1) for h in used.split(nvec, -1)], -1)
        assert torch.equal(scores == -torch.inf, ~allowed)
        assert scores[allowed].isfinite().all()
        assert not allowed[barred].any()
        assert allowed.any()


@SHAPES
def test_half_a_million_draws_are_all_valid(conditional: bool) -> None:
    nvec, n = [4, 3, 5, 2], 250_000
    torch.manual_seed(0)
    agent, starts = agent_of_logits(nvec), np.cumsum([0, *nvec[:-1]])
    for scale in (1.0, 1e4):
        masks = random_masks(nvec, n, conditional)
        with torch.no_grad():
            obs = torch.randn(n, sum(nvec)) * scale
            actions = agent.act(obs, masks, agent.draw_noise(n))[0].numpy()
        masks, rows = masks.numpy(), np.arange(n)
        if conditional:
            masks = np.concatenate((masks[..., 0], masks[rows, actions[:, 0], 1:]), -1)
        assert masks[rows[:, None], actions + starts].all()
        assert [len(set(column)) for column in actions.T] == nvec


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nvec", [*NVECS, [1, 1]], ids=str)
def test_extreme_logits_leave_everything_finite(
    nvec: list[int], dtype: torch.dtype, conditional: bool
) -> None:
    """Masked: probability and gradient are 0. One choice alone: so is all that it would add."""
    torch.manual_seed(0)
    agent = agent_of_logits(nvec).to(dtype)
    for scale in (1.0, 1e2, 1e4):
        p, q = (torch.randn(40, sum(nvec), dtype=dtype) * scale for _ in range(2))
        masks = random_masks(nvec, 40, conditional)
        actions, masks, _ = agent.act(p, masks, agent.draw_noise(40).to(dtype))
        p.requires_grad_(), q.requires_grad_()
        dists = agent(p, masks)[0], agent(q, masks)[0]
        assert (dists[0].exp()[~masks] == 0).all()
        heads = masks.split(nvec, -1)
        alone = torch.cat([(h.sum(-1, keepdim=True) == 1).expand_as(h) for h in heads], -1)
        assert alone.any()
        assert (dists[0][alone & masks] == 0).all()
        for value, inputs in (
            (agent.log_prob(dists[0], actions), [p]),
            (agent.entropy(dists[0]), [p]),
            (agent.kl_divergence(*dists), [p, q]),
        ):
            assert value.isfinite().all()
            assert (value[alone.all(-1)] == 0).all()
            for grad in torch.autograd.grad(value.sum(), inputs, retain_graph=True):
                assert grad.isfinite().all()
                assert (grad[~masks | alone] == 0).all()


@pytest.mark.parametrize("given", ["independent", "conditional"])
def test_heads_with_one_choice_add_nothing(given: str) -> None:
    """The same numbers, bit for bit, as without the second and the last head."""
    conditional = given == "conditional"
    nvec, kept = [3, 4, 2, 5], [0, 1, 2, 7, 8]
    long, short = agent_of_logits(nvec), agent_of_logits([3, 2])
    torch.manual_seed(0)
    logits = torch.randn(50, 14)
    masks = random_masks(nvec, 50, conditional)
    at = [slice(1, 5), slice(7, 12)] if conditional else [slice(3, 7), slice(9, 14)]
    for columns in at:
        masks[..., columns] = False
        masks[..., columns.start + 1] = True
    with torch.no_grad():
        actions, masks, _ = long.act(logits, masks, long.draw_noise(50))
        dist, less = long(logits, masks)[0], short(logits[:, kept], masks[:, kept])[0]
    fewer = actions[:, [0, 2]]
    assert (actions[:, [1, 3]] == 1).all()
    assert torch.equal(long.log_prob(dist, actions), short.log_prob(less, fewer))
    torch.testing.assert_close(long.entropy(dist), short.entropy(less), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(4, start=-2),
        spaces.MultiDiscrete([3, 2, 4], start=[5, 0, -1]),
        spaces.MultiDiscrete([[2, 3], [4, 1]], start=[[1, 0], [0, 7]]),
    ],
    ids=str,
)
def test_every_action_reaches_the_environment_as_its_space_says(space: spaces.Space) -> None:
    agent = agent_for(space)
    joint = torch.tensor(list(itertools.product(*map(range, agent.nvec))))
    sent = agent.to_env(joint)
    assert sent.shape == (len(joint), *space.shape)
    assert all(space.contains(action) for action in sent)
    assert (sent.reshape(joint.shape) - np.ravel(space.start) == joint.numpy()).all()


# ---- what of a mask is heeded


def test_what_each_kind_of_policy_heeds() -> None:
    """Independent heads know the union of what the allowed first choices allow."""
    torch.manual_seed(0)
    nvec = [4, 3, 5]
    flat, masks = random_masks(nvec, 40, False), random_masks(nvec, 40, True)
    agents = {kind: agent_for(nvec, mask=kind) for kind in ("none", "independent", "conditional")}
    everything = torch.ones(40, 12, dtype=torch.bool)
    assert torch.equal(agents["none"].heed(flat), everything)
    assert torch.equal(agents["none"].heed(masks), everything)
    assert torch.equal(agents["independent"].heed(flat), flat)
    assert torch.equal(agents["conditional"].heed(flat), flat)
    assert torch.equal(agents["conditional"].heed(masks), masks)
    for mask, heeded in zip(masks.tolist(), agents["independent"].heed(masks), strict=True):
        union = [bool(row[0]) for row in mask]
        union += [any(row[0] and row[1 + j] for row in mask) for j in range(8)]
        assert heeded.tolist() == union
    loose = masks[..., 1:] & ~masks[..., :1]
    assert loose.any()  # what a forbidden first choice would allow


# ---- masks of environments


def rule(tag: int, episode: int, t: int, nvec: list[int], conditional: bool, single: bool) -> Any:
    """Mask of a step: one allowed joint action if `single`, else some."""
    rng = np.random.default_rng((tag, episode, t))

    def some(k: int) -> np.ndarray:
        mask = rng.random(k) < (0 if single else 0.4)
        mask[rng.integers(k)] = True
        return mask

    first, *rest = nvec
    if not conditional:
        return np.concatenate([some(k) for k in nvec])
    rows = np.array([np.concatenate([[False], *map(some, rest)]) for _ in range(first)])
    rows[:, 0] = some(first)
    return rows


def length(tag: int, episode: int) -> int:
    """Steps of an episode; odd ones are truncated, even ones terminate."""
    return 1 + (2 * tag + 3 * episode) % 5


class Ruled(gym.Env):
    """An action that `rule` forbids costs 1 and ends the episode; nothing is allowed after an end.

    An observation is (tag, episode, step), where tag is the seed's remainder. `where` says how the
    mask is handed over; `dead` is a (tag, step, head) whose mask allows nothing; `strict=False`
    lets episodes go on; `cut` changes the mask's shape.
    """

    record: list[tuple[int, tuple[int, ...], bool]] = []  # tag, action, allowed; of this process

    def __init__(
        self,
        where: str = "info",
        nvec: tuple = (3, 2, 4),
        conditional: bool = False,
        single: bool = True,
        strict: bool = True,
        dead: list | None = None,
        cut: int = 0,
    ) -> None:
        self.where, self.nvec, self.cut = where, list(nvec), cut
        self.rule = partial(rule, nvec=self.nvec, conditional=conditional, single=single)
        self.strict, self.dead = strict, dead or [-1, 0, 0]
        self.tag, self.episode, self.clock = 0, -1, 0
        self.action_space = spaces.MultiDiscrete(nvec)
        if where == "method":
            self.action_masks = lambda: self.mask
        box = partial(spaces.Box, -np.inf, np.inf)
        mask = spaces.MultiBinary(self.rule(0, 0, 0)[..., cut:].shape)
        if where == "one key":
            self.observation_space = spaces.Dict(action_mask=mask, observation=box((3,)))
        elif where == "two keys":
            self.observation_space = spaces.Dict(action_mask=mask, tag=box((1,)), when=box((2,)))
        else:
            self.observation_space = box((3,))

    def look(self) -> tuple[Any, dict]:
        over = self.t == length(self.tag, self.episode)
        self.mask = self.rule(self.tag, self.episode, self.t)
        if over or self.over:
            self.mask[:] = False
        tag, clock, head = self.dead
        if (self.tag, self.clock) == (tag, clock):
            start = sum(self.nvec[:head])
            columns = slice(start, start + self.nvec[head])
            if self.mask.ndim == 2:
                columns = slice(1 + start - self.nvec[0], columns.stop + 1 - self.nvec[0])
                columns = columns if head else slice(0, 1)
            self.mask[..., columns] = False
        self.mask = self.mask[..., self.cut :]
        obs = np.array([self.tag, self.episode, self.t], np.float32)
        if self.where == "one key":
            return {"action_mask": self.mask.astype(np.int8), "observation": obs}, {}
        if self.where == "two keys":
            mask = self.mask.astype(np.int8)
            return {"action_mask": mask, "tag": obs[:1], "when": obs[1:]}, {}
        return obs, {"action_mask": self.mask} if self.where == "info" else {}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        if seed is not None:
            self.tag, self.episode, self.clock = seed % 7, -1, 0
        self.episode, self.t, self.over = self.episode + 1, 0, False
        return self.look()

    def step(self, action: np.ndarray) -> tuple:
        assert not self.over
        ok = allows(self.rule(self.tag, self.episode, self.t), tuple(action), self.nvec)
        self.record.append((self.tag, tuple(map(int, action)), ok))
        self.t, self.clock = self.t + 1, self.clock + 1
        last, odd = self.t == length(self.tag, self.episode), self.episode % 2 == 1
        wrong = self.strict and not ok
        self.over = last or wrong
        obs, info = self.look()
        return obs, -float(not ok), (last and not odd) or wrong, last and odd, info


class RuledVector(SyncVectorEnv):
    """Many of them as one vector environment of its own."""

    def __init__(self, num_envs: int, mode: str = "NextStep", **kwargs: Any) -> None:
        super().__init__([partial(Ruled, **kwargs)] * num_envs, autoreset_mode=mode)
        if kwargs.get("where") == "method":
            self.action_masks = lambda: np.array([env.mask for env in self.envs])


gym.register("Ruled-v0", Ruled, vector_entry_point=RuledVector)

WHERES = ["info", "method", "one key", "two keys"]
HANDED = list(itertools.product(["sync", "native", "native SameStep"], WHERES))
HANDED.remove(("native SameStep", "two keys"))  # Gymnasium flattens no such vector


def play(
    mode: str = "sync",
    env_id: str = f"{__name__}:Ruled-v0",
    flags: dict | None = None,
    rollouts: int = 3,
    seed: int = 8,
    num_envs: int = 3,
    **kwargs: Any,
) -> Iterator[tuple[ppo.Args, ppo.Agent, ppo.Rollout]]:
    """Rollouts of a few environments, with an agent that keeps exploring."""
    vectorization, *same = mode.split()
    kwargs |= {"mode": "SameStep"} if same else {}
    args = ppo.Args(
        env_id=env_id, vectorization=vectorization, env_kwargs=json.dumps(kwargs),
        num_envs=num_envs, num_steps=16, **(flags or {}),
    )  # fmt: skip
    envs = ppo.make_envs(args, num_envs, seed)
    torch.manual_seed(seed)
    agent = ppo.Agent(args, envs.single_observation_space, envs.single_action_space)
    nn.init.normal_(agent.actor[-1].weight, std=0.1)
    rollout = ppo.Rollout(args, agent, envs, seed)
    for _ in range(rollouts):
        ppo.collect(agent, envs, rollout, [])
        yield args, agent, rollout
    envs.close()


def check_masks(rollout: ppo.Rollout, conditional: bool) -> int:
    """Every row's mask is the one of the row's own observation; counts the starts of episodes."""
    starts = 0
    for t, n in np.argwhere(rollout.valid):
        tag, episode, step = map(int, rollout.obs[t, n])
        assert tag == (8 + n) % 7
        expected = rule(tag, episode, step, [3, 2, 4], conditional, True)
        np.testing.assert_array_equal(rollout.masks[t, n], expected)
        starts += step == 0
    return starts


@SHAPES
@pytest.mark.parametrize("mode, where", HANDED)
def test_masks_belong_to_their_observations(mode: str, where: str, conditional: bool) -> None:
    """At the reset, after steps, at autoreset, and over the ends of rollouts."""
    starts, finals = 0, 0
    Ruled.record.clear()
    for _, agent, rollout in play(mode, where=where, conditional=conditional):
        assert rollout.obs.shape == (17, 3, 3)  # the mask is not among them
        starts += check_masks(rollout, conditional)
        assert (rollout.rewards == 0).all()
        assert ppo.invalid_fraction(agent, rollout) == 0
        assert rollout.valid.all() == (mode != "native")
        for t, n, obs in rollout.final_obs:
            finals += 1  # of truncated episodes
            tag, episode, step = rollout.obs[t, n].tolist()
            assert np.array(obs).tolist() == [tag, episode, step + 1]
    assert starts > 20
    assert (finals > 5) == (mode != "native")
    assert all(ok for *_, ok in Ruled.record)
    assert len(Ruled.record) > 100


def test_masks_of_environments_in_processes() -> None:
    starts = 0
    for _, _, rollout in play("async", where="two keys", conditional=True, num_envs=2):
        starts += check_masks(rollout, True)
        assert (rollout.rewards == 0).all()
    assert starts > 15


def test_the_row_after_an_end_counts_for_nothing() -> None:
    """Its mask allows nothing. Under no mask, only actions that were played can be invalid."""
    seen = 0
    for conditional in (False, True):
        Ruled.record.clear()
        kwargs = {"conditional": conditional, "strict": False, "single": False}
        for _, agent, rollout in play("native", flags={"mask": "none"}, **kwargs):
            played = [not ok for *_, ok in Ruled.record]
            assert len(played) == rollout.valid[:-1].sum() < 48
            assert ppo.invalid_fraction(agent, rollout) == pytest.approx(np.mean(played), abs=1e-6)
            assert 0.2 < np.mean(played) < 0.98
            seen += (~rollout.valid).sum()
            assert rollout.masks[~rollout.valid].all()
            Ruled.record.clear()
    assert seen > 20


def expected_logprob(agent: ppo.Agent, obs: Tensor, mask: Any, action: list[int]) -> float:
    """Log-prob of an action under the mask [D] that the policy has heeded."""
    heads = zip(agent.actor(obs).split(agent.nvec), mask.split(agent.nvec), action, strict=True)
    return sum(float(x[choice] - x[mask].logsumexp(0)) for x, mask, choice in heads)


@pytest.mark.parametrize("kind", ["none", "independent", "conditional"])
@pytest.mark.parametrize(
    "mode, kwargs",
    [
        ("sync", {}),
        ("sync", {"conditional": True}),
        ("native", {"conditional": True}),
        ("native", {}),
        ("taxis", {}),
    ],
    ids=str,
)
def test_ratio_is_one_before_the_first_gradient_step(mode: str, kwargs: dict, kind: str) -> None:
    """In every iteration, and the old log-probs are those of the mask that was heeded."""
    player = partial(play, mode, single=False, strict=False, **kwargs)
    if mode == "taxis":
        player = partial(play, env_id="TaxiDispatch-v0")
    optimizer, spread = None, 0
    for args, agent, rollout in player(flags={"mask": kind, "learning_rate": 1e-2}):
        optimizer = optimizer or ppo.Adam(agent, args)
        rollout.signals = ppo.learning_signals(agent, rollout, args)
        batch = ppo.make_batch(agent, None, rollout, args)
        with torch.no_grad():
            dists = agent(batch.obs, batch.masks)[0]
            ratio = (agent.log_prob(dists, batch.actions) - batch.logprobs).exp()
            torch.testing.assert_close(ratio, torch.ones(48), rtol=0, atol=1e-5)
            torch.testing.assert_close(dists, batch.dists, rtol=1e-5, atol=1e-5)
            spread += batch.logprobs.std()
            masks = torch.as_tensor(rollout.masks[:-1]).flatten(0, 1)
            rows = zip(batch.obs, masks, batch.actions.tolist(), batch.logprobs, strict=True)
            for row, (obs, mask, action, logprob) in enumerate(rows):
                if not rollout.valid[:-1].flat[row]:
                    continue
                heeded = agent.heed(mask[None])[0].numpy()
                path = torch.as_tensor(walked(heeded, action[0]))
                expected = expected_logprob(agent, obs, path, action)
                assert logprob.item() == pytest.approx(expected, abs=1e-4)
        ppo.update(agent, optimizer, rollout, batch, args, torch.tensor([1, 0.5, 0, 0, 0]), False)
        changed = (agent.log_prob(agent(batch.obs, batch.masks)[0], batch.actions)).detach()
        assert (changed - batch.logprobs).abs().max() > 1e-3
    assert spread > 0.1


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


def dispatch(**kwargs: Any) -> gym.Env:
    return gym.make("TaxiDispatch-v0", **kwargs).unwrapped


def states(env: gym.Env) -> list[tuple[int, bool]]:
    """State in Taxi-v4's numbers, and whether it has delivered, of every taxi."""
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
@pytest.mark.parametrize("taxis", [1, 2, 3])
def test_taxi_dispatch_passes_gymnasiums_checks(taxis: int) -> None:
    env = dispatch(taxis=taxis)
    check_env(env)
    assert env.action_space == spaces.MultiDiscrete([taxis, 6])


def test_rules_of_taxi_dispatch() -> None:
    """Half random play: states, masks, rewards and ends against Taxi-v4's own table."""
    env, rng, endings = dispatch(), np.random.default_rng(0), 0
    for episode in range(4):
        obs, info = env.reset(seed=episode)
        assert not any(delivered for _, delivered in states(env))
        for t in itertools.count(1):
            np.testing.assert_array_equal(obs, view(env))
            before, mask = states(env), info["action_mask"]
            assert mask.shape == (2, 7)
            for (state, delivered), row in zip(before, mask, strict=True):
                assert row[0] == (not delivered)
                assert row[1:].tolist() == TAXI.action_mask(state).astype(bool).tolist()
                if not delivered:
                    changes = [TAXI.P[state][a][0][1] != state for a in range(6)]
                    assert row[1:].tolist() == changes
            taxi = rng.integers(2)  # a delivered one as well
            move = rng.integers(6)
            if rng.random() < 0.5:
                move = best_move(before[taxi][0])
            obs, reward, terminated, truncated, info = env.step(np.array([taxi, move]))
            after = states(env)
            assert after[1 - taxi] == before[1 - taxi]
            state, delivered = before[taxi]
            if delivered:
                assert after[taxi] == before[taxi]
                assert reward == pytest.approx(-1 / 20)
            else:
                [(_, new, points, done)] = TAXI.P[state][move]
                assert after[taxi] == (new, done)
                assert reward == pytest.approx(points / 20)
            assert terminated == all(delivered for _, delivered in after)
            assert truncated == (t == 400)
            if terminated or truncated:
                break
        endings += terminated
    assert endings > 0


@pytest.mark.parametrize("taxis", [1, 2, 3])
def test_taxi_dispatch_is_cut_after_200_steps_a_taxi(taxis: int) -> None:
    env = gym.make("TaxiDispatch-v0", taxis=taxis)
    env.reset(seed=0)
    for t in range(1, 200 * taxis + 1):
        _, _, terminated, truncated, _ = env.step(np.array([t % taxis, t // taxis % 2]))
        assert not terminated
        assert truncated == (t == 200 * taxis)


def test_the_best_play_of_taxi_dispatch_gets_the_optimum() -> None:
    """Both taxis' best returns in Taxi-v4, over 20; a player that is greedy in them gets there."""
    returns = []
    for taxis in (1, 2, 3):
        env = dispatch(taxis=taxis)
        for seed in range(5):
            _, info = env.reset(seed=seed)
            optimum = sum(best_returns()[state] for state, _ in states(env)) / 20
            total, terminated = 0.0, False
            for step in range(200):
                waiting = np.flatnonzero(info["action_mask"][:, 0])
                taxi = waiting[step % len(waiting)]
                move = best_move(states(env)[taxi][0])
                assert info["action_mask"][taxi, 1 + move]
                _, reward, terminated, _, info = env.step(np.array([taxi, move]))
                total += reward
                if terminated:
                    break
            assert terminated
            assert total == pytest.approx(optimum, abs=1e-9)
            returns.append(total / taxis)
    assert 0.2 < np.mean(returns) < 0.6


def test_taxi_dispatch_starts_as_seeded() -> None:
    env, other = dispatch(taxis=3), dispatch(taxis=3)
    starts = []
    for seed in range(5):
        sequences = []
        for taxis in (env, other):
            sequences.append([])
            for reset in ({"seed": seed}, {}, {}, {}):
                taxis.reset(**reset)
                sequences[-1].append(states(taxis))
        assert sequences[0] == sequences[1]
        starts += sequences[0]
    assert len({str(start) for start in starts}) > 15
    assert sum(len(set(start)) == 3 for start in starts) > 15  # the taxis start apart


@pytest.mark.parametrize("taxis", [1, 3])
def test_taxi_dispatch_shows_its_maps_side_by_side(taxis: int) -> None:
    pytest.importorskip("pygame")
    env = dispatch(taxis=taxis, render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert frame.dtype == np.uint8
    parts = np.split(frame, taxis, axis=1)
    for part, taxi in zip(parts, env.taxis, strict=True):
        np.testing.assert_array_equal(part, taxi.render())
        assert part.shape[0] >= 300
    assert len({part.tobytes() for part in parts}) == taxis
    env.close()


# ---- planes


def layers(modules: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in modules]


@pytest.mark.parametrize(
    "shape, high, dtype, last",
    [
        ((5, 5, 3), 1, np.uint8, True),
        ((3, 5, 5), 4, np.uint8, False),
        ((10, 10, 27), 1, np.uint8, True),
        ((27, 10, 10), np.inf, np.float32, False),
        ((4, 6, 3), 2, np.float32, True),
        ((40, 40, 3), 1, np.float32, True),
        ((35, 35, 3), 255, np.uint8, True),
    ],
    ids=str,
)
def test_planes_are_read_by_a_cnn(shape: tuple, high: float, dtype: type, last: bool) -> None:
    """In the order and the scale that the space says."""
    space = spaces.Box(0, high, shape, dtype)
    agent = ppo.Agent(ppo.Args(shared_network=True), space, spaces.MultiDiscrete([3, 2]))
    channels = shape[-1] if last else shape[0]
    assert layers(agent.trunk)[:4] == ["Conv2d", "ReLU", "Conv2d", "ReLU"]
    assert agent.trunk[0].in_channels == channels
    obs = torch.arange(2.0 * np.prod(shape)).view(2, *shape)
    expected = (obs.permute(0, 3, 1, 2) if last else obs) / (high if high < np.inf else 1)
    torch.testing.assert_close(agent.preprocess(obs), expected)
    dist, values = agent(obs, torch.ones(2, 5, dtype=torch.bool))
    assert (dist.shape, values.shape) == ((2, 5), (2,))
    alone = ppo.Agent(ppo.Args(), space, spaces.MultiDiscrete([3, 2]))
    assert layers(alone.trunk) == []
    assert layers(alone.actor)[0] == layers(alone.critic)[0] == "Conv2d"


@pytest.mark.parametrize("shape", [(36, 36, 3), (4, 84, 84), (84, 84, 4)], ids=str)
def test_large_frames_are_read_by_the_nature_cnn(shape: tuple) -> None:
    space = spaces.Box(0, 255, shape, np.uint8)
    agent = ppo.Agent(ppo.Args(shared_network=True), space, spaces.MultiDiscrete([3, 2]))
    convolutions = [layer for layer in agent.trunk if isinstance(layer, nn.Conv2d)]
    assert [conv.kernel_size for conv in convolutions] == [(8, 8), (4, 4), (3, 3)]
    assert convolutions[0].in_channels == min(shape)
    obs = torch.full((2, *shape), 255, dtype=torch.uint8)
    assert (agent.preprocess(obs) == 1).all()
    assert agent(obs, torch.ones(2, 5, dtype=torch.bool))[0].shape == (2, 5)
