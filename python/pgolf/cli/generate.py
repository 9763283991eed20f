"""`pgolf generate`: text from a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from pgolf.cli.models import Source
from pgolf.cli.options import DeviceOption, JsonOption, ModelArgument, ThreadsOption, TokenizerOption, use_threads
from pgolf.cli.output import print_json

if TYPE_CHECKING:
    from pgolf.data.tokenizer import Tokenizer
    from pgolf.model import GPT


def generate_command(
    model: ModelArgument,
    tokenizer: TokenizerOption = None,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="The beginning of the text.")] = "",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", help="The longest continuation.")
    ] = 200,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="X", help="0 takes the most likely token.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="K", help="Sample among the K most likely tokens.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", metavar="P", help="Sample among the likeliest tokens of mass P.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="The same seed gives the same text.")] = 0,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text with a trained model, to the end of its document or so many tokens.

    Example: pgolf generate runs/demo --prompt "Return the" --temperature 0.8
    """
    use_threads(threads)
    source = Source.of(model)
    loaded = source.load(device)
    opened = source.open_tokenizer(tokenizer, loaded)
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    text, new_tokens = continue_text(loaded, opened, prompt, **sampling)
    if as_json:
        print_json({"text": text, "prompt": prompt, "new_tokens": new_tokens, **sampling})
    else:
        typer.echo(text)


def continue_text(model: GPT, tokenizer: Tokenizer, prompt: str, **sampling: Any) -> tuple[str, list[int]]:
    """A document that begins with ``prompt``, as it was given, and the ids of the new tokens.

    sampling: as for `pgolf.GPT.generate`. The tokenizer's BOS token begins the document, and the next one ends the
    text; it is the last new token.

    White space at the prompt's end is not a token of its own in the text that models are trained on: a space is the
    beginning of the next word's piece. So it is not given to the model; instead the first new token is a piece that
    begins with a space, and that space is the prompt's.

    Raises ValueError for a prompt that is not UTF-8, and for none where the tokenizer has no BOS token.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt is not UTF-8: its character {error.start + 1} is {prompt[error.start]!a}, a byte or half of a "
            "character. Give it in UTF-8."
        ) from None
    given, is_open = _given_tokens(tokenizer, prompt)
    stop = None
    if tokenizer.bos_id >= 0:
        stop, given = tokenizer.bos_id, [tokenizer.bos_id, *given]
    if not given:
        raise ValueError(
            f"the prompt is empty, and the tokenizer {tokenizer.path} has no BOS token to begin with; give a prompt."
        )
    if is_open:
        sampling["first"] = np.flatnonzero(tokenizer.byte_table.has_leading_space).tolist()
    new = model.generate(given, stop=stop, **sampling).tolist()
    continuation = tokenizer.decode([*given, *new])[len(tokenizer.decode(given)) :]
    return prompt + (continuation.removeprefix(" ") if is_open else continuation), new


def _given_tokens(tokenizer: Tokenizer, prompt: str) -> tuple[list[int], bool]:
    """A prompt's tokens, and whether the white space at its end is left to the next one."""
    tokens, bare = tokenizer.encode(prompt), tokenizer.encode(prompt.rstrip())
    if not bare or not prompt[-1].isspace():
        return tokens, False
    if tokens == bare:  # the tokenizer drops it
        return bare, True
    # The tokenizer keeps it; only a space, not a line's end, is the beginning of a piece.
    return (tokenizer.encode(prompt[:-1]), True) if prompt.endswith(" ") else (tokens, False)
