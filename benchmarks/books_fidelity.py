"""The first steps of the base recipe on English books, beside the public script's losses (docs/fidelity.md).

    python benchmarks/books_fidelity.py BOOKS --steps 5

BOOKS holds books.jsonl.zst (a document a line, field `text`) and books_1024_bpe.model; the first 512 documents are
validation. Five steps are 1.4e14 FLOP: 10 to 20 minutes on two cores. A GPU's or a longer run is the same command.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import pgolf
from pgolf.data.prepare import prepare

# Training losses of the public 10-layer script, seed 42, at these steps.
PUBLIC = {1: 6.937, 2: 8.105, 3: 7.481, 4: 6.900, 5: 6.804, 6: 6.736, 8: 6.430, 10: 6.054, 20: 4.790, 40: 3.570}
SETTINGS = {
    "train.iterations": 400,
    "train.max_wallclock_seconds": 0,
    "train.train_batch_tokens": 131_072,
    "train.warmdown_iters": 200,
    "train.muon_momentum_warmup_steps": 100,
    "train.swa_every": 10,
    "train.val_loss_every": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, help="where the JSON result goes")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        prepare([args.books / "books.jsonl.zst"], folder, tokenizer=args.books / "books_1024_bpe.model", val_docs=512)
        config = pgolf.Config.from_recipe("base", {**SETTINGS, "train.seed": args.seed})
        trainer = pgolf.Trainer(config, folder)
        print(f"{trainer.model!r}, micro-batches of {trainer.micro_batch_seqs} sequences")
        print("step     pgolf    public  difference   seconds")
        losses = []
        started = time.perf_counter()
        for record in trainer:
            losses.append(record.loss)
            public = PUBLIC.get(record.step)
            beside = f"{public:9.3f} {100 * (record.loss / public - 1):+10.2f} %" if public else " " * 22
            print(f"{record.step:4d} {record.loss:9.4f} {beside} {time.perf_counter() - started:9.1f}", flush=True)
            if record.step == args.steps:
                break
    if args.out:
        result = {
            "losses": losses,
            "public": [PUBLIC.get(step + 1) for step in range(len(losses))],
            "seed": args.seed,
            "device": trainer.model.description,
            "machine": platform.processor() or platform.machine(),
            "tokens_per_second": trainer.tokens / trainer.seconds,
            "pgolf": pgolf.__version__,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
