"""The model card: read back by the hub's own library, its lines of code run, its figures compared with the run's files."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from mori.cli import UserError, parse
from mori.config import ExportConfig, TrainConfig
from mori.export import hub
from mori.export.merged import export_merged
from mori.tracking.report.card import model_card

LORA = {"use_peft": True, "save_merged": False, "lora_r": 4}


@pytest.fixture
def short(run_train):
    """A run of two steps, with other fields as given; returns its summary."""
    return lambda **changed: run_train(**{"max_steps": 2, "eval_steps": 1, "save_steps": 2, **changed})


@pytest.fixture
def llama(tmp_path, tokenizer) -> Path:
    """A folder with a Llama of random weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, **shape))
    model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def cached(model: Path, cache: Path, metadata: str = "") -> Path:
    """`model` as the hub's cache holds it under the name someone/tiny, with a card; returns its snapshot."""
    root = cache / "models--someone--tiny"
    snapshot = Path(shutil.copytree(model, root / "snapshots" / ("a" * 40)))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    (snapshot / "README.md").write_text(f"---\n{metadata}\n---\n# The card of the base\n")
    return snapshot


def run_lines(card: ModelCard, folder: Path, monkeypatch, capsys) -> str:
    """What the three lines in the card print, in the parent of the model's folder."""
    [code] = re.findall(r"```python\n(.*?)\n```", card.text, re.DOTALL)
    assert len(code.splitlines()) == 3
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(code, {})
    return capsys.readouterr().out


def test_card_is_valid_and_has_the_figures_of_the_run(short, tmp_path):
    summary = short(language=["id", "en"], max_new_tokens=12)
    path = tmp_path / "brain" / "README.md"
    card = ModelCard.load(path)
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.language) == ("transformers", "text-generation", ["id", "en"])
    assert (data.tags, data.base_model, data.license) == (["mori"], None, None)
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    after = summary["eval"]["after"]
    assert name == "brain" and {r.metric_type: r.metric_value for r in results} == {
        metric: after[metric] for metric in ("loss", "perplexity", "bits_per_byte")
    }
    before = summary["eval"]["before"]
    assert f"| {before['loss']:.4f} | {after['loss']:.4f} |" in card.text
    assert (
        f"{summary['ledger']['train_tokens']:,} to train on" in card.text
        and summary["sha256"]["documents_sha256"] in card.text
    )
    assert f"{summary['copying']['after']['longest_run']} token" in card.text
    assert not re.search(r"More Information|\bNone\b|\bnan\b|\binf\b|\{|TODO|/tmp", card.text)
    assert summary["output_sha256"].keys() >= {"README.md", "model.safetensors"}


def test_card_quotes_neither_the_data_nor_its_names(short, text_file, tmp_path):
    short()
    card = (tmp_path / "brain" / "README.md").read_text()
    text = text_file.read_text(encoding="utf-8")
    assert text_file.name not in card and str(tmp_path) not in card
    quoted = [text[n : n + 20] for n in range(len(text) - 20) if text[n : n + 20] in card]
    assert not quoted


@pytest.mark.parametrize("adapters", [False, True])
def test_lines_of_the_card_generate(short, llama, tmp_path, monkeypatch, capsys, adapters):
    prompt = 'Halo "semua"\n```'
    short(model=str(llama), prompt=[prompt], **(LORA if adapters else {}))
    card = ModelCard.load(tmp_path / "brain" / "README.md")
    assert run_lines(card, tmp_path, monkeypatch, capsys).startswith(prompt)
    assert ("pip install peft" in card.text) == adapters


@pytest.mark.parametrize("best", [True, False])
def test_card_has_the_evaluation_of_the_published_weights(short, tmp_path, best):
    settings = {
        "max_steps": 12,
        "eval_steps": 2,
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }
    summary = short(**settings, load_best_model_at_end=best)
    assert summary["eval"]["best"]["step"] < 12 and summary["eval"]["after"]["step"] == 12
    step, evaluation = summary["published_step"], summary["eval"]["best" if best else "after"]
    card = ModelCard.load(tmp_path / "brain" / "README.md")
    figures = {evaluation[metric] for metric in ("loss", "perplexity", "bits_per_byte")}
    assert {result.metric_value for result in card.data.eval_results} == figures
    which = "the best by `loss` of the held-out text" if best else "the last"
    assert f"step {step} of 12, {which}." in card.text and f"| step {step} |" in card.text


@pytest.mark.parametrize("changed", [{"eval_strategy": "no"}, {"held_out_fraction": 0.0}])
def test_card_without_an_evaluation_has_no_figures(short, tmp_path, changed):
    short(**changed)
    card = ModelCard.load(tmp_path / "brain" / "README.md")
    assert "model-index" not in card.data.to_dict() and "## Evaluation" not in card.text


def test_card_names_a_local_base_and_the_warmup_in_percent(short, llama, tmp_path):
    short(model=str(llama), warmup_steps=0.05)
    card = (tmp_path / "brain" / "README.md").read_text()
    assert "A causal language model: the local model llama, trained further" in card
    assert "linear, warm-up 5% of the steps |" in card


def test_card_names_a_base_on_the_hub_and_its_licence(short, small_model, tmp_path):
    base = cached(small_model, tmp_path / "hub", "license: other\nlicense_name: mine\nlicense_link: LICENSE")
    short(model=str(base), use_peft=True)
    data = ModelCard.load(tmp_path / "brain" / "README.md").data
    assert (data.base_model, data.base_model_relation, data.tags) == ("someone/tiny", "finetune", ["mori", "lora"])
    assert (data.license, data.license_name, data.license_link) == ("other", "mine", "LICENSE")
    assert "The card of the base" not in (tmp_path / "brain" / "README.md").read_text()
    # A second stage starts from the folder of the first, which is not on the hub.
    short(model=str(tmp_path / "brain"), output_dir=str(tmp_path / "second"), run_name="second", **LORA)
    data = ModelCard.load(tmp_path / "second" / "README.md").data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("peft", "someone/tiny", "adapter")
    assert data.license == "other"


def test_base_metadata_reads_the_card_on_the_hub(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached(small_model, tmp_path, "license: mit\nbase_model: gpt2")
    assert hub.base_metadata("someone/tiny") == {"base_model": "someone/tiny", "license": "mit"}
    assert hub.base_metadata("someone/absent") == {"base_model": "someone/absent"} and hub.base_metadata("mini") == {}


@pytest.mark.parametrize(
    "text, known",
    [
        ("---\nlicense: mit\nbase_model: gpt2\n---\n", {"license": "mit"}),  # of a model whose own name is unknown
        ("---\nlicense: [mit, apache-2.0]\ntags: mori\n---\n", {}),
        ("---\nlicense: {a: [\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("\udcff", {}),
        ("---\nlicense: mit\n---\n" + "x" * (1 << 20), {}),
        ("no metadata", {}),
    ],
)
def test_base_metadata_leaves_out_what_it_cannot_read(tmp_path, text, known):
    (tmp_path / "README.md").write_text(text, errors="surrogateescape")
    assert hub.base_metadata(str(tmp_path)) == known


@pytest.mark.parametrize(
    "changed, sentence",
    [
        ({"lora_r": 12}, "vLLM takes it with `--enable-lora --max-lora-rank 16`."),
        ({"lora_r": 600}, "vLLM does not take the rank 600: merge"),
        (
            {"lora_modules_to_save": ["lm_head"]},
            "vLLM does not take modules that train whole (`modules_to_save`): merge",
        ),
        ({"model": "gpt2"}, "vLLM does not take adapters of GPT-2's `Conv1D` layers: merge"),
    ],
)
def test_card_of_adapters_says_whether_vllm_takes_them(
    short, llama, small_model, tmp_path, monkeypatch, changed, sentence
):
    model = small_model if changed.pop("model", None) else llama
    short(**{**LORA, "model": str(model), **changed})
    card = ModelCard.load(tmp_path / "brain" / "README.md")
    assert sentence in card.text and card.data.library_name == "peft"
    if "merge" in sentence:  # the command that it names
        program, name, *words = re.search(r"with `(.*?)`", card.text)[1].split()
        assert (program, name) == ("mori", "export")
        monkeypatch.chdir(tmp_path)
        export_merged(parse(ExportConfig, "", [*words, "--output", "merged"]))
        assert load_file(tmp_path / "merged" / "model.safetensors")


def test_merged_model_has_the_card_of_its_adapters(short, llama, tmp_path, monkeypatch, capsys):
    base = cached(llama, tmp_path / "hub", "license: mit")
    short(model=str(base), **LORA)
    adapters = ModelCard.load(tmp_path / "brain" / "README.md")
    merged = tmp_path / "merged"
    export_merged(ExportConfig(model=str(tmp_path / "brain"), merge=True, output=str(merged)))
    card = ModelCard.load(merged / "README.md")
    assert (card.data.library_name, card.data.base_model_relation) == ("transformers", "finetune")
    assert (card.data.base_model, card.data.license) == ("someone/tiny", "mit")
    assert card.data.eval_results == adapters.data.eval_results and "vLLM" not in card.text
    assert card.text.endswith(adapters.text[adapters.text.index("## Training data") :])
    assert run_lines(card, tmp_path, monkeypatch, capsys).startswith("Halo")


@pytest.mark.parametrize("text", [None, "# Mine\n", "---\ntags: [mori]\n---\n# Mine\n", "---\n- a\n---\n", "\udcff"])
def test_merged_model_has_no_card_if_mori_wrote_none(short, llama, tmp_path, text):
    short(model=str(llama), **LORA)
    card, merged = tmp_path / "brain" / "README.md", tmp_path / "merged"
    card.unlink() if text is None else card.write_text(text, errors="surrogateescape")
    export_merged(ExportConfig(model=str(tmp_path / "brain"), merge=True, output=str(merged)))
    assert (merged / "model.safetensors").exists() and not (merged / "README.md").exists()


def test_edited_card_leaves_the_run_finished(short, tmp_path, capsys):
    short()
    card = tmp_path / "brain" / "README.md"
    card.write_text(card.read_text() + "\nWritten by hand.\n")
    short()
    assert "is finished" in capsys.readouterr().out and card.read_text().endswith("Written by hand.\n")
    assert not list((tmp_path / "runs" / "run" / "checkpoints").glob("*/README.md"))


def test_card_that_cannot_be_written_is_noticed_before_the_first_step(short, tmp_path, monkeypatch):
    """The rehearsal writes the card as the publication does."""
    monkeypatch.setattr("mori.output.CARD", "no/such/folder/README.md")
    with pytest.raises(UserError, match="cannot save"):
        short()
    assert not (tmp_path / "brain").exists()


@pytest.mark.parametrize("language", ["Indonesian", "ID", "", "id-ID"])
def test_language_that_is_no_code_is_refused(short, language, tmp_path):
    with pytest.raises(UserError, match="no code of ISO 639"):
        short(language=[language])
    assert not (tmp_path / "runs").exists()


def test_card_leaves_out_figures_that_are_not_finite(short, tmp_path):
    summary = short()
    summary["eval"]["after"]["perplexity"] = float("inf")
    about = json.loads((tmp_path / "runs" / "run" / "environment.json").read_text())
    config = TrainConfig(output_dir="brain").resolve()
    text = model_card(summary, config, ledger="text", environment=about, base={}, lora=None, merged=True)
    assert [r.metric_type for r in ModelCard(text).data.eval_results] == ["loss", "bits_per_byte"]


def test_card_is_uploaded_with_the_model(short, tmp_path):
    """`tests/test_hub.py` compares what the hub receives with this folder, file by file."""
    summary = short()
    assert sorted(summary["output_sha256"]) == sorted(path.name for path in (tmp_path / "brain").iterdir())
    AutoTokenizer.from_pretrained(tmp_path / "brain")
