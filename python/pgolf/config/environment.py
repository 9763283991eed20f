"""The environment variables of the public training scripts, as configuration (examples/train_gpt.py reads them).

``VARIABLES`` holds every variable that the reference `train_gpt.py`, the merged records of openai/parameter-golf and
the scripts of some pull requests read (tests/data/public_variables.json). Each one sets configuration keys; or asks
for what pgolf has not, and is refused unless it holds what pgolf does anyway; or changes nothing, and is named in a
warning. An unset variable leaves the recipe's value; the scripts' own defaults are in the recipes.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, fields
from functools import partial
from itertools import dropwhile
from pathlib import Path
from typing import Any

from pgolf.config.keys import Config, EvalConfig, ExportConfig, ModelConfig, TrainConfig
from pgolf.config.public_variables import LACKS, NO_EFFECT, OFF, Lack

_Policy = list[tuple[str, str]]

# How alike an unknown variable must be to a known one to count as its typo, on difflib's scale from 0 to 1. ITERATION
# reaches 0.95, MATRIX_LRR 0.95; WORLD_SIZE and torchrun's LOCAL_WORLD_SIZE only 0.77.
_TYPO = 0.85


@dataclass(frozen=True)
class Variable:
    """What one environment variable is to pgolf.

    sets: the configuration keys that it sets, or what else it names; empty: none.
    note: how its value is translated, the reason of the refusal, or why it changes nothing; may be empty.
    read: takes the variable's text, returns the value, raises ValueError("must be ...") or with the reason.
    accepts: of a refused variable, the texts that ask for what pgolf does anyway.
    beside: the variables that, where they are set and accepted, leave this one without effect.
    agrees: whether the number that it holds is what a configuration says; None: it is not compared.
    without_effect: whether it changes neither the model nor its training, its bytes or its score.
    """

    sets: str
    note: str
    read: Callable[[str], Any]
    accepts: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    agrees: Callable[[float, Config], bool] | None = None
    without_effect: bool = False

    @property
    def refused(self) -> bool:
        """Whether pgolf has no such thing; a value that asks for what pgolf does anyway passes nevertheless."""
        return not (self.sets or self.without_effect)


def config_from_environment(environ: Mapping[str, str], base: str = "base") -> tuple[Config, list[str]]:
    """The configuration that the variables ask for, and the warnings.

    One warning names all variables that are set and have no effect; each unknown one that looks like a known one has
    its own.

    Args:
        environ: the variables, as `os.environ`; RECIPE names a built-in recipe in place of ``base``.
        base: the recipe whose values hold where a variable is unset.

    Raises:
        ValueError: naming every variable with an impossible value, what was found and what was expected; every refused
            variable with the reason; an unknown recipe; values that do not go together, with the variables behind them.
    """
    recipe = Config.from_recipe(environ.get("RECIPE", base))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    compared: dict[str, Callable[[Config], bool]] = {}
    idle, problems = [], []
    for name, variable in VARIABLES.items():
        if name not in environ:
            continue
        if variable.without_effect or any(_accepted(other, environ) for other in variable.beside):
            idle.append(name)
            continue
        try:
            value = variable.read(environ[name].strip())
        except ValueError as error:
            problems.append(f"{name} = {environ[name]!r}: {error}")
            continue
        if variable.agrees:
            compared[name] = partial(variable.agrees, value)
        if not variable.sets:
            continue
        if values.setdefault(variable.sets, value) != value:
            other = sources[variable.sets]
            problems.append(f"{name} = {environ[name]!r}: {other} sets {variable.sets} too, to another value")
        sources.setdefault(variable.sets, name)
    _raise(problems)
    try:
        config = recipe.override(_translate(values, recipe))
    except ValueError as error:
        found = (re.split("[ ,]", key)[0] for key in sources)  # without what _translate makes of it
        named = [f"{name} sets {key}" for key, name in zip(found, sources.values(), strict=True) if key in str(error)]
        raise ValueError(f"{error}\nIn the environment, {', '.join(named)}.") from None
    _raise(
        f"{name} = {environ[name]!r}: {VARIABLES[name].note}" for name, agrees in compared.items() if not agrees(config)
    )
    return config, _idle(idle) + _typos(environ)


def _raise(problems: Iterable[str]) -> None:
    if found := "; ".join(problems):
        raise ValueError(f"The environment asks for what cannot be done: {found}.")


def _accepted(name: str, environ: Mapping[str, str]) -> bool:
    """Whether a refused variable is set to what pgolf does anyway."""
    return name in environ and _among(environ[name].strip(), VARIABLES[name].accepts)


def _idle(names: list[str]) -> list[str]:
    if not names:
        return []
    subject, verb = ("variable", "has") if len(names) == 1 else ("variables", "have")
    return [f"The environment {subject} {', '.join(sorted(names))} {verb} no effect in pgolf."]


_FAMILIES = re.compile(
    "(ATTN|BIGRAM|EMA|EVAL|GPTQ|INT[4-8]|LQER|MLP|MTP|MUON|NGRAM|QAT|QUANT|ROPE|SWA|TRIGRAM|TTT|VAL|WARMDOWN|XSA)_[A-Z0-9_]+"
)
"""Names that only a training script gives: one that is unknown is said to have no effect, whatever it resembles."""

_MACHINE = re.compile("(CONDA|CUDA|LC|LD|MKL|NCCL|NVIDIA|OMP|OPENBLAS|PYTHON|SLURM|SSH|TORCH|XDG)[A-Z0-9_]*")
"""Names of a machine's own variables, which may resemble a script's: OMP_NUM_THREADS is not a typo of MTP_NUM_HEADS."""


def _typos(environ: Mapping[str, str]) -> list[str]:
    warnings = []
    for name in sorted(environ.keys() - VARIABLES.keys()):
        if _MACHINE.fullmatch(name):
            continue
        if near := difflib.get_close_matches(name.upper(), VARIABLES, n=1, cutoff=_TYPO):
            warnings.append(f"The environment variable {name} is unknown and has no effect; did you mean {near[0]}?")
        elif _FAMILIES.fullmatch(name):
            warnings.append(f"The environment variable {name} is unknown to pgolf and has no effect.")
    return warnings


# ---- Translation: from what the variables say to configuration keys, where one is not the other.

_STRIDE, _QAT = "eval.method, eval.eval_stride", "train.qat_start_frac (on or off)"
_SLIDING, _EMA, _BIGRAM = (
    "eval.method (sliding or standard)",
    "train.ema_decay (on or off)",
    "model.bigram_vocab_size (on or off)",
)
_DATA = "train.data_path, train.tokenizer_path"
_COEFFICIENTS = "train.muon_coefficients (Polar Express)"
_FP16_PATTERNS, _LATE_KEYS, _EMBEDDING = (
    "export.policy (the fp16 rules)",
    "export.policy (the last blocks' keys)",
    "export.policy (embedding and head)",
)
_LATE_KEY_RULE = re.compile(r"blocks\.\d+\.attn\.c_k\.\*")
_QAT_START = 0.85
"""Where late QAT begins if it is switched on in a recipe that has none: the default of #286, which brought it."""
_EMA_DECAY = 0.997
"""The exponential average's decay if it is switched on in a recipe that has none: the default of most scripts."""


def _translate(values: dict[str, Any], recipe: Config) -> dict[str, Any]:
    """Configuration keys and values; ``values`` goes by `Variable.sets`."""
    keys = {name: value for name, value in values.items() if name in _FIELDS}
    length = keys.get("train.train_seq_len", recipe.train.train_seq_len)
    context = keys.get("eval.eval_seq_len", recipe.eval.eval_seq_len) or length
    stride = values.get(_STRIDE, recipe.eval.eval_stride)
    if _STRIDE in values or stride >= context:
        # The scripts slide only by a stride between 0 and the context; any other means windows side by side.
        slides = 0 < stride < context
        keys["eval.method"] = "sliding" if slides else "standard"
        keys["eval.eval_stride"] = stride if slides else context
    if values.get(_SLIDING) and values.get(_STRIDE) == 0:
        raise ValueError("eval.method: sliding windows are asked for, and a stride of 0.")
    if _SLIDING in values and keys.get("eval.eval_stride", stride) < context:
        keys["eval.method"] = "sliding" if values[_SLIDING] else "standard"
    if _EMA in values:
        decay = keys.get("train.ema_decay", recipe.train.ema_decay)
        keys["train.ema_decay"] = (decay or _EMA_DECAY) if values[_EMA] else 0.0
    if values.get(_BIGRAM) and keys.get("model.bigram_vocab_size", recipe.model.bigram_vocab_size) == 0:
        raise ValueError("model.bigram_vocab_size is 0, and a bigram table is asked for: set BIGRAM_VOCAB_SIZE too.")
    if not values.get(_BIGRAM, True):
        keys["model.bigram_vocab_size"] = 0
    if _DATA in values:
        vocab, folder = keys.get("model.vocab_size", recipe.model.vocab_size), Path(values[_DATA])
        keys.setdefault("train.data_path", str(folder / "datasets" / f"fineweb10B_sp{vocab}"))
        keys.setdefault("train.tokenizer_path", str(folder / "tokenizers" / f"fineweb_{vocab}_bpe.model"))
    if _QAT in values:
        start = keys.get("train.qat_start_frac", recipe.train.qat_start_frac)
        keys["train.qat_start_frac"] = 1.0 if not values[_QAT] else start if start < 1 else _QAT_START
    if values.get(_COEFFICIENTS):
        keys["train.muon_coefficients"] = "polar_express"
    layers = keys.get("model.num_layers", recipe.model.num_layers)
    return {**keys, "export.policy": _policy(recipe.export.policy, values, layers)}


def _policy(policy: _Policy, values: dict[str, Any], layers: int) -> _Policy:
    """The recipe's policy with the rules that the variables replace."""
    if _FP16_PATTERNS in values:
        rules = [(f"*{pattern}*", "fp16") for pattern in values[_FP16_PATTERNS]]
        policy = rules + list(dropwhile(lambda rule: rule[1] == "fp16", policy))
    if _LATE_KEYS in values:
        late = range(max(layers - values[_LATE_KEYS], 0), layers)
        others = [rule for rule in policy if not _LATE_KEY_RULE.fullmatch(rule[0])]
        policy = [(f"blocks.{block}.attn.c_k.*", "fp16") for block in late] + others
    if _EMBEDDING in values:
        policy = [("tok_emb.*", values[_EMBEDDING]), ("lm_head.*", values[_EMBEDDING]), *policy]
    return policy


# ---- Readers: from a variable's text to its value.


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("must be 0 or 1")
    return text == "1"


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise ValueError("must be an integer of at least 0")
    return number


def _list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _embedding(text: str) -> str:
    if text not in ("fp16", "int6", "int8"):
        raise ValueError("must be one of fp16, int6, int8")
    return text


_PARSERS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": _switch, "list[str]": _list}

_FIELDS: dict[str, Field[Any]] = {
    f"{table}.{item.name}": item
    for table, kind in (("model", ModelConfig), ("train", TrainConfig), ("eval", EvalConfig), ("export", ExportConfig))
    for item in fields(kind)
}


def _key(key: str, note: str = "") -> Variable:
    """A variable that sets one configuration key; the key's own reader says which values are possible."""
    item = _FIELDS[key]
    parse = _PARSERS.get(str(item.type), str)

    def read(text: str) -> Any:
        if parse not in (int, float):
            return item.metadata["read"](parse(text))
        try:
            value: Any = parse(text)
        except ValueError:
            value = text  # no number at all: the reader's sentence fits it as well
        return item.metadata["read"](value)

    return Variable(key, note, read)


def _refusal(reason: str, *accepted: str, beside: tuple[str, ...] = ()) -> Variable:
    """A refused variable; ``accepted`` are the values that ask for what pgolf does anyway."""

    def read(text: str) -> None:
        if not _among(text, accepted):
            raise ValueError(reason)

    return Variable("", reason, read, accepted, beside)


def _among(text: str, accepted: tuple[str, ...]) -> bool:
    """Whether a text is one of some, as a number or as a word in any case."""
    if text.lower() in accepted:
        return True
    try:
        number = float(text)
    except ValueError:
        return False
    return any(_is_number(other, number) for other in accepted)


def _is_number(text: str, number: float) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False


def _compared(reason: str, agrees: Callable[[float, Config], bool], *off: str) -> Variable:
    """A refused variable that must hold what the configuration says; ``off``: texts that do for any."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(reason)
        return number

    return Variable("", reason, read, off, agrees=agrees)


def _starts_never(off: str, layer: float, config: Config) -> bool:
    return layer == float(off) or layer >= config.model.num_layers


def _lacking(lack: Lack) -> Iterator[tuple[str, Variable]]:
    """The variables of a thing that pgolf has not."""
    switches = {}
    for switch in lack.switches.split():
        name, _, texts = switch.partition("=")
        switches[name] = tuple(texts.split("|")) if texts else OFF
    for name, accepted in switches.items():
        takes = "0 (off)" if accepted is OFF else " or ".join(accepted)
        yield name, _refusal(f"{lack.because}, so it must be {takes}", *accepted)
    neutral = [f"{name}={accepted[0]}" for name, accepted in switches.items()]
    remedy = f"it is without effect beside {' or '.join(neutral)}" if neutral else "unset it"
    for name in lack.parameters.split():
        yield name, _refusal(f"{lack.because}; {remedy}", beside=tuple(switches))


# ---- The table

# Variables whose names are the keys', in upper case.
_NAMESAKES = {
    "model": (
        "VOCAB_SIZE NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT TIE_EMBEDDINGS TIED_EMBED_INIT_STD "
        "LOGIT_SOFTCAP ROPE_BASE QK_GAIN_INIT BIGRAM_VOCAB_SIZE BIGRAM_DIM ROPE_DIMS LN_SCALE LOOP_START LOOP_END "
        "NUM_LOOPS"
    ),
    "train": (
        "DATA_PATH TOKENIZER_PATH SEED ITERATIONS MAX_WALLCLOCK_SECONDS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN EMBED_LR "
        "TIED_EMBED_LR HEAD_LR MATRIX_LR SCALAR_LR MUON_MOMENTUM MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS "
        "MUON_BACKEND_STEPS MUON_WEIGHT_DECAY WEIGHT_DECAY BETA1 BETA2 ADAM_EPS GRAD_CLIP_NORM WARMDOWN_ITERS "
        "WARMUP_STEPS SWA_ENABLED SWA_START_FRAC SWA_EVERY QAT_START_FRAC VAL_LOSS_EVERY TRAIN_LOG_EVERY "
        "EMA_DECAY WARMDOWN_FRAC WARMDOWN_SHAPE GRAD_ACCUM_STEPS CHECKPOINT_EVERY ENABLE_LOOPING_AT MUON_ROW_NORMALIZE"
    ),
    "eval": "EVAL_SEQ_LEN EVAL_BATCH_SEQS TTT_LORA_RANK TTT_LORA_LR TTT_CHUNK_SIZE TTT_EVAL_SEQ_LEN TTT_BATCH_SIZE",
}

_ONE_PROCESS = "the script trains in one process, so it must be {}"

VARIABLES: dict[str, Variable] = {
    "RECIPE": Variable("the built-in recipe whose values hold where a variable is unset", "default: base", str),
    "RUN_ID": Variable("the names of the run folder and the log", "default: a random one", str),
    "LOAD_MODEL_PATH": Variable(
        "the file whose weights are scored, in place of a training run",
        "a .pt, .safetensors or .ptz file, an artifact or a checkpoint; empty: train",
        str,
    ),
    **{name: _key(f"{table}.{name.lower()}") for table, names in _NAMESAKES.items() for name in names.split()},
    "VAL_BATCH_SIZE": _key("train.val_batch_tokens", "in tokens, as in the scripts"),
    "ADAM_WEIGHT_DECAY": _key("train.weight_decay", "#286, #289 and #997's name of WEIGHT_DECAY"),
    "MUON_WD": _key("train.muon_weight_decay", "#289's name of MUON_WEIGHT_DECAY"),
    "ADAM_WD": _key("train.weight_decay", "the later scripts' name of WEIGHT_DECAY"),
    "NEGATIVE_SLOPE": _key("model.mlp_negative_slope"),
    "MLP_LEAKY_SLOPE": _key("model.mlp_negative_slope"),
    **{
        name: Variable(_COEFFICIENTS, "1: polar_express; 0: the recipe's", _switch)
        for name in ("POLAR_EXPRESS", "USE_POLAR_EXPRESS")
    },
    "GRAD_CLIP": _key("train.grad_clip_norm"),
    "WARMDOWN_FRACTION": _key("train.warmdown_frac"),
    "LR_SCHEDULE": _key("train.warmdown_shape"),
    "VAL_BATCH_TOKENS": _key("train.val_batch_tokens"),
    "SLIDING_BATCH_SIZE": _key("eval.eval_batch_seqs"),
    "SW_EVAL_BATCH": _key("eval.eval_batch_seqs"),
    "BIGRAM_BUCKETS": _key("model.bigram_vocab_size"),
    "BIGRAM_HASH_BUCKETS": _key("model.bigram_vocab_size"),
    "BIGRAM_HASH_DIM": _key("model.bigram_dim"),
    "SMEAR_GATE_BOS_FIX": _key("model.smear_reset_at_bos"),
    "PRUNE_FRAC": _key("export.prune"),
    "CONTROL_TENSOR_NAME_PATTERNS": _key(
        "export.control_patterns", "comma-separated; for the export alone, the optimizers' groups are docs/spec.md §1's"
    ),
    "EVAL_STRIDE": Variable(_STRIDE, "0, or at least the context: standard windows", _count),
    "SLIDING_EVAL_STRIDE": Variable(_STRIDE, "as EVAL_STRIDE", _count),
    **{name: Variable(_SLIDING, "0: standard windows", _switch) for name in ("SLIDING_EVAL", "SLIDING_WINDOW_ENABLED")},
    **{
        name: Variable(_EMA, f"0: none; 1: EMA_DECAY, else the recipe's, else {_EMA_DECAY}", _switch)
        for name in ("EMA_ENABLED", "USE_EMA", "EMA")
    },
    **{
        name: Variable(_BIGRAM, "0: no bigram table; 1: the recipe's", _switch)
        for name in ("USE_BIGRAM_HASH", "BIGRAM_HASH", "BIGRAM_ENABLED")
    },
    "DATA_DIR": Variable(
        _DATA,
        "its datasets/fineweb10B_spVOCAB_SIZE and tokenizers/fineweb_VOCAB_SIZE_bpe.model, where DATA_PATH and "
        "TOKENIZER_PATH are unset",
        str,
    ),
    **{
        name: Variable(_QAT, f"0: never; 1: the recipe's start, else {_QAT_START}", _switch)
        for name in ("QAT_ENABLED", "QAT", "LATE_QAT")
    },
    "FP16_KEEP_NAME_PATTERNS": Variable(
        _FP16_PATTERNS, "comma-separated parts of names, in place of the recipe's first fp16 rules", _list
    ),
    "FP16_PASSTHROUGH_PATTERNS": Variable(_FP16_PATTERNS, "as FP16_KEEP_NAME_PATTERNS", _list),
    "KEEP_LAST_K_FP16": Variable(_LATE_KEYS, "the c_k matrices of so many last blocks are fp16", _count),
    "EMBED_QUANT": Variable(_EMBEDDING, "fp16, int6 or int8", _embedding),
    **{
        name: Variable(_EMBEDDING, "1: fp16, 0: int8", lambda text: "fp16" if _switch(text) else "int8")
        for name in ("FP16_EMBED", "FP16_EMBED_EXPORT")
    },
    "INT6_ENABLED": _refusal(
        "encodings are the policy's: choose a RECIPE, or write an [export] policy and run pgolf train --config", "1"
    ),
    "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS": _refusal(
        "it belongs to the scripts' plain int8 export; CONTROL_TENSOR_NAME_PATTERNS says which tensors stay fp32"
    ),
    "NUM_UNIQUE_LAYERS": _refusal("every block has its own weights, so it must be 0", "0"),
    "REQUIRE_ZSTD": _refusal("artifacts are always zstd's, so it must be 0 or 1", "0", "1"),
    "SMEARGATE_ENABLED": _refusal("the model always has its smear gate, so it must be 1", "1"),
    "RANK": _refusal(_ONE_PROCESS.format(0), "0"),
    "LOCAL_RANK": _refusal(_ONE_PROCESS.format(0), "0"),
    "WORLD_SIZE": _refusal(_ONE_PROCESS.format(1), "1"),
    **{name: variable for lack in LACKS for name, variable in _lacking(lack)},
    "ROPE_TRAIN_SEQ_LEN": _compared(
        "RoPE is not rescaled for longer contexts, so it must be at least TRAIN_SEQ_LEN and EVAL_SEQ_LEN",
        lambda length, config: length >= max(config.train.train_seq_len, config.eval_seq_len),
    ),
    **{
        name: _compared(
            f"a block's attention and MLP run one after the other, so it must be {off} or at least NUM_LAYERS",
            partial(_starts_never, off),
            off,
        )
        for name, off in (("PARALLEL_START_LAYER", "0"), ("PARALLEL_RESIDUAL_START", "-1"))
    },
    **{
        name: _compared(
            "embeddings have the model's own width, so it must be 0 or MODEL_DIM",
            lambda width, config: width in (0, config.model.model_dim),
        )
        for name in ("EMBED_DIM", "EMBEDDING_DIM")
    },
    "MLP_HIDDEN": _compared(
        "the hidden width is MLP_MULT times MODEL_DIM, so it must be 0 or that",
        lambda width, config: width in (0, config.model.mlp_hidden),
    ),
    **{
        name: _compared(
            "blocks run again by NUM_LOOPS, LOOP_START and LOOP_END, so it must be 0 or NUM_LAYERS",
            lambda layers, config: layers in (0, config.model.num_layers),
        )
        for name in ("NUM_UNIQUE_BLOCKS", "NUM_VIRTUAL_LAYERS", "EFFECTIVE_DEPTH")
    },
    "EMBED_WD": _compared(
        "embeddings decay as all AdamW tensors do, so it must be what ADAM_WD (train.weight_decay) is",
        lambda decay, config: decay == config.train.weight_decay,
    ),
    **{
        name: _compared(
            "late QAT starts at a share of the run, QAT_START_FRAC, so it must be 0, with QAT_ENABLED=0",
            lambda threshold, config: threshold == 0 and config.train.qat_start_frac == 1,
        )
        for name in ("LATE_QAT_THRESHOLD", "QAT_THRESHOLD")
    },
    **{
        name: Variable("", reason, str, without_effect=True)
        for reason, names in NO_EFFECT.items()
        for name in names.split()
    },
}
"""Every known variable by name, in the order in which they are read."""
