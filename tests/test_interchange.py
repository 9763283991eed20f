"""Moving in and out: state dicts and bundles of the public scripts, against tests/reference/formats.py."""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import pgolf
from pgolf.artifacts import bundle, interchange, torch_file
from pgolf.artifacts.bundle import pack_bundle, read_bundle
from pgolf.artifacts.container import EncodedTensor, unpack
from pgolf.artifacts.interchange import infer_config, kind_of_weights
from pgolf.common.errors import FormatError
from pgolf.config import Config, ModelConfig
from pgolf.model import GPT
from tests.reference import formats as reference
from tests.reference.model import perturb
from tests.reference.shapes import parameter_shapes

SMALL = {
    "vocab_size": 96,
    "num_layers": 3,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "bigram_vocab_size": 40,
    "bigram_dim": 8,
}
POLICY = [("tok_emb.*", "fp16"), ("*.mlp.*", "int5"), ("*.attn.*", "int6"), ("*", "int8")]
WITHIN = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def small_model(seed: int = 3, **values: Any) -> GPT:
    model = GPT(ModelConfig(**{**SMALL, **values}), seed=seed, device="cpu")
    model.load_state_dict(perturb(model.state_dict(), seed))
    return model


def assert_same_weights(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, w in expected.items():
        assert found[name].dtype == np.float32 and found[name].shape == w.shape, name
        np.testing.assert_array_equal(found[name], w, err_msg=name)


@st.composite
def configs(draw: Any) -> ModelConfig:
    """Any model of a few layers whose base recipe's remainder is kept."""
    heads = draw(st.sampled_from([1, 2, 4]))
    dim = 2 * heads * draw(st.integers(1, 4))
    return ModelConfig(
        vocab_size=draw(st.integers(2, 40)),
        num_layers=draw(st.integers(1, 4)),
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=draw(st.sampled_from([k for k in (1, 2, 4) if heads % k == 0])),
        mlp_mult=draw(st.integers(1, 3 * dim)) / dim,
        tie_embeddings=draw(st.booleans()),
        bigram_vocab_size=draw(st.sampled_from([0, 2, 17])),
        bigram_dim=draw(st.sampled_from([1, dim, dim + 1])),
    )


def sizes(config: ModelConfig) -> dict[str, Any]:
    """What decides the shapes of a model's tensors."""
    unused = set() if config.bigram_vocab_size else {"bigram_dim"}
    named = ("num_layers", "num_heads", "num_kv_heads", "mlp_hidden", "tie_embeddings", "bigram_dim")
    return {"shapes": parameter_shapes(config), **{name: getattr(config, name) for name in {*named} - unused}}


# State dicts


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@given(config=configs(), seed=st.integers(0, 99))
@WITHIN
def test_every_weight_moves_out_and_in_bit_for_bit(tmp_path: Path, ending: str, config: ModelConfig, seed: int) -> None:
    config.bos_id = min(config.bos_id, config.vocab_size - 1)
    model = GPT(config, seed=seed, device="cpu")
    state = perturb(model.state_dict(), seed)
    model.load_state_dict(state)
    path = tmp_path / f"model{ending}"
    pgolf.save_state_dict(model, path)
    theirs = torch.load(path, weights_only=True) if ending == ".pt" else safetensors.torch.load_file(path)
    assert {name: tuple(w.shape) for name, w in theirs.items()} == parameter_shapes(config)
    assert {w.dtype for w in theirs.values()} == {torch.float32}
    assert_same_weights({name: w.numpy() for name, w in theirs.items()}, state)
    assert_same_weights(pgolf.load_state_dict(path), state)
    loaded = pgolf.load(path, device="cpu")
    assert sizes(loaded.config) == sizes(config)
    assert_same_weights(loaded.state_dict(), state)


WRAPPERS = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]


@pytest.mark.parametrize("wrapped", WRAPPERS)
def test_a_state_dict_as_scripts_keep_it(tmp_path: Path, wrapped: str) -> None:
    model = small_model()
    state = {name: torch.from_numpy(w) for name, w in model.state_dict().items()}
    for name in ("tok_emb.weight", "bigram.embed.weight"):
        state[name] = state[name].bfloat16()
    state["blocks.0.attn.c_q.weight"] = torch.nn.Parameter(state["blocks.0.attn.c_q.weight"])
    state["blocks.1.mlp.fc.weight"] = state["blocks.1.mlp.fc.weight"].T.contiguous().T  # other strides, same values
    expected = {name: w.detach().float().numpy() for name, w in state.items()}
    path = tmp_path / "final_model.pt"
    ordered = OrderedDict((wrapped + name, w) for name, w in state.items())
    ordered._metadata = OrderedDict()  # type: ignore[attr-defined]  # as nn.Module.state_dict() has it
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    for saved in (
        ordered,
        {"model": ordered, "step": 7, "note": [1.5, None, ("a",)]},
        {"state_dict": ordered, "optimizer": moments, "best": torch.tensor(0.5)},
        {"model_state_dict": ordered, "optimizer_state_dict": moments, "epoch": 3, "model": {"layers": 3}},
        {"model": {"state_dict": ordered}, "state_dict": {}},
    ):
        torch.save(saved, path)
        assert_same_weights(pgolf.load(path, device="cpu").state_dict(), expected)
        for how in ("zstd", "zlib"):
            packed = tmp_path / f"{how}.ptz"
            packed.write_bytes(reference.compressed(path.read_bytes(), how))
            assert_same_weights(pgolf.load_state_dict(packed), expected)


@pytest.mark.parametrize("wrapped", WRAPPERS)
def test_names_in_safetensors_and_bundles_lose_their_prefixes_too(tmp_path: Path, wrapped: str) -> None:
    model = small_model()
    state = {wrapped + name: w for name, w in model.state_dict().items()}
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({name: torch.from_numpy(w).bfloat16() for name, w in state.items()}, path)
    rounded = {name: torch.from_numpy(w).bfloat16().float().numpy() for name, w in model.state_dict().items()}
    assert_same_weights(pgolf.load(path, device="cpu").state_dict(), rounded)
    encodings = {wrapped + name: kind for name, kind in encodings_of(model.config).items()}
    (tmp_path / "wrapped.ptz").write_bytes(reference.write_bundle(state, encodings, "zstd"))
    (tmp_path / "bare.ptz").write_bytes(reference.write_bundle(model.state_dict(), encodings_of(model.config), "zstd"))
    assert_same_weights(pgolf.load_state_dict(tmp_path / "wrapped.ptz"), pgolf.load_state_dict(tmp_path / "bare.ptz"))


def test_parts_that_were_compiled_alone(tmp_path: Path) -> None:
    model = small_model()
    path = tmp_path / "model.pt"
    for outer in ("", "module."):
        state = {outer + name.replace("blocks.1.", "blocks.1._orig_mod."): w for name, w in model.state_dict().items()}
        pgolf.save_state_dict(state, path)
        assert_same_weights(pgolf.load(path, device="cpu").state_dict(), model.state_dict())


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["module.a", "b"], "its tensor 'module.a' has the prefix 'module.', its tensor 'b' has none"),
        (["a", "_orig_mod.module.b"], "'_orig_mod.module.b' has the prefix '_orig_mod.module.', its tensor 'a' has"),
        (["module.a", "_orig_mod.a"], "its tensors '(module|_orig_mod).a' and '(module|_orig_mod).a' are both 'a'"),
        (["b.a", "b._orig_mod.a"], "are both 'b.a' without"),
    ],
)
def test_names_that_are_wrapped_in_part_are_refused(
    tmp_path: Path, ending: str, names: list[str], message: str
) -> None:
    path = tmp_path / f"x{ending}"
    pgolf.save_state_dict({name: np.ones(2, np.float32) for name in names}, path)
    with pytest.raises(FormatError, match=f"x{ending}: .*{message}"):
        pgolf.load_state_dict(path)


def test_safetensors_of_any_float_type(tmp_path: Path) -> None:
    state = {name: torch.from_numpy(w) for name, w in small_model().state_dict().items()}
    path = tmp_path / "model.safetensors"
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        safetensors.torch.save_file({name: w.to(dtype) for name, w in state.items()}, path)
        expected = {name: w.to(dtype).float().numpy() for name, w in state.items()}
        assert_same_weights(pgolf.load(path, device="cpu").state_dict(), expected)


def test_a_safetensors_file_says_which_model_it_is(tmp_path: Path) -> None:
    model = small_model(rope_tables="bf16", logit_softcap=7.0, smear_reset_at_bos=True, bos_id=1, mlp_mult=2.99)
    model.train_seq_len = 64
    pgolf.save_state_dict(model, tmp_path / "m.safetensors")
    loaded = pgolf.load(tmp_path / "m.safetensors", device="cpu", config="pr289")
    assert (loaded.config, loaded.train_seq_len) == (model.config, 64)
    pgolf.save_state_dict(model, tmp_path / "m.pt")
    loaded = pgolf.load(tmp_path / "m.pt", device="cpu")
    assert (loaded.config.rope_tables, loaded.config.logit_softcap, loaded.train_seq_len) == ("exact", 30.0, None)
    assert loaded.config.mlp_hidden == model.config.mlp_hidden


def test_plain_arrays_are_written_too(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.array(0.5, np.float32), "c": np.ones((0, 4))}
    for ending in interchange.STATE_DICT_ENDINGS:
        path = tmp_path / f"x{ending}"
        pgolf.save_state_dict(arrays, path)
        assert_same_weights(pgolf.load_state_dict(path), {name: w.astype(np.float32) for name, w in arrays.items()})
        again = tmp_path / f"again{ending}"
        pgolf.save_state_dict(arrays, again)
        assert again.read_bytes() == path.read_bytes()


# Configurations


@given(configs(), st.sampled_from([0.1, 0.5, 2.0, 3.0]))
@settings(max_examples=200)
def test_the_shapes_tell_the_sizes(config: ModelConfig, mlp_mult: float) -> None:
    rest = ModelConfig(mlp_mult=mlp_mult, rope_base=77.0, rope_tables="bf16", bos_id=0, qk_gain_init=2.5)
    found = infer_config(parameter_shapes(config), rest)
    assert sizes(found) == sizes(config)
    assert (found.rope_base, found.rope_tables, found.bos_id, found.qk_gain_init) == (77.0, "bf16", 0, 2.5)


@given(st.integers(1, 5000), st.integers(1, 700))
def test_a_multiple_gives_its_hidden_width(hidden: int, dim: int) -> None:
    assert int(interchange._multiple(hidden, dim, 3.0) * dim) == hidden
    assert interchange._multiple(3 * dim, dim, 3.0) == 3.0


def test_what_no_shape_tells_comes_from_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    pgolf.save_state_dict(small_model(), path)
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "pr289"\n[model]\nrope_base = 55.0\nnum_layers = 9\n[train]\ntrain_seq_len = 128\n')
    for config in (mine, str(mine), Config.from_toml(mine)):
        model = pgolf.load(path, device="cpu", config=config)
        assert (model.config.rope_base, model.config.num_layers, model.train_seq_len) == (55.0, 3, 128)
    assert pgolf.load(path, device="cpu", config="pr289").train_seq_len == 1024
    assert pgolf.load(path, device="cpu", config=ModelConfig(bos_id=5)).config.bos_id == 5
    with pytest.raises(ValueError, match="no recipe 'pr28'"):
        pgolf.load(path, config="pr28")
    with pytest.raises(FileNotFoundError, match="no.toml"):
        pgolf.load(path, config="no.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tok_emb.weight": None}, "no tensor tok_emb.weight, which tells vocabulary and width"),
        ({"blocks.0.attn.q_gain": None}, "no tensor blocks.0.attn.q_gain, which tells the number of heads"),
        ({"blocks.0.attn.c_k.weight": None}, "c_k.weight, which tells the number of key/value heads"),
        ({"blocks.0.mlp.fc.weight": None}, "which tells the MLP's width"),
        ({"blocks.0.attn.q_gain": (4, 1)}, r"q_gain has the shape \(4, 1\); 1 dimensions were expected"),
        ({"blocks.0.attn.q_gain": (3,)}, "c_k.weight has 16 rows; a multiple of the heads' width, 32 / 3, was"),
        ({"tok_emb.weight": (96, 0)}, r"tok_emb.weight has the shape \(96, 0\)"),
        ({"blocks.1.mlp_scale": (31,)}, r"blocks.1.mlp_scale has the shape \(31,\); .* expects \(32,\)"),
        ({"blocks.1.mlp_scale": None}, "the file lacks blocks.1.mlp_scale"),
        ({"blocks.7.mlp_scale": (32,)}, "the file (lacks|has) .*blocks.[37].mlp_scale"),
        ({"smear.gate": None, "smeargate.gate": (32,)}, "the file lacks smear.gate"),
        ({"bigram.embed.weight": None}, "the file has bigram.proj.weight, bigram.scale"),
        ({"value_embeds.0": (96, 32)}, "the file has value_embeds.0"),
    ],
)
def test_another_model_is_refused_with_the_tensor_that_tells(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    state = small_model().state_dict()
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = np.ones(shape, np.float32)
    for ending in interchange.STATE_DICT_ENDINGS:
        path = tmp_path / f"other{ending}"
        pgolf.save_state_dict(state, path)
        with pytest.raises(FormatError, match=f"other{ending}: .*{message}"):
            pgolf.load(path, device="cpu")
        assert_same_weights(pgolf.load_state_dict(path), state)


# Bundles


def encodings_of(config: ModelConfig) -> dict[str, str]:
    """A bundle's encodings that use every kind."""
    kinds = {"tok_emb": "fp16", ".mlp.": "int5", ".attn.": "int6"}
    return {
        name: next((kind for part, kind in kinds.items() if part in name), "int8") for name in parameter_shapes(config)
    }


@pytest.mark.parametrize("compression", ["zstd", "zlib"])
def test_a_scripts_bundle_is_read(tmp_path: Path, compression: str) -> None:
    model = small_model(tie_embeddings=False)
    data = reference.write_bundle(model.state_dict(), encodings_of(model.config), compression)
    path = tmp_path / "final_model.int8.ptz"
    path.write_bytes(data)
    assert kind_of_weights(path) == "bundle"
    tensors, quantised = read_bundle(path)
    assert quantised and {tensor.encoding for tensor in tensors.values()} == {"int5", "int6", "int8", "fp16", "fp32"}
    expected = {name: w.numpy() for name, w in torch_state(data, tmp_path).items()}
    assert_same_weights(pgolf.load_state_dict(path), expected)
    loaded = pgolf.load(path, device="cpu", config="base")
    assert_same_weights(loaded.state_dict(), expected)
    assert (loaded.train_seq_len, loaded.provenance, sizes(loaded.config)) == (2048, None, sizes(model.config))


def torch_state(data: bytes, folder: Path) -> dict[str, torch.Tensor]:
    """A bundle's state as its words say, "passthrough_fp16" included."""
    content = zlib.decompress(data) if data[0] == 0x78 else zstandard.ZstdDecompressor().decompress(data)
    saved = torch.load(io.BytesIO(content), weights_only=True)
    saved["m"] = {name: "passthrough" if word == "passthrough_fp16" else word for name, word in saved["m"].items()}
    return reference.read_bundle(reference.compressed(reference.torch_bytes(saved), "zlib"))


def test_a_bundle_is_written_as_a_script_reads_it(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "final_model.int8.ptz"
    report = pgolf.export(model, path, policy=POLICY, small_numel=reference.SMALL)
    pgolf.export(model, tmp_path / "model.pgolf", policy=POLICY, small_numel=reference.SMALL)
    expected = pgolf.load_state_dict(tmp_path / "model.pgolf")
    theirs = reference.read_bundle(path.read_bytes())
    assert list(theirs) == list(model.state_dict())
    assert_same_weights({name: w.numpy() for name, w in theirs.items()}, expected)
    assert_same_weights(pgolf.load(path, device="cpu").state_dict(), expected)
    assert report.bytes == path.stat().st_size
    assert {tensor.encoding for tensor in report.tensors} == {"int5", "int6", "int8", "fp16", "fp32"}


def test_integers_and_scales_stay_as_they_are_in_either_container(tmp_path: Path) -> None:
    model = small_model()
    # int8's scale is not found again by quantising once more where a row's second entry is far below its first.
    state = model.state_dict()
    state["bigram.embed.weight"][:, 0] = 900.0
    first, artifact, second = tmp_path / "a.ptz", tmp_path / "b.pgolf", tmp_path / "c.ptz"
    first.write_bytes(reference.write_bundle(state, encodings_of(model.config)))
    report = pgolf.convert(first, artifact, config=Config.from_recipe("pr289", {"model.rope_tables": "bf16"}))
    pgolf.convert(artifact, second, code=__file__)
    assert {tensor.max_error for tensor in report.tensors} == {0.0}
    ours, theirs, again = read_bundle(first)[0], unpack(artifact)[1], read_bundle(second)[0]
    assert_same_tensors(theirs, ours)
    assert_same_tensors(again, ours)
    loaded = pgolf.load(artifact, device="cpu")
    assert (loaded.config.rope_tables, loaded.train_seq_len) == ("bf16", 1024)
    pgolf.convert(second, tmp_path / "d.pgolf", config=Config.from_recipe("pr289", {"model.rope_tables": "bf16"}))
    assert (tmp_path / "d.pgolf").read_bytes() == artifact.read_bytes()


def assert_same_tensors(found: dict[str, EncodedTensor], expected: dict[str, EncodedTensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].encoding == tensor.encoding and found[name].values.dtype == tensor.values.dtype, name
        np.testing.assert_array_equal(found[name].values, tensor.values, err_msg=name)
        assert (found[name].scale is None) == (tensor.scale is None), name
        if tensor.scale is not None:
            np.testing.assert_array_equal(found[name].scale, tensor.scale, err_msg=name)


def encoded_tensors() -> st.SearchStrategy[EncodedTensor]:
    floats = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    finite = st.floats(-65504, 65504, width=16)
    integers = st.sampled_from([("int5", 15), ("int6", 31), ("int8", 127)])
    return st.one_of(
        hnp.arrays(np.float16, floats, elements=finite).map(lambda w: EncodedTensor("fp16", w)),
        hnp.arrays(np.float32, floats, elements=finite).map(lambda w: EncodedTensor("fp32", w)),
        st.tuples(integers, st.integers(0, 4), st.integers(0, 4)).flatmap(
            lambda drawn: st.builds(
                EncodedTensor,
                st.just(drawn[0][0]),
                hnp.arrays(np.int8, drawn[1:], elements=st.integers(-drawn[0][1] - 1, drawn[0][1])),
                hnp.arrays(np.float16, drawn[1:2], elements=finite),
            )
        ),
    )


@given(st.dictionaries(st.text(min_size=1, max_size=8), encoded_tensors(), max_size=5))
@WITHIN
def test_any_tensors_pass_through_a_bundle(tmp_path: Path, tensors: dict[str, EncodedTensor]) -> None:
    path = tmp_path / "x.ptz"
    path.write_bytes(pack_bundle(tensors))
    found, quantised = read_bundle(path)
    assert quantised
    assert_same_tensors(found, tensors)
    assert pack_bundle(found) == path.read_bytes()


@pytest.mark.parametrize(
    ("declared", "largest", "stored"),
    [("int5", 15, "int5"), ("int5", 16, "int8"), ("int6", -32, "int6"), ("int6", -33, "int8"), ("int8", -128, "int8"),
     ("int7", 3, "int8"), ("fp16", 3, "int8"), (None, 3, "int8"), (["int6"], 3, "int8")],
)  # fmt: skip
def test_a_type_that_its_integers_do_not_fit_is_int8(tmp_path: Path, declared: Any, largest: int, stored: str) -> None:
    w = {"a.q": torch.tensor([[0, largest]], dtype=torch.int8), "a.scale": torch.tensor([0.5]).half()}
    path = tmp_path / "x.ptz"
    path.write_bytes(reference.compressed(reference.torch_bytes({"w": w, "m": {"a": {"type": declared}}}), "zlib"))
    assert read_bundle(path)[0]["a"].encoding == stored
    np.testing.assert_array_equal(pgolf.load_state_dict(path)["a"], np.array([[0, largest / 2]], np.float32))


def test_the_first_scripts_format_is_read(tmp_path: Path) -> None:
    q = torch.tensor([[3, -127], [0, 5]], dtype=torch.int8)
    scale = torch.tensor([0.5, 0.25], dtype=torch.float16)
    vector, one = torch.tensor([1, -2, 3], dtype=torch.int8), torch.tensor(0.125)
    saved = {
        "__quant_format__": "int8_clean_per_row_v1",
        "quantized": {"a.weight": q, "v": vector},
        "scales": {"a.weight": scale, "v": one},
        "dtypes": {"a.weight": "float32", "v": "bfloat16"},
        "passthrough": {"b": torch.tensor([1.5, 2.5]).half(), "c": torch.tensor(0.1)},
        "qmeta": {"a.weight": {"scheme": "per_row", "axis": 0}},
    }
    path = tmp_path / "final_model.int8.ptz"
    path.write_bytes(reference.compressed(reference.torch_bytes(saved), "zlib"))
    expected = {"a.weight": [[1.5, -63.5], [0, 1.25]], "v": [0.125, -0.25, 0.375], "b": [1.5, 2.5], "c": 0.1}
    assert_same_weights(pgolf.load_state_dict(path), {name: np.array(w, np.float32) for name, w in expected.items()})
    with pytest.raises(FormatError, match=r"final_model.int8.ptz: it has no tensor tok_emb.weight"):
        pgolf.load(path)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"w": {}, "m": {"a": "passthrough"}}, '"m" says that a is \'passthrough\', but its "w" has no a'),
        ({"w": {"a": torch.ones(2)}, "m": {"a": {"type": "int6"}}}, "has no a.q and a.scale"),
        ({"w": {"a": torch.ones(2), "b": torch.ones(2)}, "m": {"a": "passthrough"}}, "does not say what b of"),
        ({"w": {"a": "text"}, "m": {"a": "passthrough"}}, "'a' is a str; a floating-point tensor was expected"),
        ({"w": {"a": torch.arange(3)}, "m": {"a": "passthrough"}}, "'a' is a tensor of int64"),
        (
            {"w": {"a.q": torch.ones(2, 3), "a.scale": torch.ones(2)}, "m": {"a": {"type": "int6"}}},
            r"integers and scales float32 of shape \(2, 3\)",
        ),
        (
            {"w": {"a.q": torch.ones(2, 3).char(), "a.scale": torch.ones(3)}, "m": {"a": {}}},
            r"int8 of shape \(2, 3\) and float32 of \(3,\)",
        ),
        ({"w": {"a.q": 1, "a.scale": 2}, "m": {"a": {}}}, "no two tensors"),
        (
            {"w": {"a.q": torch.ones(1, 3).char(), "a.scale": torch.tensor([np.inf]).half()}, "m": {"a": {}}},
            "the tensor 'a': .*(NaN|infinite)",
        ),
        ({"w": {"a": torch.tensor([np.nan])}, "m": {"a": "passthrough"}}, "the tensor 'a': it holds NaN or infinity"),
        ({"__quant_format__": "int4_v9", "quantized": {}, "scales": {}, "passthrough": {}}, "is 'int4_v9'"),
        ({"__quant_format__": "int8_clean_per_row_v1", "quantized": {}}, "'int8_clean_per_row_v1', whole"),
        (
            {"__quant_format__": "int8_clean_per_row_v1", "quantized": {"a": 1}, "scales": {}, "passthrough": {}},
            "have different names",
        ),
        ([torch.ones(2)], "it holds a list; a dictionary of tensors was expected"),
        (
            {"a": {"b": torch.ones(2)}},
            "'a' is a dict; a floating-point tensor was expected .*under 'state_dict', 'model_state_dict', 'model'",
        ),
        (
            {"model": {"b": torch.ones(2)}, "state_dict": {"b": torch.ones(2)}},
            "it holds tensors under 'state_dict' and 'model'; a state dict under one key was expected",
        ),
        ({"state_dict": {"b": 1}}, "'state_dict' is a dict; a floating-point tensor"),
        ({"state_dict": {"a": torch.ones(2), "b": "x"}}, "'b' is a str; a floating-point tensor was expected"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "names 'torch.ComplexFloatStorage'"),
        ({"a": torch.ones(2, 2).to_sparse()}, "names 'torch._utils._rebuild_sparse_tensor'"),
        ({"a": {1, 2}}, "names '__builtin__.set'"),
        ({(1, 2): torch.ones(2)}, "a dictionary has a tuple as key"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, saved: Any, message: str) -> None:
    plain = reference.torch_bytes(saved)
    for data in (plain, reference.compressed(plain, "zstd"), reference.compressed(plain, "zlib")):
        path = tmp_path / "x.ptz"
        path.write_bytes(data)
        with pytest.raises(FormatError, match=f"x.ptz: .*{message}"):
            pgolf.load_state_dict(path)


# Hostile files


class _Planted:
    """A pickle of it makes a file where it is unpickled by what trusts it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


class _ByText(_Planted):
    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.canary)!r}, 'w').close()",)


def with_pickle(archive: bytes, text: bytes) -> bytes:
    """A torch file with another pickle inside."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, text if entry.filename.endswith("data.pkl") else old.read(entry))
    return out.getvalue()


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("planted", [_Planted, _ByText])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path: Path, planted: Any, protocol: int) -> None:
    canary = tmp_path / "canary"
    text = pickle.dumps({"tok_emb.weight": planted(canary)}, protocol)
    archive = with_pickle(reference.torch_bytes({"a": torch.ones(2)}), text)
    files = {
        "bare.pt": text,
        "model.pt": archive,
        "zstd.ptz": reference.compressed(archive, "zstd"),
        "zlib.ptz": reference.compressed(archive, "zlib"),
        "bare.ptz": reference.compressed(text, "zlib"),
    }
    for name, data in files.items():
        path = tmp_path / name
        path.write_bytes(data)
        for read in (pgolf.load, pgolf.load_state_dict, lambda p: pgolf.convert(p, tmp_path / "out.pgolf")):
            with pytest.raises(FormatError, match=name):
                read(path)
    assert not canary.exists() and not (tmp_path / "out.pgolf").exists()
    pickle.loads(text)  # the plant works: what trusts a pickle runs it
    assert canary.exists()


def test_pytorch_is_the_second_wall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the list of instructions, torch.load(weights_only=True) still refuses."""
    canary, path = tmp_path / "canary", tmp_path / "model.pt"
    text = pickle.dumps({"tok_emb.weight": _ByText(canary)}, 2)
    path.write_bytes(with_pickle(reference.torch_bytes({"a": torch.ones(2)}), text))
    monkeypatch.setattr(torch_file, "_check_archive", lambda file, name: None)
    with pytest.raises(FormatError, match=r"model.pt: PyTorch cannot read it \(Weights only load failed"):
        pgolf.load_state_dict(path)
    assert not canary.exists()


@pytest.mark.parametrize("compression", ["zstd", "zlib"])
def test_what_decompresses_to_more_than_a_gibibyte_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    assert bundle.MAX_CONTENT_BYTES == torch_file.MAX_CONTENT_BYTES == interchange.MAX_CONTENT_BYTES == 1 << 30
    monkeypatch.setattr(bundle, "MAX_CONTENT_BYTES", 1 << 22)
    path = tmp_path / "bomb.ptz"
    path.write_bytes(reference.compressed(bytes(1 << 24), compression))
    assert path.stat().st_size < 20_000
    with pytest.raises(FormatError, match=r"bomb.ptz: it decompresses to more than 4,194,304 bytes"):
        pgolf.load_state_dict(path)
    with pytest.raises(ValueError, match=r"The bundle takes .* at most 4,194,304 were expected"):
        pack_bundle({"a": EncodedTensor("fp32", np.zeros(1 << 20, np.float32))})


def test_archives_that_grow_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = reference.torch_bytes({"a": torch.zeros(1 << 16)})
    deflated, doubled, other = io.BytesIO(), io.BytesIO(archive), io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive)) as old,
        zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as squeezed,
        zipfile.ZipFile(other, "w") as foreign,
        zipfile.ZipFile(doubled, "a") as twice,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        for entry in old.infolist():
            squeezed.writestr(entry.filename, old.read(entry))
        foreign.writestr("readme.txt", "no tensors")
        twice.writestr(old.infolist()[2].filename, b"again")
    long = with_pickle(archive, pickle.dumps({"a": "x" * (1 << 20)}, 2))
    for data, message in (
        (deflated.getvalue(), "an entry is compressed"),
        (doubled.getvalue(), "no name twice"),
        (other.getvalue(), "has 0 entries data.pkl; one was expected"),
        (long, "data.pkl has 1,048,[0-9]+ bytes; at most 1,048,576"),
    ):
        path = tmp_path / "x.pt"
        path.write_bytes(data)
        with pytest.raises(FormatError, match=f"x.pt: .*{message}"):
            pgolf.load_state_dict(path)
    path.write_bytes(archive)
    monkeypatch.setattr(torch_file, "MAX_CONTENT_BYTES", 1 << 17)
    with pytest.raises(FormatError, match=r"its entries have 26\d,\d+ bytes; at most 131,072 were expected"):
        pgolf.load_state_dict(path)


def test_shapes_that_claim_more_than_the_file_holds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)  # four bytes, seen 2⁴⁰ times
    with pytest.raises(FormatError, match=r"its tensors take more than the 1,073,741,824 bytes"):
        pgolf.load_state_dict(path)
    state = {"a": torch.arange(4.0)}
    with zipfile.ZipFile(io.BytesIO(reference.torch_bytes(state))) as archive:
        (text,) = (archive.read(entry) for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
    size, shape = b"K\x04t", b"K\x00K\x04\x85"
    assert text.count(size) == text.count(shape) == 1
    for lie in (
        text.replace(shape, b"K\x00M\xe8\x03\x85"),  # a view of 1,000 elements
        text.replace(shape, b"K\x00M\xe8\x03\x85").replace(size, b"M\xe8\x03t"),  # and a storage that says so too
    ):
        path.write_bytes(with_pickle(reference.torch_bytes(state), lie))
        with pytest.raises(FormatError, match=r"x.pt: PyTorch cannot read it"):
            pgolf.load_state_dict(path)


def test_values_without_end_are_refused(tmp_path: Path) -> None:
    path, many, deep = tmp_path / "x.pt", [0] * 40, []
    for _ in range(3):
        many = [many] * 40  # 40⁴ values, of which a pickle holds 160
    for _ in range(10):
        deep = [deep]
    for value in (many, deep):
        torch.save({"a": value}, path)
        assert path.stat().st_size < 5000
        with pytest.raises(FormatError, match=r"more than 100,000 values or nests them more than 8 deep"):
            pgolf.load_state_dict(path)


def safetensors_file(header: Any, data: bytes = b"", size: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def test_safetensors_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    f32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    cases = [
        (safetensors_file({"a": f32}, b"\0" * 7), "not a whole safetensors file"),
        (safetensors_file({"a": f32}, b"\0" * 9), "not a whole safetensors file"),
        (safetensors_file({"a": {**f32, "shape": [1 << 62, 4]}}, b"\0" * 8), "not a whole safetensors file"),
        (safetensors_file({}, size=1 << 30), "the header claims 1,073,741,824 bytes; at most 1,048,576"),
        (safetensors_file({"a": {**f32, "dtype": "I64", "shape": [1]}}, b"\0" * 8), "'a' is of I64; F64, F32"),
        (safetensors_file({"a": f32}, b"\0\0\xc0\x7f" * 2), "the tensor 'a': it holds NaN or infinity"),
    ]
    for metadata in ("{", "[]", '{"model": {}, "train_seq_len": 1}', "[" * 5000):
        cases.append((safetensors_file({"__metadata__": {"pgolf": metadata}}), "its metadata 'pgolf' is not what"))
    length = json.dumps({"model": ModelConfig().to_dict(), "train_seq_len": 0})
    cases.append((safetensors_file({"__metadata__": {"pgolf": length}}), "train_seq_len is 0"))
    path = tmp_path / "x.safetensors"
    for data, message in cases:
        path.write_bytes(data)
        with pytest.raises(FormatError, match=f"x.safetensors: .*{message}"):
            pgolf.load_state_dict(path)
    model = small_model()
    pgolf.save_state_dict(model, path)
    monkeypatch.setattr(interchange, "MAX_CONTENT_BYTES", 1 << 10)
    with pytest.raises(FormatError, match=r"the file has [\d,]+ bytes; at most 1,024 were expected"):
        pgolf.load(path)


@pytest.fixture(scope="module")
def samples() -> dict[str, bytes]:
    """A small file of every format."""
    model = small_model(num_layers=1, vocab_size=8, bigram_vocab_size=4, model_dim=8)
    state = model.state_dict()
    tensors = {name: torch.from_numpy(w) for name, w in state.items()}
    encodings = encodings_of(model.config)
    return {
        "x.pt": reference.torch_bytes(tensors),
        "x.safetensors": safetensors.numpy.save(state, metadata={"format": "pt"}),
        "zstd.ptz": reference.write_bundle(state, encodings, "zstd"),
        "zlib.ptz": reference.write_bundle(state, encodings, "zlib"),
    }


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "zstd.ptz", "zlib.ptz"])
@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_refused_in_a_sentence_or_has_weights(
    tmp_path: Path, samples: dict[str, bytes], name: str, data: Any
) -> None:
    damaged = bytearray(samples[name])
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "remove"]))
    at = data.draw(st.integers(0, len(damaged) - 1))
    if kind == "flip":
        damaged[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del damaged[at:]
    elif kind == "insert":
        damaged[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    else:
        del damaged[at : at + data.draw(st.integers(1, 20))]
    path = tmp_path / name
    path.write_bytes(damaged)
    try:
        loaded = pgolf.load(path, device="cpu")
    except FormatError as error:
        assert str(error).startswith(str(path)) and len(str(error).split()) > 5
    else:
        assert all(np.isfinite(w).all() for w in loaded.state_dict().values())


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_pickle_under_right_checksums_is_refused_or_has_weights(
    tmp_path: Path, samples: dict[str, bytes], data: Any
) -> None:
    with zipfile.ZipFile(io.BytesIO(samples["x.pt"])) as archive:
        (text,) = (archive.read(entry) for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
    at = data.draw(st.integers(0, len(text) - 1))
    put = data.draw(st.one_of(st.binary(min_size=1, max_size=3), st.sampled_from([b"R", b"b", b"Q", b"0", b"2", b"l"])))
    path = tmp_path / "x.pt"
    path.write_bytes(with_pickle(samples["x.pt"], text[:at] + put + text[at + data.draw(st.integers(0, 3)) :]))
    try:
        loaded = pgolf.load_state_dict(path)
    except FormatError as error:
        assert str(error).startswith(str(path)) and len(str(error).split()) > 5
    else:
        assert all(w.dtype == np.float32 and np.isfinite(w).all() for w in loaded.values())


@pytest.mark.parametrize("name", ["x.pt", "zstd.ptz", "zlib.ptz"])
def test_no_flipped_byte_of_a_weight_passes_unnoticed(tmp_path: Path, samples: dict[str, bytes], name: str) -> None:
    """The zip archive's checksums cover the tensors, in compressed files too."""
    path, intact = tmp_path / name, samples[name]
    path.write_bytes(intact)
    expected = pgolf.load_state_dict(path)
    refused = 0
    for at in np.random.default_rng(5).choice(len(intact), 60, replace=False):
        damaged = bytearray(intact)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        try:
            assert_same_weights(pgolf.load_state_dict(path), expected)
        except FormatError:
            refused += 1
    assert refused > 10


# Errors


def test_wrong_requests(tmp_path: Path) -> None:
    model = small_model()
    for call, error, message in (
        (lambda: pgolf.load(tmp_path / "no.pt"), FileNotFoundError, "no.pt"),
        (lambda: pgolf.load_state_dict(tmp_path), FileNotFoundError, "not a run folder, as it holds no config.toml"),
        (lambda: pgolf.save_state_dict(model, tmp_path / "x.pgolf"), ValueError, "ends with .pt or .safetensors"),
        (lambda: pgolf.save_state_dict(model, tmp_path / "no" / "x.pt"), FileNotFoundError, "There is no folder"),
        (lambda: pgolf.save_state_dict({"a": np.ones(2, int)}, tmp_path / "x.pt"), TypeError, "a has dtype int64"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert list(tmp_path.iterdir()) == []
    pgolf.save_state_dict(model, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt: its weights are not quantised; pgolf.export quantises"):
        pgolf.convert(tmp_path / "x.pt", tmp_path / "x.ptz")
    assert not (tmp_path / "x.ptz").exists()


@pytest.mark.parametrize(
    ("package", "endings"),
    [("torch", (".pt", ".ptz")), ("safetensors", (".safetensors",))],
    ids=["torch", "safetensors"],
)
def test_without_its_package_a_format_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, endings: tuple[str, ...]
) -> None:
    model = small_model()

    def write(path: Path) -> None:
        if path.suffix == ".ptz":
            pgolf.export(model, path)
        else:
            pgolf.save_state_dict(model, path)

    for ending in endings:
        write(tmp_path / f"there{ending}")
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for ending in endings:
        for call in (lambda path: write(path.with_stem("new")), pgolf.load):
            with pytest.raises(ModuleNotFoundError, match=rf"pip install 'pgolf\[{package}\]'"):
                call(tmp_path / f"there{ending}")
        assert not (tmp_path / f"new{ending}").exists()
