"""The published FineWeb export: how its repository is laid out, as far as its manifest says.

Everything lies below ROOT: `manifest.json`; `datasets/<name>/fineweb_{train,val}_NNNNNN.bin`, a folder for each
tokenizer, all of the same documents; `tokenizers/<name>.model`. The manifest names the data sets, with their counts of
files and tokens, and the tokenizers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pgolf.common.errors import FormatError

ROOT = "datasets"
MANIFEST = f"{ROOT}/manifest.json"


@dataclass(frozen=True)
class Split:
    """The shards of one split, in order."""

    name: str
    paths: tuple[str, ...]
    """In the repository."""
    tokens: int | None
    """Of all shards; None where the manifest does not say."""
    shard_tokens: int | None
    """Of every shard but the last."""

    def expected_tokens(self, index: int) -> int | None:
        """The tokens of one shard; None where the manifest does not say, or what it says does not fit together."""
        if self.tokens is None or self.shard_tokens is None:
            return None
        before = index * self.shard_tokens
        whole = -(-self.tokens // self.shard_tokens) == len(self.paths)
        return min(self.shard_tokens, self.tokens - before) if whole else None


@dataclass(frozen=True)
class Export:
    """One variant: the documents as tokens of one SentencePiece model."""

    variant: str
    train: Split
    val: Split
    tokenizer: str
    """The model's path in the repository."""
    vocab_size: int | None
    """None where the manifest does not say."""

    @classmethod
    def parse(cls, content: bytes, variant: str, source: str) -> Export:
        """Find a variant in a manifest; `source` says in errors where that came from.

        Raises ValueError, naming the variants that there are, for another one or one whose tokenizer is not
        SentencePiece's, and FormatError for a manifest that is not such a one.
        """
        try:
            manifest = json.loads(content)
            datasets = {str(entry["name"]).partition("_")[2]: entry for entry in manifest["datasets"]}
            tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
            models = {
                name: tokenizers.get(entry["tokenizer_name"], {}).get("model_path") for name, entry in datasets.items()
            }
            known = sorted((name for name, model in models.items() if model), key=lambda name: (len(name), name))
            if variant not in known:
                why = "has no SentencePiece tokenizer" if variant in datasets else "is not there"
                raise _UnknownVariant(f"{source}: the variant {variant!r} {why}; there are: {', '.join(known)}.")
            entry = datasets[variant]
            vocab_size = entry.get("vocab_size", tokenizers[entry["tokenizer_name"]].get("vocab_size"))
            return cls(
                variant,
                _split("train", entry, manifest.get("shard_size")),
                _split("val", entry, manifest.get("shard_size")),
                _inside(models[variant]),
                None if vocab_size is None else int(vocab_size),
            )
        except _UnknownVariant:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                f"{source}: this is not the manifest of such an export ({type(error).__name__}: {error}); "
                "a JSON object with the lists 'datasets' and 'tokenizers' is expected."
            ) from None


class _UnknownVariant(ValueError):
    """Told apart from what int() and the like raise for a broken manifest."""


def _split(name: str, entry: dict[str, Any], shard_tokens: Any) -> Split:
    stats = entry["stats"]
    tokens = stats.get(f"tokens_{name}")
    folder = _inside(f"datasets/{entry['name']}")
    return Split(
        name,
        tuple(f"{folder}/fineweb_{name}_{index:06d}.bin" for index in range(int(stats[f"files_{name}"]))),
        None if tokens is None else int(tokens),
        None if shard_tokens is None else int(shard_tokens),
    )


def _inside(path: str) -> str:
    """A path below ROOT; a manifest must not point elsewhere."""
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or path.startswith("/") or "\\" in path:
        raise ValueError(f"{path!r} is not a path inside the export")
    return f"{ROOT}/{path}"
