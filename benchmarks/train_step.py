"""Training steps beside PyTorch's, on one GPU or the CPU: ms, tokens/s, % of the limit, ratios, memory; start-up.

    python benchmarks/train_step.py                                   # pgolf alone: about a minute
    python benchmarks/train_step.py --work base --peers compiled      # and the natural model under torch.compile
    python benchmarks/train_step.py --work small --peers compiled     # in one micro-batch, and in 8 as published
    python benchmarks/train_step.py --work base --script train_gpt.py --data DIR      # and a public script
    python benchmarks/train_step.py --quick --device cpu              # does it run?

benchmarks/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
from common import WORK, Work

# Steps of a public script: between two of its validations, which wait for the GPU, so many.
SCRIPT_INTERVAL, SCRIPT_INTERVALS = 10, 3
SCRIPT_VALIDATION_WINDOWS = 64


def used_mib(device: str) -> float | None:
    """Of the GPU's memory, by all its users."""
    if device == "cpu":
        return None
    import torch

    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def release_memory(device: str) -> None:
    """What the program before has left in PyTorch's caches, so that the next one's memory is its own."""
    import torch

    if "torch._dynamo" in sys.modules:  # something was compiled
        torch._dynamo.reset()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def found(seconds: Sequence[float], before: float | None, device: str) -> dict[str, Any]:
    after = used_mib(device)
    return {
        "ms": statistics.median(seconds) * 1e3,
        "least": min(seconds) * 1e3,
        "mib": None if before is None or after is None else after - before,
    }


def measure_pgolf(work: Work, args: argparse.Namespace) -> dict[str, Any]:
    from pgolf import _C
    from pgolf.config import NEWTON_SCHULZ
    from pgolf.model import GPT

    before = used_mib(args.device)
    model = GPT(work.config, seed=1, device=args.device, dtype=args.dtype)
    optimizer = _C.Optimizer(model._native, 5, NEWTON_SCHULZ["keller_jordan"], False)
    ids, targets = common.batch_of(work)
    scale = 1 / ids.size
    if args.device != "cpu":
        sizes = sorted({work.micro, work.sequences % work.micro} - {0})
        optimizer.warm_up(sizes, work.length, scale, False, False, True)

    def step() -> int:
        model._native.begin_step(False)
        for first in range(0, work.sequences, work.micro):
            part = slice(first, first + work.micro)
            model._native.micro_step(ids[part], targets[part], scale)
        model._native.end_step()
        return int(optimizer.step(common.settings()))

    for _ in range(2):
        optimizer.wait(step())
    ends = []
    ticket = step()
    for _ in range(args.steps + 1):  # as the trainer does, a step is given before the one before it is waited for
        following = step()
        optimizer.wait(ticket)
        ticket = following
        ends.append(time.perf_counter())
    loss, _, finite, *_ = optimizer.wait(ticket)
    assert finite
    seconds = [after - earlier for earlier, after in itertools.pairwise(ends)]
    return {
        **found(seconds, before, args.device),
        "allocated_mib": model._native.peak_memory() / 2**20 or None,
        "loss": loss * scale,
    }


def measure_peer(work: Work, args: argparse.Namespace, compiled: bool, micro: int) -> dict[str, Any]:
    """The natural model; where a GPU's memory is too small for its micro-batches, in smaller ones."""
    import torch

    while True:
        release_memory(args.device)
        try:
            return {**_measure_peer(work, args, compiled, micro), "micro_batch_seqs": micro}
        except torch.OutOfMemoryError:
            if micro == 1:
                raise
        micro //= 2


def _measure_peer(work: Work, args: argparse.Namespace, compiled: bool, micro: int) -> dict[str, Any]:
    import peer_torch
    import torch

    before = used_mib(args.device)
    model = peer_torch.gpt_like(work.config, work.length).to(args.device)
    training = peer_torch.Training(model, compiled, dtype=common.autocast_dtype(args.dtype))
    ids, targets = (torch.tensor(a, device=args.device).long() for a in common.batch_of(work))
    parts = [(ids[i : i + micro], targets[i : i + micro]) for i in range(0, work.sequences, micro)]
    start = time.perf_counter()
    for _ in range(3):
        training.step_in_parts(parts)
    common.synchronize(args.device)
    warm = time.perf_counter() - start
    seconds = common.each_second(lambda: training.step_in_parts(parts), args.device, args.steps)
    return {**found(seconds, before, args.device), "first_steps_seconds": warm}


# ---- A public script


def environment_of(work: Work, folder: Path, tokenizer: Path) -> dict[str, str]:
    """The community's variables that make a script train this work, validate every few steps and log no others."""
    c, steps = work.config, SCRIPT_INTERVAL * (SCRIPT_INTERVALS + 1)
    values = {
        "DATA_PATH": folder,
        "TOKENIZER_PATH": tokenizer,
        "RUN_ID": "benchmark",
        "ITERATIONS": steps,
        "MAX_WALLCLOCK_SECONDS": 0,
        "WARMUP_STEPS": 2,
        "VAL_LOSS_EVERY": SCRIPT_INTERVAL,
        "TRAIN_LOG_EVERY": 1_000_000,
        "TRAIN_BATCH_TOKENS": work.tokens,
        "TRAIN_SEQ_LEN": work.length,
        "VOCAB_SIZE": c.vocab_size,
        "NUM_LAYERS": c.num_layers,
        "MODEL_DIM": c.model_dim,
        "NUM_HEADS": c.num_heads,
        "NUM_KV_HEADS": c.num_kv_heads,
        "MLP_MULT": c.mlp_mult,
        "BIGRAM_VOCAB_SIZE": c.bigram_vocab_size,
        "BIGRAM_DIM": c.bigram_dim,
    }
    return {name: str(value) for name, value in values.items()}


VALIDATED = re.compile(r"step:(\d+)/\d+ val_loss:\S+ .*?train_time:([0-9.]+)ms")


def step_seconds(lines: Iterator[str]) -> list[float]:
    """Seconds of a step between the script's validations, whose lines these are; the first steps, which compile, go."""
    marks = []
    for line in lines:
        if match := VALIDATED.search(line):
            marks.append((int(match[1]), float(match[2]) / 1e3))
            if len(marks) == SCRIPT_INTERVALS + 2:
                break
    return [(late - early) / (end - begin) for (begin, early), (end, late) in itertools.pairwise(marks[1:])]


def measure_script(script: Path, work: Work, data: Path) -> dict[str, Any]:
    """Runs the script in a process of its own, and ends it after its last step: nobody waits for its export.

    Raises ValueError where it logged no steps, with the end of what it said.
    """
    import pgolf
    from pgolf.data.folder import find_data

    source = find_data(data)
    if source.tokenizer is None:
        raise ValueError(f"{data} holds no tokenizer, which the script needs: a *.model of {work.config.vocab_size}.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for index, shard in enumerate(source.train):
            (folder / f"fineweb_train_{index:06d}.bin").symlink_to(Path(shard).resolve())
        tokens = pgolf.read_shard(source.val[0])[: SCRIPT_VALIDATION_WINDOWS * work.length + 1]
        pgolf.write_shard(folder / "fineweb_val_000000.bin", tokens)
        environment = {**os.environ, **environment_of(work, folder, Path(source.tokenizer).resolve())}
        said: list[str] = []
        process = subprocess.Popen(
            [sys.executable, "-u", str(script.resolve())],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # with the compiler's workers, which are ended with it
        )
        assert process.stdout is not None

        def lines() -> Iterator[str]:
            for line in process.stdout:
                said.append(line)
                yield line

        try:
            seconds = step_seconds(lines())
        finally:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
    if not seconds:
        raise ValueError(f"{script} logged no two validations; the last that it said:\n{''.join(said[-20:])}")
    return {"ms": statistics.median(seconds) * 1e3, "least": min(seconds) * 1e3, "script": script.name}


# ---- Start-up

START = """
import time; start = time.perf_counter()
import pgolf; from pgolf import _C; imported = time.perf_counter()
_C.cuda_status(); found = time.perf_counter()
import numpy as np
from pgolf.config import NEWTON_SCHULZ, ModelConfig
from pgolf.model import GPT
model = GPT(ModelConfig(num_layers=10, bigram_vocab_size=10240), seed=1, device="cuda", dtype="bfloat16")
made = time.perf_counter()
optimizer = _C.Optimizer(model._native, 5, NEWTON_SCHULZ["keller_jordan"], False)
optimizer.warm_up([48], 2048, 1e-6, False, False, True); warm = time.perf_counter()
ids = np.zeros((48, 2048), np.int32)
model._native.begin_step(False); model._native.micro_step(ids, ids, 1e-6); model._native.end_step()
optimizer.wait(optimizer.step(%r)); stepped = time.perf_counter()
print(*(b - a for a, b in zip((start, imported, found, made, warm), (imported, found, made, warm, stepped))))
"""


def start_up() -> dict[str, float]:
    """Seconds from an interpreter to the first optimizer step of the base model, in the second process that tries."""
    names = ("import", "driver and libraries", "initial weights", "warm-up and recording", "first step")
    for _ in range(2):
        ran = subprocess.run(
            [sys.executable, "-c", START % common.settings()], capture_output=True, text=True, check=True
        )
    return {name: round(float(value), 3) for name, value in zip(names, ran.stdout.split(), strict=True)}


def named(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def measure(name: str, args: argparse.Namespace, limit_tflops: float) -> dict[str, Any]:
    """pgolf and its peers on one work, a line each."""
    from pgolf.system.speed import flop_per_token

    work = WORK[name].quick() if args.quick else WORK[name]
    programs: dict[str, Any] = {"pgolf": measure_pgolf(work, args)}

    def show(who: str, program: dict[str, Any]) -> None:
        rate = work.tokens / program["ms"] * 1e3
        share = flop_per_token(work.config, work.length) * rate / (limit_tflops * 1e12)
        program |= {"tokens_per_second": rate, "share_of_limit": share}
        line = f"{name}: {who} {program['ms']:.1f} ms, {rate / 1e6:.3f} M tokens/s, {share:.1%} of the limit"
        if program.get("mib") is not None:
            line += f", {program['mib']:,.0f} MiB"
        if who != "pgolf":
            program["ratio"] = program["ms"] / programs["pgolf"]["ms"]
            line += f"; pgolf is {program['ratio']:.2f} times as fast"
        print(line, flush=True)

    show("pgolf", programs["pgolf"])
    for kind in args.peers:
        for micro in work.peer_micro:
            program = measure_peer(work, args, kind == "compiled", micro)
            count = work.sequences // program["micro_batch_seqs"]
            who = f"{kind}, {count} micro-batch{'es' * (count > 1)}"
            programs[who] = program
            show(who, program)
    release_memory(args.device)
    if args.script is not None:
        programs["script"] = measure_script(args.script, work, args.data)
        show(args.script.name, programs["script"])
    return programs


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=named, default=["base", "small", "pr289"], help=f"from: {', '.join(WORK)}")
    parser.add_argument("--steps", type=int, default=5, help="measured of each program, after its first ones")
    parser.add_argument("--peers", type=named, default=[], help="from: eager, compiled")
    parser.add_argument("--script", type=Path, help="a public train_gpt.py, run with the community's variables")
    parser.add_argument("--data", type=Path, help="for the script: a folder with shards and a tokenizer")
    parser.add_argument("--no-start", action="store_true", help="leave the start-up out")
    common.add_common_arguments(parser)
    args = parser.parse_args(arguments)
    for option, known, given in (("--work", WORK, args.work), ("--peers", ("eager", "compiled"), args.peers)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{option} has {', '.join(unknown)}; expected some of {', '.join(known)}")
    if args.script is not None and (args.data is None or not args.script.is_file()):
        parser.error("--script needs a file, and with --data a folder with shards and a tokenizer")
    common.resolve(args)

    result = common.new_result(args)
    result["work"] = {name: measure(name, args, result["machine"]["limit_tflops"]) for name in args.work}
    if args.device != "cpu" and not args.no_start:
        result["start_up"] = start_up()
        print(f"start to first step: {sum(result['start_up'].values()):.2f} s", result["start_up"], flush=True)
    common.write_result(result, "train_step", args.out, args.quick)


if __name__ == "__main__":
    main()
