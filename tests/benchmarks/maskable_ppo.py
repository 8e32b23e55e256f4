"""sb3-contrib's MaskablePPO on TaxiDispatch, with the settings of ppo_multidiscrete_mask.py.

    python tests/benchmarks/maskable_ppo.py --seed 1 [--total-timesteps 2000000]

Its heads draw independently of each other, so each gets what it can be told: the first which taxis
may be moved, the second what any of these may do.
"""

import argparse
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.env_util import make_vec_env

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ppo_multidiscrete_mask


class Independent(gym.Wrapper):
    """TaxiDispatch with one mask a head, as MaskablePPO asks for them."""

    def action_masks(self) -> np.ndarray:
        """Taxis [K] and moves [6] that are allowed, one after the other."""
        mask = self.env.look()[1]["action_mask"].astype(bool)
        taxis = mask[:, 0]
        return np.concatenate((taxis, mask[taxis, 1:].any(0)))


def main() -> None:
    """Train, and print the mean return of the last 100 episodes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--total-timesteps", type=int, default=2_000_000)
    options = parser.parse_args()
    torch.set_num_threads(1)

    def make() -> gym.Env:
        return Independent(ppo_multidiscrete_mask.TaxiDispatch())

    model = MaskablePPO(
        "MlpPolicy",
        make_vec_env(make, 8, seed=options.seed),
        learning_rate=lambda left: 2.5e-4 * left,
        n_steps=128,
        batch_size=256,
        n_epochs=4,
        clip_range=0.1,
        clip_range_vf=0.1,
        ent_coef=0.01,
        seed=options.seed,
        device="cpu",
        stats_window_size=100,
    )
    start = time.perf_counter()
    model.learn(options.total_timesteps)
    returns = [episode["r"] for episode in model.ep_info_buffer]
    speed = model.num_timesteps / (time.perf_counter() - start)
    mean = f"mean return of the last {len(returns)} episodes {np.mean(returns):.2f}"
    print(f"{mean}, {speed:.0f} SPS")


if __name__ == "__main__":
    main()
