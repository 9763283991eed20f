"""The configuration: typed tables, named mistakes, TOML and JSON round trips, inheritance, command-line overrides."""

from __future__ import annotations

import copy
import json
import pickle
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgolf
from pgolf.common.errors import FormatError
from pgolf.config import (
    Config,
    EvalConfig,
    ExportConfig,
    ModelConfig,
    TrainConfig,
    parse_override,
    recipe_policy,
    recipes,
    with_younger_keys,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# Tables


def test_derived_sizes() -> None:
    model = ModelConfig(model_dim=10, num_heads=5, num_kv_heads=1, mlp_mult=2.55, num_layers=7)
    assert (model.head_dim, model.mlp_hidden, model.num_skips) == (2, 25, 3)
    assert [ModelConfig(num_layers=layers).num_skips for layers in (1, 2, 3, 10, 11)] == [0, 1, 1, 5, 5]


def test_tables_refuse_attributes_they_do_not_have() -> None:
    with pytest.raises(AttributeError):
        TrainConfig().iteratons = 5  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        TrainConfig(iteratons=5)  # type: ignore[call-arg]


def test_values_take_their_fields_type() -> None:
    model = ModelConfig(mlp_mult=3, num_layers=np.int64(4), rope_base=np.float32(500.0))  # type: ignore[arg-type]
    assert [type(value) for value in (model.mlp_mult, model.num_layers, model.rope_base)] == [float, int, float]
    model.mlp_mult = 2
    assert json.dumps(model.to_dict()["mlp_mult"]) == "2.0"
    assert ExportConfig(policy=[["*", "int8"]]).policy == [("*", "int8")]  # type: ignore[list-item]


def test_a_recipes_name_becomes_its_policy() -> None:
    assert ExportConfig(policy="pr997").policy == recipe_policy("pr997")  # type: ignore[arg-type]
    assert Config().override({"export.policy": "pr465"}).export.policy == recipe_policy("pr465")


def test_default_lists_are_not_shared() -> None:
    ExportConfig().policy.clear()
    ExportConfig().control_patterns.clear()
    assert ExportConfig() == Config().export
    assert ExportConfig().policy


@pytest.mark.parametrize("name", recipes())
def test_configurations_can_be_copied_and_pickled(name: str) -> None:
    config = Config.from_recipe(name)
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert f"num_layers={config.model.num_layers}" in repr(config)


def test_override_leaves_the_original_alone() -> None:
    config = Config()
    changed = config.override({"train.iterations": 7, "model.mlp_mult": 2})
    assert (changed.train.iterations, changed.model.mlp_mult) == (7, 2.0)
    assert config == Config()
    changed.export.policy.clear()
    assert config == Config()


def test_eval_seq_len_is_the_training_length_unless_set() -> None:
    assert Config().eval_seq_len == 2048
    assert Config().override({"eval.eval_seq_len": 512}).eval_seq_len == 512


# Impossible values

WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"model.model_dim": 100}, ["model.model_dim = 100", "divisible by model.num_heads = 8"]),
    ({"model.model_dim": 24, "model.mlp_mult": 1.0}, ["model.model_dim = 24", "even", "a multiple of 16"]),
    ({"model.num_kv_heads": 3}, ["model.num_kv_heads = 3", "divide model.num_heads = 8"]),
    ({"model.num_kv_heads": 16}, ["model.num_kv_heads = 16", "divide model.num_heads = 8"]),
    ({"model.mlp_mult": 0.001}, ["model.mlp_mult = 0.001", "hidden width", "model.model_dim = 512"]),
    ({"model.mlp_mult": 1e300}, ["model.mlp_mult = 1e+300", "hidden width"]),
    ({"model.vocab_size": 1, "model.bos_id": 0}, ["model.vocab_size = 1", "from 2 to 65,536"]),
    ({"model.vocab_size": 65537}, ["model.vocab_size = 65537", "from 2 to 65,536"]),
    ({"model.bos_id": 1024}, ["model.bos_id = 1024", "below model.vocab_size = 1024"]),
    ({"model.bigram_vocab_size": 1}, ["model.bigram_vocab_size = 1", "0", "at least 2"]),
    ({"model.bigram_vocab_size": -1}, ["model.bigram_vocab_size = -1"]),
    ({"model.bigram_dim": 0}, ["model.bigram_dim = 0", "from 1"]),
    ({"model.num_layers": 0}, ["model.num_layers = 0", "from 1"]),
    ({"model.num_layers": 2**31}, ["model.num_layers = 2147483648", "2,147,483,647"]),
    ({"model.num_layers": 4.0}, ["model.num_layers = 4.0", "an integer"]),
    ({"model.num_layers": True}, ["model.num_layers = True", "an integer"]),
    ({"model.num_layers": "4"}, ["model.num_layers = '4'", "an integer"]),
    ({"model.logit_softcap": 0.0}, ["model.logit_softcap = 0.0", "above 0"]),
    ({"model.rope_base": -1.0}, ["model.rope_base = -1.0", "above 0"]),
    ({"model.qk_gain_init": float("nan")}, ["model.qk_gain_init = nan", "finite"]),
    ({"model.tie_embeddings": 1}, ["model.tie_embeddings = 1", "true or false"]),
    ({"model.num_loops": 1, "model.loop_end": 10}, ["model.loop_end = 10", "below model.num_layers = 10"]),
    (
        {"model.num_loops": 1, "model.loop_start": 3, "model.loop_end": 2},
        ["model.loop_start = 3", "at most model.loop_end = 2"],
    ),
    ({"model.rope_dims": 5}, ["model.rope_dims = 5", "even and at most a head's width, 64"]),
    ({"model.rope_dims": 66}, ["model.rope_dims = 66", "even and at most a head's width, 64"]),
    ({"model.rope_tables": "fp16"}, ["model.rope_tables = 'fp16'", "exact, bf16"]),
    ({"train.data_path": 5}, ["train.data_path = 5", "a string"]),
    ({"train.seed": -1}, ["train.seed = -1", "from 0"]),
    ({"train.seed": 2**63}, ["train.seed = 9223372036854775808"]),
    ({"train.iterations": 0, "train.max_wallclock_seconds": 0}, ["train.iterations = 0", "max_wallclock_seconds = 0"]),
    ({"train.max_wallclock_seconds": -1}, ["train.max_wallclock_seconds = -1", "at least 0"]),
    ({"train.max_wallclock_seconds": float("inf")}, ["train.max_wallclock_seconds = inf", "finite"]),
    ({"train.max_wallclock_seconds": 10**400}, ["train.max_wallclock_seconds = 1000", "finite"]),
    ({"train.grad_accum_steps": 5}, ["train.train_batch_tokens = 786432", "5 * 2048 = 10240"]),
    ({"train.train_seq_len": 1000}, ["train.train_batch_tokens = 786432", "8 * 1000 = 8000"]),
    ({"train.train_seq_len": 0}, ["train.train_seq_len = 0", "from 1"]),
    ({"train.val_batch_tokens": 2047}, ["train.val_batch_tokens = 2047", "at least train.train_seq_len = 2048"]),
    ({"train.matrix_lr": -0.1}, ["train.matrix_lr = -0.1", "at least 0"]),
    ({"train.muon_momentum": 1.0}, ["train.muon_momentum = 1.0", "below 1"]),
    ({"train.beta1": 1}, ["train.beta1 = 1", "below 1"]),
    ({"train.adam_eps": 0.0}, ["train.adam_eps = 0.0", "above 0"]),
    ({"train.muon_backend_steps": 0}, ["train.muon_backend_steps = 0"]),
    ({"train.warmdown_shape": "cos"}, ["train.warmdown_shape = 'cos'", "linear, cosine"]),
    ({"train.warmdown_frac": 1.5}, ["train.warmdown_frac = 1.5", "at most 1"]),
    ({"train.swa_start_frac": -0.1}, ["train.swa_start_frac = -0.1", "at least 0"]),
    ({"train.swa_every": 0}, ["train.swa_every = 0"]),
    ({"train.ema_decay": 1.0}, ["train.ema_decay = 1.0", "below 1"]),
    ({"train.qat_start_frac": 2}, ["train.qat_start_frac = 2", "at most 1"]),
    ({"train.dtype": "fp32"}, ["train.dtype = 'fp32'", "auto, float32, bfloat16, float16"]),
    ({"train.matmul": "int8"}, ["train.matmul = 'int8'", "must be bf16: no kernel multiplies anything narrower"]),
    ({"train.matmul": "fp8"}, ["train.matmul = 'fp8'", "must be bf16: no kernel"]),
    ({"train.matmul": True}, ["train.matmul = True", "must be bf16"]),
    ({"train.reduce_dtype": []}, ["train.reduce_dtype = []", "must be float32: one process trains"]),
    ({"train.reduce_dtype": "bfloat16"}, ["train.reduce_dtype = 'bfloat16'", "must be float32: one process"]),
    ({"train.reduce_dtype": "bf16"}, ["train.reduce_dtype = 'bf16'", "must be float32: one process"]),
    ({"eval.method": "slide"}, ["eval.method = 'slide'", "standard, sliding, ttt"]),
    ({"eval.tail": "short"}, ["eval.tail = 'short'", "exact, reference"]),
    ({"eval.eval_stride": 0}, ["eval.eval_stride = 0", "from 1"]),
    ({"eval.eval_stride": 2049}, ["eval.eval_stride = 2049", "at most", "2048"]),
    ({"eval.eval_seq_len": 63}, ["eval.eval_stride = 64", "at most", "63"]),
    ({"eval.ttt_chunk_size": 2000}, ["eval.ttt_chunk_size = 2000", "eval.ttt_eval_seq_len = 1024"]),
    ({"export.policy": []}, ["export.policy = []", "[pattern, encoding]"]),
    ({"export.policy": [["*", "int3"]]}, ["'int3' is not an encoding", "int5, int6, int8, fp16, fp32 or rms:4.5"]),
    ({"export.policy": [["*", "rms:65"]]}, ["'rms:65' is not an encoding"]),
    ({"export.policy": [["*", ["int6"]]]}, ["['int6'] is not an encoding"]),
    ({"export.policy": [["*"]]}, ["['*'] is not such a pair"]),
    ({"export.policy": "pr98"}, ["no recipe 'pr98'", "nearest is 'pr9"]),
    ({"export.prune": 1.0}, ["export.prune = 1.0", "below 1"]),
    ({"export.control_patterns": "gate"}, ["export.control_patterns = 'gate'", "a list"]),
    ({"export.control_patterns": [""]}, ["export.control_patterns = ['']", "non-empty"]),
    ({"export.limit_bytes": 0}, ["export.limit_bytes = 0"]),
]


@pytest.mark.parametrize(("overrides", "told"), WRONG, ids=[" ".join(overrides) for overrides, _ in WRONG])
def test_an_impossible_value_is_named_with_what_is_allowed(overrides: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        Config.from_recipe("base", overrides)
    message = str(caught.value)
    assert [part for part in told if part not in message] == []
    assert "\n" not in message, "one mistake, one sentence"


@pytest.mark.parametrize("overrides", [overrides for overrides, _ in WRONG if len(overrides) == 1])
def test_validate_finds_what_was_assigned_later(overrides: dict[str, Any]) -> None:
    config = Config()
    ((name, value),) = overrides.items()
    table, key = name.split(".")
    setattr(getattr(config, table), key, value)
    with pytest.raises(ValueError, match=re.escape(f"{table}.")):
        config.validate()


def test_every_mistake_is_named_in_one_error() -> None:
    wrong = {
        "model.num_kv_heads": 0,
        "model.model_dim": 100,
        "model.bos_id": 5000,
        "train.beta1": 1.0,
        "train.grad_accum_steps": 7,
        "eval.eval_stride": 5000,
        "export.prune": -1.0,
    }
    with pytest.raises(ValueError) as caught:
        Config.from_recipe("base", wrong)
    first, *others = str(caught.value).splitlines()
    assert first.startswith("7 values")
    named = {line.split(" = ")[0].strip() for line in others}
    assert named == {key.replace("grad_accum_steps", "train_batch_tokens") for key in wrong}


def test_a_model_table_alone_is_checked() -> None:
    with pytest.raises(ValueError, match=re.escape("model.num_heads = 3")):
        ModelConfig(num_heads=3, model_dim=512, num_kv_heads=3).validate()
    ModelConfig(num_heads=1, num_kv_heads=1, model_dim=2, mlp_mult=0.5, num_layers=1, bigram_vocab_size=0).validate()


@pytest.mark.parametrize(
    "overrides",
    [
        {"train.iterations": 0},
        {"train.max_wallclock_seconds": 0},
        {"train.warmdown_iters": -1},
        {"train.matrix_lr": 0},
        {"train.swa_start_frac": 1, "train.qat_start_frac": 0, "train.warmdown_frac": 1},
        {"model.vocab_size": 65536, "model.bos_id": 65535},
        {"model.vocab_size": 2},
        {"model.bigram_vocab_size": 2},
        {"eval.eval_stride": 2048},
        {"export.control_patterns": []},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(overrides: dict[str, Any]) -> None:
    config = Config.from_recipe("base", overrides).to_dict()
    for name, value in overrides.items():
        table, key = name.split(".")
        assert config[table][key] == value


# Names


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.iteratons", "train.iterations"),
        ("model.iterations", "train.iterations"),
        ("iterations", "train.iterations"),
        ("trian.swa_every", "train.swa_every"),
        ("model.layers", "model.num_layers"),
        ("", ""),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(key: str, nearest: str) -> None:
    told = re.escape(f"{key} is not a key") + ".*nearest is " + re.escape(nearest)
    with pytest.raises(ValueError, match=told):
        Config.from_recipe("base", {key: 1})
    with pytest.raises(ValueError, match=told):
        Config().override({key: 1})


@pytest.mark.parametrize(("name", "nearest"), [("bsae", "base"), ("pr28", "pr28"), ("../recipes/base", "base")])
def test_an_unknown_recipe_is_named_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"no recipe '{re.escape(name)}'.*nearest is '{nearest}"):
        Config.from_recipe(name)
    with pytest.raises(ValueError, match="no recipe"):
        recipe_policy(name)


# JSON


@pytest.mark.parametrize("name", recipes())
def test_a_model_table_round_trips_through_json(name: str) -> None:
    model = Config.from_recipe(name).model
    values = json.loads(json.dumps(model.to_dict()))
    assert list(values) == [item.name for item in fields(ModelConfig)]
    assert ModelConfig.from_dict(values) == model


def test_a_model_table_from_a_header_is_complete_and_known() -> None:
    values = ModelConfig().to_dict()
    del values["rope_base"], values["bos_id"]
    with pytest.raises(ValueError, match="model.rope_base is missing"):
        ModelConfig.from_dict(values)
    with pytest.raises(ValueError, match="2 values.*wrong"):
        ModelConfig.from_dict(values)
    with pytest.raises(ValueError, match=re.escape("model.colour is not a key")):
        ModelConfig.from_dict(ModelConfig().to_dict() | {"colour": 1})
    with pytest.raises(ValueError, match=re.escape("model.num_layers = 1000000000000")):
        ModelConfig.from_dict(ModelConfig().to_dict() | {"num_layers": 10**12})
    with pytest.raises(ValueError, match="must be a table"):
        ModelConfig.from_dict([1, 2])  # type: ignore[arg-type]


def test_a_stored_model_table_leaves_out_younger_keys_that_do_nothing() -> None:
    golden = Path(__file__).with_name("golden") / "finished" / "config.toml"
    assert list(ModelConfig().to_stored()) == list(tomllib.loads(golden.read_text(encoding="utf-8"))["model"])
    leaky = ModelConfig(mlp_negative_slope=0.5)
    assert leaky.to_stored() == {**ModelConfig().to_stored(), "mlp_negative_slope": 0.5}
    for model in (ModelConfig(), leaky):
        assert ModelConfig.from_dict(model.to_stored()) == model
    tables = Config().to_dict()
    older = {**tables, "model": ModelConfig().to_stored()}
    assert with_younger_keys(older) == tables


def test_a_file_that_an_older_pgolf_wrote_keeps_what_it_ran_with(tmp_path: Path) -> None:
    golden = Path(__file__).with_name("golden") / "half" / "config.toml"
    assert Config().train.qat_grid == "export"
    assert Config.from_toml(golden).train.qat_grid == "fixed"
    assert Config.from_toml(golden, {"train.qat_grid": "export"}).train.qat_grid == "export"
    text = golden.read_text(encoding="utf-8")
    assert Config.from_toml(write(tmp_path / "new.toml", Config().to_toml())).train.qat_grid == "export"
    mine = write(tmp_path / "mine.toml", text.replace("adam_eps", "# adam_eps"))  # not whole: nobody's but a person's
    assert Config.from_toml(mine).train.qat_grid == "export"


# TOML

texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)
changes = st.fixed_dictionaries(
    {},
    optional={
        "model.mlp_mult": st.floats(0.01, 100),
        "model.tie_embeddings": st.booleans(),
        "model.qk_gain_init": st.floats(allow_nan=False, allow_infinity=False),
        "train.data_path": texts,
        "train.seed": st.integers(0, 2**63 - 1),
        "train.adam_eps": st.floats(0, 1, exclude_min=True),
        "train.warmdown_iters": st.integers(-(10**6), 10**6),
        "eval.method": st.sampled_from(["standard", "sliding", "ttt"]),
        "export.policy": st.lists(
            st.tuples(
                texts.filter(bool),
                st.sampled_from(["int5", "int6", "int8", "rms:4.25", "rms:64", "fp16", "fp32"]),
            ),
            min_size=1,
        ),
        "export.control_patterns": st.lists(texts.filter(bool)),
    },
)


@given(changes)
def test_toml_round_trips(tmp_path_factory: pytest.TempPathFactory, overrides: dict[str, Any]) -> None:
    config = Config().override(overrides)
    text = config.to_toml()
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_bytes(text.encode())
    again = Config.from_toml(path)
    assert again == config
    assert again.to_toml() == text


def test_toml_lists_every_key_in_order_and_a_pair_a_line() -> None:
    text = Config().to_toml()
    assert re.findall(r"^\[(\w+)\]$", text, re.MULTILINE) == ["model", "train", "eval", "export"]
    keys = [item.name for table in (ModelConfig, TrainConfig, EvalConfig, ExportConfig) for item in fields(table)]
    assert re.findall(r"^(\w+) = ", text, re.MULTILINE) == keys
    assert '\n    ["blocks.8.attn.c_k.*", "fp16"],\n' in text


def test_a_file_holds_only_what_differs(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", 'extends = "pr286"\n[train]\niterations = 5\nmatrix_lr = 1\n')
    assert Config.from_toml(path) == Config.from_recipe("pr286", {"train.iterations": 5, "train.matrix_lr": 1.0})
    assert Config.from_toml(str(path), {"train.iterations": 6}).train.iterations == 6


def test_a_file_without_extends_has_the_defaults(tmp_path: Path) -> None:
    assert Config.from_toml(write(tmp_path / "empty.toml", "")) == Config()


def test_a_file_extends_another_relative_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.toml", 'extends = "tiny"\n[model]\nnum_layers = 2\n[export]\npolicy = [["*", "int8"]]\n')
    path = write(tmp_path / "sub" / "b.toml", 'extends = "../a.toml"\n[train]\nseed = 1\n')
    monkeypatch.chdir(tmp_path / "sub")
    expected = Config.from_recipe("tiny", {"model.num_layers": 2, "train.seed": 1, "export.policy": [("*", "int8")]})
    assert Config.from_toml("b.toml") == Config.from_toml(path) == expected


def test_a_file_may_name_a_recipes_policy(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", '[export]\npolicy = "pr465"\n')
    assert Config.from_toml(path).export.policy == recipe_policy("pr465")


def test_cycles_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", 'extends = "b.toml"\n')
    write(tmp_path / "b.toml", 'extends = "./a.toml"\n')
    with pytest.raises(FormatError, match=r"a\.toml extends .*b\.toml extends .*a\.toml: .*cannot extend itself"):
        Config.from_toml(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[train\n", "is not a TOML file"),
        (b"\xff\xfe", "is not a TOML file"),
        (b"x = " + b"[" * 100_000, "is not a TOML file"),
        (b"[train]\niteratons = 5\n", "nearest is train.iterations"),
        (b"[trian]\nswa_every = 5\n", "nearest is [train]"),
        (b"iterations = 5\n", "nearest is train.iterations"),
        (b"train = 5\n", "train = 5 must be a table"),
        (b"extends = 5\n", "extends = 5"),
        (b'extends = "bass"\n', "no recipe 'bass'; the nearest is 'base'"),
        (b"[model]\nmodel_dim = 100\n", "model.model_dim = 100"),
    ],
)
def test_a_broken_file_is_named_with_its_mistake(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        Config.from_toml(path)
    assert "broken.toml" in str(caught.value)
    assert told in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", 'extends = "other.toml"\n')
    with pytest.raises(FileNotFoundError, match=r"other\.toml, which .*mine\.toml extends"):
        Config.from_toml(path)
    for missing in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(str(missing))):
            Config.from_toml(missing)


# The command line's --set


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.iterations=100", "train.iterations", 100),
        (" train.iterations = 100 ", "train.iterations", 100),
        ("train.train_batch_tokens=786_432", "train.train_batch_tokens", 786432),
        ("train.matrix_lr=2.5e-2", "train.matrix_lr", 0.025),
        ("model.tie_embeddings=false", "model.tie_embeddings", False),
        ("eval.method=standard", "eval.method", "standard"),
        ('eval.method="standard"', "eval.method", "standard"),
        ("train.data_path=", "train.data_path", ""),
        ("train.data_path=data/books", "train.data_path", "data/books"),
        ("train.data_path=a=b", "train.data_path", "a=b"),
        (r"train.data_path=C:\data\books", "train.data_path", r"C:\data\books"),
        ("train.data_path='1 # 2'", "train.data_path", "1 # 2"),
        ("train.data_path=2024-01-31", "train.data_path", "2024-01-31"),
        ("train.seed=1\nx=2", "train.seed", "1\nx=2"),
        ('export.policy=[["*", "int8"]]', "export.policy", [["*", "int8"]]),
        ("export.policy=pr997", "export.policy", "pr997"),
    ],
)
def test_overrides_use_tomls_values_and_bare_words(text: str, key: str, value: Any) -> None:
    found_key, found = parse_override(text)
    assert (found_key, found) == (key, value)
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train.iterations", "the form table.key=value"),
        ("=5", "the form table.key=value"),
        ('export.policy=[["*", "int8"]', "the value of export.policy is not TOML"),
        ('train.data_path="open', "the value of train.data_path is not TOML"),
    ],
)
def test_broken_overrides_are_named(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        parse_override(text)


@given(texts)
def test_no_override_text_gives_anything_but_a_value_or_a_value_error(text: str) -> None:
    try:
        Config().override(dict([parse_override(text)]))
    except ValueError as error:
        assert str(error)


ONE_VALUE = {"train.matmul": "bf16", "train.reduce_dtype": "float32"}


@pytest.mark.parametrize("key", ONE_VALUE)
def test_what_nothing_implements_is_refused_with_the_value_that_works(key: str) -> None:
    value = ONE_VALUE[key]
    assert Config.from_recipe("base", {key: value}) == Config()
    for other in ("fp8", "fp16", "bf16", "float32", "bfloat16", "auto", ""):
        if other != value:
            with pytest.raises(ValueError, match=re.escape(f"{key} = {other!r}: must be {value}: ")):
                Config.from_recipe("base", {key: other})


def test_every_other_key_is_read_by_somebody() -> None:
    package = Path(pgolf.__file__).parent
    readers = [path for path in package.rglob("*.py") if path.parent.name != "config"]
    words = set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in readers)))
    tables = {
        table: values for table, values in Config().to_dict().items() if table != "model"
    }  # that is handed on whole
    keys = {f"{table}.{key}" for table, values in tables.items() for key in values}
    assert {key for key in keys if key.partition(".")[2] not in words} == set(ONE_VALUE)
