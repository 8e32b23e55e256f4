"""Time of an iteration and its parts, of several versions of the scripts, in turn in one process.

    python tests/benchmarks/iteration.py --old CHECKOUT_OF_130f8f5          # all workloads
    python tests/benchmarks/iteration.py --old CHECKOUT_OF_130f8f5 --workloads masks --compile
    python tests/benchmarks/iteration.py --other CHECKOUT                   # beside your own edit

Every version works on the same task in turn, so that changes of the machine's speed meet all;
ratios of the medians repeat to about 0.03 where whole runs (speed.py) differ by 20%. Two versions
are made here, to show what two features cost: `raw Adam` calls the fused kernel in place of
`torch.optim.Adam.step`, and `raw modules` also calls the layers' functions in place of
`nn.Module.__call__`, so that hooks and subclasses of layers no longer work.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent.parent
MASKS = {"env_id": "tests.envs.invalid_actions:InvalidActionMultiDiscrete-v0"}
WORKLOADS = {  # script, flags, threads, iterations
    "cartpole": ("ppo_discrete", {}, 1, 60),
    "halfcheetah": ("ppo_continuous", {}, 1, 14),
    "masks": ("ppo_multidiscrete_mask", MASKS, 1, 50),
    "cartpole64": ("ppo_discrete", {"num_envs": 64, "vectorization": "native"}, 2, 60),
}


class RawSequential(nn.Sequential):
    """nn.Sequential whose layers are called as functions."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._modules.values():
            if isinstance(layer, nn.Linear):
                x = F.linear(x, *layer._parameters.values())
            else:
                x = layer.forward(x)
        return x

    __call__ = forward


class RawAdam:
    """The fused kernel of Adam without `torch.optim`."""

    def __init__(self, optimizer: torch.optim.Adam) -> None:
        self.param_groups = optimizer.param_groups
        self.params = [p for group in self.param_groups for p in group["params"]]
        self.averages = [torch.zeros_like(p) for p in self.params]
        self.squares = [torch.zeros_like(p) for p in self.params]
        self.steps = [torch.zeros(()) for _ in self.params]

    @torch.no_grad()
    def step(self) -> None:
        for steps in self.steps:
            steps += 1
        torch._fused_adam_(
            *(self.params, [p.grad for p in self.params], self.averages, self.squares, []),
            *(self.steps,), lr=2.5e-4, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-5,
            amsgrad=False, maximize=False,
        )  # fmt: skip


def load(root: Path, script: str) -> ModuleType:
    """The script of a checkout as a module, and its environments."""
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    name = f"{script}_{len(sys.path)}"
    spec = importlib.util.spec_from_file_location(name, root / f"{script}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parts_of(ppo: ModuleType, flags: dict, compiled: bool, raw: int) -> list[Callable]:
    """Functions for rollout, batch and update of the present version."""
    args = ppo.Args(compile=compiled, **flags)
    torch.manual_seed(1)
    envs = ppo.make_envs(args, args.num_envs, 1)
    agent = ppo.Agent(args, envs.single_observation_space, envs.single_action_space)
    if raw > 1:
        agent.trunk.__class__ = agent.actor.__class__ = agent.critic.__class__ = RawSequential
    rollout = ppo.Rollout(args, agent, envs, 1)
    vectors = []
    for is_critic in (False, True):
        named = agent.named_parameters()
        params = [p for name, p in named if name.startswith("critic") == is_critic]
        vectors.append(nn.Parameter(nn.utils.parameters_to_vector(params).detach()))
        nn.utils.vector_to_parameters(vectors[-1], params)
        vectors[-1].parts = params
    optimizer = torch.optim.Adam(vectors, lr=2.5e-4, eps=1e-5, fused=True)
    optimizer = RawAdam(optimizer) if raw else optimizer
    state = SimpleNamespace()

    def collect() -> None:
        rollout.collect(agent, envs)
        ppo.check_finite(0, reward=rollout.rewards, observation=rollout.obs)

    def make_batch() -> None:
        ppo.process_rewards(agent, rollout, args)
        state.batch, _ = ppo.make_batch(agent, None, rollout, args)

    def update() -> None:
        coefs = torch.tensor([0.01, 0.0])
        metrics = ppo.update(agent, optimizer, rollout, state.batch, args, coefs)
        state.metrics = {tag: float(value) for tag, value in metrics.items()}
        if agent.norm_obs:
            agent.obs_norm.add(state.batch["obs"][state.batch["loss_mask"] > 0])

    return [collect, make_batch, update]


def parts_of_130f8f5(ppo: ModuleType, flags: dict, compiled: bool) -> list[Callable]:
    """The same of commit 130f8f5."""
    args = ppo.Args(compile=compiled, **flags)
    torch.manual_seed(1)
    envs = ppo.open_envs(args, args.num_envs, 1)
    agent = ppo.Agent(args, envs.single_observation_space, envs.single_action_space)
    optimizer, rollout = ppo.Adam(agent, args), ppo.Rollout(args, agent, envs, 1)
    ppo.schedule(optimizer, args, 0, 1000)
    state = SimpleNamespace()

    def collect() -> None:
        ppo.collect(agent, envs, rollout, [])
        ppo.find_broken(rollout, 0)
        ppo.finished_episodes(rollout)

    def make_batch() -> None:
        rollout.signals = ppo.learning_signals(agent, rollout, args)
        state.batch = ppo.make_batch(agent, None, rollout, args)

    def update() -> None:
        coefs = [1.0, args.vf_coef, -0.01, 0.0, 0.0]
        metrics = ppo.update(agent, optimizer, rollout, state.batch, args, coefs, False)
        ppo.describe(state.batch, rollout.values, metrics, agent.value_norm)
        if agent.norm_obs:
            agent.obs_norm.advance(state.batch.obs[state.batch.weights > 0])

    return [collect, make_batch, update]


def measure(workload: str, compiled: bool, old: Path | None, other: Path | None) -> None:
    """Time a workload and print the medians, and their ratios to those of the first version."""
    script, flags, threads, iterations = WORKLOADS[workload]
    torch.set_num_threads(threads)
    torch._dynamo.config.trace_autograd_ops = compiled
    versions = {}
    if old:
        versions["130f8f5"] = parts_of_130f8f5(load(old, script), flags, compiled)
    if other:
        versions["other"] = parts_of(load(other, script), flags, compiled, 0)
    for raw, name in enumerate(("now", "raw Adam", "raw modules")):
        versions[name] = parts_of(load(ROOT, script), flags, compiled, raw)
    times = {name: [] for name in versions}
    for iteration in range(iterations + 3):
        order = list(versions) if iteration % 2 else list(versions)[::-1]
        for name in order:
            marks = [time.perf_counter()]
            for part in versions[name]:
                part()
                marks.append(time.perf_counter())
            if iteration >= 3:
                times[name].append(np.diff(marks))
    first = None
    for name in versions:
        parts = 1e3 * np.median(times[name], 0)
        parts = np.append(parts, parts.sum())
        first = parts if first is None else first
        columns = zip(("collect", "batch", "update", "total"), parts, first / parts, strict=True)
        cells = " ".join(f"{what} {ms:7.2f} ms ({ratio:.2f})" for what, ms, ratio in columns)
        print(f"{workload} {'compiled' if compiled else 'eager'} {name}: {cells}", flush=True)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--old", type=Path, help="checkout of commit 130f8f5")
    parser.add_argument("--other", type=Path, help="checkout of a version with the same functions")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    for workload in args.workloads:
        measure(workload, args.compile, args.old, args.other)


if __name__ == "__main__":
    main()
