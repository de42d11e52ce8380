"""What a corpus became as tokens: special tokens in the text, unknown tokens, and text that the tokens do not hold."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy

from mori.data.corpus import Corpus
from mori.data.tokenize import lost_characters, special_ids

_NAMES, _NAME_CHARACTERS = 20, 40  # of special tokens, in a header


class Arrays(Protocol):
    """The arrays of a token file."""

    def array(self, name: str) -> numpy.ndarray:
        """`ids`, `first_tokens` or `marks`, memory-mapped."""

    def id_blocks(self) -> Iterator[numpy.ndarray]:
        """The ids, a part at a time."""


def text_account(arrays: Arrays, header: dict, corpus: Corpus, tokenizer) -> dict:
    """What the text became: the fields of `corpus.Ledger` that are about its tokens.

    `arrays` and `header` are those of a token file that is being written.
    """
    special = _count(arrays.id_blocks(), {token for token in special_ids(tokenizer) if token <= header["max_id"]})
    for token in header["begin"] + header["end"]:
        special[token] -= header["documents"]
    special.subtract(header["final"])
    unknown, name = tokenizer.unk_token_id, tokenizer.unk_token
    n_unknown, n_named = max(0, special.pop(unknown, 0)), 0
    if n_unknown and header["parsed"]:  # the text may hold the unknown token's name, as some data sets do
        n_named = min(n_unknown, _occurrences(name, corpus.chunks()))
        special[unknown], n_unknown = n_named, n_unknown - n_named
    lost = lost_characters(
        tokenizer,
        corpus.measures.alphabet,
        lambda: (chunk.replace(name, "") for chunk in corpus.chunks()) if n_named else corpus.chunks(),
        _text_parts(arrays, header),
        unknown if n_unknown else None,
    )
    named = (+special).most_common()
    names = {tokenizer.convert_ids_to_tokens(token)[:_NAME_CHARACTERS]: count for token, count in named[:_NAMES]}
    return {
        "special_tokens": {**names, **({"others": sum(n for _, n in named[_NAMES:])} if named[_NAMES:] else {})},
        "unknown_tokens": n_unknown,
        "lost_bytes": sum(len(character.encode()) * count for character, count in lost.items()),
        "lost_characters": dict(lost.most_common(5)),
    }


def _count(blocks: Iterable[numpy.ndarray], wanted: set[int]) -> Counter[int]:
    """How often each of the wanted ids is in the blocks of ids."""
    counts = Counter()
    for block in blocks:
        counts.update(block[numpy.isin(block, numpy.array(sorted(wanted), dtype=block.dtype))].tolist())
    return counts


def _text_parts(arrays: Arrays, header: dict) -> Iterator[numpy.ndarray]:
    """The ids of the text alone, in parts that begin and end between characters."""
    ids, first_tokens, marks = arrays.array("ids"), arrays.array("first_tokens"), arrays.array("marks")[:, 0]
    ends = itertools.chain(map(int, first_tokens[1:]), [len(ids) - len(header["final"])])
    for first, end in zip(map(int, first_tokens), ends, strict=True):
        first, end = first + len(header["begin"]), end - len(header["end"])
        low, high = numpy.searchsorted(marks, [first, end])
        for start, stop in itertools.pairwise([first, *marks[low:high].tolist(), end]):
            yield ids[start:stop]


def _occurrences(name: str, chunks: Iterator[str]) -> int:
    count, tail = 0, ""
    for chunk in chunks:
        text = tail + chunk
        count += text.count(name)
        tail = text[len(text) - len(name) + 1 :] if len(name) > 1 else ""
    return count
