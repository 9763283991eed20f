"""Modules that stood elsewhere until 0.2: their old names lead to where they are now, with a warning, until 0.3."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "artifact": "artifacts.artifact",
    "audit": "scoring.audit",
    "budget": "artifacts.budget",
    "bundle": "artifacts.bundle",
    "checkpoint": "runs.checkpoint",
    "container": "artifacts.container",
    "data.download": "data.downloading",
    "data.export": "data.published",
    "data.files": "common.files",
    "data.inspect": "data.inspection",
    "data.prepare": "data.preparation",
    "demo": "cli.demo",
    "doctor": "system.doctor",
    "encoding": "config.encoding",
    "environment": "config.environment",
    "errors": "common.errors",
    "evaluate": "scoring.evaluation",
    "finish": "training.finish",
    "forecast": "training.forecast",
    "generate": "model.sampling",
    "inspect": "report.inspection",
    "interchange": "artifacts.interchange",
    "machine": "common.machine",
    "plot": "report.plot",
    "progress": "report.progress",
    "quantize": "artifacts.quantize",
    "replay": "training.replay",
    "run_folder": "runs.run_folder",
    "schedule": "training.schedule",
    "speed": "system.speed",
    "submission.check": "submission.checking",
    "submission.write": "submission.writing",
    "text": "common.text",
    "threads": "common.threads",
    "tokenizer": "data.tokenizer",
    "torch_file": "artifacts.torch_file",
    "trainer": "training.trainer",
    "ttest": "submission.ttest",
    "ttt": "scoring.ttt",
    "windows": "scoring.windows",
}
"""Old name -> new one, both within pgolf."""

MOVED_NAMES = {
    "data.shards": dict.fromkeys(("DataFolder", "find_data", "find_tokenizer", "load_tokens"), "data.folder"),
    "report.plot": dict.fromkeys(("read_records",), "runs.records"),
}
"""Module -> names that stood in it -> where they are."""


def module_of(old: str, stacklevel: int) -> ModuleType:
    """The module that was called pgolf.`old`, with the warning. stacklevel: as `warnings.warn`'s, of this function."""
    new = f"pgolf.{MOVED[old]}"
    warnings.warn(
        f"pgolf.{old} is now {new}, and its names that are public are pgolf's own; the old name goes in 0.3.",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )
    return importlib.import_module(new)


def name_of(module: str, name: str) -> Any:
    """A name that stood in a module, for its __getattr__, with the warning; raises AttributeError for any other."""
    if name not in MOVED_NAMES[module]:
        raise AttributeError(f"module 'pgolf.{module}' has no attribute {name!r}")
    home = f"pgolf.{MOVED_NAMES[module][name]}"
    warnings.warn(f"pgolf.{module}.{name} is now {home}.{name}.", DeprecationWarning, stacklevel=3)
    return getattr(importlib.import_module(home), name)


class _Finder(MetaPathFinder, Loader):
    """Finds the old names; what is imported by one is the module itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "pgolf" and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        # The importing line: warnings leaves the import system's own frames out.
        module = module_of(spec.name.partition(".")[2], stacklevel=2)
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own  # in place of the old name's


class _Package(ModuleType):
    """A package whose public names stay what they are when an old module of such a name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in self.__all__):
            super().__setattr__(name, value)


def keep_names(package: str) -> None:
    """For packages with a function that bears an old module's name: importing that module does not take its place."""
    sys.modules[package].__class__ = _Package


def install() -> None:
    sys.meta_path.append(_Finder())
