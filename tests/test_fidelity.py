"""benchmarks/fidelity.py and run_script.py on the CPU, with a stand-in for the public script that prints its lines."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import zstandard

import pgolf
from pgolf.config import Config
from pgolf.model import parameter_shapes
from tests.reference.model import fake_quantise
from tests.reference.quant import quantize_state
from tests.runs import SMALL_MODEL

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("one_thread")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STEPS = 20
SMALL = {
    **SMALL_MODEL,
    "train.iterations": STEPS,
    "train.train_batch_tokens": 512,
    "train.train_seq_len": 64,
    "train.warmdown_iters": 10,
    "train.muon_momentum_warmup_steps": 5,
    "train.val_loss_every": 5,
    "train.swa_every": 2,
    "eval.eval_stride": 32,
}

# A program of train_gpt.py's outline: its names, variables and lines, a model of the same parameters, hardly any model.
STAND_IN = """
import math, os
import torch
import torch.nn.functional as F
from torch import nn

env = os.environ
N, V, D = int(env["ITERATIONS"]), int(env["VOCAB_SIZE"]), int(env["MODEL_DIM"])
L, H, K = int(env["NUM_LAYERS"]), int(env["NUM_HEADS"]), int(env["NUM_KV_HEADS"])
T, EVERY = int(env["TRAIN_SEQ_LEN"]), int(env["VAL_LOSS_EVERY"])
HIDDEN, TIED = int(float(env["MLP_MULT"]) * D), bool(int(env["TIE_EMBEDDINGS"]))

class CastedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))

class Muon(torch.optim.SGD):
    pass

def linear(rows, columns):
    return CastedLinear(columns, rows, bias=False)

def scale(*shape):
    return nn.Parameter(torch.ones(*shape))

class Part(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        n, e = int(env["BIGRAM_VOCAB_SIZE"]), int(env["BIGRAM_DIM"])
        self.tok_emb = nn.Embedding(V, D, dtype=torch.bfloat16)
        self.bigram = Part(embed=nn.Embedding(n, e), proj=linear(D, e), scale=nn.Parameter(torch.tensor(0.05)))
        self.smear, self.skip_weights = Part(gate=scale(D)), scale(min(L // 2, L - L // 2), D)
        self.blocks = nn.ModuleList(
            Part(
                attn_scale=scale(D), mlp_scale=scale(D), resid_mix=scale(2, D),
                attn=Part(c_q=linear(D, D), c_k=linear(K * D // H, D), c_v=linear(K * D // H, D), proj=linear(D, D),
                          q_gain=scale(H)),
                mlp=Part(fc=linear(HIDDEN, D), proj=linear(D, HIDDEN)),
            )
            for _ in range(L)
        )
        self.table = None
    def forward(self, ids, targets):
        if self.table is None:
            self.table = torch.ones(D)
        x = self.tok_emb(ids).float() * self.table
        for block in self.blocks:
            x = x + block.mlp.proj(torch.relu(block.mlp.fc(x))) + block.attn.proj(block.attn.c_q(x))
        return F.cross_entropy((x @ self.tok_emb.weight.float().T).flatten(0, 1), targets.flatten())

def mixed_quantize_int6(state, categories):
    return dict(state), {}

def dequantize_mixed_int6(stored, kinds, template):
    return stored

def main():
    torch.manual_seed(int(env["SEED"]))
    model = GPT()
    compiled = torch.compile(model)
    muon = Muon(model.blocks.parameters(), lr=0.05)
    adam = torch.optim.AdamW([model.tok_emb.weight], lr=0.01)
    ids = torch.arange(2 * T).reshape(2, T) % V
    probe = torch.ones(1, D)
    for step in range(N + 1):
        fc = model.blocks[0].mlp.fc
        print("probe", step, *(f"{fc.train(mode)(probe).sum().item():.7f}" for mode in (True, False)))
        model.train()
        if step % EVERY == 0 or step == N:
            with torch.inference_mode():
                val_loss = compiled(ids, ids).item()
            print(f"step:{step}/{N} val_loss:{val_loss:.4f} val_bpb:1.5 train_time:0ms step_avg:0.00ms")
        if step == N:
            break
        loss = compiled(ids, ids)
        loss.backward()
        for optimizer in (adam, muon):
            optimizer.step()
            optimizer.zero_grad()
        print(f"step:{step + 1}/{N} train_loss:{loss.item():.4f} train_time:0ms step_avg:0.00ms")
    torch.save(model.state_dict(), "final_model.pt")
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.numel() > 65536:
            parameter.data[parameter.abs() < torch.quantile(parameter.abs().float(), 0.03)] = 0
    stored, kinds = mixed_quantize_int6({k: v.detach() for k, v in model.state_dict().items()}, {"mlp"})
    model.load_state_dict(dequantize_mixed_int6(stored, kinds, model.state_dict()))
    print("final_int8_zlib_roundtrip_exact val_loss:2.50000000 val_bpb:1.50000000")

if __name__ == "__main__":
    main()
"""


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # dataclasses look it up
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def work(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `books`, 560 short ones, the stand-in script, and what runs leave in `work`."""
    folder = tmp_path_factory.mktemp("fidelity")
    (folder / "books").mkdir()
    (tokenizer,) = corpus.glob("*.model")
    shutil.copy(tokenizer, folder / "books" / "books_1024_bpe.model")
    texts = (f"Book {i} says that {i * i} is the square of {i}, and that {i + 1} comes next. " * 3 for i in range(560))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "books" / "books.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (folder / "train_gpt.py").write_text(STAND_IN)
    return folder


@pytest.fixture
def fidelity(work: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the program; returns its exit status."""
    program = module("fidelity")

    def run(*arguments: Any) -> int:
        sets = [part for key, value in SMALL.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        paths = [work / "books", "--work", work / "work", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["fidelity.py", *map(str, [*paths, *sets, *arguments])])
        try:
            program.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


def result(path: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(path.read_text())
    return made


def log_of(curve: dict[str, Any], shift: float = 0.0) -> str:
    """The lines that a script with this curve would have printed; `shift` is added to its last validation loss."""
    lines = [f"step:{s}/20 train_loss:{loss:.4f} train_time:1ms step_avg:1.00ms" for s, loss in curve["losses"].items()]
    for step, loss in curve["validation"].items():
        lines.append(
            f"step:{step}/20 val_loss:{loss + shift * (step == '20'):.4f} val_bpb:1.0 train_time:1ms step_avg:1ms"
        )
    score = f"val_loss:{curve['score_loss']:.8f} val_bpb:{curve['score_bpb']:.8f}"
    return "\n".join([*lines, f"final_int8_zlib_roundtrip_exact {score}", ""])


def test_the_distance_decides(fidelity: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside its own losses a run is within tolerance; beside a validation loss that is too far off it is not."""
    assert fidelity("--out", tmp_path / "one.json", "--recipe", "pr286") == 0
    first = result(tmp_path / "one.json")
    assert first["within_tolerance"] is None and first["recipe"] == "pr286"  # for which no numbers are stored
    curve = first["runs"][0]["pgolf"]
    assert len(curve["losses"]) == STEPS and list(curve["validation"]) == ["5", "10", "15", "20"]
    capsys.readouterr()
    for shift, good in ((0.0, True), (0.011, True), (0.013, False)):
        (tmp_path / "log.txt").write_text(log_of(curve, shift))
        assert fidelity("--log", tmp_path / "log.txt", "--recipe", "pr286", "--out", tmp_path / "two.json") == (
            not good
        )
        assert result(tmp_path / "two.json")["within_tolerance"] is good
        printed = capsys.readouterr().out
        assert ("MISS" in printed) is not good
        assert ("--seeds 42,7,1337" in printed) is not good
        assert re.search(r"training loss, 20 steps: largest distance 0\.00 %", printed)


def test_the_mean_of_the_seeds_decides(capsys: pytest.CaptureFixture[str]) -> None:
    program = module("fidelity")

    def curves(*losses: float, bpb: float = 1.0) -> list[Any]:
        return [program.Curve({1: 7.0}, {100: loss, 200: loss}, 2.0, bpb) for loss in losses]

    other = curves(3.0, 3.0, 3.0)
    assert program.verdict(curves(3.011), other[:1]) is False  # step 200 allows 0.006
    assert program.verdict(curves(3.011, 2.999, 3.0), other) is True
    assert program.verdict(curves(3.0, bpb=1.0029), other[:1]) is True
    assert program.verdict(curves(3.0, bpb=1.0031), other[:1]) is False
    assert (program.tolerance(100), program.tolerance(200)) == (0.012, 0.006)
    assert "MISS" in capsys.readouterr().out


def test_stored_numbers_are_the_base_recipes(fidelity: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity("--steps", 3) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ +1 +\d\.\d+ +6\.9370 ", printed, re.MULTILINE)
    assert re.search(r"^ +3 +\d\.\d+ +7\.4810 ", printed, re.MULTILINE)
    assert not re.search(r"^ +4 ", printed, re.MULTILINE)


def test_the_script_runs_with_the_recipes_settings_and_pgolf_starts_from_its_weights(
    fidelity: Callable[..., int], work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, common = work / "train_gpt.py", ("--recipe", "pr286", "--eager")
    assert fidelity("--script", script, "--only", "script", *common) == 0
    folder = work / "work" / "pr286-42" / "whole"
    log = (folder / "log.txt").read_text()
    config = Config.from_recipe("pr286", SMALL)
    initial, final = (dict(np.load(folder / f"{name}.npz")) for name in ("initial", "final"))
    assert {name: w.shape for name, w in initial.items()} == parameter_shapes(config.model)

    # Late QAT: a training product sees rounded weights from 0.85 of the steps on, any other never.
    probes = {int(s): float(a) - float(b) for s, a, b in re.findall(r"^probe (\d+) (\S+) (\S+)$", log, re.MULTILINE)}
    assert {step for step, difference in probes.items() if difference} == {17, 18, 19, 20}

    # The recipe's quantisation, by tests/reference, of the weights that the script ended with.
    trained = {name: w.float().numpy() for name, w in torch.load(folder / "final_model.pt").items()}
    expected, _ = quantize_state(trained, config.export.policy, config.export.small_numel, config.export.prune)
    for name, w in expected.items():
        wanted = torch.from_numpy(w).bfloat16().float().numpy() if name == "tok_emb.weight" else w
        np.testing.assert_array_equal(final[name], wanted, err_msg=name)

    # What was run stays: a script that cannot run is not asked again.
    script.write_text("raise SystemExit('not again')")
    try:
        plot, out = tmp_path / "curves.png", tmp_path / "out.json"
        assert fidelity("--script", script, *common, "--out", out, "--plot", plot) == 1
    finally:
        script.write_text(STAND_IN)
    found = result(out)
    assert found["within_tolerance"] is False
    run = found["runs"][0]
    assert run["script"]["score_bpb"] == 1.5 and run["script"]["other"]["bpb_by_pgolf"] > 0
    assert len(run["script"]["losses"]) == len(run["pgolf"]["losses"]) == STEPS
    model = pgolf.GPT(config.model, seed=None, device="cpu")
    model.load_state_dict(initial)
    shard = pgolf.read_shard(next((work / "work" / "data").glob("*_train_*.bin")))[: 8 * 65].astype(np.int64)
    spans = shard.reshape(8, 65)
    assert run["pgolf"]["losses"]["1"] == pytest.approx(model.loss(spans[:, :-1], spans[:, 1:]), rel=1e-5)
    assert plot.is_file() or "matplotlib" in capsys.readouterr().out


def test_a_stopped_script_has_no_score(fidelity: Callable[..., int], work: Path) -> None:
    assert fidelity("--script", work / "train_gpt.py", "--steps", 3, "--eager") == 0
    folder = work / "work" / "base-42" / "begin"
    log = (folder / "log.txt").read_text()
    assert "step:3/20 train_loss" in log and "step:4/20" not in log and "final" not in log
    assert (folder / "initial.npz").is_file() and not (folder / "final.npz").exists()


def test_every_variable_of_the_script_is_set(work: Path) -> None:
    program = module("fidelity")
    data = work / "data"
    data.mkdir(exist_ok=True)
    (data / "t.model").touch()
    script = " ".join(
        f'"{name}"' for name in ("SWA_EVERY", "SWA_ENABLED", "BIGRAM_VOCAB_SIZE", "DATA_PATH", "SEED", "X")
    )
    config = Config.from_recipe("pr286", {"train.seed": 7})
    assert program.script_environment(config, script, data) == {
        "SWA_EVERY": "50",
        "SWA_ENABLED": "1",
        "BIGRAM_VOCAB_SIZE": "4096",
        "SEED": "7",
        "DATA_PATH": str(work / "data_of_script"),
    }


def test_settings_shrink_with_the_run() -> None:
    program = module("fidelity")
    for recipe, every in (("base", 10), ("pr286", 10), ("pr289", 40)):
        args = type("Arguments", (), {"recipe": recipe, "dtype": "auto", "set": []})
        config = program.configuration(args, 7)
        assert (config.train.swa_every, config.train.iterations, config.train.seed) == (every, 400, 7)
        assert (config.train.train_batch_tokens, config.train.warmdown_iters) == (131_072, 200)
        assert config.eval.tail == "reference"


def test_fake_quantisation_is_that_of_the_specification() -> None:
    program = module("run_script")
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=False)
    x = torch.randn(3, 24)
    for clip in (15, 31):
        layer.qat_clip = clip
        layer.register_buffer("qat_coarse", torch.ones(()), persistent=False)
        layer.weight.grad = None
        out = program.coarse_linear(layer, x)
        rounded = fake_quantise(layer.weight.detach(), clip)
        torch.testing.assert_close(out, x @ rounded.T)
        out.sum().backward()
        torch.testing.assert_close(layer.weight.grad, x.sum(dim=0).expand(40, 24))
        layer.qat_coarse.fill_(0.0)
        assert torch.equal(program.coarse_linear(layer, x), torch.nn.functional.linear(x, layer.weight))
    assert list(layer.state_dict()) == ["weight"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "lacks CastedLinear, Muon, main, mixed_quantize_int6, dequantize_mixed_int6"),
        (STAND_IN.replace("torch.compile(model)", "model"), "compiled no model or took no step of Muon"),
    ],
)
def test_a_script_that_cannot_be_compared_is_refused(source: str, message: str, work: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(source)
    program = module("fidelity")
    config = Config.from_recipe("base", {**SMALL, "train.max_wallclock_seconds": 0})
    args = type("Arguments", (), {"script": tmp_path / "other.py", "eager": True, "recipe": "base", "steps": 400})
    (work / "data").mkdir(exist_ok=True)
    (work / "data" / "t.model").touch()
    with pytest.raises(RuntimeError, match=message):
        program.run_script(args, config, work / "data", tmp_path / "run")
    assert not (tmp_path / "run" / "log.txt").exists()


def test_only_script_needs_a_script() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "fidelity.py"), "books", "--only", "script"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "--only script needs --script" in done.stderr
    with pytest.raises(ValueError, match="holds no line step:N/M train_loss"):
        module("fidelity").Curve.of_log("nothing")
