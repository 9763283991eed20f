"""From the MODEL of a command, a file with weights or a run folder, to the model and to what its run knows."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pgolf.cli.failures import requested_device
from pgolf.config import Config, parse_override
from pgolf.runs.run_folder import data_path, record_of, tokenizer_path, weights_file

if TYPE_CHECKING:
    from pgolf.data.declared import Record
    from pgolf.data.tokenizer import Tokenizer
    from pgolf.model import GPT

DEFAULT_RECIPE = "base"


@dataclass(frozen=True)
class Source:
    """Where a model lies, and a configuration: that of its run where MODEL is a run folder, else what options said."""

    weights: Path
    config: Config | None
    run: Path | None = None

    @classmethod
    def of(
        cls,
        path: Path,
        recipe: str | None = None,
        config_file: Path | None = None,
        overrides: list[str] | None = None,
    ) -> Source:
        """Raises FileNotFoundError where nothing is there or a folder holds no weights; errors of the configuration."""
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder; an artifact or a run folder is expected.")
        given = recipe is not None or config_file is not None or bool(overrides)
        weights, own = weights_file(path), path / "config.toml"
        if own.is_file():
            if given:
                raise ValueError(f"{path} has a configuration; --recipe, --config and --set are for single files.")
            return cls(weights, Config.from_toml(own), path)
        values = dict(parse_override(text) for text in overrides or [])
        return cls(weights, configuration(recipe, config_file, values) if given else None)

    def load(self, device: str | None) -> GPT:
        """The file's model; the configuration says what the file does not."""
        from pgolf.artifacts.interchange import load

        with requested_device():
            return load(self.weights, device=device, config=self.config)

    def data(self, given: Path | None) -> Path:
        """The data folder: the one that was given, else the run's."""
        if given is not None:
            return given
        known = self._known_data()
        if known is None:
            raise ValueError(f"{self.weights} does not say on which data it was trained; give --data.")
        return there(known, "data folder", "--data")

    def _known_data(self) -> Path | None:
        if self.run is not None and self.config is not None:
            return data_path(self.run, self.config)
        return Path(self.config.train.data_path) if self.config is not None and self.config.train.data_path else None

    def check_length(self, model: GPT) -> None:
        """Raises ValueError where nothing says how long the model's sequences are, and no option may say it later."""
        if not model.train_seq_len:
            raise ValueError(f"{self.weights} does not say its training length; give --recipe or --config.")

    def tokenizer_path(self, given: Path | None) -> Path | None:
        """The tokenizer: the one that was given, else the one that the run names; None leaves it to the data folder."""
        if given is not None or self.config is None or not self.config.train.tokenizer_path:
            return given
        known = Path(self.config.train.tokenizer_path)
        if self.run is not None:
            known = tokenizer_path(self.run, self.config) or known
        return there(known, "tokenizer", "--tokenizer")

    def record(self, model: GPT) -> Record | None:
        """What is recorded of the data and the tokenizer that the scores are of: the artifact's, else the run's."""
        return model.record or (None if self.run is None else record_of(self.run))

    def open_tokenizer(self, given: Path | None, model: GPT) -> Tokenizer:
        """The tokenizer, of the model's vocabulary.

        Raises ValueError where none is known, where its vocabulary is another one or its pieces are not those that the
        artifact or the run names, and the errors of reading it.
        """
        from pgolf.data.folder import find_data
        from pgolf.data.tokenizer import Tokenizer

        path, data = self.tokenizer_path(given), self._known_data()
        if path is None and data is not None:
            data = there(data, "data folder", "--tokenizer", ", which would have its tokenizer,")
            path = find_data(data, splits=()).tokenizer
        if path is None:
            raise ValueError(f"No tokenizer is known for {self.weights}; give --tokenizer.")
        tokenizer = Tokenizer(path)
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"The tokenizer {path} has {tokenizer.vocab_size:,} tokens; the model has {model.config.vocab_size:,}."
            )
        record = self.record(model)
        declared = None if record is None else record.declared_tokenizer()
        if record is not None and declared is not None and declared.describes(tokenizer) is False:
            raise ValueError(
                f"The tokenizer {path} is not the one that {record.source} names, {declared.name()}: its tokens spell "
                "other text. Give the right one with --tokenizer."
            )
        return tokenizer


def there(path: Path, what: str, option: str, why: str = "") -> Path:
    """A path that a run has recorded; raises FileNotFoundError where nothing is there any more.

    what, why: it is, and is looked for, in the sentence. option: names another one.
    """
    if path.exists():
        return path
    where = "" if path.is_absolute() else f" (looked for in {Path.cwd()})"
    raise FileNotFoundError(f"The run's {what} {path}{why} is not there any more{where}; give {option}.")


def configuration(recipe: str | None, path: Path | None, overrides: dict[str, object]) -> Config:
    """What --recipe, --config and --set say together; DEFAULT_RECIPE where neither recipe nor file is given."""
    if path is None:
        return Config.from_recipe(recipe or DEFAULT_RECIPE, overrides)
    if recipe is not None:
        raise ValueError(f'--recipe and --config are both given; write extends = "{recipe}" in {path} instead.')
    return Config.from_toml(path, overrides)


def run_config_path(run: Path) -> Path:
    """config.toml of a run folder; raises FileNotFoundError where the folder is none."""
    path = run / "config.toml"
    if not path.is_file():
        raise FileNotFoundError(f"{run}: this folder is not a run folder, as it holds no config.toml.")
    return path


def resume_command(run: Path, *options: str) -> str:
    """The command that goes on with a run from its newest checkpoint."""
    return shlex.join(["pgolf", "train", "--run-dir", str(run), "--resume", *options])
