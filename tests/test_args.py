"""Command lines: what is accepted, what is refused before anything is written, what --help says."""

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

import ppo_continuous
import ppo_discrete
import ppo_multidiscrete_mask

SCRIPTS = [ppo_discrete, ppo_continuous, ppo_multidiscrete_mask]
TINY = "--num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 1 --hidden-sizes 8"
RUN = f"{TINY} --total-timesteps 32 --no-progress".split()


def table(text: str) -> dict[str, Any]:
    """{name: value} from words "name=value"."""
    return eval(f"dict({','.join(text.split())})")


CLEANRL = table("""
exp_name='mine' seed=3 torch_deterministic=False cuda=False capture_video=True
env_id='Acrobot-v1' total_timesteps=2048 learning_rate=1e-3 num_envs=8 num_steps=64
anneal_lr=False gamma=0.98 gae_lambda=0.9 num_minibatches=2 update_epochs=3 norm_adv=False
clip_coef=0.3 clip_vloss=False ent_coef=0.02 vf_coef=0.25 max_grad_norm=1.0 target_kl=0.02
""")


class Still(gym.Env):
    """One observation for ever, under any spaces."""

    def __init__(
        self, obs: spaces.Space | None = None, actions: spaces.Space | None = None, **kwargs: Any
    ) -> None:
        self.observation_space = obs or spaces.Box(-1, 1, (3,))
        self.action_space = actions or spaces.Discrete(2)
        self.kwargs.append(kwargs)

    kwargs: list[dict] = []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> tuple:
        return np.zeros(3, np.float32), 1.0, False, False, {}


def register(name: str, **kwargs: Any) -> None:
    gym.register(name, Still, max_episode_steps=5, disable_env_checker=True, kwargs=kwargs)


register("Still-v0")
register("Sequence-v0", obs=spaces.Sequence(spaces.Box(-1, 1, (2,))))
register("Graph-v0", obs=spaces.Graph(spaces.Box(-1, 1, (2,)), None))
register("Multi-v0", actions=spaces.MultiDiscrete([2, 3]))
register("Bits-v0", actions=spaces.MultiBinary(3))
register("Numbers-v0", actions=spaces.Box(-1, 1, (2,)))
register("Integers-v0", actions=spaces.Box(0, 5, (2,), np.int64))
register("Endless-v0", actions=spaces.Box(-np.inf, np.inf, (2,)))
register("Tuple-v0", actions=spaces.Tuple([spaces.Discrete(2)] * 2))


@pytest.fixture
def parse(main: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`parse(*flags)`: what `main` reads from the command line."""

    def parse(*flags: Any, module: ModuleType = ppo_discrete) -> Any:
        seen = []

        def check_args(args: Any) -> None:
            seen.append(args)
            raise SystemExit(0)

        monkeypatch.setattr(module, "check_args", check_args)
        code, _, err = main(*flags, module=module)
        assert code == 0, err
        return seen[0]

    return parse


def refused(main: Callable, *flags: Any, module: ModuleType = ppo_discrete) -> str:
    """The message of a command line that ends with code 2 and changes no file."""

    def files() -> list[tuple]:
        found = sorted(Path().rglob("*"))
        return [(path, path.is_file() and path.read_bytes()) for path in found]

    before = files()
    code, out, err = main(*flags, module=module)
    assert code == 2, (code, out, err)
    assert out == ""
    assert "Traceback" not in err
    assert files() == before
    return err


# ---- what is accepted


@pytest.mark.parametrize("module", SCRIPTS)
@pytest.mark.parametrize("separator", ["-", "_"])
def test_cleanrl_command_line(parse: Callable, module: ModuleType, separator: str) -> None:
    """All of its flags at once, spelt with hyphens or underscores."""
    flags = []
    for name, value in CLEANRL.items():
        flags.append("--" + (f"no_{name}" if value is False else name).replace("_", separator))
        flags += [] if isinstance(value, bool) else [value]
    assert parse(*flags, module=module) == module.Args(**CLEANRL)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("module", SCRIPTS)
def test_switches(parse: Callable, module: ModuleType, value: bool) -> None:
    """Every switch can be turned on and off, alone in one script and together in the others."""
    names = [field.name for field in fields(module.Args) if isinstance(field.default, bool)]
    prefix = "--" if value else "--no-"
    flags = {name: prefix + name.replace("_", "-") for name in names}
    assert len(flags) >= 15
    assert parse(*flags.values(), module=module) == module.Args(**dict.fromkeys(flags, value))
    if module is ppo_discrete:
        for name, flag in flags.items():
            assert parse(flag) == module.Args(**{name: value})


@pytest.mark.parametrize("module", SCRIPTS)
def test_none_switches_a_number_off(parse: Callable, module: ModuleType) -> None:
    names = [field.name for field in fields(module.Args) if "| None" in str(field.type)]
    assert {"clip_coef", "clip_obs", "max_grad_norm", "target_kl"} <= set(names)
    flags = [word for name in names for word in (f"--{name}", "None")]
    assert parse(*flags, module=module) == module.Args(**dict.fromkeys(names))


def test_other_values(parse: Callable) -> None:
    """Several numbers, `=`, the last of a repeated flag, and zero, which is not None."""
    flags = "--hidden-sizes 32 16 --gamma 0.5 --gamma 0.75 --seed=7 --actor-learning-rate 0"
    args = parse(*flags.split(), "--env-kwargs", '{"a": true, "b": [1, null]}')
    expected = {"hidden_sizes": (32, 16), "gamma": 0.75, "seed": 7, "actor_learning_rate": 0.0}
    assert args == ppo_discrete.Args(**expected, env_kwargs={"a": True, "b": [1, None]})


# ---- what is refused

WRONG = [
    # What tyro finds
    ("--nope 3", "nope"),
    ("--gama 0.9", "--gamma"),
    ("--gamma", "--gamma"),
    ("--gamma high", "high"),
    ("--seed 1.5", "1.5"),
    ("--activation swish", "swish"),
    ("--norm-value yes", "popart"),
    ("--vectorization threads", "envpool"),
    ("--env-kwargs gravity=3", "env-kwargs"),
    ("--anneal-lr False", "False"),
    ("--no-anneal-lr True", "True"),
    ("--anneal-lr=False", "False"),
    # Sizes
    ("--num-minibatches 3", "3"),
    ("--num-envs 3 --num-steps 5", "5"),
    ("--total-timesteps 511", "511"),
    ("--num-envs 0", "num_envs"),
    ("--update-epochs 0", "update_epochs"),
    ("--num-envs 1 --num-steps 4", "norm_adv"),
    ("--num-envs 2 --num-steps 16 --num-minibatches 32", "norm_adv"),
    # Flags that need or exclude each other
    ("--ref-kl-coef 0.1", "ref_checkpoint"),
    ("--capture-video --vectorization native", "native"),
    # Environments
    ("--env-id Numbers-v0", "ppo_continuous.py"),
    ("--env-id Multi-v0", "ppo_multidiscrete_mask.py"),
    ("--env-id Bits-v0", "MultiBinary"),
    ("--env-id Tuple-v0", "Tuple"),
    ("--env-id Sequence-v0", "Sequence"),
    ("--env-id Graph-v0", "Graph"),
    ("--resume missing", "missing"),
    ("--eval missing", "missing"),
    ("--ref-checkpoint missing", "missing"),
]


@pytest.mark.parametrize("flags, word", WRONG, ids=lambda x: x.replace(" ", "_"))
def test_refused(main: Callable, flags: str, word: str) -> None:
    assert word in refused(main, *flags.split())


@pytest.mark.parametrize(
    "module, flags, word",
    [
        (ppo_continuous, "--env-id CartPole-v1", "ppo_discrete.py"),
        (ppo_continuous, "--env-id Multi-v0", "ppo_multidiscrete_mask.py"),
        (ppo_continuous, "--env-id Integers-v0", "int64"),
        (ppo_continuous, "--env-id Endless-v0 --distribution beta", "beta"),
        (ppo_continuous, "--env-id Sequence-v0", "Discrete"),
        (ppo_continuous, "--log-std-final -1", "independent"),
        (ppo_continuous, "--num-steps 32 --total-timesteps 64", "norm_adv"),
        (ppo_continuous, "--distribution beta --std fixed --log-std-final -1", "log_std_final"),
        (ppo_multidiscrete_mask, "--env-id Numbers-v0", "ppo_continuous.py"),
        (ppo_multidiscrete_mask, "--mask some", "conditional"),
        (ppo_multidiscrete_mask, "--env-id Sequence-v0", "Sequence"),
    ],
)
def test_refused_by_the_other_scripts(
    main: Callable, module: ModuleType, flags: str, word: str
) -> None:
    assert word in refused(main, *flags.split(), module=module)


@pytest.mark.parametrize("kwargs", ["[1, 2]", "3", "null"])
def test_env_kwargs_must_be_an_object(main: Callable, kwargs: str) -> None:
    assert "env" in refused(main, "--env-kwargs", kwargs)


# ---- help


@pytest.mark.parametrize("module", SCRIPTS)
def test_help(main: Callable, module: ModuleType) -> None:
    """Every flag with the comment on its line, and the commands of the module's docstring."""
    code, out, err = main("--help", module=module)
    assert (code, err) == (0, "")
    plain = re.sub(r"\W", "", out)
    source = Path(module.__file__).read_text()
    body = source.split("class Args:\n", 1)[1].split("\n\n", 1)[0]
    for field in fields(module.Args):
        flag = "--" + field.name.replace("_", "-")
        assert re.search(rf"{flag}\b", out), flag
        line = re.search(rf"^    {field.name}: .*  # (\w.*)$", body, re.M)
        assert line, f"{field.name} has no comment"
        assert re.sub(r"\W", "", line[1]) in plain, field.name
    for command in re.findall(r"^    (\w+ .*?)  ", module.__doc__, re.M):
        assert command in out
    assert list(Path.cwd().iterdir()) == []
