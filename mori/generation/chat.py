"""What `scripts/generate.py` does: answers to the prompts it was given, or a prompt line to talk at."""

import importlib.util
import json
import random
import shlex
import signal
import sys
from dataclasses import asdict, fields
from pathlib import Path

from mori import distributed as runtime
from mori.cli import UserError, parse
from mori.config import PRESETS, GenerateConfig, SamplingConfig
from mori.generation.generate import brought_settings, check_prompts, generate, settings_for
from mori.model.loading import fuse_activations, load_config, load_model, load_tokenizer
from mori.speed.startup import keep_freed_memory

HELP = """Type a text, and the model goes on from it. The up arrow brings earlier lines back.
/temperature 0.7   set any control (top_k, top_p, min_p, repetition_penalty, max_new_tokens ...); without a value, show it
/seed 7            set the seed; without a value, take a new one
/again             the last text once more, with the next seed
/settings          show what is set
/help              this
Ctrl-C stops an answer, Ctrl-D (or /quit) leaves."""


def speak(config: GenerateConfig) -> None:
    """Load the model, and print what it says after each prompt; or talk, where `interactive` is set."""
    if config.model in PRESETS:
        raise UserError(
            f"{config.model} is a model to be trained; give --model the folder where scripts/train.py left its brain"
        )
    prompts = _prompts(config)
    place = runtime.start(config.device)
    if place.device.type == "cpu":
        keep_freed_memory()
    tokenizer = load_tokenizer(config.model, (), config.trust_remote_code)
    model_config = load_config(config.model, tokenizer, trust_remote_code=config.trust_remote_code)
    model = load_model(config.model, model_config, config.trust_remote_code).to(place.device).eval()
    fuse_activations(model)
    controls = {name: value for name, value in config.sampling().items() if name in config.given}
    brought = {name: value for name, value in brought_settings(model).items() if name not in controls}
    if brought:
        shown = ", ".join(f"{name} {value}" for name, value in brought.items())
        print(f"from the model's generation_config.json: {shown} (flags go before)", file=sys.stderr)
    how = {name: getattr(config, name) for name in ("seed", "batch_size", "crop_prompt", "on_full_context")}
    if config.interactive:
        return _converse(model, tokenizer, controls, how)
    single = len(prompts) * settings_for(model, controls).num_return_sequences == 1 and not config.json
    if single:
        check_prompts(prompts, tokenizer, model_config, config.crop_prompt)  # before anything stands on the screen
        _print_now(prompts[0])
    try:
        completions = generate(
            model,
            tokenizer,
            prompts,
            **how,
            on_text=(lambda _, piece: _print_now(piece)) if single else None,
            **controls,
        )
    except FloatingPointError as error:
        raise UserError(str(error)) from None
    if config.json:
        json.dump([asdict(completion) for completion in completions], sys.stdout, ensure_ascii=False)
    elif not single:
        print(f"\n{'-' * 40}\n".join(completion.prompt + completion.text for completion in completions), end="")
    print()


def _prompts(config: GenerateConfig) -> list[str]:
    if not config.prompt_file:
        return config.prompt
    try:
        lines = Path(config.prompt_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompt_file {config.prompt_file}: {error}") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompt_file {config.prompt_file} has no prompt in it")
    return (config.prompt if "prompt" in config.given else []) + prompts


def _converse(model, tokenizer, controls: dict, how: dict) -> None:
    """A prompt line with history, until the end of input."""
    if importlib.util.find_spec("readline"):
        import readline  # noqa: F401 (input() has a history from now on)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's `&` has its children ignore it
    print("/help shows what can be done; Ctrl-D leaves")
    said = []  # the last text, so that /again can say it again
    while True:
        try:
            line = input("> ")
            if line == "/quit":
                return
            _turn(line, said, model, tokenizer, controls, how)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(stopped)")
        except (UserError, FloatingPointError) as mistake:
            print(f"mistake: {mistake}")


def _turn(line: str, said: list[str], model, tokenizer, controls: dict, how: dict) -> None:
    """Answer one line."""
    if line.strip() == "/again":
        if not said:
            raise UserError("/again: nothing was said yet")
        how["seed"] = (how["seed"] + 1) % 2**32
        line = said[0]
    elif line.startswith("/"):
        print(_obey(line, model, controls, how))
        return
    if line.strip():
        said[:] = [line]
        _print_now(line)
        generate(model, tokenizer, [line], **how, on_text=lambda _, piece: _print_now(piece), **controls)
        print()


def _obey(line: str, model, controls: dict, how: dict) -> str:
    """Do what a line that begins with / says, and return the answer to it. Raises UserError where it makes no sense."""
    try:
        command, *words = shlex.split(line[1:]) or [""]
    except ValueError as error:
        raise UserError(f"{line}: {error}") from None
    known = {f.name for f in fields(SamplingConfig)} - {"num_return_sequences"}
    if command == "help":
        return HELP
    if command == "settings":
        default = SamplingConfig().sampling()
        inforce = settings_for(model, controls).sampling()
        return "\n".join(
            [f"seed {how['seed']}"] + [f"{n} {v}" for n, v in inforce.items() if v != default[n] or n in controls]
        )
    if command == "seed" and not words:
        how["seed"] = random.SystemRandom().randrange(2**32)
    elif command == "seed":
        how["seed"] = parse(GenerateConfig, "", ["--seed", *words]).seed
    elif command not in known:
        raise UserError(f"/{command} is no command; /help lists them")
    elif words:
        value = getattr(parse(GenerateConfig, "", [f"--{command}", *words]), command)
        settings_for(model, {**controls, command: value})  # may contradict another
        controls[command] = value
    return (
        f"seed {how['seed']}" if command == "seed" else f"{command} {getattr(settings_for(model, controls), command)}"
    )


def _print_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
