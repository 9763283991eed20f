"""Training a SentencePiece tokenizer with the settings of docs/spec.md §6."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pgolf.common.files import atomic_write

NORMALIZATIONS = ("nmt_nfkc", "identity")
SMALLEST_VOCAB = 261
"""256 byte tokens, pad, bos, eos, unk, and the space."""

_SENTENCE_CHARACTERS = 4000


def train_tokenizer(texts: Iterable[str], path: Path, vocab_size: int, normalization: str) -> None:
    """Train a BPE tokenizer and write its model file: the same bytes for the same texts, wherever it runs.

    Byte fallback, digits split, no dummy prefix, ids pad 0, bos 1, eos 2, unk 3. `normalization`: "nmt_nfkc" (which
    also turns runs of white space into single spaces) or "identity" (which keeps every character).

    Raises ValueError where the texts allow no vocabulary of that size.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name=normalization,
            remove_extra_whitespaces=normalization != "identity",
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            max_sentence_length=4 * _SENTENCE_CHARACTERS,
            num_threads=1,  # the number is stored in the model, so it must not follow the machine
            minloglevel=3,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from None
    with atomic_write(path) as file:
        file.write(model.getvalue())


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces: SentencePiece skips sentences of more than max_sentence_length bytes."""
    for text in texts:
        for start in range(0, len(text), _SENTENCE_CHARACTERS):
            yield text[start : start + _SENTENCE_CHARACTERS]


def _explain(message: str, vocab_size: int) -> str:
    if found := re.search(r"value <= (\d+)", message):
        most = int(found[1])
        sentence = f"vocab_size is {vocab_size:,}; the text is enough for at most {most:,}."
        return f"{sentence} Give vocab_size={most}, or more text."
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        least = int(found[1])
        return f"vocab_size is {vocab_size:,}; the text's characters need at least {least:,}. Give vocab_size={least}."
    return f"no tokenizer could be trained on the text ({message.strip()}); give more text."
