"""What a run is: its fields, with their defaults, ranges and command-line help.

A field is declared once (`cli.flag`); the class that declares it is its group in `--help`. Only the standard library is
imported here, so that `--help` and flag errors appear immediately.
"""

from mori.config.evaluation import EvaluateConfig
from mori.config.export import ExportConfig
from mori.config.generation import ChatConfig, GenerateConfig
from mori.config.groups import DeviceConfig, TextConfig
from mori.config.logging import ReportConfig
from mori.config.recipes import RECIPES
from mori.config.sampling import SamplingConfig
from mori.config.train import FOLLOW_EVALUATIONS, PRESETS, TrainConfig, steps_of

__all__ = [
    "FOLLOW_EVALUATIONS",
    "PRESETS",
    "RECIPES",
    "ChatConfig",
    "DeviceConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "ReportConfig",
    "SamplingConfig",
    "TextConfig",
    "TrainConfig",
    "steps_of",
]
