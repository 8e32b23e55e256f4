"""Statistics of observations, rewards and values: what they are, and when they move."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

import ppo_discrete as ppo

NORMS = ("obs_norm", "reward_norm", "value_norm")


def make_agent(**flags: Any) -> ppo.Agent:
    torch.manual_seed(0)
    args = ppo.Args(hidden_sizes=(16,), **flags)
    return ppo.Agent(args, spaces.Box(-1, 1, (3,)), spaces.Discrete(2))


def statistics(agent: ppo.Agent) -> dict[str, Tensor]:
    """A copy of everything that the normalisers hold."""
    state = agent.state_dict()
    return {key: state[key].clone() for key in state if key.startswith(NORMS)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- RunningMeanStd


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
@pytest.mark.parametrize("centre, spread", [(0.0, 1.0), (-7.0, 0.01), (1e6, 1.0), (0.0, 1e6)])
@pytest.mark.parametrize("sizes", [[1], [1, 1], [500], [3, 1, 200, 70, 1]])
def test_running_statistics(shape: tuple, centre: float, spread: float, sizes: list[int]) -> None:
    """Merged piece by piece they are NumPy's of all rows at once."""
    rng = np.random.default_rng(len(shape))
    pieces = [rng.normal(centre, spread, (size, *shape)) for size in sizes]
    norm = ppo.RunningMeanStd(shape)
    for piece in pieces:
        norm.advance(torch.as_tensor(piece))
    rows = np.concatenate(pieces)
    assert norm.count.item() == len(rows)
    assert norm.mean.shape == norm.std.shape == shape
    np.testing.assert_allclose(norm.mean, rows.mean(0), rtol=1e-6, atol=1e-6 * spread)
    np.testing.assert_allclose(norm.std, np.sqrt(rows.var(0) + 1e-8), rtol=1e-5)
    x = torch.as_tensor(rows[:5]).float()
    expected = (x.numpy() - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-8)
    if len(rows) > 2 and centre < 1e6:
        np.testing.assert_allclose(norm.normalize(x), expected, rtol=1e-3, atol=1e-3)


def test_order_of_pieces_does_not_matter() -> None:
    pieces = [5 + 3 * torch.randn(n, 2, generator=torch.manual_seed(n)) for n in (1, 30, 7)]
    norms = [ppo.RunningMeanStd((2,)) for _ in range(2)]
    for a, b in zip(pieces, reversed(pieces), strict=True):
        norms[0].advance(a)
        norms[1].advance(b)
    torch.testing.assert_close(norms[0].mean, norms[1].mean)
    torch.testing.assert_close(norms[0].std, norms[1].std)


def test_before_the_first_rows_nothing_is_changed() -> None:
    rows = torch.randn(4, 3, generator=torch.manual_seed(0))
    assert torch.equal(ppo.RunningMeanStd((3,)).normalize(rows), rows)


def test_rows_without_spread_stay_finite() -> None:
    norm = ppo.RunningMeanStd((2,))
    norm.advance(torch.full((10, 2), 3.0))
    result = norm.normalize(torch.tensor([[3.0, 4.0]]))
    assert result.isfinite().all()
    assert result[0, 0] == 0


def test_rows_in_float32_are_summed_in_float64() -> None:
    """A large offset does not swallow the spread."""
    rows = 1e6 + torch.arange(64.0) / 16
    norm = ppo.RunningMeanStd()
    for piece in rows.split(8):
        norm.advance(piece)
    assert norm.std.item() == pytest.approx(rows.double().numpy().std(), rel=1e-6)


def test_counts_go_on_above_float32() -> None:
    """2^24 rows and three more are that many, and still weigh in."""
    norm, rows = ppo.RunningMeanStd(), 2**24
    norm.count.fill_(rows)
    norm.squares.fill_(float(rows))  # mean 0, deviation 1
    for value in (1e6, 2e6, 3e6):
        norm.advance(torch.tensor([value]))
    total = rows + 3
    mean = 6e6 / total
    variance = (rows + 1e12 + 4e12 + 9e12) / total - mean**2
    assert norm.count.item() == total
    assert norm.count.dtype == torch.int64
    assert norm.mean.item() == pytest.approx(mean, rel=1e-6)
    assert norm.std.item() == pytest.approx(variance**0.5, rel=1e-6)


def test_many_rows_keep_their_precision() -> None:
    """After 2^30 rows ten more still move mean and squares by what they should."""
    norm = ppo.RunningMeanStd()
    norm.count.fill_(2**30)
    norm.squares.fill_(2.0**30)
    norm.centre.fill_(1000.0)
    norm.advance(torch.full((10,), 1001.0))
    assert norm.centre.item() == pytest.approx(1000 + 10 / (2**30 + 10), abs=1e-12)
    assert norm.squares.item() - 2**30 == pytest.approx(10.0, abs=1e-3)


def test_statistics_are_no_parameters_and_are_saved() -> None:
    """Buffers of the agent: in its state dict, out of the optimiser, and loaded as they were."""
    agent = make_agent(norm_obs=True)
    names = ("count", "centre", "squares", "mean", "std")
    assert {f"{norm}.{name}" for norm in NORMS for name in names} == set(statistics(agent))
    assert not any(key.startswith(NORMS) for key, _ in agent.named_parameters())
    agent.obs_norm.advance(4 + 2 * torch.randn(50, 3))
    agent.reward_norm.advance(torch.randn(50))
    agent.value_norm.advance(9 + torch.randn(50))
    copy = make_agent(norm_obs=True)
    obs = torch.randn(6, 3)
    assert not torch.equal(copy(obs)[0], agent(obs)[0])
    copy.load_state_dict(agent.state_dict())
    assert same(statistics(copy), statistics(agent))
    for result, expected in zip(
        ppo.evaluate_rows(copy, obs), ppo.evaluate_rows(agent, obs), strict=True
    ):
        assert torch.equal(result, expected)
    for norm in (agent, copy):  # and go on as if nothing had happened
        norm.obs_norm.advance(torch.ones(7, 3))
    assert same(statistics(copy), statistics(agent))


# ---- observations


@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize("norm_obs", [True, False])
def test_normalised_observations(norm_obs: bool, clip: float | None) -> None:
    """The networks see (obs - mean) / std, clipped, or the observation itself."""
    agent = make_agent(norm_obs=norm_obs, clip_obs=clip)
    rows = 5 + 2 * np.random.default_rng(0).normal(size=(400, 3))
    agent.obs_norm.advance(torch.as_tensor(rows))
    obs = torch.as_tensor(rows[:50]).float()
    expected = obs.numpy()
    if norm_obs:
        expected = (expected - rows.mean(0)) / rows.std(0)
        assert np.abs(expected).max() > 1.5
        expected = expected if clip is None else expected.clip(-clip, clip)
    np.testing.assert_allclose(agent.preprocess(obs), expected, atol=1e-5)
    dists = agent.actor(torch.as_tensor(expected).float()).log_softmax(-1)
    torch.testing.assert_close(agent(obs)[0], dists)
    assert torch.equal(agent.act(obs, None), dists.argmax(-1))


@pytest.mark.parametrize("training", [True, False])
def test_forward_leaves_the_statistics_alone(training: bool) -> None:
    agent = make_agent(norm_obs=True).train(training)
    agent.obs_norm.advance(torch.randn(20, 3))
    before, obs = statistics(agent), 50 + torch.randn(30, 3)
    agent(obs)
    agent.act(obs, None)
    agent.act(obs, agent.draw_noise(30))
    ppo.evaluate_rows(agent, obs)
    assert same(statistics(agent), before)


def test_pixels_are_not_standardised() -> None:
    """The Nature CNN reads bytes over 255, in float, channels first."""
    args, space = ppo.Args(norm_obs=True), spaces.Box(0, 255, (36, 36, 4), np.uint8)
    agent = ppo.Agent(args, space, spaces.Discrete(2))
    frame = torch.randint(0, 256, (1, 36, 36, 4), dtype=torch.uint8)
    expected = frame.numpy().astype(np.float64).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(agent.preprocess(frame), expected, rtol=1e-6)


# ---- values


@pytest.mark.parametrize("shared", [True, False])
def test_popart_keeps_every_value(shared: bool) -> None:
    """Values stay through any change of the statistics; `running` moves them."""
    agent, obs = make_agent(shared_network=shared), torch.randn(40, 3)
    before = ppo.evaluate_rows(agent, obs)[1]
    for mean, std in ((150.0, 30.0), (-1000.0, 1.0), (0.0, 0.01), (5.0, 400.0)):
        targets = mean + std * torch.randn(300)
        agent.advance_value_norm(targets, popart=True)
        values = ppo.evaluate_rows(agent, obs)[1]
        torch.testing.assert_close(values, before, atol=2e-3, rtol=1e-4)
        before = values
    agent.advance_value_norm(torch.randn(2000), popart=False)
    assert (ppo.evaluate_rows(agent, obs)[1] - before).abs().min() > 1.0


def test_running_keeps_the_network() -> None:
    """Without PopArt the critic's outputs stay, and are read in the new units."""
    agent, obs = make_agent(), torch.randn(40, 3)
    outputs = agent(obs)[1]
    agent.advance_value_norm(torch.tensor([90.0, 110.0]), popart=False)
    assert torch.equal(agent(obs)[1], outputs)
    values = ppo.evaluate_rows(agent, obs)[1]
    torch.testing.assert_close(values, 100 + 10 * outputs.detach())


def fake_rollout(obs: Tensor, rewards: Tensor, valid: np.ndarray | None = None) -> Any:
    """Rows [T, N] that all terminate at once: every target is its reward."""
    steps, n = rewards.shape
    ends = np.ones((steps, n), bool)
    return SimpleNamespace(
        obs=torch.cat((obs, obs[:1])),
        actions=torch.zeros(steps, n, dtype=torch.int64),
        rewards=rewards.numpy(),
        terminated=ends,
        truncated=~ends,
        valid=np.ones((steps + 1, n), bool) if valid is None else valid,
        lives=np.zeros((steps + 1, n), np.int64),
        atari=False,
        final_obs=[],
        so_far=np.zeros((2, n)),
        discounted=torch.zeros(n),
        signals=(rewards, torch.as_tensor(ends), torch.as_tensor(~ends)),
    )


@pytest.mark.parametrize("norm_value", ["none", "running", "popart"])
def test_batch_is_in_units_of_the_critic(norm_value: str) -> None:
    """Old values are the critic's outputs, targets are standardised, advantages are neither."""
    args = ppo.Args(hidden_sizes=(16,), norm_value=norm_value)
    agent = make_agent(norm_value=norm_value)
    history = []
    for i in range(3):
        obs = torch.randn(8, 4, 3, generator=torch.manual_seed(i))
        rewards = 100 + 50 * torch.randn(8, 4, generator=torch.manual_seed(10 + i))
        valid = np.ones((9, 4), bool)
        valid[2, 1] = valid[5, 0] = False
        rewards[2, 1] = rewards[5, 0] = -1e6  # must be seen by no statistic
        values = ppo.evaluate_rows(agent, obs.flatten(0, 1))[1]
        batch = ppo.make_batch(agent, None, fake_rollout(obs, rewards, valid), args)
        history += rewards[torch.as_tensor(valid[:-1])].tolist()
        mean, std = (0, 1) if norm_value == "none" else (np.mean(history), np.std(history))
        torch.testing.assert_close(batch.advantages, rewards.flatten() - values)
        expected = (rewards.flatten().numpy() - mean) / std
        np.testing.assert_allclose(batch.targets, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(batch.values, agent(batch.obs)[1].detach(), atol=1e-5, rtol=1e-5)
        assert torch.equal(batch.weights, torch.as_tensor(valid[:-1]).flatten().float())
        assert agent.value_norm.count == (0 if norm_value == "none" else len(history))
        if norm_value == "popart":
            torch.testing.assert_close(
                ppo.evaluate_rows(agent, batch.obs)[1], values, atol=1e-3, rtol=1e-4
            )


@pytest.mark.parametrize("norm_value", ["none", "running", "popart"])
def test_described_values_are_in_units_of_the_rewards(norm_value: str) -> None:
    """The values that the advantages were made with, their targets, and how well they agree."""
    args = ppo.Args(hidden_sizes=(16,), norm_value=norm_value)
    agent = make_agent(norm_value=norm_value)
    for i in range(2):
        obs = torch.randn(8, 4, 3, generator=torch.manual_seed(i))
        rewards = 100 * (i + 1) + 5 * obs[..., 0] + torch.randn(8, 4)
        values = ppo.evaluate_rows(agent, obs.flatten(0, 1))[1].numpy()
        batch = ppo.make_batch(agent, None, fake_rollout(obs, rewards), args)
        metrics = torch.zeros(len(ppo.METRICS))
        metrics[ppo.METRICS.index("values/mean")] = agent(batch.obs)[1].mean().item()
        scalars = ppo.describe(batch, torch.as_tensor(values), metrics, agent.value_norm)
        targets = rewards.flatten().numpy()
        now = ppo.evaluate_rows(agent, batch.obs)[1].mean().item()
        assert scalars["values/mean"] == pytest.approx(now, rel=1e-4, abs=1e-3)
        assert scalars["values/target_mean"] == pytest.approx(targets.mean(), rel=1e-4)
        assert scalars["values/old_mean"] == pytest.approx(values.mean(), rel=1e-4, abs=1e-3)
        explained = 1 - np.var(targets - values) / np.var(targets)
        assert scalars["losses/explained_variance"] == pytest.approx(explained, abs=1e-3)
        assert scalars["advantages/mean"] == pytest.approx((targets - values).mean(), rel=1e-4)
        deviation = (targets - values).std(ddof=1)
        assert scalars["advantages/std"] == pytest.approx(deviation, rel=1e-4)


@pytest.mark.parametrize(
    "flags, learns",
    [
        (dict(norm_value="running"), True),
        (dict(norm_value="popart"), True),
        (dict(norm_value="none"), False),
    ],
)
def test_value_clip_is_in_standardised_units(flags: dict, learns: bool) -> None:
    """Values from 100 to 200 and a clip of 0.2: only standardised ones get there."""
    args = ppo.Args(hidden_sizes=(16,), clip_coef=0.2, num_minibatches=2, norm_adv=False, **flags)
    agent = make_agent(**flags)
    optimizer = ppo.Adam(agent, args)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    coefs = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    for i in range(60):
        obs = 2 * torch.rand(16, 4, 3, generator=torch.manual_seed(i)) - 1
        rewards = 150 + 50 * obs[..., 0]
        batch = ppo.make_batch(agent, None, fake_rollout(obs, rewards), args)
        ppo.update(agent, optimizer, None, batch, args, coefs, False)
    values = ppo.evaluate_rows(agent, obs.flatten(0, 1))[1]
    explained = 1 - (rewards.flatten() - values).var() / rewards.var()
    error = (rewards.flatten() - values).abs().mean()
    assert (explained > 0.9, error < 10) == (learns, learns)
    if not learns:
        assert values.max() < 60 * 0.2 * 4


# ---- when they advance


@pytest.mark.parametrize("vectorization", ["sync", "native"])
def test_statistics_advance_once_an_iteration(
    vectorization: str, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rollout's own valid rows, after it; never within a rollout or an update.

    Observations: those acted on. Rewards: discounted returns. Values: the targets.
    """
    calls, agents, rollouts = [], [], []
    originals = {name: getattr(ppo, name) for name in ("collect", "update")}
    advance = ppo.RunningMeanStd.advance

    def spy_advance(norm: ppo.RunningMeanStd, rows: Tensor) -> None:
        name = next(name for name in NORMS if getattr(agents[0], name) is norm)
        calls.append((name, rows.clone()))
        advance(norm, rows)

    def spy_collect(agent: ppo.Agent, envs: Any, rollout: ppo.Rollout, *rest: Any) -> None:
        agents.append(agent)
        calls.append(("collect", None))
        before = statistics(agent)
        originals["collect"](agent, envs, rollout, *rest)
        assert same(statistics(agent), before)
        rows = (rollout.obs, rollout.rewards, rollout.terminated, rollout.truncated)
        rollouts.append([torch.as_tensor(x).double().clone().numpy() for x in rows])

    def spy_update(agent: ppo.Agent, *rest: Any) -> Tensor:
        before = statistics(agent)
        metrics = originals["update"](agent, *rest)
        assert same(statistics(agent), before)
        return metrics

    monkeypatch.setattr(ppo, "collect", spy_collect)
    monkeypatch.setattr(ppo, "update", spy_update)
    monkeypatch.setattr(ppo.RunningMeanStd, "advance", spy_advance)
    flags = ["--num-steps", 64, "--total-timesteps", 4 * 64 * 5, "--recompute-advantages"]
    flags += ["--norm-obs", "--norm-reward", "--norm-value", "popart", "--gamma", 0.9]
    flags += ["--vectorization", vectorization, "--no-progress", "--no-cuda"]
    code, _, error = main(*flags)
    assert (code, error) == (0, "")
    names = [name for name, _ in calls]
    assert names == ["collect", "reward_norm", "value_norm", "obs_norm"] * 5

    dead, running = np.zeros(4, bool), np.zeros(4)
    everything = {"obs_norm": [], "reward_norm": []}
    for i, (obs, rewards, terminated, truncated) in enumerate(rollouts):
        seen, returns = [], []
        for t in range(64):
            seen += list(obs[t, ~dead])
            running[~dead] = rewards[t, ~dead] + 0.9 * running[~dead]
            returns += list(running[~dead])
            ended = (terminated[t] + truncated[t]) > 0
            running[ended] = 0
            dead = ended if vectorization == "native" else dead
        given = {name: rows for name, rows in calls[4 * i : 4 * i + 4]}
        np.testing.assert_allclose(given["obs_norm"], seen, rtol=1e-6)
        np.testing.assert_allclose(np.sort(given["reward_norm"]), np.sort(returns), rtol=1e-5)
        assert len(given["value_norm"]) == len(seen)
        everything["obs_norm"] += seen
        everything["reward_norm"] += returns
    assert (len(everything["obs_norm"]) < 4 * 64 * 5) == (vectorization == "native")
    for name, rows in everything.items():
        norm = getattr(agents[0], name)
        assert norm.count == len(rows)
        np.testing.assert_allclose(norm.mean, np.mean(rows, 0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(norm.std, np.std(rows, 0), rtol=1e-4)


@pytest.mark.parametrize("off", ["norm_obs", "norm_reward", "norm_value"])
def test_a_normaliser_that_is_off_takes_nothing_in(
    off: str, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents, update = [], ppo.update
    monkeypatch.setattr(ppo, "update", lambda *args: agents.append(args[0]) or update(*args))
    on = {"norm_obs": ["--norm-obs"], "norm_reward": ["--norm-reward"]}
    on["norm_value"] = ["--norm-value", "running"]
    flags = [flag for name, words in on.items() if name != off for flag in words]
    code, _, error = main("--num-steps", 8, "--total-timesteps", 64, "--no-progress", *flags)
    assert (code, error) == (0, "")
    for name in NORMS:
        count = getattr(agents[0], name).count
        assert count == (0 if name.split("_") == off.split("_")[::-1] else 64)


@pytest.mark.parametrize("norm_value", ["running", "popart"])
def test_a_rollout_without_valid_rows_spoils_nothing(norm_value: str) -> None:
    """One step in which every environment only resets, as a short NEXT_STEP rollout may have it."""
    args = ppo.Args(hidden_sizes=(16,), norm_value=norm_value, norm_reward=True)
    agent = make_agent(norm_value=norm_value)
    obs, rewards = torch.randn(1, 4, 3), torch.zeros(1, 4)
    rollout = fake_rollout(obs, rewards, np.array([[False] * 4, [True] * 4]))
    rollout.terminated[:] = False
    before = statistics(agent)
    rollout.signals = ppo.learning_signals(agent, rollout, args)
    batch = ppo.make_batch(agent, None, rollout, args)
    assert same(statistics(agent), before)
    optimizer = ppo.Adam(agent, replace(args, num_minibatches=1))
    coefs = torch.tensor([1.0, 0.5, -0.01, 0.0, 0.0])
    ppo.update(agent, optimizer, rollout, batch, replace(args, num_minibatches=1), coefs, False)
    assert all(p.isfinite().all() for p in agent.parameters())


def test_one_environment_and_one_step_a_rollout(main: Callable) -> None:
    """Rollouts that are nothing but a reset go by."""
    flags = ["--num-steps", 1, "--num-envs", 1, "--num-minibatches", 1, "--update-epochs", 1]
    flags += ["--norm-obs", "--norm-reward", "--norm-value", "popart", "--vectorization", "native"]
    code, out, error = main(*flags, "--total-timesteps", 80, "--no-progress", "--no-cuda")
    assert code == 0, error
    assert "mean return" in out
