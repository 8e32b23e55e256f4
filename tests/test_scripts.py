"""The three scripts share their text, and a user's edits of a copy work."""

import ast
import difflib
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import tyro
from conftest import ROOT, read_scalars
from forks import checkpoint, run, same

SCRIPTS = ["ppo_discrete.py", "ppo_continuous.py", "ppo_multidiscrete_mask.py"]

# ---- one text

HEAD = "__init__ distribution act forward log_prob entropy kl_divergence to_env"
HEAD_OF = {"ppo_continuous.py": "action_std"}
HEAD_OF["ppo_multidiscrete_mask.py"] = "policy_masks path_masks path_ratio preprocess"
# What else may differ, by at most so many added and removed lines
OTHERS = {
    "ppo_continuous.py": "check_args 2 make_batch 2 train 4 main 17",
    "ppo_multidiscrete_mask.py": "make_env 5 SyncEnvs 2 make_envs 3 make_body 9 Rollout.__init__ 5 "
    "Rollout.collect 9 evaluate_policy 5 compute_targets 6 make_batch 11 ppo_loss 7 "
    "train 3 main 14",
}
MASKS = "TaxiDispatch MaskInfo VectorMaskInfo MASKED without_mask move_mask used_masks"
MASKS = set(f"{MASKS} is_image fits_network".split())
# Flags of another default or help, and flags of one script
FLAGS = {
    "ppo_continuous.py": "env_id num_envs num_steps total_timesteps norm_obs norm_reward ent_coef "
    "learning_rate num_minibatches update_epochs distribution std log_std_init log_std_final",
    "ppo_multidiscrete_mask.py": "env_id num_envs total_timesteps clip_coef hidden_sizes activation"
    " mask",
}


def first_line(node: ast.AST) -> int:
    """Index of the line where it begins, decorators included."""
    return min(x.lineno for x in (node, *getattr(node, "decorator_list", []))) - 1


def definitions(script: str) -> dict[str, list[str]]:
    """{name: lines} of functions, methods, classes without methods, and constants, in order."""
    text = (ROOT / script).read_text()
    found = {}
    for node in ast.parse(text).body:
        lines = text.splitlines()[first_line(node) : node.end_lineno]
        if isinstance(node, ast.ClassDef) and node.name in ("Agent", "Rollout"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    rows = text.splitlines()[first_line(method) : method.end_lineno]
                    found[f"{node.name}.{method.name}"] = rows
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = lines
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = lines
    return found


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_same_text(script: str) -> None:
    model, other = definitions("ppo_discrete.py"), definitions(script)
    own = {f"Agent.{name}" for name in f"{HEAD} {HEAD_OF[script]}".split()} | {"Args"}
    assert (other.keys() ^ model.keys()) <= own | MASKS
    words = OTHERS[script].split()
    allowed = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    for name in model.keys() & other.keys() - own:
        changes = [line[0] for line in difflib.ndiff(model[name], other[name])]
        number = changes.count("+") + changes.count("-")
        assert number <= allowed.get(name, 0), f"{name}: {number} lines differ"
    both = [name for name in model if name in other]
    assert both == [name for name in other if name in model]  # in the same order


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_same_flags(script: str) -> None:
    """With the same defaults and help, but for those that are about the actions."""

    def flags(name: str) -> dict[str, str]:
        rows = [row for row in definitions(name)["Args"] if ": " in row and row.startswith("    ")]
        return {row.strip().split(":")[0]: row for row in rows if not row.strip().startswith("#")}

    model, other = flags("ppo_discrete.py"), flags(script)
    different = {name for name in model.keys() | other.keys() if model.get(name) != other.get(name)}
    assert different == set(FLAGS[script].split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_is_imported_from_another_file(script: str) -> None:
    names = set()
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    packages = {"gymnasium", "numpy", "torch", "tyro", "tensorboard", "tqdm"}
    assert names <= packages | set(sys.stdlib_module_names)


# ---- what the README says

README = (ROOT / "README.md").read_text()


def test_commands_of_the_readme() -> None:
    """Their flags exist."""
    commands = re.findall(r"^(?:python|torchrun .*?) (ppo_\w+)\.py([^#\n]*)", README, re.M)
    assert len(commands) > 6
    recipes = re.findall(r"^\| .*`(--num-envs [^`]*)`", README, re.M)
    assert len(recipes) == 3
    for script, flags in [*commands, *(("ppo_continuous", flags) for flags in recipes)]:
        if "--help" not in flags:
            tyro.cli(importlib.import_module(script).Args, args=shlex.split(flags))


def test_code_of_the_readme(tmp_path: Path) -> None:
    """The user's environment is trained on, and its checkpoint acts."""
    environment, acting = re.findall(r"```python\n(.*?)```", README, re.S)
    (tmp_path / "my_envs.py").write_text(environment)
    (tmp_path / "act.py").write_text(acting)
    flags = "--env-id my_envs:Walk-v0 --total-timesteps 1024 --no-progress --run-dir runs/RUN"
    code, _, err = run(tmp_path, flags)
    assert (code, err) == (0, "")
    assert run(tmp_path, "", script=tmp_path / "act.py") == (0, "", "")


# ---- edits of a copy

RUN = "--num-steps 64 --total-timesteps 512 --num-minibatches 2 --hidden-sizes 8 --no-progress "
RUN += "--learning-rate 0.01 --no-cuda"
LAYER = "        layers += [nn.Linear(width, size), ACTIVATIONS[args.activation]()]\n"
CRITIC = "        self.critic = nn.Sequential(*critic, nn.Linear(width, 1))\n"
VALUE = "self.critic(features).squeeze(-1)"
AGENT = "class Agent(nn.Module):\n"
FLAG = "    norm_adv: bool = True  # standardize advantages\n"
ADAM = "torch.optim.Adam(param_groups, fused=True)"
METRIC = '            "losses/entropy": entropy,\n'
ENTROPY = "    loss = policy_loss + args.vf_coef * value_loss\n"
PENALTY = "    ref_kl = torch.zeros_like(kl)\n"
MEAN_STD = "            mean, std = masked_mean_std(advantages, mask.view(-1, scope))\n"
STANDARDIZE = 'samples["advantages"] = ((advantages - mean) / (std + 1e-8)).flatten()\n'


def after(line: str, text: str) -> tuple[str, str]:
    """An edit that puts a text after a line."""
    return line, line + text


def edited(cwd: Path, *edits: tuple[str, str], flags: str = "", steps: int = 512) -> Path:
    """Run a copy with edits, for two iterations; its directory."""
    text = (ROOT / "ppo_discrete.py").read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (cwd / "mine.py").write_text(text)
    run_dir = f"r{len(list(cwd.iterdir()))}"
    flags = f"{RUN} --total-timesteps {steps} --run-dir {run_dir} {flags}"
    code, _, err = run(cwd, flags, script=cwd / "mine.py")
    assert (code, err) == (0, "")
    assert checkpoint(cwd / run_dir)["step"] == steps
    return cwd / run_dir


def weights(run_dir: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a run's agent."""
    agent = checkpoint(run_dir)["agent"]
    return {name: value for name, value in agent.items() if name.startswith(prefix)}


def test_layer_norm(tmp_path: Path) -> None:
    """1 place."""
    edit = LAYER, LAYER.replace("size), ", "size), nn.LayerNorm(size), ")
    found = weights(edited(tmp_path, edit), "critic")
    assert (found["critic.1.weight"] != 1).all()  # it is trained
    assert found["critic.1.weight"].shape == (8,)


def test_another_advantage_normalization(tmp_path: Path) -> None:
    """3 places: the flag, the statistic, and its use; the one that it replaces stays."""
    edits = [
        after(FLAG, "    max_adv: bool = False  # divide by the largest\n"),
        after(MEAN_STD, "            largest = advantages.abs().max()\n"),
        after(f"            {STANDARDIZE}", '            if args.max_adv:\n                '
              'samples["advantages"] = (advantages / largest).flatten()\n'),
    ]  # fmt: skip
    plain, off = edited(tmp_path), edited(tmp_path, *edits)
    on = edited(tmp_path, *edits, flags="--max-adv")
    assert same(weights(plain), weights(off))
    assert not same(weights(plain), weights(on))


def test_auxiliary_loss(tmp_path: Path) -> None:
    """4 places in 2 functions: the head; its loss, the sum, and the log."""
    edits = [
        after(CRITIC, "        self.aux = nn.Linear(*obs_shape, 1)\n"),
        after(PENALTY, '    aux = agent.aux(batch["obs"]).squeeze(-1).square()\n'),
        after(ENTROPY, "    loss = loss + 0.5 * aux\n"),
        after(METRIC, '            "losses/aux": aux,\n'),
    ]
    one, two = (edited(tmp_path, *edits, steps=steps) for steps in (256, 512))
    points = read_scalars(two)["losses/aux"]
    assert [value > 0 for _, value in points] == [True, True]
    assert not same(weights(one, "aux"), weights(two, "aux"))


def test_another_optimizer(tmp_path: Path) -> None:
    """1 place."""
    edit = ADAM, "torch.optim.AdamW(param_groups, fused=True, weight_decay=5.0)"
    decayed, plain = weights(edited(tmp_path, edit)), weights(edited(tmp_path))
    assert decayed["actor.0.weight"].norm() < 0.9 * plain["actor.0.weight"].norm()


def test_own_forward(tmp_path: Path) -> None:
    """A subclass of nn.Linear: with outputs of 0, values are 0 as long as the last bias is."""
    own = (
        "class Mute(nn.Linear):\n    def forward(self, x):\n        return 0 * super().forward(x)\n"
    )
    edits = (AGENT, f"{own}\n\n{AGENT}"), (LAYER, LAYER.replace("nn.Linear", "Mute"))
    points = read_scalars(edited(tmp_path, *edits))["values/old_mean"]
    assert points[0][1] == 0 != points[1][1]


def test_parametrized_layer(tmp_path: Path) -> None:
    weight_norm = "nn.utils.parametrizations.weight_norm(nn.Linear(width, size))"
    edit = LAYER, LAYER.replace("nn.Linear(width, size)", weight_norm)
    one, two = edited(tmp_path, edit, steps=256, flags="--no-anneal-lr"), edited(tmp_path, edit)
    first, second = (weights(path, "actor.0.parametrizations.weight") for path in (one, two))
    assert len(first) == 2
    assert not any(torch.equal(first[name], second[name]) for name in first)


SPY = """class Spy(nn.Dropout):
    def forward(self, x):
        assert self.training == torch.is_grad_enabled()
        return super().forward(x)


"""
DROPOUT = (AGENT, SPY + AGENT), (LAYER, LAYER.replace("]()]", "](), Spy(0.5)]"))


def test_dropout(tmp_path: Path) -> None:
    """It is on in the loss only: off in rollouts, in targets, and in evaluations."""
    run_dir = edited(tmp_path, *DROPOUT)
    flags = f"--eval {run_dir.name} --eval-episodes 2 --no-eval-deterministic"
    outs = [run(tmp_path, flags, script=tmp_path / "mine.py") for _ in range(2)]
    assert outs[0] == outs[1]
    assert outs[0][0] == 0


@pytest.mark.parametrize("flags", ["--recompute-advantages", "--kl-target 0.01"])
def test_dropout_is_off_where_the_policy_is_evaluated(tmp_path: Path, flags: str) -> None:
    """In the midst of an update, and after it."""
    edited(tmp_path, *DROPOUT, flags=flags)


def test_forward_hook(tmp_path: Path) -> None:
    hook = "        self.critic.register_forward_hook(lambda layer, inputs, outputs: 0 * outputs)\n"
    scalars = read_scalars(edited(tmp_path, after(CRITIC, hook)))
    assert all(value == 0 for _, value in scalars["values/old_mean"] + scalars["values/mean"])


def test_second_critic(tmp_path: Path) -> None:
    """`critic2` learns at the critic's rate."""
    twin = "        self.critic2 = nn.Sequential(nn.Linear(*obs_shape, 1))\n"
    both = f"({VALUE} + self.critic2(self.preprocess(obs)).squeeze(-1)) / 2"
    edits = after(CRITIC, twin), (VALUE, both)
    frozen = [
        edited(tmp_path, *edits, flags="--critic-learning-rate 0 --no-anneal-lr", steps=steps)
        for steps in (256, 512)
    ]
    assert same(*(weights(path, "critic") for path in frozen))
    assert not same(*(weights(path, "actor") for path in frozen))
    learning = edited(tmp_path, *edits, flags="--actor-learning-rate 0")
    assert not same(weights(frozen[0], "critic2"), weights(learning, "critic2"))


def test_unused_layer(tmp_path: Path) -> None:
    """In one process and in two."""
    edit = after(CRITIC, "        self.unused = nn.Linear(3, 3)\n")
    assert same(*(weights(edited(tmp_path, edit, steps=n), "unused") for n in (256, 512)))
    flags = f"{RUN} --run-dir two"
    assert run(tmp_path, flags, script=tmp_path / "mine.py", processes=2)[0] == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_copy_under_another_name(script: str, tmp_path: Path) -> None:
    copy = tmp_path / "my_ppo.py"
    copy.write_text((ROOT / script).read_text())
    env = "Pendulum-v1" if script == "ppo_continuous.py" else "CartPole-v1"
    code, _, err = run(tmp_path, f"{RUN} --num-envs 4 --env-id {env}", script=copy)
    assert (code, err) == (0, "")
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith(f"{env}__my_ppo__1__")
