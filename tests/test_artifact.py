"""Export, size report and load against tests/reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zstandard

from pgolf.artifacts.artifact import export, export_with, load, read_artifact
from pgolf.artifacts.container import EncodedTensor, encode_stream, pack, unpack
from pgolf.common.errors import FormatError, NonFiniteError
from pgolf.config import Config, ExportConfig, ModelConfig, recipes
from pgolf.model import GPT
from tests.reference import quant as reference
from tests.reference.shapes import parameter_shapes

SMALL = {
    "vocab_size": 2100,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "bigram_vocab_size": 50,
    "bigram_dim": 16,
}
LIST = [("tok_emb.*", "fp16"), ("*.mlp.*", "int5"), ("*.attn.*", "int6"), ("*", "int8")]


class Weights:
    """What export asks of a model; unlike GPT's, its weights may be anything."""

    def __init__(self, config, seed):
        self.config, self.train_seq_len, self.provenance = config, None, None
        self.scoring, self.record = None, None
        rng = np.random.default_rng(seed)
        shapes = parameter_shapes(config)
        self.state = {name: (rng.standard_normal(shape) * 0.1).astype(np.float32) for name, shape in shapes.items()}

    def state_dict(self):
        return {name: w.copy() for name, w in self.state.items()}


def small_model(layers=2, **values) -> Weights:
    return Weights(ModelConfig(**{**SMALL, "num_layers": layers, **values}), seed=layers)


def assert_states_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, w in expected.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == w.shape
        np.testing.assert_array_equal(found[name], w, err_msg=name)


@pytest.mark.parametrize("recipe", recipes())
def test_recipes_equal_reference(tmp_path, recipe):
    model, path = small_model(layers=10), tmp_path / "m.pgolf"
    settings = Config.from_recipe(recipe).export
    report = export(model, path, policy=recipe, small_numel=100)
    expected, encodings = reference.quantize_state(model.state, settings.policy, 100, settings.prune)
    assert_states_equal(read_artifact(path)[1], expected)
    assert {tensor.name: tensor.encoding for tensor in report.tensors} == encodings
    assert report.limit_bytes == settings.limit_bytes


def test_pruning_of_the_recipe_or_by_hand(tmp_path):
    model, path = small_model(), tmp_path / "m.pgolf"
    zeros = {}
    for prune in (None, 0, 0.25):
        export(model, path, policy="base", prune=prune)
        zeros[prune] = np.mean(read_artifact(path)[1]["tok_emb.weight"] == 0)
    assert zeros[0] < 0.001
    assert zeros[None] == pytest.approx(0.03, abs=0.001)
    assert zeros[0.25] == pytest.approx(0.25, abs=0.001)


def test_a_list_of_pairs_prunes_nothing_and_keeps_8192_elements(tmp_path):
    model, path = small_model(model_dim=64, num_heads=4), tmp_path / "m.pgolf"
    report = export(model, path, policy=LIST)
    expected, encodings = reference.quantize_state(model.state, LIST, 8192)
    assert_states_equal(read_artifact(path)[1], expected)
    assert {tensor.name: tensor.encoding for tensor in report.tensors} == encodings
    assert set(encodings.values()) == {"fp16", "int5"}
    assert report.limit_bytes == 16_000_000


def test_every_setting_of_the_table_counts(tmp_path):
    model = small_model()
    settings = ExportConfig(policy=LIST, prune=0.5, small_numel=100, control_patterns=["*.mlp.fc.*"], limit_bytes=1000)
    report = export_with(model, tmp_path / "m.pgolf", settings)
    encodings = {tensor.name: tensor.encoding for tensor in report.tensors}
    assert encodings["blocks.0.mlp.fc.weight"] == "fp32"
    assert encodings["blocks.0.mlp.proj.weight"] == "int5"
    assert (report.limit_bytes, report.fits) == (1000, False)
    assert np.mean(read_artifact(tmp_path / "m.pgolf")[1]["tok_emb.weight"] == 0) == pytest.approx(0.5, abs=0.01)


def test_load_gives_back_everything(tmp_path):
    model, path = small_model(mlp_mult=2.5, rope_tables="bf16"), tmp_path / "m.pgolf"
    model.train_seq_len, model.provenance = 256, {"steps": 120, "tokens": 983_040, "seed": 42}
    export(model, path, policy=LIST, small_numel=50)
    loaded = load(path, device="cpu", dtype="float64")
    assert loaded.config == model.config
    assert (loaded.device, loaded.dtype) == ("cpu", "float64")
    assert (loaded.train_seq_len, loaded.provenance) == (256, model.provenance)
    assert_states_equal(load(path).state_dict(), reference.quantize_state(model.state, LIST, 50)[0])


@pytest.mark.parametrize(
    "values",
    [
        {"tie_embeddings": False},
        {"bigram_vocab_size": 0},
        {"bigram_dim": 32},
        {"layers": 1},
        {"layers": 5},
        {"mlp_mult": 0.7},
    ],
)
def test_load_knows_every_model(tmp_path, values):
    model, path = small_model(**values), tmp_path / "m.pgolf"
    export(model, path)
    loaded = load(path)
    assert loaded.state_dict().keys() == model.state.keys()
    assert (loaded.train_seq_len, loaded.provenance) == (None, None)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_loaded_model_scores_like_its_quantised_weights(tmp_path, dtype):
    weights, path = small_model(), tmp_path / "m.pgolf"
    model = GPT(weights.config, seed=0, device="cpu", dtype=dtype)
    model.load_state_dict(weights.state)
    export(model, path, policy=LIST, small_numel=50)
    model.load_state_dict(reference.quantize_state(weights.state, LIST, 50)[0])
    ids = np.arange(24).reshape(2, 12) * 87 % 2100
    np.testing.assert_array_equal(load(path, device="cpu", dtype=dtype).logits(ids), model.logits(ids))


def test_header(tmp_path):
    model, path = small_model(), tmp_path / "m.pgolf"
    report = export(model, path)
    header, _ = read_artifact(path)
    assert header == {
        "model": model.config.to_stored(),
        "train_seq_len": None,
        "steps": None,
        "tokens": None,
        "seed": None,
        "pgolf": report.pgolf,
        "zstd": report.zstd,
        **dict.fromkeys(("scoring", "tokenizer", "validation", "byte_basis", "requires")),
    }
    assert report.zstd == ".".join(map(str, zstandard.ZSTD_VERSION))


def test_bytes_are_equal_for_equal_weights_and_the_model_is_unchanged(tmp_path):
    model = small_model()
    before = model.state_dict()
    export(model, tmp_path / "a.pgolf")
    assert_states_equal(model.state, before)
    again = small_model()
    again.state = dict(reversed(again.state.items()))
    export(again, tmp_path / "elsewhere.pgolf")
    assert (tmp_path / "a.pgolf").read_bytes() == (tmp_path / "elsewhere.pgolf").read_bytes()
    again.state["smear.gate"][0] += 1
    export(again, tmp_path / "elsewhere.pgolf")
    assert (tmp_path / "a.pgolf").read_bytes() != (tmp_path / "elsewhere.pgolf").read_bytes()


def test_report(tmp_path):
    model, path, code = small_model(), tmp_path / "m.pgolf", tmp_path / "train_gpt.py"
    model.state["skip_weights"][:] = 0
    code.write_text("print('é')\n", encoding="utf-8")
    report = export(model, path, policy=LIST, small_numel=50, prune=0.5, code=code)
    _, loaded = read_artifact(path)
    _, stored = unpack(path)
    assert report.path == str(path)
    assert report.bytes == path.stat().st_size
    assert report.code_bytes == 12
    assert report.total_bytes == report.bytes + 12
    assert report.margin == 16_000_000 - report.total_bytes
    assert report.fits
    assert report.shared_bytes == report.bytes - sum(tensor.compressed_bytes for tensor in report.tensors)
    assert [tensor.name for tensor in report.tensors] == list(model.state)
    for tensor in report.tensors:
        w = model.state[tensor.name].astype(np.float64)
        assert tensor.shape == w.shape
        assert tensor.raw_bytes == len(stored[tensor.name].payload())
        assert tensor.compressed_bytes == len(encode_stream(stored[tensor.name]))
        error = loaded[tensor.name] - w
        assert tensor.max_error == np.abs(error).max()
        if tensor.name == "skip_weights" or tensor.encoding == "fp32":
            assert tensor.relative_error == tensor.max_error == 0
        else:
            assert tensor.relative_error == pytest.approx(np.linalg.norm(error) / np.linalg.norm(w), rel=1e-12)
            assert 0 < tensor.relative_error < (0.6 if w.size > 65_536 else 0.1)


def test_report_as_a_dictionary(tmp_path):
    report = export(small_model(), tmp_path / "m.pgolf")
    values = json.loads(json.dumps(report.to_dict()))
    assert values["bytes"] == report.bytes
    assert values["code_bytes"] is values["total_bytes"] is None
    assert values["margin"] == 16_000_000 - report.bytes
    assert values["fits"] is True
    assert values["shared_bytes"] == report.shared_bytes
    assert values["tensors"][0] == {
        "name": "tok_emb.weight",
        "encoding": "fp16",
        "shape": [2100, 32],
        "raw_bytes": 2 * 2100 * 32,
        "compressed_bytes": report.tensors[0].compressed_bytes,
        "relative_error": report.tensors[0].relative_error,
        "max_error": report.tensors[0].max_error,
    }


def test_code_can_break_the_limit(tmp_path):
    code = tmp_path / "train_gpt.py"
    code.write_bytes(bytes(16_000_000))
    report = export(small_model(), tmp_path / "m.pgolf", code=code)
    assert not report.fits
    assert report.margin == -report.bytes


def test_export_refusals_leave_the_old_file(tmp_path):
    path = tmp_path / "m.pgolf"
    path.write_bytes(b"old")

    def refused(error, message, model=None, **arguments):
        with pytest.raises(error, match=message):
            export(model or small_model(), path, **arguments)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    for value in (np.nan, np.inf):
        broken = small_model()
        broken.state["blocks.1.mlp.fc.weight"][3, 4] = value
        refused(NonFiniteError, "tensor blocks.1.mlp.fc.weight holds NaN or infinity", broken)
    wide = small_model()
    wide.state["smear.gate"] = np.full(32, 1e39)
    refused(NonFiniteError, "tensor smear.gate holds NaN or infinity", wide)
    large = small_model()
    large.state["blocks.1.attn_scale"][3] = -70_000
    refused(ValueError, "tensor blocks.1.attn_scale cannot be stored as fp16: .* magnitude is 70000, and fp16", large)
    large = small_model()
    large.state["blocks.1.attn.c_q.weight"][3, 0] = 1e9
    refused(ValueError, "blocks.1.attn.c_q.weight cannot be stored as int6: Row 3 reaches", large, small_numel=10)
    refused(ValueError, "no recipe 'bass'; the nearest is 'base'", policy="bass")
    refused(ValueError, "'int3' is not an encoding", policy=[("*", "int3")])
    refused(ValueError, "'rms:0.4' is not an encoding", policy=[("*", "rms:0.4")])
    refused(ValueError, "No pattern of the policy matches the tensor", policy=LIST[:-1], small_numel=10)
    with_a_cube = small_model()
    with_a_cube.state["cube"] = np.ones((30, 30, 30), np.float32)
    refused(ValueError, "the tensor cube of shape .* which is for 2-D tensors", with_a_cube, policy=[("*", "int6")])
    refused(ValueError, "export.prune = 1.5", prune=1.5)
    refused(ValueError, "export.small_numel = -1", small_numel=-1)
    refused(FileNotFoundError, "There is no script .*none.py", code=tmp_path / "none.py")


def test_export_names_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*none for the artifact m.pgolf"):
        export(small_model(), tmp_path / "none" / "m.pgolf")


def rewritten(path: Path, change) -> Path:
    """The artifact of a small model after change(header, tensors)."""
    export(small_model(), path)
    header, tensors = unpack(path)
    change(header, tensors)
    path.write_bytes(pack(header, tensors))
    return path


def drop(key):
    return lambda header, tensors: (header if key in header else tensors).pop(key)


def put(key, value):
    def change(header, tensors):
        (tensors if isinstance(value, EncodedTensor) else header)[key] = value

    return change


def put_model(key, value):
    return lambda header, tensors: header["model"].update({key: value})


def floats(*shape, value=1.0, dtype=np.float16):
    return EncodedTensor("fp16" if dtype is np.float16 else "fp32", np.full(shape, value, dtype))


INFINITE_SCALE = EncodedTensor("int6", np.zeros((2100, 32), np.int8), np.full(2100, np.inf, np.float16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("seed"), "header has the keys model, pgolf, steps, tokens, .*; model, pgolf, seed, steps"),
        (put("requires", ["model", "host", "time"]), r"only be read by a version that knows host, time; this is pgolf"),
        (put("requires", "host"), "requires is 'host'; a list of the header's keys was expected"),
        (put("scoring", {"stride": 64}), "scoring is .*; an object with a method, or null, was expected"),
        (put("scoring", {"method": "sliding", "stride": "64"}), "scoring's stride is '64'"),
        (put("tokenizer", "a.model"), "tokenizer is 'a.model'; an object or null was expected"),
        (put("tokenizer", {"identity": 7}), "its record of the data cannot be read"),
        (put("validation", {"shards": {"a_val_0.bin": "many"}}), "its record of the data cannot be read"),
        (put("steps", 3), r"steps, tokens and seed are \[3, None, None\]; three non-negative integers or three nulls"),
        (put("train_seq_len", 0), "train_seq_len is 0; a positive integer or null"),
        (put("train_seq_len", True), "train_seq_len is True"),
        (put("model", [1]), "model = .1. must be a table"),
        (put_model("num_heads", 3), "model.model_dim = 32: must be divisible by model.num_heads = 3"),
        (put_model("heads", 3), "model.heads is not a key of the configuration"),
        (lambda header, tensors: header["model"].pop("num_layers"), "model.num_layers is missing"),
        (put_model("num_layers", 2**31 - 1), "model has 2,147,483,647 layers, but the file only 26 tensors"),
        (put_model("vocab_size", 65_536), r"tok_emb.weight has the shape \(2100, 32\); .* expects \(65536, 32\)"),
        (drop("smear.gate"), "the file lacks smear.gate, against its model configuration"),
        (put("lm_head.weight", floats(2100, 32)), "the file has lm_head.weight, against its model configuration"),
        (put("bigram.scale", floats(1)), r"bigram.scale has the shape \(1,\); .* expects \(\)"),
        (put("smear.gate", floats(32, value=np.nan)), "tensor 'smear.gate': it holds NaN or infinity"),
        (
            put("smear.gate", floats(32, value=np.inf, dtype=np.float32)),
            "tensor 'smear.gate': it holds NaN or infinity",
        ),
        (put("tok_emb.weight", INFINITE_SCALE), "tensor 'tok_emb.weight': The scale of row 0 is NaN or infinite"),
    ],
)
def test_load_refuses_other_contents(tmp_path, change, message):
    path = rewritten(tmp_path / "m.pgolf", change)
    with pytest.raises(FormatError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))


def test_load_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no artifact .*none.pgolf"):
        load(tmp_path / "none.pgolf")
