"""The model: GPT over the native code, and sampling."""

from __future__ import annotations

from pgolf.model.gpt import GPT as GPT
from pgolf.model.gpt import FloatArray as FloatArray
from pgolf.model.gpt import IntArray as IntArray
from pgolf.model.gpt import as_array as as_array
from pgolf.model.gpt import as_tokens as as_tokens
from pgolf.model.gpt import best_device as best_device
from pgolf.model.gpt import newton_schulz as newton_schulz
from pgolf.model.gpt import parameter_shapes as parameter_shapes
from pgolf.model.gpt import polynomials as polynomials
from pgolf.model.gpt import resolve_device as resolve_device
from pgolf.model.gpt import resolve_dtype as resolve_dtype
