"""Numbers that are not finite, and memory that does not suffice."""

import math
import os
import random
import re
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from mori import optim
from mori.checkpoint import checkpoints as checkpoint
from mori.model import lm
from mori.tracking.loggers import read_metrics

from .common import STEPS, WEIGHTS, Case, Lab, patched, row, run, seeds, together

_forward = lm.CausalLMLoss.forward


def _poison(where: str, value: float, at_call: int, forever: bool) -> None:
    """In a child: from the `at_call`th training forward on (or in it alone), something is not finite."""
    calls = []

    def forward(self, input_ids, labels, n_targets=None, loss_scale=None):
        if n_targets is None:
            return _forward(self, input_ids, labels)
        calls.append(1)
        hit = len(calls) == at_call or (forever and len(calls) > at_call)
        if hit and where == "weight":
            with torch.no_grad():
                self.model.transformer.h[1].mlp.c_fc.weight[3, 5] = value
        loss = _forward(self, input_ids, labels, n_targets, loss_scale)
        if hit and where == "loss":
            loss = loss * value
        if hit and where == "gradient":
            trained = next(parameter for parameter in self.model.parameters() if parameter.requires_grad)
            loss = loss + _Bad.apply(trained, value)
        if hit and where == "scale":
            loss = loss * 1e30
        return loss

    lm.CausalLMLoss.forward = forward


class _Bad(torch.autograd.Function):
    """Adds 0 to the loss and `value` to a gradient."""

    @staticmethod
    def forward(ctx, tensor, value):
        ctx.value = value
        ctx.save_for_backward(tensor)
        return tensor.sum() * 0

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(ctx.saved_tensors[0], ctx.value), None


def _not_finite(root: Path) -> list[str]:
    return [
        f"{folder.name}: {name}"
        for folder in checkpoint.published(root)
        for file in (WEIGHTS, "optimizer.safetensors")
        for name, tensor in load_file(folder / file).items()
        if not tensor.isfinite().all()
    ]


def numbers(lab: Lab, full: bool, seed: int) -> list[dict]:
    """NaN and infinity in the loss, in a gradient, in a weight, once or from then on; a loss that fp16 cannot scale."""
    kinds = [(where, value) for where in ("loss", "gradient", "weight") for value in (math.nan, math.inf)] + [
        ("scale", 0.0)
    ]
    cases, started = [], time.perf_counter()
    for number, case_seed in enumerate(seeds(seed, 30 if full else 7)):
        draw, name = random.Random(case_seed), f"bad-{number}"
        where, value = kinds[number % len(kinds)]
        forever = where == "weight" or draw.random() < 0.5
        call = draw.randint(9, 2 * STEPS - 8)  # two micro-batches a step; after the first save
        step = (call - 1) // 2 + 1
        options = {"max_nonfinite_steps": 3} | ({"precision": "fp16"} if where == "scale" else {})
        config = lab.config(name, **options)
        ended = run(
            config, lambda where=where, value=value, call=call, forever=forever: _poison(where, value, call, forever)
        )
        problem = ended.problem(1 if forever else 0)
        bad = _not_finite(lab.checkpoints(name))
        problem = problem or (f"published: {bad}" if bad else "")
        lines = {
            line["step"]: line for line in read_metrics(lab.run_dir(name) / "metrics.jsonl") if "train/loss" in line
        }
        if not problem and where in ("loss", "weight") and math.isfinite(lines[step]["train/loss"]):
            problem = f"the loss of step {step} was logged as {lines[step]['train/loss']}"
        if not problem and lines[max(lines)]["train/skipped_steps"] < (3 if forever else 1):
            problem = "the skipped steps are not counted"
        if not problem and forever:
            told = re.search(
                r"in 3 steps in a row, up to step (\d+).*First non-finite tensor: (.+), on the training windows ([\d, ]+)",
                ended.text,
            )
            if not told or int(told[1]) != step + 2:
                problem = f"not told at step {step}: {ended.text[-400:]}"
            elif where == "weight" and told[2] != "the weight transformer.h.1.mlp.c_fc.weight":
                problem = f"blamed {told[2]}"
            else:
                problem = run(config).problem(0) or ("" if not _not_finite(lab.checkpoints(name)) else "published")
        cases.append(Case(f"{value} in the {where} of step {step}{' on' if forever else ''}", case_seed, problem))
        lab.drop(name)
    return [
        row(
            "numbers that are not finite: no update, none published, the real figure logged, the place named",
            seed,
            cases,
            started,
        )
    ]


def _room_for(windows: int, place: str, from_call: int = 1) -> None:
    """In a child: from the `from_call`th time on, memory runs out in `place` for more than `windows` windows at once."""
    calls, hooks = [], []

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def forward(self, input_ids, labels, n_targets=None, loss_scale=None):
        while hooks:
            hooks.pop().remove()
        training = n_targets is not None
        calls.append(training)
        ours = len(input_ids) > windows and training == (place != "evaluation") and calls.count(training) >= from_call
        if ours and place in ("forward", "evaluation"):
            full()
        if ours and place == "backward":  # when the layers above have their gradients already
            hooks.append(self.model.transformer.h[0].register_full_backward_pre_hook(full))
        return _forward(self, input_ids, labels, n_targets, loss_scale)

    lm.CausalLMLoss.forward = forward


def memory(lab: Lab, full: bool, seed: int) -> list[dict]:
    """Memory that runs out: the end is that of a run whose micro-batches were small from the start."""
    cases, started = [], time.perf_counter()
    places = [
        (place, size, windows)
        for place in ("forward", "backward")
        for size in (2, 4, 8)
        for windows in (1, 2, 4)
        if windows < size
    ]
    for place, size, windows in places[:: 1 if full else 5]:
        name = "oom"
        big = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 1}
        small = {"per_device_train_batch_size": windows, "gradient_accumulation_steps": size // windows}
        ended = run(lab.config(name, **big), lambda windows=windows, place=place: _room_for(windows, place))
        cases.append(
            Case(
                f"{place}, {size} to {windows}",
                seed,
                ended.problem(0) or _weights_differ(lab, name, lab.whole(**small)),
            )
        )
        lab.drop(name)
    for size, windows in ((4, 2), (4, 1), (2, 1)) if full else ((4, 2),):
        name, parts = "oom", {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2}
        small = {"per_device_train_batch_size": windows, "gradient_accumulation_steps": 2 * size // windows}
        ended = run(lab.config(name, **parts), lambda windows=windows: _room_for(windows, "forward", 2))
        problem = ended.problem(0) or _weights_differ(lab, name, lab.whole(**small))
        cases.append(Case(f"forward of the second micro-batch, {size} to {windows}", seed, problem))
        lab.drop(name)
    for windows in (1, 2, 4) if full else (2,):
        name = "oom"
        ended = run(
            lab.config(name, per_device_eval_batch_size=8), lambda windows=windows: _room_for(windows, "evaluation", 3)
        )
        problem = ended.problem(0) or _weights_differ(lab, name, lab.whole(), "brain model optimizer")
        cases.append(
            Case(f"evaluation, 8 to {windows}", seed, problem or ("" if "memory ran out" in ended.text else "not told"))
        )
        lab.drop(name)
    # Later on there is no run to compare with that was small from the start; but wherever in its step memory runs out, and
    # whether the run is killed afterwards or not, the end is the same.
    for call in (4, 7, 10) if full else (4,):
        ends = {}
        for kind in ("forward", "backward", "forward, then killed"):
            name = "oom"
            config = lab.config(name, per_device_train_batch_size=4, gradient_accumulation_steps=1)

            def before(kind=kind, call=call) -> None:
                _room_for(2, kind.split(",")[0], call)
                if "killed" in kind:
                    patched(optim, "set_learning_rate", call + 2, lambda: os.kill(os.getpid(), signal.SIGKILL))()

            ended = run(config, before)
            if (
                "killed" in kind
            ):  # taken up before the step in which memory ran out, or after it, with what was remembered
                ended = run(config, lambda call=call: _room_for(2, "forward", max(1, call - call // 4 * 4)))
            ends[kind] = ended.problem(0) or lab.left_by(name)["brain"]["model.safetensors"]
            lab.drop(name)
        cases += [
            Case(f"{kind}, in step {call}", seed, "" if found == ends["forward"] and len(found) == 64 else found)
            for kind, found in list(ends.items())[1:]
        ]
    # Ranks cannot do a step again by themselves: all leave, and the same command goes on with half.
    config = lab.config("oom", per_device_train_batch_size=4, gradient_accumulation_steps=1)
    ended = together(config, 2, lambda: _room_for(2, "forward"))
    problem = ended.problem(1) or ("" if "resumes with 2 windows at a time" in ended.text else ended.text[-300:])
    problem = problem or together(config, 2, lambda: _room_for(2, "forward")).problem(0)
    cases.append(Case("forward of two ranks, 4 to 2", seed, problem or _weights_differ(lab, "oom", lab.whole(2))))
    lab.drop("oom")
    name, both = "oom", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    ended = run(lab.config(name, **both, auto_find_batch_size=True), lambda: _room_for(4, "forward"))
    whole = lab.whole(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    cases.append(Case("auto_find_batch_size finds 4 of 8", seed, ended.problem(0) or _weights_differ(lab, name, whole)))
    lab.drop(name)
    return [
        row(
            "out of memory in forward, backward, evaluation: the step is done again in halves, equal weights",
            seed,
            cases,
            started,
        )
    ]


def _weights_differ(lab: Lab, name: str, whole: dict, what: str = "brain model optimizer log") -> str:
    left = lab.left_by(name)
    return "; ".join(f"{key} differs" for key in what.split() if left[key] != whole[key])


CAMPAIGNS = [numbers, memory]
