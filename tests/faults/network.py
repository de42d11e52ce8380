"""Hosts on one machine: network namespaces on a bridge, each with a folder that no other host sees."""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .common import ROOT
from .node_worker import work

PORT = 29400
# Timeouts in seconds: of a rendezvous for more hosts once there are enough of them, and of the store.
RENDEZVOUS = {"last_call_timeout": 5, "join_timeout": 120, "keep_alive_interval": 3, "read_timeout": 20}


def refusal() -> str:
    """Why this machine makes no network namespaces; empty if it does."""
    if not shutil.which("ip") or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root and the command ip"
    name = f"mori-{os.getpid()}-probe"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def ip(*words: str) -> None:
    """Run the command ip."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Network:
    """`count` hosts on one switch; the context removes them, and ends what runs on them."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.prefix = folder, f"mori-{os.getpid()}"
        self.switch, self.endpoint = f"{self.prefix}-switch", "10.77.0.1"
        self.hosts = [Host(self, number) for number in range(count)]

    def __enter__(self) -> "Network":
        try:
            ip("netns", "add", self.switch)
            ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", self.switch, "link", "set", "bridge", "up")
            for host in self.hosts:
                host.plug_in()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for host in self.hosts:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.switch], capture_output=True)


class Host:
    """A network namespace with an address, a folder, and a torchrun."""

    def __init__(self, network: Network, number: int):
        self.network, self.number = network, number
        self.namespace, self.address = f"{network.prefix}-{number}", f"10.77.0.{number + 1}"
        self.folder = network.folder / f"host-{number}"
        self.pid, self.code, self.starts = 0, 0, 0

    def plug_in(self) -> None:
        """Make the namespace and its cable to the switch."""
        ip("netns", "add", self.namespace)
        port = f"port{self.number}"
        ip("link", "add", "eth0", "netns", self.namespace, "type", "veth", "peer", "name", port, "netns", self.network.switch)  # fmt: skip
        ip("-n", self.network.switch, "link", "set", port, "master", "bridge", "up")
        ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for name in ("lo", "eth0"):
            ip("-n", self.namespace, "link", "set", name, "up")

    def cut(self, is_cut: bool = True) -> None:
        """Pull the cable, or plug it in again; neither end is told."""
        # The address stays: a port that leaves the bridge loses packets as a broken cable does.
        port = ["link", "set", f"port{self.number}"]
        ip("-n", self.network.switch, *port, *(["nomaster"] if is_cut else ["master", "bridge"]))

    def slow(self, rate: str) -> None:
        """Limit what leaves the host to `rate`, such as 1mbit."""
        rule = ["qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "16kb", "latency", "2s"]
        subprocess.run(["ip", "netns", "exec", self.namespace, "tc", *rule], check=True, capture_output=True)

    def start(self, fields: dict, *, nodes: tuple[int, int], restarts: int, **environment) -> None:
        """Start what torchrun is inside, an elastic agent, with one rank that trains with these fields of the config.

        Agent and ranks are forked from this process, which has imported everything.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.starts += 1
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            self._move_in(environment)
            elastic_launch(self._settings(nodes, restarts), work)(fields)
            code = 0
        except ChildFailedError as error:
            print(error, flush=True)
        except SystemExit as leaving:  # an agent that is told to leave
            code = leaving.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)

    def start_torchrun(self, fields: dict, *, nodes: tuple[int, int], restarts: int, **environment) -> None:
        """Start torchrun itself, whose ranks import everything."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.starts += 1
        self.pid = os.fork()
        if self.pid:
            return
        self._move_in({**environment, "FIELDS": json.dumps(fields)})
        config = self._settings(nodes, restarts)
        options = [
            f"--nnodes={nodes[0]}:{nodes[1]}", "--nproc-per-node=1", f"--max-restarts={restarts}", "--rdzv-backend=c10d",
            f"--rdzv-id={config.run_id}", f"--rdzv-endpoint={config.rdzv_endpoint}", f"--local-addr={self.address}",
            "--rdzv-conf=" + ",".join(f"{name}={value}" for name, value in config.rdzv_configs.items() if name != "timeout"),
        ]  # fmt: skip
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "tests/faults/node_worker.py")])  # fmt: skip

    def _move_in(self, environment: dict) -> None:
        """Make this process one of the host's: its network, its folder, its output."""
        with open(f"/run/netns/{self.namespace}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns")
        os.setsid()
        os.chdir(self.folder)
        handle = os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(handle, stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        os.environ |= {
            "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "STEPS_FILE": str(self.folder / "steps.jsonl"), **{name: str(value) for name, value in environment.items()},
        }  # fmt: skip

    def _settings(self, nodes: tuple[int, int], restarts: int) -> LaunchConfig:
        """What torchrun makes of its flags."""
        # torchrun would look up the machine's name, which all hosts of this network share.
        own = {"is_host": int(self.address == self.network.endpoint)}
        return LaunchConfig(
            *nodes, 1, run_id="run", rdzv_backend="c10d", rdzv_endpoint=f"{self.network.endpoint}:{PORT}",
            rdzv_configs={**RENDEZVOUS, **own}, max_restarts=restarts, start_method="fork", local_addr=self.address,
        )  # fmt: skip

    def wait(self, seconds: float) -> int | None:
        """The exit code of torchrun; None if it is still running after `seconds`."""
        deadline = time.monotonic() + seconds
        while self.pid:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.pid, self.code = 0, os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                return None
            else:
                time.sleep(0.05)
        return self.code

    @property
    def workers(self) -> list[int]:
        """The process ids of its ranks."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()))
        return []

    def kill_worker(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the ranks."""
        for pid in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def leave(self) -> None:
        """Tell torchrun to end, as Slurm does before it takes a node away."""
        os.kill(self.pid, signal.SIGTERM)

    @contextlib.contextmanager
    def rendezvous(self) -> Iterator[None]:
        """The context in which this host keeps the rendezvous of the others, and trains nothing."""
        pid = os.fork()
        if not pid:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._move_in({})
            store = torch.distributed.TCPStore(self.address, PORT, is_master=True)
            while store:
                time.sleep(60)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def kill(self) -> None:
        """Kill torchrun and its ranks."""
        if self.pid:
            for pid in [self.pid, *self.workers]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.wait(10)

    def lose_power(self) -> None:
        """Pull the cable, so that nobody hears of it, and kill everything."""
        self.cut()
        self.kill()

    def text(self) -> str:
        """What was printed."""
        path = self.folder / "out.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def events(self) -> list[dict]:
        """What `node_worker` recorded, in order: starts, joins, and steps with their windows."""
        path = self.folder / "steps.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]


def wait_until(condition, seconds: float, what: str) -> None:
    """Wait until `condition()` is true. Raises TimeoutError with `what`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.05)
