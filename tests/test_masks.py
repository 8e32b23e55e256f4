"""Masks: the policy under them, where they come from, whole runs, TaxiDispatch."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
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
from sb3_contrib.common.maskable.distributions import MaskableMultiCategoricalDistribution
from test_update import make_optimizer
from torch import Tensor, nn

import ppo_multidiscrete_mask as ppo

SHAPES = pytest.mark.parametrize("conditional", [False, True], ids=["flat", "conditional"])
KINDS = pytest.mark.parametrize("kind", ["none", "independent", "conditional"])
MICRORTS = [16, 6, 4, 4, 4, 4, 7, 49]


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


def union(mask: Tensor) -> Tensor:
    """The mask [D] of independent heads: what any allowed first choice allows."""
    return mask if mask.ndim == 1 else torch.cat((mask[:, 0], mask[mask[:, 0], 1:].any(0)))


def allows(mask: Tensor, action: Any, nvec: list[int]) -> bool:
    """Whether the mask of either shape allows this joint action."""
    heads = path(mask, action[0]).split(nvec)
    return all(head[choice] for head, choice in zip(heads, action, strict=True))


def naive_log_prob(logits: Tensor, mask: Tensor, action: Any, nvec: list[int]) -> Tensor:
    """Log-probability of a joint action under the mask [D] of its path."""
    heads = zip(logits.split(nvec), mask.split(nvec), action, strict=True)
    return torch.stack([x[i] - x[allowed].logsumexp(0) for x, allowed, i in heads]).sum()


def agent_of_logits(nvec: list[int], **flags: Any) -> ppo.Agent:
    """An agent in float64 whose observations are its logits."""
    box = spaces.Box(-np.inf, np.inf, (sum(nvec),))
    args = ppo.Args(hidden_sizes=(), **flags)
    torch.manual_seed(0)
    agent = ppo.Agent(args, box, spaces.MultiDiscrete(nvec)).double()
    agent.actor[-1].weight.data = torch.eye(sum(nvec), dtype=torch.float64)
    return agent


# ---- distribution


@SHAPES
@pytest.mark.parametrize("nvec", [[3, 2, 3], [4, 6], [3, 1, 4, 2], [5]], ids=str)
def test_policy_equals_the_enumeration_of_all_joint_actions(
    nvec: list[int], conditional: bool
) -> None:
    """Log-probs, mode, draws; the expectation over old paths of entropy, KLs and gradients."""
    agent = agent_of_logits(nvec)
    agent.conditional = conditional  # as `Rollout` sets it
    actions = torch.tensor(list(itertools.product(*map(range, nvec))))
    n, num_draws = len(actions), 5000
    greedy_is_wrong = factor_matters = False
    for mask in random_masks(nvec, 12, conditional):
        rows = 1.5 * torch.randn(3, sum(nvec), dtype=torch.float64)
        new = rows[0].requires_grad_()
        valid = torch.tensor([allows(mask, action, nvec) for action in actions])
        p, old_p, ref_p = (
            torch.stack([naive_log_prob(x, path(mask, a[0]), a, nvec) for a in actions[valid]])
            for x in (new, *rows[1:].unbind())
        )
        with torch.no_grad():
            mode = agent.act(new[None], mask[None], None)
            assert mode.tolist() == actions[valid][p.argmax()][None].tolist()
            first = new[: nvec[0]].masked_fill(~path(mask, 0)[: nvec[0]], -torch.inf).argmax()
            greedy_is_wrong |= bool(first != mode[0, 0])
            obs, masks = new.expand(num_draws, -1), mask.expand(num_draws, *mask.shape)
            drawn = agent.act(obs, masks, agent.noise.sample((num_draws,)))
            counts = np.bincount(np.ravel_multi_index(drawn.T.numpy(), nvec), minlength=n)
            assert counts[valid].sum() == num_draws
            expected = num_draws * p.exp().numpy()
            assert (np.abs(counts[valid] - expected) <= 6 * np.sqrt(expected) + 6).all()

        masks = agent.path_masks(mask.expand(n, *mask.shape), actions[:, 0])
        dist, old, ref = (agent(x.expand(n, -1), masks)[0] for x in (new, *rows[1:].unbind()))
        logprobs = agent.log_prob(dist, actions)
        assert (logprobs[~valid].exp() == 0).all()
        torch.testing.assert_close(logprobs[valid], p, rtol=1e-9, atol=1e-9)
        assert p.exp().sum().item() == pytest.approx(1, abs=1e-12)

        ratio = agent.path_ratio(dist, {"actions": actions, "dists": old.detach()})
        for estimates, exact in (
            (logprobs, old_p.exp() @ p),
            (agent.entropy(dist, ratio), -p.exp() @ p),
            (agent.kl_divergence(dist, ref.detach(), ratio), p.exp() @ (p - ref_p)),
            (agent.kl_divergence(old.detach(), dist), old_p.exp() @ (old_p - p)),
        ):
            mean = old_p.exp() @ estimates[valid]
            torch.testing.assert_close(mean, exact, rtol=1e-9, atol=1e-9)
            grads = [torch.autograd.grad(x, new, retain_graph=True)[0] for x in (mean, exact)]
            torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-9)
            if not conditional and estimates is not logprobs:  # no factor
                torch.testing.assert_close(estimates, exact.expand(n))
        without = old_p.exp() @ agent.entropy(dist, 1.0)[valid]
        factor_matters |= bool((without + p.exp() @ p).abs() > 0.01)
    several = conditional and len(nvec) > 1
    assert (greedy_is_wrong, factor_matters) == (several, several)


@SHAPES
@pytest.mark.parametrize("nvec", [[3, 2, 4], [5], MICRORTS, [1, 1]], ids=str)
def test_large_logits_and_parity_with_sb3_contrib(nvec: list[int], conditional: bool) -> None:
    """Masked: probability and gradient are 0. One choice alone: so is all that it would add."""
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
        heads = masks.split(nvec, -1)
        alone = torch.cat([head & (head.sum(-1, keepdim=True) == 1) for head in heads], -1)
        assert (dists[0][alone] == 0).all()
        one_way = alone.sum(-1) == len(nvec)
        assert alone.any()
        if not conditional:
            theirs = MaskableMultiCategoricalDistribution(nvec).proba_distribution(p)
            theirs.apply_masking(masks.numpy())
            torch.testing.assert_close(agent.log_prob(dists[0], actions), theirs.log_prob(actions))
            torch.testing.assert_close(agent.entropy(dists[0], 1.0), theirs.entropy())
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
    mask is handed over ("late", "early": not after resets, not after steps); `dead` is a [tag,
    step, head] whose mask allows nothing; `strict=False` lets episodes go on; `cut` drops columns.
    """

    record: list[tuple[int, bool]] = []  # tag, allowed; of this process

    def __init__(
        self,
        where: str = "info",
        conditional: bool = False,
        single: bool = True,
        strict: bool = True,
        dead: list | None = None,
        cut: int = 0,
    ) -> None:
        self.where, self.conditional, self.single = where, conditional, single
        self.strict, self.dead, self.cut = strict, dead, cut
        self.tag, self.episode, self.clock = 0, -1, 0
        self.action_space = spaces.MultiDiscrete([3, 2, 4])
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,))
        if "key" in where:
            mask = spaces.MultiBinary(self.rule()[..., cut:].shape)
            self.observation_space = spaces.Dict(action_mask=mask, rest=self.observation_space)
        if where == "two keys":
            self.observation_space["some"] = spaces.Discrete(2)

    def rule(self, t: int = 0) -> np.ndarray:
        return rule(self.tag, max(self.episode, 0), t, self.conditional, self.single)

    def look(self, missing: str) -> tuple[Any, dict]:
        self.mask = self.rule(self.t)
        if self.over:
            self.mask[:] = False
        elif self.dead and self.dead[:2] == [self.tag, self.clock]:
            start, stop = [(0, 3), (3, 5), (5, 9)][self.dead[2]]
            if self.conditional:
                start, stop = [(0, 1), (1, 3), (3, 7)][self.dead[2]]
            self.mask[..., start:stop] = False
        self.mask = self.mask[..., self.cut :]
        obs = np.array([self.tag, self.episode, self.t], np.float32)
        if "key" in self.where:
            obs = {"action_mask": self.mask.astype(np.int8), "rest": obs}
        if self.where == "two keys":
            obs["some"] = 1
        given = self.where in ("info", "late", "early") and self.where != missing
        return obs, {"action_mask": self.mask.astype(np.int8)} if given else {}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        if seed is not None:
            self.tag, self.episode, self.clock = seed % 7, -1, 0
        self.episode, self.t, self.over = self.episode + 1, 0, False
        return self.look("late")

    def step(self, action: np.ndarray) -> tuple:
        assert not self.over
        ok = allows(torch.from_numpy(self.rule(self.t)), action, [3, 2, 4])
        self.record.append((self.tag, ok))
        self.t, self.clock = self.t + 1, self.clock + 1
        last, odd = self.t == 1 + (2 * self.tag + 3 * self.episode) % 5, self.episode % 2 == 1
        wrong = self.strict and not ok
        self.over = last or wrong
        obs, info = self.look("early")
        return obs, -float(not ok), (last and not odd) or wrong, last and odd, info


class MethodOfWrapper(gym.Wrapper):
    def action_masks(self) -> np.ndarray:
        return self.unwrapped.mask


def make_ruled(**kwargs: Any) -> gym.Env:
    env = Ruled(**kwargs)
    return MethodOfWrapper(env) if env.where == "method" else env


class RuledVector(SyncVectorEnv):
    """Many of them as one vector environment of its own."""

    def __init__(self, num_envs: int, mode: str = "NextStep", **kwargs: Any) -> None:
        super().__init__([lambda: Ruled(**kwargs)] * num_envs, autoreset_mode=mode)
        if kwargs.get("where") == "method":
            self.action_masks = lambda: np.array([env.mask for env in self.envs])


gym.register("Ruled-v0", make_ruled, vector_entry_point=RuledVector)


def play(mode: str, /, env_id: str = f"{__name__}:Ruled-v0", **kwargs: Any) -> Iterator[tuple]:
    """Three rollouts of 16 steps of 2 environments, whose seeds are 8 and 9."""
    mask, sample = kwargs.pop("mask", "conditional"), kwargs.pop("sample", True)
    flags = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "env_kwargs": kwargs}
    args = ppo.Args(env_id=env_id, vectorization=mode, mask=mask, **flags)
    envs = ppo.make_envs(args, 2, 8)
    torch.manual_seed(8)
    agent = ppo.Agent(args, envs.single_observation_space, envs.single_action_space)
    nn.init.normal_(agent.actor[-1].weight, std=0.1)
    rollout = ppo.Rollout(args, agent, envs, 8)
    for _ in range(3):
        Ruled.record.clear()
        rollout.collect(agent, envs, sample)
        yield args, agent, rollout
    envs.close()


@SHAPES
@pytest.mark.parametrize(
    "mode, where",
    [
        *itertools.product(["sync", "native"], ["info", "method", "one key", "two keys"]),
        *itertools.product(["native SameStep"], ["info", "method", "one key"]),
        ("async", "two keys"),
    ],
)
def test_masks_belong_to_their_observations(mode: str, where: str, conditional: bool) -> None:
    """At the reset, after steps, at autoreset, and over the ends of rollouts."""
    if mode == "async" and not conditional:
        pytest.skip("once is enough")
    vectorization, *same_step = mode.split()
    kwargs = {"mode": "SameStep"} if same_step else {}
    starts = finals = resets = 0
    for args, agent, rollout in play(vectorization, where=where, conditional=conditional, **kwargs):
        assert rollout.obs.shape == (17, 2, 5 if where == "two keys" else 3)  # without the mask
        assert (rollout.rewards == 0).all()
        assert all(ok for _, ok in Ruled.record)
        for t, n in np.argwhere(rollout.valid):
            tag, episode, step = map(int, rollout.obs[t, n, :3])
            assert tag == (8 + n) % 7
            expected = rule(tag, episode, step, conditional, single=True)
            np.testing.assert_array_equal(rollout.masks[t, n], expected)
            starts += step == 0
        for t, n, obs in rollout.final_obs:
            assert (np.array(obs) == rollout.obs[t, n] + np.eye(len(obs))[2]).all()
        finals += len(rollout.final_obs)
        resets += (~rollout.valid).sum()
        assert ppo.make_batch(agent, None, rollout, args)[1]["policy/invalid_fraction"] == 0
    assert starts > 15
    assert (finals > 5, resets > 15) == (mode != "native", mode == "native")


@SHAPES
@KINDS
@pytest.mark.parametrize("vectorization", ["sync", "native"])
def test_invalid_fraction(vectorization: str, kind: str, conditional: bool) -> None:
    """Of the actions that were played: the row after an end counts for nothing."""
    kwargs = {"conditional": conditional, "strict": False, "single": False}
    for args, agent, rollout in play(vectorization, mask=kind, **kwargs):
        wrong = [not ok for _, ok in Ruled.record]
        assert len(wrong) == rollout.valid[:-1].sum()
        assert (len(wrong) < 32) == (vectorization == "native")
        metrics = ppo.make_batch(agent, None, rollout, args)[1]
        assert metrics["policy/invalid_fraction"].item() == pytest.approx(np.mean(wrong), abs=1e-6)
        blind = kind == "none" or (kind == "independent" and conditional)
        assert (0.1 < np.mean(wrong) < 0.98) == blind


@KINDS
@pytest.mark.parametrize(
    "vectorization, kwargs",
    [
        ("sync", {"strict": False, "single": False}),
        ("native", {"strict": False, "single": False, "conditional": True}),
        ("sync", {"env_id": "TaxiDispatch-v0"}),
    ],
    ids=["flat", "conditional", "taxis"],
)
def test_ratio_is_one_before_the_first_gradient_step(
    vectorization: str, kwargs: dict, kind: str
) -> None:
    """In every iteration, and the old log-probs are those under the masks that were respected."""
    optimizer, coefs = None, torch.tensor([0.01, 0.0])
    for args, agent, rollout in play(vectorization, mask=kind, **kwargs):
        assert agent.conditional == (kind == "conditional" and rollout.masks.ndim == 4)
        optimizer = optimizer or make_optimizer(agent, replace(args, learning_rate=1e-2))
        batch, _ = ppo.make_batch(agent, None, rollout, args)
        weights = batch["loss_mask"] / batch["loss_mask"].sum()
        _, metrics = ppo.ppo_loss(agent, batch | {"weights": weights}, args, coefs, False)
        assert metrics["losses/clipfrac"] @ weights == 0
        assert (metrics["losses/approx_kl"] @ weights).item() == pytest.approx(0, abs=1e-6)
        env_masks = torch.from_numpy(rollout.masks[:-1]).flatten(0, 1)
        for row in batch["loss_mask"].nonzero().flatten():
            action = batch["actions"][row].tolist()
            mask = union(env_masks[row]) if kind == "independent" else env_masks[row]
            mask = torch.ones_like(path(mask, 0)) if kind == "none" else path(mask, action[0])
            expected = naive_log_prob(agent.actor(batch["obs"][row]), mask, action, agent.nvec)
            assert batch["logprobs"][row].item() == pytest.approx(expected.item(), abs=1e-4)
        ppo.update(agent, optimizer, rollout, batch, args, coefs)
        changed = agent.log_prob(agent(batch["obs"], batch["masks"])[0], batch["actions"])
        assert (changed - batch["logprobs"]).abs().max() > 1e-3


@SHAPES
@pytest.mark.parametrize("kind", ["independent", "conditional"])
@pytest.mark.parametrize(
    "vectorization, n, clock, sample",
    [("sync", 1, 21, True), ("native", 1, 7, True), ("sync", 0, 5, False)],
)
def test_no_action_is_played_at_a_dead_end(
    vectorization: str, n: int, clock: int, sample: bool, kind: str, conditional: bool
) -> None:
    kwargs = {"conditional": conditional, "strict": False, "single": False, "mask": kind}
    for head in range(3):
        rollouts = play(vectorization, sample=sample, dead=[(8 + n) % 7, clock, head], **kwargs)
        with pytest.raises(ValueError, match=rf"environment {n}\b.*head {head}\b"):
            list(rollouts)
        assert sum(tag == (8 + n) % 7 for tag, _ in Ruled.record) == clock % 16


# ---- whole runs


@pytest.fixture
def train(main: Callable) -> Callable:
    """Iterations of 48 steps; keyword arguments are the environment's."""

    def train(
        *flags: Any, env_id: str = "Ruled-v0", steps: int = 144, run: str = "run", **kwargs: Any
    ) -> tuple[int, str, str]:
        Ruled.record.clear()
        words = "--num-envs 3 --num-steps 16 --num-minibatches 2 --no-progress --run-dir".split()
        words += [run, "--env-id", env_id, "--env-kwargs", json.dumps(kwargs)]
        return main(*words, "--total-timesteps", steps, *flags, module=ppo)

    return train


def curve(tag: str, run: str = "run") -> list[float]:
    return [value for _, value in read_scalars(run)[tag]]


@SHAPES
@pytest.mark.parametrize("mode, where", [("sync", "two keys"), ("native", "method")])
def test_training_resuming_and_evaluating_play_only_what_is_allowed(
    mode: str, where: str, conditional: bool, train: Callable, main: Callable
) -> None:
    """One joint action in each step."""
    outcome = train("--vectorization", mode, where=where, conditional=conditional)
    assert outcome[0] == 0, outcome
    assert main("--resume", "run", "--total-timesteps", 240, module=ppo)[0] == 0
    for tag in ("policy/invalid_fraction", "charts/episodic_return", "losses/entropy"):
        assert set(curve(tag)) == {0}
    played = len(Ruled.record)
    assert played == 240 if mode == "sync" else 150 < played < 240
    for flag in ("--eval-deterministic", "--no-eval-deterministic"):
        assert main("--eval", "run", "--eval-episodes", 9, flag, module=ppo)[0] == 0
    assert set(curve("eval/episodic_return")) == {0}
    assert len(Ruled.record) > played + 18
    assert all(ok for _, ok in Ruled.record)


@pytest.mark.parametrize("where", ["info", "method", "one key"])
@pytest.mark.parametrize("mode", ["sync", "async", "native"])
def test_a_mask_of_another_shape_is_refused(mode: str, where: str, train: Callable) -> None:
    kwargs = {"where": where, "cut": 1}
    for conditional, shape in ((False, "(8,)"), (True, "(3, 6)")):
        code, out, err = train("--vectorization", mode, conditional=conditional, **kwargs)
        assert (code, out) == (2, "")
        assert all(words in err for words in (shape, "(9,)", "(3, 7)"))
    assert not list(Path().iterdir())


@pytest.mark.parametrize("where", ["late", "early"])
@pytest.mark.parametrize("mode", ["sync", "native"])
def test_masks_after_steps_or_resets_only(mode: str, where: str, train: Callable) -> None:
    with pytest.raises((ValueError, KeyError), match="mask"):
        train("--vectorization", mode, where=where)
    assert not Path("run/checkpoint.pt").exists()


SPACES = {
    "Discrete": spaces.Discrete(4, start=-2),
    "MultiDiscrete": spaces.MultiDiscrete([3, 2], start=[1, 5]),
    "matrix": spaces.MultiDiscrete([[2, 3], [3, 1]], start=[[1, 0], [0, 7]]),
}


class Echo(gym.Env):
    """Wants the action that it draws; the mask, if there is one, allows no other."""

    def __init__(self, space: str, masked: bool = True, shape: tuple = (4,)) -> None:
        self.action_space, self.masked, self.steps = SPACES[space], masked, 0
        self.observation_space = spaces.Box(0, 1, shape, np.uint8)

    def look(self) -> tuple:
        self.wanted = self.action_space.sample()
        mask = spaces.flatten(self.action_space, self.wanted)
        return self.observation_space.sample(), {"action_mask": mask} if self.masked else {}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        return self.look()

    def step(self, action: Any) -> tuple:
        assert self.action_space.contains(action)
        reward = float(np.array_equal(action, self.wanted))
        self.steps += 1
        obs, info = self.look()
        return obs, reward, False, self.steps % 10 == 0, info


gym.register("Echo-v0", Echo)


@pytest.mark.parametrize(
    "space, shape",
    [*((space, (4,)) for space in SPACES), ("matrix", (5, 5, 3)), ("MultiDiscrete", (36, 36, 3))],
)
def test_all_spaces(space: str, shape: tuple, train: Callable) -> None:
    """What the mask allows is what arrives; the first line says if there is no mask."""
    for run, masked in (("run", True), ("blind", False)):
        kwargs = {"space": space, "shape": shape, "masked": masked}
        code, out, _ = train(env_id="Echo-v0", steps=96, run=run, **kwargs)
        assert code == 0
        assert ("no mask" in out.lower()) == (not masked)
        assert ("CNN" in out) == (len(shape) == 3)
        assert curve("policy/invalid_fraction", run) == [0, 0]
        assert (min(curve("charts/episodic_return", run)) == 10) == masked


def test_the_start_is_one_line(train: Callable) -> None:
    assert len(train(env_id="Echo-v0", space="matrix")[1].splitlines()) == 2


INVALID = [f"tests.envs.invalid_actions:InvalidAction{kind}-v0" for kind in list(SPACES)[:2]]


@pytest.mark.parametrize("env_id", ["Taxi-v4", "TaxiDispatch-v0", *INVALID])
def test_masks_of_public_environments(env_id: str, train: Callable) -> None:
    """They are respected, and would have been missed."""
    assert train(env_id=env_id)[0] == 0
    assert curve("policy/invalid_fraction") == [0, 0, 0]
    assert train("--mask", "none", run="blind", env_id=env_id)[0] == 0
    assert all(0.1 < value < 0.9 for value in curve("policy/invalid_fraction", "blind"))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(5, 5, 3), (4, 6, 3), (36, 36, 3), (3, 5, 5), (4, 84, 84)])
def test_grids_and_images(shape: tuple, dtype: type) -> None:
    """Axes in the order that the space says; images become 1 at most, grids stay as they are."""
    image, last = dtype == np.uint8 and max(shape) >= 36, shape[2] == 3
    space, actions = spaces.Box(0, 255, shape, dtype), spaces.MultiDiscrete([3, 2])
    agent = ppo.Agent(ppo.Args(shared_network=True), space, actions)
    assert agent.trunk[0].in_channels == (shape[-1] if last else shape[0])
    assert agent.trunk[0].kernel_size == ((8, 8) if image else (3, 3))
    obs = torch.arange(2.0 * np.prod(shape)).view(2, *shape) % 256
    expected = (obs.permute(0, 3, 1, 2) if last else obs) / (255 if image else 1)
    torch.testing.assert_close(agent.preprocess(obs), expected)
    dist, values = agent(obs, torch.ones(2, 5, dtype=torch.bool))
    assert (dist.shape, values.shape) == ((2, 5), (2,))


# ---- TaxiDispatch

TAXI = gym.make("Taxi-v4").unwrapped


@cache
def best_returns() -> np.ndarray:
    """The largest undiscounted return of Taxi-v4 from every state, by value iteration."""
    values, new = np.zeros(500), np.full(500, -1000.0)
    while (new != values).any():
        values = new.copy()
        for state, action in itertools.product(range(500), range(6)):
            [(_, after, reward, done)] = TAXI.P[state][action]
            new[state] = max(new[state], reward + (0 if done else values[after]))
    return values


def best_move(state: int) -> int:
    """The first move on a best way."""
    options = [TAXI.P[state][action][0] for action in range(6)]
    return int(np.argmax([r + (0 if done else best_returns()[s]) for _, s, r, done in options]))


def states(env: gym.Env) -> list[tuple[int, bool]]:
    """State in Taxi-v4's numbers, and whether it has delivered, of every taxi."""
    env = env.unwrapped
    return [(int(taxi.s), bool(done)) for taxi, done in zip(env.taxis, env.delivered, strict=True)]


def view(state: int, delivered: bool) -> list[float]:
    """What is observed of a taxi."""
    row, column, passenger, destination = TAXI.decode(state)
    pad = passenger if passenger < 4 else destination
    return [*np.eye(5)[row], *np.eye(5)[column], *np.eye(4)[pad], passenger == 4, delivered]


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
    width = env.taxis[0].render().shape[1]
    np.testing.assert_array_equal(env.render()[:, -width:], env.taxis[-1].render())
    assert env.render().shape[1] == taxis * width
    env.close()


@pytest.mark.parametrize("skill", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("taxis", [1, 2, 3])
def test_rules_of_taxi_dispatch(taxis: int, skill: float) -> None:
    """Observations, masks, rewards and ends against Taxi-v4's own table; the best play's return."""
    env, rng = gym.make("TaxiDispatch-v0", taxis=taxis), np.random.default_rng(taxis)
    obs, info = env.reset(seed=taxis)
    best, total, wasted, t, over = sum(best_returns()[s] for s, _ in states(env)), 0.0, 0, 0, False
    while not over:
        before = states(env)
        np.testing.assert_array_equal(obs, np.concatenate([view(*state) for state in before]))
        for (state, delivered), row in zip(before, info["action_mask"], strict=True):
            assert row[0] == (not delivered)
            assert row[1:].tolist() == TAXI.action_mask(state).astype(bool).tolist()
        taxi, move = rng.integers(taxis), rng.integers(6)  # a taxi that has delivered as well
        state, delivered = before[taxi]
        if rng.random() < skill:
            move = best_move(state)
            assert delivered or info["action_mask"][taxi, 1 + move]
        obs, reward, terminated, truncated, info = env.step(np.array([taxi, move]))
        [(_, new, points, done)] = TAXI.P[state][move]
        assert states(env)[taxi] == ((state, True) if delivered else (new, done))
        assert states(env)[:taxi] == before[:taxi]
        assert states(env)[taxi + 1 :] == before[taxi + 1 :]
        assert reward == pytest.approx((-1 if delivered else points) / 20)
        total, wasted, t = total + reward, wasted + delivered, t + 1
        assert terminated == all(delivered for _, delivered in states(env))
        assert truncated == (t == 200 * taxis)
        over = terminated or truncated
    assert truncated == (skill == 0)
    assert (total == pytest.approx((best - wasted) / 20)) == (skill == 1)
