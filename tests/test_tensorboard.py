"""A real TensorBoard server shows the runs: scalars, flags, and one curve after a kill."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, read_scalars

import ppo_discrete as ppo

FLAGS = "--num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 1 --no-progress"
STEPS = 128  # of an iteration
RUNS = {
    "plain": "--seed 1",
    "other": "--seed 2 --gamma 0.9 --norm-obs --hidden-sizes 8 --clip-coef none --activation relu",
}
STATUSES = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]

# design, section 5: what applies to every script
TAGS = """
charts/episodic_return charts/episodic_length charts/SPS charts/learning_rate charts/kl_coef
charts/ent_coef losses/policy_loss losses/value_loss losses/entropy losses/old_approx_kl
losses/approx_kl losses/clipfrac losses/explained_variance losses/value_loss_unclipped
losses/value_clipfrac losses/grad_norm losses/kl advantages/mean advantages/std values/mean
values/old_mean values/target_mean
"""

KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import ppo_discrete as ppo

log = ppo.log

def log_and_die(writer, step, scalars):
    log(writer, step, scalars)
    writer.flush()
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

ppo.log = log_and_die
ppo.main()
"""

Fetch = Callable[..., Any]


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs under different flags, one of them evaluated, and one killed and resumed."""
    root = tmp_path_factory.mktemp("tensorboard")

    def start(*flags: str, script: Path = ROOT / "ppo_discrete.py", code: int = 0) -> None:
        result = subprocess.run(
            [sys.executable, str(script), *flags], cwd=root, capture_output=True, timeout=120
        )
        assert result.returncode == code, result.stderr

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(signal, "signal", lambda *_: None)
        for name, flags in RUNS.items():
            words = f"{FLAGS} {flags} --total-timesteps {4 * STEPS} --run-dir runs/{name}"
            patch.setattr(sys, "argv", ["ppo_discrete.py", *words.split()])
            ppo.main()
        patch.setattr(sys, "argv", ["ppo_discrete.py", "--eval", "runs/other", "--seed", "5"])
        ppo.main()
    (root / "killed.py").write_text(KILLED.format(root=str(ROOT), step=5 * STEPS))
    flags = f"{FLAGS} --total-timesteps {8 * STEPS} --checkpoint-every 3 --run-dir runs/killed"
    start(*flags.split(), script=root / "killed.py", code=-signal.SIGKILL)
    assert read_scalars(root / "runs/killed")["charts/SPS"][-1][0] == 5 * STEPS
    start("--resume", "runs/killed", "--learning-rate", "0.01")
    return root / "runs"


@pytest.fixture(scope="module", params=["false", "auto"])
def fetch(logdir: Path, request: pytest.FixtureRequest) -> Iterator[Fetch]:
    """`fetch(path, body=None, **query)`: the server's answer, with either of its data loaders."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port"]
    command += [str(port), "--host", "127.0.0.1", "--load_fast", request.param]
    server = subprocess.Popen(
        [*command, "--reload_interval", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def fetch(path: str, body: dict | None = None, **query: str) -> Any:
        url = f"http://127.0.0.1:{port}/data/{path}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        with opener.open(urllib.request.Request(url, data, headers), timeout=30) as answer:
            return json.load(answer)

    def loaded() -> bool:
        try:
            tags = fetch("plugin/scalars/tags")
            if tags.keys() != {*RUNS, "killed"} or "eval/episodic_return" not in tags["other"]:
                return False
            return all(
                fetch("plugin/scalars/scalars", run=run, tag="charts/SPS")[-1][1] == last * STEPS
                for run, last in (("plain", 4), ("other", 4), ("killed", 8))
            )
        except (OSError, LookupError):
            return False

    try:
        deadline = time.monotonic() + 90
        while not loaded():
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not show the runs"
            time.sleep(0.2)
        yield fetch
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_runs(fetch: Fetch) -> None:
    assert sorted(fetch("runs")) == sorted([*RUNS, "killed"])


@pytest.mark.parametrize("run", [*RUNS, "killed"])
def test_scalars(fetch: Fetch, logdir: Path, run: str) -> None:
    """All tags of the design, a point an iteration."""
    tags = fetch("plugin/scalars/tags")[run]
    assert [tag for tag in TAGS.split() if tag not in tags] == []
    iterations, written = 8 if run == "killed" else 4, read_scalars(logdir / run)
    for tag in TAGS.split():
        rows = fetch("plugin/scalars/scalars", run=run, tag=tag)
        assert [step for _, step, _ in rows] == [STEPS * (i + 1) for i in range(iterations)], tag
        times = [wall for wall, _, _ in rows]
        assert times == sorted(times), tag
        assert all(abs(wall - time.time()) < 3600 for wall in times)
        assert [(s, v) for _, s, v in rows] == written[tag], tag


def test_scalars_make_sense(fetch: Fetch) -> None:
    """Values that are known without the script."""

    def values(tag: str, run: str) -> list[float]:
        return [value for _, _, value in fetch("plugin/scalars/scalars", run=run, tag=tag)]

    for run in RUNS:
        assert values("charts/learning_rate", run) == pytest.approx(
            [2.5e-4 * (4 - i) / 4 for i in range(4)]
        )
        assert values("charts/ent_coef", run) == pytest.approx([0.01] * 4)
        assert all(8 <= value <= 100 for value in values("charts/episodic_return", run))
        # CartPole rewards every step with 1
        returns, lengths = (values(f"charts/episodic_{x}", run) for x in ("return", "length"))
        assert returns == lengths
        assert all(0.5 < value < 0.6932 for value in values("losses/entropy", run))
        assert min(values("charts/SPS", run)) > 1
    # the step of the checkpoint that was evaluated
    ((_, step, value),) = fetch("plugin/scalars/scalars", run="other", tag="eval/episodic_return")
    assert step == 4 * STEPS
    assert 8 <= value <= 500


def test_killed_run_is_one_curve(fetch: Fetch) -> None:
    """Points beyond the checkpoint are replaced: those of the resumed run have its rate."""
    rows = fetch("plugin/scalars/scalars", run="killed", tag="charts/learning_rate")
    assert [step for _, step, _ in rows] == [STEPS * (i + 1) for i in range(8)]
    expected = [(2.5e-4 if i < 3 else 0.01) * (8 - i) / 8 for i in range(8)]
    assert [value for _, _, value in rows] == pytest.approx(expected)


def groups(fetch: Fetch, columns: list[dict]) -> dict[str, dict]:
    """Session groups of the HPARAMS tab by the name of their run."""
    body = {"experimentName": "", "allowedStatuses": STATUSES, "colParams": columns}
    answer = fetch("plugin/hparams/session_groups", body | {"startIndex": 0, "sliceSize": 100})
    assert answer["totalSize"] == len(answer["sessionGroups"])
    return {group["sessions"][0]["name"]: group for group in answer["sessionGroups"]}


def test_hparams(fetch: Fetch) -> None:
    """Every run with its flags."""
    experiment = fetch("plugin/hparams/experiment", {"experimentName": ""})
    infos = {info["name"]: info for info in experiment["hparamInfos"]}
    names = {field.name for field in fields(ppo.Args)}
    metrics = {info["name"]["tag"] for info in experiment["metricInfos"]}
    assert metrics >= {"charts/episodic_return", "eval/episodic_return"}
    found = groups(fetch, [{"hparam": name} for name in infos])
    assert found.keys() == {*RUNS, "killed"}
    common = dict(num_envs=2, num_steps=64, env_id="CartPole-v1", anneal_lr=True, vf_coef=0.5)
    expected = {
        "plain": dict(gamma=0.99, norm_obs=False, seed=1, clip_coef=0.2, activation="tanh"),
        "other": dict(gamma=0.9, norm_obs=True, seed=2, clip_coef="None", activation="relu"),
        "killed": dict(gamma=0.99, norm_obs=False, seed=1, checkpoint_every=3),
    }
    for run, flags in expected.items():
        shown = found[run]["hparams"]
        assert shown.keys() == names
        for name, value in (common | flags).items():
            assert shown[name] in (value, str(value)), name
    assert "8" in str(found["other"]["hparams"]["hidden_sizes"])


@pytest.mark.parametrize("order, sign", [("ORDER_ASC", 1), ("ORDER_DESC", -1)])
def test_hparams_metric(fetch: Fetch, order: str, sign: int) -> None:
    """The return of the last iteration is a metric, by which the runs can be sorted."""
    metric = {"group": "", "tag": "charts/episodic_return"}
    found = groups(fetch, [{"metric": metric, "order": order}])
    finals = {}
    for run, group in found.items():
        values = {m["name"]["tag"]: m for m in group["metricValues"]}
        rows = fetch("plugin/scalars/scalars", run=run, tag="charts/episodic_return")
        shown = values["charts/episodic_return"]
        assert (shown["trainingStep"], shown["value"]) == (rows[-1][1], rows[-1][2])
        finals[run] = shown["value"]
    assert len(set(finals.values())) == 3
    assert list(finals.values()) == sorted(finals.values(), key=lambda value: sign * value)
    evaluated = {m["name"]["tag"] for m in found["other"]["metricValues"]}
    assert "eval/episodic_return" in evaluated
