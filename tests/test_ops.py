"""Every operation of the backend, forward and backward, against autograd on tests/reference in float64.

Inputs are float32 numbers, so that both dtypes compute the same thing; each gradient that is added to starts from
something as large as itself.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pgolf
from pgolf import _C, ops
from pgolf.config import NEWTON_SCHULZ
from tests.cases import (
    DTYPES,
    adapted_head_case,
    as_float32,
    assert_close,
    attention_case,
    attention_sublayer_case,
    cast,
    draw,
    embed_case,
    head_case,
    heads_case,
    mixed_native,
    mlp_sublayer_case,
    mlp_up_case,
    project_residual_case,
    qkv_case,
    same_bits,
)
from tests.reference import model as reference
from tests.reference import trainer
from tests.test_core import run_isolated

torch.set_num_threads(1)

# The first case of each operation is also run under the other instruction sets.
EMBED = [
    embed_case(2, 130, 97, 32, (53, 6), reset=True),
    embed_case(1, 1, 2, 2),
    embed_case(3, 2, 97, 6, (2, None)),
    embed_case(1, 63, 1000, 64, (11, 5)),
    embed_case(3, 64, 97, 64, (1000, None)),
    embed_case(1, 65, 2, 32, (3, 2)),
    embed_case(1, 63, 65_536, 2, (53, None)),  # ids whose hash is negative in 32 bits
    embed_case(5, 130, 7, 6, (5, 3), reset=True),  # 650 rows: more than a chunk of 512, here and below
]
QKV = [
    qkv_case(2, 65, 34, 4, 2, 6, "other"),
    qkv_case(1, 1, 2, 1, 1, 2),
    qkv_case(3, 2, 6, 3, 1, 2, "x"),
    qkv_case(1, 63, 64, 2, 2, 32, "other"),
    qkv_case(1, 64, 32, 3, 1, 64, "x"),
    qkv_case(5, 130, 32, 6, 2, 6),
    qkv_case(3, 65, 34, 4, 2, 6, "other", rank=3),
    qkv_case(3, 65, 34, 4, 2, 6, "other", rank=3, norm_scale=0.5),
    qkv_case(3, 65, 34, 4, 2, 6, "other", turned=4),
    qkv_case(1, 64, 32, 3, 1, 64, "x", turned=16),
    qkv_case(2, 600, 32, 2, 1, 32, rank=8),  # two chunks a sequence
]
ATTENTION = [
    attention_case(2, 130, 6, 2, 6),
    attention_case(1, 1, 1, 1, 2),
    attention_case(3, 2, 3, 1, 2),
    attention_case(1, 63, 2, 2, 32),
    attention_case(3, 64, 4, 1, 6),
    attention_case(1, 65, 3, 3, 64),
    attention_case(2, 65, 4, 2, 8, normed=3.0),
]
HEADS = [
    heads_case(2, 130, 34, 4, 2, 6, "other"),
    heads_case(1, 1, 2, 1, 1, 2),
    heads_case(2, 130, 34, 4, 2, 6, turned=2),
    heads_case(3, 65, 32, 3, 1, 64, "x"),
]
PROJECT_RESIDUAL = [
    project_residual_case(2, 65, 34, 6, "other"),
    project_residual_case(1, 1, 2, 2),
    project_residual_case(3, 2, 6, 64, ""),
    project_residual_case(1, 63, 64, 32, "x"),
    project_residual_case(5, 130, 70, 600),  # and a weight gradient of more than one tile each way
    project_residual_case(2, 65, 34, 97, h_scale=1.0, slope=0.5),
    project_residual_case(1, 3, 2, 1, h_scale=1 / 16, slope=0.3),
    project_residual_case(2, 65, 34, 97, h_scale=1.0),
    project_residual_case(5, 130, 32, 600, h_scale=1 / 16),
]
MLP_UP = [
    mlp_up_case(2, 65, 34, 97),
    mlp_up_case(1, 1, 2, 1),
    mlp_up_case(3, 2, 6, 2),
    mlp_up_case(1, 64, 64, 32),
    mlp_up_case(5, 130, 32, 600),
    mlp_up_case(2, 65, 34, 97, slope=0.5),
    mlp_up_case(1, 1, 2, 1, slope=0.3),
    mlp_up_case(2, 65, 34, 97, slope=0.5, norm_scale=0.3),
    mlp_up_case(2, 300, 264, 66),  # on a CPU more tokens than are packed at a time for the weights' gradients
]
ATTENTION_SUBLAYER = [
    attention_sublayer_case(2, 130, 34, 4, 2, 6, "other"),
    attention_sublayer_case(1, 1, 2, 1, 1, 2),
    attention_sublayer_case(3, 65, 32, 3, 1, 64, "x"),
    attention_sublayer_case(3, 65, 34, 4, 2, 6, "other", rank=3),
]
MLP_SUBLAYER = [
    mlp_sublayer_case(2, 130, 34, 97),
    mlp_sublayer_case(1, 1, 2, 1),
    mlp_sublayer_case(3, 65, 64, 32),
    mlp_sublayer_case(2, 130, 34, 97, slope=0.5),
    mlp_sublayer_case(1, 1, 2, 3, slope=2.0),
]
HEAD = [
    head_case(2, 65, 34, 97, softcap=5.0, loss_scale=0.25),
    head_case(1, 1, 2, 2),
    head_case(3, 2, 6, 1000, loss_scale=1 / 6),
    head_case(1, 63, 64, 97),
    head_case(3, 400, 6, 97),  # the weight gradient is summed in blocks of 1,024 rows,
    head_case(1, 300, 2, 20_000),  # and of 256 where the vocabulary is large
    adapted_head_case(3, 65, 34, 97, first=20, rank=3, loss_scale=0.5),
    adapted_head_case(2, 9, 6, 11, first=0, rank=1),
    adapted_head_case(3, 700, 16, 97, first=100, rank=8),  # a block is one sequence,
    adapted_head_case(2, 1100, 6, 97, first=0, rank=2),  # a part of one,
    adapted_head_case(7, 300, 6, 1000, first=40, rank=2),  # or several
    adapted_head_case(2, 65, 34, 97, first=64, rank=0),
]
SUBLAYERS = (ATTENTION_SUBLAYER, MLP_SUBLAYER)
GROUPS = (EMBED, QKV, ATTENTION, HEADS, PROJECT_RESIDUAL, MLP_UP, *SUBLAYERS, HEAD)
CASES = [case for group in GROUPS for case in group]
FIRST_CASES = [group[0] for group in GROUPS]


# Parity ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_equal_the_reference(case, dtype):
    case.check(dtype)


@given(
    st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9).map(lambda n: 2 * n)
)
@settings(max_examples=25, deadline=None)
def test_attention_of_any_shape(B, T, K, group, D):
    attention_case(B, T, K * group, K, D).check("float64")


@given(
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 50),
    st.integers(2, 9),
    st.none() | st.tuples(st.integers(2, 20), st.none() | st.integers(1, 9)),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_embed_of_any_shape(B, T, V, d, bigram, reset):
    embed_case(B, T, V, d, bigram, reset).check("float64")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_for_any_number_of_threads(case, one_thread):
    _, upstream, gradients = case.reference()
    starts = case.starts(gradients)
    results = []
    for count in (1, 2, 3):
        pgolf.set_num_threads(count)
        results.append(case.native("float32", upstream, starts))
    for outputs, gradients in results[1:]:
        for found, first in ((outputs, results[0][0]), (gradients, results[0][1])):
            assert all(same_bits(found[name], first[name]) for name in first)


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same_or_says_that_it_is_missing(isa):
    result = run_isolated("from tests.test_ops import check_first_cases; check_first_cases()", PGOLF_CPU_ISA=isa)
    widest = run_isolated("from pgolf import _C; print(_C.cpu_isa())", PGOLF_CPU_ISA="").stdout.strip()
    if isa in ("plain", widest) or widest == "avx512":
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == [isa]
    else:
        assert re.search(
            rf'ValueError: PGOLF_CPU_ISA is "{isa}"(, which this processor does not have\.|; this build knows: )',
            result.stderr,
        )


def check_first_cases() -> None:
    for case in FIRST_CASES:
        for dtype in DTYPES:
            case.check(dtype)
    check_optimizers("float32")
    check_newton_schulz("float32")
    assert _C.Ops(-1, "float32").description().startswith(f"cpu {_C.cpu_isa()}, float32, ")
    print(_C.cpu_isa())


# What the reference's autograd does not show --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_pending_may_be_dskip_itself(dtype):
    """Where a block pops its own input: dskip is written first, then added to dx."""
    case = QKV[2]
    _, upstream, _ = case.reference()
    inputs, upstream = cast(case.inputs, dtype), cast(upstream, dtype)
    _, saved = ops.qkv(mixed_native(inputs, "x"), *(inputs[name] for name in ("wq", "wk", "wv", "cos", "sin")))
    apart = ops.qkv_backward(saved, upstream["q"], upstream["k"], upstream["v"])

    names = [name for name in ops.QkvGrads._fields if name != "adapters"]
    outputs = {"d" + name: np.zeros_like(saved.tensors[name]) for name in names}
    gradients = {"dqkv": np.concatenate([upstream[name] for name in "qkv"], axis=2)}
    native = _C.Ops(-1, dtype)
    inputs = {**saved.tensors, **gradients, "pending": outputs["dskip"]}
    native.heads_backward(inputs, outputs, **saved.numbers)
    assert same_bits(outputs["dskip"], apart.skip)
    assert same_bits(outputs["dx"], apart.x + apart.skip)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_projection_may_write_onto_its_residual(dtype):
    case = project_residual_case(5, 130, 70, 600)
    inputs = cast(case.inputs, dtype)
    out, saved = ops.project_residual(inputs["x"], inputs["a"], inputs["w"])
    stream = inputs["x"].copy()
    weights = {name: saved.tensors[name] for name in ("a", "w")}
    _C.Ops(-1, dtype).project_residual({**weights, "x": stream}, {"out": stream})
    assert same_bits(stream, out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_projection_gradients_of_two_micro_batches(dtype):
    """doutᵀ·a is gathered without the scale, which ends it once."""
    rng = np.random.default_rng(7)
    w, scale, dscale = draw(rng, 6, 33), draw(rng, 6), draw(rng, 6)
    batches = [(draw(rng, B, 20, 33), draw(rng, B, 20, 6)) for B in (1, 3)]
    leaves = [torch.tensor(array, requires_grad=True) for array in (w, scale)]
    objective = sum((torch.tensor(dout) * leaves[1] * (torch.tensor(a) @ leaves[0].T)).sum() for a, dout in batches)
    expected_w, expected_scale = torch.autograd.grad(objective, leaves)

    gathered = {}
    for a, dout in batches:
        residual = np.zeros(dout.shape, dtype)
        _, saved = ops.project_residual(residual, a.astype(dtype), w.astype(dtype))
        gathered = {"w": ops.project_residual_backward(saved, dout.astype(dtype), add_to=gathered).w}
    dw, dscale_found = ops.finish_projection(w.astype(dtype), scale.astype(dtype), gathered["w"], dscale.astype(dtype))
    assert_close(dw, expected_w.numpy(), dtype, "w")
    assert_close(dscale_found, expected_scale.numpy() + dscale, dtype, "scale")


@pytest.mark.parametrize("kept", [1, 63, 64, 100])
def test_what_stands_at_a_position_does_not_depend_on_later_tokens(kept):
    """Bit for bit, at equal length."""
    cases = [
        embed_case(2, 130, 97, 32, (53, 6), reset=True),
        qkv_case(2, 130, 32, 4, 2, 6, "other"),
        attention_case(2, 130, 6, 2, 6),
        project_residual_case(2, 130, 32, 6, "other"),
        mlp_up_case(2, 130, 32, 97),
        head_case(2, 130, 32, 97),
    ]
    rng = np.random.default_rng(8)
    for case in cases:
        changed = {
            name: np.concatenate([a[:, :kept], rng.permuted(a[:, kept:], axis=1)], axis=1)
            if a.shape[:2] == (2, 130)
            else a
            for name, a in case.inputs.items()
        }
        _, upstream, gradients = case.reference()
        starts = case.starts(gradients)
        before, _ = case.native("float32", upstream, starts)
        case.inputs = changed
        after, _ = case.native("float32", upstream, starts)
        for name in before:
            if not name.startswith(("late", "last")):
                assert not np.array_equal(before[name], after[name]), case.name
                assert same_bits(before[name][:, :kept], after[name][:, :kept]), f"{case.name}: {name}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_and_smear_gate_are_exact_on_signs(dtype):
    """Rows of ±1 have rms 1 to the last bit (float32), and gates of 0, ½ and 1 keep them exact."""
    rng = np.random.default_rng(9)
    table = rng.choice([-1.0, 1.0], (11, 8))
    ids = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    gate = np.repeat([-1000.0, 0.0, 1000.0, 0.0], 2)
    share = np.repeat([0.0, 0.5, 1.0, 0.5], 2)
    previous = np.concatenate([np.zeros((2, 1, 8)), table[ids[:, :-1]]], axis=1)
    for reset in (False, True):
        x0, _ = ops.embed(ids, table.astype(dtype), gate.astype(dtype), reset_at_bos=reset, bos_id=1)
        before = np.where((ids == 1)[..., None], 0.0, previous) if reset else previous
        expected = (1 - share) * table[ids] + share * before
        if dtype == "float32":
            np.testing.assert_array_equal(x0, expected)
        else:
            np.testing.assert_allclose(x0, expected / math.sqrt(1 + 2.0**-23), rtol=1e-15)


@pytest.mark.parametrize(("H", "K"), [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_query_heads_read_their_key_value_heads(H, K):
    """With one position attention is a copy of v."""
    rng = np.random.default_rng(10)
    v = rng.integers(-9, 9, (3, 1, K, 4)).astype(np.float32)
    q, k = (draw(rng, 3, 1, heads, 4).astype(np.float32) for heads in (H, K))
    o, _ = ops.attention(q, k, v, np.ones(H, np.float32))
    np.testing.assert_array_equal(o, v[:, :, [h * K // H for h in range(H)]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_queries_give_prefix_means(dtype):
    rng = np.random.default_rng(11)
    v = rng.integers(-9, 9, (2, 130, 1, 4)).astype(dtype)
    q, k = np.zeros((2, 130, 3, 4), dtype), draw(rng, 2, 130, 1, 4).astype(dtype)
    o, _ = ops.attention(q, k, v, np.full(3, 1.5, dtype))
    count = np.arange(1, 131, dtype=dtype)[:, None, None]
    expected = np.broadcast_to(np.cumsum(v, axis=1) * (1 / count), o.shape)
    np.testing.assert_array_equal(o, expected)


def test_any_layout_integer_width_and_dlpack_array_will_do():
    case = EMBED[0]
    inputs = cast(case.inputs, "float32")
    expected, _ = ops.embed(**inputs)
    other = dict(inputs)
    other["ids"] = torch.tensor(inputs["ids"].astype(np.int16))
    other["tok_emb"] = np.asfortranarray(inputs["tok_emb"])
    other["smear_gate"] = np.repeat(inputs["smear_gate"], 2)[::2]
    other["bigram_emb"] = torch.tensor(inputs["bigram_emb"], requires_grad=True)
    assert same_bits(ops.embed(**other)[0], expected)


def test_gradients_that_are_one_array_are_not_mixed_up():
    rng = np.random.default_rng(12)
    arrays = [draw(rng, 1, 5, 2, 4) for _ in range(4)]
    _, saved = ops.attention(*arrays[:3], np.ones(2))
    cos, sin = np.ones((5, 2)), np.zeros((5, 2))
    x, w = draw(rng, 1, 5, 3), draw(rng, 8, 3)
    _, saved = ops.qkv(ops.MixedInput(x, x, np.ones((2, 3))), w, w, w, cos, sin)
    one = arrays[3]
    for found, expected in zip(
        ops.qkv_backward(saved, one, one, one), ops.qkv_backward(saved, one, one.copy(), one.copy()), strict=True
    ):
        assert found is expected is None or same_bits(found, expected)


# Optimizer ------------------------------------------------------------------------------------------------------------

OPTIMIZER_TOLERANCE = {"float32": 1e-4, "float64": 1e-10}


def check_optimizers(dtype: str) -> None:
    """Five steps of both on several tensors, with everything that scales or decays."""
    rng = np.random.default_rng(13)
    shapes = [(16, 16), (40, 24), (24, 40), (1, 1), (1, 7), (7, 1), (130, 2)]
    weights = [draw(rng, *shape) for shape in shapes]
    steps = [[draw(rng, *shape) for shape in shapes] for _ in range(5)]

    muon = [[a.astype(dtype) for a in weights], [np.zeros(shape, dtype) for shape in shapes]]
    adam = [muon[0], muon[1], muon[1]]
    expected_muon = [(torch.tensor(w), torch.zeros(w.shape, dtype=torch.float64)) for w in weights]
    expected_adam = [(p.clone(), m.clone(), m.clone()) for p, m in expected_muon]
    for t, gradients in enumerate(steps, start=1):
        lr, momentum, scale = 0.02 * t, 0.9 + 0.01 * t, 1 / t
        native = [g.astype(dtype) for g in gradients]
        # An odd step has the rule of the public record, whose every iteration has a polynomial of its own.
        rule = {"coefficients": NEWTON_SCHULZ["polar_express"], "normalize_rows": True} if t % 2 else {}
        ways = {"lr": lr, "momentum": momentum, "weight_decay": 0.04, "grad_scale": scale}
        muon = ops.muon(muon[0], native, muon[1], **ways, **rule)
        adam = ops.adam(*[adam[0], native, *adam[1:]], step=t, lr=lr, eps=1e-6, weight_decay=0.01, grad_scale=scale)
        for i, g in enumerate(gradients):
            trainer.muon_update(
                expected_muon[i][0], torch.tensor(g) * scale, expected_muon[i][1], lr, momentum, 0.04, 5, **rule
            )
            trainer.adamw_update(
                expected_adam[i][0], torch.tensor(g) * scale, *expected_adam[i][1:], t, lr, (0.9, 0.95), 1e-6, 0.01
            )
    for found, expected in ((muon, expected_muon), (adam, expected_adam)):
        for state, arrays in enumerate(found):
            for i, array in enumerate(arrays):
                error = np.linalg.norm(array - expected[i][state].numpy())
                assert array.dtype == dtype
                assert error <= OPTIMIZER_TOLERANCE[dtype] * np.linalg.norm(expected[i][state].numpy()), (
                    shapes[i],
                    state,
                )


@pytest.mark.parametrize("dtype", DTYPES)
def test_five_steps_of_muon_and_adam(dtype):
    check_optimizers(dtype)


def test_optimizers_give_the_same_bits_for_any_number_of_threads(one_thread):
    rng = np.random.default_rng(14)
    weights, gradients, m = (
        [draw(rng, *shape).astype(np.float32) for shape in ((200, 180), (7, 9), (64, 130))] for _ in range(3)
    )
    results = []
    for count in (1, 2, 3):
        pgolf.set_num_threads(count)
        norm, scale, _ = ops.grad_norm(gradients, 0.3)
        new = [*ops.adam(weights, gradients, m, [a * a for a in m], step=3, lr=0.1, grad_scale=scale)]
        new += ops.muon(weights, gradients, m, lr=0.1)
        new.append([ops.working_copy(w, clip=15) for w in weights])
        new.append([ops.axpby(0.3, w, 0.7, g) for w, g in zip(weights, gradients, strict=True)])
        new.append([np.array([norm, scale, *(ops.sum(w) for w in weights)])])
        results.append([array for arrays in new for array in arrays])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("group", ops.GROUPS)
def test_adam_takes_its_group_s_rate(group):
    (w,), _, _ = ops.adam([np.ones(3)], [np.ones(3)], [np.zeros(3)], [np.zeros(3)], step=1, lr=0.5, group=group)
    np.testing.assert_allclose(w, np.full(3, 0.5), rtol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_norm_and_clip(dtype):
    rng = np.random.default_rng(15)
    gradients = [draw(rng, *shape).astype(dtype) for shape in ((300, 70), (5,), (), (2, 3, 4))]
    gradients += [draw(rng, 1).astype(dtype) for _ in range(1100)]
    norm = math.sqrt(math.fsum(float(x) ** 2 for g in gradients for x in g.ravel()))
    for clip, scale in ((0.0, 1.0), (norm * 2, 1.0), (0.3, 0.3 / (norm + 1e-6))):
        found = ops.grad_norm(gradients, clip)
        assert found.norm == pytest.approx(norm, rel=1e-13)
        assert found.scale == pytest.approx(scale, rel=1e-13)
        assert found.finite is True
    assert ops.grad_norm([np.zeros(3, dtype)], 0.3) == (0.0, 1.0, True)
    large = np.full(4, 1e30, dtype)
    assert ops.grad_norm([large]).norm == pytest.approx(2e30, rel=1e-6)  # beyond float32, were it summed there


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gradients_that_are_not_finite_change_nothing(bad):
    rng = np.random.default_rng(16)
    state = [[draw(rng, 4, 5).astype(np.float32)] for _ in range(3)]
    gradient = [np.full((4, 5), bad, np.float32)]
    norm = ops.grad_norm([np.ones(3, np.float32), *gradient], 0.3)
    assert norm.finite is False
    after_adam = ops.adam(
        state[0], gradient, *state[1:], step=1, lr=0.1, weight_decay=0.1, grad_scale=norm.scale, finite=norm.finite
    )
    after_muon = ops.muon(
        state[0], gradient, state[1], lr=0.1, weight_decay=0.1, grad_scale=norm.scale, finite=norm.finite
    )
    for after in (after_adam, after_muon):
        assert all(same_bits(a[0], b[0]) for a, b in zip(after, state, strict=False))


def matrix_of_rank(rng: np.random.Generator, rows: int, cols: int, rank: int) -> np.ndarray:
    return as_float32(draw(rng, rows, rank) @ draw(rng, rank, cols))


def check_newton_schulz(dtype: str) -> None:
    rng = np.random.default_rng(17)
    shapes = [(64, 64), (33, 130), (130, 33), (1, 1), (1, 9), (9, 1), (2, 64)]
    cases = [(draw(rng, *shape), 2e-5) for shape in shapes]
    cases += [(matrix_of_rank(rng, rows, cols, 8), 1e-4) for rows, cols in ((64, 64), (64, 130), (130, 64))]
    cases += [(matrix_of_rank(rng, rows, cols, 1), 5e-4) for rows, cols in ((64, 64), (32, 130), (130, 32))]
    for u, tolerance in cases:
        expected = trainer.newton_schulz(torch.tensor(u)).numpy()
        found = ops.newton_schulz(u.astype(dtype))
        assert found.dtype == dtype
        bound = tolerance if dtype == "float32" else 1e-9 * tolerance / 2e-5
        assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected), (u.shape, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_newton_schulz(dtype):
    check_newton_schulz(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [1, 15, 31])
def test_fake_quantised_weights_are_the_reference_s_bits(clip, dtype):
    rng = np.random.default_rng(18)
    ties = np.append(np.arange(-clip, clip) + 0.5, clip)  # σ = 1
    w = draw(rng, 300, len(ties)) * np.exp(draw(rng, 300, 1) * 5)
    w[0], w[1], w[2] = 0.0, ties, -ties
    w[3] *= 1e-20
    w = w.astype(dtype)
    assert same_bits(ops.working_copy(w, clip=clip), reference.fake_quantise(torch.tensor(w), clip).numpy())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (513, 3, 70), (64, 130, 257)])
def test_bare_products(m, n, k, dtype):
    rng = np.random.default_rng(20)
    a, b = draw(rng, m, k).astype(dtype), draw(rng, n, k).astype(dtype)
    assert_close(ops.product(a, b), a.astype(float) @ b.astype(float).T, dtype, "product")


def test_timing_repeats_an_operation_and_leaves_the_next_one_alone():
    rng = np.random.default_rng(21)
    u = draw(rng, 64, 96).astype(np.float32)
    expected = ops.newton_schulz(u)
    with ops.timed() as seconds:
        assert same_bits(ops.newton_schulz(u), expected)
        assert seconds() > 0
    w, m, v = [u], [u], [u * u]
    with ops.timed(repeats=3):
        four_steps = ops.adam(w, w, m, v, step=1, lr=0.1)
    for _ in range(4):
        w, m, v = ops.adam(w, [u], m, v, step=1, lr=0.1)
    assert all(same_bits(a[0], b[0]) for a, b in zip(four_steps, (w, m, v), strict=True))
    with pytest.raises(ValueError, match="repeats is -1"), ops.timed(repeats=-1):
        pass


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_and_axpby(dtype):
    rng = np.random.default_rng(19)
    x, y = (draw(rng, 3, 20_001).astype(dtype) for _ in range(2))
    assert ops.sum(x) == pytest.approx(math.fsum(x.ravel().tolist()), rel=1e-10)
    assert_close(ops.axpby(0.3, x, -0.7, y), 0.3 * x.astype(float) - 0.7 * y, dtype, "axpby")


# Errors ---------------------------------------------------------------------------------------------------------------

X, W, GATE, IDS = np.ones((2, 3, 4)), np.ones((5, 4)), np.ones(4), np.ones((2, 3), np.int32)
Q, TABLE = np.ones((2, 3, 4, 2)), np.ones((3, 1))
MIXED = ops.MixedInput(X, X, np.ones((2, 4)))
ONE = np.ones(())


def saved_qkv(dtype: str) -> ops.Saved:
    case = QKV[1]
    inputs = cast(case.inputs, dtype)
    return ops.qkv(mixed_native(inputs, ""), *(inputs[name] for name in ("wq", "wk", "wv", "cos", "sin")))[1]


def saved_attention() -> ops.Saved:
    return ops.attention(Q, Q, Q, GATE)[1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.attention(Q, Q[:1], Q, GATE),
            ValueError,
            r"k has shape \(1, 3, 4, 2\); expected \(B, T, K, D\) = \(2, T, K, 2\)",
        ),
        (
            lambda: ops.attention(Q, Q[:, :, :3], Q[:, :, :3], GATE),
            ValueError,
            "q has 4 heads; expected a multiple of k's 3",
        ),
        (
            lambda: ops.attention(Q[..., :0], Q, Q, GATE),
            ValueError,
            r"q has shape \(2, 3, 4, 0\); expected .* at least 1",
        ),
        (
            lambda: ops.attention(Q, Q, Q.astype("f4"), GATE),
            TypeError,
            "v has dtype float32; expected float64, the dtype",
        ),
        (
            lambda: ops.attention(Q, Q[:, :2], Q[:, :2], GATE),
            ValueError,
            "q has 3 positions; expected at most 2, those that there are",
        ),
        (
            lambda: ops.project_residual(MIXED, np.ones((2, 4, 5)), np.ones((4, 5))),
            ValueError,
            "a has 4 positions; expected at most 3, those that there are",
        ),
        (
            lambda: ops.qkv(MIXED, W[:4], W[:4], W[:4], TABLE, TABLE, first=3),
            ValueError,
            "first is 3; 0 … 2 was expected",
        ),
        (
            lambda: ops.attention_backward(ops.attention(Q[:, 1:], Q, Q, GATE)[1], Q),
            ValueError,
            "saved comes from a call with the queries of 2 positions; the backward needs all 3",
        ),
        (lambda: ops.attention(Q.astype(int), Q, Q, GATE), TypeError, "q has dtype int64; expected float32 or float64"),
        (lambda: ops.attention(Q.astype("f2"), Q, Q, GATE), TypeError, "q has dtype float16; expected float32 or"),
        (lambda: ops.embed(IDS * 5, W, GATE), ValueError, r"ids\[0, 0\] is 5; token ids run from 0 to 4"),
        (lambda: ops.embed(-IDS, W, GATE), ValueError, r"ids\[0, 0\] is -1; token ids run"),
        (lambda: ops.embed(X, W, GATE), TypeError, "ids has dtype float64; token ids are integers"),
        (lambda: ops.embed(IDS[0], W, GATE), ValueError, r"ids has shape \(3,\)"),
        (lambda: ops.embed(IDS, W, GATE, W), ValueError, "bigram term is incomplete"),
        (lambda: ops.embed(IDS, W, GATE, None, W), ValueError, "bigram term is incomplete"),
        (lambda: ops.embed(IDS, W, GATE, W[:1], None, ONE), ValueError, "bigram_emb has 1 bucket; expected at least 2"),
        (
            lambda: ops.embed(IDS, W, GATE, W[:, :3], None, ONE),
            ValueError,
            r"bigram_emb has shape \(5, 3\); expected \(n, d\) = \(n, 4\)",
        ),
        (
            lambda: ops.embed(IDS, W, GATE, W, None, np.ones(1)),
            ValueError,
            r"bigram_scale has shape \(1,\); expected \(\)",
        ),
        (lambda: ops.embed(IDS, W, GATE, bos_id=2**31), ValueError, "bos_id is 2147483648"),
        (
            lambda: ops.qkv(X, W[:4], W[:4], W[:4], TABLE, TABLE),
            TypeError,
            "mixed is a ndarray; expected an ops.MixedInput",
        ),
        (lambda: ops.qkv(MIXED._replace(skip=X), W, W, W, TABLE, TABLE), ValueError, "one of skip and skip_weight"),
        (
            lambda: ops.qkv(MIXED, W, W, W, TABLE, TABLE),
            ValueError,
            "wq has 5 rows; expected a multiple of the head width 2",
        ),
        (
            lambda: ops.qkv(MIXED, W[:4], W[:4], W[:4], TABLE[:2], TABLE[:2]),
            ValueError,
            "cos and sin have 2 rows; expected one for each of 3",
        ),
        (
            lambda: ops.project_residual(X, X, W),
            ValueError,
            r"w has shape \(5, 4\); expected \(d, c\) = \(4, 4\)",
        ),
        (lambda: ops.mlp_up(X, W[0]), ValueError, r"w has shape \(4,\); expected \(F, d\) = \(F, 4\)"),
        (lambda: ops.head_logits(X, W, softcap=0.0), ValueError, "softcap is 0.0; expected a number above 0"),
        (lambda: ops.head_logits(X, W, softcap=math.nan), ValueError, "softcap is nan; expected"),
        (lambda: ops.head_logits(X, W, first=3), ValueError, "first is 3; 0 … 2 was expected"),
        (lambda: ops.head_logits(X, W, first=1.0), TypeError, "first is 1.0; an integer was expected"),
        (lambda: ops.head_loss(X, W, IDS * 7), ValueError, r"targets\[0, 0\] is 7; token ids run from 0 to 4"),
        (lambda: ops.head_loss(X, W, IDS[:1]), ValueError, r"targets has shape \(1, 3\); expected \(B, T\) = \(2, 3\)"),
        (
            lambda: ops.mlp_up_backward(saved_attention(), X),
            ValueError,
            "saved comes from ops.attention; expected what ops.mlp_up",
        ),
        (lambda: ops.mlp_up_backward(X, X), ValueError, "saved comes from a ndarray; expected what ops.mlp_up"),
        (
            lambda: ops.mlp_up_backward(ops.mlp_up(X, W)[1], X),
            ValueError,
            r"du has shape \(2, 3, 4\); expected \(2, 3, 5\)",
        ),
        (
            lambda: ops.project_residual_backward(ops.project_residual(X, X, np.ones((4, 4)))[1], X, h_scale=-1.0),
            ValueError,
            "h_scale is -1.0; expected mlp_up's, or 0",
        ),
        (lambda: ops.mlp_up(X, W, norm_scale=0.0), ValueError, "norm_scale is 0.0; expected a number above 0"),
        (lambda: ops.mlp_up(X, W, negative_slope=-0.5), ValueError, "negative_slope is -0.5; expected a number from 0"),
        (
            lambda: ops.project_residual_backward(
                ops.project_residual(X, X, np.ones((4, 4)))[1], X, h_scale=1.0, negative_slope=0.5
            ),
            ValueError,
            "negative_slope is 0.5; expected h_scale above 0 and 3 bytes of signs in negative",
        ),
        (lambda: ops.attention_backward(saved_attention(), None), TypeError, "do has dtype object; expected float64"),
        (
            lambda: ops.attention_backward(saved_attention(), Q, qkv=saved_attention()),
            ValueError,
            "qkv comes from ops.attention; expected what ops.qkv",
        ),
        (
            lambda: ops.attention_backward(saved_attention(), Q, qkv=saved_qkv("float32")),
            TypeError,
            "qkv comes from a call on float32; expected float64",
        ),
        (
            lambda: ops.attention_backward(saved_attention(), Q, qkv=saved_qkv("float64")),
            ValueError,
            "qkv comes from a call that made another q than this attention read",
        ),
        (
            lambda: ops.attention_backward(saved_attention(), Q, add_to={"q": Q}),
            ValueError,
            "add_to holds 'q'; expected names from: gain",
        ),
        (
            lambda: ops.attention_backward(saved_attention(), Q, add_to={"gain": W}),
            ValueError,
            r"add_to\['gain'\] has shape \(5, 4\)",
        ),
        (lambda: ops.grad_norm([]), ValueError, "grads holds 0 arrays; expected at least 1"),
        (lambda: ops.adam([W], [W, W], [W], [W], step=1, lr=0.1), ValueError, "grads holds 2 arrays; expected 1"),
        (
            lambda: ops.adam([W], [W], [X], [W], step=1, lr=0.1),
            ValueError,
            r"m\[0\] has shape \(2, 3, 4\); expected \(5, 4\)",
        ),
        (lambda: ops.adam([W], [W], [W], [W], step=0, lr=0.1), ValueError, "step is 0; 1 … "),
        (
            lambda: ops.adam([W], [W], [W], [W], step=1, lr=0.1, group="bias"),
            ValueError,
            "group is 'bias'; expected one of matrix",
        ),
        (lambda: ops.muon([X], [X], [X], lr=0.1), ValueError, r"weights\[0\] has shape \(2, 3, 4\); expected a matrix"),
        (
            lambda: ops.muon([W], [W], [W], lr=0.1, coefficients=[(1.0, 2.0)]),
            ValueError,
            "coefficients = .*: must be one of keller_jordan, polar_express, or a list of 1 to 8",
        ),
        (lambda: ops.newton_schulz(W, coefficients=[(1.0, 2.0, 3.0)] * 9), ValueError, "a list of 1 to 8 lists"),
        (lambda: ops.muon([W], [W], [W], lr=0.1, ns_steps=0), ValueError, "ns_steps is 0; 1 … "),
        (lambda: ops.working_copy(W, clip=128), ValueError, "clip is 128; 0 … 127 was expected"),
        (lambda: ops.working_copy(GATE, clip=15), ValueError, r"w has shape \(4,\); expected \(rows, cols\)"),
        (lambda: ops.axpby(1.0, W, 1.0, X), ValueError, r"y\[0\] has shape \(2, 3, 4\); expected \(5, 4\)"),
    ],
)
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_native_face_refuses_what_would_crash_it():
    native = _C.Ops(-1, "float32")
    a = np.ones((2, 2), np.float32)
    with pytest.raises(ValueError, match="needs an array named q"):
        native.attention({}, {}, normed=False)
    with pytest.raises(ValueError, match="C-contiguous"):
        native.working_copy({"w": a.T}, {"out": a.copy()}, 15, 1.0)
    with pytest.raises(ValueError, match="The dtype is int16; expected float32"):
        native.sum(np.ones(2, np.int16))
