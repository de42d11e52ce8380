"""The words of a long text -> their ids. Each distinct word is tokenized once; a long text uses a process per core.

A word is the text between two cut points (`cuts`), so its ids do not depend on the text around it. This is also checked
against the tokenizer's output: at each word's ends there must be token borders, and in every few MB a passage is tokenized
as it stands and compared.
"""

import itertools
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy
from tokenizers import Encoding

from mori.cli import RunFailed, guarded, interruptible, one_line, print_error

CACHE_CHARACTERS = 1 << 20  # of words whose ids are remembered
_GROUP_CHARACTERS = 1 << 13  # of new words that are tokenized as one text
_PARTS_BEFORE_POOL = 4  # the processes of the pool begin with the words of these
_MAX_PROCESSES = 8  # the parent process reads and hashes for no more than these
_PARALLELISM = "TOKENIZERS_PARALLELISM"  # an environment variable of the library `tokenizers`


class CannotCut(Exception):
    """The tokenizer's output shows that the text has to be tokenized in one call."""


@dataclass
class Part:
    """Consecutive pieces of a text, each cut at cut points or at an end of the text.

    `verify`: compare the ids of the first piece with those of one call on it.
    """

    texts: list[str]
    is_first: bool
    is_last: bool
    verify: bool


class WordEncoder:
    """Tokenizes parts of a text word by word.

    Args:
        backend: a tokenizer of the library `tokenizers`.
        word: finds the words of a text one after the other, and an empty one at the end.
        separator: a separator that makes a cut point.
    """

    def __init__(self, backend, word: re.Pattern, separator: str):
        self._backend, self._word, self._after = backend, word, f"{separator}a"
        self._clear()

    def _clear(self) -> None:
        self._ids_of, self._n_characters = {"": b""}, 0

    def encode_all(self, parts: Iterator[Part]) -> Iterator[list[bytes]]:
        """`encode` of each part, in order; a few parts are in memory at a time.

        Raises RunFailed if a process of the pool is killed.
        """
        yield from map(self.encode, itertools.islice(parts, _PARTS_BEFORE_POOL))
        part, n_processes = next(parts, None), _n_processes()
        if part is None:
            return
        parts = itertools.chain([part], parts)
        if n_processes == 1:
            yield from map(self.encode, parts)
            return
        os.environ.setdefault(_PARALLELISM, "true")  # or the library warns at each fork
        try:
            pool = ProcessPoolExecutor(n_processes, multiprocessing.get_context("fork"), _start_process, (self,))
        except (OSError, ImportError, NotImplementedError) as error:  # no semaphores: /dev/shm is missing or read-only
            print_error(f"note: processes cannot share semaphores here ({one_line(error)}): one core tokenizes")
            os.environ[_PARALLELISM] = "false"  # for the next documents
            yield from map(self.encode, parts)
            return
        results: deque = deque()
        try:
            for part in parts:
                results.append(pool.submit(_encode, part))
                if len(results) > 2 * n_processes:
                    yield results.popleft().result()
            while results:
                yield results.popleft().result()
        except BrokenProcessPool:
            raise RunFailed(
                "a process that tokenizes was killed, perhaps because memory ran out; run again with less beside it, or "
                f"with {_PARALLELISM}=false, which starts no processes"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)

    def encode(self, part: Part) -> list[bytes]:
        """The ids of each text of the part, as bytes of uint32.

        Raises CannotCut if the tokenizer's output contradicts the cut points, UserError if the tokenizer fails.
        """
        words = [self._word.findall(text) for text in part.texts]
        opening = closing = b""
        if part.is_first:  # the first and the last word of the text have no neighbour on one side
            opening = self._encode_groups([[words[0].pop(0)]], before="")[0]
        if part.is_last:
            last = words[-1].pop() or words[-1].pop()
            closing = self._encode_groups([[last]], after="")[0]
        if self._n_characters > CACHE_CHARACTERS:
            self._clear()
        ids_of = self._ids_of
        new = sorted(set().union(*words).difference(ids_of))
        self._n_characters += sum(map(len, new))
        ids_of.update(zip(new, self._encode_groups(list(_grouped(new))), strict=True))
        ids = [b"".join(map(ids_of.__getitem__, words_of_text)) for words_of_text in words]
        if part.verify and self._encode_groups([["".join(words[0])]]) != ids[:1]:
            raise CannotCut
        ids[0] = opening + ids[0]
        ids[-1] += closing
        return ids

    def _encode_groups(self, groups: list[list[str]], before: str = "a", after: str | None = None) -> list[bytes]:
        """The ids of each word, as bytes of uint32. Each group is tokenized as one text, between `before` and `after`."""
        after = self._after if after is None else after
        word_ids = []
        texts = [before + "".join(group) + after for group in groups]
        for text, group, encoding in zip(texts, groups, encode_batch(self._backend, texts), strict=True):
            ids, offsets = numpy.array(encoding.ids, dtype="uint32"), numpy.array(encoding.offsets).reshape(-1, 2)
            cuts = len(before) + numpy.cumsum([0, *map(len, group)])
            first_tokens = numpy.searchsorted(offsets[:, 1], cuts, side="right").tolist()
            for cut, token in zip(cuts.tolist(), first_tokens, strict=True):
                if 0 < cut < len(text) and not (
                    0 < token < len(ids) and offsets[token - 1][1] == cut <= offsets[token][0] <= cut + 1
                ):
                    raise CannotCut
            word_ids += [ids[begin:end].tobytes() for begin, end in itertools.pairwise(first_tokens)]
        return word_ids


def encode_batch(backend, texts: list[str]) -> list[Encoding]:
    """The encodings of the texts, without special tokens; the library uses all cores. Raises UserError if it fails."""
    return guarded(
        "cannot tokenize the corpus",
        lambda: interruptible(lambda: backend.encode_batch(texts, add_special_tokens=False)),
    )


def _grouped(words: list[str]) -> Iterator[list[str]]:
    group, n_characters = [], 0
    for word in words:
        group.append(word)
        n_characters += len(word)
        if n_characters >= _GROUP_CHARACTERS:
            yield group
            group, n_characters = [], 0
    if group:
        yield group


def _n_processes() -> int:
    """One per core; 1 if the library's environment variable says so, or if this system cannot fork safely."""
    is_off = os.environ.get(_PARALLELISM, "true").lower() in ("off", "false", "f", "no", "n", "0", "")
    return 1 if is_off or not hasattr(os, "sched_getaffinity") else min(len(os.sched_getaffinity(0)), _MAX_PROCESSES)


# ------------------------------------------------------------------------------------------- in a process of the pool


def _start_process(encoder: WordEncoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ[_PARALLELISM] = "false"  # a fork has none of the library's threads
    for number in (signal.SIGINT, signal.SIGUSR1):  # the parent handles these
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(part: Part) -> list[bytes]:
    return _encoder.encode(part)
