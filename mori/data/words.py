"""The words of a text -> their ids: each different word is tokenized once, in processes on all cores (eight at most) where a text is long.

A word is what stands between two borders of pre-tokens that are sure (`pieces` says which are), so it has the same ids wherever
it stands, for models work on each pre-token alone. That is not taken on trust: the borders are looked for in what the tokenizer
gives, and a part of the text in every few megabytes is tokenized as it stands besides.
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

from mori.config import RunFailed
from mori.model.files import guarded

KNOWN = 1 << 20  # characters of words whose ids are remembered
_GROUP = 1 << 13  # characters of new words that are tokenized as one text
_ALONE = 4  # parts before other processes are worth their start; what is learned from these, they know
_PROCESSES = 8  # at most: the one that reads and hashes can keep no more of them busy
_PARALLELISM = "TOKENIZERS_PARALLELISM"  # the switch of the library itself


class CannotCut(Exception):
    """The text has to be tokenized in one call: its parts do not agree."""


@dataclass
class Part:
    """Texts that follow on one another in the whole one, each between two borders, or at an end of it."""

    texts: list[str]
    is_first: bool
    is_last: bool
    verify: bool


class WordEncoder:
    """Tokenizes parts of a text word by word.

    Args:
        backend: a tokenizer of the library `tokenizers`.
        word: a regular expression that finds the words of a text one after the other, the last one being empty or open.
    """

    def __init__(self, backend, word: re.Pattern):
        self._backend, self._word = backend, word
        self._forget()

    def _forget(self) -> None:
        self._known, self._n_characters = {"": b""}, 0

    def encode_all(self, parts: Iterator[Part]) -> Iterator[list[bytes]]:
        """`encode` of each part, in their order; the later parts of a long text in processes on all cores.

        Only a few parts are held at a time. Raises RunFailed where such a process is killed.
        """
        yield from map(self.encode, itertools.islice(parts, _ALONE))
        n_workers = _cores()
        begun = next(parts, None)
        if begun is None:
            return
        parts = itertools.chain([begun], parts)
        if n_workers == 1:
            yield from map(self.encode, parts)
            return
        os.environ.setdefault(_PARALLELISM, "true")  # else the library warns of each fork
        pool = ProcessPoolExecutor(n_workers, multiprocessing.get_context("fork"), _begin, (self,))
        waiting: deque = deque()
        try:
            for part in parts:
                waiting.append(pool.submit(_encode, part))
                if len(waiting) > 2 * n_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RunFailed(
                "a process that tokenizes was killed, perhaps for want of memory; run it again with less beside it, or "
                f"with {_PARALLELISM}=false, which needs none"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)

    def encode(self, part: Part) -> list[bytes]:
        """The ids of each text of the part, as bytes of uint32.

        Raises CannotCut where a word has no border of tokens at its ends after all, UserError where the tokenizer fails.
        """
        words = [self._word.findall(text) for text in part.texts]
        opening = closing = b""
        if part.is_first:  # there is nothing before the first word, nor behind the last
            opening = self._ids([[words[0].pop(0)]], before="")[0]
        if part.is_last:
            last = words[-1].pop() or words[-1].pop()
            closing = self._ids([[last]], behind="")[0]
        if self._n_characters > KNOWN:
            self._forget()
        known = self._known
        new = sorted(set().union(*words).difference(known))
        self._n_characters += sum(map(len, new))
        known.update(zip(new, self._ids(list(_grouped(new))), strict=True))
        if part.verify and self._ids([["".join(words[0])]]) != [b"".join(map(known.__getitem__, words[0]))]:
            raise CannotCut
        ids = [b"".join(map(known.__getitem__, its_words)) for its_words in words]
        ids[0] = opening + ids[0]
        ids[-1] += closing
        return ids

    def _ids(self, groups: list[list[str]], before: str = "a", behind: str = " a") -> list[bytes]:
        """The ids, as bytes of uint32, of each word in groups of words that begin and end at borders; a group is one text."""
        found = []
        texts = [before + "".join(group) + behind for group in groups]
        for group, encoding in zip(groups, encode_batch(self._backend, texts), strict=True):
            ids, words = numpy.array(encoding.ids, dtype="uint32"), encoding.word_ids
            offsets = numpy.array(encoding.offsets).reshape(-1, 2)
            ends = len(before) + numpy.cumsum([0, *map(len, group)])
            borders = numpy.searchsorted(offsets[:, 1], ends, side="right").tolist()
            for place, border in zip(ends.tolist(), borders, strict=True):
                if 0 < place < ends[-1] + len(behind) and not (
                    0 < border < len(ids)
                    and offsets[border - 1][1] == place <= offsets[border][0] <= place + 1
                    and words[border - 1] != words[border]
                ):
                    raise CannotCut
            found += [ids[begin:end].tobytes() for begin, end in itertools.pairwise(borders)]
        return found


def encode_batch(backend, texts: list[str]) -> list[Encoding]:
    """The encodings of the texts, on all cores, without special tokens. Raises UserError where the tokenizer fails."""
    return guarded("cannot tokenize the corpus", lambda: backend.encode_batch(texts, add_special_tokens=False))


def _grouped(words: list[str]) -> Iterator[list[str]]:
    """Groups of words with some `_GROUP` characters in each."""
    group, held = [], 0
    for word in words:
        group.append(word)
        held += len(word)
        if held >= _GROUP:
            yield group
            group, held = [], 0
    if group:
        yield group


def _cores() -> int:
    """How many processes to tokenize in: as many as cores; one where the library's switch is off, or no fork is safe."""
    off = os.environ.get(_PARALLELISM, "true").lower() in ("off", "false", "f", "no", "n", "0", "")
    return 1 if off or not hasattr(os, "sched_getaffinity") else min(len(os.sched_getaffinity(0)), _PROCESSES)


# --------------------------------------------------------------------------------------------- what happens in a process


def _begin(encoder: WordEncoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ[_PARALLELISM] = "false"  # the library's threads are not in this process
    for number in (signal.SIGINT, signal.SIGUSR1):  # they are for the parent to notice
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    """Die with the parent, however it died."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(part: Part) -> list[bytes]:
    return _encoder.encode(part)
