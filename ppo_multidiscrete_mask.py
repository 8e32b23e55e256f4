"""Proximal Policy Optimization for multi-discrete actions with masks, in one file.

train      python ppo_multidiscrete_mask.py --env-id Taxi-v4 --seed 2
compare    tensorboard --logdir runs
resume     python ppo_multidiscrete_mask.py --resume runs/RUN [--total-timesteps 4000000]
evaluate   python ppo_multidiscrete_mask.py --eval runs/RUN --eval-episodes 20 [--capture-video]
scale out  torchrun --nproc-per-node 4 ppo_multidiscrete_mask.py --num-envs 32

Where to edit: networks and distribution in `Agent`, the objective in `ppo_loss`, environments and
their preprocessing in `make_env`, the default environment in `TaxiDispatch`, learning rates in
`schedule`. A copy runs under any name.

Shapes: T = num_steps, N = num_envs of this process, B = T * N rows of a rollout, K =
num_minibatches, M = B / K rows of a minibatch, O and A = shapes of an observation and of an
action, D = numbers that describe a distribution (here one log-prob a choice). An action is
one choice by each of H heads, whose choices stand side by side, D = sum(nvec); the first head has
F of them.
"""

import contextlib
import ctypes
import gc
import importlib
import io
import json
import multiprocessing.connection
import os
import random
import re
import signal
import sys
import threading
import time
import traceback
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from inspect import getsource
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports: no traceback
    gc.disable()  # imports make much that lasts, and nothing that does not

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, distributed, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm


def or_none(kind: type) -> tyro.constructors.PrimitiveConstructorSpec:
    """How the command line spells a value of this type, or the word none."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{kind.__name__.upper()}|none",
        instance_from_str=lambda words: None if words[0].lower() == "none" else kind(words[0]),
        is_instance=lambda value: value is None or isinstance(value, (int, kind)),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


FloatOrNone = Annotated[float | None, or_none(float)]
StrOrNone = Annotated[str | None, or_none(str)]


@dataclass
class Args:
    # runs
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's directory"""
    seed: int = 1
    """seed of networks, actions, minibatches and environments"""
    torch_deterministic: bool = True
    """deterministic cuDNN kernels"""
    cuda: bool = True
    """use the GPU if there is one"""
    capture_video: bool = False
    """record the first environment into RUN/videos (needs moviepy)"""
    run_dir: str = "runs/{env}__{exp}__{seed}__{time}"
    """directory of the run; the names in braces are filled in"""
    progress: bool = True
    """show the progress bar"""
    checkpoint_every: int = 100
    """iterations between checkpoints; 0: only at the end"""
    resume: StrOrNone = None
    """go on with this run (directory or checkpoint) under its own flags, but for those given"""
    eval: StrOrNone = None
    """evaluate this run (directory or checkpoint) instead of training"""
    eval_episodes: int = 10
    """episodes of an evaluation"""
    eval_deterministic: bool = True
    """evaluate the most probable action instead of a sampled one"""
    # environment
    env_id: str = "TaxiDispatch-v0"
    """Gymnasium id; `module:Id` imports the module first; the default is in this file"""
    env_kwargs: str = "{}"
    """JSON object of keyword arguments for the environment"""
    vectorization: Literal["sync", "async", "native", "envpool"] = "sync"
    """one process, a process each, the environment's own vector version, or envpool's"""
    num_envs: int = 8
    """environments that are stepped side by side, of all processes"""
    num_steps: int = 128
    """steps of every environment in a rollout"""
    total_timesteps: int = 2_000_000
    """environment steps of the whole run"""
    episodic_life: bool = True
    """Atari: a lost life ends the chain of rewards, the game goes on"""
    sign_reward: bool = True
    """Atari: learn from the sign of the reward"""
    # network
    hidden_sizes: tuple[int, ...] = (64, 64)
    """widths of the hidden layers; pixels and planes use a CNN instead"""
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "tanh"
    """activation between the layers; a CNN has relu"""
    ortho_init: bool = True
    """orthogonal weights and zero biases instead of PyTorch's initialisation"""
    shared_network: bool = False
    """one trunk under policy and value instead of two networks; pixels, planes: on"""
    # distribution
    mask: Literal["none", "independent", "conditional"] = "conditional"
    """masks that the policy heeds: none, what independent heads can know, or each first choice's"""
    # normalisers
    norm_obs: bool = False
    """standardise observations, but for pixels, by running statistics"""
    clip_obs: FloatOrNone = 10.0
    """standardised observations are clipped to plus or minus this"""
    norm_reward: bool = False
    """divide rewards by the running deviation of the discounted return"""
    clip_reward: FloatOrNone = 10.0
    """normalised rewards are clipped to plus or minus this"""
    norm_value: Literal["none", "running", "popart"] = "none"
    """the critic predicts standardised targets; popart also rescales its last layer with them"""
    norm_adv: bool = True
    """standardise advantages"""
    norm_adv_scope: Literal["minibatch", "batch"] = "minibatch"
    """rows whose mean and deviation standardise the advantages"""
    # targets
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    value_target: Literal["gae", "mc", "td"] = "gae"
    """advantage plus value, discounted return, or one step and the next value"""
    recompute_advantages: bool = False
    """advantages and targets anew from the current critic before every epoch"""
    bootstrap_truncated: bool = True
    """a truncated episode goes on with V(final observation); off: it counts as terminated"""
    # policy loss
    clip_coef: FloatOrNone = 0.1
    """clip of the probability ratio; none: unclipped"""
    dual_clip_coef: FloatOrNone = None
    """floor of the surrogate, in advantages, where the advantage is negative (above 1)"""
    kl_coef: float = 0.0
    """beta of the penalty beta * KL(old, new); its first value with kl-target (0: starts at 1)"""
    kl_target: FloatOrNone = None
    """KL after an update that beta aims at: it doubles above 1.5 x this, halves below this / 1.5"""
    target_kl: FloatOrNone = None
    """an epoch whose mean approximate KL is above this is the policy's last"""
    ref_checkpoint: StrOrNone = None
    """checkpoint of a reference policy"""
    ref_kl_coef: float = 0.0
    """weight of KL(policy, reference)"""
    # value loss
    vf_coef: float = 0.5
    """weight of the value loss"""
    clip_vloss: bool = True
    """larger of the losses with and without the value clipped around the old one"""
    vclip_coef: FloatOrNone = None
    """clip of the value, in standardised units with norm-value; none: clip-coef"""
    value_loss: Literal["mse", "huber"] = "mse"
    """half the squared error, or that with linear tails"""
    # entropy
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    ent_coef_final: FloatOrNone = None
    """its value in the last iteration, linear between; none: constant"""
    # optimiser
    learning_rate: float = 2.5e-4
    """learning rate of Adam"""
    actor_learning_rate: FloatOrNone = None
    """learning rate of policy and trunk; none: learning-rate"""
    critic_learning_rate: FloatOrNone = None
    """learning rate of the critic; none: learning-rate"""
    anneal_lr: bool = True
    """learning rates fall linearly to zero"""
    adam_eps: float = 1e-5
    """epsilon of Adam"""
    actor_adam_eps: FloatOrNone = None
    """epsilon of policy and trunk; none: adam-eps"""
    critic_adam_eps: FloatOrNone = None
    """epsilon of the critic; none: adam-eps"""
    max_grad_norm: FloatOrNone = 0.5
    """norm to which the gradient is clipped; none: unclipped"""
    num_minibatches: int = 4
    """minibatches an epoch, to each of which every process gives a part"""
    update_epochs: int = 4
    """epochs over every rollout"""
    critic_epochs: int = 0
    """further epochs that train the critic alone"""
    critic_warmup_iterations: int = 0
    """first iterations that train the critic alone"""
    # speed
    compile: bool = False
    """compile loss and gradient into one graph (torch.compile; takes some 20 s at the start)"""
    torch_threads: int = 1
    """threads of PyTorch on the CPU"""


PIXEL_DEFAULTS = dict(shared_network=True)
ACTIVATIONS = dict(tanh=nn.Tanh, relu=nn.ReLU, elu=nn.ELU, gelu=nn.GELU, silu=nn.SiLU)
RANGES = {  # smallest and largest value of the flags
    (1, 2**31): "num_envs num_steps num_minibatches update_epochs eval_episodes",
    (1, 1024): "torch_threads",
    (0, 2**31): "seed checkpoint_every critic_epochs critic_warmup_iterations",
    (0, 1): "gamma gae_lambda",
    (0, 1e9): "ent_coef ent_coef_final vf_coef kl_coef ref_kl_coef learning_rate "
    "actor_learning_rate critic_learning_rate",
    (1e-12, 1e9): "clip_coef vclip_coef kl_target target_kl max_grad_norm clip_obs clip_reward "
    "adam_eps actor_adam_eps critic_adam_eps",
    (1.000001, 1e9): "dual_clip_coef",
}
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
OTHER_SCRIPTS = {"Box": "ppo_continuous.py"}


def fail(message: object, code: int = 2, alone: bool = False) -> NoReturn:
    """End the process with one line: 2 for a wrong flag, 1 for a run that cannot go on.

    Of torchrun's processes on a machine the first one prints it, unless it befell this one alone.
    """
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(f"error: {' '.join(str(message).split())}", sys.stderr)
    raise SystemExit(code)


def parse_args(default: Args | None = None) -> Args:
    """Flags of the command line over `default`; comments in `Args` become headings of --help."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            args = tyro.cli(Args, default=default, description="")
    except SystemExit as stop:
        text = out.getvalue()
        if stop.code:
            fail(re.split("-{20,}", text)[1])
        for title, field in re.findall(r"    # (.+)\n    (\w+):", getsource(Args)):
            flag = field.replace("_", "-")
            text = re.sub(rf"(?m)^  --{flag}(?=[ ,])", rf"\n {title}\n\g<0>", text)
        print(f"{__doc__}\n{text}")
        raise
    for name, value in vars(args).items():
        if value == "":
            fail(f"--{name.replace('_', '-')}: is empty")
    return args


def check_args(args: Args) -> None:
    """Refuse flags that no run could follow."""
    for (low, high), names in RANGES.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not low <= value <= high:
                fail(f"--{name.replace('_', '-')} {value}: must lie between {low} and {high}")
    steps = args.num_envs * args.num_steps
    rollout = f"the {steps} steps of a rollout (num-envs x num-steps)"
    if args.total_timesteps < steps:
        fail(f"--total-timesteps {args.total_timesteps}: fewer than {rollout}")
    if args.num_envs % PROCESSES:
        fail(f"--num-envs {args.num_envs}: must be divisible among {PROCESSES} processes")
    if steps // PROCESSES % args.num_minibatches:
        share = f", {steps // PROCESSES} a process" if PROCESSES > 1 else ""
        fail(f"--num-minibatches {args.num_minibatches}: must divide {rollout}{share}")
    if min(args.hidden_sizes, default=1) < 1:
        fail(f"--hidden-sizes {args.hidden_sizes}: must all be 1 or more")
    if args.ref_kl_coef and not args.ref_checkpoint:
        fail(f"--ref-kl-coef {args.ref_kl_coef}: needs --ref-checkpoint")
    if args.eval and PROCESSES > 1:
        fail(f"--eval {args.eval}: runs in one process, not in {PROCESSES}")
    if args.capture_video and args.vectorization in ("native", "envpool"):
        fail(f"--capture-video: needs --vectorization sync or async, not {args.vectorization}")


# ---- environments


def is_pixels(space: spaces.Space) -> bool:
    """Whether the Nature CNN can read it: bytes in three dimensions, 36 x 36 or larger."""
    return space.dtype == np.uint8 and len(space.shape) == 3 and sorted(space.shape)[1] >= 36


def is_flat(space: spaces.Space) -> bool:
    """Whether the networks can read it as it is."""
    return isinstance(space, spaces.Box) and len(space.shape) in (1, 3)


class TaxiDispatch(gym.Env):
    """Taxis of Gymnasium's Taxi-v4, of which every step moves one, until all have delivered.

    Actions are (taxi, move). Observations [K * 16]: for each taxi row, column and pad to go to,
    one-hot, and whether the passenger is aboard, and delivered. Rewards are those of the taxi
    that moves, over 20: -0.05 a step, 1 for a delivery. The mask [K, 1 + 6] allows taxis that
    have not delivered, and what would change their states; picking up or dropping off elsewhere,
    without the mask, costs 0.5.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, taxis: int = 2, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.taxis = [gym.make("Taxi-v4", render_mode=render_mode).unwrapped for _ in range(taxis)]
        self.observation_space = spaces.Box(0, 1, (16 * taxis,))
        self.action_space = spaces.MultiDiscrete([taxis, 6])

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Every taxi and passenger somewhere else."""
        super().reset(seed=seed)
        for taxi in self.taxis:
            taxi.np_random = self.np_random
            taxi.reset()
        self.steps, self.delivered = 0, np.zeros(len(self.taxis), bool)
        return self.look()

    def step(self, action: np.ndarray) -> tuple:
        """Move one taxi; one that has delivered stays, and the step is lost."""
        (taxi, move), reward = action, -1
        if not self.delivered[taxi]:
            _, reward, self.delivered[taxi], _, _ = self.taxis[taxi].step(move)
        self.steps += 1
        obs, info = self.look()
        late = self.steps >= 200 * len(self.taxis)
        return obs, reward / 20, bool(self.delivered.all()), late, info

    def look(self) -> tuple[np.ndarray, dict]:
        """Observation and info of the present state."""
        obs = np.zeros((len(self.taxis), 16), np.float32)
        mask = np.zeros((len(self.taxis), 7), bool)
        for i, taxi in enumerate(self.taxis):
            row, column, passenger, destination = taxi.decode(taxi.s)
            aboard = passenger == len(taxi.locs)
            pad = destination if aboard else passenger
            obs[i, [row, 5 + column, 10 + pad]], obs[i, 14] = 1, aboard
            mask[i, 1:] = taxi.action_mask(taxi.s)
        obs[:, 15], mask[:, 0] = self.delivered, ~self.delivered
        return obs.flatten(), {"action_mask": mask}

    def render(self) -> np.ndarray:
        """The taxis' maps side by side, [height, width, 3]."""
        return np.hstack([taxi.render() for taxi in self.taxis])


gym.register("TaxiDispatch-v0", TaxiDispatch)


def move_mask(env: Any, obs: Any, info: dict) -> tuple[Any, dict]:
    """Observation without a mask, and info with it, from where the environment keeps it."""
    if env.keys:
        info = info | {"action_mask": obs["action_mask"]}
        obs = {key: obs[key] for key in env.keys}
        return (obs if len(env.keys) > 1 else obs[env.keys[0]]), info
    mask = env.method() if env.method else info.get("action_mask")
    if mask is None:
        return obs, info
    mask = np.concatenate(mask) if isinstance(mask, tuple) else np.asarray(mask)
    info["action_mask"] = mask
    return obs, info


def keys_beside_mask(space: spaces.Space) -> list[str]:
    """Keys of a Dict that has a mask among others."""
    if not isinstance(space, spaces.Dict) or "action_mask" not in space.spaces:
        return []
    keys = [key for key in space if key != "action_mask"]
    if not keys:
        raise ValueError("a Dict observation needs something beside the action_mask")
    return keys


def without_mask(space: spaces.Dict, keys: list[str]) -> spaces.Space:
    """The Dict of these keys, or what the only one stands for."""
    return spaces.Dict({key: space[key] for key in keys}) if len(keys) > 1 else space[keys[0]]


class MaskInfo(gym.Wrapper):
    """Puts a mask from `action_masks()` or a Dict observation into info["action_mask"]."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.method = None
        if env.has_wrapper_attr("action_masks"):
            self.method = env.get_wrapper_attr("action_masks")
        self.keys = keys_beside_mask(env.observation_space)
        if self.keys:
            self.observation_space = without_mask(env.observation_space, self.keys)

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        """Observation without the mask, info with it."""
        return move_mask(self, *self.env.reset(**kwargs))

    def step(self, action: Any) -> tuple:
        """The same, after a step."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        obs, info = move_mask(self, obs, info)
        return obs, reward, terminated, truncated, info


class VectorMaskInfo(gym.vector.VectorWrapper):
    """`MaskInfo` for environments that are vectors by themselves."""

    def __init__(self, envs: VectorEnv) -> None:
        super().__init__(envs)
        self.method = getattr(envs, "action_masks", None)
        self.keys = keys_beside_mask(envs.single_observation_space)
        if self.keys:
            single, many = envs.single_observation_space, envs.observation_space
            self.single_observation_space = without_mask(single, self.keys)
            self.observation_space = without_mask(many, self.keys)

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        """Observations without the masks, infos with them."""
        return move_mask(self, *self.env.reset(**kwargs))

    def step(self, actions: np.ndarray) -> tuple:
        """The same, after a step."""
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        obs, infos = move_mask(self, obs, infos)
        for n in np.flatnonzero(infos.get("_final_obs", False)):
            infos["final_obs"][n], _ = move_mask(self, infos["final_obs"][n], {})
        return obs, rewards, terminated, truncated, infos


class FireReset(gym.Wrapper):
    """Presses FIRE at the start of an Atari game that waits for it."""

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        """Observation and info after the first FIRE."""
        self.env.reset(**kwargs)
        obs, _, _, _, info = self.env.step(1)
        return obs, info


INFOS = {"environment_failure", "lives", "action_mask"}  # that training reads


class Guard(gym.Wrapper):
    """Turns an error of the environment into info["environment_failure"], which ends the run."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.shape = env.observation_space.shape

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        """Observation and info, or zeros and the failure."""
        try:
            obs, info = self.env.reset(**kwargs)
            return self.checked(obs), info
        except (Exception, SystemExit) as error:
            return self.failed(error)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """What the environment returns, or zeros and the failure."""
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            return self.checked(obs), float(reward), terminated, truncated, info
        except (Exception, SystemExit) as error:
            obs, info = self.failed(error)
            return obs, 0.0, False, False, info

    def checked(self, obs: np.ndarray) -> np.ndarray:
        """The observation, if it has the shape of its space."""
        if obs.shape != self.shape:
            raise ValueError(f"observation {obs.shape} in place of {self.shape}")
        return obs

    def failed(self, error: BaseException) -> tuple[np.ndarray, dict]:
        """Zeros for an observation, and what went wrong where."""
        place = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
        space = self.observation_space
        return np.zeros(space.shape, space.dtype), {"environment_failure": why}


class OneHot(gym.ObservationWrapper):
    """Discrete and MultiDiscrete observations as Gymnasium flattens them, in less time."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        space = env.observation_space
        self.observation_space = spaces.flatten_space(space)
        sizes = np.asarray(space.n if isinstance(space, spaces.Discrete) else space.nvec)
        self.places = (sizes.cumsum() - sizes.ravel()).reshape(sizes.shape) - space.start
        self.zeros = np.zeros(self.observation_space.shape, self.observation_space.dtype)

    def observation(self, obs: Any) -> np.ndarray:
        """Zeros, but for a one for each number."""
        row = self.zeros.copy()
        row[self.places + obs] = 1
        return row


def flatten(env: gym.Env) -> gym.Env:
    """The environment with observations that the networks can read."""
    if is_flat(env.observation_space):
        return env
    if isinstance(env.observation_space, spaces.Discrete | spaces.MultiDiscrete):
        return OneHot(env)
    return gym.wrappers.FlattenObservation(env)


def make_env(args: Args, video_dir: str | None = None) -> gym.Env:
    """One environment whose observations are vectors or pixels.

    Atari is preprocessed as in "The 37 Implementation Details of PPO" (Huang et al. 2022), except
    that lost lives and signs of rewards are left to `learning_signals`.
    """
    if multiprocessing.parent_process():  # a signal to all is for the training process to handle
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    kwargs = json.loads(args.env_kwargs)
    atari = is_atari(args)
    if atari:
        kwargs["frameskip"] = 1
    if video_dir:
        importlib.import_module("moviepy")
        kwargs["render_mode"] = "rgb_array"
    env = gym.make(args.env_id, **kwargs)
    if video_dir:
        env.reset()
        env.render()  # what cannot be drawn fails here, before anything is written
        wanted = (lambda episode: episode < args.eval_episodes) if args.eval else None
        prefix = "eval" if args.eval else "train"
        env = gym.wrappers.RecordVideo(env, video_dir, wanted, name_prefix=prefix)
    if atari:
        env = gym.wrappers.AtariPreprocessing(env)
        if env.unwrapped.get_action_meanings()[1] == "FIRE":
            env = FireReset(env)
        env = gym.wrappers.FrameStackObservation(env, 4)
    return Guard(flatten(MaskInfo(env)))


def is_atari(args: Args) -> bool:
    """Whether it is one of ale-py's environments, which this registers."""
    atari = "ALE/" in args.env_id or "NoFrameskip" in args.env_id
    if atari:
        gym.register_envs(importlib.import_module("ale_py"))
    return atari


class SyncEnvs(SyncVectorEnv):
    """Gymnasium's, with a faster step that resets in the same step and reads few infos."""

    def step(self, actions: np.ndarray) -> tuple:
        """Arrays that the next step writes over, and infos of INFOS alone."""
        infos, given = {}, []
        for n, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            obs, self._rewards[n], terminated, truncated, info = env.step(action)
            self._terminations[n], self._truncations[n] = terminated, truncated
            if terminated or truncated:
                infos = self._add_info(infos, {"final_obs": np.array(obs)}, n)
                obs, info = env.reset()
            self._observations[n] = obs
            given.append(info)
        for key in INFOS.intersection(chain(*given)):
            blank = np.zeros_like(next(info[key] for info in given if key in info))
            infos[key] = np.array([info.get(key, blank) for info in given])
            infos[f"_{key}"] = np.array([key in info for info in given])
        return self._observations, self._rewards, self._terminations, self._truncations, infos


def make_envs(args: Args, num_envs: int, seed: int, video_dir: str | None = None) -> VectorEnv:
    """`num_envs` environments side by side that reset in the same or in the next step."""
    if args.vectorization in ("sync", "async"):
        fns = [partial(make_env, args, None if i else video_dir) for i in range(num_envs)]
        if args.vectorization == "sync":
            return SyncEnvs(fns, copy=False, autoreset_mode="SameStep")
        return AsyncVectorEnv(fns, copy=False, autoreset_mode="SameStep", context="forkserver")
    kwargs = json.loads(args.env_kwargs)
    if args.vectorization == "envpool":
        envpool = importlib.import_module("envpool")
        envs = envpool.make_gymnasium(args.env_id, num_envs=num_envs, seed=seed, **kwargs)
    else:
        if is_atari(args):
            kwargs = {"frameskip": 4, "reward_clipping": False} | kwargs
        envs = gym.make_vec(args.env_id, num_envs, "vector_entry_point", **kwargs)
    mode = envs.metadata.get("autoreset_mode")
    if mode not in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
        raise ValueError(f"autoreset mode {mode}; it must be SAME_STEP or NEXT_STEP")
    envs = VectorMaskInfo(envs)
    if is_flat(envs.single_observation_space):
        return envs
    envs, single = gym.vector.VectorWrapper(envs), envs.single_observation_space
    envs.observation_space = batch_space(single, num_envs)  # envpool's is the single one
    return gym.wrappers.vector.FlattenObservation(envs)


class EnvironmentFailure(Exception):
    """An environment raised an error, or its process ended."""


def attempt(envs: VectorEnv, call: Callable, *args: Any, **kwargs: Any) -> tuple:
    """What `envs.step` or `envs.reset` returns; names the environment that fails."""
    first = RANK * envs.num_envs
    try:
        result = call(*args, **kwargs)
    except Exception as error:
        message, workers = str(error) or repr(error), getattr(envs.unwrapped, "processes", ())
        if isinstance(error, EOFError | OSError):
            gone = multiprocessing.connection.wait([worker.sentinel for worker in workers], 5)
            numbers = [n for n, worker in enumerate(workers, first) if worker.sentinel in gone]
            message = f"the process of environment {numbers[0]} ended" if gone else message
        raise EnvironmentFailure(message) from error
    if "environment_failure" in result[-1]:
        failures = result[-1]["environment_failure"]
        n = np.flatnonzero(result[-1]["_environment_failure"])[0]
        raise EnvironmentFailure(f"environment {first + n}: {failures[n]}")
    return result


def close(envs: VectorEnv, kill: bool) -> None:
    """Close environments; `kill` their processes where some may be gone or busy."""
    if kill and (workers := getattr(envs.unwrapped, "processes", ())):
        for worker in workers:
            worker.kill()
        envs.unwrapped.closed = True  # for nothing is left that could answer
    with contextlib.suppress(Exception):
        envs.close()


# ---- statistics


def talk(call: Callable, *args: Any, **kwargs: Any) -> None:
    """Have all processes make a collective call; ends the run if one of them has ended."""
    try:
        call(*args, **kwargs)
    except RuntimeError as error:
        fail(f"cannot reach the other processes: {error}", 1, alone=True)


def add_up(values: Tensor) -> None:
    """all_reduce; on the CPU in pairs where 2, 4, 8, ... processes run: half of gloo's time for it.

    After the round of a bit, all whose ranks differ in lower bits alone, or in it, have one sum.
    """
    if values.is_cuda or PROCESSES & (PROCESSES - 1):
        distributed.all_reduce(values)
        return
    theirs, bit = torch.empty_like(values), 1
    while bit < PROCESSES:
        partner, bit = RANK ^ bit, 2 * bit
        for request in (distributed.irecv(theirs, partner), distributed.isend(values, partner)):
            request.wait()
        values += theirs


def all_sum(values: Tensor) -> Tensor:
    """Add up the values of all processes, in place."""
    if PROCESSES > 1:
        talk(add_up, values)
    return values


def gather(value: Any) -> list[Any]:
    """Every process's value, in the order of their ranks."""
    values = [value] * PROCESSES
    if PROCESSES > 1:
        talk(distributed.all_gather_object, values, value)
    return values


def together(what: str, code: int, call: Callable, *args: Any) -> Any:
    """Call it in all processes; if it fails in any, all end with this code and one line."""
    result, why = None, []
    try:
        result = call(*args)
    except (EnvironmentFailure, OSError) as error:
        why.append(f"{what}{error}")
    if failures := list(chain(*gather(why))):
        fail(failures[0], code)
    return result


def share_cores() -> None:
    """Keep each of a machine's processes to cores of its own, and gloo's thread from its work.

    Left alone, two processes may share a core while another is idle; and the thread that listens
    for gloo spins when others are early.
    """
    cores, count = sorted(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    share, first = len(cores) // count, int(os.environ.get("LOCAL_RANK", 0))
    own = cores[first * share : (first + 1) * share]
    apart = all(others == cores for others in gather(cores))  # if not, somebody has seen to it
    for thread in Path("/proc/self/task").iterdir():
        if apart and own:
            os.sched_setaffinity(int(thread.name), own)
        if (thread / "comm").read_text() == "gloo_tcp_loop\n":
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


def join_processes(agent: nn.Module, seed: int) -> None:
    """Meet the other processes of torchrun; then agents are equal, and random numbers are not."""
    device = agent.obs_norm.mean.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    waiting = (signal.SIGINT, signal.SIGTERM)  # which would wait until the others have come
    handlers = [signal.signal(signum, signal.SIG_DFL) for signum in waiting]
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, *_ = next(distributed.rendezvous("env://"))
    store = distributed.PrefixStore(restart, store)  # it holds what came before a restart
    backend = "nccl" if device.type == "cuda" else "gloo"
    talk(distributed.init_process_group, backend, store=store, rank=RANK, world_size=PROCESSES)
    for tensor in agent.state_dict().values():
        talk(distributed.broadcast, tensor, 0)
    if sys.platform == "linux" and device.type == "cpu":
        share_cores()
    for signum, handler in zip(waiting, handlers, strict=True):
        signal.signal(signum, handler)
    if RANK > 0:
        torch.manual_seed(seed)


class RunningMeanStd(nn.Module):
    """Running mean and standard deviation of all rows given to `advance`.

    Merged as by Chan et al. (1979) in float64, with an int64 count. `mean` and `std`, which
    normalise, are float32 copies, and 0 and 1 before the first rows.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("centre", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    @torch.no_grad()
    def advance(self, rows: Tensor) -> None:
        """Take in rows [n, *shape] of every process."""
        rows, n = rows.double(), all_sum(torch.full_like(self.count, len(rows)))
        if n == 0:
            return
        mean = all_sum(rows.sum(0)) / n
        total, delta = self.count + n, mean - self.centre
        self.squares += all_sum((rows - mean).square().sum(0)) + delta**2 * self.count * n / total
        self.centre += delta * n / total
        self.count += n
        self.mean.copy_(self.centre)
        self.std.copy_((self.squares / self.count + 1e-8).sqrt())

    def normalize(self, rows: Tensor) -> Tensor:
        """Rows [..., *shape] less the mean, over the deviation."""
        return (rows - self.mean) / self.std


# ---- Agent


class Chain(nn.Sequential):
    """nn.Sequential without hooks, and so without half the time of a small network."""

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the last layer."""
        for layer in self._modules.values():
            if isinstance(layer, nn.Linear):
                x = F.linear(x, *layer._parameters.values())
            else:
                x = layer.forward(x)
        return x

    __call__ = forward


MASKED = -1e8  # logit of what a mask forbids; -inf would make the gradient NaN


class Agent(nn.Module):
    """Policy and value networks and the normalisers that go with them."""

    def __init__(self, args: Args, obs_space: spaces.Box, action_space: spaces.Space) -> None:
        super().__init__()
        shape, self.pixels = obs_space.shape, is_pixels(obs_space)
        self.planes = len(shape) == 3 and not self.pixels  # H x W x C, or C x H x W where H = W
        self.channels_last = len(shape) == 3 and shape[-1] < shape[0]
        if self.planes:
            self.channels_last = shape[0] == shape[1] or shape[1] != shape[2]
            bound = float(np.abs((obs_space.low, obs_space.high)).max())
            self.scale = bound if 0 < bound <= 255 and not args.norm_obs else 1.0
        self.clip_obs, self.norm_obs = args.clip_obs, args.norm_obs and not self.pixels
        one_head = isinstance(action_space, spaces.Discrete)
        self.nvec = np.ravel(action_space.n if one_head else action_space.nvec).tolist()
        self.action_shape, self.action_dtype = (len(self.nvec),), torch.int64
        self.first_action, self.space_shape = np.ravel(action_space.start), action_space.shape
        offsets, self.mask = torch.tensor([0, *self.nvec[:-1]]).cumsum(0), args.mask
        self.register_buffer("offsets", offsets, persistent=False)  # of the heads in D
        # places of each head's choices, the last one again up to the widest head's number
        widest = torch.arange(max(self.nvec)).minimum(torch.tensor(self.nvec).unsqueeze(1) - 1)
        places = (offsets.unsqueeze(1) + widest).flatten()
        self.register_buffer("places", places, persistent=False)
        # score of what a mask forbids
        self.register_buffer("never", torch.tensor(-torch.inf), persistent=False)
        self.obs_norm = RunningMeanStd(() if self.pixels else shape)
        self.reward_norm, self.value_norm = RunningMeanStd(), RunningMeanStd()

        def init(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
            if args.ortho_init:
                nn.init.orthogonal_(layer.weight, gain)
                nn.init.zeros_(layer.bias)
            return layer

        def body() -> list[nn.Module]:
            if len(shape) == 1:
                sizes, activate = (*shape, *args.hidden_sizes), ACTIVATIONS[args.activation]
                return [m for pair in pairwise(sizes) for m in (init(nn.Linear(*pair)), activate())]
            frame = self.preprocess(torch.zeros(1, *shape))
            if self.planes:
                conv = [init(nn.Conv2d(frame.shape[1], 16, 3, 2, padding=1)), nn.ReLU()]
                conv += [init(nn.Conv2d(16, 32, 3, 2, padding=1)), nn.ReLU(), nn.Flatten()]
                size = nn.Sequential(*conv)(frame).shape[1]
                return [*conv, init(nn.Linear(size, 256)), nn.ReLU()]
            conv = [init(nn.Conv2d(frame.shape[1], 32, 8, 4)), nn.ReLU()]
            conv += [init(nn.Conv2d(32, 64, 4, 2)), nn.ReLU()]
            conv += [init(nn.Conv2d(64, 64, 3, 1)), nn.ReLU(), nn.Flatten()]
            return [*conv, init(nn.Linear(nn.Sequential(*conv)(frame).shape[1], 512)), nn.ReLU()]

        width = (*shape, *args.hidden_sizes)[-1]
        width = 512 if self.pixels else 256 if self.planes else width
        trunk, actor, critic = (body(), [], []) if args.shared_network else ([], body(), body())
        self.trunk = Chain(*trunk)
        self.actor = Chain(*actor, init(nn.Linear(width, sum(self.nvec)), 0.01))
        self.critic = Chain(*critic, init(nn.Linear(width, 1), 1.0))

    def preprocess(self, obs: Tensor) -> Tensor:
        """Observations [n, *O] as the networks read them."""
        if self.pixels:
            obs = obs.movedim(-1, 1) if self.channels_last else obs
            return obs.to(torch.float32, memory_format=torch.channels_last) / 255.0
        if self.norm_obs:
            obs = self.obs_norm.normalize(obs)
            obs = obs if self.clip_obs is None else obs.clamp(-self.clip_obs, self.clip_obs)
        if self.planes:
            return (obs.movedim(-1, 1) if self.channels_last else obs) / self.scale
        return obs

    def heed(self, masks: Tensor) -> Tensor:
        """What the policy is to know of masks [n, D] or, by first choice, [n, F, 1 + D - F]."""
        if self.mask == "none":
            return masks.new_ones(len(masks), sum(self.nvec))
        if self.mask == "independent" and masks.dim() == 3:
            first, rest = masks[..., 0], masks[..., 1:] & masks[..., :1]
            return torch.cat((first, rest.any(1)), -1)
        return masks

    def path(self, masks: Tensor, first: Tensor) -> Tensor:
        """Masks [n, D] of all heads once the first head has chosen [n]."""
        if masks.dim() == 2:
            return masks
        rows = torch.arange(len(first), device=first.device)
        return torch.cat((masks[..., 0], masks[rows, first, 1:]), -1)

    def act(self, obs: Tensor, masks: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
        """Actions [n, H] for observations [n, *O], drawn with `noise`; without it the mode.

        With them the masks [n, D] that the heads were under (`masks` are the environment's), and
        what each head's choice scored [n, H]: -inf where its mask allows none.
        """
        logits, masks = self.actor(self.trunk(self.preprocess(obs))), self.heed(masks)
        return self.mode(logits, masks) if noise is None else self.sample(logits, masks, noise)

    def forward(self, obs: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs [n, D] under masks [n, D], and the critic's outputs [n]."""
        features = self.trunk(self.preprocess(obs))
        logits = torch.where(masks, self.actor(features), MASKED)
        logits = logits.T.contiguous()  # log_softmax is faster along the first of two dimensions
        heads = [head.log_softmax(0) for head in logits.split(self.nvec)]
        return torch.cat(heads).T, self.critic(features).squeeze(-1)

    def draw_noise(self, *shape: int) -> Tensor:
        """Gumbel noise [*shape, D]: the argmax of logits plus it is a draw from their softmax."""
        noise = torch.empty(*shape, sum(self.nvec), device=self.offsets.device)
        return noise.exponential_().log_().neg_()

    def sample(self, logits: Tensor, masks: Tensor, noise: Tensor | float) -> tuple[Tensor, ...]:
        """Actions [n, H] drawn from logits [n, D] with Gumbel noise, their masks and scores."""
        scores = logits + noise
        if masks.dim() == 3:
            first = torch.where(masks[..., 0], scores[:, : self.nvec[0]], self.never).argmax(-1)
            masks = self.path(masks, first)
        scores = torch.where(masks, scores, self.never).index_select(-1, self.places)
        # max returns the first of equal scores, so never a repetition
        best, actions = scores.view(len(scores), len(self.nvec), -1).max(-1)
        return actions, masks, best

    def mode(self, logits: Tensor, masks: Tensor) -> tuple[Tensor, ...]:
        """Most probable actions [n, H], all heads taken together, their masks and scores."""
        first, rest = logits.split([self.nvec[0], sum(self.nvec[1:])], -1)
        if masks.dim() == 3:
            rows = torch.where(masks[..., 1:], rest.unsqueeze(1), MASKED).split(self.nvec[1:], -1)
            first = first + sum(row.log_softmax(-1).amax(-1) for row in rows)
        return self.sample(torch.cat((first, rest), -1), masks, 0.0)

    def log_prob(self, dist: Tensor, actions: Tensor) -> Tensor:
        """Log-probs [...] of actions [..., H] under log-probs [..., D], summed over the heads."""
        return dist.gather(-1, actions + self.offsets).sum(-1)

    @staticmethod
    def entropy(dist: Tensor) -> Tensor:
        """Entropies [...] in nats of log-probs [..., D], summed over the heads.

        Under conditional masks it is that of the path taken: right in the mean, but its gradient
        leaves out how the first choice selects the path; and so with `kl_divergence`.
        """
        return -(dist.exp() * dist).sum(-1)

    @staticmethod
    def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
        """KL(p, q) [...] in nats between log-probs [..., D], exact and summed over the heads."""
        return (p.exp() * (p - q)).sum(-1)

    def to_env(self, actions: Tensor) -> np.ndarray:
        """Actions [n, H] as the environment takes them."""
        return (actions.cpu().numpy() + self.first_action).reshape(-1, *self.space_shape)

    @torch.no_grad()
    def advance_value_norm(self, targets: Tensor, popart: bool) -> None:
        """Take in targets [n]; PopArt (van Hasselt et al. 2016) then keeps all values as is."""
        old_mean, old_std = self.value_norm.mean.clone(), self.value_norm.std.clone()
        self.value_norm.advance(targets)
        if popart:
            head, mean, std = self.critic[-1], self.value_norm.mean, self.value_norm.std
            head.weight.mul_(old_std / std)
            head.bias.copy_((head.bias * old_std + old_mean - mean) / std)


# ---- rollout


class Rollout:
    """Buffers that `collect` fills, and what one rollout leaves for the next."""

    def __init__(self, args: Args, agent: Agent, envs: VectorEnv, seed: int) -> None:
        space, steps, rows = envs.single_observation_space, args.num_steps, args.num_steps + 1
        byte, n = space.dtype == np.uint8 and len(space.shape) == 3, envs.num_envs
        device, action = agent.obs_norm.mean.device, agent.action_dtype
        dtype = torch.uint8 if byte else torch.float32
        self.obs = torch.zeros(rows, n, *space.shape, dtype=dtype, device=device)
        self.actions = torch.zeros(steps, n, *agent.action_shape, dtype=action, device=device)
        # views of a step's observations, the next ones and the actions
        self.rows = list(zip(self.obs[:-1], self.obs[1:], self.actions, strict=True))
        self.rewards, self.lives = np.zeros((steps, n)), np.zeros((rows, n), np.int64)
        self.terminated, self.truncated = np.zeros((2, steps, n), bool)
        self.valid = np.ones((rows, n), bool)  # False where NEXT_STEP resets
        self.final_obs: list[tuple[int, int, np.ndarray]] = []
        self.so_far = np.zeros((2, n))  # return and length of the episodes under way
        self.discounted = torch.zeros(n, device=device)  # their discounted returns
        self.stuck: tuple[int, str] | None = None  # step that failed, and why
        self.signals: tuple[Tensor, ...] = ()  # of `learning_signals`
        self.values = torch.zeros(0)  # [B] of `make_batch`, in units of the rewards
        seeds = {} if args.vectorization == "envpool" else {"seed": seed}
        obs, infos = attempt(envs, envs.reset, **seeds)
        self.obs[-1] = torch.from_numpy(np.ascontiguousarray(obs))
        games = is_atari(args) or args.vectorization == "envpool"
        self.atari = games and agent.pixels and "lives" in infos
        if self.atari:
            self.lives[-1] = infos["lives"]
        found = infos.get("action_mask", np.ones((n, sum(agent.nvec)), bool))
        self.masked = "action_mask" in infos
        self.masks = np.repeat(np.asarray(found, bool)[None], rows, 0)  # as the environment gives
        self.allowed = torch.ones(rows, n, sum(agent.nvec), dtype=torch.bool, device=device)
        self.next_step = envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
        masks = torch.as_tensor(self.masks[:-1]), self.allowed[:-1]  # views of these, too
        self.rows = [(*row, *pair) for row, *pair in zip(self.rows, *masks, strict=True)]


def keep_masks(rollout: Rollout, t: int, infos: dict, ended: np.ndarray) -> None:
    """Put the masks of a step into row t; before a reset in the next step all is allowed."""
    if rollout.masked:
        rollout.masks[t] = infos.get("action_mask", False)
        if rollout.next_step:
            rollout.masks[t, ended] = True


@torch.inference_mode()
def collect(agent: Agent, envs: VectorEnv, rollout: Rollout, interrupted: list[int]) -> None:
    """Step every environment T times, or until interrupted or stuck."""
    rollout.obs[0] = rollout.obs[-1]
    rollout.valid[0], rollout.lives[0] = rollout.valid[-1], rollout.lives[-1]
    rollout.final_obs.clear()
    rollout.masks[0], shape = rollout.masks[-1], rollout.masks.shape[1:]
    noise = agent.draw_noise(*rollout.rewards.shape)
    steps = zip(noise, rollout.rows, strict=True)
    for t, (draw, (obs, next_obs, actions, masks, allowed)) in enumerate(steps):
        if interrupted:
            return
        chosen, heeded, scores = agent.act(obs, masks.to(obs.device), draw)
        actions.copy_(chosen)
        allowed.copy_(heeded)
        if rollout.masked and -torch.inf in scores.flatten().tolist():
            n, head = (scores == -torch.inf).nonzero()[0].tolist()
            n += RANK * envs.num_envs
            rollout.stuck = t, f"the mask of environment {n} allows no choice of head {head}"
            return
        try:
            step = attempt(envs, envs.step, agent.to_env(actions))
        except EnvironmentFailure as error:
            rollout.stuck = t, str(error)
            return
        seen, rewards, terminated, truncated, infos = step
        next_obs.copy_(torch.from_numpy(np.ascontiguousarray(seen)))
        rollout.rewards[t] = rewards
        rollout.terminated[t], rollout.truncated[t] = terminated, truncated
        if "final_obs" in infos:
            ends = np.flatnonzero(truncated & ~terminated)
            rollout.final_obs += [(t, n, infos["final_obs"][n]) for n in ends]
        if rollout.atari:
            rollout.lives[t + 1] = infos["lives"]
        if ("action_mask" in infos) != rollout.masked:
            rollout.stuck = t, "there are masks after steps but not after resets, or the reverse,"
            return
        if rollout.masked and np.shape(infos["action_mask"]) != shape:
            rollout.stuck = t, f"masks {np.shape(infos['action_mask'])} in place of {shape}"
            return
        keep_masks(rollout, t + 1, infos, terminated | truncated)
    if rollout.next_step:
        rollout.valid[1:] = ~(rollout.terminated | rollout.truncated)


def finished_episodes(rollout: Rollout) -> list[tuple[float, int]]:
    """Return and length of every episode that ended in the rollout."""
    sums = np.stack((rollout.rewards, rollout.valid[:-1])).cumsum(1) + rollout.so_far[:, None]
    episodes, start = [], np.zeros_like(rollout.so_far)
    for t, n in np.argwhere(rollout.terminated | rollout.truncated):
        total, length = sums[:, t, n] - start[:, n]
        episodes.append((float(total), int(length)))
        start[:, n] = sums[:, t, n]
    rollout.so_far = sums[:, -1] - start
    return episodes


@torch.no_grad()
def invalid_fraction(agent: Agent, rollout: Rollout) -> float:
    """Share of the actions that the environment's masks forbade."""
    valid = torch.as_tensor(rollout.valid[:-1])
    masks, actions = torch.as_tensor(rollout.masks[:-1])[valid], rollout.actions.cpu()[valid]
    masks = agent.path(masks, actions[:, 0])
    allowed = masks.gather(-1, actions + agent.offsets.cpu())
    invalid = int((~allowed).any(-1).sum())
    counts = all_sum(torch.tensor([invalid, len(actions)], device=rollout.obs.device)).tolist()
    return counts[0] / max(counts[1], 1)


@torch.no_grad()
def evaluate_rows(agent: Agent, obs: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Distributions [n, D] and values [n], in units of the rewards, for observations [n, *O]."""
    rows = 256 if agent.pixels else 1024  # at a time: some 50 MB of frames
    dists, outputs = zip(*map(agent, obs.split(rows), masks.split(rows)), strict=True)
    return torch.cat(dists), torch.cat(outputs) * agent.value_norm.std + agent.value_norm.mean


# ---- targets


def discounted_sum(terms: Tensor, decay: Tensor) -> Tensor:
    """y[t] = terms[t] + decay[t] * y[t + 1], with 0 after the last row; all [T, N].

    Doubles the number of terms in every sum until they hold all (Hillis and Steele 1986).
    """
    sums, span = terms, 1
    while span < len(terms):
        sums = torch.cat((sums[:-span] + decay[: len(terms) - span] * sums[span:], sums[-span:]))
        decay, span = decay[:-span] * decay[span:], 2 * span
    return sums


def compute_gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, ended: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantages (Schulman et al. 2016, eq. 16), cut where `ended`; all [T, N].

    `next_values`: 0 after a termination, else the value of the observation that the step led to.
    """
    return discounted_sum(rewards + gamma * next_values - values, gamma * lam * ~ended)


def compute_returns(rewards: Tensor, next_values: Tensor, ended: Tensor, gamma: float) -> Tensor:
    """Discounted returns, bootstrapped where an episode or the rollout is cut; all [T, N]."""
    cut = ended.clone()
    cut[-1] = True
    return discounted_sum(rewards + gamma * next_values * cut, gamma * ~cut)


def scale_rewards(
    agent: Agent, rollout: Rollout, rewards: Tensor, ended: Tensor, args: Args
) -> Tensor:
    """Rewards [T, N] over the running deviation of the discounted return; signs stay."""
    terms, goes_on = rewards.clone(), torch.ones_like(rewards)
    terms[0] += args.gamma * rollout.discounted
    goes_on[1:] -= ended[:-1].float()
    discounted = discounted_sum(terms.flip(0), args.gamma * goes_on.flip(0)).flip(0)
    rollout.discounted = discounted[-1] * ~ended[-1]
    agent.reward_norm.advance(discounted[torch.as_tensor(rollout.valid[:-1])])
    limit = torch.inf if args.clip_reward is None else args.clip_reward
    return (rewards / agent.reward_norm.std).clamp(-limit, limit)


def learning_signals(agent: Agent, rollout: Rollout, args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards to learn from, and where chains of them terminate or are truncated; all [T, N]."""
    rewards, terminated, truncated = rollout.rewards, rollout.terminated, rollout.truncated
    if rollout.atari and args.episodic_life:
        terminated = terminated | (rollout.lives[1:] < rollout.lives[:-1])
    if rollout.atari and args.sign_reward:
        rewards = np.sign(rewards)
    if not args.bootstrap_truncated:
        terminated = terminated | truncated
    to_device = partial(torch.as_tensor, device=rollout.obs.device)
    signals = (rewards.astype(np.float32), terminated, truncated)
    rewards, terminated, truncated = map(to_device, signals)
    if args.norm_reward:
        rewards = scale_rewards(agent, rollout, rewards, terminated | truncated, args)
    return rewards, terminated, truncated


def estimate(agent: Agent, rollout: Rollout, args: Args) -> tuple[Tensor, ...]:
    """Distributions [B, D], values, advantages and value targets [B] under the present agent."""
    rewards, terminated, truncated = rollout.signals
    dists, values = evaluate_rows(agent, rollout.obs.flatten(0, 1), rollout.allowed.flatten(0, 1))
    values = values.view(rollout.valid.shape)
    next_values = values[1:].clone()  # NEXT_STEP: the row after an end holds its last observation
    if rollout.final_obs:
        t, n, obs = zip(*rollout.final_obs, strict=True)
        obs = torch.as_tensor(np.stack(obs), dtype=rollout.obs.dtype, device=values.device)
        next_values[t, n] = evaluate_rows(agent, obs, rollout.allowed[-1, list(n)])[1]
    values, next_values, ended = values[:-1], next_values * ~terminated, terminated | truncated
    advantages = compute_gae(rewards, values, next_values, ended, args.gamma, args.gae_lambda)
    if args.value_target == "gae":
        targets = advantages + values
    elif args.value_target == "mc":
        targets = compute_returns(rewards, next_values, ended, args.gamma)
    else:
        targets = rewards + args.gamma * next_values
    return dists[: values.numel()], values.flatten(), advantages.flatten(), targets.flatten()


# ---- losses


class Batch(NamedTuple):
    """Rows [B, ...] of a rollout, its minibatches [K, M, ...], or one of them [M, ...]."""

    obs: Tensor
    masks: Tensor
    actions: Tensor
    logprobs: Tensor
    dists: Tensor
    ref_dists: Tensor
    advantages: Tensor
    targets: Tensor  # in the units of the critic's outputs, as are the old values
    values: Tensor
    weights: Tensor  # 0 where the row is no step


def make_batch(agent: Agent, reference: Agent | None, rollout: Rollout, args: Args) -> Batch:
    """What the update needs of a rollout; advances the value normaliser."""
    dists, values, advantages, targets = estimate(agent, rollout, args)
    rollout.values = values
    obs, actions = rollout.obs[:-1].flatten(0, 1), rollout.actions.flatten(0, 1)
    masks = rollout.allowed[:-1].flatten(0, 1)
    valid = torch.as_tensor(rollout.valid[:-1], device=obs.device).flatten()
    outputs = agent.value_norm.normalize(values)
    if args.norm_value != "none":
        agent.advance_value_norm(targets[valid], args.norm_value == "popart")
    if args.norm_value == "popart":
        outputs = agent.value_norm.normalize(values)
    return Batch(
        obs=obs,
        masks=masks,
        actions=actions,
        logprobs=agent.log_prob(dists, actions),
        dists=dists,
        ref_dists=evaluate_rows(reference, obs, masks)[0] if reference else dists,
        advantages=advantages,
        targets=agent.value_norm.normalize(targets),
        values=outputs,
        weights=valid.float(),
    )


def normalize(weights: Tensor) -> Tensor:
    """Weights [..., M] that sum to 1 over all processes, or to 0 if all are 0."""
    return weights / all_sum(weights.sum(-1, keepdim=True)).clamp(min=1e-8)


def standardize(advantages: Tensor, weights: Tensor) -> Tensor:
    """Advantages [..., M] less their mean, over their deviation, of all rows of weight > 0."""
    steps = (weights > 0).to(advantages.dtype)
    count, total = all_sum(torch.stack((steps, steps * advantages)).sum(-1, keepdim=True))
    centred = advantages - total / count.clamp(min=1)
    variance = all_sum((steps * centred.square()).sum(-1, keepdim=True)) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-8)


def policy_loss(
    ratio: Tensor, advantages: Tensor, clip: float | None, dual_clip: float | None
) -> Tensor:
    """Clipped surrogate [M] (PPO, eq. 7), with the dual clip of Ye et al. (2020), eq. 3."""
    cost = -advantages
    loss = ratio * cost
    if clip is not None:  # without a gradient, for it has none where it is the larger one
        clipped = ratio.detach().clamp(1 - clip, 1 + clip) * cost
        loss = torch.where(clipped > loss, clipped, loss)
    if dual_clip is not None:
        loss = torch.where((cost > 0) & (loss > dual_clip * cost), dual_clip * cost, loss)
    return loss


def value_loss(values: Tensor, targets: Tensor, huber: bool) -> Tensor:
    """Half the squared error [M]; `huber`: linear where the error is above 1."""
    return F.huber_loss(values, targets, reduction="none", delta=1.0 if huber else torch.inf)


def value_clip(args: Args) -> float | None:
    """How far the value may move from the old one."""
    return args.clip_coef if args.vclip_coef is None else args.vclip_coef


def clip_values(values: Tensor, batch: Batch, args: Args) -> Tensor:
    """Values [M], clipped around the old ones where that makes the larger error (PPO2's clip)."""
    clip = value_clip(args)
    if not args.clip_vloss or clip is None:
        return values
    near = values.detach().clamp(batch.values - clip, batch.values + clip)
    worse = (near - batch.targets).abs() > (values.detach() - batch.targets).abs()
    return torch.where(worse, near, values)


def ppo_loss(
    agent: Agent, batch: Batch, coefs: Tensor | list[float], args: Args
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Loss [] of a minibatch, and the distributions [M, D] and critic's outputs [M] behind it.

    `coefs` [5] weigh the policy loss, value loss, entropy, KL(old, new) and KL(new, reference).
    """
    dists, values = agent(batch.obs, batch.masks)
    policy_coef, value_coef, entropy_coef, kl_coef, ref_coef = coefs
    ratio = (agent.log_prob(dists, batch.actions) - batch.logprobs).exp()
    surrogate = policy_loss(ratio, batch.advantages, args.clip_coef, args.dual_clip_coef)
    clipped = clip_values(values, batch, args)
    errors = value_loss(clipped, batch.targets, args.value_loss == "huber")
    loss = policy_coef * surrogate + value_coef * errors
    if args.ent_coef > 0 or args.ent_coef_final is not None:
        loss = loss + entropy_coef * agent.entropy(dists)
    if args.kl_coef > 0 or args.kl_target is not None:
        loss = loss + kl_coef * agent.kl_divergence(batch.dists, dists)
    if args.ref_checkpoint:
        loss = loss + ref_coef * agent.kl_divergence(dists, batch.ref_dists)
    return loss @ batch.weights, (dists, values)


def loss_gradient(
    agent: Agent, trained: list[nn.Parameter], batch: Batch, coefs: Tensor | list[float], args: Args
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Gradient [P] of `ppo_loss` by what is trained, as one vector, and what else it returns."""
    loss, (dists, values) = ppo_loss(agent, batch, coefs, args)
    parts = torch.autograd.grad(loss, trained)
    return torch.cat([part.flatten() for part in parts]), (dists.detach(), values.detach())


METRICS = (  # of `measure`, and the norm of the gradient
    "losses/policy_loss losses/value_loss losses/entropy losses/kl losses/ref_kl "
    "losses/old_approx_kl losses/approx_kl losses/clipfrac losses/value_loss_unclipped "
    "losses/value_clipfrac values/mean losses/grad_norm"
).split()


@torch.no_grad()
def measure(agent: Agent, batch: Batch, dists: Tensor, values: Tensor, args: Args) -> Tensor:
    """METRICS without the gradient's norm [11], means over minibatches [..., M, *].

    `dists` and `values` are what `ppo_loss` returned for each of them.
    """
    logratio = agent.log_prob(dists, batch.actions) - batch.logprobs
    ratio, huber = logratio.exp(), args.value_loss == "huber"
    kl, ref_kl = agent.kl_divergence(batch.dists, dists), torch.zeros_like(ratio)
    if args.ref_checkpoint:
        ref_kl = agent.kl_divergence(dists, batch.ref_dists)
    rows = (
        policy_loss(ratio, batch.advantages, args.clip_coef, args.dual_clip_coef),
        value_loss(clip_values(values, batch, args), batch.targets, huber),
        agent.entropy(dists),
        kl,
        ref_kl,
        -logratio,
        ratio - 1 - logratio,
        ((ratio - 1).abs() > (args.clip_coef or torch.inf)).float(),
        value_loss(values, batch.targets, huber),
        ((values - batch.values).abs() > (value_clip(args) or torch.inf)).float(),
        values,
    )
    return (torch.stack(rows) * batch.weights).sum(-1).view(len(rows), -1).mean(1)


@cache
def compiled(function: Callable) -> Callable:
    """The function as one graph of C++ code, made at its first call."""
    torch._dynamo.config.trace_autograd_ops = True
    options = {"cpp_wrapper": True, "cpp.use_decompose_tanh": True}
    return torch.compile(function, options=options)


def clip_norm(gradient: Tensor, limit: float | None) -> Tensor:
    """Scale a gradient [P] down to a norm of `limit`; returns the norm [] that it had."""
    norm = torch.linalg.vector_norm(gradient)
    if limit is not None:
        gradient /= (norm / limit).clamp(min=1)
    return norm


# ---- update


ADAM = dict(beta1=0.9, beta2=0.999, weight_decay=0.0, amsgrad=False, maximize=False)


class Adam:
    """Adam (Kingma and Ba 2015, section 2) on one vector of P weights that all parameters share.

    It has two groups, first the policy's weights and those of a shared trunk, then the critic's.
    The agent must be on its device by then, for moving it would tear the parameters away.
    """

    def __init__(self, agent: Agent, args: Args) -> None:
        named = [(name, p) for name, p in agent.named_parameters() if p.requires_grad]
        actor = [p for name, p in named if not name.startswith("critic.")]
        self.critic = [p for name, p in named if name.startswith("critic.")]
        self.parameters = actor + self.critic
        self.weights = torch.cat([p.detach().flatten() for p in self.parameters])
        parts = self.weights.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.data = part.view_as(parameter)
        self.average, self.square = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        sizes = [sum(p.numel() for p in group) for group in (actor, self.critic)]
        vectors = (self.weights, self.average, self.square)
        flats = zip(*(vector.split(sizes) for vector in vectors), strict=True)
        self.param_groups = [{"flat": flat, "lr": args.learning_rate, "step": 0} for flat in flats]
        epsilons = (args.actor_adam_eps, args.critic_adam_eps)
        for group, eps in zip(self.param_groups, epsilons, strict=True):
            group["eps"] = args.adam_eps if eps is None else eps

    def step(self, gradient: Tensor) -> None:
        """Move the weights by their gradient [P], or the critic's alone by theirs."""
        groups = self.param_groups[len(gradient) < len(self.weights) :]
        parts = gradient.split([len(group["flat"][0]) for group in groups])
        for group, part in zip(groups, parts, strict=True):
            group["step"] += 1
            weights, average, square = group["flat"]
            vectors = [weights], [part], [average], [square], []
            step = [part.new_full((), group["step"])]
            torch._fused_adam_(*vectors, step, lr=group["lr"], eps=group["eps"], **ADAM)

    def state_dict(self) -> dict[str, Any]:
        """Moments and the groups' numbers of steps."""
        steps = [group["step"] for group in self.param_groups]
        return {"average": self.average, "square": self.square, "steps": steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the moments and numbers of steps of a `state_dict`."""
        self.average.copy_(state["average"])
        self.square.copy_(state["square"])
        for group, steps in zip(self.param_groups, state["steps"], strict=True):
            group["step"] = steps


def schedule(optimizer: Adam, args: Args, iteration: int, total: int) -> float:
    """Set the learning rates for iteration 0 to total - 1; returns the weight of the entropy."""
    rates = (args.actor_learning_rate, args.critic_learning_rate)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        rate = args.learning_rate if rate is None else rate
        group["lr"] = rate * (1 - iteration / total) if args.anneal_lr else rate
    return line(args.ent_coef, args.ent_coef_final, iteration, total)


def line(first: float, last: float | None, iteration: int, total: int) -> float:
    """Value at an iteration on the line from the first to the last one; constant without `last`."""
    return first if last is None else first + (last - first) * iteration / max(total - 1, 1)


def update(
    agent: Agent,
    optimizer: Adam,
    rollout: Rollout,
    batch: Batch,
    args: Args,
    coefs: list[float],
    warmup: bool,
) -> Tensor:
    """Epochs of minibatches; in a warm-up and in the critic's own epochs the policy stands still.

    Returns METRICS, means over all minibatches. Nothing is read back but the KL for `target_kl`.
    """
    gradient_of, metrics_of = loss_gradient, measure
    critic_coefs = [0.0, coefs[1], 0.0, 0.0, 0.0]
    if args.compile:  # with tensors, for another number would be another graph
        gradient_of, metrics_of = compiled(loss_gradient), compiled(measure)
        coefs, critic_coefs = (
            torch.as_tensor(x, device=batch.weights.device) for x in (coefs, critic_coefs)
        )
    norms, history, shape, stopped = [], [], (args.num_minibatches, -1), False
    for epoch, alone in enumerate([warmup] * args.update_epochs + [True] * args.critic_epochs):
        if stopped and not alone:
            continue
        if epoch and args.recompute_advantages:
            _, _, advantages, targets = estimate(agent, rollout, args)
            targets = agent.value_norm.normalize(targets)
            batch = batch._replace(advantages=advantages, targets=targets)
        order = torch.randperm(len(batch.obs), device=batch.obs.device)
        epoch_rows = Batch(*(rows.index_select(0, order).unflatten(0, shape) for rows in batch))
        advantages, weights = epoch_rows.advantages, epoch_rows.weights
        if args.norm_adv:
            scope = shape if args.norm_adv_scope == "minibatch" else (1, -1)
            advantages = standardize(advantages.view(scope), weights.view(scope)).view(shape)
        epoch_rows = epoch_rows._replace(advantages=advantages, weights=normalize(weights))
        trained = optimizer.critic if alone else optimizer.parameters
        minibatch_coefs = critic_coefs if alone else coefs
        seen = []
        for minibatch in map(Batch._make, zip(*epoch_rows, strict=True)):
            gradient, outputs = gradient_of(agent, trained, minibatch, minibatch_coefs, args)
            norms.append(clip_norm(all_sum(gradient), args.max_grad_norm))
            seen.append(outputs)
            optimizer.step(gradient)
        dists, values = map(torch.stack, zip(*seen, strict=True))
        history.append(metrics_of(agent, epoch_rows, dists, values, args))
        if args.target_kl is not None and not alone:
            kl = all_sum(history[-1][METRICS.index("losses/approx_kl")].clone())
            stopped = bool(kl > args.target_kl)
    return torch.cat((all_sum(torch.stack(history).mean(0)), torch.stack(norms).mean(0, True)))


# ---- logging


def describe(
    batch: Batch, values: Tensor, metrics: Tensor, norm: RunningMeanStd
) -> dict[str, float]:
    """METRICS and what batch and old values [B] tell, read back at once, in the rewards' units."""
    targets, weights = batch.targets * norm.std + norm.mean, normalize(batch.weights).double()
    rows = torch.stack((batch.advantages, values, targets, targets - values)).double()
    mean, count = all_sum(rows @ weights), all_sum((weights > 0).sum())
    squares = all_sum((rows - mean.unsqueeze(-1)).square() @ weights)
    variance = squares * count / (count - 1).clamp(min=1)
    told = torch.cat((metrics, mean, variance, torch.stack((norm.mean, norm.std)))).tolist()
    means, variances, (centre, scale) = told[-10:-6], told[-6:-2], told[-2:]
    scalars = dict(zip(METRICS, told[:-10], strict=True))
    return scalars | {
        "losses/explained_variance": 1 - variances[3] / variances[2] if variances[2] > 0 else 0.0,
        "advantages/mean": means[0],
        "advantages/std": variances[0] ** 0.5,
        "values/mean": scalars["values/mean"] * scale + centre,
        "values/old_mean": means[1],
        "values/target_mean": means[2],
    }


def log(writer: SummaryWriter, step: int, scalars: dict[str, float]) -> None:
    """Write all scalars of a step as one event."""
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    writer.file_writer.add_summary(Summary(value=values), step)


def open_writer(run_dir: Path, args: Args, step: int) -> SummaryWriter | None:
    """The first process's writer of events after this step; it lists the run in the HPARAMS tab."""
    if RANK > 0:
        return None
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    flags = {
        name: value if type(value) in (int, float, str) else str(value)
        for name, value in vars(args).items()
    }
    newest = ("charts/return_100", "charts/episodic_return", "eval/episodic_return")
    for summary in hparams(flags, dict.fromkeys(newest, 0)):
        writer.file_writer.add_summary(summary)
    return writer


# ---- checkpoint


CHECKPOINT = {"args", "step", "beta", "returns", "rng", "cuda_rng", "agent", "optimizer"}


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Put the new checkpoint into the old one's place at once: a kill leaves one of them whole."""
    if RANK > 0:
        return
    content, new = io.BytesIO(), path.with_suffix(".tmp")
    torch.save(state, content)
    try:
        with open(new, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def load_checkpoint(flag: str, name: str) -> dict[str, Any]:
    """Checkpoint of a run, named by its directory or file; runs no code that it may hold."""
    path = Path(name, "checkpoint.pt") if os.path.isdir(name) else Path(name)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if missing := CHECKPOINT - state.keys():
            raise ValueError(f"it lacks {missing}")
        state["args"] = Args(**state["args"])
        state["args"].run_dir = str(path.parent)
    except Exception as error:
        fail(f"--{flag} {name}: no checkpoint of this script, or damaged ({error})")
    return state


def load_agent(flag: str, state: dict[str, Any], agent: Agent, args: Args) -> None:
    """Put the checkpoint's networks and normalisers into an agent for the same environment."""
    if state["args"].env_id != args.env_id:
        fail(f"--{flag}: made for {state['args'].env_id}, not for {args.env_id}")
    try:
        agent.load_state_dict(state["agent"])
    except RuntimeError as error:
        fail(f"--{flag}: the networks differ: {error}")


# ---- train, evaluate


def terminate(*_: Any) -> NoReturn:
    """End the process as a Ctrl-C does, with the code of SIGTERM."""
    raise KeyboardInterrupt(143)


def ignore_os_errors(error: Any) -> None:
    """Leave a full disk, of which the writer's thread tells the main one, to the latter."""
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


def open_run(run_dir: Path, args: Args, state: dict) -> None:
    """Make the directory of a run with its args.json."""
    if RANK > 0:
        return
    own = bool(state) and args.run_dir == state["args"].run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "args.json", "w" if own else "x") as file:
        json.dump(vars(args), file, indent=2)


def environment_seed(seed: int, step: int) -> int:
    """Seed of the environments that a run with this seed starts at this step."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0] >> 1)


def find_broken(rollout: Rollout, step: int) -> list[str]:
    """What failed first after `step`, or was the first not to be finite, if there is such."""
    envs = len(rollout.so_far[0])
    if rollout.stuck:
        t, why = rollout.stuck
        return [f"{why} at step {step + t * envs * PROCESSES}"]
    found = [(t, n, "reward") for t, n in np.argwhere(~np.isfinite(rollout.rewards))]
    ends = [(t, n) for t, n, obs in rollout.final_obs if not np.isfinite(obs).all()]
    found += [(t, n, "observation") for t, n in ends]
    if rollout.obs.is_floating_point() and not np.isfinite(rollout.obs.sum().item()):
        rows = (~rollout.obs.isfinite()).nonzero().tolist()
        found += [(max(t - 1, 0), n, "observation") for t, n, *_ in rows]
    return [
        f"the {what} of environment {RANK * envs + n} is not finite at step "
        f"{step + t * envs * PROCESSES}"
        for t, n, what in sorted(found)[:1]
    ]


def train(
    args: Args, agent: Agent, envs: VectorEnv, seed: int, reference: Agent | None, state: dict
) -> None:
    """Iterations of rollout, targets and update, from the checkpoint `state` if there is one."""
    device, batch_size = agent.obs_norm.mean.device, args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    optimizer = Adam(agent, args)
    if state:
        try:
            optimizer.load_state_dict(state["optimizer"])
        except RuntimeError as error:
            fail(f"--resume: the trained parameters differ: {error}")
        if len(state["rng"]) > RANK:
            torch.set_rng_state(state["rng"][RANK])
        if device.type == "cuda" and len(state["cuda_rng"]) > RANK:
            torch.cuda.set_rng_state(state["cuda_rng"][RANK], device)
    first_step = step = state.get("step", 0)
    beta = args.kl_coef or float(args.kl_target is not None)
    if state and (args.kl_coef, args.kl_target) == (state["args"].kl_coef, state["args"].kl_target):
        beta = state["beta"]
    returns = deque(state.get("returns", ()), maxlen=100)
    rollout, run_dir = together("", 1, Rollout, args, agent, envs, seed), Path(args.run_dir)
    together(f"--run-dir {run_dir}: ", 2, open_run, run_dir, args, state)
    writer = together(f"cannot write to {run_dir}: ", 1, open_writer, run_dir, args, step)

    def save() -> None:
        cuda_rng = gather(torch.cuda.get_rng_state(device)) if device.type == "cuda" else []
        checkpoint = {"args": vars(args) | {"resume": None}, "step": step, "beta": beta}
        checkpoint |= {"rng": gather(torch.get_rng_state()), "cuda_rng": cuda_rng}
        checkpoint |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint |= {"returns": list(returns)}
        if writer:
            writer.flush()
        path = run_dir / "checkpoint.pt"
        together(f"cannot write to {run_dir}: ", 1, save_checkpoint, path, checkpoint)

    interrupted: list[int] = []  # signals that this process received
    received: list[int] = []  # by any process

    def interrupt(signum: int, _: Any) -> None:
        interrupted.append(signum)
        if PROCESSES == 1:  # torchrun sends its processes a signal that they may have had
            signal.signal(signum, signal.SIG_DFL)

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    silent = RANK > 0 or not args.progress
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=silent)
    start_time = time.perf_counter()

    left = (args.total_timesteps - step) // batch_size  # a resumed run's batch may be another
    for iteration in range(num_iterations - left, num_iterations):
        ent_coef = schedule(optimizer, args, iteration, num_iterations)
        coefs = [1.0, args.vf_coef, -ent_coef, beta, args.ref_kl_coef]

        collect(agent, envs, rollout, interrupted)
        broken = find_broken(rollout, step)
        report = interrupted[:], broken, [] if broken else finished_episodes(rollout)
        reports = zip(*gather(report), strict=True)
        received, broken, episodes = (list(chain(*lists)) for lists in reports)
        if received:
            break
        if broken:
            fail(broken[0], 1)
        rollout.signals = learning_signals(agent, rollout, args)
        batch = make_batch(agent, reference, rollout, args)
        warmup = iteration < args.critic_warmup_iterations
        gc.disable()  # the first update may compile, which makes much that lasts, too
        metrics = update(agent, optimizer, rollout, batch, args, coefs, warmup)
        gc.enable()

        step += batch_size
        scalars = describe(batch, rollout.values, metrics, agent.value_norm)
        scalars |= {"policy/invalid_fraction": invalid_fraction(agent, rollout)}
        for tag in METRICS:
            if not np.isfinite(scalars[tag]):
                fail(f"{tag} is {scalars[tag]} in iteration {iteration + 1}", 1)
        scalars |= {"charts/learning_rate": optimizer.param_groups[0]["lr"]}
        scalars |= {"charts/ent_coef": ent_coef, "charts/kl_coef": beta}
        scalars["charts/SPS"] = (step - first_step) / (time.perf_counter() - start_time)
        if episodes:
            episodic = ("charts/episodic_return", "charts/episodic_length")
            scalars |= zip(episodic, np.mean(episodes, 0), strict=True)
            returns.extend(episode[0] for episode in episodes)
            scalars["charts/return_100"] = np.mean(returns)
            bar.set_postfix_str(f"return {np.mean(returns):.2f}", refresh=False)
        if writer:
            log(writer, step, scalars)
        bar.update(batch_size)
        if args.kl_target is not None and not warmup:
            dists = evaluate_rows(agent, batch.obs, batch.masks)[0]
            kl = all_sum(agent.kl_divergence(batch.dists, dists) @ normalize(batch.weights)).item()
            beta *= 2.0 if kl > 1.5 * args.kl_target else 0.5 if kl < args.kl_target / 1.5 else 1.0
            beta = min(max(beta, 1e-6), 1e6)
        if agent.norm_obs:
            agent.obs_norm.advance(batch.obs[batch.weights > 0])
        if step == first_step + batch_size:
            gc.freeze()  # no later collection need look through what compiling made
        if args.checkpoint_every and (iteration + 1) % args.checkpoint_every == 0:
            save()

    speed = (step - first_step) / (time.perf_counter() - start_time)
    save()
    bar.close()
    if writer:
        writer.close()
    if received:
        raise SystemExit(128 + received[0])
    mean = f"{np.mean(returns):.2f}" if returns else "unknown"
    if RANK == 0:
        print(f"{run_dir}: mean return of the last {len(returns)} episodes {mean}, {speed:.0f} SPS")


@torch.no_grad()
def evaluate(args: Args, agent: Agent, envs: VectorEnv, seed: int, step: int) -> None:
    """Play episodes in one environment; weights and normalisers stay as they are."""
    rollout = Rollout(args, agent, envs, seed)
    obs, returns, total = rollout.obs[-1], [], 0.0
    while len(returns) < args.eval_episodes:
        noise = None if args.eval_deterministic else agent.draw_noise(1)
        masks = torch.as_tensor(rollout.masks[-1], device=rollout.obs.device)
        actions, _, scores = agent.act(obs, masks, noise)
        if rollout.masked and -torch.inf in (scores := scores.flatten().tolist()):
            head = scores.index(-torch.inf)
            fail(f"the mask of environment 0 allows no choice of head {head}", 1)
        obs, reward, terminated, truncated, infos = attempt(envs, envs.step, agent.to_env(actions))
        keep_masks(rollout, -1, infos, terminated | truncated)
        obs = torch.as_tensor(obs, dtype=rollout.obs.dtype, device=rollout.obs.device)
        if not np.isfinite(reward[0]) or not obs.isfinite().all():
            raise EnvironmentFailure("a reward or observation of environment 0 is not finite")
        total += float(reward[0])
        if terminated[0] or truncated[0]:
            returns.append(total)
            print(f"episode {len(returns)}: return {total:.2f}")
            total = 0.0
    print(f"mean return {np.mean(returns):.2f} +- {np.std(returns):.2f} of {len(returns)} episodes")
    with SummaryWriter(args.run_dir) as writer:
        log(writer, step, {"eval/episodic_return": np.mean(returns)})


def open_envs(args: Args, num_envs: int, seed: int, video_dir: str | None = None) -> VectorEnv:
    """`make_envs`, or the end of the process with one line if these environments cannot be made."""
    try:
        dict(**json.loads(args.env_kwargs))
    except (TypeError, ValueError) as error:
        fail(f"--env-kwargs {args.env_kwargs}: must be a JSON object ({error})")
    try:
        envs = make_envs(args, num_envs, seed, video_dir)
    except Exception as error:
        fail(f"--env-id {args.env_id} --vectorization {args.vectorization}: {error or repr(error)}")
    if not isinstance(envs.single_action_space, (spaces.Discrete, spaces.MultiDiscrete)):
        script = OTHER_SCRIPTS.get(type(envs.single_action_space).__name__, "none of these scripts")
        fail(f"--env-id {args.env_id}: {envs.single_action_space} is for {script}")
    return envs


def check_mask(envs: VectorEnv, args: Args) -> None:
    """Refuse a mask that has another shape than the actions."""
    space = envs.single_action_space
    try:
        _, infos = envs.reset()
    except Exception as error:
        fail(f"--env-id {args.env_id}: {error or repr(error)}")
    first, *rest = np.ravel(space.n if isinstance(space, spaces.Discrete) else space.nvec).tolist()
    shapes = [(first + sum(rest),), (first, 1 + sum(rest))]
    if "action_mask" in infos and infos["action_mask"].shape[1:] not in shapes:
        got, allowed = infos["action_mask"].shape[1:], " or ".join(map(str, shapes))
        fail(f"--env-id {args.env_id}: a mask of shape {got}; for {space} it must be {allowed}")


def keep_memory() -> None:
    """Have glibc keep what is freed: with pixels a seventh of the time went for pages anew."""
    with contextlib.suppress(AttributeError, OSError):  # of other systems
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**31 - 1)


def main() -> None:
    """Read and check the flags, make environments and agent, then train or evaluate."""
    signal.signal(signal.SIGTERM, terminate)
    threading.excepthook = ignore_os_errors
    args, state, flag = parse_args(), {}, "resume"
    if args.resume and args.eval:
        fail("--resume and --eval: give one of them")
    if args.resume or args.eval:
        flag = "eval" if args.eval else "resume"
        state = load_checkpoint(flag, args.resume or args.eval)
        args = parse_args(state["args"])
    single = "sync" if args.vectorization == "async" else args.vectorization
    one = open_envs(replace(args, vectorization=single), 1, 0)
    check_mask(one, args)
    obs_space, action_space = one.single_observation_space, one.single_action_space
    one.close()
    if len(obs_space.shape) == 3 and not state:
        args = parse_args(replace(Args(), **PIXEL_DEFAULTS))
    check_args(args)

    keep_memory()
    torch.set_num_threads(args.torch_threads)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    step = state.get("step", 0)
    num_envs = 1 if args.eval else args.num_envs // PROCESSES
    seed = environment_seed(args.seed, step) + RANK * num_envs
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(args.seed)
    device = torch.device("cpu")
    if args.cuda and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    agent, reference = Agent(args, obs_space, action_space).to(device), None
    if args.ref_checkpoint and not args.eval:
        saved = load_checkpoint("ref-checkpoint", args.ref_checkpoint)
        reference = Agent(saved["args"], obs_space, action_space).to(device)
        load_agent("ref-checkpoint", saved, reference, args)
    if state:
        load_agent(flag, state, agent, args)
    if args.resume and step + args.num_envs * args.num_steps > args.total_timesteps:
        fail(f"--resume {args.resume}: it is complete at step {step}; raise --total-timesteps")
    names = {"env": args.env_id, "exp": args.exp_name, "seed": args.seed, "time": int(time.time())}
    for name, value in names.items():
        args.run_dir = args.run_dir.replace(f"{{{name}}}", str(value))
    if set("{}") & set(args.run_dir):
        fail(f"--run-dir {args.run_dir}: only {' '.join(names)} may stand in braces")
    saved_dir = state["args"].run_dir if state else None
    own = bool(state) and os.path.realpath(args.run_dir) == os.path.realpath(saved_dir)
    args.run_dir = saved_dir if own else args.run_dir
    if not own and os.path.exists(f"{args.run_dir}/args.json"):
        fail(f"--run-dir {args.run_dir}: holds a run; --resume it or name another directory")
    videos = f"videos/from-{step}" if args.resume else "videos"
    video_dir = f"{args.run_dir}/{videos}" if args.capture_video and RANK == 0 else None
    envs = open_envs(args, num_envs, seed, video_dir)
    try:
        if args.eval:
            evaluate(args, agent, envs, seed, step)
        else:
            if PROCESSES > 1:
                join_processes(agent, seed)
            train(args, agent, envs, seed, reference, state)
    except EnvironmentFailure as error:
        fail(error, 1, alone=True)
    except OSError as error:
        fail(f"cannot write to {args.run_dir}: {error}", 1, alone=True)
    finally:
        close(envs, kill=sys.exc_info()[0] is not None)
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    gc.freeze()  # no collection need look through what the imports made
    gc.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt as stop:
        raise SystemExit(*stop.args or (130,)) from None
