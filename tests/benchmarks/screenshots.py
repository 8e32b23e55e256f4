"""Pictures of TensorBoard with runs of several flags: results/tensorboard_*.png.

    python tests/benchmarks/screenshots.py            # trains what is missing in runs/screenshots

Needs Chromium.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
RUNS = ROOT / "runs" / "screenshots"
FLAGS = {  # HPARAMS opens with the columns activation to anneal_lr
    "base": "",
    "popart": "--norm-value popart",
    "kl-penalty": "--clip-coef None --kl-coef 1 --kl-target 0.01",
    "relu": "--activation relu",
    "adam-eps": "--adam-eps 1e-3",
    "constant-lr": "--no-anneal-lr",
}
TAGS = "return_100|explained_variance|entropy|value_loss$"
PAGES = {  # address and size of the window
    "scalars": (f"scalars&tagFilter={quote(TAGS)}&_smoothingWeight=0.6", "1140,730"),
    "hparams": ("hparams", "1720,420"),
    "custom_scalars": ("custom_scalars", "1140,690"),
}
PORT = 6016


def main() -> None:
    """Train, start TensorBoard, and take one picture a page."""
    for name, flags in FLAGS.items():
        command = [sys.executable, "ppo_discrete.py", "--total-timesteps", "200000"]
        if not (RUNS / name / "checkpoint.pt").exists():
            run = ["--run-dir", str(RUNS / name), *flags.split()]
            subprocess.run([*command, *run], cwd=ROOT, check=True)
    serve = ["-m", "tensorboard.main", "--logdir", "runs/screenshots", "--port", str(PORT)]
    server = subprocess.Popen([sys.executable, *serve], cwd=ROOT)
    time.sleep(15)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    for name, (page, size) in PAGES.items():
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=30000"]
        options += [f"--window-size={size}", f"--screenshot={RESULTS / f'tensorboard_{name}.png'}"]
        url = f"http://localhost:{PORT}/#{page}"
        subprocess.run([browser, *options, url], check=True, timeout=120)
    server.terminate()


if __name__ == "__main__":
    main()
