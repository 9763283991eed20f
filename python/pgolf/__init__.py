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

from pgolf.evaluate import evaluate as evaluate  # not lazy: the module of that name would take the function's place

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pgolf import artifact as artifact
    from pgolf import audit as audit
    from pgolf import budget as budget
    from pgolf import bundle as bundle
    from pgolf import checkpoint as checkpoint
    from pgolf import config as config
    from pgolf import container as container
    from pgolf import data as data
    from pgolf import demo as demo
    from pgolf import doctor as doctor
    from pgolf import encoding as encoding
    from pgolf import environment as environment
    from pgolf import errors as errors
    from pgolf import finish as finish
    from pgolf import forecast as forecast
    from pgolf import generate as generate
    from pgolf import inspect as inspect
    from pgolf import interchange as interchange
    from pgolf import machine as machine
    from pgolf import model as model
    from pgolf import ops as ops
    from pgolf import plot as plot
    from pgolf import progress as progress
    from pgolf import quantize as quantize
    from pgolf import replay as replay
    from pgolf import run_folder as run_folder
    from pgolf import schedule as schedule
    from pgolf import speed as speed
    from pgolf import submission as submission
    from pgolf import text as text
    from pgolf import threads as threads
    from pgolf import tokenizer as tokenizer
    from pgolf import torch_file as torch_file
    from pgolf import trainer as trainer
    from pgolf import ttest as ttest
    from pgolf import ttt as ttt
    from pgolf import windows as windows
    from pgolf.artifact import export as export
    from pgolf.budget import fit as fit
    from pgolf.config import Config as Config
    from pgolf.config import recipes as recipes
    from pgolf.data.shards import read_shard as read_shard
    from pgolf.data.shards import write_shard as write_shard
    from pgolf.errors import DeviceError as DeviceError
    from pgolf.errors import FormatError as FormatError
    from pgolf.errors import NonFiniteError as NonFiniteError
    from pgolf.interchange import convert as convert
    from pgolf.interchange import load as load
    from pgolf.interchange import load_state_dict as load_state_dict
    from pgolf.interchange import save_state_dict as save_state_dict
    from pgolf.model import GPT as GPT
    from pgolf.model import newton_schulz as newton_schulz
    from pgolf.quantize import dequantize_rows as dequantize_rows
    from pgolf.quantize import quantize_rows as quantize_rows
    from pgolf.threads import get_num_threads as get_num_threads
    from pgolf.threads import set_num_threads as set_num_threads
    from pgolf.tokenizer import Tokenizer as Tokenizer
    from pgolf.trainer import Trainer as Trainer

_HOME = {  # public name -> module
    "Config": "pgolf.config",
    "DeviceError": "pgolf.errors",
    "FormatError": "pgolf.errors",
    "GPT": "pgolf.model",
    "NonFiniteError": "pgolf.errors",
    "Tokenizer": "pgolf.tokenizer",
    "Trainer": "pgolf.trainer",
    "convert": "pgolf.interchange",
    "dequantize_rows": "pgolf.quantize",
    "export": "pgolf.artifact",
    "fit": "pgolf.budget",
    "get_num_threads": "pgolf.threads",
    "load": "pgolf.interchange",
    "load_state_dict": "pgolf.interchange",
    "newton_schulz": "pgolf.model",
    "quantize_rows": "pgolf.quantize",
    "read_shard": "pgolf.data.shards",
    "recipes": "pgolf.config",
    "save_state_dict": "pgolf.interchange",
    "set_num_threads": "pgolf.threads",
    "write_shard": "pgolf.data.shards",
}

_MODULES = frozenset(
    (
        "artifact",
        "audit",
        "budget",
        "bundle",
        "checkpoint",
        "config",
        "container",
        "data",
        "demo",
        "doctor",
        "encoding",
        "environment",
        "errors",
        "finish",
        "forecast",
        "generate",
        "inspect",
        "interchange",
        "machine",
        "model",
        "ops",
        "plot",
        "progress",
        "quantize",
        "replay",
        "run_folder",
        "schedule",
        "speed",
        "submission",
        "text",
        "threads",
        "tokenizer",
        "torch_file",
        "trainer",
        "ttest",
        "ttt",
        "windows",
    )
)
"""Those that need no import of their own; `evaluate` is the function, and its module `from pgolf.evaluate import …`."""

__all__ = [*sorted(_HOME), "__version__", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"pgolf.{name}")  # which makes it an attribute of the package
    if name not in _HOME:
        raise AttributeError(f"module 'pgolf' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
