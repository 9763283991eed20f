"""The base recipe on English books, beside the public script's losses (docs/fidelity.md).

    python benchmarks/books_fidelity.py BOOKS                           # five steps: 10 to 20 minutes on two cores
    python benchmarks/books_fidelity.py BOOKS --steps 400 --seeds 42,7,1337 --device cuda       # three whole runs
    python benchmarks/books_fidelity.py BOOKS --weights initial.npz --losses 6.937,8.105        # another script's start

BOOKS holds books.jsonl.zst (a document a line, field `text`) and books_1024_bpe.model; the first 512 documents are
validation. Whole runs are validated at steps 100, 200, 300 and 400, averaged, quantised and scored.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

import pgolf
from pgolf.data.prepare import prepare

# The public 10-layer script, seed 42: training losses at these steps; three seeds' mean validation losses (two at step
# 400); two seeds' mean sliding loss and bits per byte after averaging, pruning and quantisation.
PUBLIC = {1: 6.937, 2: 8.105, 3: 7.481, 4: 6.900, 5: 6.804, 6: 6.736, 8: 6.430, 10: 6.054, 20: 4.790, 40: 3.570}
PUBLIC_VALIDATION = {100: 2.9713, 200: 2.7080, 300: 2.5531, 400: 2.4674}
PUBLIC_SLIDING, PUBLIC_BPB = 2.46850, 1.30318
TOLERANCE = {100: 0.012, 200: 0.006, 300: 0.006, 400: 0.006}
STEPS = 400
SETTINGS = {
    "train.iterations": STEPS,
    "train.max_wallclock_seconds": 0,
    "train.train_batch_tokens": 131_072,
    "train.warmdown_iters": 200,
    "train.muon_momentum_warmup_steps": 100,
    "train.swa_every": 10,
}


def train(args: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    whole = args.steps == STEPS
    settings = {**SETTINGS, "train.seed": seed, "train.val_loss_every": 100 if whole else 0, "train.dtype": args.dtype}
    trainer = pgolf.Trainer(pgolf.Config.from_recipe("base", settings), folder, device=args.device)
    if args.weights:
        trainer.model.load_state_dict(dict(np.load(args.weights)))
    public = dict(enumerate(args.losses, start=1)) if args.losses else PUBLIC
    print(f"seed {seed}: {trainer.model!r}, micro-batches of {trainer.micro_batch_seqs} sequences")
    print("step     pgolf    public  difference")
    losses, validation = [], {}
    for record in trainer:
        if record.val_loss is not None and record.step:
            validation[record.step] = record.val_loss
            print(f"{record.step:4d} validation {record.val_loss:.4f}", flush=True)
        if record.step:
            losses.append(record.loss)
        if record.step in public:
            other = public[record.step]
            difference = 100 * (record.loss / other - 1)
            print(f"{record.step:4d} {record.loss:9.4f} {other:9.4f} {difference:+10.2f} %", flush=True)
        if record.step == args.steps:
            break
    found: dict[str, Any] = {
        "seed": seed,
        "losses": losses,
        "validation": validation,
        "device": trainer.model.description,
        "tokens_per_second": trainer.tokens / trainer.seconds,
        "seconds": trainer.seconds,
    }
    if whole:
        report = trainer.finish()
        found |= {
            "sliding_loss": report.score_loss,
            "sliding_bpb": report.score_bpb,
            "score_seconds": report.score_seconds,
            "artifact_bytes": report.artifact_bytes,
            "snapshots": report.snapshots,
        }
        print(f"     after quantisation, sliding: {report.score_loss:.4f}, {report.score_bpb:.5f} bits per byte")
    return found


def verdict(runs: list[dict[str, Any]]) -> bool:
    print("mean of", len(runs), "seeds: validation loss, public script, difference, tolerance")
    good = True
    for step, other in PUBLIC_VALIDATION.items():
        mean = statistics.mean(run["validation"][step] for run in runs)
        good &= abs(mean - other) <= TOLERANCE[step]
        print(f"{step:4d} {mean:9.4f} {other:9.4f} {mean - other:+9.4f} {TOLERANCE[step]:9.3f}")
    mean, bpb = (statistics.mean(run[key] for run in runs) for key in ("sliding_loss", "sliding_bpb"))
    print(f"end  {mean:9.4f} {PUBLIC_SLIDING:9.4f} {mean - PUBLIC_SLIDING:+9.4f}     0.006")
    print(f"bpb  {bpb:9.5f} {PUBLIC_BPB:9.5f} {bpb - PUBLIC_BPB:+9.5f}")
    return good and abs(mean - PUBLIC_SLIDING) <= 0.006


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seeds", default="42")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--weights", type=Path, help="an .npz of initial weights")
    parser.add_argument("--losses", type=lambda s: [float(x) for x in s.split(",")], help="to be compared with")
    parser.add_argument("--prepared", type=Path, help="a folder that the prepared data stays in")
    parser.add_argument("--out", type=Path, help="where the JSON result goes")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.prepared or Path(temporary)
        if not list(folder.glob("*.bin")):
            prepare(
                [args.books / "books.jsonl.zst"], folder, tokenizer=args.books / "books_1024_bpe.model", val_docs=512
            )
        runs = [train(args, folder, int(seed)) for seed in args.seeds.split(",")]
    good = verdict(runs) if args.steps == STEPS else None
    if args.out:
        result = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": platform.processor() or platform.machine(),
            "pgolf": pgolf.__version__,
            "within_tolerance": good,
            "runs": runs,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
