"""Text that becomes certain while its tokens arrive."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from mori.generation.stream import StopFinder, TextStream, before_answer, decode_text
from mori.model.loading import train_tokenizer

TEXTS = [
    "Halo semua, selamat datang di stream kali ini! Jangan lupa makan ya, hehe...",
    "Wah 😀😃 keren banget 👩‍👩‍👧 mantap 🇮🇩🇮🇩!! é ñ ü",
    "日本語とKoreaの한국어 и русский العربية हिन्दी mixed\n\ttabs  and   spaces \ufffd end",
    "😀" * 60 + " panjang " * 80,
]


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece makes them: words begin with ▁, unknown characters are spelled in byte tokens."""
    vocabulary = {"<unk>": 0, "<s>": 1, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz,.!", "an", "▁s", "la", "▁h"]:
        vocabulary.setdefault(piece, len(vocabulary) + 1)
    inner = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[("a", "n"), ("▁", "s"), ("l", "a"), ("▁", "h")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_stream_pieces_are_the_final_text(kind, text):
    tokenizer = train_tokenizer([TEXTS[0]], 300) if kind == "byte-level" else byte_fallback_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text) / 2
    for prompt_length in (1, 2, 7):
        prompt = ids[:prompt_length] if kind == "byte-level" else [1, *ids[:prompt_length]]
        for stop in (len(ids), len(ids) - 1, len(ids) - 2, len(ids) // 2, len(ids) // 2 + 1):
            new = ids[prompt_length:stop]
            stream = TextStream(tokenizer, prompt)
            pieces = [stream.add(token) for token in new]
            text_after_prompt = decode_text(tokenizer, prompt + new)[len(decode_text(tokenizer, prompt)) :]
            assert "".join(pieces) + stream.finish() == text_after_prompt
            if text is not TEXTS[2]:
                assert "\ufffd" not in "".join(pieces[5:])  # no incomplete character
            if text is TEXTS[0]:
                assert sum(map(bool, pieces)) > len(new) / 4  # most tokens give a piece at once


def test_stream_withholds_the_beginning_of_a_stop_string():
    tokenizer = train_tokenizer([TEXTS[0]], 300)
    text = "Halo semua, selamat datang"
    stream = TextStream(tokenizer, [], ["mua, s", "mur"])
    pieces = [stream.add(token) for token in tokenizer(text)["input_ids"]]
    assert stream.stopped and "".join(pieces) + stream.finish() == "Halo se"
    unfinished = TextStream(tokenizer, [], ["datang!"])
    pieces = [unfinished.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == "Halo semua, selamat " and unfinished.finish() == "datang" and not unfinished.stopped


def test_stop_finder_takes_the_first_in_the_text():
    finder = StopFinder(["three", "two"])
    assert finder.add("one two three") == "one " and finder.stopped and finder.finish() == ""
    finder = StopFinder(["two"])
    assert finder.add("one t") + finder.finish() == "one t" and not finder.stopped


def test_stop_finder_looks_back_into_the_prompt_but_stops_behind_it():
    finder = StopFinder(["stop", "o"], prompt="a stop, a st")
    assert finder.add("ill") == "ill" and not finder.stopped
    finder = StopFinder(["stop"], prompt="a stop, a st")
    assert (finder.add("o"), finder.add("ps"), finder.stopped) == ("", "", True)


@pytest.mark.parametrize("answer", ["😀", "é!", "a"])
def test_answer_after_an_emoji_is_decoded_by_itself(answer):
    """Byte tokens that meet are one run for the tokenizer; the prompt's character must not depend on the answer."""
    tokenizer = byte_fallback_tokenizer()
    prompt, new = tokenizer("halo 😀")["input_ids"], tokenizer(answer)["input_ids"][1:]  # without the blank in front
    for bad, text in (([], answer), ([3 + 0xF0], "\ufffd"), ([3 + 0xF0, 3 + 0x9F], "\ufffd\ufffd")):
        ids = bad or new
        before = before_answer(tokenizer, prompt, ids)
        assert decode_text(tokenizer, before + ids)[len(decode_text(tokenizer, before)) :] == text
        stream = TextStream(tokenizer, prompt)
        assert "".join(map(stream.add, ids)) + stream.finish() == text
