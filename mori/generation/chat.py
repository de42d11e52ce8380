"""What `mori generate` and `mori chat` do: they answer the given prompts, or open a prompt line."""

import codecs
import contextlib
import difflib
import importlib.util
import json
import random
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import nn

from mori.cli import UserError, parse, printable
from mori.config import PRESETS, GenerateConfig, SamplingConfig
from mori.generation.generate import PromptTooLong, check_prompts, generate, model_settings, resolve_settings
from mori.model.adapters.lora import merge
from mori.model.loading import load_config, load_model, load_tokenizer
from mori.model.probes import check_causal
from mori.speed.fused import fuse_activations
from mori.speed.startup import keep_freed_memory

HELP = """Type a text, and the model continues it. The arrow keys recall earlier lines.
/temperature 0.7   set any control (top_k, top_p, min_p, repetition_penalty, max_new_tokens ...); without a value, show it
/seed 7            set the seed; without a value, choose a random one
/again             repeat the last text with the next seed
/settings          show all settings in force
/reset             seed and settings as they were at the start
/stop_strings      without values, clears them, as every list does
/help              show this help
Ctrl-C stops an answer, Ctrl-D (or /quit, /exit) leaves."""
COMMANDS = ("again", "exit", "help", "quit", "reset", "seed", "settings")


def answer(config: GenerateConfig, device: torch.device) -> None:
    """Load the model and print its answer to each prompt, or open the prompt line if `interactive` is set.

    Raises UserError for a model or prompts that cannot be used, and for logits that are not finite.
    """
    prompts = _read_prompts(config)
    model, tokenizer = _load(config, device)
    controls, options = _controls(config)
    defaults = [f"{name} {value}" for name, value in model_settings(model).items() if name not in controls]
    if defaults:
        settings = ", ".join(defaults)
        print(f"from the model's generation_config.json: {settings} (flags take precedence)", file=sys.stderr)
    if config.interactive:
        return PromptLine(model, tokenizer, controls, options).run()
    streamed = len(prompts) * resolve_settings(model, controls).num_return_sequences == 1 and not config.json
    with _one_line_errors():
        if streamed:
            check_prompts(prompts, tokenizer, model.config, config.crop_prompt)  # an error comes before any output
            _print_piece(0, prompts[0])
            options["on_text"] = _print_piece
        completions = generate(model, tokenizer, prompts, **options, **controls)
    if config.json:
        ascii_only = codecs.lookup(sys.stdout.encoding).name != "utf-8"
        shown = [{k: v for k, v in asdict(completion).items() if k != "prompt_ids"} for completion in completions]
        json.dump(shown, sys.stdout, ensure_ascii=ascii_only)
    elif not streamed:
        _print_piece(0, f"\n{'-' * 40}\n".join(completion.prompt + completion.text for completion in completions))
    print()


def texts(config: GenerateConfig, device: torch.device) -> list[str]:
    """Load the model and continue each prompt; returns the texts with their prompts, in order.

    Raises UserError for a model or prompts that cannot be used, and for logits that are not finite.
    """
    if config.interactive or config.json:
        raise UserError("interactive and json are for the command line: mori chat, mori generate --json")
    prompts = _read_prompts(config)
    model, tokenizer = _load(config, device)
    controls, options = _controls(config)
    with _one_line_errors():
        completions = generate(model, tokenizer, prompts, **options, **controls)
    return [completion.prompt + completion.text for completion in completions]


def _load(config: GenerateConfig, device: torch.device) -> tuple[nn.Module, object]:
    """The model, ready to generate, and its tokenizer."""
    if config.model in PRESETS:
        raise UserError(f"{config.model} is a model to be trained first; give --model the output folder of mori train")
    if device.type == "cpu":
        keep_freed_memory()
    tokenizer = load_tokenizer(config.model, (), config.trust_remote_code)
    model_config = load_config(config.model, tokenizer, trust_remote_code=config.trust_remote_code)
    model = merge(load_model(config.model, model_config, config.trust_remote_code)).to(device).eval()
    check_causal(model, config.model, torch.arange(16, device=device)[None] % model_config.get_text_config().vocab_size)
    fuse_activations(model)
    return model, tokenizer


def _controls(config: GenerateConfig) -> tuple[dict, dict]:
    """The sampling controls that the user gave, and the other arguments of `generate()`."""
    controls = {name: value for name, value in config.sampling().items() if name in config.given}
    return controls, {name: getattr(config, name) for name in ("seed", "batch_size", "crop_prompt", "on_full_context")}


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Convert what `generate()` raises to UserErrors."""
    try:
        yield
    except PromptTooLong as error:
        raise UserError(f"{error}, or drop its beginning with --crop_prompt") from None
    except FloatingPointError as error:
        raise UserError(str(error)) from None


def _read_prompts(config: GenerateConfig) -> list[str]:
    if not config.prompt_file:
        return config.prompt
    try:
        lines = Path(config.prompt_file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompt_file {config.prompt_file}: {error}") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompt_file {config.prompt_file} holds no prompt")
    return (config.prompt if "prompt" in config.given else []) + prompts


class PromptLine:
    """A prompt line with history: it continues each line, and obeys those that begin with /.

    Args:
        controls: the fields of SamplingConfig that flags have set; commands change them.
        options: the other arguments of `generate()`, with `seed`.
    """

    def __init__(self, model: nn.Module, tokenizer, controls: dict, options: dict):
        self.model, self.tokenizer, self.controls, self.options = model, tokenizer, controls, options
        self.last_prompt = ""
        self._start = dict(controls), options["seed"]

    def run(self) -> None:
        """Read lines until the end of input or /quit. Lines from a pipe are answered without signs between them."""
        in_terminal = sys.stdin.isatty()
        if importlib.util.find_spec("readline"):
            import readline  # noqa: F401 (gives input() a history)
        # Bytes that are no text arrive as surrogates, and the line is refused.
        sys.stdin.reconfigure(errors="surrogateescape")
        # A shell script's `&` makes its children ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if in_terminal:
            print("/help lists the commands; /quit leaves")
        while True:
            try:
                line = input("> " if in_terminal else "")
                if any("\udc80" <= letter <= "\udcff" for letter in line):
                    raise UserError(f"the line is not {sys.stdin.encoding} text")
                if line.strip() in ("/quit", "/exit"):
                    return
                self._answer_line(line)
            except EOFError:
                print(end="\n" * in_terminal)
                return
            except KeyboardInterrupt:
                print("\n(stopped)")
            except (UserError, FloatingPointError) as error:
                print(f"error: {error}")

    def _answer_line(self, line: str) -> None:
        if line.strip() == "/again":
            if not self.last_prompt:
                raise UserError("/again: there is no text to repeat yet")
            self.options["seed"] = (self.options["seed"] + 1) % 2**32
            line = self.last_prompt
        elif line.startswith("/"):
            print(self._run_command(line))
            return
        if line.strip():
            self.last_prompt = line
            _print_piece(0, line)
            generate(self.model, self.tokenizer, [line], **self.options, on_text=_print_piece, **self.controls)
            print()

    def _run_command(self, line: str) -> str:
        """Run a line that begins with /; returns the reply. Raises UserError for an unknown command or an invalid value."""
        try:
            command, *words = _words(line[1:]) or [""]
        except ValueError as error:
            raise UserError(f"{line}: {error}") from None
        if command == "help":
            return HELP
        if command == "settings":
            return self._show_settings()
        if command == "seed":
            seed = parse(GenerateConfig, "", ["--seed", *words]).seed if words else _random_seed()
            self.options["seed"] = seed
            return f"seed {seed}"
        if command == "reset":
            self.controls, self.options["seed"] = dict(self._start[0]), self._start[1]
            return "reset to the start:\n" + self._show_settings()
        known = {field.name for field in fields(SamplingConfig)} - {"num_return_sequences"}
        if command not in known:
            nearest = difflib.get_close_matches(command, sorted(known.union(COMMANDS)), 1)
            raise UserError(
                f"/{command} is no command; " + (f"did you mean /{nearest[0]}?" if nearest else "/help lists them")
            )
        if not words and getattr(SamplingConfig(), command) == []:
            self.controls[command] = []
        if words:
            value = getattr(parse(GenerateConfig, "", [f"--{command}", *words]), command)
            resolve_settings(self.model, {**self.controls, command: value})  # it may contradict another setting
            self.controls[command] = value
        return f"{command} {getattr(resolve_settings(self.model, self.controls), command)}"

    def _show_settings(self) -> str:
        defaults, settings = SamplingConfig(), resolve_settings(self.model, self.controls)
        lines = [f"seed {self.options['seed']}"]
        for field in fields(SamplingConfig):
            value = getattr(settings, field.name)
            if value != getattr(defaults, field.name) or field.name in self.controls:
                lines.append(f"{field.name} {value}")
        return "\n".join(lines)


def _words(line: str) -> list[str]:
    r"""The words of a command; quotes keep a word together, and a backslash stays for `cli.escaped_text`."""
    splitter = shlex.shlex(line, posix=True, punctuation_chars=False)
    splitter.whitespace_split, splitter.escape, splitter.commenters = True, "", ""
    return list(splitter)


def _random_seed() -> int:
    return random.SystemRandom().randrange(2**32)


def _print_piece(_: int, piece: str) -> None:
    sys.stdout.write(printable(piece, sys.stdout))
    sys.stdout.flush()
