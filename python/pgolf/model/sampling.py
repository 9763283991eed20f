"""Drawing new tokens from a model's logits.

Temperature and top-k as usual; top-p is nucleus sampling (Holtzman et al., "The Curious Case of Neural Text
Degeneration", ICLR 2020).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from pgolf.common.errors import NonFiniteError

LogitsFn = Callable[[npt.NDArray[np.int64]], npt.ArrayLike]


def sample(
    logits_fn: LogitsFn,
    ids: npt.ArrayLike,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Collection[int] | None = None,
    seed: int = 0,
    first: Collection[int] | None = None,
) -> npt.NDArray[np.int64]:
    """Continue a prompt and return the new tokens: (n,) int64 with 0 ≤ n ≤ max_new_tokens.

    logits_fn: takes all tokens so far, (t,) int64, and returns the next token's logits, (V,), of any float dtype; −inf
        forbids a token.
    ids: (t,) integers, the prompt, at least one token (a BOS token begins a document).
    temperature: the logits are divided by it; 0 takes the most likely token.
    top_k: keep the k most likely tokens. top_p: of these, keep the fewest most likely tokens whose probabilities sum to
        at least top_p, at least one. Among equally likely tokens the lower id counts as more likely.
    stop: a token id, or several, that end the generation; the stop token is the last one returned.
    seed: key of the Philox generator, 0 … 2⁶⁴ − 1. Every sampled token uses one uniform number, so that the same seed
        and logits give the same tokens, whatever max_new_tokens is. All arithmetic is float64.
    first: token ids, at least one; the first new token is one of them. None: any.

    Raises ValueError or TypeError for an argument out of its range and NonFiniteError for logits that hold NaN or +inf,
    or −inf alone.
    """
    tokens = _prompt(ids)
    max_new_tokens = _integer("max_new_tokens", max_new_tokens, 0)
    temperature = _number("temperature", temperature)
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; expected a finite number of at least 0.")
    if top_k is not None:
        top_k = _integer("top_k", top_k, 1)
    if top_p is not None:
        top_p = _number("top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; expected a number above 0 and at most 1.")
    stops = _token_ids("stop", stop)
    firsts = None if first is None else _token_ids("first", first)
    if firsts is not None and not firsts:
        raise ValueError("first is empty; expected at least one token id.")
    seed = _integer("seed", seed, 0)
    if seed >= 2**64:
        raise ValueError(f"seed is {seed}; expected at most 2**64 - 1.")

    generator = np.random.Generator(np.random.Philox(key=seed))
    end = tokens.size
    tokens = np.concatenate([tokens, np.empty(max_new_tokens, dtype=np.int64)])
    for position in range(end, tokens.size):
        logits = _checked_logits(logits_fn(tokens[:position]), position)
        for name, named in (("stop", stops), ("first", firsts or ())):
            if max(named, default=0) >= logits.size:
                raise ValueError(f"{name} is {max(named)}; expected token ids of at most {logits.size - 1}.")
        if firsts is not None and position == tokens.size - max_new_tokens:
            allowed = sorted(firsts)
            forbidden = np.full_like(logits, -np.inf)
            forbidden[allowed] = logits[allowed]
            logits = _checked_logits(forbidden, position)
        if temperature == 0:
            token = int(np.argmax(logits))
        else:
            candidates, probabilities = distribution(logits, temperature, top_k, top_p)
            token = int(candidates[_draw(probabilities, generator.random())])
        tokens[position] = token
        end = position + 1
        if token in stops:
            break
    return tokens[tokens.size - max_new_tokens : end].copy()


def distribution(
    logits: npt.NDArray[np.float64], temperature: float, top_k: int | None, top_p: float | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The distribution that ``sample`` draws from, for a temperature above 0.

    logits: (V,) float64. Returns (n,) int64, the ids that can be drawn, most likely first, and (n,) float64, their
    probabilities.
    """
    order = np.argsort(-logits, kind="stable")
    if top_k is not None:
        order = order[:top_k]
    kept = logits[order]
    # The quotient may overflow to -inf for a tiny temperature: exp then gives the 0 that is meant.
    with np.errstate(over="ignore"):
        weights = np.exp((kept - kept[0]) / temperature)
    probabilities = weights / weights.sum()
    if top_p is not None:
        count = int(np.searchsorted(np.cumsum(probabilities), top_p)) + 1
        order, probabilities = order[:count], probabilities[:count] / probabilities[:count].sum()
    return order, probabilities


def _draw(probabilities: npt.NDArray[np.float64], uniform: float) -> int:
    """Index of the first cumulative probability above ``uniform``'s share of them all; uniform in 0 … 1 − 2⁻⁵³.

    Never that of a zero probability: 1 − 2⁻⁵³ times the total always rounds to less than the total.
    """
    cumulative = np.cumsum(probabilities)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


def _prompt(ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
    tokens = np.asarray(ids)
    if tokens.ndim != 1:
        raise ValueError(f"ids has shape {tokens.shape}; expected one dimension.")
    if tokens.size == 0:
        raise ValueError("ids is empty; expected at least one token to continue from (a BOS token begins a document).")
    if tokens.dtype.kind not in "iu":
        raise TypeError(f"ids has dtype {tokens.dtype}; expected integers.")
    return tokens.astype(np.int64)


def _checked_logits(values: npt.ArrayLike, position: int) -> npt.NDArray[np.float64]:
    logits = np.asarray(values, dtype=np.float64)
    if logits.ndim != 1 or logits.size == 0:
        raise ValueError(f"logits_fn returned shape {logits.shape}; expected (vocabulary size,).")
    best = logits.max()
    if not np.isfinite(best):
        raise NonFiniteError(
            f"The largest logit for the token at position {position} is {best}; expected a finite number."
        )
    return logits


def _token_ids(name: str, ids: int | Collection[int] | None) -> frozenset[int]:
    if ids is None:
        return frozenset()
    if isinstance(ids, (str, bytes)):
        raise TypeError(f"{name} is {ids!r}; expected a token id, several, or None.")
    several = ids if isinstance(ids, (Collection, np.ndarray)) else (ids,)
    return frozenset(_integer(name, value, 0) for value in several)


def _integer(name: str, value: SupportsIndex, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; expected an integer.") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected an integer.")
    if number < least:
        raise ValueError(f"{name} is {number}; expected at least {least}.")
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} is {value!r}; expected a number.")
    return float(value)
