"""A launch on a cluster of two nodes, real Ray processes on this machine, of which one dies in the middle."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.launches import PATIENCE, Launch

CLUSTER = {
    "RAY_AUTH_MODE": "disabled",  # on the loopback device, for the time of a test
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}
"""the last three: a dead node is noticed in seconds"""
FLAGS = ["--block", "--num-cpus=1", "--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0"]


def start_node(log: Path, *flags: str) -> subprocess.Popen:
    """One `ray start`, up and running, in a session of its own."""
    command = [str(Path(sys.executable).parent / "ray"), "start", *flags, *FLAGS, "--disable-usage-stats"]
    with log.open("w") as file:
        node = subprocess.Popen(
            command, env={**os.environ, **CLUSTER}, stdout=file, stderr=file, start_new_session=True
        )
    deadline = time.monotonic() + PATIENCE
    while "Ray runtime started" not in log.read_text():
        if node.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(log.read_text())
        time.sleep(0.1)
    return node


def kill_node(node: subprocess.Popen) -> None:
    """As a machine dies: all of its processes at once, the runs' included."""
    if node.poll() is None:
        for process in [*psutil.Process(node.pid).children(recursive=True), node]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()


@pytest.fixture
def nodes(tmp_path):
    """(address, head, second node)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    head = start_node(tmp_path / "head.log", "--head", f"--port={port}", "--include-dashboard=false")
    try:
        second = start_node(tmp_path / "second.log", f"--address=127.0.0.1:{port}", "--dashboard-agent-listen-port=0")
        try:
            yield f"127.0.0.1:{port}", head, second
        finally:
            kill_node(second)
    finally:
        kill_node(head)


def test_a_run_whose_node_dies_goes_on_elsewhere(nodes, tmp_path, monkeypatch):
    address, _, second = nodes
    for name, value in CLUSTER.items():
        monkeypatch.setenv(name, value)
    launch = Launch(tmp_path / "out", "--ray_address", address, seeds="0,1")
    too_much = Launch(tmp_path / "more", "--ray_address", address, "--gpus_per_trial", "1")
    code, _, err = too_much.run()
    assert code == 2 and "1 CPU, 0 GPU; 1 CPU, 0 GPU" in err, err

    driver = launch.start(faults="hold")
    try:
        launch.wait_for(0, 1, driver)
        launch.wait_for(1, 1, driver)
        kill_node(second)
        (launch.root / "go").touch()
        out, err = driver.communicate(timeout=PATIENCE)
    finally:
        driver.kill()
    assert driver.returncode == 0, err + out
    launch.assert_undisturbed(0, 1)
    assert sorted(launch.attempts(seed) for seed in (0, 1)) == [1, 2] and "its process died" in err
