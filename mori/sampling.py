"""From logits to the next token. Pure functions of a few lines, and one object that holds the choices and its generator.

Everywhere `logits` is `(B, V)` in float and -inf marks a token that cannot be drawn.
"""

import torch


def apply_repetition_penalty(logits: torch.Tensor, input_ids: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make the tokens already in `input_ids` `(B, S)` less likely: positive logits / penalty, negative ones * penalty.

    Keskar et al., 2019, CTRL (arXiv:1909.05858), section 4.1; the prompt counts, each token once.
    """
    seen = logits.gather(1, input_ids)
    return logits.scatter(1, input_ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def apply_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Flatten (above 1) or sharpen (below 1) the distribution (Ackley et al., 1985)."""
    return logits / temperature


def apply_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the `k` largest logits of each row, and whatever ties with the last of them (Fan et al., 2018, arXiv:1805.04833)."""
    smallest_kept = logits.topk(min(k, logits.size(-1))).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def apply_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the smallest set of tokens whose probabilities reach `p`, at least one (Holtzman et al., 2020, arXiv:1904.09751)."""
    ascending, order = logits.sort(dim=-1)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - p
    dropped[:, -1] = False
    return logits.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)


class Sampler:
    """Draws the next tokens. It owns its random generator: whoever else draws random numbers is not disturbed.

    `temperature` 0 takes the likeliest token; `top_k` 0, `top_p` 1 and `repetition_penalty` 1 are off.
    The controls are applied in the order of `generate()`: penalty, temperature, top-k, top-p.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.repetition_penalty = repetition_penalty
        self.generator = torch.Generator(device).manual_seed(seed)

    def filtered(self, logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """The logits `(B, V)` after every control that is on; `input_ids` `(B, S)` is the text so far."""
        if self.repetition_penalty != 1:
            logits = apply_repetition_penalty(logits, input_ids, self.repetition_penalty)
        if self.temperature not in (0, 1):
            logits = apply_temperature(logits, self.temperature)
        if self.top_k and self.temperature:
            logits = apply_top_k(logits, self.top_k)
        if self.top_p < 1 and self.temperature:
            logits = apply_top_p(logits, self.top_p)
        return logits

    def __call__(self, logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """The next token of each row, `(B, 1)`. Raises FloatingPointError where no token has a probability."""
        logits = self.filtered(logits.float(), input_ids)
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        probabilities = logits.softmax(-1)
        if probabilities.isnan().any():
            raise FloatingPointError(
                "the logits are not finite: the model has diverged, or a control's value is too extreme"
            )
        return torch.multinomial(probabilities, 1, generator=self.generator)
