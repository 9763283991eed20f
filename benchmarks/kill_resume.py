"""Kills a small run at random moments, resumes it, and counts what was lost beside a run that was never stopped.

    python benchmarks/kill_resume.py --kills 300

A run is one process that trains with checkpoints every few steps, averages, exports and scores. The killer sends
SIGKILL after a random time, again and again, until the run has ended by itself; runs are repeated until the number of
kills is reached. Compared, bit for bit: every array of the last checkpoint (weights, moments, averages), the artifact,
and the fields step, tokens, loss, lr_scale and val_loss of every line of the log.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import pgolf
from pgolf.runs import checkpoint

STEPS = 40
SETTINGS = {
    "model.vocab_size": 64,
    "model.num_layers": 3,
    "model.model_dim": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.bigram_vocab_size": 50,
    "model.bigram_dim": 16,
    "train.iterations": STEPS,
    "train.max_wallclock_seconds": 0,
    "train.train_batch_tokens": 2048,
    "train.train_seq_len": 64,
    "train.grad_accum_steps": 2,
    "train.warmdown_frac": 0.5,
    "train.swa_start_frac": 0.9,
    "train.swa_every": 3,
    "train.val_loss_every": 7,
    "train.val_batch_tokens": 1024,
    "train.checkpoint_every": 3,
}
LOG_FIELDS = ("step", "tokens", "loss", "lr_scale", "val_loss")


def run(data: str, folder: str) -> None:
    """One life of the run; resumes what stands in the folder."""
    config = pgolf.Config.from_recipe("tiny", SETTINGS)
    trainer = pgolf.Trainer(config, data, run_dir=folder, resume=True)
    for _ in trainer:
        pass
    trainer.finish()


def outcome(folder: Path) -> tuple[dict[str, np.ndarray], bytes, list[tuple[object, ...]]]:
    newest = checkpoint.newest(folder / "checkpoint")
    assert newest is not None
    arrays, _ = checkpoint.load(newest)
    lines = (folder / "log.jsonl").read_text().splitlines()
    log = [tuple(json.loads(line)[field] for field in LOG_FIELDS) for line in lines]
    return arrays, (folder / "model.pgolf").read_bytes(), log


def differences(a: Path, b: Path) -> list[str]:
    (arrays, artifact, log), (arrays_b, artifact_b, log_b) = outcome(a), outcome(b)
    found = [name for name in arrays.keys() | arrays_b.keys() if not _equal(arrays.get(name), arrays_b.get(name))]
    if artifact != artifact_b:
        found.append("model.pgolf")
    if log != log_b:
        found.append("log.jsonl")
    return found


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the JSON result goes")
    parser.add_argument("--life", nargs=2, help=argparse.SUPPRESS)  # data folder, run folder
    args = parser.parse_args()
    if args.life:
        run(*args.life)
        return 0

    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        data = root / "data"
        data.mkdir()
        tokens = np.random.default_rng(args.seed).integers(4, 64, 50_000)
        pgolf.write_shard(data / "text_train_000000.bin", tokens[:45_000])
        pgolf.write_shard(data / "text_val_000000.bin", tokens[45_000:])

        def life(folder: Path) -> subprocess.Popen[bytes]:
            command = [sys.executable, __file__, "--life", str(data), str(folder)]
            return subprocess.Popen(command, env={**os.environ, "PYTHONWARNINGS": "ignore"})

        started = time.perf_counter()
        if life(root / "whole").wait() != 0:
            print("The undisturbed run failed.", file=sys.stderr)
            return 1
        length = time.perf_counter() - started
        kills = runs = lost = 0
        while kills < args.kills:
            runs += 1
            folder = root / f"run{runs}"
            deadline = 1.0  # of the undisturbed length: a life may end before or during its last seconds
            while True:
                process = life(folder)
                try:
                    code = process.wait(timeout=chance.uniform(0.2, deadline) * length)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills += 1
                    deadline *= 1.02  # even a slow machine gets through at last
                    continue
                break
            found = differences(root / "whole", folder) if code == 0 else [f"exit code {code}"]
            lost += bool(found)
            loss = f"lost: {', '.join(found)}" if found else "nothing lost"
            print(f"run {runs}: {kills} kills so far, {loss}", flush=True)
    print(f"{kills} kills in {runs} runs: {lost} runs lost something")
    if args.out:
        result = {"kills": kills, "runs": runs, "lost": lost, "seed": args.seed}
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
