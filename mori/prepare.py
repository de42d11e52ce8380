"""Prepare the data for training, comparison and benchmarks."""

from dataclasses import dataclass
from pathlib import Path

import numpy

from mori import distributed
from mori.cli import UserError
from mori.config import EvaluateConfig, TrainConfig
from mori.data.corpus import Corpus, Ledger, check_expressed, read_corpus
from mori.data.files import find_files
from mori.data.formats import ReadOptions
from mori.data.token_file import TokenFile, text_bytes_from
from mori.data.token_writer import make_token_file
from mori.data.tokenize import special_ids
from mori.data.windows import ShiftedDataset, split
from mori.distributed import Runtime
from mori.generation.generate import check_prompts
from mori.model import loading, special_tokens
from mori.speed import precision
from mori.tracking.copying import CopyingMeter, Text

_LEARNED_CHARACTERS = 1 << 26  # a preset's tokenizer is learned from the beginning of a longer text


@dataclass
class Prepared:
    """A tokenizer, a model's configuration, and the corpus as windows of token ids.

    `held_out` is the end of the corpus, or the validation file; None if everything is trained on. `held_out_bytes` is the number of
    bytes of text that its labels cover; None if the tokenizer loses text. `bf16_speedup` is what `settle_precision` measured.
    """

    corpus: Corpus
    tokenizer: object
    special_tokens: special_tokens.SpecialTokens
    model_config: object
    token_file: TokenFile
    train: ShiftedDataset
    held_out: ShiftedDataset | None
    held_out_bytes: int | None
    ledger: Ledger
    copying: CopyingMeter
    bf16_speedup: float = 0.0

    @property
    def hashes(self) -> dict[str, str]:
        """The identity of corpus and tokenizer."""
        header = self.token_file.header
        return {"documents_sha256": header["corpus_sha256"], "tokenizer_sha256": header["tokenizer_sha256"]}


def prepare(config: TrainConfig, runtime: Runtime) -> Prepared:
    """Read files, tokenize documents and cut the token ids into windows; load tokenizer and model configuration.

    Settles the precision of `runtime` too.
    Token ids are cached in `logging_dir`. Raises UserError for missing or unreadable files, a model that cannot be loaded,
    prompts, windows or token ids that do not fit it, and a corpus that is too short.
    """
    corpus = read(config.corpus, config, runtime)
    validation = read(config.validation_file, config, runtime) if config.validation_file else None
    distributed.set_seed(config.seed)
    tokenizer = loading.load_tokenizer(config.model, corpus.texts(_LEARNED_CHARACTERS), config.trust_remote_code)
    model_config = loading.load_config(
        config.model, tokenizer, dropout=config.dropout, trust_remote_code=config.trust_remote_code
    )
    special = special_tokens.decide(tokenizer, document_bos=config.document_bos, parse=config.parse_special_tokens)
    check_prompts(config.prompt, tokenizer, model_config)
    token_file = tokenized(corpus, tokenizer, model_config, special, config, runtime)
    header, measures = token_file.header, corpus.measures
    held_out_fraction = 0.0 if config.validation_file else config.held_out_fraction
    boundary = split(len(token_file), config.block_size, held_out_fraction)
    train = ShiftedDataset(token_file.ids[:boundary], config.block_size)
    ledger = Ledger(
        bytes=measures.bytes,
        text_bytes=measures.text_bytes,
        documents=measures.documents,
        empty_documents=measures.empty_documents,
        blank_documents=measures.blank_documents,
        duplicate_documents=measures.duplicate_documents,
        tokens=len(token_file),
        train_tokens=boundary - train.dropped,
        held_out_tokens=len(token_file) - boundary,
        dropped_tokens=train.dropped,
        bos_tokens=measures.documents * len(header["begin"]),
        eos_tokens=measures.documents * len(header["end"]) + len(header["final"]),
        **header["text"],
    )
    held_out = held_out_bytes = held_out_text = None
    if validation:
        validation_tokens = tokenized(validation, tokenizer, model_config, special, config, runtime)
        held_out, held_out_bytes = scored_text(validation_tokens, validation, tokenizer, config.block_size, runtime)
        held_out_text = Text(held_out.ids, validation_tokens.first_tokens)
    elif held_out_fraction:
        held_out, held_out_bytes = scored_text(token_file, corpus, tokenizer, config.block_size, runtime, boundary)
        firsts = token_file.first_tokens
        held_out_text = Text(held_out.ids, firsts[numpy.searchsorted(firsts, boundary) :] - boundary)
    trained_text = Text(train.ids[: boundary - train.dropped], token_file.first_tokens)
    return Prepared(
        corpus=corpus,
        tokenizer=tokenizer,
        special_tokens=special,
        model_config=model_config,
        token_file=token_file,
        train=train,
        held_out=held_out,
        held_out_bytes=held_out_bytes,
        ledger=ledger,
        copying=CopyingMeter(trained_text, held_out_text, special_ids(tokenizer)),
        bf16_speedup=settle_precision(
            config.precision, runtime, model_config, config.per_device_train_batch_size * config.block_size
        ),
    )


def settle_precision(setting: str, runtime: Runtime, model_config, rows: int) -> float:
    """Take bf16 for `auto` on a CPU if a training step of the model gains clearly; the main rank decides for all.

    Returns how many times as fast as fp32 this CPU multiplies `rows` tokens by a matrix of the model's width; 0.0 if that was not
    measured.
    """
    if setting != "auto" or runtime.device.type != "cpu":
        return 0.0
    width = getattr(model_config.get_text_config(), "hidden_size", 0)  # a model made of several transformers has none
    speedup = runtime.on_main(lambda: precision.bf16_speedup(rows, width))
    if precision.pays(width, speedup):
        runtime.precision = "bf16"
    return speedup


def read(names: list[str], config: TrainConfig | EvaluateConfig, runtime: Runtime) -> Corpus:
    """The documents that some values of `--corpus` name, checked and measured. Raises UserError as `read_corpus` does."""
    files = find_files(names)
    options = ReadOptions(config.text_column, config.encoding)
    return runtime.writers_first(lambda: read_corpus(files, options, _cache_dir(config)))


def tokenized(
    corpus: Corpus,
    tokenizer,
    model_config,
    special: special_tokens.SpecialTokens,
    config: TrainConfig | EvaluateConfig,
    runtime: Runtime,
) -> TokenFile:
    """The token ids of a corpus, cached in `logging_dir`. Raises UserError if they do not fit the model or its tokenizer."""
    loading.check_fits(model_config, block_size=config.block_size, max_id=0)
    token_file = runtime.writers_first(lambda: make_token_file(corpus, tokenizer, _cache_dir(config), special.begin))
    loading.check_fits(model_config, block_size=config.block_size, max_id=token_file.header["max_id"])
    check_expressed(corpus.measures, token_file.header["text"])
    special_tokens.check_corpus(special, token_file.header["text"]["special_tokens"])
    return token_file


def scored_text(
    token_file: TokenFile, corpus: Corpus, tokenizer, block_size: int, runtime: Runtime, start: int = 0
) -> tuple[ShiftedDataset, int | None]:
    """The windows that score the tokens from index `start` on, and the bytes of text that their labels cover.

    The bytes are None if the tokenizer loses text. Raises UserError if there is nothing to score.
    """
    if len(token_file) - start < 2:
        raise UserError("the text to evaluate has fewer than two tokens; bring more text")
    text = token_file.header["text"]
    windows = ShiftedDataset(
        token_file.ids[start:], block_size, keep_tail=True, without_label=token_file.begin_positions(start)
    )
    if text["unknown_tokens"] or text["lost_bytes"]:
        return windows, None
    # The first token is never a label, so its bytes are not counted.
    return windows, runtime.writers_first(lambda: text_bytes_from(start + 1, token_file, corpus, tokenizer))


def _cache_dir(config: TrainConfig | EvaluateConfig) -> Path:
    return Path(config.logging_dir) / ".cache"
