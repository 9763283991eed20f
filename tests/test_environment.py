"""The public scripts' environment variables as configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pgolf.config import Config
from pgolf.environment import FEATURES, VARIABLES, config_from_environment

ROOT = Path(__file__).parents[1]

# Every variable that the public scripts read, as dev/collect_variables.py found them, with the defaults there.
PUBLIC: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "public_variables.json").read_text())

# Values that ask for something, whatever the variable is.
ASKING = ("7", "1", "0.5", "all", "4,5")

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


def outcome(**environ: str) -> str:
    """The refusal of an environment, or nothing."""
    try:
        config_from_environment(environ)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", PUBLIC)
def test_every_variable_of_the_scripts_has_one_verdict(name: str) -> None:
    variable = VARIABLES[name]
    assert [bool(variable.sets), variable.refused, variable.idle].count(True) == 1
    if variable.refused:
        assert any(f"{name} = '{value}': {variable.note}" in outcome(**{name: value}) for value in ASKING)
        assert len(variable.note.split()) > 5
    if variable.idle:
        config, warnings = config_from_environment({name: "7"})
        assert (config, warnings) == (
            Config.from_recipe("base"),
            [f"The environment variable {name} has no effect in pgolf."],
        )


def test_hardly_a_variable_is_known_that_no_script_reads() -> None:
    # The two USE_ names are those of scripts that were proposed and never merged.
    assert VARIABLES.keys() - PUBLIC.keys() == {"RECIPE", "USE_EMA", "USE_XSA"}


SWITCHES = [name for feature in FEATURES for name in feature.switches]


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", ["0", "", "False"])
def test_what_pgolf_lacks_may_be_switched_off(name: str, value: str) -> None:
    assert changes(**{name: value}) == {}


@pytest.mark.parametrize("name", SWITCHES)
def test_what_pgolf_lacks_is_refused_by_name(name: str) -> None:
    assert f"{name} = '7': pgolf does not have" in refusal(**{name: "7"})


def test_settings_of_what_is_switched_off_pass_and_are_said_to_be_without_effect() -> None:
    assert "TTT_LR = '0.1'" in refusal(TTT_LR="0.1")
    assert "TTT_LR = '0.1'" in refusal(TTT_LR="0.1", TTT_ENABLED="1")
    config, warnings = config_from_environment({"TTT_LR": "0.1", "TTT_ENABLED": "0", "COMPILE_MODE": "default"})
    assert config == Config.from_recipe("base")
    assert warnings == ["The environment variables TTT_LR, COMPILE_MODE have no effect in pgolf."]


def test_a_public_ema_is_an_ema() -> None:
    assert changes(EMA_DECAY="0.9965") == {"train.ema_decay": 0.9965}
    assert changes(EMA_DECAY="0.9965", EMA_ENABLED="1") == {"train.ema_decay": 0.9965}
    assert changes(EMA_DECAY="0.9965", EMA_ENABLED="0") == {}
    assert changes(EMA_ENABLED="0") == {}
    assert refusal(EMA_ENABLED="1").endswith(
        "set EMA_DECAY too.\nIn the environment, EMA_ENABLED sets train.ema_decay."
    )


def test_a_switch_of_sliding_windows_and_a_stride_must_agree() -> None:
    assert changes(SLIDING_WINDOW_ENABLED="1") == {}
    assert changes(SLIDING_WINDOW_ENABLED="0") == {"eval.method": "standard"}
    assert changes(SLIDING_EVAL="1", STRIDE="32") == {"eval.eval_stride": 32}
    message = refusal(SLIDING_EVAL="1", EVAL_STRIDE="0")
    assert "EVAL_STRIDE sets eval.method, SLIDING_EVAL sets eval.method" in message


def test_an_empty_environment_is_the_recipe() -> None:
    assert config_from_environment({}) == (Config.from_recipe("base"), [])
    assert config_from_environment({}, "pr289") == (Config.from_recipe("pr289"), [])
    assert config_from_environment({"RECIPE": "tiny"}, "pr289") == (Config.from_recipe("tiny"), [])


def test_the_merged_scripts_defaults_are_the_base_recipe() -> None:
    assert changes(**DEFAULTS_180) == {}
    assert DEFAULTS_180.keys() <= PUBLIC.keys()


@pytest.mark.parametrize(
    "name", [name for name in PUBLIC if VARIABLES[name].sets.count(".") == 1 and "EMA" not in name]
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
        "EVAL_SEQ_LEN": "4096",
        "TTT_EVAL_SEQ_LEN": "4096",
        "VAL_BATCH_TOKENS": "4096",
        "ADAM_WD": "0.125",
        "EMBED_WD": "0.125",
        "PRUNE_RATIO": "0.125",
        "SLIDING_EVAL": "0",
        "SLIDING_WINDOW_ENABLED": "0",
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
        ({"PRUNE_FRAC": "0"}, {"export.prune": 0.0}),
        ({"CONTROL_TENSOR_NAME_PATTERNS": "q_gain, ,smear"}, {"export.control_patterns": ["q_gain", "smear"]}),
        ({"QAT_ENABLED": "0", "QAT_START_FRAC": "0.5"}, {}),
        ({"QAT_ENABLED": "1", "QAT_START_FRAC": "0.5"}, {"train.qat_start_frac": 0.5}),
        ({"QAT_ENABLED": "1"}, {"train.qat_start_frac": 0.85}),
        ({"RECIPE": "pr286", "QAT_ENABLED": "1"}, {}),
        ({"RECIPE": "pr286", "QAT_ENABLED": "0"}, {"train.qat_start_frac": 1.0}),
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
    names = "PATH HOME LANG USER SHELL PYTHONPATH LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR CUDA_VISIBLE_DEVICES"
    assert config_from_environment(dict.fromkeys(names.split(), "1"))[1] == []


SCRIPT = """
import os
from os import environ as E, getenv
def flag(name, default="0"):
    return bool(int(os.environ.get(name, default)))
class Hyperparameters:
    a = int(os.environ.get("PLAIN", 3))
    b = E["INDEXED"]
    c = getenv("GETENV", "x")
    d = flag("WRAPPED", "1")
    e = flag("WRAPPED_TOO")
    f = {name: os.environ.get(name) for name in ("LOOPED_A", "LOOPED_B")}
    g = "TESTED" in os.environ
"""


def test_the_collector_finds_every_way_to_read_a_variable(tmp_path: Path) -> None:
    (tmp_path / "train_gpt.py").write_text(SCRIPT)
    out = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "dev" / "collect_variables.py"), str(tmp_path), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert {name: entry["defaults"] for name, entry in found.items()} == {
        "GETENV": ["x"],
        "INDEXED": [],
        "LOOPED_A": [],
        "LOOPED_B": [],
        "PLAIN": ["3"],
        "TESTED": [],
        "WRAPPED": ["1"],
        "WRAPPED_TOO": ["0"],
    }
