"""The model card: `README.md` in the folder of a trained model, with the metadata that the hub reads.

https://huggingface.co/docs/hub/model-cards
"""

import json
import math
import re
import shlex
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mori.cli import clock, plural
from mori.config import PRESETS, TrainConfig
from mori.tracking.report.page import compact, count, fixed

CARD = "README.md"
_METRICS = {
    "loss": ("loss, in nats per token", 4),
    "perplexity": ("perplexity", 2),
    "bits_per_byte": ("bits per byte", 4),
}
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as --max-lora-rank


def model_card(
    summary: dict,
    config: TrainConfig,
    *,
    ledger: str,
    environment: dict,
    base: dict[str, str],
    lora: dict | None,
    merged: bool,
) -> str:
    """The text of the card. It describes the data by the ledger, and quotes neither data nor samples.

    Args:
        summary: what `summary.json` holds.
        ledger: the corpus in words.
        environment: what `environment.json` holds.
        base: what is known of the model that was trained further: `base_model` (its name on the hub), `license`, `license_name`,
            `license_link`.
        lora: the `adapter_config.json` of the adapters; None if the model trains without.
        merged: whether they are merged into a whole model.
    """
    adapter = None if merged else lora
    name = Path(config.output_dir).resolve().name
    step = summary["published_step"]
    published = next((w for w in ("after", "best") if (summary["eval"][w] or {}).get("step") == step), None)
    evaluation = summary["eval"][published] if published else {}
    data = ModelCardData(
        **base,
        **({"base_model_relation": "adapter" if adapter else "finetune"} if "base_model" in base else {}),
        language=config.language or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["mori", *(["lora"] if lora else [])],
        model_name=name,
        eval_results=_results(evaluation) or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {_plain(name)}\n\n{_origin(summary, config, base, lora, merged)}",
        f"## Use\n\n{_usage(name, config, adapter)}",
        f"## Training data\n\n{_text(summary, config, ledger)}",
        _evaluations(summary, published),
        _copying((summary["copying"] or {}).get(published)) if published else "",
        f"## Training\n\n{_settings(summary, config, environment, lora)}",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def merged_card(card: str, name: str) -> str:
    """The card of a model, in the folder `name`, into whose weights adapters are merged; `card` is theirs.

    Empty if mori did not write `card`, or a person changed its structure.
    """
    text = ModelCard(card, ignore_metadata_errors=True)
    parts = re.fullmatch(r"(?s)\s*# .*?\n## Use\n.*?(print\(.*?)\n```.*?(\n## Training data\n.*)", text.text)
    data = text.data
    if not parts or "mori" not in (data.tags or []):
        return ""
    data.library_name = "transformers"
    if data.base_model:
        data.base_model_relation = "finetune"
    parent = _linked(data.base_model) if data.base_model else "a local model"
    origin = f"A causal language model: {parent} with LoRA adapters, which are merged into its weights."
    code = _code(f'generate = pipeline("text-generation", {_quoted(name)})', parts[1])
    return f"---\n{data.to_yaml()}\n---\n\n# {_plain(name)}\n\n{origin}\n\n## Use\n\n{code}\n{parts[2]}"


def _results(evaluation: dict) -> list[EvalResult]:
    """The figures of an evaluation, as the hub lists them."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name="held-out text",
            metric_type=metric,
            metric_name=name,
            metric_value=evaluation[metric],
        )
        for metric, (name, _) in _METRICS.items()
        if evaluation.get(metric) is not None and math.isfinite(evaluation[metric])
    ]


def _origin(summary: dict, config: TrainConfig, base: dict[str, str], lora: dict | None, merged: bool) -> str:
    """What the model is, and which of the run's weights it has."""
    name = base.get("base_model")
    parent = _linked(name) if name else f"the local model {_plain(Path(config.model).resolve().name)}"
    size, trained = compact(summary["parameters"]), compact(summary["trained_parameters"])
    if config.model in PRESETS:
        origin = f"A small causal language model of {size} parameters, trained from random weights on plain text."
    elif lora and not merged:
        origin = f"LoRA adapters of {trained} parameters for {parent}, a causal language model, trained on plain text."
        origin += "" if name else " `adapter_config.json` says where that model is."
    else:
        how = "by LoRA adapters, which are merged into its weights" if lora else f"{trained} of its {size} parameters"
        origin = f"A causal language model: {parent}, trained further on plain text, {how}."
    step, steps = summary["published_step"], summary["steps"]
    which = "the last" if step == steps else f"the best by `{config.metric_for_best_model}` of the held-out text"
    return f"{origin} The weights are those of step {count(step)} of {count(steps)}, {which}."


def _usage(name: str, config: TrainConfig, adapter: dict | None) -> str:
    """Three lines of code, and what else loads the model."""
    path = config.hub_model_id if config.push_to_hub and "/" in config.hub_model_id else name
    code = ", trust_remote_code=True" if config.trust_remote_code else ""
    prompt = _quoted(next(filter(None, config.prompt), "Halo"))
    block = _code(
        f'generate = pipeline("text-generation", {_quoted(path)}{code})',
        f'print(generate({prompt}, max_new_tokens=100)[0]["generated_text"])',
        note="  # and: pip install peft" * bool(adapter),
    )
    return f"{block}\n\n{_vllm(name, adapter)}" if adapter else block


def _code(*lines: str, note: str = "") -> str:
    """A block of code whose first line imports `pipeline`."""
    return "\n".join(["```python", f"from transformers import pipeline{note}", *lines, "```"])


def _quoted(text: str) -> str:
    """A text as a string of Python, in which no backtick ends the block of code."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\x60")


def _linked(name: str) -> str:
    """A model by its name on the hub, with a link."""
    return f"[{name}](https://huggingface.co/{name})"


def _vllm(name: str, adapter: dict) -> str:
    """How vLLM loads an adapter, or why it does not (its `LoRAConfig`, `PEFTHelper` and `GPT2LMHeadModel`)."""
    rank = next((rank for rank in _VLLM_RANKS if rank >= adapter["r"]), None)
    reasons = {
        f"the rank {adapter['r']}": rank is None,
        "modules that train whole (`modules_to_save`)": adapter["modules_to_save"],
        "adapters of GPT-2's `Conv1D` layers": adapter["fan_in_fan_out"],
    }
    if refused := [reason for reason, applies in reasons.items() if applies]:
        command = f"mori export --model {shlex.quote(name)} --merge"
        return f"vLLM does not take {' and '.join(refused)}: merge the adapter first, with `{command}`."
    return f"vLLM takes it with `--enable-lora --max-lora-rank {rank}`."


def _text(summary: dict, config: TrainConfig, ledger: str) -> str:
    """The corpus by its ledger, and its hash."""
    held_out = "The end of the text is held out for evaluation."
    if config.validation_file:
        held_out = "A separate text is held out for evaluation."
    elif not config.held_out_fraction:
        held_out = "No text is held out."
    return (
        f"{ledger}.\n\n{held_out} Windows have {plural(config.block_size, 'token')}. The documents' SHA-256 is "
        f"`{summary['sha256']['documents_sha256']}`."
    )


def _evaluations(summary: dict, published: str | None) -> str:
    """The held-out loss before the training and of these weights."""
    columns = {name: summary["eval"][name] for name in ("before", published) if name and summary["eval"][name]}
    if not published or columns[published]["loss"] is None:
        return ""
    steps = [f"step {count(evaluation['step'])}" for evaluation in columns.values()]
    rows = [
        [name, *(fixed(evaluation[metric], digits) for evaluation in columns.values())]
        for metric, (name, digits) in _METRICS.items()
        if columns[published][metric] is not None
    ]
    scored, total = summary["scored_windows"], summary["held_out_windows"]
    note = f"{count(scored)} of {plural(total, 'held-out window')} scored. Lower is better."
    return f"## Evaluation\n\n{_table(['held-out text', *steps], rows)}\n\n{note}"


def _copying(figures: dict | None) -> str:
    """How much of the samples stands in the training text."""
    if not figures or figures["share_of_8_tokens"] is None:
        return ""
    names = {"samples of this model": "", "held-out text, for comparison": "baseline_"}
    rows = [
        [name, f"{figures[prefix + 'share_of_8_tokens']:.1%}", plural(figures[prefix + "longest_run"], "token")]
        for name, prefix in names.items()
        if figures[prefix + "share_of_8_tokens"] is not None
    ]
    searched, total = figures["searched_tokens"], figures["training_tokens"]
    note = f"\n\n{count(searched)} of {plural(total, 'token')} of the training text searched." * (searched < total)
    columns = ["word for word in the training text", "windows of 8 tokens", "longest run"]
    return f"## Copying\n\n{_table(columns, rows)}{note}"


def _settings(summary: dict, config: TrainConfig, environment: dict, lora: dict | None) -> str:
    """What the run did, with which settings and on what."""
    accumulation, ranks = config.gradient_accumulation_steps, environment["world_size"]
    windows = config.per_device_train_batch_size * accumulation * ranks
    warmup = config.warmup_steps or 0
    warmup = f"{warmup * 100:g}% of the steps" if 0 < warmup < 1 else plural(int(warmup), "step")
    rows = {
        "steps": f"{count(summary['steps'])} of {plural(windows, 'window')}",
        "optimizer": f"{config.optim}, weight decay {config.weight_decay:g}, gradient norm clipped to {config.max_grad_norm:g}",
        "learning rate": f"{config.learning_rate:g}, {config.lr_scheduler_type}, warm-up {warmup}",
        "seed": str(config.seed),
        "precision": environment["precision"],
        "trained parameters": f"{count(summary['trained_parameters'])} of {count(summary['parameters'])}",
        "time": f"{clock(summary['wall_seconds'])}, {count(summary['tokens_per_second'])} tokens/s",
        "device": f"{ranks} x {environment['device']}" if ranks > 1 else environment["device"],
        "versions": ", ".join(f"{name} {environment[name]}" for name in ("mori", "torch", "transformers", "python")),
    }
    if lora:
        rows["LoRA"] = f"rank {lora['r']}, alpha {lora['lora_alpha']:g}, dropout {lora['lora_dropout']:g}"
    return _table(["setting", "value"], [[name, value] for name, value in rows.items()], border="---")


def _table(columns: list[str], rows: list[list[str]], border: str = "---:") -> str:
    """A table in Markdown; `border` is below the head of all columns but the first, whose cells stand at the right."""
    lines = [map(_plain, columns), ["---", *[border] * (len(columns) - 1)], *(map(_plain, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """A text in which Markdown reads no markup."""
    return "".join("\\" + letter if letter in "\\`*_[]<>|" else letter for letter in " ".join(text.split()))
