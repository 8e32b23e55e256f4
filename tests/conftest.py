"""What the tests share: the scripts as modules, and ways to run them."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["SDL_VIDEODRIVER"] = "dummy"

import ppo_discrete  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def main(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Iterator[Callable]:
    """Run the script with flags in this process: exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    ended = 0

    def main(*flags: Any, module: ModuleType = ppo_discrete) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        nonlocal ended
        if {"--resume", "--eval"} & set(flags) and int(time.time()) == ended:
            time.sleep(1 - time.time() % 1)  # names of event files begin with the second
        code = 0
        capfd.readouterr()
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code
        ended = int(time.time())
        return code or 0, *capfd.readouterr()

    yield main
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def read_scalars(run_dir: Path | str) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value), ...]} of a run's directory, as TensorBoard loads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
