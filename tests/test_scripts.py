"""What does not depend on the action space is the same text in every script."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("ppo_*.py"))

# What may differ, for it is about actions: defaults and further flags, and the policy's head.
OWN = {"Args", "beta_dist", "PIXEL_DEFAULTS", "RANGES", "OTHER_SCRIPTS", "open_envs"} | {
    f"Agent.{name}"
    for name in "__init__ act forward distribution draw_noise sample mode log_prob entropy "
    "kl_divergence to_env deviation".split()
}
# Statements that one script has beside the shared text.
EXTRA = {
    ("ppo_continuous.py", "train"): (
        "log_std = line(args.log_std_init, args.log_std_final, iteration, num_iterations)",
        "if args.std == 'fixed':\n    agent.log_std.data.fill_(log_std)",
        "deviations = agent.deviation(batch.dists[batch.weights > 0]).mean(0).tolist()",
        "scalars |= {f'policy/std_{i}': std for i, std in enumerate(deviations)}",
    ),
    ("ppo_continuous.py", "main"): (
        "if saved['args'].distribution != args.distribution:\n    "
        "fail(f\"--ref-checkpoint: its distribution is {saved['args'].distribution}\")",
    ),
}


def definitions(script: str) -> dict[str, str]:
    """{name: source} of a script's functions, methods, classes and constants, in their order."""
    text = (ROOT / script).read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == "Agent":
            found |= {f"Agent.{n.name}": n for n in node.body if isinstance(n, ast.FunctionDef)}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = node
    extra = {name: lines for (owner, name), lines in EXTRA.items() if owner == script}
    sources = {}
    for name, node in found.items():
        lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
        for part in ast.walk(node):
            if isinstance(part, ast.stmt) and ast.unparse(part) in extra.get(name, ()):
                for number in range(part.lineno, part.end_lineno + 1):
                    lines[number - node.lineno] = None
        sources[name] = "\n".join(line for line in lines if line is not None)
    return sources


@pytest.mark.parametrize("script", SCRIPTS)
def test_shared_text(script: str) -> None:
    """Every definition that is not about actions stands in the script letter by letter."""
    model, other = definitions("ppo_discrete.py"), definitions(script)
    assert model.keys() - OWN == other.keys() - OWN
    drifted = [name for name in model.keys() - OWN if model[name] != other[name]]
    assert not drifted, f"{script} has another text than ppo_discrete.py in {drifted}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_rooms_in_order(script: str) -> None:
    model, other = definitions("ppo_discrete.py"), definitions(script)
    both = model.keys() & other.keys()
    assert [n for n in model if n in both] == [n for n in other if n in both]
    rooms = [
        [line for line in (ROOT / s).read_text().splitlines() if line.startswith("# ---- ")]
        for s in ("ppo_discrete.py", script)
    ]
    assert rooms[0] == rooms[1]
    assert rooms[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_is_imported_from_another_file(script: str) -> None:
    names = {
        name.split(".")[0]
        for node in ast.walk(ast.parse((ROOT / script).read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    packages = {"gymnasium", "numpy", "torch", "tyro", "tensorboard", "tqdm"}
    assert names <= packages | set(sys.stdlib_module_names)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_copy_runs_anywhere(script: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / script, tmp_path / "my_ppo.py")
    env = "Pendulum-v1" if script == "ppo_continuous.py" else "CartPole-v1"
    flags = f"--env-id {env} --num-steps 64 --total-timesteps 512 --num-minibatches 2 --no-progress"
    done = subprocess.run(
        [sys.executable, "my_ppo.py", *flags.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"runs/{env}__my_ppo__1__")
