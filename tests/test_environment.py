"""The public scripts' environment variables as configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pgolf.config import NEWTON_SCHULZ, Config
from pgolf.config.environment import VARIABLES, Variable, config_from_environment

# Variables that pgolf has known from the beginning: those of the reference train_gpt.py, of the merged 10-layer script
# (#180) and of #286, #289, #465, #560 and #997 in openai/parameter-golf.
SCRIPTS = re.findall(
    r"\w+",
    """
    ADAM_EPS ADAM_WEIGHT_DECAY BETA1 BETA2 BIGRAM_DIM BIGRAM_VOCAB_SIZE CONTROL_TENSOR_NAME_PATTERNS DATA_PATH EMBED_LR
    EMBED_QUANT EVAL_BATCH_SEQS EVAL_SEQ_LEN EVAL_STRIDE FP16_EMBED FP16_EMBED_EXPORT FP16_KEEP_NAME_PATTERNS
    GRAD_CLIP_NORM HEAD_LR INT6_ENABLED INT8_KEEP_FLOAT_FP32_NAME_PATTERNS ITERATIONS KEEP_LAST_K_FP16 LOAD_MODEL_PATH
    LOCAL_RANK LOGIT_SOFTCAP MATRIX_LR MAX_WALLCLOCK_SECONDS MLP_MULT MODEL_DIM MUON_BACKEND_STEPS MUON_MOMENTUM
    MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS MUON_WD MUON_WEIGHT_DECAY NUM_HEADS NUM_KV_HEADS NUM_LAYERS
    NUM_UNIQUE_LAYERS PRUNE_FRAC QAT_ENABLED QAT_START_FRAC QK_GAIN_INIT RANK REQUIRE_ZSTD ROPE_BASE RUN_ID SCALAR_LR
    SEED SMEARGATE_ENABLED SWA_ENABLED SWA_EVERY SWA_START_FRAC TIED_EMBED_INIT_STD TIED_EMBED_LR TIE_EMBEDDINGS
    TOKENIZER_PATH TRAIN_BATCH_TOKENS TRAIN_LOG_EVERY TRAIN_SEQ_LEN TTT_BATCH_SIZE TTT_CHUNK_SIZE TTT_EVAL_SEQ_LEN
    TTT_LORA_LR TTT_LORA_RANK VAL_BATCH_SIZE VAL_LOSS_EVERY VOCAB_SIZE WARMDOWN_ITERS WARMUP_STEPS WEIGHT_DECAY
    WORLD_SIZE
    """,
)

# What the public scripts read (dev/collect_variables.py): {variable: [scripts, default, ...]}.
PUBLIC: dict[str, list[int | str]] = json.loads(
    (Path(__file__).parent / "data" / "public_variables.json").read_text(encoding="utf-8")
)["variables"]

# The merged 10-layer script's own defaults, as text (its priming steps, which pgolf does not need, aside).
DEFAULTS_180 = {
    "SEED": "42",
    "VAL_BATCH_SIZE": "524288",
    "VAL_LOSS_EVERY": "500",
    "TRAIN_LOG_EVERY": "100",
    "ITERATIONS": "20000",
    "WARMDOWN_ITERS": "3000",
    "TRAIN_BATCH_TOKENS": "786432",
    "TRAIN_SEQ_LEN": "2048",
    "MAX_WALLCLOCK_SECONDS": "600.0",
    "QK_GAIN_INIT": "1.5",
    "VOCAB_SIZE": "1024",
    "NUM_LAYERS": "10",
    "NUM_KV_HEADS": "4",
    "MODEL_DIM": "512",
    "NUM_HEADS": "8",
    "MLP_MULT": "3.0",
    "TIE_EMBEDDINGS": "1",
    "ROPE_BASE": "10000.0",
    "LOGIT_SOFTCAP": "30.0",
    "EMBED_LR": "0.6",
    "HEAD_LR": "0.008",
    "TIED_EMBED_LR": "0.03",
    "TIED_EMBED_INIT_STD": "0.005",
    "MATRIX_LR": "0.02",
    "SCALAR_LR": "0.02",
    "MUON_MOMENTUM": "0.99",
    "MUON_BACKEND_STEPS": "5",
    "MUON_MOMENTUM_WARMUP_START": "0.92",
    "MUON_MOMENTUM_WARMUP_STEPS": "1500",
    "BETA1": "0.9",
    "BETA2": "0.95",
    "ADAM_EPS": "1e-8",
    "GRAD_CLIP_NORM": "0.3",
    "WEIGHT_DECAY": "0.04",
    "EVAL_STRIDE": "64",
    "EVAL_BATCH_SEQS": "32",
    "BIGRAM_VOCAB_SIZE": "10240",
    "BIGRAM_DIM": "128",
    "SWA_ENABLED": "1",
    "SWA_START_FRAC": "0.4",
    "SWA_EVERY": "50",
}


def changes(recipe: str = "base", **environ: str) -> dict[str, object]:
    """The keys in which the environment's configuration differs from the recipe's, without a warning."""
    config, warnings = config_from_environment(environ, recipe)
    assert warnings == []
    before, after = Config.from_recipe(environ.get("RECIPE", recipe)).to_dict(), config.to_dict()
    return {
        f"{table}.{key}": value
        for table, values in after.items()
        for key, value in values.items()
        if value != before[table][key]
    }


def policy(recipe: str = "base", **environ: str) -> list[tuple[str, str]]:
    return config_from_environment(environ, recipe)[0].export.policy


def refusal(**environ: str) -> str:
    with pytest.raises(ValueError) as caught:
        config_from_environment(environ)
    return str(caught.value)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_variable_of_the_scripts_is_mapped_or_refused_with_a_reason(name: str) -> None:
    variable = VARIABLES[name]
    assert variable.sets or len(variable.note.split()) > 5
    if variable.refused:
        assert f"{name} = '7': {variable.note}" in refusal(**{name: "7"})


def test_every_collected_variable_has_a_verdict() -> None:
    assert [name for name in PUBLIC if name not in VARIABLES] == []
    for name, variable in VARIABLES.items():
        assert isinstance(variable, Variable) and variable.sets + variable.note
        assert (bool(variable.sets), variable.refused, variable.without_effect).count(True) == 1, name
        assert re.fullmatch(r"[A-Z][A-Z0-9_]*", name)


REFUSED = {name: variable for name, variable in VARIABLES.items() if variable.refused}
# Refused unless the configuration says the same: one value that does, for the base recipe.
AGREEING = {
    "ROPE_TRAIN_SEQ_LEN": ["2048", "4096"],
    "PARALLEL_START_LAYER": ["0", "10", "11"],
    "PARALLEL_RESIDUAL_START": ["-1", "10"],
    "EMBED_DIM": ["0", "512"],
    "EMBEDDING_DIM": ["0", "512"],
    "MLP_HIDDEN": ["0", "1536"],
    "NUM_UNIQUE_BLOCKS": ["0", "10"],
    "NUM_VIRTUAL_LAYERS": ["0", "10"],
    "EFFECTIVE_DEPTH": ["0", "10"],
    "EMBED_WD": ["0.04", "4e-2"],
    "LATE_QAT_THRESHOLD": ["0", "0.0"],
    "QAT_THRESHOLD": ["0"],
}


@pytest.mark.parametrize("spelt", [str, str.upper, str.title, " {} ".format])
def test_every_refused_variable_passes_with_what_pgolf_does_anyway(spelt: Callable[[str], str]) -> None:
    accepted = {name: [*variable.accepts, *AGREEING.get(name, [])] for name, variable in REFUSED.items()}
    for turn in range(max(map(len, accepted.values()))):
        environ = {name: spelt(texts[turn % len(texts)]) for name, texts in accepted.items() if texts}
        assert len(environ) > 100 and changes(**environ) == {}


@pytest.mark.parametrize("text", ["7", "-3.5", "on", "nan", "inf", "2 "])
def test_every_refused_variable_is_named_with_any_other_value(text: str) -> None:
    message = refusal(**dict.fromkeys(REFUSED.keys() - AGREEING.keys(), text))
    for name, variable in REFUSED.items():
        said = message if name not in AGREEING else refusal(**{name: text})
        assert f"{name} = {text!r}: {variable.note}" in said


def test_what_the_configuration_says_is_compared_with_the_configuration_that_results() -> None:
    assert AGREEING.keys() == {name for name, variable in VARIABLES.items() if variable.agrees}
    assert changes(EMBED_WD="0.5", ADAM_WD="0.5") == {"train.weight_decay": 0.5}
    assert "so it must be what ADAM_WD (train.weight_decay) is" in refusal(EMBED_WD="0.04", ADAM_WD="0.5")
    assert "LATE_QAT_THRESHOLD = '0': " in refusal(LATE_QAT_THRESHOLD="0", RECIPE="pr286")
    assert changes(LATE_QAT_THRESHOLD="0", RECIPE="pr286", QAT="0") == {"train.qat_start_frac": 1.0}


def test_a_parameter_of_a_thing_that_is_off_has_no_effect_and_joins_the_warning() -> None:
    beside = {name: variable for name, variable in REFUSED.items() if variable.beside}
    off = {switch: VARIABLES[switch].accepts[0] for variable in beside.values() for switch in variable.beside}
    config, (warning,) = config_from_environment({**dict.fromkeys(beside, "7"), **off})
    assert config == Config.from_recipe("base")
    assert warning == f"The environment variables {', '.join(sorted(beside))} have no effect in pgolf."
    for name, variable in beside.items():
        assert all(f"{switch}={off[switch]}" in variable.note for switch in variable.beside), name


def test_a_parameter_of_a_thing_that_is_on_is_refused_as_the_switch_is() -> None:
    message = refusal(LQER_ENABLED="1", LQER_RANK="4")
    assert "LQER_ENABLED = '1': " in message and "LQER_RANK = '4': " in message
    _, (warning,) = config_from_environment({"LQER_ENABLED": "0", "LQER_RANK": "4"})
    assert warning == "The environment variable LQER_RANK has no effect in pgolf."


@pytest.mark.parametrize(
    ("name", "value"),
    [("USE_XSA", "0"), ("XSA_LAST_N", "0.0"), ("USE_XSA", "False"), ("USE_XSA", ""), ("COMPRESSOR", "zstd")],
)
def test_off_is_written_in_many_ways(name: str, value: str) -> None:
    assert changes(**{name: value}) == {}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"XSA_LAST_N": "11"}, "'11': pgolf's attention has no XSA (exclusive self-attention), so it must be 0 (off)"),
        ({"USE_XSA": "1"}, "USE_XSA = '1': pgolf's attention has no XSA"),
        ({"COMPRESSOR": "brotli"}, "artifacts are always zstd's, at level 22, so it must be zstd"),
        ({"LQER_RANK": "4"}, "(LQER); it is without effect beside LQER_ENABLED=0"),
        ({"MUON_BETA2": "0.95"}, "MUON_BETA2 = '0.95': pgolf's Muon has no second moment; unset it"),
        ({"PARALLEL_START_LAYER": "8"}, "so it must be 0 or at least NUM_LAYERS"),
    ],
)
def test_a_refusal_says_what_pgolf_lacks_and_which_value_it_takes(environ: dict[str, str], message: str) -> None:
    assert message in refusal(**environ)


def test_all_variables_without_effect_are_in_one_warning() -> None:
    idle = sorted(name for name, variable in VARIABLES.items() if variable.without_effect)
    assert {"COMPILE_MODE", "FUSED_CE_ENABLED", "CHURN_LOG_EVERY"} < set(idle)
    config, (warning,) = config_from_environment(dict.fromkeys(idle, "x"))
    assert config == Config.from_recipe("base")
    assert warning == f"The environment variables {', '.join(idle)} have no effect in pgolf."


def test_a_name_that_only_a_script_would_give_is_told_to_be_unknown() -> None:
    config, warnings = config_from_environment({"TTT_WHOLLY_NEW_IDEA": "1", "SEED": "7"})
    assert config.train.seed == 7
    assert warnings == ["The environment variable TTT_WHOLLY_NEW_IDEA is unknown to pgolf and has no effect."]


def test_an_empty_environment_is_the_recipe() -> None:
    assert config_from_environment({}) == (Config.from_recipe("base"), [])
    assert config_from_environment({}, "pr289") == (Config.from_recipe("pr289"), [])
    assert config_from_environment({"RECIPE": "tiny"}, "pr289") == (Config.from_recipe("tiny"), [])


def test_the_merged_scripts_defaults_are_the_base_recipe() -> None:
    assert changes(**DEFAULTS_180) == {}
    assert DEFAULTS_180.keys() <= set(SCRIPTS)


@pytest.mark.parametrize(
    "name", [name for name, variable in VARIABLES.items() if re.fullmatch(r"\w+\.\w+", variable.sets)]
)
def test_a_mapped_variable_changes_the_keys_that_it_names_and_no_other(name: str) -> None:
    others = {
        "MLP_MULT": "2",
        "NUM_HEADS": "4",
        "TIE_EMBEDDINGS": "0",
        "SWA_ENABLED": "0",
        "QAT_ENABLED": "1",
        "EMBED_QUANT": "int6",
        "FP16_EMBED": "0",
        "FP16_EMBED_EXPORT": "0",
        "MUON_MOMENTUM_WARMUP_STEPS": "2",
        "BETA1": "0.5",
        "BETA2": "0.5",
        "TRAIN_BATCH_TOKENS": "1572864",
        "TRAIN_SEQ_LEN": "1024",
        "VAL_BATCH_SIZE": "4096",
        "MODEL_DIM": "256",
        "VAL_BATCH_TOKENS": "4096",
        "WARMDOWN_SHAPE": "cosine",
        "LR_SCHEDULE": "cosine",
        "GRAD_ACCUM_STEPS": "4",
        "EMA_DECAY": "0.5",
        "SMEAR_GATE_BOS_FIX": "1",
        "LN_SCALE": "1",
        "MUON_ROW_NORMALIZE": "1",
        "ENABLE_LOOPING_AT": "0.5",
        "EVAL_SEQ_LEN": "4096",
        "TTT_EVAL_SEQ_LEN": "4096",
    }
    value = others.get(name, "0.125" if "FRAC" in name or name.startswith("MUON_MOMENTUM") else "2")
    assert list(changes(**{name: value})) == [VARIABLES[name].sets.split(" ")[0]]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"ITERATIONS": "7"}, {"train.iterations": 7}),
        ({"ITERATIONS": " 1_000 "}, {"train.iterations": 1000}),
        ({"MATRIX_LR": "3e-2"}, {"train.matrix_lr": 0.03}),
        ({"MLP_MULT": "2"}, {"model.mlp_mult": 2.0}),
        ({"TIE_EMBEDDINGS": "0"}, {"model.tie_embeddings": False}),
        ({"DATA_PATH": "./data/x"}, {"train.data_path": "./data/x"}),
        ({"VAL_BATCH_SIZE": "4096"}, {"train.val_batch_tokens": 4096}),
        ({"ADAM_WEIGHT_DECAY": "0.01"}, {"train.weight_decay": 0.01}),
        ({"WEIGHT_DECAY": "0.01", "ADAM_WEIGHT_DECAY": "1e-2"}, {"train.weight_decay": 0.01}),
        ({"MUON_WD": "0.02"}, {"train.muon_weight_decay": 0.02}),
        ({"NEGATIVE_SLOPE": "0.5", "LN_SCALE": "1"}, {"model.mlp_negative_slope": 0.5, "model.ln_scale": True}),
        ({"ROPE_DIMS": "16", "NUM_LOOPS": "0"}, {"model.rope_dims": 16}),
        (
            {"NUM_LOOPS": "2", "LOOP_START": "3", "LOOP_END": "5", "ENABLE_LOOPING_AT": "0.35"},
            {
                "model.loop_start": 3,
                "model.loop_end": 5,
                "model.num_loops": 2,
                "train.enable_looping_at": 0.35,
            },
        ),
        ({"MUON_ROW_NORMALIZE": "1", "POLAR_EXPRESS": "0"}, {"train.muon_row_normalize": True}),
        ({"POLAR_EXPRESS": "1"}, {"train.muon_coefficients": [list(p) for p in NEWTON_SCHULZ["polar_express"]]}),
        ({"PRUNE_FRAC": "0"}, {"export.prune": 0.0}),
        ({"CONTROL_TENSOR_NAME_PATTERNS": "q_gain, ,smear"}, {"export.control_patterns": ["q_gain", "smear"]}),
        ({"QAT_ENABLED": "0", "QAT_START_FRAC": "0.5"}, {}),
        ({"QAT_ENABLED": "1", "QAT_START_FRAC": "0.5"}, {"train.qat_start_frac": 0.5}),
        ({"QAT_ENABLED": "1"}, {"train.qat_start_frac": 0.85}),
        ({"RECIPE": "pr286", "QAT_ENABLED": "1"}, {}),
        ({"RECIPE": "pr286", "QAT_ENABLED": "0"}, {"train.qat_start_frac": 1.0}),
        ({"EMA_DECAY": "0.9965"}, {"train.ema_decay": 0.9965}),
        ({"EMA_DECAY": "0.5", "EMA_ENABLED": "0"}, {}),
        ({"EMA_ENABLED": "1"}, {"train.ema_decay": 0.997}),
        ({"USE_EMA": "1", "EMA_DECAY": "0.5"}, {"train.ema_decay": 0.5}),
        ({"WARMDOWN_FRAC": "0.72"}, {"train.warmdown_frac": 0.72}),
        ({"USE_BIGRAM_HASH": "0"}, {"model.bigram_vocab_size": 0}),
        ({"USE_BIGRAM_HASH": "1", "BIGRAM_BUCKETS": "4096"}, {"model.bigram_vocab_size": 4096}),
        ({"LATE_QAT": "1"}, {"train.qat_start_frac": 0.85}),
        (
            {"DATA_DIR": "./data/", "VOCAB_SIZE": "8192"},
            {
                "model.vocab_size": 8192,
                "train.data_path": "data/datasets/fineweb10B_sp8192",
                "train.tokenizer_path": "data/tokenizers/fineweb_8192_bpe.model",
            },
        ),
        (
            {"DATA_DIR": "d", "DATA_PATH": "p", "TOKENIZER_PATH": "t.model"},
            {"train.data_path": "p", "train.tokenizer_path": "t.model"},
        ),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "REQUIRE_ZSTD": "0", "SMEARGATE_ENABLED": "1"}, {}),
        ({"NUM_UNIQUE_LAYERS": "0", "INT6_ENABLED": "1", "LOAD_MODEL_PATH": "final_model.pt"}, {}),
    ],
)
def test_values_arrive_in_their_keys_own_types(environ: dict[str, str], expected: dict[str, object]) -> None:
    assert changes(**environ) == expected


@pytest.mark.parametrize(
    ("environ", "method", "stride"),
    [
        ({"EVAL_STRIDE": "32"}, "sliding", 32),
        ({"EVAL_STRIDE": "0"}, "standard", 2048),
        ({"EVAL_STRIDE": "2048"}, "standard", 2048),
        ({"EVAL_STRIDE": "2048", "EVAL_SEQ_LEN": "4096"}, "sliding", 2048),
        ({"TRAIN_SEQ_LEN": "32", "VAL_BATCH_SIZE": "32"}, "standard", 32),
        ({"SLIDING_EVAL": "0"}, "standard", 64),
        ({"SLIDING_WINDOW_ENABLED": "1", "SLIDING_EVAL_STRIDE": "32"}, "sliding", 32),
        ({"SLIDING_WINDOW_ENABLED": "1", "EVAL_STRIDE": "2048"}, "standard", 2048),
        ({"RECIPE": "pr997", "SLIDING_WINDOW_ENABLED": "1"}, "sliding", 64),
        ({"RECIPE": "pr997"}, "standard", 64),
        ({"RECIPE": "pr997", "EVAL_STRIDE": "64"}, "sliding", 64),
        ({"RECIPE": "pr997", "TRAIN_SEQ_LEN": "32"}, "standard", 32),
    ],
)
def test_a_stride_slides_between_zero_and_the_context(environ: dict[str, str], method: str, stride: int) -> None:
    config, _ = config_from_environment(environ)
    assert (config.eval.method, config.eval.eval_stride) == (method, stride)


def test_fp16_patterns_take_the_place_of_the_recipes_first_fp16_rules() -> None:
    base = Config.from_recipe("base").export.policy
    assert base[:3] == [("tok_emb.*", "fp16"), ("blocks.8.attn.c_k.*", "fp16"), ("*.mlp.*", "int5")]
    assert policy(FP16_KEEP_NAME_PATTERNS="tok_emb,bigram") == [("*tok_emb*", "fp16"), ("*bigram*", "fp16"), *base[2:]]
    assert policy(FP16_KEEP_NAME_PATTERNS="") == base[2:]


def test_the_last_blocks_keys_follow_the_number_of_layers() -> None:
    late = [("blocks.10.attn.c_k.*", "fp16"), ("blocks.11.attn.c_k.*", "fp16")]
    rules = policy("pr286", KEEP_LAST_K_FP16="2", NUM_LAYERS="12")
    assert rules == [*late, *(rule for rule in Config.from_recipe("pr286").export.policy if "c_k" not in rule[0])]
    assert len([rule for rule in policy(KEEP_LAST_K_FP16="99") if "c_k" in rule[0]]) == 10
    assert not [rule for rule in policy(KEEP_LAST_K_FP16="0") if "c_k" in rule[0]]


def test_the_embeddings_encoding_comes_first_whatever_else_is_asked_for() -> None:
    rules = policy(EMBED_QUANT="int6", FP16_KEEP_NAME_PATTERNS="tok_emb", KEEP_LAST_K_FP16="1")
    assert rules[:2] == [("tok_emb.*", "int6"), ("lm_head.*", "int6")]
    assert policy(FP16_EMBED_EXPORT="0")[0] == ("tok_emb.*", "int8")
    assert policy("pr465", FP16_EMBED="1")[0] == ("tok_emb.*", "fp16")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NUM_LAYERS": "ten"}, "NUM_LAYERS = 'ten': must be an integer from 1 to"),
        ({"NUM_LAYERS": "0"}, "NUM_LAYERS = '0': must be an integer from 1 to"),
        ({"ITERATIONS": "1e3"}, "ITERATIONS = '1e3': must be an integer from 0 to"),
        ({"ITERATIONS": ""}, "ITERATIONS = '': must be an integer from 0 to"),
        ({"MATRIX_LR": "nan"}, "MATRIX_LR = 'nan': must be a finite number at least 0"),
        ({"MATRIX_LR": "fast"}, "MATRIX_LR = 'fast': must be a finite number at least 0"),
        ({"SWA_ENABLED": "true"}, "SWA_ENABLED = 'true': must be 0 or 1"),
        ({"QAT_ENABLED": "2"}, "QAT_ENABLED = '2': must be 0 or 1"),
        ({"EVAL_STRIDE": "-1"}, "EVAL_STRIDE = '-1': must be an integer of at least 0"),
        ({"EMBED_QUANT": "int5"}, "EMBED_QUANT = 'int5': must be one of fp16, int6, int8"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE = '8': the script trains in one process, so it must be 1"),
        (
            {"WEIGHT_DECAY": "0.1", "ADAM_WEIGHT_DECAY": "0.2"},
            "ADAM_WEIGHT_DECAY = '0.2': WEIGHT_DECAY sets train.weight_decay too, to another value",
        ),
        ({"EMBED_QUANT": "int6", "FP16_EMBED": "1"}, "EMBED_QUANT sets export.policy (embedding and head) too"),
        ({"RECIPE": "pr28"}, "there is no recipe 'pr28'"),
    ],
)
def test_bad_values_name_the_variable_what_was_found_and_what_was_expected(
    environ: dict[str, str], message: str
) -> None:
    assert message in refusal(**environ)


def test_all_bad_values_are_named_at_once() -> None:
    message = refusal(NUM_LAYERS="x", SEED="-1", RANK="3")
    assert all(f"{name} = " in message for name in ("NUM_LAYERS", "SEED", "RANK"))


def test_values_that_do_not_go_together_name_their_variables() -> None:
    message = refusal(NUM_HEADS="3", MATRIX_LR="0.1")
    assert "must be divisible by model.num_heads = 3" in message
    assert message.endswith("In the environment, NUM_HEADS sets model.num_heads.")


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("ITERATION", "ITERATIONS"), ("MATRIX_LRR", "MATRIX_LR"), ("seed", "SEED"), ("SCALAR_RL", "SCALAR_LR")],
)
def test_a_typo_is_warned_about_and_has_no_effect(typo: str, meant: str) -> None:
    config, (warning,) = config_from_environment({typo: "3"})
    assert warning == f"The environment variable {typo} is unknown and has no effect; did you mean {meant}?"
    assert config == Config.from_recipe("base")


def test_a_machines_own_variables_are_no_typos() -> None:
    names = "PATH HOME LANG USER SHELL PYTHONPATH LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR CUDA_VISIBLE_DEVICES "
    names += (
        "OMP_NUM_THREADS TERM TMPDIR PYTHONUNBUFFERED PYTHONHASHSEED NCCL_DEBUG VIRTUAL_ENV LC_ALL EDITOR MASTER_PORT"
    )
    assert config_from_environment(dict.fromkeys(names.split(), "1"))[1] == []


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SLIDING_EVAL": "1", "EVAL_STRIDE": "0"}, "EVAL_STRIDE sets eval.method, SLIDING_EVAL sets eval.method"),
        ({"USE_BIGRAM_HASH": "1", "BIGRAM_VOCAB_SIZE": "0"}, "set BIGRAM_VOCAB_SIZE too"),
    ],
)
def test_a_switch_that_its_own_setting_contradicts_is_refused(environ: dict[str, str], message: str) -> None:
    assert message in refusal(**environ)
