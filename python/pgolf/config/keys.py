"""The configuration: four tables of values, the built-in recipes, and checks that name every impossible value.

``Config`` holds ``ModelConfig``, ``TrainConfig``, ``EvalConfig`` and ``ExportConfig``. Keys are, where one exists, the
community's environment variables in lower case. The defaults are the ``base`` recipe's values; what each value does is
defined in docs/spec.md under the section given in brackets, and docs/spec.md §7 lists every recipe in full.

The tables are ordinary mutable dataclasses. A value is brought to its field's own type when a table is built (an
integer given for a float becomes a float, a policy's name becomes the policy), and ``validate()`` says what is wrong.
"""

from __future__ import annotations

import codecs
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pgolf.common.errors import FormatError
from pgolf.common.text import has_utf8
from pgolf.config.encoding import ENCODINGS, Encoding

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_T = TypeVar("_T")
_Reader = Callable[[Any], Any]

# The native code counts dimensions and steps in int32; TOML promises int64.
_INT_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1

_RECIPES = Path(__file__).with_name("recipes")

_BASE_POLICY = (
    ("tok_emb.*", "fp16"),
    ("blocks.8.attn.c_k.*", "fp16"),
    ("*.mlp.*", "int5"),
    ("*.attn.*", "int6"),
    ("bigram.*", "int6"),
    ("lm_head.*", "fp16"),
    ("*", "int8"),
)
_BASE_CONTROLS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear.gate", "bigram.scale")


# Readers: each takes a value as found, returns it in the field's own type, or raises ValueError("must be ...").


def _integer(low: int = -_INT_MAX, high: int = _INT_MAX) -> _Reader:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
            raise ValueError(f"must be an integer from {low:,} to {high:,}")
        return int(value)

    return read


def _number(low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False) -> _Reader:
    """A finite number from ``low`` to ``high``; ``above`` and ``below`` exclude the ends."""
    bounds = []
    if low > -math.inf:
        bounds.append(f"above {low:g}" if above else f"at least {low:g}")
    if high < math.inf:
        bounds.append(f"below {high:g}" if below else f"at most {high:g}")
    allowed = " ".join(["must be a finite number", " and ".join(bounds)]).rstrip()

    def read(value: Any) -> float:
        try:
            number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        except OverflowError:
            number = math.inf
        inside = (number > low if above else number >= low) and (number < high if below else number <= high)
        if not (math.isfinite(number) and inside):
            raise ValueError(allowed)
        return number

    return read


_fraction = _number(0, 1)
_below_one = _number(0, 1, below=True)


def _only(allowed: str, holds: Callable[[Any], bool]) -> _Reader:
    def read(value: Any) -> Any:
        if not holds(value):
            raise ValueError(allowed)
        return value

    return read


def _choice(*names: str) -> _Reader:
    return _only(f"must be one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def _sole(name: str, because: str) -> _Reader:
    """A key with one value so far: the others that its name suggests are refused with the reason."""
    return _only(f"must be {name}: {because}", lambda value: isinstance(value, str) and value == name)


_flag = _only("must be true or false", lambda value: isinstance(value, bool))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string (in quotes where it looks like a number)")
    if not has_utf8(value):
        raise ValueError(
            "must be UTF-8, for a run's config.toml can hold nothing else; rename it, or link to it by such a name"
        )
    return value


def _bigram_vocab(value: Any) -> int:
    buckets: int = _integer(0)(value)
    if buckets == 1:
        raise ValueError("must be 0 (no bigram table) or at least 2 (the last bucket is the first position's)")
    return buckets


def _patterns(value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
        raise ValueError("must be a list of non-empty strings")
    return list(value)


def _policy(value: Any) -> list[tuple[str, str]]:
    if isinstance(value, str):
        return recipe_policy(value)
    encodings = ", ".join(ENCODINGS)
    allowed = f"must be a recipe's name or a list of [pattern, encoding] pairs, encodings {encodings} or rms:4.5"
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(allowed)
    pairs = []
    for pair in value:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], str) or not pair[0]:
            raise ValueError(f"{allowed}; {pair!r} is not such a pair")
        try:
            Encoding.parse(pair[1])
        except ValueError as error:
            raise ValueError(f"{allowed}; {error}") from None
        pairs.append((pair[0], pair[1]))
    return pairs


_NO_VALUE: Any = object()


NEWTON_SCHULZ = {
    "keller_jordan": [(3.4445, -4.7750, 2.0315)],
    "polar_express": [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ],
}
"""Coefficients of Muon's iterations: Keller Jordan's, and Polar Express (Amsel et al., arXiv:2505.16932), for five."""


def read_polynomials(value: Any) -> list[tuple[float, float, float]]:
    allowed = f"must be one of {', '.join(NEWTON_SCHULZ)}, or a list of 1 to 8 lists [a, b, c] of finite numbers"
    if isinstance(value, str) and value in NEWTON_SCHULZ:
        return list(NEWTON_SCHULZ[value])
    number = _number()
    try:
        polynomials = [(number(a), number(b), number(c)) for a, b, c in value]
    except (TypeError, ValueError):
        polynomials = []
    if not 1 <= len(polynomials) <= 8:
        raise ValueError(allowed)
    return polynomials


def _key(default: _T, read: _Reader, absent: _T = _NO_VALUE) -> _T:
    """A dataclass field with its reader.

    absent: of a key that younger files alone have, the value that does what pgolf did before there was the key. It
    never changes, whatever becomes of the default.
    """
    made: _T = field(default=default, metadata={"read": read, "absent": absent})
    return made


def _with_absent(table: type[_Table], values: Mapping[str, Any]) -> dict[str, Any]:
    known = {item.name: item.metadata.get("absent", _NO_VALUE) for item in fields(table)}
    return {**{name: absent for name, absent in known.items() if absent is not _NO_VALUE}, **values}


@dataclass(slots=True)
class _Table:
    """What the four tables share: typed values, problems by name, plain dictionaries."""

    _table: ClassVar[str]

    def __post_init__(self) -> None:
        self._refusals()

    def _refusals(self) -> dict[str, str]:
        """Brings every readable value to its field's type; returns {field: what it must be} for the others."""
        refused = {}
        for item in fields(self):
            try:
                setattr(self, item.name, item.metadata["read"](getattr(self, item.name)))
            except ValueError as error:
                refused[item.name] = str(error)
        return refused

    def _combinations(self, usable: Callable[..., bool]) -> Iterator[tuple[str, str]]:
        """(field, what it must be) for values that do not go together; ``usable(*names)``: each is right by itself."""
        return iter(())

    def _problems(self) -> Iterator[str]:
        refused = self._refusals()
        for name, allowed in [*refused.items(), *self._combinations(lambda *names: refused.keys().isdisjoint(names))]:
            yield f"{self._table}.{name} = {getattr(self, name)!r}: {allowed}"

    def validate(self) -> None:
        """Raises ValueError naming every impossible value and combination: field, value found, what is allowed."""
        _raise(self._problems())

    def to_dict(self) -> dict[str, Any]:
        """{key: value} of the whole table in the fields' order, with JSON's types (pairs as lists)."""
        self._refusals()
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    def to_stored(self) -> dict[str, Any]:
        """``to_dict`` for files that an older pgolf may read: without keys that are younger than it and do nothing."""
        absent = {item.name: item.metadata.get("absent", _NO_VALUE) for item in fields(self)}
        return {name: value for name, value in self.to_dict().items() if value != absent[name]}


@dataclass(slots=True, kw_only=True)
class ModelConfig(_Table):
    """The model's shape and initial values (docs/spec.md §1, §2). An artifact's header carries this table whole."""

    _table: ClassVar[str] = "model"

    # V, the number of token ids. Shards hold uint16 tokens, hence the upper end. [§6]
    vocab_size: int = _key(1024, _integer(2, 65_536))
    # L, the number of blocks. [§2.3]
    num_layers: int = _key(10, _integer(1))
    # The layers that run again, loop_start to loop_end, and how many times more; 0: every layer runs once. [§2.3]
    loop_start: int = _key(0, _integer(0), absent=0)
    loop_end: int = _key(0, _integer(0), absent=0)
    num_loops: int = _key(0, _integer(0, 1000), absent=0)
    # d, the width of the residual stream. [§1]
    model_dim: int = _key(512, _integer(2))
    # H, query heads, each of width D = d / H. [§2.5]
    num_heads: int = _key(8, _integer(1))
    # K, key/value heads; each serves H / K query heads. [§2.5]
    num_kv_heads: int = _key(4, _integer(1))
    # The MLP's width in units of d: F = floor(mlp_mult * d). [§2.6]
    mlp_mult: float = _key(3.0, _number(0, above=True))
    # a, the MLP's activation below 0: (a * u)^2; 0: ReLU squared. [§2.6]
    mlp_negative_slope: float = _key(0.0, _number(0), absent=0.0)
    # Whether what block i's attention and MLP read is scaled by 1 / sqrt(i + 1) after its norm. [§2.4]
    ln_scale: bool = _key(False, _flag, absent=False)
    # Whether the head reads tok_emb.weight instead of an lm_head.weight of its own. [§2.7]
    tie_embeddings: bool = _key(True, _flag)
    # Standard deviation of tok_emb's initial values when tied; untied it is 1. [§1]
    tied_embed_init_std: float = _key(0.005, _number(0))
    # c in c * tanh(z / c), the bound on every logit. [§2.7]
    logit_softcap: float = _key(30.0, _number(0, above=True))
    # The base of RoPE's geometric row of frequencies. [§2.5]
    rope_base: float = _key(10_000.0, _number(0, above=True))
    # R, how many of a head's numbers RoPE turns, even; 0: all of them. [§2.5]
    rope_dims: int = _key(0, _integer(0), absent=0)
    # Initial gain of every query head after its norm. [§2.5]
    qk_gain_init: float = _key(1.5, _number())
    # n, buckets of the bigram table; 0: no bigram term. [§2.1]
    bigram_vocab_size: int = _key(10_240, _bigram_vocab)
    # e, width of the bigram table; e = d: no projection. Unused where n = 0. [§2.1]
    bigram_dim: int = _key(128, _integer(1))
    # Whether the smear gate counts the embedding before a BOS token as 0. [§2.2]
    smear_reset_at_bos: bool = _key(False, _flag)
    # The token id that begins a document; -1: the tokenizer's, which a run fills in. [§2.2, §6]
    bos_id: int = _key(-1, _integer(-1, 65_535))
    # exact: RoPE in float64, rounded once; bf16: as the public script's eager table, for weights it trained. [§2]
    rope_tables: str = _key("exact", _choice("exact", "bf16"))

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.model_dim // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """F = floor(mlp_mult * d), the width of the MLP's hidden layer."""
        return math.floor(self.mlp_mult * self.model_dim)

    @property
    def virtual_layers(self) -> int:
        """The layers that a token passes through, loops counted."""
        return self.num_layers + self.num_loops * (self.loop_end - self.loop_start + 1)

    @property
    def num_skips(self) -> int:
        """S, the rows of ``skip_weights``: half of the virtual layers, rounded down; 0 for one."""
        return self.virtual_layers // 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The table that ``to_dict`` or ``to_stored`` wrote, of this pgolf or an older one.

        Raises ValueError naming every missing, unknown and impossible key.
        """
        problems = list(_unknown_keys({cls._table: values}))
        if isinstance(values, Mapping):
            values = _with_absent(cls, values)
            problems += [f"model.{item.name} is missing" for item in fields(cls) if item.name not in values]
        _raise(problems)
        config = cls(**values)
        config.validate()
        return config

    def _combinations(self, usable: Callable[..., bool]) -> Iterator[tuple[str, str]]:
        if usable("model_dim", "num_heads"):
            if self.model_dim % self.num_heads:
                yield "model_dim", f"must be divisible by model.num_heads = {self.num_heads}"
            elif self.head_dim % 2:
                yield (
                    "model_dim",
                    (
                        f"must give heads of even width, as RoPE turns pairs: with model.num_heads = {self.num_heads} "
                        f"a multiple of {2 * self.num_heads}"
                    ),
                )
            if usable("rope_dims") and (self.rope_dims % 2 or self.rope_dims > self.head_dim):
                yield "rope_dims", f"must be even and at most a head's width, {self.head_dim} (0: all of it)"
        if usable("num_heads", "num_kv_heads") and self.num_heads % self.num_kv_heads:
            yield "num_kv_heads", f"must divide model.num_heads = {self.num_heads}"
        if usable("num_loops", "loop_start", "loop_end", "num_layers") and self.num_loops:
            if self.loop_end >= self.num_layers:
                yield "loop_end", f"must be below model.num_layers = {self.num_layers}"
            if self.loop_start > self.loop_end:
                yield "loop_start", f"must be at most model.loop_end = {self.loop_end}"
        if usable("mlp_mult", "model_dim") and not 1 <= self.mlp_mult * self.model_dim <= _INT_MAX:
            yield (
                "mlp_mult",
                (
                    f"must give a hidden width floor(mlp_mult * model_dim) from 1 to {_INT_MAX:,} "
                    f"with model.model_dim = {self.model_dim}"
                ),
            )
        if usable("bos_id", "vocab_size") and self.bos_id >= self.vocab_size:
            yield "bos_id", f"must be below model.vocab_size = {self.vocab_size}"


@dataclass(slots=True, kw_only=True)
class TrainConfig(_Table):
    """Data, optimizers, schedules and precision of a run (docs/spec.md §3, §6)."""

    _table: ClassVar[str] = "train"

    # Folder of the token shards *_train_*.bin and *_val_*.bin; empty: not set. [§6]
    data_path: str = _key("", _text)
    # SentencePiece model file; empty: the data folder's only *.model, else its manifest's. [§6]
    tokenizer_path: str = _key("", _text)
    # Target tokens per validation batch: memory and speed only, never the result. [§5]
    val_batch_tokens: int = _key(524_288, _integer(1))
    # log.jsonl of a finished run whose time-dependent decisions are repeated; empty: none. [§3]
    replay: str = _key("", _text)
    # Key of every random number: initial weights and adapters. [§1]
    seed: int = _key(42, _integer(0, _INT64_MAX))
    # N, the step limit; 0: none, time alone ends the run. [§3]
    iterations: int = _key(20_000, _integer(0))
    # Limit of training time in seconds, validation excluded; 0: none. [§3]
    max_wallclock_seconds: float = _key(600.0, _number(0))
    # Target tokens of one optimizer step, over all ranks and micro-batches. [§6]
    train_batch_tokens: int = _key(786_432, _integer(1))
    # T, tokens of one training sequence. [§6]
    train_seq_len: int = _key(2048, _integer(1))
    # Batch slots: consecutive spans of the token stream that make up a step. [§6]
    grad_accum_steps: int = _key(8, _integer(1))
    # Learning rate of tok_emb and the bigram table when the head is untied. [§3]
    embed_lr: float = _key(0.6, _number(0))
    # Learning rate of tok_emb and the bigram table when the head is tied. [§3]
    tied_embed_lr: float = _key(0.03, _number(0))
    # Learning rate of an untied lm_head. [§3]
    head_lr: float = _key(0.008, _number(0))
    # Learning rate of the matrices, which Muon updates. [§3]
    matrix_lr: float = _key(0.02, _number(0))
    # Learning rate of scales, mixes, gains, gate and skip weights. [§3]
    scalar_lr: float = _key(0.02, _number(0))
    # Muon's momentum at the end of its warm-up. [§3]
    muon_momentum: float = _key(0.99, _below_one)
    # Muon's momentum at step 0. [§3]
    muon_momentum_warmup_start: float = _key(0.92, _below_one)
    # Steps over which the momentum rises; 0: the end value at once. [§3]
    muon_momentum_warmup_steps: int = _key(1500, _integer(0))
    # Newton-Schulz iterations of one Muon update. [§3]
    muon_backend_steps: int = _key(5, _integer(1))
    # (a, b, c) of each iteration, X <- a X + (b A + c A^2) X, the last of them for later ones too; or a set's name:
    # keller_jordan, polar_express. [§3]
    muon_coefficients: list[tuple[float, float, float]] = field(
        default_factory=lambda: read_polynomials("keller_jordan"),
        metadata={"read": read_polynomials, "absent": [[3.4445, -4.775, 2.0315]]},
    )
    # Whether each row of an update is divided by its norm before the iterations. [§3]
    muon_row_normalize: bool = _key(False, _flag, absent=False)
    # Decoupled weight decay of the matrices. [§3]
    muon_weight_decay: float = _key(0.04, _number(0))
    # Decoupled weight decay of every AdamW tensor except lm_head. [§3]
    weight_decay: float = _key(0.04, _number(0))
    # Decay of Adam's first moment. [§3]
    beta1: float = _key(0.9, _below_one)
    # Decay of Adam's second moment. [§3]
    beta2: float = _key(0.95, _below_one)
    # Added to Adam's root of the second moment. [§3]
    adam_eps: float = _key(1e-8, _number(0, above=True))
    # Limit of the global gradient norm; 0: no clipping. [§3]
    grad_clip_norm: float = _key(0.3, _number(0))
    # W, steps of the final fall of the learning rate; 0 or less: it stays constant. [§3]
    warmdown_iters: int = _key(3000, _integer())
    # linear: the multiplier as it is; cosine: (1 - cos(pi * m)) / 2. [§3]
    warmdown_shape: str = _key("linear", _choice("linear", "cosine"))
    # Warmdown as a fraction of the time limit (without one, of N), in place of warmdown_iters; 0: not given. [§3]
    warmdown_frac: float = _key(0.0, _fraction)
    # Priming steps, after which the initial state is restored exactly. [§3]
    warmup_steps: int = _key(0, _integer(0))
    # Whether snapshots late in training are averaged. [§3]
    swa_enabled: bool = _key(True, _flag)
    # Snapshots are taken while the learning-rate multiplier is below this. [§3]
    swa_start_frac: float = _key(0.4, _fraction)
    # Steps between snapshots. [§3]
    swa_every: int = _key(50, _integer(1))
    # Decay of an exponential average kept instead of the snapshots; 0: none. [§3]
    ema_decay: float = _key(0.0, _below_one)
    # Share of the time limit (without one, of N) from which late QAT is on; 0: always, 1: never. [§3]
    qat_start_frac: float = _key(1.0, _fraction)
    # The integers that late QAT trains on. export: each matrix's own in export.policy; fixed: int5 in MLPs, int6 in
    # attention, whatever the policy says, as runs did that were begun before there was this key. [§3]
    qat_grid: str = _key("export", _choice("export", "fixed"), absent="fixed")
    # Share of the time limit (without one, of N) from which the model's loops are on; 0: always. [§3]
    enable_looping_at: float = _key(0.0, _fraction, absent=0.0)
    # Steps between validations; 0: only at the end. [§3]
    val_loss_every: int = _key(500, _integer(0))
    # Steps between checkpoints in the run folder; 0: only at the end and when interrupted.
    checkpoint_every: int = _key(500, _integer(0))
    # Steps between lines on the terminal, where it shows lines; 0: none. Every step is in log.jsonl.
    train_log_every: int = _key(100, _integer(0))
    # Storage of activations and working weights; auto: bfloat16 on GPUs that have it, else float16; CPUs float32. [§2]
    dtype: str = _key("auto", _choice("auto", "float32", "bfloat16", "float16"))
    # Inputs of the GPU's matrix products where train.dtype is bfloat16. [§2]
    matmul: str = _key("bf16", _sole("bf16", "no kernel multiplies anything narrower"))
    # Sequences per micro-batch; 0: automatic, from the device's total memory. [§6]
    micro_batch_seqs: int = _key(0, _integer(0))
    # The type in which gradients are summed across GPUs. [§2]
    reduce_dtype: str = _key("float32", _sole("float32", "one process trains, and sums gradients in float32"))

    def _combinations(self, usable: Callable[..., bool]) -> Iterator[tuple[str, str]]:
        if usable("iterations", "max_wallclock_seconds") and not (self.iterations or self.max_wallclock_seconds):
            yield "iterations", "must be at least 1 where train.max_wallclock_seconds = 0, or the run has no end"
        if usable("train_batch_tokens", "grad_accum_steps", "train_seq_len"):
            slots, length = self.grad_accum_steps, self.train_seq_len
            if self.train_batch_tokens % (slots * length):
                yield (
                    "train_batch_tokens",
                    (
                        f"must be a multiple of train.grad_accum_steps * train.train_seq_len = {slots} * {length} = "
                        f"{slots * length}, so that every batch slot holds whole sequences"
                    ),
                )
        if usable("val_batch_tokens", "train_seq_len") and self.val_batch_tokens < self.train_seq_len:
            yield "val_batch_tokens", f"must be at least train.train_seq_len = {self.train_seq_len}, one sequence"


@dataclass(slots=True, kw_only=True)
class EvalConfig(_Table):
    """How a trained model is scored (docs/spec.md §5)."""

    _table: ClassVar[str] = "eval"

    # standard: windows side by side; sliding: overlapping; ttt: test-time training per document. [§5]
    method: str = _key("sliding", _choice("standard", "sliding", "ttt"))
    # s, tokens between the starts of sliding windows. [§5]
    eval_stride: int = _key(64, _integer(1))
    # Context of a window in tokens; 0: the training length. [§5]
    eval_seq_len: int = _key(0, _integer(0))
    # Windows per batch: memory and speed; the result changes by no more than rounding. [§5]
    eval_batch_seqs: int = _key(32, _integer(1))
    # exact: every target scored once; reference: the public script's shortened windows at the end. [§5]
    tail: str = _key("reference", _choice("exact", "reference"))
    # Rank of a document's adapters. [§5]
    ttt_lora_rank: int = _key(8, _integer(1))
    # Adam's learning rate for the adapters. [§5]
    ttt_lora_lr: float = _key(0.01, _number(0))
    # Targets that are scored, then trained on, together. [§5]
    ttt_chunk_size: int = _key(256, _integer(1))
    # Context of a chunk's window in tokens. [§5]
    ttt_eval_seq_len: int = _key(1024, _integer(1))
    # Documents per batch. [§5]
    ttt_batch_size: int = _key(64, _integer(1))

    def ttt(self) -> dict[str, Any]:
        """The ttt_ keys, as ``evaluate`` takes them."""
        return {name: value for name, value in self.to_dict().items() if name.startswith("ttt_")}

    def scoring(self, seq_len: int) -> dict[str, Any]:
        """How the table's method scores, as an artifact's header keeps it: only what that method reads.

        seq_len: the context of the methods with windows.
        """
        if self.method == "ttt":
            return {"method": self.method, **self.ttt()}
        how = {"method": self.method, "seq_len": seq_len}
        return {**how, "stride": self.eval_stride, "tail": self.tail} if self.method == "sliding" else how

    def _combinations(self, usable: Callable[..., bool]) -> Iterator[tuple[str, str]]:
        if usable("ttt_chunk_size", "ttt_eval_seq_len") and self.ttt_chunk_size > self.ttt_eval_seq_len:
            yield "ttt_chunk_size", f"must be at most eval.ttt_eval_seq_len = {self.ttt_eval_seq_len}"


@dataclass(slots=True, kw_only=True)
class ExportConfig(_Table):
    """How weights become an artifact (docs/spec.md §4)."""

    _table: ClassVar[str] = "export"

    # Ordered (fnmatch pattern on the tensor's full name, encoding) pairs, the first match wins; given as a recipe's
    # name, it becomes that recipe's list. [§4]
    policy: list[tuple[str, str]] = field(default_factory=lambda: [*_BASE_POLICY], metadata={"read": _policy})
    # Share of the smallest weights of every large matrix that is set to zero. [§4]
    prune: float = _key(0.03, _below_one)
    # Tensors of at most this many elements are fp16, before the policy is asked. [§4]
    small_numel: int = _key(8192, _integer(0))
    # Larger tensors with these names are fp32. A pattern with a wildcard (* ? [) is an fnmatch on the full name, any
    # other is contained in it. [§4]
    control_patterns: list[str] = field(default_factory=lambda: [*_BASE_CONTROLS], metadata={"read": _patterns})
    # Most bytes that artifact and code may have together, decimal. [§4]
    limit_bytes: int = _key(16_000_000, _integer(1, _INT64_MAX))


@dataclass(slots=True)
class Config:
    """A run's whole configuration: the tables ``model``, ``train``, ``eval`` and ``export``.

    ``Config()`` is the ``base`` recipe. The ``from_*`` constructors and ``override`` return checked configurations.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    @classmethod
    def from_recipe(cls, name: str, overrides: Mapping[str, Any] | None = None) -> Config:
        """The built-in recipe ``name`` with single values replaced: ``{"train.iterations": 100}``.

        Raises ValueError for an unknown recipe or key, naming the nearest one, and for impossible values, all named.
        """
        return cls._checked(_overlay(_load(_recipe_path(name)), _tables_of(overrides or {})))

    @classmethod
    def from_toml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
        """The configuration in a TOML file, with single values replaced as in ``from_recipe``.

        The file may say ``extends = "base"`` (a recipe) or ``extends = "other.toml"`` (a file, relative to this one);
        then it needs to hold only what differs. Without it, missing keys have the defaults; but a file that holds every
        key that an older pgolf knew is one that it wrote, and younger keys have the values that it ran with.

        Raises FileNotFoundError, FormatError for a file that is not TOML, extends itself or has unknown keys (the
        nearest is named), and ValueError for impossible values, all named.
        """
        tables = _overlay(_as_written(_load(Path(path))), _tables_of(overrides or {}))
        try:
            return cls._checked(tables)
        except ValueError as error:
            raise FormatError(f"{path}: {error}") from None

    def override(self, overrides: Mapping[str, Any]) -> Config:
        """A new, checked configuration with single values replaced; raises as ``from_recipe``."""
        return self._checked(_overlay(self.to_dict(), _tables_of(overrides)))

    def validate(self) -> None:
        """Raises ValueError naming every impossible value and combination: field, value found, what is allowed."""
        _raise(self._problems())

    @property
    def eval_seq_len(self) -> int:
        """The context of evaluation windows in tokens: ``eval.eval_seq_len``, or the training length if that is 0."""
        return self.eval.eval_seq_len or self.train.train_seq_len

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """{table: {key: value}} in the tables' and fields' order, with JSON's types."""
        return {item.name: getattr(self, item.name).to_dict() for item in fields(self)}

    def to_toml(self) -> str:
        """The whole configuration as TOML text, keys in the fields' order; ``from_toml`` reads the same values back."""
        import tomli_w

        # tomli-w gives every element of a nested list its own line; a policy reads better with a pair a line.
        return re.sub(r'\[\s+("[^"\n]*"),\s+("[^"\n]*"),\s+\]', r"[\1, \2]", tomli_w.dumps(self.to_dict()))

    @classmethod
    def _checked(cls, tables: Mapping[str, Mapping[str, Any]]) -> Config:
        config = cls(
            model=ModelConfig(**tables["model"]),
            train=TrainConfig(**tables["train"]),
            eval=EvalConfig(**tables["eval"]),
            export=ExportConfig(**tables["export"]),
        )
        config.validate()
        return config

    def _problems(self) -> Iterator[str]:
        yield from self.model._problems()
        yield from self.train._problems()
        yield from self.eval._problems()
        yield from self.export._problems()
        stride, context, length = self.eval.eval_stride, self.eval.eval_seq_len, self.train.train_seq_len
        if all(isinstance(value, int) for value in (stride, context, length)) and stride > (context or length) > 0:
            yield (
                f"eval.eval_stride = {stride}: must be at most the windows' length {context or length} "
                f"(eval.eval_seq_len, or train.train_seq_len where that is 0)"
            )


_TABLES: dict[str, type[_Table]] = {
    table._table: table for table in (ModelConfig, TrainConfig, EvalConfig, ExportConfig)
}


def recipes() -> list[str]:
    """The names of the built-in recipes, sorted."""
    return sorted(path.stem for path in _RECIPES.glob("*.toml"))


def recipe_policy(name: str) -> list[tuple[str, str]]:
    """The policy of the built-in recipe ``name``: its (pattern, encoding) pairs in order (docs/spec.md §4, §7).

    Raises ValueError for an unknown recipe, naming the nearest one.
    """
    return [(pattern, encoding) for pattern, encoding in _load(_recipe_path(name))["export"]["policy"]]


def parse_override(text: str) -> tuple[str, Any]:
    """Splits ``table.key=value``, as the command line's ``--set`` takes it, into the key and the value.

    The value is read as TOML; what is not a TOML value and opens no quote, list or table is a string as it stands, so
    that ``eval.method=standard`` and paths need no quotes. Raises ValueError where there is no ``=`` or a value is
    broken off; whether the key exists is for the configuration to say.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals):
        raise ValueError(f"{text!r} must have the form table.key=value, as in train.iterations=100")
    try:
        document = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError) as error:
        if value.startswith(("[", "{", '"', "'")):
            raise ValueError(f"the value of {key} is not TOML: {error} in {value!r}") from None
        return key, value
    parsed = document["value"]
    single = len(document) == 1 and isinstance(parsed, (bool, int, float, str, list))
    return key, parsed if single else value


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _raise(problems: Iterable[str]) -> None:
    found = list(problems)
    if len(found) == 1:
        raise ValueError(found[0])
    if found:
        raise ValueError(f"{len(found)} values of the configuration are wrong:\n" + "\n".join(f"  {p}" for p in found))


def _nearest(word: str, names: Iterable[str]) -> str:
    return difflib.get_close_matches(word, names, n=1, cutoff=0.0)[0]


def _unknown_key(key: str) -> str:
    names = [f"{table}.{item.name}" for table, cls in _TABLES.items() for item in fields(cls)]
    last = key.rpartition(".")[2]
    same_key = [name for name in names if name.partition(".")[2] == last]
    return (
        f"{key} is not a key of the configuration; the nearest is {same_key[0] if same_key else _nearest(key, names)}"
    )


def _unknown_keys(tables: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the names in ``tables``, each with the nearest right one."""
    for name, values in tables.items():
        if isinstance(values, Mapping) and name not in _TABLES:
            yield f"[{name}] is not a table of the configuration; the nearest is [{_nearest(name, _TABLES)}]"
        elif isinstance(values, Mapping):
            known = {item.name for item in fields(_TABLES[name])}
            yield from (_unknown_key(f"{name}.{key}") for key in values if key not in known)
        elif name in _TABLES:
            yield f"{name} = {values!r} must be a table: write [{name}] with its keys below"
        else:
            yield _unknown_key(name)


def _tables_of(overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"table.key": value} as {table: {key: value}}."""
    tables: dict[str, dict[str, Any]] = {}
    problems = []
    for full_key, value in overrides.items():
        table, _, key = full_key.partition(".")
        if table in _TABLES and key in {item.name for item in fields(_TABLES[table])}:
            tables.setdefault(table, {})[key] = value
        else:
            problems.append(_unknown_key(full_key))
    _raise(problems)
    return tables


def _as_written(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A file's tables; where they hold every key that has always been there, with the values of the younger ones."""
    old = {
        name: {item.name for item in fields(table) if item.metadata.get("absent", _NO_VALUE) is _NO_VALUE}
        for name, table in _TABLES.items()
    }
    complete = all(tables.get(name, {}).keys() >= keys for name, keys in old.items())
    return with_younger_keys(tables) if complete else tables


def with_younger_keys(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """``to_dict()`` of a configuration that an older pgolf may have stored, with the values of keys younger than it."""
    return {name: _with_absent(table, tables.get(name, {})) for name, table in _TABLES.items()}


def _overlay(
    below: Mapping[str, Mapping[str, Any]], above: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    return {name: {**below.get(name, {}), **above.get(name, {})} for name in _TABLES}


def _recipe_path(name: str) -> Path:
    names = recipes()
    if name not in names:
        raise ValueError(
            f"there is no recipe {name!r}; the nearest is {_nearest(str(name), names)!r} of {', '.join(names)}"
        )
    return _RECIPES / f"{name}.toml"


def _load(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file laid over those of what it extends; their names are checked, their values not yet."""
    path = path.resolve()
    if path in extended_by:
        raise FormatError(" extends ".join(map(str, [*extended_by, path])) + ": a configuration cannot extend itself")
    if not path.is_file():
        origin = f", which {extended_by[-1]} extends" if extended_by else ""
        raise FileNotFoundError(f"there is no configuration file {path}{origin}")
    try:
        content = path.read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError("it is UTF-16, and TOML is UTF-8; save it in that encoding")
        document = tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not a TOML file: {error}") from None
    parent = document.pop("extends", None)
    below: dict[str, dict[str, Any]] = {}
    try:
        _raise(_unknown_keys(document))
        if parent is not None:
            if not isinstance(parent, str):
                raise ValueError(f"extends = {parent!r} must be a recipe's name or the path of a .toml file")
            target = path.parent / parent if parent.endswith(".toml") else _recipe_path(parent)
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None
    if parent is not None:
        below = _load(target, (*extended_by, path))
    return _overlay(below, document)
