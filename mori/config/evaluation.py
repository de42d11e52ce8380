"""A call of `scripts/evaluate.py`."""

from dataclasses import dataclass

from mori.cli import flag, same_flag
from mori.config.groups import CorpusConfig, DeviceConfig, ModelConfig, TextConfig, TrainDeviceConfig


@dataclass
class EvaluateConfig(ModelConfig, TextConfig, DeviceConfig):
    """A call of `scripts/evaluate.py`."""

    group = "evaluation"

    model: str = flag("mori_brain_final", "a folder with a model and its tokenizer, or a name on the hub", path=True)
    document_bos: bool = same_flag(CorpusConfig, "document_bos", True)
    parse_special_tokens: bool | None = same_flag(CorpusConfig, "parse_special_tokens", None)
    block_size: int = same_flag(CorpusConfig, "block_size", 128)
    per_device_eval_batch_size: int = flag(8, "windows in one batch", above=0)
    precision: str = same_flag(TrainDeviceConfig, "precision", "auto")
    logging_dir: str = flag("runs", "folder whose .cache keeps the token ids", path=True)
    json: bool = flag(False, "print one JSON object and nothing else")
