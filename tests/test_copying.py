"""The copying meter against a count by brute force."""

import json

import numpy
import pytest
from conftest import CPU, stop_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from mori.config import TrainConfig
from mori.generation.generate import Completion, generate
from mori.prepare import prepare
from mori.tracking import copying
from mori.tracking.copying import WINDOW, CopyingMeter, Text, search
from mori.tracking.loggers import read_metrics

NO_LIMIT = 1 << 40


def stands_in(run: list[int], text: list[int], starts: set[int]) -> bool:
    """Whether a run of ids stands in the text, within one document."""
    return any(
        text[p : p + len(run)] == run and not starts.intersection(range(p + 1, p + len(run)))
        for p in range(len(text) - len(run) + 1)
    )


def brute_force(pieces: list[list[int]], text: list[int], starts: set[int]) -> tuple:
    """Longest run, windows, copied windows and spans, by comparing everything with everything."""
    longest = windows = copied = 0
    spans = []
    for piece in pieces:
        joined = [False] * max(0, len(piece) - 1)  # each token with the next one
        for start in range(len(piece)):
            for stop in range(start + 1, len(piece) + 1):
                run = piece[start:stop]
                if -1 in run:
                    continue
                windows += len(run) == WINDOW
                if stands_in(run, text, starts):
                    longest = max(longest, len(run))
                    if len(run) == WINDOW:
                        copied += 1
                        joined[start : stop - 1] = [True] * (WINDOW - 1)
        edges = [i for i, (a, b) in enumerate(zip([False, *joined], [*joined, False], strict=True)) if a != b]
        spans.append([(first, last + 1) for first, last in zip(edges[::2], edges[1::2], strict=True)])
    return longest, windows, copied, spans


def as_tuple(match: copying.Match) -> tuple:
    return match.longest_run, match.windows, match.copied, match.spans


@pytest.mark.parametrize("seed", range(60))
def test_search_equals_brute_force(seed, monkeypatch):
    """Small alphabets, so that runs overlap; parts shorter than a run; borders; pieces that are copied, short or empty."""
    random = numpy.random.default_rng(seed)
    monkeypatch.setattr(copying, "_PART", int(random.integers(1, 40)))
    alphabet = int(random.choice([1, 2, 3, 30]))
    text = random.integers(0, alphabet, random.integers(0, 150)).astype(random.choice(["uint16", "uint32"]))
    starts = numpy.unique(random.integers(0, len(text) + 5, random.integers(0, 6)))
    pieces = [random.integers(0, alphabet, length) for length in random.integers(0, 30, random.integers(0, 4))]
    if len(text) > 60:  # word for word, and with a special token inside
        first = int(random.integers(0, 20))
        pieces += [text[first : first + 35].astype("int64"), text[-9:].astype("int64"), text[:9].astype("int64")]
        pieces[-3][20] = random.choice([-1, pieces[-3][20]])
    match = search(pieces, Text(text, starts), NO_LIMIT)
    assert as_tuple(match) == brute_force([p.tolist() for p in pieces], text.tolist(), set(starts.tolist()))


def test_search_confirms_every_match_token_by_token(monkeypatch):
    """With a hash that is the sum of the ids, most windows have the hash of others."""
    monkeypatch.setattr(copying, "_FACTOR", 1)
    random = numpy.random.default_rng(0)
    text, piece = random.permutation(60).astype("uint16"), random.permutation(60)
    assert (
        as_tuple(search([piece], Text(text, numpy.array([0])), NO_LIMIT))[:3]
        == brute_force([piece.tolist()], text.tolist(), {0})[:3]
    )


def test_search_of_a_large_text_reads_parts_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "_PART", 10)
    ids = numpy.memmap(tmp_path / "ids", "uint16", "w+", shape=(1000,))
    ids[:] = numpy.arange(1000)
    pieces = [numpy.arange(start, start + 8) for start in range(992)]
    match = search(pieces, Text(ids, numpy.array([0])), 100)
    assert match.copied == 100 and match.spans[0] == match.spans[900] == [(0, 8)]  # the beginning, and later parts
    assert search(pieces, Text(ids, numpy.array([0])), 1000).copied == 992


@pytest.mark.parametrize(
    "samples", [[], [[]], [[5]], [[1, 2, 3, 4, 5, 6, 7]], [[0] * 20], [[1, 2, 3, 0, 4, 5, 6, 7, 8]]]
)
def test_meter_takes_samples_without_a_window(samples):
    text = Text(numpy.arange(50), numpy.array([0]))
    figures, spans = CopyingMeter(text, text, special_ids=[0]).measure(samples, at_the_end=True)
    assert figures["share_of_8_tokens"] is None and spans == [[] for _ in samples]
    assert "copying/share_of_8_tokens" not in copying.scalars(figures) and "windows" not in copying.sentence(figures)


def test_meter_says_which_part_was_searched(monkeypatch):
    monkeypatch.setattr(copying, "SEARCHED", 1 << 17)
    text = Text(numpy.zeros(1 << 18, "uint16"), numpy.array([0]))
    meter = CopyingMeter(text, None, special_ids=[])
    assert copying.sentence(meter.measure([[0]], at_the_end=False)[0]).endswith("searched 131,072 of 262,144 tokens")
    assert "searched" not in copying.sentence(meter.measure([[0]], at_the_end=True)[0])


def words(count: int, seed: int) -> str:
    """A text of random words."""
    letters = numpy.random.default_rng(seed).integers(0, 26, (count, 4))
    return " ".join("".join(chr(97 + letter) for letter in word) for word in letters)


@pytest.mark.parametrize("separate", [False, True])
def test_held_out_and_dropped_text_is_no_training_text(settings, tmp_path, separate):
    """Each part of the corpus is a sample in turn; random words share no 8 tokens."""
    (tmp_path / "a.txt").write_text(words(200, 0))
    (tmp_path / "b.txt").write_text(words(200, 1))
    (tmp_path / "c.txt").write_text(words(60, 2))
    names = {"validation_file": [str(tmp_path / "c.txt")]} if separate else {}
    config = TrainConfig(**{**settings, "corpus": [str(tmp_path / "[ab].txt")], "block_size": 57, **names})
    data = prepare(config.resolve(), CPU)
    ids, first_b = data.token_file.ids.tolist(), int(data.token_file.first_tokens[1])
    trained, dropped = data.ledger.train_tokens, data.ledger.dropped_tokens
    assert dropped >= 8 and trained > first_b + 100
    samples = {
        "trained": ids[first_b : first_b + 50],
        "across documents": ids[first_b - 5 : first_b - 1] + ids[first_b : first_b + 5],
        "dropped": ids[trained : trained + dropped],
        "held out": data.held_out.ids[10:40].tolist(),
    }
    figures = {name: data.copying.measure([sample], at_the_end=True)[0] for name, sample in samples.items()}
    shares = {name: (f["share_of_8_tokens"], f["held_out_share_of_8_tokens"]) for name, f in figures.items()}
    assert shares == {"trained": (1, 0), "across documents": (0, 0), "dropped": (0, 0), "held out": (0, 1)}
    assert figures["trained"]["longest_run"] == 50 and figures["across documents"]["longest_run"] == 5
    assert figures["trained"]["baseline_share_of_8_tokens"] == 0


def test_baseline_is_the_share_of_the_held_out_text_that_stands_in_the_training_text():
    """Two documents of 40 tokens are held out: of one, 20 tokens stand in the training text, so 13 of its 33 windows do."""
    train = Text(numpy.arange(1000), numpy.array([0]))
    held_out = Text(numpy.r_[2000:2020, 500:520, 3000:3040], numpy.array([0, 40]))
    figures, _ = CopyingMeter(train, held_out, special_ids=[]).measure([], at_the_end=True)
    assert figures["baseline_longest_run"] == 20 and figures["baseline_share_of_8_tokens"] == 13 / 66


MEMORIZED = "satu dua tiga empat lima enam\n"


@pytest.fixture
def memorizing(tmp_path) -> dict:
    """What changes of a run that learns a line by heart, and draws two samples of it."""
    (tmp_path / "line.txt").write_text(MEMORIZED * 40)
    return {
        "corpus": [str(tmp_path / "line.txt")], "max_steps": 80, "eval_steps": 40, "save_steps": 20, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "dropout": 0, "max_new_tokens": 30, "prompt": ["satu dua", "xyz"],
        "temperature": 0.0,
    }  # fmt: skip


def test_run_marks_what_its_samples_copy(settings, run_train, memorizing, tmp_path, capsys):
    summary = run_train(**memorizing)
    before, after = summary["copying"]["before"], summary["copying"]["after"]
    assert before["share_of_8_tokens"] == 0 and summary["samples"]["copied_before"] == [[], []]
    samples, copied = summary["samples"]["after"], summary["samples"]["copied"]
    # The trained model draws the samples again; brute force counts them.
    config = TrainConfig(**{**settings, **memorizing})
    model = AutoModelForCausalLM.from_pretrained(config.output_dir)
    data = prepare(config.resolve(), CPU)
    completions = generate(model, data.tokenizer, config.prompt, seed=config.seed, **config.sampling())
    assert [completion.prompt + completion.text for completion in completions] == samples
    trained = data.token_file.ids[: data.ledger.train_tokens].tolist()
    longest, windows, n_copied, spans = brute_force([c.new_token_ids for c in completions], trained, {0})
    assert (after["longest_run"], after["share_of_8_tokens"]) == (longest, n_copied / windows) and longest > 10
    assert copied == [c.characters(data.tokenizer, ranges) for c, ranges in zip(completions, spans, strict=True)]
    first = samples[0][copied[0][0][0] : copied[0][0][1]]
    assert copied[0][0][0] >= len("satu dua") and len(first) > 8 and first in MEMORIZED * 40  # a prompt is not copied
    # The end of the corpus is held out, and all of it stands in the training text.
    assert after["baseline_share_of_8_tokens"] == 1
    run = tmp_path / "runs" / "run"
    lines = {line["step"]: line for line in read_metrics(run / "metrics.jsonl") if "eval/loss" in line}
    assert sorted(lines) == [0, 40, 80] and copying.scalars(after).items() <= lines[80].items()
    texts = EventAccumulator(str(run)).Reload().Tensors("samples/0/text_summary")
    assert [b"<strong>" in text.tensor_proto.string_val[0] for text in texts][::2] == [False, True]
    assert f"step 80: {copying.sentence(after)}" in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["copying"] == summary["copying"]


def test_copying_figures_survive_a_kill(run_train, memorizing):
    whole = run_train(**memorizing)
    stop_after(70, lambda: run_train(**memorizing, resume_from_checkpoint="none"))
    resumed = run_train(**memorizing)
    assert resumed["copying"] == whole["copying"] and resumed["samples"] == whole["samples"]


def test_run_without_samples_has_no_copying_figures(run_train):
    summary = run_train(eval_strategy="no")
    assert summary["copying"] == {"before": None, "best": None, "after": None} and summary["samples"]["copied"] == []


def test_completion_gives_the_characters_of_its_tokens(tokenizer):
    """Ranges that begin or end within a character of several tokens leave it out."""
    prompt, text = "Halo ", "semua 🙂 di sini"
    prompt_ids, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text))
    completion = Completion(prompt, text, ids, prompt_ids)
    smile = [n for n in range(len(ids)) if "\ufffd" in tokenizer.decode(ids[n : n + 1])]
    assert len(smile) > 1
    whole, inside = (0, len(ids)), (smile[0], smile[-1] + 1)
    start = len(prompt) + text.index("🙂")
    assert completion.characters(tokenizer, [whole, inside]) == [[5, 5 + len(text)], [start, start + 1]]
    assert completion.characters(tokenizer, [(0, smile[0] + 1), (smile[1], smile[-1])]) == [[5, start], [start, start]]
