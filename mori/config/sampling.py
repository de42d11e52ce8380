"""How text is drawn: the sampling controls, with their ranges."""

from dataclasses import dataclass, fields

from mori.cli import Config, escaped_text, flag, json_list, same_flag


@dataclass
class SamplingConfig(Config):
    """How text is drawn. Names and meanings are those of `generate()`; an unset control does nothing."""

    group, may_change = "sampling", True

    temperature: float = flag(1.0, "divides the logits; 0 takes the likeliest token (greedy)", min=0)
    top_h: float = flag(1.0, "keep the likeliest tokens with this share of the entropy; 1 keeps all", above=0, max=1)
    top_k: int = flag(0, "keep the k likeliest tokens; 0 keeps all", min=0)
    top_p: float = flag(1.0, "keep the smallest set of tokens whose probability reaches p; 1 keeps all", above=0, max=1)
    min_p: float = flag(
        0.0, "keep tokens with this share of the likeliest one's probability; 0 keeps all", min=0, max=1
    )
    typical_p: float = flag(1.0, "keep the tokens of most typical surprise that reach p; 1 keeps all", above=0, max=1)
    epsilon_cutoff: float = flag(0.0, "keep tokens of at least this probability; 0 keeps all", min=0, below=1)
    eta_cutoff: float = flag(0.0, "the same, lower if the model is unsure; 0 keeps all", min=0, below=1)
    xtc_probability: float = flag(0.0, "how often XTC removes the top choices; 0 is off", min=0, max=1)
    xtc_threshold: float = flag(
        0.1, "XTC keeps only the least likely of the tokens with at least this probability", min=0, max=1
    )
    repetition_penalty: float = flag(
        1.0, "divides positive logits of tokens already in the text, multiplies negative ones; 1 is off", above=0
    )
    frequency_penalty: float = flag(0.0, "subtracted from a token's logit for each time it was drawn; 0 is off")
    presence_penalty: float = flag(0.0, "subtracted from a token's logit once it was drawn; 0 is off")
    no_repeat_ngram_size: int = flag(0, "no run of this many tokens comes twice; 0 is off", min=0)
    dry_multiplier: float = flag(0.0, "DRY: strength of the penalty on longer and longer repetitions; 0 is off", min=0)
    dry_base: float = flag(1.75, "DRY: the penalty grows by this factor with each repeated token", above=0)
    dry_allowed_length: int = flag(2, "DRY: tokens that may be repeated before the penalty begins", min=1)
    dry_sequence_breakers: list[str] = flag(
        ["\n", ":", '"', "*"],
        r"DRY: no repetition crosses a token that contains one of these texts; \n is a line break, \t a tab, \\ a backslash",
        kind=escaped_text,
    )
    sequence_bias: list = flag(
        [], "added to the logit that completes a sequence of ids, as JSON: [[[5, 7], -2.0], ...]", kind=json_list
    )
    bad_words_ids: list = flag([], "sequences of ids that are never completed, as JSON: [[5, 7], ...]", kind=json_list)
    suppress_tokens: list[int] = flag([], "token ids that are never drawn", kind=int)
    begin_suppress_tokens: list[int] = flag([], "token ids that are never drawn first", kind=int)
    forced_eos_token_id: list[int] = flag(
        [], "token ids of which one is drawn last, if the text is max_new_tokens long", kind=int
    )
    min_length: int = flag(0, "suppress the end of the text until prompt and answer have this many tokens", min=0)
    min_new_tokens: int = flag(0, "suppress the end of the text until this many tokens", min=0)
    exponential_decay_length_penalty: list[float] = flag(
        [], "after the first number of tokens, the end's logit grows by the power of the second", kind=float
    )
    max_new_tokens: int = flag(100, "tokens to draw after the prompt", min=1)
    max_time: float = flag(0.0, "stop generating after this many seconds; 0 is off", min=0)
    stop_strings: list[str] = flag(
        [],
        r"texts that end the answer, and are not part of it; \n is a line break, \t a tab, \\ a backslash",
        kind=escaped_text,
    )
    num_return_sequences: int = flag(1, "texts to draw for each prompt", min=1)

    def sampling(self) -> dict:
        """The sampling fields alone: the keywords of `mori.generation.generate.generate`."""
        return {f.name: getattr(self, f.name) for f in fields(SamplingConfig)}

    def contradictions(self) -> list[str]:
        """Malformed lists of ids, and controls that exclude each other."""
        decay = self.exponential_decay_length_penalty
        checks = [
            (
                self.min_new_tokens <= self.max_new_tokens,
                f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}",
            ),
            (all(map(_is_ids, self.bad_words_ids)), "bad_words_ids must be lists of token ids, such as [[5, 7], [9]]"),
            (
                all(map(_is_bias, self.sequence_bias)),
                "sequence_bias must be pairs of token ids and a number, such as [[[5, 7], -2.0]]",
            ),
            *(
                (not getattr(self, name) or _is_ids(getattr(self, name)), f"{name} must be token ids")
                for name in ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id")
            ),
            (
                not decay or len(decay) == 2 and decay[0] >= 0 and decay[1] > 0,
                "exponential_decay_length_penalty must be two numbers: the tokens before it begins, and a factor above 0",
            ),
            ("" not in self.stop_strings, "stop_strings contains an empty text, which would end every answer"),
            (
                self.temperature > 0 or self.num_return_sequences == 1,
                "temperature 0 is greedy and gives one text: num_return_sequences above 1 contradicts it",
            ),
        ]
        return [message for ok, message in checks if not ok] + super().contradictions()


@dataclass
class TrainSamplingConfig(SamplingConfig):
    """The samples drawn at each evaluation, by the recipe of the course."""

    prompt: list[str] = flag(
        ["Halo semua, selamat datang di stream kali ini kita akan"], "prompts of the samples drawn at each evaluation"
    )
    temperature: float = same_flag(SamplingConfig, "temperature", 0.9)
    top_k: int = same_flag(SamplingConfig, "top_k", 50)
    top_p: float = same_flag(SamplingConfig, "top_p", 0.95)


def _is_ids(value) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(i, int) and i >= 0 for i in value)


def _is_bias(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_ids(value[0]) and isinstance(value[1], (int, float))
