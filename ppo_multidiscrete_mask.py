"""Proximal Policy Optimization (PPO) for multi-discrete actions with masks, in one file.

    python ppo_multidiscrete_mask.py --mask independent               # train; every trick is a flag
    tensorboard --logdir runs                                         # compare runs
    python ppo_multidiscrete_mask.py --resume runs/RUN                # continue a run
    python ppo_multidiscrete_mask.py --eval runs/RUN --capture-video  # evaluate it
    torchrun --nproc-per-node 2 ppo_multidiscrete_mask.py             # two processes

Shapes: T = num_steps, N = num_envs of this process, B = T * N samples of a rollout, M = samples of
a minibatch, O = shape of an observation, H = heads of an action, D = sum(nvec) = choices of all
heads (a distribution is their log-probabilities, side by side), F = nvec[0] = those of the first.
"""

import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

Batch = dict[str, Tensor]
Array = np.ndarray
JsonObject = Annotated[dict, tyro.conf.arg(constructor=json.loads, metavar="JSON")]


@dataclass
class Args:
    # Runs
    exp_name: str = Path(__file__).stem  # name of the experiment
    seed: int = 1  # seed of networks, actions, minibatches and environments
    torch_deterministic: bool = True  # use deterministic cuDNN kernels
    cuda: bool = True  # use the GPU if there is one
    capture_video: bool = False  # record videos of the first environment (needs moviepy)
    run_dir: str | None = None  # None: runs/{env_id}__{exp_name}__{seed}__{unix time}
    compile: bool = False  # compile loss and gradient with torch.compile
    torch_threads: int = 1  # threads of PyTorch on the CPU
    progress: bool = True  # show the progress bar
    checkpoint_every: int = 100  # iterations between checkpoints; 0: only at the end
    resume: str | None = None  # run directory to continue; flags given here override its own
    eval: str | None = None  # run directory to evaluate instead of training
    eval_episodes: int = 10  # episodes of an evaluation
    eval_deterministic: bool = True  # evaluate the most probable action, not a sampled one
    # Environment
    env_id: str = "TaxiDispatch-v0"  # Gymnasium id; "module:Id" imports the module first
    env_kwargs: JsonObject = field(default_factory=dict)  # arguments of the environment
    vectorization: Literal["sync", "async", "native", "envpool"] = "sync"  # how to run num_envs
    num_envs: int = 8  # environments in parallel, in total over all processes
    num_steps: int = 128  # steps of each environment in a rollout
    total_timesteps: int = 2_000_000  # environment steps of the whole run
    episodic_life: bool = True  # Atari: a lost life ends the return, not the game
    sign_reward: bool = True  # Atari: learn from the sign of the reward
    # Network
    hidden_sizes: tuple[int, ...] = (64, 64)  # units of the hidden layers; images, grids: CNN
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "tanh"  # images, grids: relu
    ortho_init: bool = True  # orthogonal initialization, with small weights in the policy's head
    shared_network: bool = False  # one trunk for policy and value
    # Masks
    mask: Literal["none", "independent", "conditional"] = "conditional"  # masks of the policy
    # Normalization
    norm_obs: bool = False  # standardize observations (not images) with running statistics
    clip_obs: float | None = 10.0  # clip standardized observations to [-clip, clip]
    norm_reward: bool = False  # divide rewards by the running std of the discounted return
    clip_reward: float | None = 10.0  # clip normalized rewards to [-clip, clip]
    norm_value: Literal["none", "running", "popart"] = "none"  # standardize the critic's targets
    norm_adv: bool = True  # standardize advantages
    norm_adv_scope: Literal["minibatch", "batch"] = "minibatch"  # samples to standardize over
    # Targets
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation (GAE)
    value_target: Literal["gae", "mc", "td"] = "gae"  # A + V, discounted return, or r + gamma V'
    recompute_advantages: bool = False  # recompute advantages and targets before every epoch
    bootstrap_truncated: bool = True  # add gamma * V(final observation) where truncated
    # Policy loss
    clip_coef: float | None = 0.1  # clip of the probability ratio; None: no clip
    dual_clip_coef: float | None = None  # bound of the ratio where the advantage is negative (> 1)
    kl_coef: float = 0.0  # beta of the penalty beta * KL(old, new)
    kl_target: float | None = None  # KL to reach by doubling and halving beta (from 1 if it is 0)
    target_kl: float | None = None  # stop the policy's epochs once the approximate KL exceeds it
    ref_checkpoint: str | None = None  # run directory of a fixed reference policy
    ref_kl_coef: float = 0.0  # coefficient of KL(policy, reference)
    # Value loss
    vf_coef: float = 0.5  # coefficient of the value loss
    clip_vloss: bool = True  # clip the change of the value, and take the larger loss
    vclip_coef: float | None = None  # clip of the value (None: clip_coef)
    value_loss: Literal["mse", "huber"] = "mse"  # half the squared error, or Huber loss
    critic_epochs: int = 0  # additional epochs that train only the critic
    critic_warmup_iterations: int = 0  # first iterations of a run that train only the critic
    # Entropy
    ent_coef: float = 0.01  # coefficient of the entropy bonus
    ent_coef_final: float | None = None  # its value in the last iteration (None: constant)
    # Optimizer
    learning_rate: float = 2.5e-4  # learning rate of Adam
    actor_learning_rate: float | None = None  # of policy and trunk (None: learning_rate)
    critic_learning_rate: float | None = None  # of the critic (None: learning_rate)
    anneal_lr: bool = True  # decrease the learning rates linearly to zero
    adam_eps: float = 1e-5  # epsilon of Adam
    actor_adam_eps: float | None = None  # of policy and trunk (None: adam_eps)
    critic_adam_eps: float | None = None  # of the critic (None: adam_eps)
    max_grad_norm: float | None = 0.5  # maximum norm of the gradient; None: no clip
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 4  # epochs over each rollout


BOARD = {  # charts of TensorBoard's Custom Scalars tab
    "value": ["Multiline", ["^values/"]],
    "value loss": ["Multiline", ["^losses/value_loss"]],
    "KL": ["Multiline", ["^losses/.*kl$"]],
    "clip fractions": ["Multiline", ["^losses/.*clipfrac$"]],
}
compile_once = cache(partial(torch.compile, options={"cpp_wrapper": True}))
RANK = int(os.environ.get("RANK", 0))  # RANK and WORLD_SIZE are set by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
MASKED = -1e8  # logit of an invalid action: probability 0; the gradient of -inf would be NaN
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU, "silu": nn.SiLU}


def fail(message: str) -> NoReturn:
    """Exit with code 2 because of a wrong flag."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_args(args: Args) -> None:
    """Refuse flags that would otherwise fail silently or in a confusing place."""
    if min(args.num_envs, args.num_steps, args.num_minibatches, args.update_epochs) < 1:
        fail("num_envs, num_steps, num_minibatches and update_epochs must be 1 or more")
    if not isinstance(args.env_kwargs, dict):
        fail(f"env_kwargs must be a JSON object, not {args.env_kwargs}")
    batch_size = args.num_envs * args.num_steps
    if args.total_timesteps < batch_size:
        fail(f"total_timesteps ({args.total_timesteps}) is less than one rollout ({batch_size})")
    if args.num_envs % WORLD_SIZE or batch_size // WORLD_SIZE % args.num_minibatches:
        split = f"{WORLD_SIZE} processes and {args.num_minibatches} minibatches"
        fail(f"{args.num_envs} environments x {args.num_steps} steps do not divide into {split}")
    if args.norm_adv and args.norm_adv_scope == "minibatch" and batch_size == args.num_minibatches:
        fail("norm_adv needs two or more samples in a minibatch")
    if args.ref_kl_coef and args.ref_checkpoint in (None, args.resume):
        fail("ref_kl_coef needs ref_checkpoint, which is not the run to resume: copy that one")
    if args.capture_video and args.vectorization in ("native", "envpool"):
        fail(f"capture_video needs vectorization sync or async, not {args.vectorization}")


def is_image(space: spaces.Space) -> bool:
    """Whether observations are images for the Nature CNN: uint8, 3-D and at least 36 x 36."""
    return space.dtype == np.uint8 and len(space.shape) == 3 and sorted(space.shape)[1] >= 36


def is_atari(env_id: str) -> bool:
    return "ALE/" in env_id or "NoFrameskip" in env_id


class FireReset(gym.Wrapper):
    """Press FIRE after the first step of a game and of every new life, for games that wait."""

    lives = None

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        if info["lives"] != self.lives and not (terminated or truncated):
            obs, fire_reward, terminated, truncated, info = self.env.step(1)
            reward += fire_reward
        self.lives = None if terminated or truncated else info["lives"]
        return obs, reward, terminated, truncated, info


def make_env(args: Args, video_dir: Path | None = None) -> gym.Env:
    """One environment, with Atari preprocessed as in the 37 details (Huang et al. 2022)."""
    if multiprocessing.parent_process():  # a worker of AsyncVectorEnv leaves Ctrl-C to its parent
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    env_kwargs = dict(args.env_kwargs)
    if is_atari(args.env_id):
        importlib.import_module("ale_py")  # pip install ale-py opencv-python-headless
        env_kwargs["frameskip"] = 1  # AtariPreprocessing skips frames
    render_mode = {"render_mode": "rgb_array"} if video_dir else {}
    env = gym.make(args.env_id, **env_kwargs | render_mode)
    if video_dir:
        # an evaluation records every episode, a training those that Gymnasium chooses
        trigger = (lambda n: n < args.eval_episodes) if args.eval else None
        env = gym.wrappers.RecordVideo(env, str(video_dir), trigger)
    if is_atari(args.env_id):
        env = gym.wrappers.AtariPreprocessing(env, frame_skip=args.env_kwargs.get("frameskip", 4))
        if env.unwrapped.get_action_meanings()[1] == "FIRE":
            env = FireReset(env)
        return gym.wrappers.FrameStackObservation(env, 4)
    env = MaskInfo(env)
    space = env.observation_space
    flat = isinstance(space, spaces.Box) and len(space.shape) in (1, 3)
    return env if flat else gym.wrappers.FlattenObservation(env)


class TaxiDispatch(gym.Env):
    """K taxis of Gymnasium's Taxi-v4; every step moves one, until all have delivered.

    An action is (taxi, move). Observations [K * 16]: row, column and pad to go to of each taxi
    (one-hot), passenger aboard, passenger delivered. Rewards are a twentieth of the taxi's.
    The mask [K, 1 + 6] allows taxis that have not delivered, and moves that change their state.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, taxis: int = 2, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.taxis = [gym.make("Taxi-v4", render_mode=render_mode).unwrapped for _ in range(taxis)]
        self.observation_space = spaces.Box(0, 1, (16 * taxis,))
        self.action_space = spaces.MultiDiscrete([taxis, 6])

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        for taxi in self.taxis:
            taxi.np_random = self.np_random
            taxi.reset()
        self.steps = 0
        self.delivered = np.zeros(len(self.taxis), bool)
        return self.observe()

    def step(self, action: np.ndarray) -> tuple:
        taxi, move = action
        reward = -1
        if not self.delivered[taxi]:
            _, reward, self.delivered[taxi], _, _ = self.taxis[taxi].step(move)
        self.steps += 1
        obs, info = self.observe()
        truncated = self.steps >= 200 * len(self.taxis)
        return obs, reward / 20, bool(self.delivered.all()), truncated, info

    def observe(self) -> tuple[np.ndarray, dict]:
        obs = np.zeros((len(self.taxis), 16), np.float32)
        mask = np.zeros((len(self.taxis), 7), bool)
        for i, taxi in enumerate(self.taxis):
            row, column, passenger, destination = taxi.decode(taxi.s)
            aboard = passenger == len(taxi.locs)
            obs[i, [row, 5 + column, 10 + (destination if aboard else passenger)]] = 1
            obs[i, 14] = aboard
            mask[i, 1:] = taxi.action_mask(taxi.s)
        obs[:, 15] = self.delivered
        mask[:, 0] = ~self.delivered
        return obs.flatten(), {"action_mask": mask}

    def render(self) -> np.ndarray:
        return np.hstack([taxi.render() for taxi in self.taxis])


gym.register("TaxiDispatch-v0", TaxiDispatch)


def without_mask(space: spaces.Space) -> spaces.Space:
    """The observation space without the "action_mask" of a Dict."""
    if not isinstance(space, spaces.Dict) or "action_mask" not in space.spaces:
        return space
    rest = {key: subspace for key, subspace in space.items() if key != "action_mask"}
    return spaces.Dict(rest) if len(rest) > 1 else next(iter(rest.values()))


def move_mask(method: Callable | None, obs: Any, info: dict) -> tuple[Any, dict]:
    """Move the mask of a Dict observation or of an `action_masks()` method into the info."""
    if isinstance(obs, dict) and "action_mask" in obs:
        info = info | {"action_mask": obs["action_mask"]}
        obs = {key: value for key, value in obs.items() if key != "action_mask"}
        return (obs if len(obs) > 1 else next(iter(obs.values()))), info
    return obs, (info | {"action_mask": np.asarray(method())} if method else info)


class MaskInfo(gym.Wrapper):
    """Provides the mask as info["action_mask"]."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        has_method = env.has_wrapper_attr("action_masks")
        self.method = env.get_wrapper_attr("action_masks") if has_method else None
        self.observation_space = without_mask(env.observation_space)

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        return move_mask(self.method, *self.env.reset(**kwargs))

    def step(self, action: Any) -> tuple:
        obs, reward, terminated, truncated, info = self.env.step(action)
        obs, info = move_mask(self.method, obs, info)
        return obs, reward, terminated, truncated, info


class VectorMaskInfo(gym.vector.VectorWrapper):
    """The same for a vector environment."""

    def __init__(self, envs: VectorEnv) -> None:
        super().__init__(envs)
        self.method = getattr(envs, "action_masks", None)
        self.single_observation_space = without_mask(envs.single_observation_space)
        self.observation_space = without_mask(envs.observation_space)

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        return move_mask(self.method, *self.env.reset(**kwargs))

    def step(self, actions: np.ndarray) -> tuple:
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        obs, infos = move_mask(self.method, obs, infos)
        for n in np.flatnonzero(infos.get("_final_obs", [])):
            infos["final_obs"][n], _ = move_mask(None, infos["final_obs"][n], {})
        return obs, rewards, terminated, truncated, infos


class SyncEnvs(SyncVectorEnv):
    """Gymnasium's environments that are stepped one after the other, with a faster step."""

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Step every environment; one that ends is reset in the same step."""
        all_obs = np.zeros(self.observation_space.shape, self.observation_space.dtype)
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        infos, final_infos, final_obs = [], {}, [None] * self.num_envs
        for n, env in enumerate(self.envs):
            try:
                obs, rewards[n], terminated[n], truncated[n], info = env.step(actions[n])
                if terminated[n] or truncated[n]:
                    final_obs[n], final_infos[n] = np.array(obs), info
                    obs, info = env.reset()
                all_obs[n] = obs
            except Exception as error:
                error.add_note(f"in environment {n} of process {RANK}")
                raise
            infos.append(info)
        keys = {"lives", "action_mask"} & infos[0].keys()  # infos that training reads
        vector_infos = {key: np.array([info[key] for info in infos]) for key in keys}
        if final_infos:
            lives = [final_infos.get(n, info).get("lives") for n, info in enumerate(infos)]
            vector_infos |= {"final_obs": final_obs, "final_info": {"lives": np.array(lives)}}
        return all_obs, rewards, terminated, truncated, vector_infos


def make_envs(args: Args, num_envs: int, seed: int, video_dir: Path | None = None) -> VectorEnv:
    """`num_envs` environments as one vector environment."""
    if args.vectorization in ("sync", "async"):
        env_fns = [partial(make_env, args, None if n else video_dir) for n in range(num_envs)]
        if args.vectorization == "sync":
            return SyncEnvs(env_fns, autoreset_mode="SameStep")
        return AsyncVectorEnv(env_fns, copy=False, context="forkserver", autoreset_mode="SameStep")
    if args.vectorization == "envpool":
        envpool = importlib.import_module("envpool")  # pip install envpool
        envs = envpool.make_gymnasium(args.env_id, num_envs=num_envs, seed=seed, **args.env_kwargs)
    else:
        env_kwargs = dict(args.env_kwargs)
        if is_atari(args.env_id):
            importlib.import_module("ale_py")
            env_kwargs = {"frameskip": 4, "reward_clipping": False} | env_kwargs
        envs = gym.make_vec(args.env_id, num_envs, "vector_entry_point", **env_kwargs)
    mode = envs.metadata.get("autoreset_mode")
    if mode not in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
        fail(f"{args.env_id} has autoreset_mode {mode}, must be SAME_STEP or NEXT_STEP")
    envs = VectorMaskInfo(envs)
    space = envs.single_observation_space
    if isinstance(space, spaces.Box) and len(space.shape) in (1, 3):
        return envs
    envs = gym.vector.VectorWrapper(envs)
    # envpool gives the space of one environment
    envs.observation_space = gym.vector.utils.batch_space(space, num_envs)
    return gym.wrappers.vector.FlattenObservation(envs)


def all_sum(values: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if WORLD_SIZE > 1:
        distributed.all_reduce(values)
    return values


def masked_mean_std(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std [K, 1] of the entries of x [K, M] where mask [K, M] is 1, of all processes."""
    count = all_sum(mask.sum(1, keepdim=True)).clamp(min=1)
    mean = all_sum((x * mask).sum(1, keepdim=True)) / count
    m2 = all_sum(((x - mean).square() * mask).sum(1, keepdim=True))
    return mean, (m2 / (count - 1).clamp(min=1)).sqrt()


class RunningMeanStd(nn.Module):
    """Mean and standard deviation of all samples so far, over all processes."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean64", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def add(self, samples: Tensor) -> None:
        """Merge samples [n, *shape] in float64 (Chan et al. 1979); m2 sums squared deviations."""
        samples = samples.to(self.m2)
        n = all_sum(torch.full_like(self.count, len(samples)))
        if n == 0:
            return
        batch_mean = all_sum(samples.sum(0)) / n
        batch_m2 = all_sum((samples - batch_mean).square().sum(0))
        delta = batch_mean - self.mean64
        self.m2 += batch_m2 + delta.square() * self.count * n / (self.count + n)
        self.mean64 += delta * n / (self.count + n)
        self.count += n
        self.mean.copy_(self.mean64)
        self.std.copy_((self.m2 / self.count + 1e-8).sqrt())


def make_body(args: Args, obs_shape: tuple[int, ...], image: bool) -> list[nn.Module]:
    """Layers from observations to features."""
    if len(obs_shape) == 3 and not image:  # a small CNN for grids, as that of gym-microrts
        layers = [nn.Conv2d(obs_shape[0], 16, 3, 2, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(16, 32, 3, 2, padding=1), nn.ReLU(), nn.Flatten()]
        width = nn.Sequential(*layers)(torch.zeros(1, *obs_shape)).shape[1]
        return [*layers, nn.Linear(width, 256), nn.ReLU()]
    if image:  # the Nature CNN (Mnih et al. 2015)
        layers = [nn.Conv2d(obs_shape[0], 32, 8, 4), nn.ReLU()]
        layers += [nn.Conv2d(32, 64, 4, 2), nn.ReLU()]
        layers += [nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten()]
        width = nn.Sequential(*layers)(torch.zeros(1, *obs_shape)).shape[1]
        return [*layers, nn.Linear(width, 512), nn.ReLU()]
    layers = []
    for width, size in pairwise((*obs_shape, *args.hidden_sizes)):
        layers += [nn.Linear(width, size), ACTIVATIONS[args.activation]()]
    return layers


class Agent(nn.Module):
    """Policy and value network, and the statistics that normalize observations and targets."""

    def __init__(self, args: Args, obs_space: spaces.Box, action_space: spaces.Space) -> None:
        super().__init__()
        obs_shape = obs_space.shape
        self.image = is_image(obs_space)
        self.grid = len(obs_shape) == 3 and not self.image
        self.channels_last = len(obs_shape) == 3 and obs_shape[-1] < obs_shape[0]
        if self.grid:  # C x H x W if only H = W, otherwise H x W x C
            self.channels_last = obs_shape[0] == obs_shape[1] or obs_shape[1] != obs_shape[2]
        if self.channels_last:
            obs_shape = obs_shape[2:] + obs_shape[:2]
        self.norm_obs = args.norm_obs and not self.image
        self.clip_obs = torch.inf if args.clip_obs is None else args.clip_obs
        self.obs_norm = RunningMeanStd(() if self.image else obs_space.shape)
        self.reward_norm = RunningMeanStd()
        self.value_norm = RunningMeanStd()
        discrete = isinstance(action_space, spaces.Discrete)
        self.nvec = np.ravel(action_space.n if discrete else action_space.nvec).tolist()
        self.action_shape, self.action_dtype = (len(self.nvec),), np.int64
        self.action_space = action_space
        self.mask = args.mask
        self.conditional = False  # set by `Rollout`: whether the first choice decides on masks
        offsets = torch.tensor([0, *self.nvec[:-1]]).cumsum(0)  # of the heads in D
        self.register_buffer("offsets", offsets)  # saved: ppo_discrete.py then refuses the file
        # argmax(logits + Gumbel noise) is a sample of softmax(logits)
        self.noise = torch.distributions.Gumbel(torch.zeros(sum(self.nvec)), torch.ones(1))
        width = 512 if self.image else 256 if self.grid else (*obs_shape, *args.hidden_sizes)[-1]
        trunk, actor = [], make_body(args, obs_shape, self.image)
        critic = make_body(args, obs_shape, self.image)
        if args.shared_network:
            trunk, actor, critic = actor, [], []
        self.trunk = nn.Sequential(*trunk)
        self.actor = nn.Sequential(*actor, nn.Linear(width, sum(self.nvec)))
        self.critic = nn.Sequential(*critic, nn.Linear(width, 1))
        if args.ortho_init:
            for layer in self.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    nn.init.orthogonal_(layer.weight, 2**0.5)
                    nn.init.zeros_(layer.bias)
            nn.init.orthogonal_(self.actor[-1].weight, 0.01)
            nn.init.orthogonal_(self.critic[-1].weight, 1.0)

    def preprocess(self, obs: Tensor) -> Tensor:
        """Observations [n, *O] as the networks read them."""
        if self.norm_obs:
            obs = (obs - self.obs_norm.mean) / self.obs_norm.std
            obs = obs.clamp(-self.clip_obs, self.clip_obs)
        if self.channels_last:
            obs = obs.movedim(-1, 1)
        if self.image:
            obs = obs.to(torch.float32, memory_format=torch.channels_last) / 255.0
        return obs

    def policy_masks(self, masks: Tensor) -> Tensor:
        """Masks of the policy, from those of the environment, [n, D] or [n, F, 1 + D - F]."""
        if self.mask == "none":
            return masks.new_ones(len(masks), sum(self.nvec))
        if self.mask == "independent" and masks.dim() == 3:  # what any allowed first choice allows
            first, rest = masks[..., 0], masks[..., 1:] & masks[..., :1]
            return torch.cat((first, rest.any(1)), -1)
        return masks

    def path_masks(self, masks: Tensor, first: Tensor) -> Tensor:
        """Masks [n, D] of all heads once the first head has chosen [n]."""
        if masks.dim() == 2:
            return masks
        rows = torch.arange(len(first), device=first.device)
        return torch.cat((masks[..., 0], masks[rows, first, 1:]), -1)

    def act(self, obs: Tensor, masks: Tensor, noise: Tensor | None) -> Tensor:
        """Actions [n, H] for observations [n, *O]: a sample, or the mode without noise."""
        logits = self.actor(self.trunk(self.preprocess(obs)))
        masks = self.policy_masks(masks)
        scores = logits if noise is None else logits + noise
        if masks.dim() == 3:
            first_scores, rest_scores = scores.split([self.nvec[0], sum(self.nvec[1:])], -1)
            if noise is None:  # the mode of all heads together
                rest = rest_scores.unsqueeze(1).masked_fill(~masks[..., 1:], MASKED)
                for head in rest.split(self.nvec[1:], -1):
                    first_scores = first_scores + head.log_softmax(-1).amax(-1)
            first = first_scores.masked_fill(~masks[..., 0], -torch.inf).argmax(-1)
            masks = self.path_masks(masks, first)
            scores = torch.cat((first_scores, rest_scores), -1)
        valid = torch.stack([head.any(-1) for head in masks.split(self.nvec, -1)], -1)
        if not valid.all():
            n, head = (~valid).nonzero()[0].tolist()
            raise ValueError(f"environment {n} of process {RANK}: head {head} has no valid action")
        scores = scores.masked_fill(~masks, -torch.inf)
        return torch.stack([head.argmax(-1) for head in scores.split(self.nvec, -1)], -1)

    def forward(self, obs: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of all choices [n, D] under masks [n, D], and critic's outputs [n]."""
        features = self.trunk(self.preprocess(obs))
        logits = self.actor(features).masked_fill(~masks, MASKED)
        heads = [head.log_softmax(-1) for head in logits.split(self.nvec, -1)]
        return torch.cat(heads, -1), self.critic(features).squeeze(-1)

    def log_prob(self, dist: Tensor, actions: Tensor) -> Tensor:
        """Log-probabilities [n] of actions [n, H] under distributions [n, D]."""
        return dist.gather(-1, actions + self.offsets).sum(-1)

    def path_ratio(self, dist: Tensor, batch: Batch) -> Tensor | float:
        """New over old probability [n] of the first choice: weight of the other heads' terms."""
        if not self.conditional:
            return 1.0
        first = batch["actions"][:, :1]
        return (dist.gather(-1, first) - batch["dists"].gather(-1, first)).exp().squeeze(-1)

    def entropy(self, dist: Tensor, path_ratio: Tensor | float) -> Tensor:
        """Entropies [n] in nats of distributions [n, D], estimated on the path under masks."""
        terms = -dist.exp() * dist
        return terms[:, : self.nvec[0]].sum(-1) + path_ratio * terms[:, self.nvec[0] :].sum(-1)

    def kl_divergence(self, p: Tensor, q: Tensor, path_ratio: Tensor | float = 1.0) -> Tensor:
        """KL(p, q) [n] in nats between distributions [n, D]; with `path_ratio` if p is new."""
        terms = p.exp() * (p - q)
        return terms[:, : self.nvec[0]].sum(-1) + path_ratio * terms[:, self.nvec[0] :].sum(-1)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Actions [N, H] as the environment takes them."""
        return actions.reshape(-1, *self.action_space.shape) + self.action_space.start


class Rollout:
    """T steps of N environments in numpy, and what the next rollout continues from."""

    def __init__(self, args: Args, agent: Agent, envs: VectorEnv, seed: int) -> None:
        shape = (args.num_steps, envs.num_envs)
        obs_shape = (shape[0] + 1, shape[1], *envs.single_observation_space.shape)
        self.obs = np.zeros(obs_shape, np.uint8 if agent.image else np.float32)
        self.actions = np.zeros((*shape, *agent.action_shape), agent.action_dtype)
        self.rewards = np.zeros(shape)
        self.terminated, self.truncated, self.life_lost = np.zeros((3, *shape), bool)
        self.valid = np.ones(obs_shape[:2], bool)  # False: NEXT_STEP reset, the action is ignored
        self.episode_return, self.episode_length, self.discounted_return = np.zeros((3, shape[1]))
        self.next_step = envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
        seeded = {} if args.vectorization == "envpool" else {"seed": seed}
        self.obs[-1], infos = envs.reset(**seeded)
        atari = args.vectorization == "envpool" or is_atari(args.env_id)
        self.lives = infos.get("lives") if atari and agent.image else None
        self.has_masks = "action_mask" in infos
        masks = infos.get("action_mask", np.ones((shape[1], sum(agent.nvec))))
        self.masks = np.zeros((obs_shape[0], *masks.shape), bool)  # as the environment gives them
        self.masks[-1] = masks
        agent.conditional = agent.mask == "conditional" and masks.ndim == 3

    @torch.inference_mode()
    def collect(self, agent: Agent, envs: VectorEnv, sample: bool = True) -> list[tuple]:
        """Step the environments; undiscounted return and length of every finished episode."""
        agent.eval()
        noise = agent.noise.sample(self.rewards.shape).to(agent.value_norm.mean.device)
        self.obs[0], self.valid[0] = self.obs[-1], self.valid[-1]
        self.masks[0] = self.masks[-1]
        self.final_obs = []  # (t, n, observation) of truncated episodes
        for t, step_noise in enumerate(noise):
            obs = torch.from_numpy(self.obs[t]).to(noise.device)
            masks = torch.from_numpy(self.masks[t]).to(noise.device)
            action = agent.act(obs, masks, step_noise if sample else None)
            self.actions[t] = action.cpu().numpy()
            step = envs.step(agent.to_env(self.actions[t]))
            self.obs[t + 1], self.rewards[t], self.terminated[t], self.truncated[t], infos = step
            if ("action_mask" in infos) != self.has_masks:
                raise ValueError("masks must be given at every reset and step, or never")
            self.masks[t + 1] = infos.get("action_mask", True)
            if self.next_step:  # the reset ignores the action
                self.masks[t + 1, self.terminated[t] | self.truncated[t]] = True
            if "final_obs" in infos:  # SAME_STEP
                for n in np.flatnonzero(self.truncated[t] & ~self.terminated[t]):
                    self.final_obs.append((t, n, np.array(infos["final_obs"][n])))
            if self.lives is not None:
                final_lives = infos.get("final_info", infos)["lives"]
                dones = self.terminated[t] | self.truncated[t]
                # where a game ended, infos["lives"] are those of the next one
                self.life_lost[t] = np.where(dones, final_lives, infos["lives"]) < self.lives
                self.lives = infos["lives"].copy()
        dones = self.terminated | self.truncated
        if self.next_step:
            self.valid[1:] = ~dones
        returns = self.episode_return + self.rewards.cumsum(0)
        lengths = self.episode_length + self.valid[:-1].cumsum(0)
        episodes = []
        for t, n in np.argwhere(dones):
            episodes.append((float(returns[t, n]), int(lengths[t, n])))
            returns[t:, n] -= returns[t, n]
            lengths[t:, n] -= lengths[t, n]
        self.episode_return, self.episode_length = returns[-1], lengths[-1]
        return episodes


def check_finite(iteration: int, **values: Any) -> None:
    """End the run before something that is not finite is saved."""
    for name, value in values.items():
        if len(where := np.argwhere(~np.isfinite(value))):
            raise FloatingPointError(f"iteration {iteration}: {name}{where[0].tolist()} not finite")


def process_rewards(agent: Agent, rollout: Rollout, args: Args) -> None:
    """Replace rewards and terminations of the rollout by those to learn from."""
    if args.episodic_life:
        rollout.terminated |= rollout.life_lost
    if args.sign_reward and rollout.lives is not None:
        rollout.rewards = np.sign(rollout.rewards)
    if args.norm_reward:  # divided by a std, no mean is subtracted (Engstrom et al. 2020)
        not_done = ~(rollout.terminated | rollout.truncated)
        discounted_returns = np.zeros_like(rollout.rewards)
        for t, reward in enumerate(rollout.rewards):
            discounted_returns[t] = reward + args.gamma * rollout.discounted_return
            rollout.discounted_return = discounted_returns[t] * not_done[t]
        agent.reward_norm.add(torch.from_numpy(discounted_returns[rollout.valid[:-1]]))
        limit = np.inf if args.clip_reward is None else args.clip_reward
        rollout.rewards = (rollout.rewards / agent.reward_norm.std.item()).clip(-limit, limit)
    if not args.bootstrap_truncated:
        rollout.terminated |= rollout.truncated


def compute_advantages(
    rewards: Array, values: Array, next_values: Array, dones: Array, gamma: float, lam: float
) -> Array:
    """Generalized advantage estimates (Schulman et al. 2016, eq. 16); all [T, N]."""
    deltas = rewards + gamma * next_values - values
    advantages = np.zeros_like(deltas)
    advantage = np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantage = deltas[t] + gamma * lam * ~dones[t] * advantage
        advantages[t] = advantage
    return advantages


@torch.no_grad()
def evaluate_policy(agent: Agent, obs: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Distributions [n, D], and values [n] in units of the rewards, of observations [n, *O]."""
    agent.eval()
    size = 256 if agent.image else 1024  # to save memory
    chunks = [agent(*chunk) for chunk in zip(obs.split(size), masks.split(size), strict=True)]
    dists, values = zip(*chunks, strict=True)
    return torch.cat(dists), torch.cat(values) * agent.value_norm.std + agent.value_norm.mean


def used_masks(agent: Agent, rollout: Rollout) -> Tensor:
    """Masks [T + 1, N, D] of all heads on the path that the first head took."""
    first = np.concatenate((rollout.actions, rollout.actions[-1:]))[..., 0]  # last row: any action
    first = torch.from_numpy(first).to(agent.offsets.device).flatten()
    masks = torch.from_numpy(rollout.masks).to(first.device).flatten(0, 1)
    return agent.path_masks(agent.policy_masks(masks), first).unflatten(0, rollout.valid.shape)


def compute_targets(agent: Agent, rollout: Rollout, args: Args) -> tuple[Tensor, ...]:
    """Distributions [B, D], values, advantages and value targets [B] under the current agent."""
    obs = torch.from_numpy(rollout.obs).to(agent.value_norm.mean.device)
    masks = used_masks(agent, rollout)
    dists, values = evaluate_policy(agent, obs.flatten(0, 1), masks.flatten(0, 1))
    values = values.view(obs.shape[:2]).cpu().numpy()
    next_values = values[1:].copy()  # NEXT_STEP: the row after an end holds its final observation
    if rollout.final_obs:
        t, n, final_obs = zip(*rollout.final_obs, strict=True)
        final_obs = torch.from_numpy(np.stack(final_obs)).to(obs)
        any_masks = masks[-1, list(n)]  # values do not depend on them
        _, final_values = evaluate_policy(agent, final_obs, any_masks)
        next_values[t, n] = final_values.cpu().numpy()
    dones = rollout.terminated | rollout.truncated
    next_values *= ~rollout.terminated
    steps = (rollout.rewards, values[:-1], next_values, dones, args.gamma)
    advantages = target_advantages = compute_advantages(*steps, args.gae_lambda)
    if args.value_target != "gae":  # lambda = 1: A + V is the discounted return; 0: one step
        target_advantages = compute_advantages(*steps, 1.0 if args.value_target == "mc" else 0.0)
    arrays = (values[:-1], advantages, values[:-1] + target_advantages)
    values, advantages, targets = (torch.from_numpy(x.flatten()).to(dists) for x in arrays)
    return dists[: len(values)], values, advantages, targets


@torch.no_grad()
def make_batch(
    agent: Agent, reference: Agent | None, rollout: Rollout, args: Args
) -> tuple[Batch, dict[str, Tensor]]:
    """Samples [B, ...] for the update, and what is logged of them; updates the value statistics."""
    dists, values, advantages, targets = compute_targets(agent, rollout, args)
    loss_mask = torch.from_numpy(rollout.valid[:-1]).to(values).flatten()
    columns = torch.stack((advantages, values, targets, targets - values)).double()
    means, stds = masked_mean_std(columns, loss_mask.expand_as(columns))
    metrics = {
        "advantages/mean": means[0],
        "advantages/std": stds[0],
        "values/old_mean": means[1],
        "values/target_mean": means[2],
        "losses/explained_variance": (1 - (stds[3] / stds[2]).square()).nan_to_num(neginf=0.0),
    }
    obs = torch.from_numpy(rollout.obs[:-1]).to(values.device).flatten(0, 1)
    actions = torch.from_numpy(rollout.actions).to(values.device).flatten(0, 1)
    env_masks = torch.from_numpy(rollout.masks[:-1]).to(values.device).flatten(0, 1)
    valid_choices = agent.path_masks(env_masks, actions[:, 0]).gather(-1, actions + agent.offsets)
    invalid = (~valid_choices).any(-1).float().unsqueeze(0)
    metrics["policy/invalid_fraction"], _ = masked_mean_std(invalid, loss_mask.unsqueeze(0))
    norm = agent.value_norm
    old_mean, old_std = norm.mean.clone(), norm.std.clone()
    old_outputs = (values - old_mean) / old_std
    if args.norm_value != "none":
        norm.add(targets[loss_mask > 0])
    if args.norm_value == "popart":  # van Hasselt et al. 2016, eq. 9: no value changes
        head = agent.critic[-1]
        head.weight.mul_(old_std / norm.std)
        head.bias.copy_((head.bias * old_std + old_mean - norm.mean) / norm.std)
        old_outputs = (values - norm.mean) / norm.std
    batch = {  # B rows each: `update` shuffles them
        "obs": obs,
        "actions": actions,
        "masks": used_masks(agent, rollout)[:-1].flatten(0, 1),
        "dists": dists,
        "logprobs": agent.log_prob(dists, actions),  # `act` has to sample from the same dists
        "advantages": advantages,
        "values": old_outputs,  # in units of the critic's outputs, as are the targets
        "targets": (targets - norm.mean) / norm.std,
        "loss_mask": loss_mask,  # 0 where the environment ignored the action
    }
    if reference:
        batch["ref_dists"] = evaluate_policy(reference, obs, batch["masks"])[0]
    return batch, metrics


def ppo_loss(
    agent: Agent, batch: Batch, args: Args, coefs: Tensor, critic_only: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one minibatch (PPO, eq. 9), and what is logged of it; all terms are [M]."""
    dist, values = agent(batch["obs"], batch["masks"])
    ent_coef, kl_coef = coefs
    # Policy loss (PPO, eq. 7), with the dual clip of Ye et al. 2020, eq. 3
    clip_coef = torch.inf if args.clip_coef is None else args.clip_coef
    negative_advantages = -batch["advantages"]
    logratio = agent.log_prob(dist, batch["actions"]) - batch["logprobs"]
    ratio = logratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = torch.max(negative_advantages * ratio, negative_advantages * clipped_ratio)
    if args.dual_clip_coef is not None:
        bounded_loss = torch.min(policy_loss, negative_advantages * args.dual_clip_coef)
        policy_loss = torch.where(negative_advantages > 0, bounded_loss, policy_loss)
    # Value loss, clipped around the old value as in PPO2 (Huang et al. 2022, detail 9)
    vclip = clip_coef if args.vclip_coef is None else args.vclip_coef
    delta = 1.0 if args.value_loss == "huber" else torch.inf  # inf: half the squared error
    value_error = partial(F.huber_loss, target=batch["targets"], reduction="none", delta=delta)
    value_loss = unclipped_value_loss = value_error(values)
    clipped_values = values.clamp(batch["values"] - vclip, batch["values"] + vclip)
    if args.clip_vloss:
        value_loss = torch.max(value_loss, value_error(clipped_values))
    # Entropy bonus, and penalties on KL(old, new) (PPO, eq. 8) and KL(new, reference)
    path_ratio = agent.path_ratio(dist, batch)
    entropy = agent.entropy(dist, path_ratio)
    kl = agent.kl_divergence(batch["dists"], dist)
    ref_kl = torch.zeros_like(kl)
    loss = policy_loss + args.vf_coef * value_loss
    if args.ent_coef != 0 or args.ent_coef_final is not None:
        loss = loss - ent_coef * entropy
    if args.kl_coef > 0 or args.kl_target is not None:
        loss = loss + kl_coef * kl
    if args.ref_checkpoint:
        ref_kl = agent.kl_divergence(dist, batch["ref_dists"], path_ratio)
        loss = loss + args.ref_kl_coef * ref_kl
    if critic_only:
        loss = args.vf_coef * value_loss
    with torch.no_grad():
        metrics = {
            "losses/policy_loss": policy_loss,
            "losses/value_loss": value_loss,
            "losses/value_loss_unclipped": unclipped_value_loss,
            "losses/value_clipfrac": (clipped_values != values).float(),
            "losses/entropy": entropy,
            "losses/kl": kl,
            "losses/ref_kl": ref_kl,
            "losses/old_approx_kl": -logratio,
            "losses/approx_kl": ratio - 1 - logratio,  # http://joschu.net/blog/kl-approx.html
            "losses/clipfrac": (clipped_ratio != ratio).float(),
            "values/mean": values * agent.value_norm.std + agent.value_norm.mean,
        }
    return loss @ batch["weights"], metrics  # the sum over processes is the mean over samples


def ppo_gradient(
    agent: Agent, params: list, batch: Batch, args: Args, coefs: Tensor, critic_only: bool
) -> tuple[Tensor, Tensor, list[str]]:
    """Clipped gradient of `ppo_loss` as one vector; the means that are logged, and their tags."""
    loss, metrics = ppo_loss(agent, batch, args, coefs, critic_only)
    grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    gradient = all_sum(torch.cat([grad.flatten() for grad in grads]))
    norm = gradient.norm()
    max_norm = torch.inf if args.max_grad_norm is None else args.max_grad_norm
    gradient = gradient * (max_norm / (norm + 1e-6)).clamp(max=1)
    means = torch.stack(list(metrics.values())).detach() @ batch["weights"]
    means = torch.cat((means, norm.view(1) / WORLD_SIZE))  # `update` sums over processes
    return gradient, means, [*metrics, "losses/grad_norm"]


def update(
    agent: Agent, optimizer: Optimizer, rollout: Rollout, batch: Batch, args: Args, coefs: Tensor
) -> dict[str, Tensor]:
    """Epochs of minibatches; means of the metrics over all minibatches and processes."""
    gradient_of = compile_once(ppo_gradient) if args.compile else ppo_gradient
    policy, critic = (p for group in optimizer.param_groups for p in group["params"])
    num_samples = len(batch["obs"])
    minibatch_size = num_samples // args.num_minibatches
    history, stop_policy = [], False
    agent.train()
    for epoch in range(args.update_epochs + args.critic_epochs):
        critic_only = epoch >= args.update_epochs
        params = critic.parts if critic_only else policy.parts + critic.parts
        if stop_policy and not critic_only:
            continue
        if epoch > 0 and args.recompute_advantages:
            _, _, batch["advantages"], targets = compute_targets(agent, rollout, args)
            batch["targets"] = (targets - agent.value_norm.mean) / agent.value_norm.std
            agent.train()
        order = torch.randperm(num_samples, device=coefs.device)
        samples = {key: x.index_select(0, order) for key, x in batch.items()}
        mask = samples["loss_mask"].view(-1, minibatch_size)
        samples["weights"] = (mask / all_sum(mask.sum(1, keepdim=True)).clamp(min=1)).flatten()
        if args.norm_adv:
            scope = minibatch_size if args.norm_adv_scope == "minibatch" else num_samples
            advantages = samples["advantages"].view(-1, scope)
            mean, std = masked_mean_std(advantages, mask.view(-1, scope))
            samples["advantages"] = ((advantages - mean) / (std + 1e-8)).flatten()
        for start in range(0, num_samples, minibatch_size):
            minibatch = {k: x[start : start + minibatch_size] for k, x in samples.items()}
            gradient, means, tags = gradient_of(agent, params, minibatch, args, coefs, critic_only)
            policy.grad = None if critic_only else gradient[: len(policy)]
            critic.grad = gradient[-len(critic) :]
            optimizer.step()
            history.append(means)
        if args.target_kl is not None and not critic_only:
            means = all_sum(torch.stack(history[-args.num_minibatches :]).mean(0))
            stop_policy = bool(means[tags.index("losses/approx_kl")] > args.target_kl)
    return dict(zip(tags, all_sum(torch.stack(history).mean(0)), strict=True))


def load_checkpoint(run_dir: str) -> dict[str, Any]:
    """Checkpoint of a run; `weights_only` runs no code that the file may hold."""
    path = Path(run_dir, "checkpoint.pt")
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("wrong checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        flags = {field.name for field in fields(Args)} & checkpoint["args"].keys()
        return checkpoint | {"args": {name: checkpoint["args"][name] for name in flags}}
    except Exception as error:
        fail(f"cannot load {path}, so resume or evaluate another run, or start anew: {error}")


def evaluate(args: Args, agent: Agent, envs: VectorEnv, seed: int, step: int) -> None:
    """Play episodes in one environment; networks and statistics stay as they are."""
    rollout = Rollout(replace(args, num_steps=1), agent, envs, seed)
    returns = []
    while len(returns) < args.eval_episodes:
        for episode_return, _ in rollout.collect(agent, envs, not args.eval_deterministic):
            returns.append(episode_return)
            print(f"episode {len(returns)}: return {episode_return:.2f}")
    print(f"mean return {np.mean(returns):.2f} +- {np.std(returns):.2f}")
    with SummaryWriter(args.run_dir) as writer:
        writer.add_scalar("eval/episodic_return", np.mean(returns), step)


def train(
    args: Args, agent: Agent, reference: Agent | None, envs: VectorEnv, seed: int, checkpoint: dict
) -> int:
    """Iterations of rollout, targets and update; the signal that stopped them, or 0."""
    named_params = [(name, p) for name, p in agent.named_parameters() if p.requires_grad]
    policy_params = [p for name, p in named_params if not name.startswith("critic")]
    critic_params = [p for name, p in named_params if name.startswith("critic")]
    rates = (args.actor_learning_rate, args.critic_learning_rate)
    epsilons = (args.actor_adam_eps, args.critic_adam_eps)
    groups = {}  # equal settings make one group, which is faster
    for params, lr, eps in zip((policy_params, critic_params), rates, epsilons, strict=True):
        vector = nn.Parameter(nn.utils.parameters_to_vector(params).detach())
        nn.utils.vector_to_parameters(vector, params)  # `params` become views of it
        vector.parts = params
        lr = args.learning_rate if lr is None else lr
        groups.setdefault((lr, args.adam_eps if eps is None else eps), []).append(vector)
    param_groups = [{"params": v, "initial_lr": lr, "eps": eps} for (lr, eps), v in groups.items()]
    optimizer = torch.optim.Adam(param_groups, fused=True)
    if checkpoint:  # Adam's moments; learning rates and eps are those of the flags
        optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]})
    batch_size = args.num_envs * args.num_steps  # of all processes
    num_iterations = args.total_timesteps // batch_size
    first_step = step = checkpoint.get("step", 0)
    first_iteration = num_iterations - (args.total_timesteps - step) // batch_size
    returns = deque(checkpoint.get("returns", []), maxlen=100)  # of the last episodes
    kl_coef = args.kl_coef or (0.0 if args.kl_target is None else 1.0)
    stop_signal = 0

    def request_stop(signum: int, _: Any) -> None:
        nonlocal stop_signal
        stop_signal = signum
        if WORLD_SIZE == 1:  # torchrun repeats a signal that its processes may have had
            signal.signal(signum, signal.SIG_DFL)  # a second one ends the process at once

    signal.signal(signal.SIGINT, request_stop)
    signal.signal(signal.SIGTERM, request_stop)
    rollout = Rollout(args, agent, envs, seed)
    if RANK == 0:
        writer = SummaryWriter(args.run_dir, purge_step=step + 1)
        writer.add_custom_scalars({"PPO": BOARD})
        flags = {k: v if type(v) in (int, float, str) else str(v) for k, v in vars(args).items()}
        for summary in hparams(flags, {"charts/return_100": 0, "eval/episodic_return": 0}):
            writer.file_writer.add_summary(summary)
    no_bar = RANK > 0 or not args.progress
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=no_bar)
    start_time = time.perf_counter()
    for iteration in range(first_iteration, num_iterations):
        # Schedules
        fraction = 1 - iteration / num_iterations if args.anneal_lr else 1.0
        for group in optimizer.param_groups:
            group["lr"] = fraction * group["initial_lr"]
        ent_coef_final = args.ent_coef if args.ent_coef_final is None else args.ent_coef_final
        ent_coef = np.interp(iteration, (0, num_iterations - 1), (args.ent_coef, ent_coef_final))
        coefs = torch.tensor([ent_coef, kl_coef], device=agent.value_norm.mean.device)
        warmup = iteration < args.critic_warmup_iterations
        num_epochs = args.update_epochs + args.critic_epochs
        update_args = replace(args, update_epochs=0, critic_epochs=num_epochs) if warmup else args

        # Rollout, targets, update
        episodes = rollout.collect(agent, envs)
        check_finite(iteration, reward=rollout.rewards, observation=rollout.obs)
        check_finite(iteration, final_observation=[obs for _, _, obs in rollout.final_obs])
        process_rewards(agent, rollout, args)
        batch, metrics = make_batch(agent, reference, rollout, args)
        metrics |= update(agent, optimizer, rollout, batch, update_args, coefs)
        step += batch_size
        if args.kl_target is not None and not warmup:  # adaptive penalty (PPO, section 4)
            new_dists, _ = evaluate_policy(agent, batch["obs"], batch["masks"])
            kl = agent.kl_divergence(batch["dists"], new_dists)
            kl, _ = masked_mean_std(kl.unsqueeze(0), batch["loss_mask"].unsqueeze(0))
            if kl > 1.5 * args.kl_target:
                kl_coef = min(2 * kl_coef, 1e6)
            elif kl < args.kl_target / 1.5:
                kl_coef = max(kl_coef / 2, 1e-6)
        if agent.norm_obs:  # last, because it changes the policy
            agent.obs_norm.add(batch["obs"][batch["loss_mask"] > 0])

        # Log
        reports = [(episodes, stop_signal)] * WORLD_SIZE
        if WORLD_SIZE > 1:
            distributed.all_gather_object(reports, (episodes, stop_signal))
        stop = max(report[1] for report in reports)
        scalars = {tag: float(value) for tag, value in metrics.items()}
        check_finite(iteration, **scalars)
        scalars["charts/SPS"] = (step - first_step) / (time.perf_counter() - start_time)
        scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        scalars |= {"charts/ent_coef": ent_coef, "charts/kl_coef": float(coefs[1])}
        if episodes := [episode for report in reports for episode in report[0]]:
            returns.extend(episode_return for episode_return, _ in episodes)
            scalars["charts/episodic_return"] = np.mean([x for x, _ in episodes])
            scalars["charts/episodic_length"] = np.mean([x for _, x in episodes])
            scalars["charts/return_100"] = np.mean(returns)
            bar.set_postfix_str(f"return {np.mean(returns):.2f}", refresh=False)
        if RANK == 0:  # all tags in one event
            values = [Summary.Value(tag=tag, simple_value=x) for tag, x in scalars.items()]
            writer.file_writer.add_summary(Summary(value=values), step)
        bar.update(batch_size)

        # Checkpoint, of tensors and Python's own types: `weights_only` loads no NumPy numbers
        due = args.checkpoint_every and (iteration + 1) % args.checkpoint_every == 0
        if RANK == 0 and (due or stop or iteration == num_iterations - 1):
            checkpoint = {"args": vars(args) | {"resume": None, "kl_coef": kl_coef}, "step": step}
            checkpoint |= {"returns": list(returns), "optimizer": optimizer.state_dict()["state"]}
            checkpoint |= {"agent": agent.state_dict()}
            path = Path(args.run_dir, "checkpoint.pt")
            torch.save(checkpoint, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)  # a kill leaves a whole checkpoint
        if stop:
            break
    bar.close()
    if RANK == 0:
        writer.close()
        mean = f"mean return {np.mean(returns or [np.nan]):.2f} of {len(returns)} episodes"
        print(f"{args.run_dir}: {mean}, {scalars['charts/SPS']:.0f} SPS")
        if stop and iteration < num_iterations - 1:
            print(f"stopped; continue with: python {sys.argv[0]} --resume {args.run_dir}")
    return stop


def main() -> None:
    """Read the flags, make environments and agent, then train or evaluate."""
    args = tyro.cli(Args, description=__doc__)
    checkpoint = {}
    if run_dir := args.eval or args.resume:
        checkpoint = load_checkpoint(run_dir)
        flags = Args(**checkpoint["args"])
        flags.capture_video &= not args.eval  # an evaluation records videos only if asked to
        args = replace(tyro.cli(Args, description=__doc__, default=flags), run_dir=run_dir)
        if args.resume and args.norm_value != flags.norm_value:
            fail(f"the run to resume has norm_value {flags.norm_value}")
    check_args(args)
    reference_checkpoint = {}
    if args.ref_checkpoint and not args.eval:
        reference_checkpoint = load_checkpoint(args.ref_checkpoint)
    for saved in (checkpoint, reference_checkpoint):
        if saved and saved["args"]["env_id"] != args.env_id:
            fail(f"the checkpoint is of {saved['args']['env_id']}, not of {args.env_id}")
    step = checkpoint.get("step", 0)
    if args.resume and args.total_timesteps - step < args.num_envs * args.num_steps:
        fail(f"{args.run_dir} is complete at step {step}; raise total_timesteps to continue")
    if not checkpoint and args.run_dir and Path(args.run_dir, "checkpoint.pt").exists():
        fail(f"{args.run_dir} holds a run; resume it, or give another run_dir")
    torch.set_num_threads(args.torch_threads)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # loss and gradient as one graph
    device = torch.device("cpu")
    if args.cuda and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    seed = int(np.random.SeedSequence((args.seed, step, RANK)).generate_state(1)[0] // 2)
    probe = replace(args, vectorization="sync") if args.vectorization == "async" else args
    envs = make_envs(probe, 1, seed)  # tells the spaces, before anything is written
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    _, infos = envs.reset()
    envs.close()
    if not isinstance(action_space, spaces.MultiDiscrete | spaces.Discrete):
        fail(f"the actions of {args.env_id} are {action_space}: use ppo_continuous.py for Box")
    if not isinstance(obs_space, spaces.Box):
        fail(f"the observations of {args.env_id} cannot be flattened to a Box: {obs_space}")
    torch.manual_seed(args.seed)
    agent = Agent(args, obs_space, action_space).to(device)
    mask_shape = infos["action_mask"].shape[1:] if "action_mask" in infos else None
    first, total = agent.nvec[0], sum(agent.nvec)
    if mask_shape not in (None, (total,), (first, 1 + total - first)):
        fail(f"the mask is {mask_shape}, must be {(total,)} or {(first, 1 + total - first)}")
    reference = None
    if reference_checkpoint:
        reference = Agent(replace(args, **reference_checkpoint["args"]), obs_space, action_space)
    try:
        if checkpoint:
            agent.load_state_dict(checkpoint["agent"])
        if reference:
            reference.to(device).load_state_dict(reference_checkpoint["agent"])
    except RuntimeError as error:
        fail(f"the checkpoint is of another network: {error}")
    if WORLD_SIZE > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        for tensor in agent.state_dict().values():
            distributed.broadcast(tensor, 0)
    np.random.seed(seed)
    torch.manual_seed(seed)
    video_dir = None
    if RANK == 0:
        name = f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        while Path(name).exists():  # another run started in the same second
            name += f"_{os.getpid()}"
        args.run_dir = args.run_dir or name
        Path(args.run_dir).mkdir(parents=True, exist_ok=True)
        if not args.eval:
            Path(args.run_dir, "args.json").write_text(json.dumps(vars(args), indent=2))
        if args.capture_video:
            video_dir = Path(args.run_dir, "videos", f"step-{step}-{int(time.time())}")
        network = "Nature CNN" if agent.image else f"MLP of {obs_space.shape[0]} numbers"
        if agent.grid:
            network = f"CNN of {obs_space.shape[-1 if agent.channels_last else 0]} channels"
        masks = f"masks {mask_shape}" if mask_shape else "no masks from the environment"
        print(f"{args.run_dir}: {device}, {network}, heads {agent.nvec}, mask {args.mask}, {masks}")
    envs = make_envs(args, 1 if args.eval else args.num_envs // WORLD_SIZE, seed, video_dir)
    if args.eval and RANK == 0:
        evaluate(args, agent, envs, seed, step)
    stop = 0 if args.eval else train(args, agent, reference, envs, seed, checkpoint)
    envs.close()
    if WORLD_SIZE > 1:
        distributed.destroy_process_group()
    if stop:
        raise SystemExit(128 + stop)


if __name__ == "__main__":
    main()
