"""The environment variables of the public training scripts, as configuration (examples/train_gpt.py reads them).

``VARIABLES`` holds every variable that the public scripts read (tests/public_variables.json, which
dev/collect_variables.py collects from them). Each one sets configuration keys; or is refused with the reason, unless it
holds what pgolf does anyway; or changes nothing, and is named in a warning. An unset variable leaves the recipe's
value; the scripts' own defaults are in the recipes.
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

    sets: the configuration keys that it sets, or what else it names; empty: it is refused, or without effect.
    note: how its value is translated, or the reason of the refusal; may be empty.
    read: takes the variable's text, returns the value, raises ValueError("must be ...") or with the reason.
    idle: it is without effect, and a warning says so.
    """

    sets: str
    note: str
    read: Callable[[str], Any]
    idle: bool = False

    @property
    def refused(self) -> bool:
        """Whether pgolf has no such thing; a value that asks for what pgolf does anyway passes nevertheless."""
        return not self.sets and not self.idle


def config_from_environment(environ: Mapping[str, str], base: str = "base") -> tuple[Config, list[str]]:
    """The configuration that the variables ask for, and warnings: one that names the variables without effect, and one
    for each unknown variable that looks like a known one.

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
    problems, idle = [], []
    for name, variable in VARIABLES.items():
        if name not in environ:
            continue
        if variable.idle or _switched_off(name, environ):
            idle.append(name)
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
        return recipe.override(_translate(values, recipe)), [*_without_effect(idle), *_typos(environ)]
    except ValueError as error:
        found = (re.split(r"[ ,]", key)[0] for key in sources)
        named = [f"{name} sets {key}" for key, name in zip(found, sources.values(), strict=True) if key in str(error)]
        raise ValueError(f"{error}\nIn the environment, {', '.join(named)}.") from None


def _switched_off(name: str, environ: Mapping[str, str]) -> bool:
    """Whether a variable is a setting of something that another one switches off."""
    feature = _SETTINGS.get(name)
    return feature is not None and any(
        environ[switch].strip() in (*_OFF, *accepted)
        for switch, accepted in feature.switches.items()
        if switch in environ
    )


def _without_effect(names: list[str]) -> list[str]:
    if not names:
        return []
    one = len(names) == 1
    return [
        f"The environment variable{'s' * (not one)} {', '.join(names)} {'has' if one else 'have'} no effect in pgolf."
    ]


def _typos(environ: Mapping[str, str]) -> list[str]:
    warnings = []
    for name in sorted(environ.keys() - VARIABLES.keys()):
        if near := difflib.get_close_matches(name.upper(), VARIABLES, n=1, cutoff=_TYPO):
            warnings.append(f"The environment variable {name} is unknown and has no effect; did you mean {near[0]}?")
    return warnings


# ---- Translation: from what the variables say to configuration keys, where one is not the other.

_STRIDE, _QAT = "eval.method, eval.eval_stride", "train.qat_start_frac (on or off)"
_EMA, _SLIDES = "train.ema_decay (on or off)", "eval.method (sliding or standard)"
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
    if _SLIDES in values:
        if not values[_SLIDES]:
            keys["eval.method"] = "standard"
        elif keys.get("eval.method", "sliding") != "sliding":
            raise ValueError("eval.method: sliding windows are asked for, and a stride that does not slide.")
        else:
            keys["eval.method"] = "sliding"
    if _EMA in values:
        decay = keys.get("train.ema_decay", recipe.train.ema_decay)
        if values[_EMA] and decay == 0:
            raise ValueError("train.ema_decay is 0, although an average is asked for: set EMA_DECAY too.")
        keys["train.ema_decay"] = decay if values[_EMA] else 0.0
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


# ---- What pgolf lacks

_OFF = ("", "0", "0.0", "false", "False", "none", "None", "no", "off")


@dataclass(frozen=True)
class Feature:
    """Something that public scripts have and pgolf lacks.

    lacks: what, for the sentence of a refusal. switches: variables that turn it on or off, passed where they turn it
    off, and what they may hold beside the usual words for that. settings: variables that matter only where it is on;
    passed where they hold nothing, or where a switch says that it is off.
    """

    lacks: str
    switches: Mapping[str, tuple[str, ...]]
    settings: tuple[str, ...] = ()


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _feature(lacks: str, switches: str, settings: str = "", **more: tuple[str, ...]) -> Feature:
    return Feature(lacks, {**dict.fromkeys(_names(switches), ()), **more}, _names(settings))


FEATURES = (
    _feature("attention that leaves the position's own value out (XSA)", "USE_XSA XSA_LAST_N"),
    _feature(
        "gates on the outputs of attention or of the MLP",
        "ATTN_OUT_GATE_ENABLED GATED_ATTN_ENABLED GATED_ATTN GATED_ATTENTION SPARSE_ATTN_GATE_ENABLED DTG_ENABLED "
        "GATE_ATTN_OUT GATE_MLP_OUT",
        "ATTN_OUT_GATE_SRC GATED_ATTN_INIT_STD GATED_ATTN_QUANT_GATE GATE_WINDOW GATE_WIDTH GATE_ATTN_SRC "
        "SPARSE_ATTN_GATE_INIT_STD SPARSE_ATTN_GATE_SCALE",
    ),
    _feature("rotation of a part of each head", "ROPE_DIMS"),
    _feature(
        "other positions than plain RoPE",
        "ROPE_YARN EVAL_NTK_ALPHA",
        "YARN_MAX_LEN",
        ROPE_TYPE=("rope",),
    ),
    _feature("norms scaled by the layer", "LN_SCALE"),
    _feature("gates on the skips of the U-Net", "SKIP_GATES_ENABLED"),
    _feature(
        "layers that run several times",
        "NUM_LOOPS RECUR_LAYERS UNTIE_LOOP_MLPS UNTIE_AT_FRACTION REPEAT_UNTIE_MLP REPEAT_UNTIE_MLP_LAYERS",
        "LOOP_START LOOP_END ENABLE_LOOPING_AT LOOP_PHASE2_AT LOOP_LAYER_BITS LOOP_LAYER_CLIP_SIGMAS "
        "RECUR_START_STEP RECUR_WARMUP_STEPS EFFECTIVE_DEPTH NUM_UNIQUE_BLOCKS NUM_VIRTUAL_LAYERS NUM_LIGHT_BLOCKS "
        "DEPTH_LORA_RANK LORA_RANK BANK_SPLIT",
        EVAL_DEPTH_RECURRENCE=("1",),
        TRAINING_DEPTH_RECURRENCE=("1",),
    ),
    _feature(
        "blocks whose attention and MLP run side by side",
        "PARALLEL_RESIDUAL PARALLEL_START_LAYER",
        "PARALLEL_FINAL_LANE PARALLEL_START_LAYER_IS_PHYSICAL",
        PARALLEL_RESIDUAL_START=("-1",),
    ),
    _feature("embeddings added to values", "VE_ENABLED VALUE_RESIDUAL", "VE_DIM VE_LAYERS"),
    _feature("an embedding narrower than the model", "EMBED_DIM", "EMBED_INNER_DIM EMBEDDING_DIM"),
    _feature("another activation than ReLU²", "NEGATIVE_SLOPE BINARIZE_ACTIVATIONS", ACTIVATION=("relu2",)),
    _feature("a hidden width that MLP_MULT does not give", "MLP_HIDDEN MLP_GROUPS MLP_RANK"),
    _feature(
        "other attention, blocks or heads",
        "DIFF_ATTN ATTN_RES TRIGRAM BIGRAM_HASH CANON_AC_LAYERS DISABLE_LAYER0_ATTN REFINER OUTER_LAYERS "
        "TVERSKY_FEATURE_POOLS LATENT_KV_DIM GDN_LAYERS USE_WRAP ASYM_LOGIT_RESCALE ASYMMETRIC_LOGIT",
        "REFINER_KERNEL TVERSKY_MEMBERSHIP TVERSKY_NUM_FEATURES GDN_CONV_SIZE GDN_EXPAND_V GDN_HEAD_DIM_RATIO "
        "GDN_N_HEADS HNET_LR_DIFF RATIO_LOSS_WEIGHT TARGET_AVG_CHUNK_LEN WRAP_INIT_SCALE LEGENDRE_DEGREE_ATTN "
        "LEGENDRE_DEGREE_FFN LEGENDRE_GROUPS COEFF_LR_BASE COEFF_LR_SCALE BIGRAM_BUCKETS BIGRAM_HASH_BUCKETS "
        "BIGRAM_HASH_DIM INDEPENDENT_LR",
        ATTN_PROJ_TYPE=("standard",),
        ATTN_VARIANT=("standard",),
        BLOCK_TYPE=("standard",),
        LOGIT_HEAD_TYPE=("standard",),
        SOFTCAP_TYPE=("tanh",),
    ),
    _feature(
        "another gate than the smear of every channel, which the model always has",
        "",
        "SMEAR_GATE_WIDTH SMEAR_GATE_BOS_FIX",
    ),
    _feature(
        "losses beside the next token's",
        "MTP_NUM_HEADS MTP_HEADS",
        "MTP_LOSS_WEIGHT JEPA_WEIGHT JEPA_PURE_FRAC CE_PURE_FRAC CE_WEIGHT SIGREG_WEIGHT CORR_WEIGHT_LR",
    ),
    _feature(
        "other optimizers than Muon and AdamW as docs/spec.md §3 has them",
        "MUON_ROW_NORMALIZE POLAR_EXPRESS USE_POLAR_EXPRESS USE_GRAM_NS MUON_HUBER_WD BLOCK_LARS_TRUST CAUTIOUS_WD "
        "SIGN_COMPRESS_REG EGGROLL_LORA_RANK",
        "MUON_BETA2 MUON_HUBER_DELTA MUON_COOLDOWN_START MUON_COOLDOWN_END BLOCK_LARS_MIN_SCALE ADAM_LR "
        "MATRIX_LR_EARLY MATRIX_LR_LATE EGGROLL_LOAD EGGROLL_LR EGGROLL_RANK EGGROLL_SIGMA EGGROLL_LAYERS POP_SIZE "
        "FITNESS_SHAPING",
        MATRIX_OPTIMIZER=("muon",),
    ),
    _feature(
        "other schedules than a warmdown to zero",
        "MIN_LR LR_WARMUP_STEPS FORCE_STOP_STEP MIDRUN_CAP_SCHEDULE QK_GAIN_INIT_SCHEDULE",
        "LR_START WD_TAPER_FINAL_MULT WD_TAPER_START_FRAC MIDRUN_CAP_LOG_UPDATES",
        LR_SCHEDULE=("linear",),
    ),
    _feature(
        "lengths and batches that change while a run goes on",
        "SEQ_LEN_SCHEDULE SEQ_LEN_START BATCH_TOKENS_START TRAIN_SEQ_SCHEDULE SKIP_TOKENS",
        "SEQ_SCHEDULE_FRACTION BATCH_SCHEDULE_FRACTION TRAIN_SEQ_SCHEDULE_MODE SEQ_CHANGE_WARMUP_STEPS",
    ),
    _feature(
        "averages other than SWA_ENABLED's and EMA_DECAY's",
        "LAWA_ENABLED",
        "LAWA_FREQ LAWA_K SWA_DECAY EMA_START_FRACTION",
    ),
    _feature(
        "quantisation-aware training other than QAT_ENABLED and QAT_START_FRAC",
        "LATE_QAT QAT QAT_INT6 QAT_AFTER_STEP QAT_FRACTION LATE_QAT_THRESHOLD",
        "QAT_BITS QAT_THRESHOLD",
    ),
    _feature(
        "GPTQ and quantisers other than those of docs/spec.md §4",
        "GPTQ_ENABLED USE_GPTQ LQER_ENABLED LQER_ASYM_ENABLED AWQ_LITE_ENABLED OPTROT_ENABLED HESSIAN_CLIP_LAMBDA "
        "FP_STORAGE XNOR_GROUP_SIZE BITNET_GROUP_SIZE",
        "GPTQ_CALIBRATION_BATCHES GPTQ_RESERVE_SECONDS GPTQ_RESERVE_MS GPTQ_CALIB_SAMPLES GPTQ_CALIB_BATCHES "
        "GPTQ_DAMP GPTQ_CALIBRATION_MODE GPTQ_AR_SELFGEN GPTQ_BATCH_SIZE GPTQ_BLOCK_SIZE GPTQ_TEMPERATURE "
        "LQER_ASYM_GROUP LQER_FACTOR_BITS LQER_RANK LQER_TOP_K LQER_GAIN_SELECT LQER_SCOPE AWQ_LITE_BITS "
        "AWQ_LITE_GROUP_SIZE AWQ_LITE_GROUP_TOP_K EMBED_BITS EMBED_CLIP_SIGMAS MATRIX_BITS ATTN_CLIP_SIGMAS "
        "MLP_CLIP_SIGMAS CLIP_MULT_EARLY CLIP_MULT_LATE CLIP_MULT_LOOP CLIP_MULT_MID QUANT_BITS QUANT_CLIP_RANGE "
        "QUANT_CONFIG SCALE_STORAGE N_INT6_LAYERS INT4_LAYERS INT4_STEP INT5_LAYERS INT6_LAYERS INT6_LAYER_END "
        "INT6_LAYER_START INT6_STEP INT8_FULL_RANGE_PATTERNS FP16_PASSTHROUGH_PATTERNS MIXED_QUANT TARGET_MB "
        "PERGROUP_ROUNDTRIP_CHECK num_float_tensors num_tensors",
    ),
    _feature("compressors other than zstd and its own entropy coder", "", "ZSTD_LEVEL", COMPRESSOR=("zstd",)),
    _feature("the lossless transform of capitals (CaseOps)", "CASEOPS_ENABLED"),
    _feature(
        'test-time training other than document LoRA (eval.method = "ttt", RECIPE pr289)',
        "TTT_ENABLED PHASED_TTT_ENABLED TTT_ONLY TTT_ONLY_EVAL SLOT_ENABLED ETLB_ENABLED NGRAM_TILT_ENABLED",
        "TTT_BETA1 TTT_BETA2 TTT_GRAD_STEPS TTT_GRAD_STEPS_CLEAN TTT_K_LORA TTT_MLP_LORA TTT_O_LORA TTT_Q_LORA "
        "TTT_V_LORA TTT_OPTIMIZER TTT_WEIGHT_DECAY TTT_LORA_ALPHA TTT_LORA_EMA_DECAY TTT_WARM_START_A "
        "TTT_CHUNK_TOKENS TTT_EPOCHS TTT_FREEZE_BLOCKS TTT_LR TTT_BATCH_SEQS TTT_GRAD_CLIP TTT_MOMENTUM "
        "TTT_DOC_LIMIT TTT_ENTROPY_HIGH TTT_ENTROPY_LOW TTT_LOCAL_LR_MULT TTT_MASK TTT_NS_STEPS TTT_SHORT_BETA2 "
        "TTT_SHORT_LORA_ENABLED TTT_SHORT_LORA_LR TTT_SHORT_LORA_RANK TTT_SHORT_SCORE_FIRST_ENABLED "
        "TTT_SHORT_SCORE_FIRST_STEPS TTT_SHORT_WEIGHT_DECAY TTT_TRAIN_MAX_DOC_LEN TTT_TRAIN_MIN_DOC_LEN "
        "TTT_UPDATE_EVERY TTT_WARM_START_MEAN_DOC_LEN TTT_WARM_START_MEAN_ENABLED TTT_WARM_START_MEAN_MOMENTUM "
        "GLOBAL_TTT_BATCH_SEQS GLOBAL_TTT_CHUNK_TOKENS GLOBAL_TTT_EPOCHS GLOBAL_TTT_GRAD_CLIP GLOBAL_TTT_LR "
        "GLOBAL_TTT_MOMENTUM GLOBAL_TTT_RESPECT_DOC_BOUNDARIES GLOBAL_TTT_WARMUP_CHUNKS GLOBAL_TTT_WARMUP_START_LR "
        "GLOBAL_TTT_DOC_LIMIT GLOBAL_TTT_MUON_NESTEROV GLOBAL_TTT_MUON_NS_STEPS GLOBAL_TTT_OPTIMIZER "
        "PHASED_TTT_PREFIX_DOCS PHASED_TTT_NUM_PHASES SLOT_LR SLOT_STEPS LORA_LR NGRAM_HINT_PRECOMPUTE_OUTSIDE "
        "AGREE_ADD_BOOST TOKEN_BOOST TOKEN_ORDER TOKEN_THRESHOLD WITHIN_BOOST WITHIN_TAU WORD_BOOST WORD_NORMALIZE "
        "WORD_ORDER WORD_TAU NGRAM_AGREE_BONUS NGRAM_BASE_BETA NGRAM_OPEN_TABLE_BITS NGRAM_ORDER_STRIDE "
        "NGRAM_WITHIN_BETA NGRAM_WITHIN_THRESHOLD NGRAM_WORD_BETA NGRAM_WORD_THRESHOLD ETLB_CLIP ETLB_LR ETLB_STEPS",
    ),
    _feature(
        "scores of a part of the validation data",
        "VAL_MAX_TOKENS VAL_MAX_BATCHES SKIP_POST_TRAIN_EVAL TEMP_SCALING",
        "TTT_EVAL_BATCHES",
        VAL_DOC_FRACTION=("1", "1.0"),
    ),
    _feature(
        "runs in parts (pgolf train --resume goes on with one, LOAD_MODEL_PATH scores weights)",
        "PREQUANT_ONLY TTT_EVAL_ONLY QUANTIZE_ONLY POST_GPTQ_EVAL_ONLY EVAL_ONLY_PATH EVAL_ONLY_QUANTIZED_PATH "
        "RESUME_FROM TTT_DEBUG_BYPASS",
    ),
    _feature("data that DATA_PATH does not name", "", "DATA_DIR DATASETS_DIR TRAIN_FILES VAL_FILES MODE"),
)
"""What public scripts have and pgolf lacks, each with the variables that say so."""

_WITHOUT_EFFECT = _names(
    "ARTIFACT_DIR CHECKPOINT_DIR MODEL_SAVE_PATH TTT_OUTPUT_DIR CHURN_LOG_EVERY COMPILE COMPILE_MODE COMPILE_MODEL "
    "COMPILE_SHAPE_WARMUP COMPILE_SHAPE_WARMUP_ITERS COMPILE_SHAPE_WARMUP_LOOP_MODES USE_COMPILE "
    "DYNAMO_CACHE_SIZE_LIMIT DYNAMO_ACCUMULATED_CACHE_SIZE_LIMIT FUSED_CE_ENABLED USE_INT8_KERNEL USE_TRITON_KERNEL "
    "SLIDING_BATCH_SIZE SW_EVAL_BATCH EVAL_BATCH_SIZE TTT_HEARTBEAT_SECONDS ROPE_TRAIN_SEQ_LEN MATRIX_CLIP_SIGMAS "
    "TTT_SHORT_DOC_LEN TTT_SHORT_CHUNK_SIZE SAVE_QUANT_STATE"
)
"""Variables that change neither model, training, bytes nor score: places of files, compilers, speed; and those that the
scripts themselves read and never use."""

_SETTINGS = {name: feature for feature in FEATURES for name in feature.settings}


def _absent(feature: Feature) -> dict[str, Variable]:
    """The variables of something that pgolf lacks."""
    found = {}
    for name in (*feature.switches, *feature.settings):
        accepted = feature.switches.get(name, ())
        usual = accepted[0] if accepted else "0"
        found[name] = _refusal(f"pgolf does not have {feature.lacks}, so it must be {usual}", *_OFF, *accepted)
    return found


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
    **{
        name: _refusal(
            "encodings are the policy's: choose a RECIPE, or write an [export] policy and run pgolf train --config", "1"
        )
        for name in ("INT6_ENABLED", "USE_INT6")
    },
    "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS": _refusal(
        "it belongs to the scripts' plain int8 export; CONTROL_TENSOR_NAME_PATTERNS says which tensors stay fp32"
    ),
    "NUM_UNIQUE_LAYERS": _refusal("every block has its own weights, so it must be 0", "0"),
    **{
        name: _refusal("artifacts are always zstd's, so it must be 0 or 1", "0", "1")
        for name in ("REQUIRE_ZSTD", "USE_ZSTD")
    },
    **{
        name: _refusal("the model always has its smear gate, so it must be 1", "1")
        for name in ("SMEARGATE_ENABLED", "USE_SMEARGATE", "SMEAR")
    },
    **{
        name: _refusal("the model always has its smear gate, for every channel, and no other: unset it")
        for name in ("SMEAR_GATE_ENABLED", "SMEAR_GATE")
    },
    "EVAL_INCLUDE_TAIL": _refusal("every token is scored, so it must be 1", "1"),
    "EMA_DECAY": _key("train.ema_decay"),
    **{name: Variable(_EMA, "0: none; 1: EMA_DECAY's", _switch) for name in ("EMA_ENABLED", "EMA", "USE_EMA")},
    "WARMDOWN_FRAC": _key("train.warmdown_frac"),
    "WARMDOWN_FRACTION": _key("train.warmdown_frac", "another name of WARMDOWN_FRAC"),
    "ADAM_WD": _key("train.weight_decay", "of scalars; pgolf has one decay for them and the embeddings"),
    "EMBED_WD": _key("train.weight_decay", "of embeddings; likewise"),
    "VAL_BATCH_TOKENS": _key("train.val_batch_tokens"),
    "CHECKPOINT_EVERY": _key("train.checkpoint_every"),
    "PRUNE_RATIO": _key("export.prune", "another name of PRUNE_FRAC"),
    **{name: Variable(_STRIDE, "as EVAL_STRIDE", _count) for name in ("STRIDE", "SLIDING_EVAL_STRIDE")},
    **{
        name: Variable(_SLIDES, "1: sliding windows, 0: standard ones", _switch)
        for name in ("SLIDING_WINDOW_ENABLED", "SLIDING_EVAL")
    },
    **{name: variable for feature in FEATURES for name, variable in _absent(feature).items()},
    **{name: Variable("", "without effect", str, idle=True) for name in _WITHOUT_EFFECT},
    "RANK": _refusal(_ONE_PROCESS.format(0), "0"),
    "LOCAL_RANK": _refusal(_ONE_PROCESS.format(0), "0"),
    "WORLD_SIZE": _refusal(_ONE_PROCESS.format(1), "1"),
}
"""Every known variable by name, in the order in which they are read."""
