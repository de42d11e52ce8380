"""The same numbers: `mori-exact` and Trainer, and gradients against float64."""

import contextlib
import itertools
import math
import time

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AutoConfig, AutoModelForCausalLM

from mori import optim
from mori.bench import arms, compare
from mori.bench.options import SHAPES
from mori.config import TrainConfig
from mori.data.corpus import read_corpus
from mori.data.files import find_files
from mori.model import loading, saving
from mori.model.lm import CausalLMLoss
from mori.speed.fused import fuse_activations
from tests.gpu_day.common import Task, attempt, deterministic, read_json, run_script, say

_STEPS, _DRY_STEPS = 40, 6
# Largest relative difference of the losses with PyTorch's usual kernels, some of which add in no fixed order.
_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}


def with_trainer(task: Task, precision: str) -> None:
    """`mori-exact` and Trainer from the same weights under deterministic algorithms: equal to the bit.

    If a kernel has no deterministic form, PyTorch's usual one is taken and reported.
    """
    precision = "bf16" if task.dry and precision == "fp16" else precision  # accelerate has no fp16 on a CPU
    texts = list(read_corpus(find_files([])).texts())
    tokenizer = loading.load_tokenizer("mini", texts)
    torch.manual_seed(1)
    model = loading.load_model("mini", loading.load_config("mini", tokenizer))
    saving.save(model, tokenizer, task.place / "initial")
    steps, block = (_DRY_STEPS, 32) if task.dry else (_STEPS, 128)
    config = TrainConfig(
        model=str(task.place / "initial"), block_size=block, max_steps=steps, logging_steps=1, eval_steps=1e9,
        precision=precision, device=task.device, logging_dir=str(task.place), output_dir=str(task.place / "brain"),
        run_name="run", warmup_steps=0,
    ).resolve()  # fmt: skip
    results = {}

    def run(arm: str) -> dict:
        folder = task.place / arm
        folder.mkdir(exist_ok=True)
        result = arms.run_arm(arm, config, folder, time.time())
        results[arm] = [{**result, "model": folder / "model", "error": None}]
        return {"steps": result["steps"]}

    def compared(arm: str) -> dict:
        pair = compare.compare_arms(results[arm], results["trainer"], precision)
        return {name: value for name, value in pair.items() if name.startswith("max_")}

    for warn_only in (False, True):
        deterministic(warn_only)
        pair = None
        if attempt("mori_exact", run, "mori-exact") and attempt("trainer", run, "trainer"):
            pair = attempt("differences", compared, "mori-exact")
        if pair:
            equal = all(value == 0.0 for value in pair.values())
            say(mori_exact_equals_trainer={"ok": equal, **pair, "nondeterministic_kernels_allowed": warn_only})
            break
    deterministic(warn_only=True)
    if "trainer" in results and attempt("mori", run, "mori"):
        attempt("mori_against_trainer", compared, "mori")


def compare_script(task: Task, precision: str) -> None:
    """`scripts/compare.py` as a user runs it, with PyTorch's usual kernels: within the stated tolerance."""
    steps, block = (_DRY_STEPS, 32) if task.dry else (_STEPS, 128)
    flags = ["--device", task.device, "--precision", precision, "--max_steps", steps, "--block_size", block]
    flags += ["--eval_steps", 1e9, "--max_new_tokens", 1, "--warmup_steps", 0, "--arms", "mori-exact,trainer,mori"]
    done = run_script("compare.py", *flags, "--logging_dir", task.place, "--run_name", precision, timeout=task.left - 2)
    folder = task.place / f"compare-{precision}"
    comparison = read_json(folder / "compare.json")
    errors = {name: arm["error"] for name, arm in comparison.get("arms", {}).items() if arm["error"]}
    for arm in errors:
        print((folder / arm / "output.txt").read_text(errors="replace")[-3000:])
    for name, pair in comparison.get("pairs", {}).items():
        figures = {key: value for key, value in pair.items() if key.startswith("max_")}
        gap = pair["max_relative_loss_diff"]
        say(**{name: {"ok": gap is not None and gap <= _TOLERANCE[precision], **figures}})
    say(compare={"ok": done.returncode == 0 and not errors and bool(comparison), "errors": errors})
    with contextlib.suppress(OSError), (task.out / "compare.md").open("a", encoding="utf-8") as file:
        file.write((folder / "report.md").read_text(encoding="utf-8") + "\n")


def against_float64(task: Task) -> None:
    """Loss and gradients of every variant of a step against a CPU in float64; AdamW's fused kernel against the CPU's."""
    torch.manual_seed(0)
    sizes = {} if task.dry else {"n_layer": 4, "n_embd": 256, "n_head": 8}
    vocabulary = 512 if task.dry else 5003
    shape = {**SHAPES["tiny"], **sizes, "vocab_size": vocabulary}
    config = AutoConfig.for_model(**shape, max_position_embeddings=256, bos_token_id=0, eos_token_id=0)
    reference = AutoModelForCausalLM.from_config(config).double().train()
    weights = {name: tensor.float() for name, tensor in reference.state_dict().items()}
    ids = torch.randint(vocabulary, (4, 33 if task.dry else 129), generator=torch.Generator().manual_seed(1))
    input_ids, labels = ids[:, :-1].contiguous(), ids[:, 1:].clone()
    labels[0, :5], input_ids[:, 20] = -100, 0  # 0 ends a document
    batch = input_ids, labels, torch.tensor(float((labels != -100).sum()))

    def fresh(device: str) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_config(config).train()
        model.load_state_dict(weights)
        return model.to(device)

    expected = {}
    for separators in ((), (0,)):
        reference.zero_grad()
        expected[separators] = _loss_and_gradients(CausalLMLoss(reference, separators=separators), batch)
    types = {"fp32": (None, 1e-5), "tf32": (None, 2e-3), "bf16": (torch.bfloat16, 3e-2), "fp16": (torch.float16, 2e-2)}
    forms = ("exact", "chunked, mask-free", "documents apart")
    for precision, form in itertools.product(types, forms):

        def error(precision=precision, form=form) -> dict:
            torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
            model, (dtype, limit) = fresh(task.device), types[precision]
            separators = (0,) if form == "documents apart" else ()
            module = CausalLMLoss(model, chunked_loss=form != "exact", separators=separators)
            if form == "chunked, mask-free":
                fuse_activations(model)
                module.use_mask_free_attention()
            scale = torch.tensor(65536.0, device=task.device) if precision == "fp16" else None
            loss, gradients = _loss_and_gradients(module, batch, dtype, scale)
            expected_loss, expected_gradients = expected[separators]
            gap, loss_gap = _distance(gradients, expected_gradients), abs(loss - expected_loss) / expected_loss
            return {"ok": gap <= limit and loss_gap <= limit, "gradient": gap, "loss": loss_gap}

        attempt(f"{precision} {form}", error)
    torch.set_float32_matmul_precision("highest")
    attempt("optimizer", _optimizer_steps, task, fresh, batch)


def _distance(ours: dict, theirs: dict) -> float:
    """The relative distance of two sets of tensors, by their Euclidean norms."""
    square = sum(float((ours[name] - theirs[name]).pow(2).sum()) for name in theirs)
    return math.sqrt(square / sum(float(tensor.pow(2).sum()) for tensor in theirs.values()))


def _loss_and_gradients(module: CausalLMLoss, batch: tuple, dtype=None, scale=None) -> tuple[float, dict]:
    """The loss and its gradients, on the CPU in float64; with `scale` they are computed at the size of the scaled loss."""
    device = next(module.parameters()).device
    tensors = [tensor.to(device) for tensor in batch]
    with torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext():
        loss = module(*tensors, scale)
    (loss if scale is None else loss * scale).backward()
    factor = 1.0 if scale is None else 1 / float(scale)
    named = module.model.named_parameters()
    return loss.item(), {name: parameter.grad.detach().cpu().double() * factor for name, parameter in named}


def _optimizer_steps(task: Task, fresh, batch: tuple) -> dict:
    """Three steps of AdamW on the CPU and on the device; the second gradient is NaN and its step is skipped."""
    updates, steps = [], set()
    for device in ("cpu", task.device):
        model = fresh(device)
        module = CausalLMLoss(model)
        optimizer = optim.build_optimizer(model, TrainConfig(learning_rate=1e-3, weight_decay=0.1))
        skipped = []
        for step in range(3):
            _loss_and_gradients(module, batch)
            if step == 1:
                next(model.parameters()).grad.fill_(math.nan)
            grad_norm = clip_grad_norm_(list(model.parameters()), 1.0)
            skipped.append(float(optim.step_if_finite(optimizer, grad_norm)))
            optimizer.zero_grad()
        start = dict(fresh("cpu").named_parameters())
        updates.append(
            {name: (p.detach().cpu() - start[name].detach()).double() for name, p in model.named_parameters()}
        )
        steps |= {float(state["step"]) for state in optimizer.state.values()}
    # Not each weight: the first update of AdamW has the sign of the gradient, which rounding decides for some biases.
    gap = _distance(updates[1], updates[0])
    ok = gap < 5e-2 and steps == {2.0} and skipped == [0.0, 1.0, 0.0]
    return {"ok": ok, "update": gap, "steps": sorted(steps), "skipped": skipped}
