"""The copying meter: how much of the samples stands word for word in the text that the model was trained on.

A text is searched for all windows of some token ids at once, by a rolling hash (Karp and Rabin, "Efficient Randomized
Pattern-Matching Algorithms", 1987); each match is then compared token by token.
"""

import functools
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy
from numpy.lib.stride_tricks import sliding_window_view

from mori.cli import plural

WINDOW = 8  # tokens
DESCRIPTIONS = {
    "copying/longest_run": "The most tokens in a row of a sample that stand in the training text. High beside the baseline: "
    "the model recites.",
    "copying/share_of_8_tokens": "Share of the samples' windows of 8 tokens that stand in the training text (0 to 1). Near the "
    "baseline is good, near 1 is memorized. Of a large text, a part is searched, and all of it at the end.",
    "copying/baseline_longest_run": "The same run for the held-out text: what this author repeats anyway. It grows with the "
    "text compared, up to 512 tokens.",
    "copying/baseline_share_of_8_tokens": "The same share for the held-out text: what this author repeats anyway (0 to 1).",
    "copying/held_out_longest_run": "The most tokens in a row of a sample that stand in the held-out text, which was never "
    "trained on.",
    "copying/held_out_share_of_8_tokens": "Share of the samples' windows of 8 tokens that stand in the held-out text (0 to 1): "
    "chance and common phrases.",
}
# Tokens of a text that one search reads: of a larger text, parts that are spread evenly. Seconds at the end of a run, less before.
SEARCHED, SEARCHED_AT_THE_END = 1 << 22, 1 << 28
_EXCERPTS, _EXCERPT = 32, 512  # of the held-out text, for the baseline, and their tokens
_PART = 1 << 16  # tokens that are hashed at a time, so that they stay in the processor's cache
_BLOCK = 1 << 20  # tokens that are compared at a time
_PARTS_BETWEEN_RELEASES = 1 << 6
_FACTOR = 0x9E3779B97F4A7C15  # of the hash, modulo 2**64; odd, so it has an inverse


@dataclass(frozen=True)
class Text:
    """Token ids, `(N,)`, memory-mapped or not, and the sorted positions at which documents start; some may lie behind the ids."""

    ids: numpy.ndarray
    starts: numpy.ndarray


@dataclass
class Match:
    """What a search finds.

    Attributes:
        longest_run: the most tokens in a row that stand in the text.
        windows: the windows of 8 tokens that were searched for.
        copied: those that stand in the text.
        spans: for each piece, the ranges of its tokens that the copied windows cover; two that only touch stay apart.
    """

    longest_run: int
    windows: int
    copied: int
    spans: list[list[tuple[int, int]]] = field(default_factory=list)

    @property
    def share(self) -> float | None:
        """The share of copied windows; None if the pieces are shorter than a window."""
        return self.copied / self.windows if self.windows else None


class CopyingMeter:
    """Measures samples against the training text and the held-out text, and these two against each other.

    Windows with special tokens count nowhere: they are no text, and an unknown token stands for any word. No run crosses the
    border of two documents. A run may cross the border of two training windows, which lie side by side in the text.

    Args:
        train: the text that is trained on, without the held-out part and the tokens that fill no window.
        held_out: None if everything is trained on.
        special_ids: the ids that are no text.
    """

    def __init__(self, train: Text, held_out: Text | None, special_ids: Iterable[int]):
        self._train, self._held_out, self._special = train, held_out, sorted(special_ids)
        self._baseline = functools.cache(lambda limit: search(self._excerpts(), train, limit))

    def measure(self, samples: list[list[int]], at_the_end: bool) -> tuple[dict, list[list[tuple[int, int]]]]:
        """The figures, and the ranges of copied tokens in each sample.

        A sample is its generated ids alone: of a run that begins in the prompt, only they count. Figures that do not exist are
        None, as without held-out text. `at_the_end` searches more of a very large text: `searched_tokens` of `training_tokens`.
        """
        limit = SEARCHED_AT_THE_END if at_the_end else SEARCHED
        pieces = [self._piece(numpy.array(sample, numpy.int64)) for sample in samples]
        match = search(pieces, self._train, limit)
        baseline = self._baseline(limit) if self._held_out else None
        in_held_out = search(pieces, self._held_out, limit) if self._held_out else None
        figures = {
            f"{prefix}{name}": getattr(result, attribute, None)
            for prefix, result in {"": match, "baseline_": baseline, "held_out_": in_held_out}.items()
            for name, attribute in {"longest_run": "longest_run", "share_of_8_tokens": "share"}.items()
        }
        total = len(self._train.ids)
        return {**figures, "searched_tokens": min(total, limit), "training_tokens": total}, match.spans

    def _piece(self, ids: numpy.ndarray) -> numpy.ndarray:
        """Some ids with -1 in the place of special tokens."""
        return numpy.where(numpy.isin(ids, self._special), -1, ids.astype(numpy.int64))

    def _excerpts(self) -> list[numpy.ndarray]:
        """The held-out text, or excerpts of it that are spread evenly; cut at the borders of documents."""
        ids, starts, pieces = self._held_out.ids, self._held_out.starts, []
        for first, stop in _parts(len(ids), _EXCERPTS * _EXCERPT, _EXCERPT):
            inside = starts[slice(*numpy.searchsorted(starts, [first + 1, stop]))] - first
            pieces += map(self._piece, numpy.split(ids[first:stop], inside))
        return pieces


def scalars(figures: dict) -> dict[str, float]:
    """The figures that there are, by their tags."""
    return {tag: value for tag in DESCRIPTIONS if (value := figures[tag.partition("/")[2]]) is not None}


def sentence(figures: dict) -> str:
    """The figures in words."""

    def beside(name: str, form: str) -> str:
        value = figures[f"baseline_{name}"]
        return "" if value is None else f" (held-out text {value:{form}})"

    share, searched, total = figures["share_of_8_tokens"], figures["searched_tokens"], figures["training_tokens"]
    windows = f"{share or 0:.1%} of the windows of {WINDOW} tokens{beside('share_of_8_tokens', '.1%')}, "
    return (
        f"the samples copy from the training text {'' if share is None else windows}"
        f"{plural(figures['longest_run'], 'token')} in a row at most{beside('longest_run', '')}"
        + (f"; searched {searched:,} of {total:,} tokens" if searched < total else "")
    )


def search(pieces: list[numpy.ndarray], text: Text, limit: int) -> Match:
    """Which windows of the `pieces`, each `(n,)` int64, stand in `text`, and the longest run of theirs that does.

    -1 in a piece matches nothing. Of a text of more than `limit` tokens, parts of that length together are searched. Takes memory
    for one part, and time in proportion to the text.
    """
    query = numpy.concatenate([part for piece in pieces for part in (piece, [-1])] or [[-1]]).astype(numpy.int64)
    borders = numpy.flatnonzero(query < 0)
    longest = int(numpy.diff(borders, prepend=-1).max()) - 1
    hashed = _Hashed(query)
    eight, longer = _Windows(hashed, WINDOW), _Windows(hashed, 1)  # `longer` than the longest run so far, by a token
    for number, (first, stop) in enumerate(_parts(len(text.ids), limit, _PART) if longest else ()):
        if number % _PARTS_BETWEEN_RELEASES == 0:
            _release(text.ids)
        part = _Hashed(text.ids[first : stop + longest - 1])  # every run that begins before `stop` ends in it
        starts = text.starts[slice(*numpy.searchsorted(text.starts, [first, first + len(part.ids)]))] - first
        bound = min(longest, WINDOW - 1 + _longest_stretch(eight.mark(part, starts)))
        while longer.n <= bound and len(longer.mark(part, starts)):
            longer = _Windows(hashed, longer.n + 1)
    copied = eight.present[eight.number]
    joined = numpy.zeros(len(query) + 1, numpy.int64)  # a token and the next one, by windows that hold both
    joined[eight.positions[copied]] += 1
    joined[eight.positions[copied] + WINDOW - 1] -= 1
    edges = numpy.flatnonzero(numpy.diff(joined.cumsum() > 0, prepend=False)).reshape(-1, 2) + [0, 1]
    spans, offset = [], 0
    for piece in pieces:
        inside = edges[(edges[:, 0] >= offset) & (edges[:, 0] < offset + len(piece))] - offset
        spans.append([(start, end) for start, end in inside.tolist()])
        offset += len(piece) + 1
    return Match(longer.n - 1, len(copied), int(copied.sum()), spans)


class _Hashed:
    """Token ids with a hash of all windows of a length: the sum of `id * _FACTOR**i` over the window, modulo 2**64."""

    def __init__(self, ids: numpy.ndarray):
        self.ids = ids
        self._sums = numpy.zeros(len(ids) + 1, numpy.uint64)
        numpy.cumsum(ids.astype(numpy.uint64) * _powers(_FACTOR, len(ids)), out=self._sums[1:])

    def windows(self, n: int) -> numpy.ndarray:
        """The hash of each window of `n` ids, `(N - n + 1,)` uint64."""
        sums = self._sums[n:] - self._sums[: max(0, len(self._sums) - n)]
        return sums * _powers(pow(_FACTOR, -1, 2**64), len(sums))


def _powers(factor: int, count: int) -> numpy.ndarray:
    """The first `count` powers of `factor`, from `factor**0` on, modulo 2**64."""
    return _all_powers(factor, 1 << count.bit_length())[:count]


@functools.lru_cache(maxsize=8)
def _all_powers(factor: int, count: int) -> numpy.ndarray:
    powers = numpy.full(count, factor, numpy.uint64)
    powers[0] = 1
    return powers.cumprod(dtype=numpy.uint64)


class _Windows:
    """The windows of `n` tokens in a query, to be searched for.

    Attributes:
        positions: `(W,)`, where they begin; none holds a -1.
        number: `(W,)`, the place of each in `present`; equal windows share one.
        present: whether they stand in the parts of the text that were searched so far.
    """

    def __init__(self, query: _Hashed, n: int):
        self.n, self._ids = n, query.ids
        borders = numpy.concatenate([[0], (query.ids < 0).cumsum()])
        self.positions = numpy.flatnonzero(borders[n:] == borders[: max(0, len(borders) - n)])
        self._hashes, first, self.number = numpy.unique(
            query.windows(n)[self.positions], return_index=True, return_inverse=True
        )
        self._first = self.positions[first]
        self.present = numpy.zeros(len(first), bool)
        # Nearly all windows of the text are ruled out by one look at a table that is 256 times as long as the windows.
        bits = 8 + max(8, len(first).bit_length())
        self._shift = numpy.uint64(64 - bits)
        self._table = numpy.zeros(1 << bits, bool)
        self._table[self._slots(self._hashes)] = True

    def _slots(self, hashes: numpy.ndarray) -> numpy.ndarray:
        return ((hashes * numpy.uint64(_FACTOR)) >> self._shift).astype(numpy.int64)

    def mark(self, part: _Hashed, starts: numpy.ndarray) -> numpy.ndarray:
        """Mark the windows that stand in `part`, whose documents start at `starts`; returns their positions there, in order."""
        hashes = part.windows(self.n)
        candidates = numpy.flatnonzero(self._table[self._slots(hashes)])
        documents = [numpy.searchsorted(starts, candidates + shift, side="right") for shift in (0, self.n - 1)]
        candidates = candidates[documents[0] == documents[1]]
        number = numpy.minimum(numpy.searchsorted(self._hashes, hashes[candidates]), len(self._hashes) - 1)
        candidates, number = (values[self._hashes[number] == hashes[candidates]] for values in (candidates, number))
        equal = numpy.zeros(len(candidates), bool)
        for start in range(0, len(candidates), block := max(1, _BLOCK // self.n)):
            there, here = (values[start : start + block] for values in (candidates, self._first[number]))
            ids, query = (sliding_window_view(values, self.n) for values in (part.ids, self._ids))
            equal[start : start + block] = (ids[there] == query[here]).all(1)
        self.present[number[equal]] = True
        return candidates[equal]


def _parts(count: int, limit: int, size: int) -> Iterator[tuple[int, int]]:
    """Where parts of `size` tokens begin and end: all of `count` tokens, or as many as `limit` allows, spread evenly."""
    n_all = -(-count // size)
    n_chosen = n_all if count <= limit else max(1, limit // size)
    for number in range(n_chosen):
        first = number * n_all // n_chosen * size
        yield first, min(first + size, count)


def _release(ids: numpy.ndarray) -> None:
    """Unmap the pages of a memory-mapped file; else the process appears to hold all that it has read."""
    mapped = getattr(ids, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _longest_stretch(positions: numpy.ndarray) -> int:
    """The most positions, of sorted ones, that follow each other."""
    gaps = numpy.flatnonzero(numpy.diff(positions) != 1)
    return int(numpy.diff(gaps, prepend=-1, append=len(positions) - 1).max()) if len(positions) else 0
