"""One looping picture of trained agents, side by side.

    python tests/benchmarks/gif.py runs/RUN runs/RUN ...        # -> results/agents.gif

The arguments are run directories. Each agent plays with its most probable actions, episode after
episode, for FRAMES pictures. Needs pillow; MuJoCo without a display needs MUJOCO_GL=egl or osmesa.
"""

import argparse
import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
SIZE, FRAMES, FRAME_MS = 200, 100, 80
SKIP = {"HalfCheetah-v5": 2, "LunarLander-v3": 4}  # steps between two pictures
KWARGS = {"HalfCheetah-v5": {"camera_name": "track"}}


@torch.no_grad()
def play(run_dir: str) -> list[Image.Image]:
    """Pictures of one agent, with the name of its task."""
    checkpoint = torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)
    ppo = importlib.import_module(checkpoint["args"]["exp_name"])
    args = ppo.Args(**checkpoint["args"])
    task = args.env_id.split(":")[-1]
    env_kwargs = args.env_kwargs | KWARGS.get(task, {}) | {"render_mode": "rgb_array"}
    env = ppo.make_env(replace(args, env_kwargs=env_kwargs))
    agent = ppo.Agent(args, env.observation_space, env.action_space)
    agent.load_state_dict(checkpoint["agent"])
    agent.eval()
    frames = []
    obs, info = env.reset(seed=1)
    while len(frames) < FRAMES:
        for _ in range(SKIP.get(task, 1)):
            inputs = [torch.from_numpy(obs[None]).float()]
            if "action_mask" in info:
                mask = torch.as_tensor(info["action_mask"]).bool().unsqueeze(0)
                agent.conditional = mask.dim() == 3
                inputs.append(mask)
            action = agent.act(*inputs, noise=None).numpy()
            obs, _, terminated, truncated, info = env.step(agent.to_env(action)[0])
            if terminated or truncated:
                obs, info = env.reset()
        frame = Image.fromarray(np.ascontiguousarray(env.render()))
        frame.thumbnail((SIZE, SIZE))
        tile = Image.new("RGB", (SIZE, SIZE + 16), "white")
        tile.paste(frame, ((SIZE - frame.width) // 2, 16 + (SIZE - frame.height) // 2))
        ImageDraw.Draw(tile).text((4, 2), task, fill="black")
        frames.append(tile)
    env.close()
    return frames


def main() -> None:
    """Play and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", help="run directories")
    sys.path.insert(0, str(ROOT))
    played = [play(run_dir) for run_dir in parser.parse_args().runs]
    pictures = []
    for tiles in zip(*played, strict=True):
        picture = Image.new("RGB", (SIZE * len(tiles), SIZE + 16))
        for i, tile in enumerate(tiles):
            picture.paste(tile, (SIZE * i, 0))
        pictures.append(picture)
    some = pictures[:: FRAMES // 5]  # tell the colors of all
    stacked = Image.fromarray(np.concatenate([np.asarray(picture) for picture in some]))
    colors = stacked.quantize(128)
    pictures = [picture.quantize(palette=colors, dither=0) for picture in pictures]
    path = RESULTS / "agents.gif"
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=FRAME_MS, loop=0, optimize=True
    )
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
