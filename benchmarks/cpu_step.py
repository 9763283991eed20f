"""Training steps and sliding evaluation on the CPU, beside a natural PyTorch model: tokens/s, ratios, memory.

    python benchmarks/cpu_step.py               # both shapes, about 20 minutes on two idle cores
    python benchmarks/cpu_step.py --quick       # does it run? Its numbers mean nothing
    python benchmarks/cpu_step.py --breakdown   # where each millisecond of a pgolf step goes, and nothing else

benchmarks/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from cpu_workers import SHAPES, THREADS, Shape, Worker

# Steps whose losses pgolf and the peer must show alike, from the same weights and on the same data.
CHECK_STEPS, CHECK_TOLERANCE = 3, 1e-5

# The yardstick is this machine's own: where the median of the peer's blocks, or of torch's products between them, is
# below 90 % of the best, something else ran beside it, and the run is void.
PEERS, LEAST_SHARE = ("eager", "compiled"), 0.9

# pgolf's speed over the peer's that is to be reached.
GOALS = {"S1": {"eager": 1.5, "compiled": 1.2}, "S2": {"eager": 1.3, "compiled": 1.15}}
SLIDING_SHAPE, SLIDING_GOAL = "S1", 1.5
STRIDE, SLIDING_BATCH, SLIDING_WINDOWS = 64, 256, 512

STEPS_PER_BLOCK = {"S1": 15, "S2": 3}
SETTLE_SECONDS = 0.3  # after which the threads of the program before no longer spin


def ask(worker: Worker, *request: Any) -> Any:
    time.sleep(SETTLE_SECONDS)
    return worker.ask(*request)


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "blocks": list(values)}


def warmed_up(stack: contextlib.ExitStack, kind: str, shape: Shape, steps: int) -> Worker:
    print(f"  {kind}: {steps} warm-up steps", flush=True)
    worker = stack.enter_context(Worker(kind, shape))
    ask(worker, "train", steps)
    return worker


def training_blocks(workers: Sequence[Worker], shape: Shape, blocks: int, steps: int) -> dict[str, dict[str, Any]]:
    """Tokens/s of each program, their blocks interleaved."""
    rates: dict[str, list[float]] = {worker.kind: [] for worker in workers}
    for _ in range(blocks):
        for worker in workers:
            rates[worker.kind].append(shape.step_tokens * steps / sum(ask(worker, "train", steps)))
    return {kind: spread(values) for kind, values in rates.items()}


def measure_peer(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The peer without bigram, and products between its blocks, beside the best that they reach in these minutes."""
    shape, steps = SHAPES[name].without_bigram(), args.steps_per_block or STEPS_PER_BLOCK[name]
    print(f"{name}: is the peer at its speed?")
    with contextlib.ExitStack() as stack:
        products = stack.enter_context(Worker("products", shape))
        peers = [warmed_up(stack, kind, shape, args.warm_up) for kind in PEERS]
        rates: dict[str, list[float]] = {kind: [] for kind in PEERS}
        product_rates = [ask(products, "rates")]
        for _ in range(args.blocks):
            for kind, block in training_blocks(peers, shape, 1, steps).items():
                rates[kind].append(block["median"])
            product_rates.append(ask(products, "rates"))
        versions = {**peers[0].ask("versions"), "openblas": products.ask("description")}
    gflops = {library: spread([r[library] for r in product_rates]) for library in product_rates[0]}
    peer = {kind: spread(values) for kind, values in rates.items()}
    for kind, found in [*peer.items(), ("torch's products", gflops["torch"])]:
        found["share"] = found["median"] / found["most"]
        print(f"  {kind}: the median block at {found['share']:.0%} of the best")
    valid = all(found["share"] >= LEAST_SHARE for found in [*peer.values(), gflops["torch"]])
    return {"products_gflops": gflops, "tokens_per_second": peer, "valid": valid, "versions": versions}


def measure_training(name: str, args: argparse.Namespace) -> dict[str, Any]:
    shape, steps = SHAPES[name], args.steps_per_block or STEPS_PER_BLOCK[name]
    print(f"{name}: training steps")
    with contextlib.ExitStack() as stack:
        workers = [warmed_up(stack, kind, shape, args.warm_up) for kind in ("pgolf", "eager", "compiled")]
        rates = training_blocks(workers, shape, args.blocks, steps)
        peaks = {worker.kind: worker.ask("peak") for worker in workers}
        result = {
            "tokens_per_second": rates,
            "ratio": {kind: rates["pgolf"]["median"] / rates[kind]["median"] for kind in GOALS[name]},
            "peak_mib": peaks,
            "memory_ratio": peaks["pgolf"] / min(peaks["eager"], peaks["compiled"]),
            "device": workers[0].ask("description"),
            "versions": workers[0].ask("versions"),
        }
        if name == SLIDING_SHAPE:
            print(f"{name}: sliding evaluation", flush=True)
            result["sliding"] = measure_sliding(workers[:2], args)
    return result


def measure_sliding(workers: Sequence[Worker], args: argparse.Namespace) -> dict[str, Any]:
    request = ("sliding", args.windows, STRIDE, SLIDING_BATCH)
    rates: dict[str, list[float]] = {worker.kind: [] for worker in workers}
    for worker in workers:
        ask(worker, *request)
    for _ in range(args.blocks):
        for worker in workers:
            rates[worker.kind].append(args.windows / ask(worker, *request))
    found = {kind: spread(values) for kind, values in rates.items()}
    ratio = found["pgolf"]["median"] / found["eager"]["median"]
    return {"windows_per_second": found, "ratio": {"eager": ratio}}


def check_agreement(name: str, windows: int) -> list[dict[str, Any]]:
    """The losses of pgolf and the peer from the same weights; SystemExit where they are not the same program."""
    shape = SHAPES[name]
    with Worker("agreement", shape) as worker:
        losses: list[dict[str, Any]] = worker.ask("agreement", CHECK_STEPS, windows, STRIDE, SLIDING_BATCH)
    for pair in losses:
        pair["difference"] = abs(pair["pgolf"] / pair["peer"] - 1)
        print(f"{name}: {pair['what']}: pgolf {pair['pgolf']:.7f}, peer {pair['peer']:.7f}", flush=True)
        if not pair["difference"] <= CHECK_TOLERANCE:
            sys.exit(f"{name}: the losses differ by {pair['difference']:.1e}; expected at most {CHECK_TOLERANCE:.0e}.")
    return losses


def table(shapes: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| work | pgolf | eager | compiled | pgolf / eager | pgolf / compiled |", "| --- |" + " ---: |" * 5]

    def beside_goal(ratio: float, goal: float) -> str:
        return f"{ratio:.2f} (goal {goal:.2f}{', met' if ratio >= goal else ''})"

    for name, found in shapes.items():
        if "training" not in found:
            continue
        rates, ratios = found["training"]["tokens_per_second"], found["training"]["ratio"]
        numbers = [f"{rates[kind]['median']:,.0f}" for kind in ("pgolf", "eager", "compiled")]
        goals = [beside_goal(ratios[kind], goal) for kind, goal in GOALS[name].items()]
        lines.append(f"| {name}, training, tok/s | {' | '.join(numbers + goals)} |")
        if "sliding" in found["training"]:
            sliding = found["training"]["sliding"]
            rates = [f"{sliding['windows_per_second'][kind]['median']:,.0f}" for kind in ("pgolf", "eager")]
            goal = beside_goal(sliding["ratio"]["eager"], SLIDING_GOAL)
            lines.append(f"| {name}, sliding, windows/s | {rates[0]} | {rates[1]} | | {goal} | |")
        peaks = found["training"]["peak_mib"]
        numbers = [f"{peaks[kind]:,.0f}" for kind in ("pgolf", "eager", "compiled")]
        ratios = [f"{peaks['pgolf'] / peaks[kind]:.2f}" for kind in ("eager", "compiled")]
        lines.append(f"| {name}, peak memory, MiB | {' | '.join(numbers + ratios)} |")
    return "\n".join(lines)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--blocks", type=positive, default=7, help="interleaved blocks of each program")
    parser.add_argument("--steps-per-block", type=positive, help=f"default: {STEPS_PER_BLOCK}")
    parser.add_argument("--out", type=Path, help="the JSON file; default: benchmarks/results/cpu_step/DATE-COMMIT.json")
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing without --out")
    parser.add_argument("--breakdown", action="store_true", help="only tabulate pgolf's step, operation by operation")
    args = parser.parse_args()
    args.warm_up, args.windows = 30, SLIDING_WINDOWS
    if args.quick:
        args.warm_up, args.blocks, args.steps_per_block, args.windows = 1, 2, 1, 8
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PGOLF_NUM_THREADS"):
        os.environ[variable] = str(THREADS)

    if args.breakdown:
        for name in args.shapes:
            with Worker("breakdown", SHAPES[name]) as worker:
                print(f"{name}\n\n{worker.ask('breakdown', 1 if args.quick else 9)}\n", flush=True)
        return

    result: dict[str, Any] = {
        "date": common.now(),
        **common.git_state(),
        "machine": common.cpu_machine(),
        "threads": THREADS,
        "protocol": {key: getattr(args, key) for key in ("warm_up", "blocks", "steps_per_block", "windows", "quick")},
        "shapes": {},
    }
    for name in args.shapes:
        found: dict[str, Any] = {"agreement": check_agreement(name, args.windows)}
        result["shapes"][name] = found
        found["peer"] = measure_peer(name, args)
        if found["peer"]["valid"] or args.quick:
            found["training"] = measure_training(name, args)
    void = [name for name, found in result["shapes"].items() if not found["peer"]["valid"]]
    result["void"] = void
    result["table"] = table(result["shapes"])
    print("\n" + result["table"])

    common.write_result(result, "cpu_step", args.out, args.quick)
    if void:
        sys.exit(
            f"void for {', '.join(void)}: half of the blocks of the peer or of products ran below {LEAST_SHARE:.0%} "
            "of the best of them. Run again when the machine is idle."
        )


if __name__ == "__main__":
    main()
