"""The environment variables of the public training scripts, as configuration (examples/train_gpt.py reads them).

``VARIABLES`` holds every variable that the reference `train_gpt.py`, the merged 10-layer script (openai/parameter-golf
#180) and the scripts of #286, #289, #465, #560 and #997 read. Each one sets configuration keys or is refused with the
reason. An unset variable leaves the recipe's value; the scripts' own defaults are in the recipes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from itertools import dropwhile
from typing import Any

from pgolf.config import Config, EvalConfig, ExportConfig, ModelConfig, TrainConfig

_Policy = list[tuple[str, str]]

# How alike an unknown variable must be to a known one to count as its typo, on difflib's scale from 0 to 1. ITERATION
# reaches 0.95, MATRIX_LRR 0.95; WORLD_SIZE and torchrun's LOCAL_WORLD_SIZE only 0.77.
_TYPO = 0.85


@dataclass(frozen=True)
class Variable:
    """What one environment variable is to pgolf.

    sets: the configuration keys that it sets, or what else it names; empty: it is refused.
    note: how its value is translated, or the reason of the refusal; may be empty.
    read: takes the variable's text, returns the value, raises ValueError("must be ...") or with the reason.
    """

    sets: str
    note: str
    read: Callable[[str], Any]

    @property
    def refused(self) -> bool:
        """Whether pgolf has no such thing; a value that asks for what pgolf does anyway passes nevertheless."""
        return not self.sets


def config_from_environment(environ: Mapping[str, str], base: str = "base") -> tuple[Config, list[str]]:
    """The configuration that the variables ask for, and a warning for each unknown one that looks like a known one.

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
    problems = []
    for name, variable in VARIABLES.items():
        if name not in environ:
            continue
        try:
            value = variable.read(environ[name].strip())
        except ValueError as error:
            problems.append(f"{name} = {environ[name]!r}: {error}")
            continue
        if variable.refused:
            continue
        if values.setdefault(variable.sets, value) != value:
            other = sources[variable.sets]
            problems.append(f"{name} = {environ[name]!r}: {other} sets {variable.sets} too, to another value")
        sources.setdefault(variable.sets, name)
    if problems:
        raise ValueError("The environment asks for what cannot be done: " + "; ".join(problems) + ".")
    try:
        return recipe.override(_translate(values, recipe)), _typos(environ)
    except ValueError as error:
        named = [f"{name} sets {key}" for key, name in sources.items() if key in str(error)]
        raise ValueError(f"{error}\nIn the environment, {', '.join(named)}.") from None


def _typos(environ: Mapping[str, str]) -> list[str]:
    warnings = []
    for name in sorted(environ.keys() - VARIABLES.keys()):
        if near := difflib.get_close_matches(name.upper(), VARIABLES, n=1, cutoff=_TYPO):
            warnings.append(f"The environment variable {name} is unknown and has no effect; did you mean {near[0]}?")
    return warnings


# ---- Translation: from what the variables say to configuration keys, where one is not the other.

_STRIDE, _QAT = "eval.method, eval.eval_stride", "train.qat_start_frac (on or off)"
_FP16_PATTERNS, _LATE_KEYS, _EMBEDDING = (
    "export.policy (the fp16 rules)",
    "export.policy (the last blocks' keys)",
    "export.policy (embedding and head)",
)
_LATE_KEY_RULE = re.compile(r"blocks\.\d+\.attn\.c_k\.\*")
_QAT_START = 0.85
"""Where late QAT begins if it is switched on in a recipe that has none: the default of #286, which brought it."""


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
    if _QAT in values:
        start = keys.get("train.qat_start_frac", recipe.train.qat_start_frac)
        keys["train.qat_start_frac"] = 1.0 if not values[_QAT] else start if start < 1 else _QAT_START
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


def _refusal(reason: str, *accepted: str) -> Variable:
    """A refused variable; ``accepted`` are the values that ask for what pgolf does anyway."""

    def read(text: str) -> None:
        if text not in accepted:
            raise ValueError(reason)

    return Variable("", reason, read)


# ---- The table

# Variables whose names are the keys', in upper case.
_NAMESAKES = {
    "model": (
        "VOCAB_SIZE NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT TIE_EMBEDDINGS TIED_EMBED_INIT_STD "
        "LOGIT_SOFTCAP ROPE_BASE QK_GAIN_INIT BIGRAM_VOCAB_SIZE BIGRAM_DIM"
    ),
    "train": (
        "DATA_PATH TOKENIZER_PATH SEED ITERATIONS MAX_WALLCLOCK_SECONDS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN EMBED_LR "
        "TIED_EMBED_LR HEAD_LR MATRIX_LR SCALAR_LR MUON_MOMENTUM MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS "
        "MUON_BACKEND_STEPS MUON_WEIGHT_DECAY WEIGHT_DECAY BETA1 BETA2 ADAM_EPS GRAD_CLIP_NORM WARMDOWN_ITERS "
        "WARMUP_STEPS SWA_ENABLED SWA_START_FRAC SWA_EVERY QAT_START_FRAC VAL_LOSS_EVERY TRAIN_LOG_EVERY"
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
    "PRUNE_FRAC": _key("export.prune"),
    "CONTROL_TENSOR_NAME_PATTERNS": _key(
        "export.control_patterns", "comma-separated; for the export alone, the optimizers' groups are docs/spec.md §1's"
    ),
    "EVAL_STRIDE": Variable(_STRIDE, "0, or at least the context: standard windows", _count),
    "QAT_ENABLED": Variable(_QAT, f"0: never; 1: the recipe's start, else {_QAT_START}", _switch),
    "FP16_KEEP_NAME_PATTERNS": Variable(
        _FP16_PATTERNS, "comma-separated parts of names, in place of the recipe's first fp16 rules", _list
    ),
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
}
"""Every known variable by name, in the order in which they are read."""
