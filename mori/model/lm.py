"""A causal language model together with its loss: one module for DDP, autocast and the compiler."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mori.data.windows import IGNORE_INDEX
from mori.model.adapters.trainable import layers
from mori.model.loss import chunked_cross_entropy_sum, cross_entropy_sum
from mori.speed.attention import attention_by_blocks, suits_blocks
from mori.speed.matmul import matmul_context

# transformers builds no mask for an attention function whose name it does not know.
MASK_FREE = "mori"


def mask_free_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **options
):
    """transformers' SDPA (`AttentionInterface`), or attention by blocks where it is the same and faster."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and options.get("position_bias") is None
    if plain and causal and query.size(2) == key.size(2) and suits_blocks(query, dropout):
        return attention_by_blocks(query, key, value, scaling, dropout), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
    )


AttentionInterface.register(MASK_FREE, mask_free_attention)


class CausalLMLoss(nn.Module):
    """A model of transformers and the summed loss of its tokens.

    Args:
        model: any causal language model of transformers.
        chunked_loss: never materialize all logits (`loss.chunked_cross_entropy_sum`); only for models with a plain head, see
            `watch_head`.
        cpu_matmul: the library of large fp32 matmuls on a CPU, "torch" or "onednn".
        separators: tokens at which a document begins; if given, no token attends to another document (`document_mask`).

    Attributes:
        rows: the number of windows in a batch; a compiled model pads a smaller batch to it.
        on_compile_failure: called with the error if the compiler fails; the model then runs without compiled code.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        chunked_loss: bool = False,
        cpu_matmul: str = "torch",
        separators: tuple[int, ...] = (),
    ):
        super().__init__()
        self.model, self.chunked_loss = model, chunked_loss
        self.cpu_matmul, self.separators = cpu_matmul, separators
        self.mask_free, self.compiled, self._has_compiled_code, self.rows = False, False, False, 0
        self._token_losses: list[torch.Tensor] | None = None
        self.on_compile_failure: Callable[[Exception], object] = lambda error: None
        self.router_coefficient = getattr(model, "router_aux_loss_coef", getattr(model, "aux_loss_coef", None))

    @property
    def trunk(self) -> nn.Module:
        """The part of the model that the forward pass calls: all but the head if the loss is chunked."""
        return self.model.base_model if self.chunked_loss else self.model

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        n_targets: torch.Tensor | None = None,
        loss_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The sum of the token losses; with `n_targets`, this batch's part of the mean loss of a step.

        Args:
            input_ids, labels: `(B, T)`; the labels are shifted already.
            n_targets: the number of labels in the whole step. The router loss of a mixture of experts
                (`output_router_logits`) is then added, weighted by this batch's share of the labels.
            loss_scale: the factor by which a `GradScaler` will multiply the result before the backward pass.
        """
        compiled = self.training and self.compiled
        if compiled and (missing := self.rows - len(input_ids)) > 0:  # another shape would trigger a recompilation
            input_ids, labels = pad(input_ids, (0, 0, 0, missing)), pad(labels, (0, 0, 0, missing), value=IGNORE_INDEX)
        documents = document_mask(input_ids, self.separators) if self.separators else {}
        with self.matmul_context():
            output = self._run_trunk(compiled, input_ids=input_ids, use_cache=False, **documents)
            if self.chunked_loss:  # output[0] is the input of the head, (B, T, D)
                grad_scale = None if loss_scale is None else loss_scale / n_targets
                head = self.model.get_output_embeddings()
                loss = chunked_cross_entropy_sum(output[0], head, labels, grad_scale, self._token_losses)
            else:
                loss = cross_entropy_sum(output.logits, labels, self._token_losses)  # logits (B, T, V)
        if n_targets is None:
            return loss
        loss = loss / n_targets
        router_loss = getattr(output, "aux_loss", None)
        if router_loss is not None:
            share = (labels != IGNORE_INDEX).sum() / n_targets
            loss = loss + self.router_coefficient * router_loss * share
        return loss

    def call(self, action: Callable[[nn.Module], object]):
        """`action(model)` as a forward pass of this module, for which FSDP gathers the weights outside the layers."""
        return action(self.model)

    @contextlib.contextmanager
    def token_losses(self) -> Iterator[list[torch.Tensor]]:
        """The context in which forward passes leave the loss of each token, in parts `(N,)`, with 0 for labels that are ignored."""
        self._token_losses = []
        try:
            yield self._token_losses
        finally:
            self._token_losses = None

    def _run_trunk(self, compiled: bool, **inputs):
        if compiled:
            try:
                return self.trunk(**inputs)
            except torch._dynamo.exc.TorchDynamoException as error:  # a smaller batch needs other code
                self.compiled = False
                self.on_compile_failure(error)
        with self._eager():
            return self.trunk(**inputs)

    def matmul_context(self) -> contextlib.AbstractContextManager:
        """The context of every forward pass, in which `cpu_matmul` computes the large matmuls."""
        return matmul_context(self.cpu_matmul)

    def use_mask_free_attention(self) -> None:
        """Attend causally without a mask; only for models for which `attends_to_all_before` holds."""
        self.mask_free = True
        self._own_attention = self.model.config._attn_implementation, getattr(self.model.config, "pad_token_id", None)
        self._set_attention(MASK_FREE, None)

    def use_own_attention(self) -> None:
        """Restore the model's own attention."""
        if self.mask_free:
            self.mask_free = False
            self._set_attention(*self._own_attention)

    def _set_attention(self, implementation: str, pad_token_id: int | None) -> None:
        self.model.set_attn_implementation(implementation)
        # With a padding token and no mask, GPT-2 checks for padding on the device in every pass (transformers 5.23).
        self.model.config.pad_token_id = pad_token_id

    @contextlib.contextmanager
    def as_loaded(self) -> Iterator[nn.Module]:
        """The model as transformers loaded it, with its own attention and not compiled, for generation and saving."""
        mask_free = self.mask_free
        self.use_own_attention()
        try:
            with self._eager():
                yield self.model
        finally:
            if mask_free:
                self.use_mask_free_attention()

    @contextlib.contextmanager
    def not_compiled(self) -> Iterator[None]:
        """Run without the compiled code: a compiled module calls no hooks."""
        compiled, self.compiled = self.compiled, False
        try:
            yield
        finally:
            self.compiled = compiled

    def compile_trunk(self, rows: int, backend="inductor") -> None:
        """Compile the trunk in place (`torch.nn.Module.compile`) for training on batches of `rows` windows; of a sharded one each layer.

        The compiler benchmarks no kernels: a resumed run must choose the same ones. Set `compiled` to False to run without
        the compiled code from then on.
        """
        options = {"options": {"deterministic": True}} if backend == "inductor" else {}
        options |= {"backend": backend, "dynamic": False}
        if isinstance(self, FSDPModule):  # which gathers the weights of a layer around its forward pass
            for layer in layers(self.model)[1]:
                layer.forward = torch.compile(layer.forward, **options)
        else:
            self.trunk.compile(**options)
        self.compiled, self._has_compiled_code, self.rows = True, True, rows

    def _eager(self) -> contextlib.AbstractContextManager:
        return torch.compiler.set_stance("force_eager") if self._has_compiled_code else contextlib.nullcontext()


def document_mask(input_ids: torch.Tensor, separators: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """`position_ids` `(B, T)` and `attention_mask` `(B, 1, T, T)` that keep the documents of a window `(B, T)` apart.

    A document begins at the separator before it, which predicts its first token, or at the beginning of the window.
    """
    columns = torch.arange(input_ids.size(1), device=input_ids.device)
    begins = sum(input_ids == separator for separator in separators).bool()
    first = torch.where(begins, columns, 0).cummax(-1).values[..., None]  # (B, T, 1)
    visible = (columns >= first) & (columns <= columns[:, None])  # (B, T, T)
    return {"position_ids": columns - first[..., 0], "attention_mask": visible[:, None]}


def attends_to_all_before(model: nn.Module, block_size: int) -> bool:
    """Whether every layer sees all earlier tokens in a window of `block_size`, through transformers' SDPA.

    Then causal attention needs no mask. transformers still builds one when compiling, which disables the fast kernels; in
    eager mode it checks on the device in every pass.
    """
    text = model.config.get_text_config()
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    layer_types = set(getattr(text, "layer_types", None) or ["full_attention"])
    return (
        model.config._attn_implementation == "sdpa"
        and model._supports_attention_backend
        and layer_types <= {"full_attention", "sliding_attention", "chunked_attention"}
        and all(isinstance(window, int) and window >= block_size for window in windows if window)
    )


@contextlib.contextmanager
def watch_head(model: nn.Module) -> Iterator[list[bool]]:
    """Record for each forward pass of `model`, called with keywords, whether its head is plain.

    It is plain if the logits equal, to the bit, the output embeddings applied to the trunk's output: neither scaled nor
    capped. The loss of such a model may be computed in chunks. A model with a router loss counts as not plain.
    """
    head, trunk, plain = model.get_output_embeddings(), model.base_model, []

    def record(module, args, kwargs, output) -> None:
        try:
            plain.append(torch.equal(head(trunk(**kwargs)[0]), output.logits))
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
            plain.append(False)  # the trunk cannot be called alone

    if not isinstance(head, nn.Linear) or trunk is model or getattr(model.config, "output_router_logits", False):
        yield [False]
        return
    hook = model.register_forward_hook(record, with_kwargs=True)
    try:
        yield plain
    finally:
        hook.remove()
