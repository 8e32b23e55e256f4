"""Command lines: what is accepted, what is refused and how, and what --help tells."""

import ast
import inspect
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT

import ppo_discrete as ppo

FLAGS = "--num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 1 --hidden-sizes 8"
RUN = f"{FLAGS} --total-timesteps 32 --no-progress".split()

# design, section 4: headings of --help, and flags under them
GROUPS = {
    "environment": "env-kwargs vectorization",
    "network": "hidden-sizes activation ortho-init shared-network",
    "normalisers": "norm-obs clip-obs norm-reward clip-reward norm-value norm-adv norm-adv-scope",
    "targets": "value-target recompute-advantages bootstrap-truncated",
    "policy loss": "clip-coef dual-clip-coef kl-coef kl-target target-kl ref-checkpoint "
    "ref-kl-coef",
    "value loss": "clip-vloss vclip-coef value-loss",
    "entropy": "ent-coef ent-coef-final",
    "optimiser": "actor-learning-rate critic-learning-rate adam-eps actor-adam-eps "
    "critic-adam-eps max-grad-norm critic-epochs critic-warmup-iterations",
    "speed": "compile torch-threads",
    "runs": "run-dir progress checkpoint-every resume eval eval-episodes",
}
CLEANRL = dict(
    exp_name="mine",
    seed=3,
    torch_deterministic=False,
    cuda=False,
    capture_video=True,
    env_id="Acrobot-v1",
    total_timesteps=2048,
    learning_rate=1e-3,
    num_envs=8,
    num_steps=64,
    anneal_lr=False,
    gamma=0.98,
    gae_lambda=0.9,
    num_minibatches=2,
    update_epochs=3,
    norm_adv=False,
    clip_coef=0.3,
    clip_vloss=False,
    ent_coef=0.02,
    vf_coef=0.25,
    max_grad_norm=1.0,
    target_kl=0.02,
)


class Tiny(gym.Env):
    """Noise in the shape and type of pixels, or under another space of actions."""

    metadata = {"render_modes": []}

    def __init__(
        self, shape: tuple = (36, 36, 3), actions: gym.Space | None = None, render_mode: None = None
    ) -> None:
        dtype = np.uint8 if len(shape) == 3 else np.float32
        self.observation_space = gym.spaces.Box(0, 255, tuple(shape), dtype)
        self.action_space = actions or gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Begin an episode."""
        super().reset(seed=seed)
        return self.draw(), {}

    def step(self, action: int) -> tuple:
        """Go on for ever."""
        return self.draw(), 1.0, False, False, {}

    def draw(self) -> np.ndarray:
        """Any observation."""
        space = self.observation_space
        return self.np_random.integers(0, 256, space.shape).astype(space.dtype)


class Plain(Tiny):
    """An environment that renders nothing and so takes no render_mode."""

    def __init__(self) -> None:
        super().__init__((3,))


gym.register("Tiny-v0", Tiny, max_episode_steps=10)
gym.register("Plain-v0", Plain, max_episode_steps=10)
for name, space in {
    "Multi": gym.spaces.MultiDiscrete([2, 3]),
    "Bits": gym.spaces.MultiBinary(3),
    "Pair": gym.spaces.Tuple([gym.spaces.Discrete(2)] * 2),
}.items():
    gym.register(f"{name}-v0", Tiny, kwargs={"shape": (3,), "actions": space})


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ppo.Args]:
    """`parse(*flags)`: what parse_args makes of them."""

    def parse(*flags: object) -> ppo.Args:
        monkeypatch.setattr(sys, "argv", ["ppo_discrete.py", *map(str, flags)])
        return ppo.parse_args()

    return parse


@pytest.fixture
def planned(main: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ppo.Args]:
    """`planned(*flags)`: the flags that reach train, which does nothing."""

    def planned(*flags: object) -> ppo.Args:
        got: list[ppo.Args] = []
        monkeypatch.setattr(ppo, "train", lambda args, *_: got.append(args))
        code, _, err = main(*flags)
        assert (code, len(got)) == (0, 1), err
        return got[0]

    return planned


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Directory of a run that is complete."""
    path = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ppo_discrete.py", *RUN, "--run-dir", str(path)])
        patch.setattr(ppo.signal, "signal", lambda *_: None)
        ppo.main()
    return path


def files(path: Path) -> dict[str, bytes | None]:
    """Everything under a directory with its content."""
    found = sorted(path.rglob("*"))
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in found}


def refused(main: Callable, flags: list[str], words: list[str]) -> None:
    """The command line ends with code 2 and a line that says `words`, and writes nothing."""
    before = files(Path.cwd())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "collect", lambda *_: pytest.fail("the command line was accepted"))
        code, out, err = main(*flags)
    assert code == 2, (code, out, err)
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert not out
    assert [word for word in words if word.lower() not in err.lower()] == [], err
    assert files(Path.cwd()) == before


def flags_of(*types: object) -> list[str]:
    """Flags whose values have one of these types."""
    return ["--" + f.name.replace("_", "-") for f in fields(ppo.Args) if f.type in types]


# each with what the error has to say
WRONG = [
    # environments
    (["--env-id", "Nope-v1"], ["Nope"]),
    (["--env-id", "CartPole-v99"], ["CartPole", "v99"]),
    (["--env-id", "nomodule:Nope-v1"], ["nomodule"]),
    (["--env-id", ""], ["--env-id"]),
    (["--env-id", "ALE/Nope-v5"], ["ALE/Nope"]),
    (["--env-id", "Nope-v1", "--vectorization", "async"], ["Nope"]),
    (["--env-id", "Nope-v1", "--vectorization", "native"], ["Nope"]),
    (["--env-id", "Nope-v1", "--vectorization", "envpool"], ["Nope"]),
    (["--env-id", "Pendulum-v1"], ["Pendulum-v1", "Box", "ppo_continuous.py"]),
    (["--env-id", "Multi-v0"], ["Multi-v0", "MultiDiscrete", "ppo_multidiscrete_mask.py"]),
    (["--env-id", "Bits-v0"], ["Bits-v0", "MultiBinary"]),
    (["--env-id", "Pair-v0"], ["Pair-v0", "Tuple"]),
    (["--env-id", "Acrobot-v1", "--vectorization", "native"], ["Acrobot-v1", "native", "vector"]),
    (["--env-kwargs", "{"], ["--env-kwargs {", "JSON object"]),
    (["--env-kwargs", "gravity=3"], ["--env-kwargs gravity=3", "JSON object"]),
    (["--env-kwargs", "[1, 2]"], ["--env-kwargs [1, 2]", "JSON object"]),
    (["--env-kwargs", "3"], ["--env-kwargs 3", "JSON object"]),
    (["--env-kwargs", "null"], ["--env-kwargs null", "JSON object"]),
    (["--env-kwargs", '{"nope": 3}'], ["CartPole-v1", "nope"]),
    (["--env-kwargs", '{"nope": 3}', "--vectorization", "native"], ["CartPole-v1", "nope"]),
    (["--capture-video", "--vectorization", "native"], ["--capture-video", "native", "sync"]),
    (["--capture-video", "--vectorization", "envpool"], ["--capture-video", "envpool", "sync"]),
    # sizes
    (["--num-minibatches", "3"], ["--num-minibatches 3", "512"]),
    (["--num-envs", "3", "--num-steps", "5"], ["--num-minibatches 4", "15"]),
    (["--total-timesteps", "511"], ["--total-timesteps 511", "512"]),
    (["--total-timesteps", "-512"], ["--total-timesteps -512", "512"]),
    (["--hidden-sizes", "64", "0"], ["--hidden-sizes", "0"]),
    # ranges that the sweeps below leave out
    (["--num-envs", "0"], ["--num-envs 0", "1"]),
    (["--gamma", "1.01"], ["--gamma 1.01", "0 and 1"]),
    (["--gae-lambda", "2"], ["--gae-lambda 2", "0 and 1"]),
    (["--dual-clip-coef", "1"], ["--dual-clip-coef 1", "1"]),
    (["--clip-coef", "0"], ["--clip-coef 0"]),
    (["--seed", "99999999999"], ["--seed 99999999999"]),
    # the grammar
    (["--nope", "3"], ["--nope"]),
    (["--gam", "0.9"], ["--gam"]),
    (["-x"], ["-x"]),
    (["CartPole-v1"], ["CartPole-v1"]),
    (["--gamma"], ["--gamma"]),
    (["--gamma", "high"], ["--gamma", "high"]),
    (["--gamma", "none"], ["--gamma", "none"]),
    (["--clip-coef", "off"], ["--clip-coef", "off"]),
    (["--seed", "1.5"], ["--seed", "1.5"]),
    (["--hidden-sizes", "64", "wide"], ["--hidden-sizes", "wide"]),
    (["--anneal-lr", "False"], ["False"]),
    (["--anneal-lr=False"], ["False"]),
    (["--no-anneal-lr", "True"], ["True"]),
    (["--vectorization", "threads"], ["--vectorization", "threads", "'sync'", "'envpool'"]),
    (["--activation", "swish"], ["--activation", "swish", "'tanh'", "'silu'"]),
    (["--norm-value", "yes"], ["--norm-value", "yes", "'popart'"]),
    (["--value-target", "nstep"], ["--value-target", "nstep", "'gae'", "'td'"]),
    (["--value-loss", "l1"], ["--value-loss", "l1", "'huber'"]),
    (["--norm-adv-scope", "all"], ["--norm-adv-scope", "all", "'batch'"]),
    # flags that need or exclude each other
    (["--ref-kl-coef", "0.1"], ["--ref-kl-coef 0.1", "--ref-checkpoint"]),
    (["--resume", "run", "--eval", "run"], ["--resume", "--eval"]),
    # directories
    (["--run-dir", "runs/{nope}"], ["--run-dir", "{nope}"]),
    (["--run-dir", "runs/{env"], ["--run-dir", "{env"]),
    (["--run-dir", "a-file/run"], ["--run-dir", "a-file/run"]),
    (["--run-dir", "run"], ["--run-dir run", "holds a run"]),
    (["--run-dir", "x" * 300], ["--run-dir xxx", "too long"]),
    (["--run-dir", ""], ["--run-dir", "empty"]),
    (["--eval", ""], ["--eval", "empty"]),
    (["--resume", ""], ["--resume", "empty"]),
    (["--ref-checkpoint", ""], ["--ref-checkpoint", "empty"]),
    (["--resume", "x" * 300], ["--resume xxx", "too long"]),
    (["--torch-threads", "100000"], ["--torch-threads 100000", "1024"]),
    (["--run-dir", "killed"], ["--run-dir killed", "holds a run"]),  # before its first checkpoint
    # checkpoints
    (["--resume", "missing"], ["--resume missing"]),
    (["--eval", "missing"], ["--eval missing"]),
    (["--ref-checkpoint", "missing", "--ref-kl-coef", "1"], ["--ref-checkpoint missing"]),
    (["--eval", "."], ["--eval ."]),
    (["--eval", "a-file"], ["--eval a-file"]),
    (["--resume", "run"], ["--resume run", "complete", "32", "--total-timesteps"]),
    (["--resume", "run", "--total-timesteps", "63"], ["--resume run", "complete"]),
    (["--resume", "run", "--gamma", "2"], ["--gamma 2"]),
    (["--resume", "run", "--env-id", "Acrobot-v1"], ["CartPole-v1", "Acrobot-v1"]),
    (["--eval", "run", "--env-id", "Acrobot-v1"], ["CartPole-v1", "Acrobot-v1"]),
    (["--eval", "run", "--hidden-sizes", "9"], ["--eval", "networks"]),
    (["--eval", "run", "--hidden-sizes", "8", "8"], ["--eval", "networks"]),
    (["--resume", "run", "--shared-network"], ["--resume", "networks"]),
    (["--ref-checkpoint", "run", "--env-id", "Acrobot-v1"], ["CartPole-v1", "Acrobot-v1"]),
]


@pytest.mark.parametrize("flags, words", WRONG, ids=lambda x: " ".join(x))
def test_refused(main: Callable, finished: Path, flags: list[str], words: list[str]) -> None:
    shutil.copytree(finished, "run")
    shutil.copytree(finished, "killed")
    Path("killed/checkpoint.pt").unlink()
    Path("a-file").write_text("no checkpoint")
    refused(main, flags, words)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1"])
@pytest.mark.parametrize("flag", flags_of(float, ppo.FloatOrNone))
def test_number_out_of_range(main: Callable, flag: str, value: str) -> None:
    refused(main, [flag, value], [flag, value])


@pytest.mark.parametrize("flag", flags_of(int))
def test_count_out_of_range(main: Callable, flag: str) -> None:
    refused(main, [flag, "-1"], [flag, "-1"])


@pytest.mark.parametrize(
    "module, package, flags",
    [
        ("ale_py", "ale[-_]py", ["--env-id", "ALE/Pong-v5"]),
        ("ale_py", "ale[-_]py", ["--env-id", "ALE/Pong-v5", "--vectorization", "native"]),
        ("ale_py", "ale[-_]py", ["--env-id", "PongNoFrameskip-v4"]),
        ("cv2", "opencv", ["--env-id", "ALE/Pong-v5"]),
        ("envpool", "envpool", ["--vectorization", "envpool"]),
        ("moviepy", "moviepy", ["--capture-video"]),
        ("moviepy", "moviepy", ["--eval", "run", "--capture-video"]),
        ("Box2D", "box2d", ["--env-id", "LunarLander-v3"]),
    ],
)
def test_package_missing(
    main: Callable,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    package: str,
    flags: list[str],
) -> None:
    """The error names the package to install."""
    for name in list(sys.modules):
        if name.startswith(("gymnasium.envs.box2d", "gymnasium.utils.save_video")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    shutil.copytree(finished, "run")
    before = files(Path.cwd())
    code, out, err = main(*flags)
    assert (code, out) == (2, "")
    *banner, error = err.splitlines()
    assert re.match(rf"error: .*\b{package}\b", error, re.IGNORECASE), err
    assert [line for line in banner if not re.match(r"A\.L\.E|\[Powered", line)] == []
    assert files(Path.cwd()) == before


@pytest.mark.parametrize("flag", ["resume", "eval", "ref-checkpoint"])
def test_checkpoint_of_another_shape(main: Callable, flag: str) -> None:
    """Same name of the environment, but other observations."""
    made = main(*RUN, "--env-id", "Tiny-v0", "--env-kwargs", '{"shape": [3]}', "--run-dir", "run")
    assert made[0] == 0
    flags = [f"--{flag}", "run", "--env-id", "Tiny-v0", "--env-kwargs", '{"shape": [4]}']
    refused(main, [*flags, "--total-timesteps", "999"], [f"--{flag}", "networks"])


class Code:
    """Makes a directory when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("the-code-ran",)


def truncated(path: Path) -> None:
    """Lose the second half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    """Flip one bit of a weight."""
    weight = torch.load(path, weights_only=True)["agent"]["actor.0.weight"].numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(weight) + 6] ^= 1
    path.write_bytes(data)


def coded(path: Path) -> None:
    """Hide code in it."""
    torch.save(torch.load(path, weights_only=True) | {"beta": Code()}, path)


def coded_before_zip(path: Path) -> None:
    """The same in PyTorch's old format."""
    state = torch.load(path, weights_only=True) | {"beta": Code()}
    torch.save(state, path, _use_new_zipfile_serialization=False)


def emptied(path: Path) -> None:
    """Leave nothing."""
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    """Only weights, as another program may save them."""
    torch.save(torch.load(path, weights_only=True)["agent"], path)


def other_flags(path: Path) -> None:
    """Flags that this script does not have."""
    state = torch.load(path, weights_only=True)
    torch.save(state | {"args": state["args"] | {"nope": 1}}, path)


DAMAGE = [truncated, flipped, coded, coded_before_zip, emptied, foreign, other_flags]


@pytest.mark.parametrize("flag", ["resume", "eval", "ref-checkpoint"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(main: Callable, finished: Path, damage: Callable, flag: str) -> None:
    shutil.copytree(finished, "run")
    damage(Path("run/checkpoint.pt"))
    refused(main, [f"--{flag}", "run", "--total-timesteps", "999"], [f"--{flag} run", "damaged"])


def test_code_in_checkpoint_is_live(main: Callable, finished: Path) -> None:
    """The code in the damaged checkpoints would run if they were unpickled."""
    shutil.copytree(finished, "run")
    coded(Path("run/checkpoint.pt"))
    torch.load("run/checkpoint.pt", weights_only=False)
    assert Path("the-code-ran").is_dir()


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id Nope-v1", "Nope"),
        ("--gamma 1.5", "--gamma 1.5"),
        ("--capture-video", "MoviePy"),
        ("--eval run", "damaged"),
    ],
)
def test_refused_in_process(
    run: Callable, tmp_path: Path, finished: Path, flags: str, words: str
) -> None:
    """The whole process ends as the table says."""
    shutil.copytree(finished, tmp_path / "run")
    coded(tmp_path / "run/checkpoint.pt")
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/moviepy.py").write_text("raise ModuleNotFoundError('no moviepy')")
    before = files(tmp_path)
    quiet = {"PYTHONPATH": str(tmp_path / "packages"), "PYTHONDONTWRITEBYTECODE": "1"}
    result = run(*flags.split(), env=os.environ | quiet)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(rf"error: [^\n]*{words}[^\n]*\n", result.stderr, re.IGNORECASE)
    assert files(tmp_path) == before


# ---- what is accepted


@pytest.mark.parametrize("name", [f.name for f in fields(ppo.Args) if f.type is bool])
def test_switch(parse: Callable, name: str) -> None:
    """On, off, in both spellings; and neither changes another field (trap 31)."""
    default = asdict(ppo.Args())
    hyphens = name.replace("_", "-")
    for flag, value in [(f"--{hyphens}", True), (f"--no-{hyphens}", False)]:
        for spelling in (flag, "--" + flag[2:].replace("-", "_")):
            assert asdict(parse(spelling)) == default | {name: value}
    assert asdict(parse()) == default


@pytest.mark.parametrize("name", [f.name for f in fields(ppo.Args) if f.type is ppo.FloatOrNone])
def test_none_switches_off(parse: Callable, name: str) -> None:
    for word in ("none", "None", "NONE"):
        assert asdict(parse("--" + name.replace("_", "-"), word)) == asdict(ppo.Args()) | {
            name: None
        }
    assert getattr(parse(f"--{name}", "1.5"), name) == 1.5


@pytest.mark.parametrize("separator", ["-", "_"])
def test_cleanrl_command_line(planned: Callable, separator: str) -> None:
    """All of its flags at once, as its users type them."""
    pytest.importorskip("moviepy")
    flags = []
    for name, value in CLEANRL.items():
        switch = name if value is not False else f"no_{name}"
        flags.append("--" + switch.replace("_", separator))
        flags += [] if isinstance(value, bool) else [value]
    args = vars(planned(*flags))
    run_dir = args.pop("run_dir")
    expected = vars(ppo.Args(**CLEANRL))
    assert args == {name: value for name, value in expected.items() if name != "run_dir"}
    assert re.fullmatch(r"runs/Acrobot-v1__mine__3__\d{10}", run_dir)


def test_other_values(parse: Callable) -> None:
    """Several words, JSON, choices, and the last of a repeated flag."""
    args = parse(
        *["--hidden-sizes", "32", "16", "8", "--env-kwargs", '{"sutton_barto_reward": true}'],
        *["--vectorization", "async", "--gamma", "0.5", "--gamma", "0.75", "--seed=7"],
    )
    assert args.hidden_sizes == (32, 16, 8)
    assert args.env_kwargs == '{"sutton_barto_reward": true}'
    assert (args.vectorization, args.gamma, args.seed) == ("async", 0.75, 7)


def test_env_kwargs_reach_the_environment(
    planned: Callable, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = []
    make = gym.make
    monkeypatch.setattr(gym, "make", lambda *a, **k: got.append(k) or make(*a, **k))
    planned("--env-kwargs", '{"sutton_barto_reward": true, "max_episode_steps": 7}')
    assert got
    assert all(k["sutton_barto_reward"] and k["max_episode_steps"] == 7 for k in got)


def test_environment_without_render_mode(planned: Callable) -> None:
    """An environment need not take a render_mode to be trained in."""
    assert planned("--env-id", "Plain-v0").env_id == "Plain-v0"


@pytest.mark.parametrize("seed", [0, 2**31])
def test_extreme_seeds(main: Callable, seed: int) -> None:
    code, _, err = main(*RUN, "--seed", seed, "--run-dir", "r")
    assert (code, err) == (0, "")


def test_module_in_env_id(main: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`module:Id` imports the module first."""
    (tmp_path / "my_package.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "gym.register('Own-v3', CartPoleEnv, max_episode_steps=5)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = main(*RUN, "--env-id", "my_package:Own-v3", "--run-dir", "r")
    assert (code, err) == (0, "")
    assert "mean return of the last 6 episodes 5.0" in out


def test_name_of_a_copy(run: Callable, tmp_path: Path) -> None:
    """A copy anywhere on disk runs, and its runs have its name (trap 32)."""
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    shutil.copy(ROOT / "ppo_discrete.py", elsewhere / "happy.py")
    result = run(*RUN, script=elsewhere / "happy.py")
    assert (result.returncode, result.stderr) == (0, "")
    assert [p.name.rsplit("__", 1)[0] for p in (tmp_path / "runs").iterdir()] == [
        "CartPole-v1__happy__1"
    ]


def test_run_dir_template(planned: Callable) -> None:
    args = planned("--run-dir", "a/{seed}/{exp}-{env}", "--exp-name", "b", "--seed", 5)
    assert args.run_dir == "a/5/b-CartPole-v1"


# ---- pixels


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], (8, 10_000_000, 0.1, True)),
        (["--num-envs", "4"], (4, 10_000_000, 0.1, True)),
        (["--total-timesteps", "500000", "--clip-coef", "0.2"], (8, 500_000, 0.2, True)),
        (["--no-shared-network", "--clip-coef", "none"], (8, 10_000_000, None, False)),
        # 16 minibatches divide 8 environments x 2 steps, but not 4 x 2
        (["--num-steps", "2", "--num-minibatches", "16"], (8, 10_000_000, 0.1, True)),
    ],
)
def test_pixel_defaults(planned: Callable, flags: list[str], expected: tuple) -> None:
    """CleanRL's ppo_atari.py, unless the user says otherwise."""
    args = planned("--env-id", "Tiny-v0", *flags)
    assert (args.num_envs, args.total_timesteps, args.clip_coef, args.shared_network) == expected
    same = "gamma gae_lambda num_minibatches update_epochs ent_coef vf_coef learning_rate num_steps"
    given = {flag[2:].replace("-", "_") for flag in flags}
    for name in set(same.split()) - given:
        assert getattr(args, name) == getattr(ppo.Args(), name)


def test_pixel_defaults_are_for_pixels(planned: Callable) -> None:
    args = planned("--env-id", "Acrobot-v1")
    assert (args.num_envs, args.total_timesteps, args.clip_coef) == (4, 500_000, 0.2)
    assert not args.shared_network


def test_pixel_batch_is_checked(main: Callable) -> None:
    """With eight environments, which the first look at the flags does not know of."""
    refused(main, ["--env-id", "Tiny-v0", "--total-timesteps", "1023"], ["1023", "1024"])


def test_resumed_pixels_keep_their_flags(planned: Callable, main: Callable) -> None:
    flags = "--num-envs 1 --num-steps 4 --total-timesteps 4 --update-epochs 1 --no-shared-network"
    assert main("--env-id", "Tiny-v0", *flags.split(), "--run-dir", "r")[0] == 0
    args = planned("--resume", "r", "--total-timesteps", "8")
    assert (args.num_envs, args.num_steps, args.total_timesteps) == (1, 4, 8)
    assert (args.clip_coef, args.shared_network) == (0.1, False)


# ---- help


def docstrings() -> dict[str, str]:
    """Docstring under each field of Args."""
    body = ast.parse(inspect.getsource(ppo.Args)).body[0].body
    return {
        field.target.id: text.value.value
        for field, text in zip(body, [*body[1:], None], strict=True)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def test_fields_have_docstrings() -> None:
    texts = docstrings()
    assert list(texts) == [f.name for f in fields(ppo.Args)]
    for name, text in texts.items():
        assert text.strip() == text, name
        assert text, name
        assert "\n" not in text, name


def test_help(run: Callable) -> None:
    """Every field with its docstring, under the headings of the design."""
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert inspect.getdoc(ppo) in result.stdout
    headings: dict[str, str] = {}
    flags: list[str] = []
    titles = []
    for line in result.stdout.split("--help ", 1)[1].splitlines():
        if line.strip() in GROUPS and re.match(r" \w", line):
            titles.append(line.strip())
        if match := re.match(r"  --(?P<flag>[a-z-]+)", line):
            flags.append(match["flag"])
            headings[match["flag"]] = titles[-1]
    assert sorted(titles) == sorted(GROUPS)
    assert [title for title in titles if title != "runs"] == [g for g in GROUPS if g != "runs"]
    assert flags == [f.name.replace("_", "-") for f in fields(ppo.Args)]
    for group, names in GROUPS.items():
        assert [flag for flag in names.split() if headings.get(flag) != group] == [], group
    spaceless = re.sub(r"\s", "", result.stdout)
    for name, text in docstrings().items():
        assert re.sub(r"\s", "", text) in spaceless, name
    for name in CLEANRL:
        assert name.replace("_", "-") in flags


def test_help_beside_other_flags(main: Callable) -> None:
    code, out, err = main("--seed", "3", "-h")
    assert (code, err) == (0, "")
    assert re.search(r"--seed INT\s+seed of [^()]*\(default: 1\)", out)
