"""pgolf: train, squeeze and score a language model that must fit in 16 MB.

>>> import pgolf
>>> config = pgolf.Config.from_recipe("tiny")
>>> trainer = pgolf.Trainer(config, data="data/demo", run_dir="runs/demo")
>>> for step in trainer: ...
>>> report = trainer.finish()

Nothing heavy is imported before it is used: modules are when they are first named, as in `pgolf.ops.attention`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pgolf import _moved
from pgolf.scoring.evaluation import evaluate as evaluate

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pgolf import artifacts as artifacts
    from pgolf import common as common
    from pgolf import config as config
    from pgolf import data as data
    from pgolf import model as model
    from pgolf import ops as ops
    from pgolf import report as report
    from pgolf import runs as runs
    from pgolf import scoring as scoring
    from pgolf import submission as submission
    from pgolf import system as system
    from pgolf import training as training
    from pgolf.artifacts.artifact import export as export
    from pgolf.artifacts.budget import fit as fit
    from pgolf.artifacts.interchange import convert as convert
    from pgolf.artifacts.interchange import load as load
    from pgolf.artifacts.interchange import load_state_dict as load_state_dict
    from pgolf.artifacts.interchange import save_state_dict as save_state_dict
    from pgolf.artifacts.quantize import dequantize_rows as dequantize_rows
    from pgolf.artifacts.quantize import quantize_rows as quantize_rows
    from pgolf.common.errors import DeviceError as DeviceError
    from pgolf.common.errors import FormatError as FormatError
    from pgolf.common.errors import NonFiniteError as NonFiniteError
    from pgolf.common.threads import get_num_threads as get_num_threads
    from pgolf.common.threads import set_num_threads as set_num_threads
    from pgolf.config import Config as Config
    from pgolf.config import recipes as recipes
    from pgolf.config.environment import config_from_environment as config_from_environment
    from pgolf.data.downloading import download as download
    from pgolf.data.preparation import prepare as prepare
    from pgolf.data.shards import read_shard as read_shard
    from pgolf.data.shards import write_shard as write_shard
    from pgolf.data.tokenizer import Tokenizer as Tokenizer
    from pgolf.model import GPT as GPT
    from pgolf.model import newton_schulz as newton_schulz
    from pgolf.report.inspection import inspect as inspect
    from pgolf.runs.records import Report as Report
    from pgolf.runs.records import StepRecord as StepRecord
    from pgolf.scoring.evaluation import Score as Score
    from pgolf.scoring.evaluation import ValidationData as ValidationData
    from pgolf.submission.checking import check as check
    from pgolf.submission.writing import submit as submit
    from pgolf.training.finish import score_as_configured as score_as_configured
    from pgolf.training.trainer import Trainer as Trainer

_HOME = {  # public name -> module
    "Config": "pgolf.config",
    "DeviceError": "pgolf.common.errors",
    "FormatError": "pgolf.common.errors",
    "GPT": "pgolf.model",
    "NonFiniteError": "pgolf.common.errors",
    "Report": "pgolf.runs.records",
    "Score": "pgolf.scoring.evaluation",
    "StepRecord": "pgolf.runs.records",
    "Tokenizer": "pgolf.data.tokenizer",
    "Trainer": "pgolf.training.trainer",
    "ValidationData": "pgolf.scoring.evaluation",
    "check": "pgolf.submission.checking",
    "config_from_environment": "pgolf.config.environment",
    "convert": "pgolf.artifacts.interchange",
    "dequantize_rows": "pgolf.artifacts.quantize",
    "download": "pgolf.data.downloading",
    "export": "pgolf.artifacts.artifact",
    "fit": "pgolf.artifacts.budget",
    "get_num_threads": "pgolf.common.threads",
    "inspect": "pgolf.report.inspection",
    "load": "pgolf.artifacts.interchange",
    "load_state_dict": "pgolf.artifacts.interchange",
    "newton_schulz": "pgolf.model",
    "prepare": "pgolf.data.preparation",
    "quantize_rows": "pgolf.artifacts.quantize",
    "read_shard": "pgolf.data.shards",
    "recipes": "pgolf.config",
    "save_state_dict": "pgolf.artifacts.interchange",
    "score_as_configured": "pgolf.training.finish",
    "set_num_threads": "pgolf.common.threads",
    "submit": "pgolf.submission.writing",
    "write_shard": "pgolf.data.shards",
}

_ROOMS = frozenset(
    (
        "artifacts",
        "common",
        "config",
        "data",
        "model",
        "ops",
        "report",
        "runs",
        "scoring",
        "submission",
        "system",
        "training",
    )
)
"""Packages that need no import of their own."""

__all__ = [*sorted(_HOME), "__version__", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"pgolf.{name}")  # which makes it an attribute of the package
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _moved.MOVED:
        return _moved.module_of(name, stacklevel=2)
    raise AttributeError(f"module 'pgolf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS})


_moved.install()
_moved.keep_names(__name__)
