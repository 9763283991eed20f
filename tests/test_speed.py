"""Speed beside the machine's limit: the arithmetic of a token, the measured limit and where it is kept, memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf import _C
from pgolf.common.errors import DeviceError
from pgolf.config import Config, ModelConfig
from pgolf.runs.records import MEASURED, StepRecord
from pgolf.system import speed
from pgolf.system.speed import Limit, flop_per_token, known_limit, measure_limit, peak_rss
from pgolf.training.trainer import Trainer
from tests.runs import Clock, log_of, pgolf_, run, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the user's."""
    monkeypatch.setenv("PGOLF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_SECONDS", 1e-3)
    monkeypatch.setattr(speed, "_VALUES", 10_007)


# Arithmetic -----------------------------------------------------------------------------------------------------------


def test_the_base_recipe_by_hand() -> None:
    """A layer's matrices hold 1024·512 (q, k, v), 512·512, 1536·512 and 512·1536 numbers; the head 1024·512."""
    config = Config.from_recipe("base")
    assert (config.model.num_layers, config.train.train_seq_len) == (10, 2048)
    layer = 2 * (524_288 + 262_144 + 786_432 + 786_432)
    attention = 2 * 2048 * 512
    forward = 10 * (layer + attention) + 2 * 524_288
    assert flop_per_token(config.model, 2048) == 3 * forward == 207_618_048


def test_attention_is_half_of_the_keys_and_backward_twice_forward() -> None:
    """One layer, one token at a time: key t is seen by queries t … T − 1, twice (q·kᵀ and p·v), up to the half key."""
    d, T = 64, 32
    config = ModelConfig(num_layers=1, model_dim=d, num_heads=4, num_kv_heads=4, vocab_size=8, mlp_mult=1)
    pairs = sum(t + 0.5 for t in range(T))  # a query sees itself and all before; half a key less is T²/2
    attention = 2 * 2 * d * pairs / T
    products = 2 * (4 * d * d + 2 * d * d + 8 * d)
    assert flop_per_token(config, T) == pytest.approx(3 * (products + attention))


@given(
    st.integers(1, 12), st.integers(1, 8), st.integers(1, 4), st.sampled_from([8, 16, 64]), st.integers(1, 4096),
    st.booleans(),
)  # fmt: skip
def test_products_are_counted_once_a_parameter(
    layers: int, kv: int, group: int, head: int, length: int, tied: bool
) -> None:
    """6 FLOP a token for every weight of a block's matrices and of the head; the rest is attention's."""
    heads = kv * group
    config = ModelConfig(
        num_layers=layers, model_dim=heads * head, num_heads=heads, num_kv_heads=kv, vocab_size=50, tie_embeddings=tied,
        bigram_vocab_size=0,
    )  # fmt: skip
    from pgolf.model import parameter_shapes

    in_blocks = sum(
        math.prod(shape)
        for name, shape in parameter_shapes(config).items()
        if name.endswith("weight") and "blocks" in name
    )
    products = 6 * (in_blocks + 50 * config.model_dim)
    assert flop_per_token(config, length) - products == 6 * layers * length * config.model_dim


# The limit ------------------------------------------------------------------------------------------------------------


def test_a_limit_is_measured_once_and_kept(cache: Path, quick: None) -> None:
    assert known_limit("cpu") is None
    limit = measure_limit("cpu")
    assert limit.flops > 1e6 and limit.product == "4096×512×512 float32"
    assert known_limit("cpu") == limit
    (file,) = (cache / "limits").iterdir()
    assert json.loads(file.read_bytes())["machine"]["threads"] == 1
    assert str(Limit(6.8e14, "8192×8192×8192 bfloat16", "")) == "680 TFLOP/s (8192×8192×8192 bfloat16)"
    assert str(Limit(2.51e10, "p", "")) == "25.1 GFLOP/s (p)"


def test_another_number_of_threads_has_another_limit(cache: Path, quick: None) -> None:
    one = measure_limit("cpu")
    _C.set_num_threads(3)
    assert known_limit("cpu") is None
    assert measure_limit("cpu").product == "4608×512×512 float32"  # 512 rows at a time, as many for each thread
    _C.set_num_threads(1)
    assert known_limit("cpu") == one


@pytest.mark.parametrize(
    "content",
    [
        b"", b"no json", b"\xff\xfe", b"[]", b"{}", b'{"limit": {}}', b"[" * 100_000,
        b'{"machine": {}, "limit": {"flops": 1e12, "product": "p", "date": "d"}}',
    ],
)  # fmt: skip
def test_what_is_no_limit_of_this_machine_is_measured_again(content: bytes, cache: Path, quick: None) -> None:
    measure_limit("cpu")
    (file,) = (cache / "limits").iterdir()
    file.write_bytes(content)
    assert known_limit("cpu") is None
    limit = measure_limit("cpu")
    assert known_limit("cpu") == limit


@pytest.mark.parametrize("flops", ["1", None, float("nan"), float("inf"), 0, -1e12])
def test_a_rate_that_is_none_is_not_taken(flops: Any, cache: Path, quick: None) -> None:
    measure_limit("cpu")
    (file,) = (cache / "limits").iterdir()
    stored = json.loads(file.read_bytes())
    stored["limit"]["flops"] = flops
    file.write_text(json.dumps(stored))
    assert known_limit("cpu") is None


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PGOLF_CACHE", str(tmp_path / "file" / "cache"))
    assert measure_limit("cpu").flops > 0
    assert known_limit("cpu") is None


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PGOLF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert speed._cache_folder() == tmp_path / "pgolf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert speed._cache_folder() == tmp_path / ".cache" / "pgolf"


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_an_empty_product_has_no_rate(sizes: tuple[int, int, int]) -> None:
    values = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="needs sizes and values, at least one each"):
        _C.Ops(-1, "float32").product_rate(*sizes, values, 1e-3)
    with pytest.raises(ValueError, match="needs sizes and values, at least one each"):
        _C.Ops(-1, "float32").product_rate(1, 1, 1, values[:0], 1e-3)
    with pytest.raises(ValueError, match="in float32 or 16 bits"):
        _C.Ops(-1, "float64").product_rate(1, 1, 1, values, 1e-3)


def test_fewer_values_than_a_matrix_has_and_16_bits_will_do() -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        assert _C.Ops(-1, dtype).product_rate(5, 7, 11, np.ones(3, np.float32), 1e-3) > 0


# A run's records ------------------------------------------------------------------------------------------------------


def test_the_limit_is_measured_after_the_first_step_and_takes_no_training_time(
    small_corpus: Path, tmp_path: Path, cache: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock on which a step takes a second, and the measurement a thousand."""
    import pgolf.training.trainer

    clock, measured = Clock(), []

    def slow(device: str) -> Limit:
        clock.now += 1000.0
        measured.append(trainer.step)
        return measure_limit(device)

    monkeypatch.setattr(pgolf.training.trainer, "time", clock)
    monkeypatch.setattr(pgolf.training.trainer.speed, "measure_limit", slow)
    trainer = Trainer(tiny(val_loss_every=3), small_corpus, run_dir=tmp_path / "run")
    assert trainer.limit is None
    records = list(trainer)
    assert measured == [1]
    assert [record.seconds for record in records] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert [record.share_of_limit is None for record in records] == [True, True] + [False] * 5
    flop = flop_per_token(trainer.config.model, 16)
    assert trainer.limit is not None
    assert records[2].share_of_limit == pytest.approx(160 * flop / trainer.limit.flops)
    written = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["share_of_limit"] for line in written] == [record.share_of_limit for record in records]

    # The next run knows it from the start.
    again, records = run(tiny(val_loss_every=3), small_corpus, run_dir=tmp_path / "again")
    assert measured == [1] and again.limit == trainer.limit
    assert all(record.share_of_limit is not None for record in records[1:])
    assert log_of(tmp_path / "run") == log_of(tmp_path / "again")

    report = again.finish()
    assert report.share_of_limit == pytest.approx(160 * flop / again.limit.flops)
    assert report.limit_tflops == again.limit.flops / 1e12
    assert report.peak_memory_mib is not None and report.peak_memory_mib >= records[-1].memory_mib


def test_a_limit_that_a_step_exceeds_is_measured_again_once(
    small_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was measured while the machine was busy: here at 1 FLOP/s, and again at 2."""
    measured: list[int] = []

    def measure(device: str) -> Limit:
        measured.append(trainer.step)
        return Limit(2.0, "p", "d")

    monkeypatch.setattr(speed, "known_limit", lambda device: Limit(1.0, "p", "d"))
    monkeypatch.setattr(speed, "measure_limit", measure)
    trainer = Trainer(tiny(), small_corpus)
    shares = [record.share_of_limit for record in trainer]
    assert measured == [1] and all(share is not None and share > 1 for share in shares)
    assert trainer.limit == Limit(2.0, "p", "d")


def test_where_the_limit_cannot_be_measured_there_is_none(
    small_corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: str) -> Limit:
        raise DeviceError("no room")

    monkeypatch.setattr(speed, "measure_limit", fail)
    trainer, records = run(tiny(), small_corpus)
    assert trainer.limit is None and {record.share_of_limit for record in records} == {None}
    report = trainer.finish()
    assert (report.share_of_limit, report.limit_tflops) == (None, None)


def test_records_name_the_device_and_the_memory(small_corpus: Path) -> None:
    trainer, records = run(tiny(val_loss_every=6), small_corpus, device="cpu")
    assert {record.device for record in records} == {f"cpu {_C.cpu_isa()}"} == {trainer.model.device_name}
    peaks = [record.memory_mib for record in records[1:]]
    assert peaks == sorted(peaks) and 10 < peaks[0] <= peak_rss() / 2**20
    assert set(MEASURED) <= set(StepRecord.__dataclass_fields__)


def test_the_largest_resident_set_grows_with_what_is_touched() -> None:
    before = peak_rss()
    block = np.ones(before // 8 + 2**24)  # more than there has ever been
    assert peak_rss() >= max(before, block.nbytes)


# Doctor ---------------------------------------------------------------------------------------------------------------


def test_doctor_measures_when_it_is_asked_to(cache: Path, quick: None) -> None:
    assert "not measured yet: the first run does it, or pgolf doctor --measure" in pgolf_("doctor").stdout
    result = pgolf_("doctor", "--measure")
    limit = known_limit("cpu") if not _C.cuda_status().usable else known_limit("cuda")
    assert result.exit_code == 0 and limit is not None
    assert f"{limit}, measured {limit.date[:10]}" in result.stdout
