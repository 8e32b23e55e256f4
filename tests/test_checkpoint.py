"""Checkpoints: what is resumed, evaluated and refused."""

import io
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import read_scalars
from test_args import refused
from test_train import FLAGS as TRAIN_FLAGS
from test_train import ITERATIONS, STEPS, Counted, checkpoint

import ppo_continuous
import ppo_discrete
import ppo_multidiscrete_mask

FLAGS = f"{TRAIN_FLAGS} --env-id Counted-v0"
same = partial(torch.testing.assert_close, rtol=0, atol=0)  # of nested dicts and lists
NORMS = "--norm-obs --norm-reward --norm-value popart"


@pytest.fixture
def train(main: Callable) -> Callable:
    """`train(flags)`: standard output of a command that has to end with `code`."""

    def train(flags: str, code: int = 0, module: ModuleType = ppo_discrete) -> str:
        got, out, err = main(*flags.split(), module=module)
        assert got == code, err
        return out

    return train


@pytest.fixture
def interrupt(train: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`interrupt(flags, updates)`: train with a Ctrl-C in the update of this number."""

    def interrupt(flags: str, updates: int = 3, module: ModuleType = ppo_discrete) -> None:
        calls = []
        update = module.update

        def update_and_signal(*args: Any) -> dict:
            calls.append(None)
            if len(calls) == updates:
                signal.raise_signal(signal.SIGINT)
            return update(*args)

        with monkeypatch.context() as patch:
            patch.setattr(module, "update", update_and_signal)
            train(flags, 130, module)

    return interrupt


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a complete run."""
    path = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["ppo_discrete.py", *FLAGS.split(), "--run-dir", str(path)])
        patch.setattr(signal, "signal", lambda *_: None)
        ppo_discrete.main()
    time.sleep(1 - time.time() % 1)  # names of event files begin with the second
    return path


@pytest.fixture
def copied(main: Callable, finished: Path) -> Path:
    """Its checkpoint, in a copy in the current directory."""
    shutil.copytree(finished, "r")
    return Path("r/checkpoint.pt")


def scalars(run_dir: str = "r") -> dict[str, list]:
    """All curves but the speed."""
    curves = read_scalars(run_dir)
    del curves["charts/SPS"]
    return curves


# ---- resume


def test_resume(interrupt: Callable, train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same directory, curves and flags; networks, statistics and moments are the checkpoint's."""
    interrupt(f"{FLAGS} {NORMS} --gamma 0.9 --learning-rate 0.002 --ent-coef-final 0.06")
    state, before = checkpoint(), scalars()
    assert state["step"] == 3 * STEPS
    seen = []
    update = ppo_discrete.update

    def spy(agent: Any, optimizer: Any, *args: Any) -> dict:
        if not seen:
            same(optimizer.state_dict()["state"], state["optimizer"])
            for key in ("obs_norm.mean64", "obs_norm.m2", "actor.0.weight"):
                assert torch.equal(agent.state_dict()[key], state["agent"][key])
        seen.append([group["lr"] for group in optimizer.param_groups for _ in group["params"]])
        return update(agent, optimizer, *args)

    monkeypatch.setattr(ppo_discrete, "update", spy)
    out = train("--resume r")
    assert [path.name for path in Path().iterdir()] == ["r"]
    after, end = scalars(), checkpoint()
    steps = [STEPS * (i + 1) for i in range(ITERATIONS)]
    assert [step for step, _ in after["losses/value_loss"]] == steps
    assert all(after[tag][: len(points)] == points for tag, points in before.items())
    rates = [0.002 * (ITERATIONS - i) / ITERATIONS for i in range(ITERATIONS)]
    np.testing.assert_allclose(seen, np.transpose([rates[3:]] * 2), rtol=1e-6)
    logged = [value for _, value in after["charts/learning_rate"]]
    np.testing.assert_allclose(logged, rates, rtol=1e-6)
    logged = [value for _, value in after["charts/ent_coef"]]
    np.testing.assert_allclose(logged, np.linspace(0.01, 0.06, ITERATIONS), rtol=1e-6)
    for name in ("obs_norm", "reward_norm", "value_norm"):
        assert end["agent"][f"{name}.count"] == STEPS * ITERATIONS
    assert end["args"] == state["args"] | {"run_dir": "r"}
    assert len(end["returns"]) > len(state["returns"]) > 0
    assert end["returns"][: len(state["returns"])] == state["returns"]
    assert f"of {len(end['returns'])} episodes" in out


def test_flags_beside_resume_win(
    interrupt: Callable, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learning rate and epsilon too; a flag given at its default counts as given."""
    interrupt(f"{FLAGS} --gamma 0.9 --ent-coef 0.02 --clip-coef None --target-kl 9 --seed 4")
    groups = []
    update = ppo_discrete.update

    def spy(agent: Any, optimizer: Any, *args: Any) -> dict:
        groups.append([(group["lr"], group["eps"]) for group in optimizer.param_groups])
        return update(agent, optimizer, *args)

    monkeypatch.setattr(ppo_discrete, "update", spy)
    flags = "--ent-coef 0.01 --clip-coef 0.3 --target-kl None --total-timesteps 256"
    train(f"--resume r {flags} --no-anneal-lr --learning-rate 0.5 --critic-adam-eps 0.25")
    assert groups == [[(0.5, 1e-5), (0.5, 0.25)]] * 5
    args = checkpoint()["args"]
    assert (args["gamma"], args["seed"], args["num_envs"]) == (0.9, 4, 2)
    assert (args["ent_coef"], args["clip_coef"], args["target_kl"]) == (0.01, 0.3, None)
    ent_coefs = [value for _, value in scalars()["charts/ent_coef"]]
    assert ent_coefs == pytest.approx([0.02] * 3 + [0.01] * 5)


def test_kl_coef_goes_on(interrupt: Callable, train: Callable) -> None:
    """It keeps halving; a flag beside --resume wins, with a target and without."""
    interrupt(f"{FLAGS} --kl-target 9 --learning-rate 0")
    train("--resume r --total-timesteps 160")
    train("--resume r --kl-coef 3 --kl-target None --total-timesteps 192")
    train("--resume r --kl-coef 5 --kl-target 9 --total-timesteps 224")
    values = [value for _, value in scalars()["charts/kl_coef"]]
    assert values == [1, 0.5, 0.25, 0.125, 0.0625, 3, 5]


def test_log_std_goes_on(interrupt: Callable, train: Callable) -> None:
    """The scheduled standard deviation stays on its line."""
    flags = f"{FLAGS} --std fixed --log-std-final -1 --env-id Pendulum-v1"
    interrupt(flags, module=ppo_continuous)
    train("--resume r", module=ppo_continuous)
    logged = [value for _, value in scalars()["policy/std_0"]]
    np.testing.assert_allclose(logged, np.exp(np.linspace(0, -1, ITERATIONS)), rtol=1e-5)


def test_two_resumes_are_equal(interrupt: Callable, train: Callable) -> None:
    """Bit for bit; and the observations are not those of the run's beginning."""
    Counted.actions.clear()
    interrupt(f"{FLAGS} {NORMS}")
    first = np.array([obs for obs, _ in Counted.actions[: 3 * STEPS]])
    played = []
    for name in "ab":
        shutil.copytree("r", name)
        Counted.actions.clear()
        train(f"--resume {name}")
        played.append(Counted.actions.copy())
    assert scalars("a") == scalars("b")
    assert len(scalars("a")["losses/value_loss"]) == ITERATIONS
    for part in ("agent", "optimizer", "returns"):
        same(checkpoint("a")[part], checkpoint("b")[part])
    a, b = (np.array([obs for obs, _ in steps]) for steps in played)
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, first[: len(a)])


def test_points_beyond_the_checkpoint_are_replaced(
    train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill: one curve, no point doubled or missing."""
    save = torch.save

    def save_and_keep(state: dict, path: Path) -> None:
        save(state, path)
        if state["step"] == 2 * STEPS:
            shutil.copy(path, "kept")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_and_keep)
        train(f"{FLAGS} --checkpoint-every 2")
    before = scalars()["values/mean"]
    shutil.copy("kept", "r/checkpoint.pt")
    train("--resume r")
    after = scalars()["values/mean"]
    assert [step for step, _ in after] == [STEPS * (i + 1) for i in range(ITERATIONS)]
    assert after[:2] == before[:2]
    assert after[2:] != before[2:]


def test_complete_run(main: Callable, train: Callable, copied: Path) -> None:
    """It goes on only if an iteration is left, and no other run starts in its directory."""
    assert "r" in refused(main, *FLAGS.split())
    assert "r" in refused(main, *f"--resume r --total-timesteps {7 * STEPS - 1}".split())
    train(f"--resume r --run-dir ./r/ --total-timesteps {7 * STEPS}")
    assert checkpoint()["step"] == 7 * STEPS


def test_run_without_checkpoint(main: Callable, train: Callable, copied: Path) -> None:
    """It cannot be resumed, but started again under its name."""
    copied.unlink()
    assert "r/checkpoint.pt" in refused(main, *"--resume r".split())
    train(FLAGS)
    steps = [step for step, _ in scalars()["losses/value_loss"]]
    assert steps == [STEPS * (i + 1) for i in range(ITERATIONS)]


def test_resume_stays_in_its_directory(train: Callable, copied: Path) -> None:
    shutil.copytree("r", "s")
    before = Path("s/checkpoint.pt").read_bytes()
    train("--resume r --run-dir s --total-timesteps 224")
    assert Path("s/checkpoint.pt").read_bytes() == before
    assert checkpoint()["step"] == 224


# ---- evaluation


def policy(state: dict[str, Any], obs: np.ndarray) -> np.ndarray:
    """Probabilities of the actions, from the tensors of a checkpoint in float64."""
    agent = {name: tensor.double().numpy() for name, tensor in state["agent"].items()}
    std = np.sqrt(agent["obs_norm.m2"] / agent["obs_norm.count"] + 1e-8)
    x = ((obs - agent["obs_norm.mean64"]) / std).clip(-10, 10)
    x = np.tanh(x @ agent["actor.0.weight"].T + agent["actor.0.bias"])
    x = x @ agent["actor.2.weight"].T + agent["actor.2.bias"]
    exp = np.exp(x - x.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def test_evaluation(train: Callable) -> None:
    """Most probable or sampled actions under the saved statistics, which stay as they are."""
    train(f"{FLAGS} {NORMS} --learning-rate 0.01 --total-timesteps 512")
    files = [Path("r/checkpoint.pt"), Path("r/args.json")]
    state, before = checkpoint(), [file.read_bytes() for file in files]
    curve = scalars()["losses/value_loss"]
    outs = []
    for seed in (1, 1, 2):
        Counted.actions.clear()
        outs.append(train(f"--eval r --eval-episodes 4 --seed {seed}"))
        obs, actions = (np.array(x) for x in zip(*Counted.actions, strict=True))
        np.testing.assert_array_equal(actions, policy(state, obs).argmax(1))
        returns = [float(x) for x in re.findall(r"return (\d+\.\d+)\n", outs[-1])]
        assert len(returns) == 4
        assert sum(returns) == 2 * len(actions)
        assert f"{np.mean(returns):.2f} +- {np.std(returns):.2f}" in outs[-1]
        logged = scalars()["eval/episodic_return"][-1]
        assert logged == (512, pytest.approx(np.mean(returns)))
    assert outs[0] == outs[1]
    assert len(scalars()["eval/episodic_return"]) == 3

    Counted.actions.clear()
    train("--eval r --eval-episodes 40 --no-eval-deterministic")
    obs, actions = (np.array(x) for x in zip(*Counted.actions, strict=True))
    probs = policy(state, obs)
    assert 0.05 < (actions != probs.argmax(1)).mean() < 0.6
    p = probs[:, 1]
    assert abs((actions - p).sum()) < 4 * np.sqrt((p * (1 - p)).sum())
    assert [file.read_bytes() for file in files] == before
    assert scalars()["losses/value_loss"] == curve


# ---- what is refused


class Code:
    """Makes a directory when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("the-code-ran",)


def flip(data: bytes, mark: bytes) -> bytes:
    """One bit of the first byte after a mark."""
    at = data.index(mark) + len(mark)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def weights(data: bytes) -> bytes:
    """Only the weights, as another program may save them."""
    file = io.BytesIO()
    torch.save(torch.load(io.BytesIO(data))["agent"], file)
    return file.getvalue()


DAMAGE = {
    "only weights": weights,
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a text": lambda data: b"no checkpoint",
    "a flag flipped": lambda data: flip(data, b"num_minibatches"),
    "a weight flipped": lambda data: flip(
        data, torch.load(io.BytesIO(data))["agent"]["actor.0.weight"].numpy().tobytes()[:8]
    ),
}


@pytest.mark.parametrize("flag", ["resume", "eval", "ref-checkpoint"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(main: Callable, copied: Path, damage: str, flag: str) -> None:
    copied.write_bytes(DAMAGE[damage](copied.read_bytes()))
    err = refused(main, *f"--{flag} r --env-id Counted-v0 --total-timesteps 999".split())
    assert "r/checkpoint.pt" in err


@pytest.mark.parametrize("flag", ["resume", "eval", "ref-checkpoint"])
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_with_code(main: Callable, copied: Path, zipped: bool, flag: str) -> None:
    """It is refused and not run, in both of PyTorch's formats."""
    state = checkpoint() | {"returns": Code()}
    torch.save(state, copied, _use_new_zipfile_serialization=zipped)
    refused(main, *f"--{flag} r --env-id Counted-v0 --total-timesteps 999".split())
    assert not Path("the-code-ran").exists()
    torch.load(copied, weights_only=False)
    assert Path("the-code-ran").is_dir()


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--resume r --env-id CartPole-v1 --total-timesteps 999", ["Counted-v0", "CartPole-v1"]),
        ("--eval r --env-id CartPole-v1", ["Counted-v0", "CartPole-v1"]),
        ("--ref-checkpoint r --env-id CartPole-v1", ["Counted-v0", "CartPole-v1"]),
        ("--resume r --hidden-sizes 9 --total-timesteps 999", ["actor.0.weight"]),
        ("--resume r --norm-value running --total-timesteps 999", ["norm_value", "none"]),
        ("--resume r --ref-checkpoint r --ref-kl-coef 1 --total-timesteps 999", ["ref_checkpoint"]),
        ("--eval r --hidden-sizes 16 16", ["actor"]),
        ("--eval r --shared-network", ["trunk"]),
    ],
)
def test_checkpoint_of_something_else(
    main: Callable, copied: Path, flags: str, words: list[str]
) -> None:
    err = refused(main, *flags.split())
    assert all(word in err for word in words), err


def test_checkpoint_of_another_distribution(main: Callable, train: Callable) -> None:
    """Beta and state have networks of the same shapes."""
    train(f"{FLAGS} --env-id Pendulum-v1 --distribution beta --std state", module=ppo_continuous)
    flags = "--distribution gaussian --std state --env-id Pendulum-v1 --total-timesteps 2048"
    for flag in ("--resume r", "--eval r", "--ref-checkpoint r"):
        assert "beta" in refused(main, *f"{flag} {flags}".split(), module=ppo_continuous)


def test_checkpoint_of_another_script(main: Callable, train: Callable, copied: Path) -> None:
    """It is refused, even if the networks are the same and only the masks would be lost."""
    assert "ppo_discrete.py" in refused(main, "--eval", "r", module=ppo_continuous)
    train(f"{FLAGS} --run-dir m", module=ppo_multidiscrete_mask)
    refused(main, "--eval", "m")


@pytest.mark.parametrize("was, now", [("fixed", "independent"), ("independent", "fixed")])
def test_resume_with_another_std(main: Callable, train: Callable, was: str, now: str) -> None:
    """The optimizer's moments would be those of other weights: only one of them has a log_std."""
    train(f"{FLAGS} --env-id Pendulum-v1 --std {was}", module=ppo_continuous)
    flags = f"--resume r --std {now} --total-timesteps 2048"
    assert was in refused(main, *flags.split(), module=ppo_continuous)


def test_resume_with_another_constant_std(train: Callable) -> None:
    """The flag given beside the run's own sets it."""
    train(f"{FLAGS} --env-id Pendulum-v1 --std fixed", module=ppo_continuous)
    train("--resume r --log-std-init -2 --total-timesteps 2048", module=ppo_continuous)
    assert checkpoint()["agent"]["log_std"].tolist() == [-2.0]


# ---- scripts that were edited


@pytest.mark.parametrize("change", [{"nope": 1}, {"vf_coef": None}])
def test_checkpoint_of_an_edited_script(train: Callable, copied: Path, change: dict) -> None:
    """One that had a flag more, or a flag less."""
    args = checkpoint()["args"] | change
    kept = {name: value for name, value in args.items() if name != "vf_coef"}
    torch.save(checkpoint() | {"args": kept}, copied)
    train(f"{FLAGS} --run-dir s --ref-checkpoint r --ref-kl-coef 1")
    train("--eval r --eval-episodes 1")
    train("--resume r --total-timesteps 256")
    assert checkpoint()["step"] == 256
    args = checkpoint()["args"]
    assert (args["vf_coef"], args["hidden_sizes"]) == (0.5, (16,))
