"""Nodes without a shared disk, of which some are killed, cut off, slow, emptied, damaged, or come later.

Each case runs on hosts of `network`; `--only nodes` also writes what a loss cost: the seconds to the next step, and the steps.
"""

import json
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial

import torch
from safetensors.torch import load_file

from mori.checkpoint import checkpoints
from mori.checkpoint.files import hashes
from mori.data.windows import Batches

from .common import Case, Lab, row
from .network import Host, Network, refusal, wait_until

STEPS, SAVE_STEPS, WINDOWS, TIMEOUT = 18, 4, 2, 12
STEP_SECONDS, SECONDS = 0.2, 200


class Trial:
    """One run on some hosts, and the checks of its end."""

    def __init__(self, lab: Lab, network: Network, name: str):
        self.lab, self.network, self.hosts = lab, network, network.hosts
        self.fields = {
            "model": "model", "corpus": ["text.txt"], "block_size": 16, "max_steps": STEPS, "per_device_train_batch_size": WINDOWS,
            "learning_rate": 1e-3, "logging_steps": 1, "eval_steps": 9, "save_steps": SAVE_STEPS, "save_total_limit": 2,
            "max_new_tokens": 2, "prompt": ["Halo"], "device": "cpu", "precision": "fp32", "dropout": 0.0, "logging_dir": "runs",
            "output_dir": "brain", "run_name": "run", "ddp_timeout": TIMEOUT,
        }  # fmt: skip
        for host in self.hosts:
            shutil.copytree(lab.model, host.folder / "model")
            shutil.copy(lab.text, host.folder / "text.txt")
        self.struck_at = [0.0]
        self.costs: list[dict] = []
        self.uses_torchrun, self.most_lost = False, SAVE_STEPS

    def begin(self, *numbers: int, **environment) -> None:
        """Start torchrun on these hosts; again if not all of them have come to the first rendezvous in time."""
        is_first = not self.events()
        while True:
            for number in numbers:
                host = self.hosts[number]
                start = host.start_torchrun if self.uses_torchrun else host.start
                values = {"STEP_SECONDS": STEP_SECONDS, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1, **environment}
                start(self.fields, nodes=(1, 3), restarts=5, **values)
            if not is_first:
                return
            wait_until(lambda: any(e["event"] == "joined" for e in self.events()), SECONDS, "the first start")
            if self.events()[0]["of"] == len(numbers):
                return
            for number in numbers:
                self.hosts[number].kill()
                shutil.rmtree(self.hosts[number].folder / "runs", ignore_errors=True)
                (self.hosts[number].folder / "steps.jsonl").unlink(missing_ok=True)

    def reaches(self, number: int, step: int, of: int = 0) -> None:
        """Wait until a host is in `step`, with `of` ranks if given."""

        def is_there() -> bool:
            steps = [e for e in self.hosts[number].events() if e["event"] == "step"]
            return any(e["step"] >= step and of in (0, e["of"]) for e in steps)

        wait_until(is_there, SECONDS, f"step {step} on host {number}" + f" of {of}" * (of > 0))

    def saves(self, number: int) -> None:
        """Wait until a host is in the slow save."""
        wait_until(lambda: any(e["event"] == "saving" for e in self.hosts[number].events()), SECONDS, "the slow save")

    def strike(self) -> None:
        """Remember that something happens now."""
        self.struck_at.append(time.time())

    def events(self) -> list[dict]:
        """What all ranks recorded, in order."""
        return sorted((e for host in self.hosts for e in host.events()), key=lambda e: e["at"])

    def problem(self, *numbers: int, exact: bool, whole: dict | None) -> str:
        """What does not hold once these hosts should have finished."""
        hosts = [self.hosts[number] for number in numbers]
        for host in hosts:
            code = host.wait(SECONDS)
            if code != 0:
                texts = [f"host {other.number}, code {other.code}: {other.text()[-2500:]}" for other in self.hosts]
                return "\n".join([f"host {host.number} ended with {code}", *texts])
        return "; ".join(filter(None, [*self._differing(hosts), self._weights(hosts[0], exact, whole), self._windows(), self._lost()]))  # fmt: skip

    def _differing(self, hosts: list[Host]) -> list[str]:
        problems, models, seals = [], [], []
        for host in hosts:
            run_dir = host.folder / "runs" / "run"
            newest = checkpoints.published(run_dir / "checkpoints")[-1]
            checkpoints.verify(newest)
            seals.append((newest.name, checkpoints.read_manifest(newest)["seal"]))
            models.append(hashes(host.folder / "brain")["model.safetensors"])
            if json.loads((run_dir / "summary.json").read_text())["steps"] != STEPS:
                problems.append(f"host {host.number} has no summary of the last step")
            problems += [f"{path} is left" for path in run_dir.rglob(".*") if path.suffix in (".partial", ".pruned")]
            problems += [f"{path} is left" for path in host.folder.glob("runs/.*-*")]
        if len(set(models)) > 1 or len(set(seals)) > 1:
            problems.append(f"the hosts end with other weights or checkpoints: {models}, {seals}")
        return problems

    def _weights(self, host: Host, exact: bool, whole: dict | None) -> str:
        """How the weights differ from those of a run of three ranks that nothing happened to."""
        if whole is None or self.events()[0]["of"] != 3:  # a step of two ranks has fewer windows
            return ""
        actual = load_file(host.folder / "brain" / "model.safetensors")
        if exact:
            return "" if all(torch.equal(actual[n], t) for n, t in whole.items()) else "the weights are not bit-equal"
        difference = max((actual[name] - tensor).abs().max().item() for name, tensor in whole.items())
        return "" if difference < 1e-4 else f"the weights differ by {difference}"

    def _windows(self) -> str:
        """Each step must have trained on its windows, whichever ranks did it last."""
        steps = [event for event in self.events() if event["event"] == "step"]
        per_step, count = steps[0]["of"] * WINDOWS, self._training_windows()
        batches = Batches(count, batch_size=per_step, accumulation=1, seed=42)
        for step in range(STEPS):
            last = max(event["round"] for event in steps if event["step"] == step)
            windows = [w for e in steps if e["step"] == step and e["round"] == last for w in e["windows"]]
            if sorted(windows) != sorted(w for group in batches[step] for w in group):
                return f"step {step} trained on the windows {windows}"
        return ""

    def _training_windows(self) -> int:
        ledgers = [host.folder / "runs/run/ledger.json" for host in self.hosts]
        ledger = json.loads(next(path for path in ledgers if path.exists()).read_text())
        return ledger["train_tokens"] // self.fields["block_size"]

    def _lost(self) -> str:
        """Steps that were done again: at most one save interval. Notes what each new round cost."""
        rounds: dict[float, list[dict]] = {}
        for event in self.events():
            if event["event"] == "step":
                rounds.setdefault(event["round"], []).append(event)
        ordered, problems = sorted(rounds.items()), []
        for (_, before), (number, after) in zip(ordered, ordered[1:], strict=False):
            lost = max(e["step"] for e in before) + 1 - min(e["step"] for e in after)
            events, first = self.events(), min(e["at"] for e in after)
            joined = min(e["at"] for e in events if e["event"] == "joined" and e["round"] == number)
            begun = max((e for e in events if e["event"] == "started" and e["at"] <= joined), key=lambda e: e["at"])
            struck_at = max(at for at in self.struck_at if at < first)
            self.costs.append({
                "steps_lost": lost, "ranks": after[0]["of"], "to_the_new_ranks": begun["launched"] - struck_at,
                "imports": begun["at"] - begun["launched"], "joining": joined - begun["at"], "to_the_first_step": first - joined,
                "seconds": first - struck_at,
            })  # fmt: skip
            if lost > self.most_lost:
                problems.append(f"{lost} steps lost")
        return "; ".join(problems)


def killed_worker(trial: Trial, number: int, kind: int = signal.SIGKILL) -> tuple:
    trial.begin(0, 1, 2)
    trial.reaches(0, 6)
    trial.strike()
    trial.hosts[number].kill_worker(kind)
    return (0, 1, 2), True


def killed_node(trial: Trial, *, power: bool = False) -> tuple:
    trial.begin(0, 1, 2)
    trial.reaches(0, 6)
    trial.strike()
    (trial.hosts[2].lose_power if power else trial.hosts[2].kill)()
    return (0, 1), False


def returning_node(trial: Trial, *, empty: bool) -> tuple:
    killed_node(trial)
    trial.reaches(0, 6, of=2)
    if empty:
        shutil.rmtree(trial.hosts[2].folder / "runs")
    trial.strike()
    trial.begin(2)
    return (0, 1, 2), False


def killed_rendezvous(trial: Trial) -> tuple:
    trial.begin(0, 1, 2)
    trial.reaches(0, 6)
    trial.hosts[0].kill()
    codes = [trial.hosts[number].wait(SECONDS) for number in (1, 2)]
    assert all(codes), f"the others should have left, not {codes}"
    trial.strike()
    trial.begin(0, 1, 2)  # the user, or Slurm, starts the same command again
    return (0, 1, 2), True


def killed_main_node(trial: Trial) -> tuple:
    trial.network.endpoint = trial.hosts[3].address
    with trial.hosts[3].rendezvous():
        trial.begin(0, 1, 2)
        trial.reaches(0, 6)
        trial.strike()
        trial.hosts[0].kill()
        for number in (1, 2):
            trial.hosts[number].wait(SECONDS)
    return (1, 2), False


def short_cut(trial: Trial) -> tuple:
    trial.begin(0, 1, 2)
    trial.reaches(0, 6)
    trial.hosts[2].cut()
    time.sleep(TIMEOUT / 4)
    trial.hosts[2].cut(False)
    return (0, 1, 2), True


def long_cut(trial: Trial) -> tuple:
    trial.begin(0, 1, 2, STEP_SECONDS=1)
    trial.reaches(0, 6)
    trial.strike()
    trial.hosts[2].cut()
    trial.reaches(0, 6, of=2)
    trial.hosts[2].kill()  # its torchrun would wait minutes for the rendezvous
    trial.hosts[2].cut(False)
    trial.strike()
    trial.begin(2)
    return (0, 1, 2), False


def slow_link(trial: Trial) -> tuple:
    trial.begin(0, 1, 2)
    trial.reaches(0, 2)
    trial.hosts[2].slow("512kbit")
    return (0, 1, 2), True


def slow_link_to_an_empty_node(trial: Trial) -> tuple:
    trial.begin(0, 1)
    trial.hosts[2].slow("512kbit")
    trial.reaches(0, 6)
    trial.strike()
    trial.begin(2)
    return (0, 1, 2), False


def partition_in_save(trial: Trial) -> tuple:
    trial.begin(0, 1, 2, SLOW_SAVE=8, SAVE_SECONDS=2)
    trial.saves(0)
    trial.strike()
    trial.hosts[2].cut()
    trial.reaches(0, 8, of=2)
    trial.hosts[2].kill()
    return (0, 1), False


def killed_in_save(trial: Trial) -> tuple:
    trial.begin(0, 1, 2, SLOW_SAVE=8, SAVE_SECONDS=2)
    trial.saves(1)
    trial.strike()
    trial.hosts[1].kill_worker()
    return (0, 1, 2), True


def leaving_node(trial: Trial) -> tuple:
    trial.begin(0, 1, 2)
    trial.reaches(0, 6)
    trial.strike()
    trial.hosts[2].leave()
    return (0, 1), False


def joining_node(trial: Trial) -> tuple:
    trial.begin(0, 1)
    trial.reaches(0, 6)
    trial.strike()
    trial.begin(2)
    return (0, 1, 2), False


def replaced_node(trial: Trial) -> tuple:
    trial.begin(0, 1, 2)
    trial.reaches(0, 6)
    trial.strike()
    trial.hosts[2].kill()
    trial.begin(3)
    return (0, 1, 3), False


def damaged(trial: Trial, *places: tuple[int, str], intervals: int = 1) -> tuple:
    trial.most_lost = intervals * SAVE_STEPS
    trial.begin(0, 1, 2)
    trial.reaches(0, 9)
    for number, name in places:
        path = trial.hosts[number].folder / "runs/run/checkpoints/step-00000008" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    trial.strike()
    trial.hosts[2].kill_worker()
    return (0, 1, 2), True


def one_after_another(trial: Trial) -> tuple:
    trial.begin(0, 1, 2)
    trial.reaches(0, 5)
    trial.strike()
    trial.hosts[2].kill()
    trial.reaches(0, 7, of=2)
    trial.strike()
    trial.hosts[1].kill()
    trial.reaches(0, 9, of=1)
    trial.strike()
    trial.begin(1, 2)
    return (0, 1, 2), False


CASES: dict[str, Callable[[Trial], tuple]] = {
    "a rank of the first node is killed": lambda trial: killed_worker(trial, 0),
    "a rank of another node is killed": lambda trial: killed_worker(trial, 2),
    f"a rank hangs (--ddp_timeout {TIMEOUT})": lambda trial: killed_worker(trial, 1, signal.SIGSTOP),
    "a node's processes are killed": killed_node,
    "a node loses its power": partial(killed_node, power=True),
    "a killed node returns": partial(returning_node, empty=False),
    "a killed node returns with an empty disk": partial(returning_node, empty=True),
    "the node that hosts the rendezvous is killed; the same command again": killed_rendezvous,
    "the first node is killed, the rendezvous is elsewhere": killed_main_node,
    f"a link is cut for {TIMEOUT / 4:g} s": short_cut,
    "a link is cut for longer than --ddp_timeout; torchrun is started again": long_cut,
    "a slow link (512 kbit/s)": slow_link,
    "a node with an empty disk joins over a slow link": slow_link_to_an_empty_node,
    "a partition during a save": partition_in_save,
    "a rank is killed during a save": killed_in_save,
    "a node is told to leave (SIGTERM)": leaving_node,
    "a node joins": joining_node,
    "a node is killed, another takes its place": replaced_node,
    "a damaged checkpoint on one node, then a kill": lambda trial: damaged(trial, (1, "model.safetensors")),
    "the newest checkpoint damaged on every node, in different files": lambda trial: damaged(
        trial, (0, "model.safetensors"), (1, "optimizer.safetensors"), (2, "state.json")
    ),
    "the newest checkpoint damaged on every node": lambda trial: damaged(
        trial, *[(number, "model.safetensors") for number in range(3)], intervals=2
    ),
    "two nodes are killed one after another, and return": one_after_another,
}


def nodes(lab: Lab, full: bool, seed: int) -> list[dict]:
    """Every node has its own disk; what happens to some, the others survive, and the run reaches its last step by itself."""
    started = time.perf_counter()
    if reason := refusal():
        print(f"skipped: {reason}", flush=True)
        return []
    names = list(CASES) if full else ["a rank of another node is killed", "a killed node returns with an empty disk"]
    whole, cases, costs = _whole(lab), [], {}
    for name in names:
        with Network(lab.folder, 4) as network:
            trial = Trial(lab, network, name)
            try:
                numbers, exact = CASES[name](trial)
                problem = trial.problem(*numbers, exact=exact, whole=whole)
            except (TimeoutError, AssertionError) as error:
                problem = f"{error}: {trial.hosts[0].text()[-2000:]}"
        cases.append(Case(name, seed, problem))
        costs[name] = trial.costs
        figures = ", ".join(f"{cost['seconds']:.1f} s and {cost['steps_lost']} steps" for cost in trial.costs)
        print(f"{'FAILED ' * bool(problem)}{name}: {figures} {problem}", flush=True)
        for host in network.hosts:
            shutil.rmtree(host.folder, ignore_errors=True)
    result = row("three nodes in network namespaces, each with its own disk", seed, cases, started)
    return [{**result, "costs": costs}]


def _whole(lab: Lab) -> dict[str, torch.Tensor]:
    """The weights of a run of three nodes that nothing happens to."""
    with Network(lab.folder, 3) as network:
        trial = Trial(lab, network, "whole")
        trial.begin(0, 1, 2, STEP_SECONDS=0)
        problem = trial.problem(0, 1, 2, exact=True, whole=None)
        assert not problem, problem
        weights = load_file(trial.hosts[0].folder / "brain" / "model.safetensors")
        for host in trial.hosts:
            shutil.rmtree(host.folder)
    return weights


CAMPAIGNS = [nodes]
