"""Where the time of a training step goes on a GPU, kernel by kernel, as PyTorch's profiler sees this process.

python benchmarks/gpu_breakdown.py --work base --per 65536
python benchmarks/gpu_breakdown.py --optimizer                  # its step alone, whole
"""

from __future__ import annotations

import argparse
import collections
import re

from common import WORK, batch_of, settings
from torch.profiler import ProfilerActivity, profile

from pgolf import _C
from pgolf.config import NEWTON_SCHULZ
from pgolf.model import GPT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", default="base", choices=WORK)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--per", type=int, default=65_536, help="microseconds for so many tokens")
    parser.add_argument("--rows", type=int, default=45)
    parser.add_argument("--optimizer", action="store_true", help="the optimizer's step alone, in microseconds a step")
    args = parser.parse_args()
    work = WORK[args.work]
    model = GPT(work.config, seed=1, device="cuda", dtype=args.dtype)
    optimizer = _C.Optimizer(model._native, 5, NEWTON_SCHULZ["keller_jordan"], False)
    ids, targets = (a[: work.micro] for a in batch_of(work))

    def optimize() -> None:
        optimizer.wait(optimizer.step(settings()))

    def step() -> None:
        model._native.begin_step(False)
        model._native.micro_step(ids, targets, 1 / ids.size)
        model._native.end_step()
        optimize()

    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        (optimize if args.optimizer else step)()
    times: dict[str, float] = collections.defaultdict(float)
    counts: dict[str, int] = collections.defaultdict(int)
    for event in profiler.events():
        if event.device_time_total > 0:
            name = shorten(event.name)
            times[name] += event.device_time_total
            counts[name] += 1
    share = 1 if args.optimizer else args.per / ids.size
    total = sum(times.values())
    what = "the optimizer's step" if args.optimizer else f"one micro-batch of {ids.size:,} tokens and the optimizer"
    print(f"{what}: {total / 1e3:.2f} ms of kernels")
    print(f"{'µs' if args.optimizer else 'µs per ' + format(args.per, ','):>16} {'%':>6} {'launches':>9}  kernel")
    for name, time in sorted(times.items(), key=lambda item: -item[1])[: args.rows]:
        print(f"{time * share:16.1f} {100 * time / total:6.2f} {counts[name]:9d}  {name}")


def shorten(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|pgolf::cuda::|void |unnamed>::|<unnamed>::", "", name)
    name = re.sub(r"\([\w:]+\)(?=\d)", "", name)  # an argument's type
    return re.sub(r"\(.*", "", name)[:110]


if __name__ == "__main__":
    main()
