"""Prepare the data for training, comparison and benchmarks."""

from dataclasses import dataclass
from pathlib import Path

from mori import distributed
from mori.cli import UserError
from mori.config import EvaluateConfig, TrainConfig
from mori.data import corpus
from mori.data.files import find_files
from mori.data.formats import ReadOptions
from mori.data.token_file import TokenFile, text_bytes_from
from mori.data.windows import ShiftedDataset, split
from mori.distributed import Runtime
from mori.generation.generate import check_prompts
from mori.model import loading, special_tokens


@dataclass
class Prepared:
    """A tokenizer, a model's configuration, and the corpus as windows of token ids.

    `held_out` is the end of the corpus, or the validation file; None if everything is trained on. `held_out_bytes` is the number of
    bytes of text that its labels cover; None if the tokenizer loses text.
    """

    documents: list[corpus.Document]
    blank_files: int
    tokenizer: object
    special_tokens: special_tokens.SpecialTokens
    model_config: object
    token_file: TokenFile
    train: ShiftedDataset
    held_out: ShiftedDataset | None
    held_out_bytes: int | None
    ledger: corpus.Ledger

    @property
    def hashes(self) -> dict[str, str]:
        """The identity of corpus and tokenizer."""
        return {name: self.token_file.header[name] for name in ("corpus_sha256", "tokenizer_sha256")}


def prepare(config: TrainConfig, runtime: Runtime) -> Prepared:
    """Read files, tokenize documents and cut the token ids into windows; load tokenizer and model configuration.

    Token ids are cached in `logging_dir`. Raises UserError for missing or unreadable files, a model that cannot be loaded,
    prompts, windows or token ids that do not fit it, and a corpus that is too short.
    """
    files = find_files(config.corpus)
    options = ReadOptions(config.text_column, config.encoding)
    documents = corpus.read_documents(files, options)
    validation_files = find_files(config.validation_file) if config.validation_file else []
    validation = corpus.read_documents(validation_files, options) if validation_files else []
    distributed.set_seed(config.seed)
    tokenizer = loading.load_tokenizer(config.model, (d.text for d in documents), config.trust_remote_code)
    model_config = loading.load_config(
        config.model, tokenizer, dropout=config.dropout, trust_remote_code=config.trust_remote_code
    )
    special = special_tokens.decide(tokenizer, document_bos=config.document_bos, parse=config.parse_special_tokens)
    check_prompts(config.prompt, tokenizer, model_config)
    token_file = tokenized(documents, tokenizer, model_config, special, config, runtime)
    header = token_file.header
    held_out_fraction = 0.0 if config.validation_file else config.held_out_fraction
    boundary = split(len(token_file), config.block_size, held_out_fraction)
    train = ShiftedDataset(token_file.ids[:boundary], config.block_size)
    ledger = corpus.Ledger(
        bytes=sum(document.bytes for document in documents),
        documents=len(documents),
        tokens=len(token_file),
        train_tokens=boundary - train.dropped,
        held_out_tokens=len(token_file) - boundary,
        dropped_tokens=train.dropped,
        bos_tokens=len(documents) * len(header["begin"]),
        eos_tokens=len(documents) * len(header["end"]) + len(header["final"]),
        **header["text"],
    )
    held_out = held_out_bytes = None
    if validation:
        validation_tokens = tokenized(validation, tokenizer, model_config, special, config, runtime)
        held_out, held_out_bytes = scored_text(validation_tokens, validation, tokenizer, config.block_size)
    elif held_out_fraction:
        held_out, held_out_bytes = scored_text(token_file, documents, tokenizer, config.block_size, boundary)
    return Prepared(
        documents=documents,
        blank_files=len(files) - len(documents),
        tokenizer=tokenizer,
        special_tokens=special,
        model_config=model_config,
        token_file=token_file,
        train=train,
        held_out=held_out,
        held_out_bytes=held_out_bytes,
        ledger=ledger,
    )


def tokenized(
    documents: list[corpus.Document],
    tokenizer,
    model_config,
    special: special_tokens.SpecialTokens,
    config: TrainConfig | EvaluateConfig,
    runtime: Runtime,
) -> TokenFile:
    """The token ids of `documents`, cached in `logging_dir`. Raises UserError if they do not fit the model or its tokenizer."""
    loading.check_fits(model_config, block_size=config.block_size, max_id=0)
    cache_dir = Path(config.logging_dir) / ".cache"
    token_file = runtime.main_first(lambda: TokenFile.make(documents, tokenizer, cache_dir, special.begin))
    loading.check_fits(model_config, block_size=config.block_size, max_id=token_file.header["max_id"])
    corpus.check_expressed(documents, token_file.header["text"])
    special_tokens.check_corpus(special, token_file.header["text"]["special_tokens"])
    return token_file


def scored_text(
    token_file: TokenFile, documents: list[corpus.Document], tokenizer, block_size: int, start: int = 0
) -> tuple[ShiftedDataset, int | None]:
    """The windows that score the tokens from index `start` on, and the bytes of text that their labels cover.

    The bytes are None if the tokenizer loses text. Raises UserError if there is nothing to score.
    """
    if len(token_file) - start < 2:
        raise UserError("the text to evaluate has fewer than two tokens; bring more text")
    text = token_file.header["text"]
    windows = ShiftedDataset(
        token_file.ids[start:], block_size, keep_tail=True, without_label=token_file.begin_positions() - start
    )
    if text["unknown_tokens"] or text["lost_bytes"]:
        return windows, None
    # The first token is never a label, so its bytes are not counted.
    return windows, text_bytes_from(start + 1, token_file, documents, tokenizer)
