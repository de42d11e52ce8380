"""What begins and ends a text, decided once: training, prompts, the end of an answer and the published model agree."""

import copy
import itertools
import json

import numpy
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.trainer_utils import align_special_tokens

from mori.checkpoint import checkpoints
from mori.cli import UserError
from mori.config import TrainConfig
from mori.data.corpus import Ledger, read_corpus
from mori.data.token_file import text_bytes_from
from mori.data.token_writer import make_token_file
from mori.generation.generate import generate
from mori.generation.stream import TextStream
from mori.model import special_tokens
from mori.model.lm import document_mask
from mori.train import train

TEXT = "halo dunia, apa kabar? selamat datang di stream kali ini. kita akan main game lagi ya.\n"


def make_tokenizer(template: str = "$A", eos: str | None = "</s>", kind: str = "bytes", **options):
    """A tokenizer of TEXT with <s>, </s>, <unk> and <|x|>, whose post-processor is `template`."""
    unknown = {"unk_token": "<unk>"} if kind in ("words", "unigram", "characters, <unk>") else {}
    model, trainer = {
        "bytes": (models.BPE(), trainers.BpeTrainer),
        "characters": (models.BPE(), trainers.BpeTrainer),
        "characters, <unk>": (models.BPE(**unknown), trainers.BpeTrainer),
        "words": (models.WordLevel(**unknown), trainers.WordLevelTrainer),
        "unigram": (models.Unigram(), trainers.UnigramTrainer),
    }[kind]
    arguments = {"vocab_size": 330, "special_tokens": ["<s>", "</s>", "<unk>", "<|x|>"], "show_progress": False}
    inner = Tokenizer(model)
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if kind == "bytes":
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        arguments["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "words":
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    elif kind == "unigram":
        arguments |= unknown
    inner.train_from_iterator([TEXT * 9], trainer(**arguments))
    names = [name for name in ("<s>", "</s>", "<|x|>") if name in template]
    inner.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, inner.token_to_id(name)) for name in names]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token=eos, **{**unknown, **options}
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|x|>"]})
    return tokenizer


def make_model(tokenizer, **config) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": len(tokenizer)}
    return AutoModelForCausalLM.from_config(GPT2Config(**shape, **config)).eval()


def documents_of(folder, *texts):
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return read_corpus(sorted(folder.glob("*.txt")))


@pytest.fixture
def run_with(settings, tmp_path):
    """Train with a tokenizer and texts; returns the summary."""

    def run(tokenizer, *texts, **changed):
        folder = tmp_path / "model"
        if not folder.is_dir():
            make_model(tokenizer).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            documents_of(tmp_path / "texts", *texts)
        fields = {**settings, "model": str(folder), "corpus": [str(tmp_path / "texts")], "prompt": ["halo"], **changed}
        return train(TrainConfig(**fields))

    return run


# ------------------------------------------------------------------------------------------------------- end of text


@pytest.mark.parametrize("in_files", [50256, [7, 5], 1, [1, 9], None])
def test_eos_ids_are_written_as_trainer_writes_them(in_files):
    tokenizer = make_tokenizer()
    ours = make_model(tokenizer)
    ours.config.eos_token_id = in_files
    ours.generation_config.eos_token_id = in_files
    theirs = copy.deepcopy(ours)
    align_special_tokens(theirs, tokenizer)
    special_tokens.write_into(ours, tokenizer)
    written = [config.eos_token_id for config in (ours.generation_config, theirs.generation_config)]
    ids, expected = ([value] if isinstance(value, int) else value for value in written)
    assert ids == list(dict.fromkeys(expected)) and ids[0] == tokenizer.eos_token_id  # transformers 5.17 repeats one
    assert ours.generation_config.bos_token_id == theirs.generation_config.bos_token_id == tokenizer.bos_token_id


def test_train_publishes_each_end_of_text(run_with, tmp_path):
    run_with(make_tokenizer(), TEXT * 20)
    published = json.loads((tmp_path / "brain" / "generation_config.json").read_text())
    assert published["eos_token_id"] == [1, 50256] and published["bos_token_id"] == 0


@pytest.mark.parametrize("place", ["tokenizer", "config", "generation_config", "separator"])
def test_generate_stops_at_the_end_of_text_of_each_file(place):
    tokenizer = make_tokenizer(eos=None)
    tokenizer.bos_token = None
    model = make_model(tokenizer, eos_token_id=50256)
    controls = {"seed": 1, "max_new_tokens": 12}
    [free] = generate(model, tokenizer, ["halo"], **controls)
    end = free.new_token_ids[5]
    assert len(free.new_token_ids) == 12 and free.new_token_ids.index(end) == 5
    if place == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    elif place == "separator":
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(end)
    else:
        getattr(model, place).eos_token_id = [50256, end] if place == "generation_config" else end
    [cut] = generate(model, tokenizer, ["halo"], **controls)
    assert cut.new_token_ids == free.new_token_ids[:5] and cut.finish_reason == "eos"
    [longer] = generate(
        model, tokenizer, ["halo"], **controls, min_new_tokens=8, exponential_decay_length_penalty=[9, 1.1]
    )
    assert len(longer.new_token_ids) >= 8 and end not in longer.new_token_ids[:8]


@pytest.mark.parametrize("template", ["$A </s>", "<s> $A </s>", "<s> $A", "$A"])
def test_encode_prompt_is_not_ended_by_the_tokenizer(template):
    tokenizer = make_tokenizer(template)
    begin = [0] if "<s>" in template else []
    plain = tokenizer("halo dunia", add_special_tokens=False)["input_ids"]
    assert special_tokens.encode_prompt(tokenizer, "halo dunia") == begin + plain
    assert special_tokens.encode_prompt(tokenizer, "halo dunia</s>") == [*begin, *plain, 1]  # the user's own
    answers = [generate(make_model(tokenizer), tokenizer, ["halo"], temperature=0, max_new_tokens=6)[0].new_token_ids]
    prompt = torch.tensor([begin + tokenizer("halo", add_special_tokens=False)["input_ids"]])
    answers.append(
        make_model(tokenizer).generate(prompt, do_sample=False, max_new_tokens=6)[0, prompt.size(1) :].tolist()
    )
    assert answers[0] == answers[1]


def test_encode_prompt_refuses_a_prompt_of_which_nothing_is_left():
    tokenizer = make_tokenizer("<s> $A", kind="characters")
    tokenizer.backend_tokenizer.pre_tokenizer = None  # which would put a ▁ in front
    with pytest.raises(UserError, match="cannot express the prompt '日本'"):
        special_tokens.encode_prompt(tokenizer, "日本")
    assert special_tokens.encode_prompt(tokenizer, "日a本") == [0, tokenizer.convert_tokens_to_ids("a")]


# -------------------------------------------------------------------------------------------------- beginning of text


@pytest.mark.parametrize("template", ["<s> $A", "<s> <|x|> $A </s>"])
def test_documents_begin_as_prompts_do(tmp_path, template):
    tokenizer = make_tokenizer("$A")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1), ("<|x|>", 3)]
    )
    special = special_tokens.decide(tokenizer)
    texts = ["halo dunia", TEXT, "apa kabar?"]
    documents = documents_of(tmp_path / "texts", *texts)
    tokens = make_token_file(documents, tokenizer, tmp_path, special.begin)
    prompts = [special_tokens.encode_prompt(tokenizer, text) for text in texts]
    assert tokens.ids.tolist() == list(itertools.chain.from_iterable([*prompt, 1] for prompt in prompts))
    begins = numpy.flatnonzero(tokens.begin_positions().holds(numpy.arange(len(tokens))))
    assert tokens.ids[begins].tolist() == list(special.begin) * 3
    assert tokens.header["text"]["special_tokens"] == {}  # the text itself brought none
    # Every token has its bytes, those that begin and end documents have none.
    sizes = [text_bytes_from(n, tokens, documents, tokenizer) for n in range(len(tokens) + 1)]
    assert sizes[0] == sum(len(text.encode()) for text in texts) and sizes[-1] == 0
    for index in range(len(tokens)):
        n_bytes = 0 if index in begins or tokens.ids[index] == 1 else len(tokenizer.decode([int(tokens.ids[index])]))
        assert sizes[index] - sizes[index + 1] == n_bytes
    without = make_token_file(documents, tokenizer, tmp_path)
    assert without.ids.tolist() == [token for token in tokens.ids.tolist() if token not in (0, 3)]


def test_documents_share_one_token_that_begins_and_ends_them(tmp_path):
    tokenizer = make_tokenizer("<s> $A", eos="<s>")
    documents = documents_of(tmp_path / "texts", "halo", "dunia")
    tokens = make_token_file(documents, tokenizer, tmp_path, special_tokens.decide(tokenizer).begin)
    expected = tokenizer("halo")["input_ids"] + tokenizer("dunia")["input_ids"] + [0]
    assert tokens.ids.tolist() == expected and tokens.begin_positions().count(0, len(tokens)) == 0
    assert [text_bytes_from(n, tokens, documents, tokenizer) for n in (0, len(tokens) - 1)] == [9, 0]


def test_train_counts_the_tokens_around_documents_and_gives_a_beginning_no_held_out_label(run_with, tmp_path, capsys):
    tokenizer = make_tokenizer("<s> $A")
    texts = [f"halo {number}, {TEXT}" for number in range(20)]
    summary = run_with(tokenizer, *texts, held_out_fraction=0.5)
    ledger = summary["ledger"]
    n_text = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert (ledger["bos_tokens"], ledger["eos_tokens"], ledger["tokens"]) == (20, 20, n_text + 40)
    line = "tokens  documents begin with <s> and end with </s>; answers end at </s>, 50256; names of special tokens in the text are"
    assert line in capsys.readouterr().out
    # The loss by hand, over windows of 16: the beginning of a document is given, its end is predicted.
    ids = sum((tokenizer(text)["input_ids"] + [1] for text in texts), [])
    held_out = torch.tensor(ids[len(ids) - ledger["held_out_tokens"] :])
    model, nats, targets = AutoModelForCausalLM.from_pretrained(tmp_path / "brain").eval(), 0.0, 0
    for start in range(0, len(held_out) - 1, 16):
        window = held_out[start : start + 17]
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="none")
        nats, targets = nats + losses[window[1:] != 0].sum().item(), targets + (window[1:] != 0).sum().item()
    assert summary["eval"]["after"]["loss"] == pytest.approx(nats / targets, rel=1e-4)


def test_document_bos_is_not_changed_by_a_resume(run_with, tmp_path):
    """Checkpoints of versions without the flag hold documents without a beginning, and go on with --no-document_bos."""
    tokenizer = make_tokenizer("<s> $A")
    texts = [TEXT * 9, "halo " + TEXT * 9]
    run_with(tokenizer, *texts, document_bos=False, max_steps=4)
    folder = tmp_path / "runs" / "run" / "checkpoints" / "step-00000004"
    state = json.loads((folder / "state.json").read_text())
    for name in ("document_bos", "parse_special_tokens"):
        del state[name], state["config"][name]
    (folder / "state.json").write_text(json.dumps(state))
    described = {
        name: checkpoints.describe(folder / name)
        for name in ("model.safetensors", "optimizer.safetensors", "state.json")
    }
    checkpoints.write_manifest(folder, 4, described)
    with pytest.raises(UserError, match=r"document_bos \(False, True\)"):
        run_with(tokenizer, extend=True, max_steps=6)
    assert run_with(tokenizer, extend=True, max_steps=6, document_bos=False)["ledger"]["bos_tokens"] == 0


def test_document_mask_begins_documents_at_either_border():
    tokenizer = make_tokenizer("<s> $A")
    borders = special_tokens.decide(tokenizer).borders
    ids = torch.tensor([[0, 9, 9, 1, 0, 9, 1, 9, 9]])  # the last border is in the text, which has no <s>
    assert document_mask(ids, borders)["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 0, 1, 2]]


# ------------------------------------------------------------------------------------- special tokens that a text names


def test_train_names_the_special_tokens_of_the_text(run_with, capsys):
    ledger = run_with(make_tokenizer("<s> $A"), f"<s>9</s> {TEXT} <s>7 <unk>\n" * 20)["ledger"]
    assert ledger["special_tokens"] == {"<s>": 40, "</s>": 20, "<unk>": 20}
    output = capsys.readouterr().out
    assert "<s> (40)" in output and "</s> (20)" in output and "--no-parse_special_tokens keeps them as text" in output


def test_train_keeps_special_tokens_as_text_everywhere(run_with, tmp_path, capsys):
    text = f"<s>9</s> {TEXT} <|x|>\n" * 20
    ledger = run_with(make_tokenizer("<s> $A"), text, parse_special_tokens=False)["ledger"]
    assert ledger["special_tokens"] == {} and "WARNING" not in capsys.readouterr().out
    brain = AutoTokenizer.from_pretrained(tmp_path / "brain")
    ids = special_tokens.encode_prompt(brain, "<s>9</s>")
    assert ids == make_tokenizer("<s> $A")("<s>9</s>", split_special_tokens=True)["input_ids"]
    assert ids[0] == 0 and not {0, 1, 2, 3} & set(ids[1:])
    with pytest.raises(UserError, match=r"parse_special_tokens \(False, True\)"):
        run_with(None, parse_special_tokens=True)


@pytest.mark.parametrize("kind", ["words", "unigram"])
def test_train_refuses_special_tokens_that_cannot_stay_text(run_with, kind):
    tokenizer = make_tokenizer("<s> $A", kind=kind)
    text = "halo di </s> stream " * 40
    with pytest.raises(UserError, match="no-parse_special_tokens: the corpus names the special tokens </s>"):
        run_with(tokenizer, text, parse_special_tokens=False)
    tokenizer.split_special_tokens = True
    with pytest.raises(UserError, match="no-parse_special_tokens: the prompt 'halo </s>' names"):
        special_tokens.encode_prompt(tokenizer, "halo </s>")


# --------------------------------------------------------------------------------------- text that a tokenizer cannot say


def normalizing(*steps) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(kind="characters")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(list(steps))
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer, text, unknown, lost",
    [
        (lambda: make_tokenizer(), "日本 halo é 🌧\n", 0, {}),
        (lambda: make_tokenizer(kind="characters"), "halo 日本日 dunia", 0, {"日": 2, "本": 1}),
        (lambda: make_tokenizer(kind="characters, <unk>"), "halo 日本日 dunia", 3, {"日": 2, "本": 1}),
        (lambda: make_tokenizer(kind="characters, <unk>"), "halo <unk> dunia", 0, {}),
        (lambda: make_tokenizer(kind="characters, <unk>"), "halo <unk> 日", 1, {"日": 1}),
        (lambda: make_tokenizer(unk_token="</s>"), "halo</s>dunia</s>", 0, {}),
        (lambda: normalizing(normalizers.Lowercase()), "HALO Dunia", 0, {}),
        (lambda: normalizing(normalizers.NFKC(), normalizers.Lowercase()), "Ｈａｌｏ ﬁ 日", 0, {"f": 1, "日": 1}),
        (lambda: make_tokenizer(kind="words"), "halo di xyz stream xx", 2, {"x": 3, "y": 1, "z": 1}),
        (lambda: make_tokenizer(kind="words"), "halo di\nstream\nya.", 0, {"\n": 2}),
    ],
)  # fmt: skip
def test_token_file_counts_what_does_not_come_back(tmp_path, tokenizer, text, unknown, lost):
    tokenizer = tokenizer()
    header = make_token_file(documents_of(tmp_path / "texts", text, "halo"), tokenizer, tmp_path).header["text"]
    assert (header["unknown_tokens"], header["lost_characters"]) == (unknown, lost)
    assert header["lost_bytes"] == sum(len(character.encode()) * n for character, n in lost.items())


def test_train_shows_no_bits_per_byte_where_text_is_lost(run_with, tmp_path, capsys):
    summary = run_with(make_tokenizer(kind="characters"), TEXT * 20 + "日本\n")
    assert summary["ledger"]["lost_bytes"] > 6 - 1 and summary["eval"]["after"]["bits_per_byte"] is None
    output = capsys.readouterr().out
    assert "the tokenizer cannot express this text" in output and "'日' (1)" in output
    assert "bits per byte\n" not in output and "perplexity" in output
    lines = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text()
    assert "eval/perplexity" in lines and "bits_per_byte" not in lines


def test_train_refuses_a_text_that_is_mostly_lost(run_with):
    with pytest.raises(UserError, match="cannot express this text: .* bytes are lost, such as '日'"):
        run_with(make_tokenizer(kind="characters"), TEXT + "日本語" * 100)


def test_ledger_warns_of_nothing_without_a_reason():
    assert Ledger(1, 1, 9, 5, 4, 0, bos_tokens=1, eos_tokens=1).warnings() == []


# ------------------------------------------------------------------------------------------------------- stop strings


@pytest.mark.parametrize("stop", ["<|x|>", "x|>", "o<|x|>", "<|x|>d", "lo dunia", "halo d"])
def test_stop_strings_see_special_tokens_and_the_prompt_as_in_transformers(stop):
    tokenizer = make_tokenizer()
    prompt = tokenizer("apa hal")["input_ids"]
    new = tokenizer("o<|x|>dunia, halo dunia")["input_ids"]
    criteria = StopStringCriteria(tokenizer, [stop])
    at = next(n for n in range(1, len(new) + 1) if criteria(torch.tensor([prompt + new[:n]]), None).item())
    stream, pieces = TextStream(tokenizer, prompt, [stop]), []
    for n, token in enumerate(new, 1):
        pieces.append(stream.add(token))
        assert stream.stopped == (n >= at)
    whole = "apa halo<|x|>dunia, halo dunia"
    cut = whole[len("apa hal") : max(whole.index(stop, len("apa hal") - len(stop) + 1), len("apa hal"))]
    assert "".join(pieces) == cut.replace("<|x|>", "").replace("<|", "")


def test_generate_ends_at_the_name_of_a_special_token():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    with torch.no_grad():
        model.transformer.wte.weight[3] *= 30  # <|x|>
    controls = {"temperature": 0, "max_new_tokens": 40, "suppress_tokens": [0, 1, 2]}
    answers = [
        generate(model, tokenizer, [prompt], **controls, stop_strings=["<|x|>"])[0] for prompt in ("halo", "apa")
    ]
    for answer in answers:
        if 3 in answer.new_token_ids:
            assert (
                answer.finish_reason == "stop_string" and answer.new_token_ids.index(3) == len(answer.new_token_ids) - 1
            )
            assert "<|" not in answer.text
    assert any(3 in answer.new_token_ids for answer in answers)
