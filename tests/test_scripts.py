"""What does not depend on the action space is the same text in every script."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("ppo_*.py"))

# What may differ, for it is about actions: defaults, further flags, the policy's head, and masks.
OWN = set(
    "Args INFOS beta_dist PIXEL_DEFAULTS RANGES OTHER_SCRIPTS open_envs is_flat TaxiDispatch "
    "move_mask keys_beside_mask without_mask MaskInfo VectorMaskInfo MASKED keep_masks "
    "invalid_fraction check_mask".split()
) | {
    f"Agent.{name}"
    for name in "__init__ preprocess act forward distribution draw_noise sample mode log_prob "
    "entropy kl_divergence to_env deviation heed path".split()
}
# Statements that one script has beside the shared text.
EXTRA = {
    ("ppo_continuous.py", "train"): (
        "log_std = line(args.log_std_init, args.log_std_final, iteration, num_iterations)",
        "if args.std == 'fixed':\n    agent.log_std.data.fill_(log_std)",
        "deviations = all_sum(normalize(batch.weights) @ agent.deviation(batch.dists)).tolist()",
        "scalars |= {f'policy/std_{i}': std for i, std in enumerate(deviations)}",
    ),
    ("ppo_continuous.py", "main"): (
        "if saved['args'].distribution != args.distribution:\n    "
        "fail(f\"--ref-checkpoint: its distribution is {saved['args'].distribution}\")",
        "if state['args'].distribution != args.distribution:\n    "
        "fail(f\"--{flag}: its distribution is {state['args'].distribution}\")",
    ),
    ("ppo_multidiscrete_mask.py", "make_envs"): ("envs = VectorMaskInfo(envs)",),
    ("ppo_multidiscrete_mask.py", "Rollout"): (
        "dtype = torch.uint8 if byte else torch.float32",
        "found = infos.get('action_mask', np.ones((n, sum(agent.nvec)), bool))",
        "self.masked = 'action_mask' in infos",
        "self.masks = np.repeat(np.asarray(found, bool)[None], rows, 0)",
        "self.allowed = torch.ones(rows, n, sum(agent.nvec), dtype=torch.bool, device=device)",
        "self.next_step = envs.metadata['autoreset_mode'] == AutoresetMode.NEXT_STEP",
        "masks = (torch.as_tensor(self.masks[:-1]), self.allowed[:-1])",
        "self.rows = [(*row, *pair) for row, *pair in zip(self.rows, *masks, strict=True)]",
    ),
    ("ppo_multidiscrete_mask.py", "collect"): (
        "rollout.masks[0], shape = (rollout.masks[-1], rollout.masks.shape[1:])",
        "chosen, heeded, scores = agent.act(obs, masks.to(obs.device), draw)",
        "allowed.copy_(heeded)",
        "if rollout.masked and -torch.inf in scores.flatten().tolist():\n"
        "    n, head = (scores == -torch.inf).nonzero()[0].tolist()\n"
        "    n += RANK * envs.num_envs\n    rollout.stuck = "
        "(t, f'the mask of environment {n} allows no choice of head {head}')\n    return",
        "if ('action_mask' in infos) != rollout.masked:\n    rollout.stuck = "
        "(t, 'there are masks after steps but not after resets, or the reverse,')\n    return",
        "if rollout.masked and np.shape(infos['action_mask']) != shape:\n    rollout.stuck = "
        "(t, f\"masks {np.shape(infos['action_mask'])} in place of {shape}\")\n    return",
        "keep_masks(rollout, t + 1, infos, terminated | truncated)",
    ),
    ("ppo_multidiscrete_mask.py", "Batch"): ("masks: Tensor",),
    ("ppo_multidiscrete_mask.py", "make_batch"): ("masks = rollout.allowed[:-1].flatten(0, 1)",),
    ("ppo_multidiscrete_mask.py", "train"): (
        "scalars |= {'policy/invalid_fraction': invalid_fraction(agent, rollout)}",
    ),
    ("ppo_multidiscrete_mask.py", "evaluate"): (
        "if rollout.masked and -torch.inf in (scores := scores.flatten().tolist()):\n"
        "    head = scores.index(-torch.inf)\n"
        "    fail(f'the mask of environment 0 allows no choice of head {head}', 1)",
        "keep_masks(rollout, -1, infos, terminated | truncated)",
    ),
    ("ppo_multidiscrete_mask.py", "main"): ("check_mask(one, args)",),
}
# Words of the script with masks, and what the others have in their place.
WORDS = {
    "Guard(flatten(MaskInfo(env)))": "Guard(flatten(env))",
    "obs: Tensor, masks: Tensor)": "obs: Tensor)",
    ", masks.split(rows))": ")",
    "(0, 1), rollout.allowed.flatten(0, 1))": "(0, 1))",
    "obs, rollout.allowed[-1, list(n)])": "obs)",
    "(reference, obs, masks)": "(reference, obs)",
    "        masks=masks,\n": "",
    "batch.obs, batch.masks)": "batch.obs)",
    "byte, n = space.dtype == np.uint8 and len(space.shape) == 3,": "dtype, n = torch.uint8 if "
    "agent.pixels else torch.float32,",
    "actions, masks, allowed)": "actions)",
    "actions.copy_(chosen)": "actions.copy_(agent.act(obs, draw))",
    "    if rollout.next_step:\n        rollout.valid": '    if envs.metadata["autoreset_mode"] == '
    "AutoresetMode.NEXT_STEP:\n        rollout.valid",
    "        masks = torch.as_tensor(rollout.masks[-1], device=rollout.obs.device)\n"
    "        actions, _, scores = agent.act(obs, masks, noise)\n": "        actions = "
    "agent.act(obs, noise)\n",
    "obs, reward, terminated, truncated, infos = attempt": "obs, reward, terminated, truncated, "
    "_ = attempt",
    "if len(obs_space.shape) == 3 and not state": "if is_pixels(obs_space) and not state",
}


def definitions(script: str) -> dict[str, str]:
    """{name: source} of a script's functions, methods, classes and constants, in their order."""
    text = (ROOT / script).read_text()
    if script == "ppo_multidiscrete_mask.py":
        for words, others in WORDS.items():
            assert words in text, words
            text = text.replace(words, others)
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
