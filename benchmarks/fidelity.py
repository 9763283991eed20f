"""A recipe on English books beside the public script: both curves, their distance, a plot (docs/fidelity.md).

    python benchmarks/fidelity.py BOOKS --steps 5                         # base, on two cores: 10 to 20 minutes
    python benchmarks/fidelity.py BOOKS --seeds 42,7,1337 --device cuda   # three whole runs beside stored numbers
    python benchmarks/fidelity.py BOOKS --device cuda --script train_gpt.py --recipe pr286    # beside the script itself

BOOKS holds books.jsonl.zst (a document a line, field `text`) and books_1024_bpe.model; the first 512 documents are
validation. A whole run is 400 steps of 131,072 tokens, validated at every hundredth, averaged, quantised and scored.

With --script, the merged 10-layer recipe's own train_gpt.py (openai/parameter-golf, records/track_10min_16mb/
2026-03-20_10L_Int5MLP_MuonWD04_SWA50) trains first, on the same shards and with the recipe's settings (run_script.py),
and pgolf starts from its initial weights. What it printed and its weights stay in --work, so that a second call need
not run it again; --only script ends there. Without a script the base recipe is compared with stored numbers.

Within tolerance: validation loss ±0.012 before step 200 and ±0.006 from there on, bits per byte after quantisation
±0.003. Where one seed misses, the mean of three decides. The exit status is 1 on a miss.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

import pgolf
from pgolf.artifacts.artifact import export_with
from pgolf.data.preparation import prepare
from pgolf.report.plot import plot_runs
from pgolf.runs.records import Curves

STEPS = 400
SETTINGS = {
    "train.iterations": STEPS,
    "train.max_wallclock_seconds": 0,
    "train.train_batch_tokens": 131_072,
    "train.warmdown_iters": 200,
    "train.muon_momentum_warmup_steps": 100,
    "train.val_loss_every": 100,
    "train.train_log_every": 1,
    "eval.tail": "reference",  # the only one that the script has
}
SWA_SHRINKS = 5  # 50 becomes 10 and 200 becomes 40, in 400 steps
RECIPES = ("base", "pr286", "pr289")
BPB_TOLERANCE = 0.003
RUN_SCRIPT = Path(__file__).with_name("run_script.py")

TRAINED = re.compile(r"^step:(\d+)/\d+ train_loss:(\S+) ", re.MULTILINE)
VALIDATED = re.compile(r"^step:(\d+)/\d+ val_loss:(\S+) val_bpb:(\S+) ", re.MULTILINE)
SCORED = re.compile(r"^final_int8_zlib_roundtrip_exact val_loss:(\S+) val_bpb:(\S+)$", re.MULTILINE)


@dataclass
class Curve:
    """Losses by step, nats per token; loss and bits per byte of the quantised weights, None before a run's end."""

    losses: dict[int, float]
    validation: dict[int, float]
    score_loss: float | None = None
    score_bpb: float | None = None
    other: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_log(cls, text: str) -> Curve:
        """From the lines that a script printed; raises ValueError where it printed no training loss."""
        losses = {int(step): float(loss) for step, loss in TRAINED.findall(text)}
        if not losses:
            raise ValueError(
                "The log holds no line step:N/M train_loss:L …; the output of a train_gpt.py was expected."
            )
        validation = {int(step): float(loss) for step, loss, _ in VALIDATED.findall(text) if int(step)}
        score = [tuple(map(float, found)) for found in SCORED.findall(text)]
        return cls(losses, validation, *(score[-1] if score else ()))

    def records(self) -> list[dict[str, Any]]:
        """As a log.jsonl has them."""
        steps = sorted(self.losses.keys() | self.validation.keys())
        return [{"step": s, "loss": self.losses.get(s), "val_loss": self.validation.get(s)} for s in steps]


# The public 10-layer script: seed 42's training losses; three seeds' mean validation losses (two at step 400); two
# seeds' mean sliding loss and bits per byte after averaging, pruning and quantisation.
PUBLIC = {
    "base": Curve(
        {1: 6.937, 2: 8.105, 3: 7.481, 4: 6.900, 5: 6.804, 6: 6.736, 8: 6.430, 10: 6.054, 20: 4.790, 40: 3.570},
        {100: 2.9713, 200: 2.7080, 300: 2.5531, 400: 2.4674},
        2.46850,
        1.30318,
    )
}


def tolerance(step: int) -> float:
    return 0.012 if step < 200 else 0.006


def configuration(args: argparse.Namespace, seed: int) -> pgolf.Config:
    recipe = pgolf.Config.from_recipe(args.recipe)
    scaled = {"train.swa_every": recipe.train.swa_every // SWA_SHRINKS, "train.seed": seed, "train.dtype": args.dtype}
    return recipe.override({**SETTINGS, **scaled, **dict(args.set)})


def data_folder(args: argparse.Namespace) -> Path:
    """The prepared books, under pgolf's names and, as links, under those that the script looks for."""
    folder: Path = args.work / "data"
    if not (folder / "manifest.json").exists():
        tokenizer = args.books / "books_1024_bpe.model"
        prepare([args.books / "books.jsonl.zst"], folder, tokenizer=tokenizer, val_docs=512)
    links = args.work / "data_of_script"
    links.mkdir(exist_ok=True)
    for split in ("train", "val"):
        for index, shard in enumerate(sorted(folder.glob(f"*_{split}_*.bin"))):
            link = links / f"fineweb_{split}_{index:06d}.bin"
            if not link.exists():
                link.symlink_to(shard.resolve())
    return folder


# The script -----------------------------------------------------------------------------------------------------------


def script_environment(config: pgolf.Config, script: str, data: Path) -> dict[str, str]:
    """The variables that the script reads, set as the configuration is: their names are its keys in capitals."""
    values = {**config.model.to_dict(), **config.train.to_dict(), **config.eval.to_dict()}
    values |= {name: int(value) for name, value in values.items() if isinstance(value, bool)}
    values["data_path"] = data.parent.resolve() / "data_of_script"
    (values["tokenizer_path"],) = (path.resolve() for path in data.glob("*.model"))
    return {name.upper(): str(value) for name, value in values.items() if f'"{name.upper()}"' in script}


def run_script(args: argparse.Namespace, config: pgolf.Config, data: Path, folder: Path) -> Curve:
    """The script's curve; its output and its weights are kept in `folder`, and used again by the next call."""
    log = folder / "log.txt"
    if not log.exists():
        text = args.script.read_text(encoding="utf-8")
        command = [sys.executable, str(RUN_SCRIPT), str(args.script.resolve()), "--out", str(folder)]
        command += ["--qat-from", str(config.train.qat_start_frac), *(["--eager"] if args.eager else [])]
        command += ["--export", args.recipe] if args.recipe != "base" else []
        command += ["--stop-after", str(args.steps)] if args.steps < config.train.iterations else []
        folder.mkdir(parents=True, exist_ok=True)
        # A compiled script must train before it validates: training cannot read tables that inference made.
        priming = {} if args.eager else {"WARMUP_STEPS": "1"}
        environment = {**os.environ, **script_environment(config, text, data), "RUN_ID": "script", **priming}
        print(f"{args.script.name}, seed {config.train.seed}; its output: {folder / 'log.partial'}", flush=True)
        started = time.perf_counter()
        with (folder / "log.partial").open("w") as file:
            done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            tail = (folder / "log.partial").read_text(encoding="utf-8")[-3000:]
            raise RuntimeError(f"{args.script} ended with status {done.returncode}; its last lines:\n{tail}")
        print(f"it took {time.perf_counter() - started:.0f} s", flush=True)
        (folder / "log.partial").replace(log)
    return Curve.of_log(log.read_text(encoding="utf-8"))


def score_script(args: argparse.Namespace, config: pgolf.Config, data: Path, folder: Path, curve: Curve) -> None:
    """What pgolf's evaluation says of the weights that the script scored itself, with the script's RoPE tables."""
    model = pgolf.GPT(config.override({"model.rope_tables": "bf16"}).model, None, device=args.device, dtype=args.dtype)
    model.load_state_dict(dict(np.load(folder / "final.npz")))
    model.train_seq_len = config.train.train_seq_len
    stride, tail = config.eval.eval_stride, config.eval.tail
    found = pgolf.evaluate(model, data, stride=stride, tail=tail)
    curve.other["bpb_by_pgolf"] = found.bpb
    print(f"the script's weights: {curve.score_bpb:.5f} bits per byte by itself, {found.bpb:.5f} by pgolf", flush=True)
    if args.recipe == "pr289":  # the script has no test-time training: pgolf's, on both programs' weights
        curve.other["bpb_ttt"] = pgolf.evaluate(model, data, method="ttt").bpb


# pgolf ----------------------------------------------------------------------------------------------------------------


def train(
    args: argparse.Namespace, config: pgolf.Config, data: Path, folder: Path, weights: Path | None, other: Curve
) -> Curve:
    trainer = pgolf.Trainer(config, data, device=args.device)
    if weights:
        trainer.model.load_state_dict(dict(np.load(weights)))
    print(f"seed {config.train.seed}: {trainer.model!r}, micro-batches of {trainer.micro_batch_seqs} sequences")
    print("step     pgolf    script  difference")
    curve = Curve({}, {})
    for record in trainer:
        step = record.step
        if record.val_loss is not None and step:
            curve.validation[step] = record.val_loss
            print(f"{step:4d} validation {record.val_loss:.4f}", flush=True)
        if record.loss is not None:
            curve.losses[step] = record.loss
            if step in other.losses and (step <= 10 or step % 20 == 0):
                difference = 100 * (record.loss / other.losses[step] - 1)
                print(f"{step:4d} {record.loss:9.4f} {other.losses[step]:9.4f} {difference:+10.2f} %", flush=True)
        if step == args.steps:
            break
    curve.other = {
        "device": trainer.model.description,
        "tokens_per_second": trainer.tokens / trainer.seconds,
        "seconds": trainer.seconds,
    }
    if trainer.done:
        report = trainer.finish()
        curve.score_loss, curve.score_bpb = report.score_loss, report.score_bpb
        curve.other |= {
            "score_seconds": report.score_seconds,
            "artifact_bytes": report.artifact_bytes,
            "snapshots": report.snapshots,
        }
        print(f"     after quantisation, sliding: {report.score_loss:.4f}, {report.score_bpb:.5f} bits per byte")
        if args.recipe == "pr289":
            export_with(trainer.model, folder / "model.pgolf", config.export)
            model = pgolf.load(folder / "model.pgolf", device=args.device, dtype=trainer.model.dtype)
            curve.other["bpb_ttt"] = pgolf.evaluate(model, data, method="ttt").bpb
    return curve


# The verdict ----------------------------------------------------------------------------------------------------------


def mean_of(curves: list[Curve], value: str, step: int | None = None) -> float | None:
    found = [getattr(curve, value) if step is None else getattr(curve, value).get(step) for curve in curves]
    return None if None in found or not found else statistics.mean(found)


def verdict(ours: list[Curve], others: list[Curve]) -> bool | None:
    """Prints the distances of the means; whether they are within tolerance, None where nothing could be compared."""
    rows: list[tuple[str, float | None, float | None, float]] = []
    for step in sorted(ours[0].validation):
        pair = (mean_of(ours, "validation", step), mean_of(others, "validation", step))
        rows.append((f"validation loss, step {step}", *pair, tolerance(step)))
    rows.append(("bits per byte, quantised", mean_of(ours, "score_bpb"), mean_of(others, "score_bpb"), BPB_TOLERANCE))
    if all("bpb_ttt" in curve.other for curve in [*ours, *others]):
        trained = (statistics.mean(curve.other["bpb_ttt"] for curve in curves) for curves in (ours, others))
        rows.append(("bits per byte, test-time training", *trained, BPB_TOLERANCE))
    print(f"{'mean of ' + str(len(ours)) + ' seed(s)':34} {'pgolf':>9} {'script':>9} {'distance':>9} {'tolerance':>9}")
    verdicts = []
    for name, mine, theirs, allowed in rows:
        if mine is None or theirs is None:
            continue
        verdicts.append(abs(mine - theirs) <= allowed)
        miss = "" if verdicts[-1] else "  MISS"
        print(f"{name:34} {mine:9.5f} {theirs:9.5f} {mine - theirs:+9.5f} {allowed:9.3f}{miss}")
    shared = [set(mine.losses) & set(theirs.losses) for mine, theirs in zip(ours, others, strict=True)]
    distances = [
        abs(mine.losses[step] / theirs.losses[step] - 1)
        for mine, theirs, steps in zip(ours, others, shared, strict=True)
        for step in steps
    ]
    if distances:
        print(f"training loss, {len(distances)} steps: largest distance {100 * max(distances):.2f} %, ", end="")
        print(f"mean {100 * statistics.mean(distances):.2f} %")
    return all(verdicts) if verdicts else None


def plot(ours: list[Curve], others: list[Curve], out: Path) -> None:
    runs: dict[str, Iterable[dict[str, Any]]] = {"pgolf": ours[0].records(), "public script": others[0].records()}
    try:
        plot_runs({name: Curves.of(records) for name, records in runs.items() if records}, out)
    except ModuleNotFoundError as error:
        print(error)


def setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key, json.loads(value)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("--recipe", choices=RECIPES, default="base")
    parser.add_argument("--steps", type=int, default=STEPS, help="after which both are stopped, short of a score")
    parser.add_argument("--seeds", type=lambda s: [int(seed) for seed in s.split(",")], default=[42])
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--script", type=Path, help="the public train_gpt.py")
    parser.add_argument("--eager", action="store_true", help="the script without torch.compile")
    parser.add_argument("--only", choices=("script",), help="end when the script has run; the next call compares")
    parser.add_argument("--log", type=Path, help="the output of a script that ran elsewhere, in place of --script")
    parser.add_argument("--weights", type=Path, help="an .npz of initial weights, with --log")
    parser.add_argument("--work", type=Path, default=Path("build/fidelity"), help="where data and script runs stay")
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="of both programs"
    )
    parser.add_argument("--plot", type=Path, help="a PNG of both curves of the first seed")
    parser.add_argument("--out", type=Path, help="where the JSON result goes")
    args = parser.parse_args()
    if args.only and not args.script:
        parser.error("--only script needs --script.")
    return args


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    data = data_folder(args)
    ours, others = [], []
    for seed in args.seeds:
        config = configuration(args, seed)
        folder = args.work / f"{args.recipe}-{seed}" / ("whole" if args.steps >= config.train.iterations else "begin")
        folder.mkdir(parents=True, exist_ok=True)
        weights = args.weights
        if args.script:
            other, weights = run_script(args, config, data, folder), folder / "initial.npz"
            if args.only:
                continue
            if other.score_bpb is not None and args.eager:  # compilers round the script's tables as pgolf cannot
                score_script(args, config, data, folder, other)
        elif args.log:
            other = Curve.of_log(args.log.read_text(encoding="utf-8"))
        else:
            other = PUBLIC.get(args.recipe, Curve({}, {}))
        others.append(other)
        ours.append(train(args, config, data, folder, weights, other))
    if args.only:
        return
    good = verdict(ours, others)
    if good is False and len(ours) < 3:
        print("One seed's miss decides nothing: run --seeds 42,7,1337.")
    if args.plot:
        plot(ours, others, args.plot)
    if args.out:
        result = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": platform.processor() or platform.machine(),
            "pgolf": pgolf.__version__,
            "recipe": args.recipe,
            "within_tolerance": good,
            "seeds": args.seeds,
            "runs": [
                {"pgolf": asdict(mine), "script": asdict(other)} for mine, other in zip(ours, others, strict=True)
            ],
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(good is False)


if __name__ == "__main__":
    main()
