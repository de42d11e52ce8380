"""The words of a long text -> their ids. Each distinct word is tokenized once; a long text uses a process per core.

A word is the text between two cut points (`cuts`), so its ids do not depend on the text around it. This is also checked
against the tokenizer's output: at each word's ends there must be token borders, and in every few MB a passage is tokenized
as it stands and compared.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

import numpy
from tokenizers import Encoding

from mori.cli import RunFailed, guarded, interruptible, one_line, print_error
from mori.data.cuts import Cutter

CACHE_CHARACTERS = 1 << 20  # of words whose ids are remembered
_GROUP_CHARACTERS = 1 << 13  # of new words that are tokenized as one text
_VERIFIED_CHARACTERS = 1 << 15  # of a part of which a passage is compared
_PARTS_BEFORE_POOL = 4  # the processes of the pool begin with the words of these
_MAX_PROCESSES = 8  # the parent process reads and hashes for no more than these
_PARALLELISM = "TOKENIZERS_PARALLELISM"  # an environment variable of the library `tokenizers`


T = TypeVar("T")


class CannotCut(Exception):
    """The tokenizer's output shows that the text has to be tokenized in one call."""


@dataclass
class Part:
    """Consecutive pieces of text, each cut at cut points or at an end of its document.

    `are_first` and `are_last` tell of each piece whether its document begins or ends with it. `verify`: compare the ids of the
    first pieces with those of one call on them.
    """

    texts: list[str]
    are_first: list[bool]
    are_last: list[bool]
    verify: bool


class WordEncoder:
    """Tokenizes parts of a text word by word.

    Args:
        backend: a tokenizer of the library `tokenizers`.
        cutter: its cut points, of which there must be some.
    """

    def __init__(self, backend, cutter: Cutter):
        self._backend, self._cutter, self._neighbours = backend, cutter, ("a", f"{cutter.first}a")
        self._clear()

    def _clear(self) -> None:
        # For a word in the middle of a text, and at its beginning, its end, or both, where it has no neighbour.
        self._ids_of: dict[tuple[bool, bool], dict[str, bytes]] = {
            place: {} for place in itertools.product((False, True), repeat=2)
        }
        self._n_characters = 0

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
        if self._n_characters > CACHE_CHARACTERS:
            self._clear()
        words = [self._cutter.words(text) for text in part.texts]
        edges: dict[tuple[bool, bool], list[str]] = {
            place: [] for place in ((True, False), (False, True), (True, True))
        }
        places = []  # of the first and of the last word of each text, if they are edges
        for of_text, is_first, is_last in zip(words, part.are_first, part.are_last, strict=True):
            is_whole = is_first and is_last and len(of_text) == 1
            opening = (True, is_whole) if is_first and of_text else None
            closing = (False, True) if is_last and of_text and not is_whole else None
            if opening:
                edges[opening].append(of_text.pop(0))
            if closing:
                edges[closing].append(of_text.pop())
            places.append((opening, closing))
        inner = self._ids((False, False), set().union(*words))
        edge_ids = {place: map(self._ids(place, set(at)).__getitem__, at) for place, at in edges.items()}
        ids = [b"".join(map(inner.__getitem__, of_text)) for of_text in words]
        if part.verify:
            self._verify(words, ids)
        return [
            (next(edge_ids[opening]) if opening else b"") + middle + (next(edge_ids[closing]) if closing else b"")
            for (opening, closing), middle in zip(places, ids, strict=True)
        ]

    def _ids(self, place: tuple[bool, bool], words: set[str]) -> dict[str, bytes]:
        """The ids of words at a place, those of the new ones among them computed."""
        ids_of = self._ids_of[place]
        new = sorted(words.difference(ids_of))
        self._n_characters += sum(map(len, new))
        groups = [[word] for word in new] if any(place) else list(grouped(new, len, _GROUP_CHARACTERS))
        before, after = ("" if is_edge else text for is_edge, text in zip(place, self._neighbours, strict=True))
        ids_of.update(zip(new, self._encode_groups(groups, before, after), strict=True))
        return ids_of

    def _verify(self, words: list[list[str]], ids: list[bytes]) -> None:
        """Raise CannotCut if the words of the first texts have other ids together."""
        passages, n_characters = [], 0
        for of_text, ids_of_text in zip(words, ids, strict=True):
            if of_text:
                passages.append(("".join(of_text), ids_of_text))
                n_characters += len(passages[-1][0])
            if n_characters >= _VERIFIED_CHARACTERS:
                break
        together = self._encode_groups([[passage] for passage, _ in passages], *self._neighbours)
        if together != [ids_of_text for _, ids_of_text in passages]:
            raise CannotCut

    def _encode_groups(self, groups: list[list[str]], before: str, after: str) -> list[bytes]:
        """The ids of each word, as bytes of uint32. Each group is tokenized as one text, between `before` and `after`."""
        word_ids = []
        texts = [before + "".join(group) + after for group in groups]
        for text, group, encoding in zip(texts, groups, encode_batch(self._backend, texts), strict=True):
            ids, offsets = numpy.array(encoding.ids, dtype="uint32"), numpy.array(encoding.offsets).reshape(-1, 2)
            cuts = len(before) + numpy.cumsum([0, *map(len, group)])
            first_tokens = numpy.searchsorted(offsets[:, 1], cuts, side="right").tolist()
            first_tokens[0] = (
                first_tokens[0] if before else 0
            )  # a token that the normalizer puts in front has no characters
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


def grouped(items: Iterable[T], length: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Consecutive items in lists that end with the item that brings their length to `limit`."""
    group, total = [], 0
    for item in items:
        group.append(item)
        total += length(item)
        if total >= limit:
            yield group
            group, total = [], 0
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
