"""The programs that cpu_step.py measures, each in a process of its own that sleeps until it is asked for a block.

Nothing heavy is imported before a worker knows what it is: a program's memory is its own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

THREADS = 2
SPANS = 64  # steps until the data repeats


@dataclass(frozen=True)
class Shape:
    """A model and its training step."""

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden: int
    seq_len: int
    step_tokens: int
    bigram_vocab_size: int
    bigram_dim: int

    def without_bigram(self) -> Shape:
        return replace(self, bigram_vocab_size=0)


SHAPES = {
    "S1": Shape(512, 128, 4, 4, 2, 384, 256, 8192, 2048, 64),
    "S2": Shape(1024, 512, 4, 8, 4, 1536, 512, 4096, 2048, 128),
}


def random_tokens(shape: Shape, count: int, seed: int) -> np.ndarray:
    """Uniform tokens, uint16: the arithmetic does not depend on what they are."""
    import numpy as np

    return np.random.default_rng(seed).integers(0, shape.vocab_size, count, dtype=np.uint16)


def training_tokens(shape: Shape) -> np.ndarray:
    return random_tokens(shape, SPANS * (shape.step_tokens + 1), seed=0)


def sliding_tokens(shape: Shape, windows: int, stride: int) -> np.ndarray:
    """As many tokens as make `windows` windows of the shape's length."""
    return random_tokens(shape, shape.seq_len + (windows - 1) * stride + 1, seed=1)


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


class Pgolf:
    """pgolf.Trainer's own iteration, its data in a shard."""

    def __init__(self, shape: Shape) -> None:
        import pgolf

        pgolf.set_num_threads(THREADS)
        self.shape = shape
        config = pgolf.Config.from_recipe(
            "tiny",
            {
                "model.vocab_size": shape.vocab_size,
                "model.num_layers": shape.num_layers,
                "model.model_dim": shape.model_dim,
                "model.num_heads": shape.num_heads,
                "model.num_kv_heads": shape.num_kv_heads,
                "model.mlp_mult": shape.hidden / shape.model_dim,
                "model.bigram_vocab_size": shape.bigram_vocab_size,
                "model.bigram_dim": shape.bigram_dim,
                "train.train_batch_tokens": shape.step_tokens,
                "train.train_seq_len": shape.seq_len,
                "train.val_batch_tokens": shape.step_tokens,
                "train.max_wallclock_seconds": 0,
                "train.iterations": 1_000_000,
                "train.warmdown_iters": 0,
                "train.warmdown_frac": 0,
                "train.swa_enabled": False,
                "train.val_loss_every": 0,
                "train.checkpoint_every": 0,
            },
        )
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        pgolf.write_shard(folder / "random_train_000000.bin", training_tokens(shape))
        pgolf.write_shard(folder / "random_val_000000.bin", random_tokens(shape, shape.seq_len + 1, seed=1))
        self.trainer = pgolf.Trainer(config, folder)
        self.steps = iter(self.trainer)

    def step(self) -> float:
        loss = next(self.steps).loss
        assert loss is not None
        return loss

    def description(self) -> str:
        return self.trainer.model.description

    def sliding(self, windows: int, stride: int, batch: int) -> float:
        import pgolf

        tokens = sliding_tokens(self.shape, windows, stride)
        return pgolf.evaluate(self.trainer.model, tokens, stride=stride, batch_seqs=batch).loss


class Peer:
    """peer_torch's model, eager or compiled, its data in memory."""

    def __init__(self, shape: Shape, compiled: bool = False) -> None:
        import peer_torch
        import torch

        torch.set_num_threads(THREADS)
        torch.manual_seed(0)
        self.shape, self.next = shape, 0
        fields = asdict(shape)
        del fields["step_tokens"]
        self.training = peer_torch.Training(peer_torch.GPT(**fields), compiled)
        self.tokens = torch.from_numpy(training_tokens(shape).astype("int64"))

    def step(self) -> float:
        count = self.shape.step_tokens
        span = self.tokens[self.next : self.next + count + 1]
        self.next = (self.next + count + 1) % len(self.tokens)
        rows = (-1, self.shape.seq_len)
        return self.training.step(span[:-1].view(rows), span[1:].view(rows))

    def sliding(self, windows: int, stride: int, batch: int) -> float:
        import peer_torch
        import torch

        tokens = torch.from_numpy(sliding_tokens(self.shape, windows, stride).astype("int64"))
        return peer_torch.sliding_loss(self.training.model, tokens, self.shape.seq_len, stride, batch)


class Products:
    """The libraries' float32 products: GFLOP/s of 4096×512×512."""

    def __init__(self, shape: Shape) -> None:
        import products

        self.libraries: dict[str, Any] = {"openblas": products.OpenBLAS(THREADS), "torch": products.Torch(THREADS)}
        self.product = products.Product(4096, 512, 512)

    def description(self) -> str:
        return self.libraries["openblas"].description

    def rates(self) -> dict[str, float]:
        import products

        return {
            name: self.product.flops / products.seconds(library, self.product) / 1e9
            for name, library in self.libraries.items()
        }


class Agreement:
    """pgolf and the peer in one process, from the same weights and on the same data."""

    def __init__(self, shape: Shape) -> None:
        import torch

        self.pgolf, self.peer = Pgolf(shape), Peer(shape)
        weights = self.pgolf.trainer.model.state_dict()
        self.peer.training.model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})

    def agreement(self, steps: int, windows: int, stride: int, batch: int) -> list[dict[str, Any]]:
        """The losses of training steps, and of the weights after them on sliding windows."""
        losses = [
            {"what": f"loss of step {step + 1}", "pgolf": self.pgolf.step(), "peer": self.peer.step()}
            for step in range(steps)
        ]
        mine, theirs = (program.sliding(windows, stride, batch) for program in (self.pgolf, self.peer))
        return [*losses, {"what": "sliding loss", "pgolf": mine, "peer": theirs}]


class Breakdown:
    """Where the time of a pgolf step goes."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def breakdown(self, repeats: int) -> str:
        import cpu_breakdown

        program = Pgolf(self.shape)
        return cpu_breakdown.breakdown(self.shape, program.trainer, lambda: timed(program.step), repeats, THREADS)


PROGRAMS: dict[str, Callable[[Shape], Any]] = {
    "pgolf": Pgolf,
    "eager": Peer,
    "compiled": lambda shape: Peer(shape, compiled=True),
    "products": Products,
    "agreement": Agreement,
    "breakdown": Breakdown,
}


def peak_mib() -> float:
    """The largest resident set that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def versions() -> dict[str, str]:
    """The version of every package that this process has loaded and whose speed is measured."""
    return {name: sys.modules[name].__version__ for name in ("pgolf", "numpy", "torch") if name in sys.modules}


def serve(kind: str, shape: Shape, connection: Connection) -> None:
    """Answers (command, arguments …) until None comes or the other side is gone; an error by its traceback."""
    try:
        program = PROGRAMS[kind](shape)
        commands: dict[str, Callable[..., object]] = {
            "train": lambda count: [timed(program.step) for _ in range(count)],
            "sliding": lambda *arguments: timed(lambda: program.sliding(*arguments)),
            "peak": peak_mib,
            "versions": versions,
        }
        while (request := connection.recv()) is not None:
            name, *arguments = request
            command = commands[name] if name in commands else getattr(program, name)
            connection.send((command(*arguments), None))
    except EOFError:
        return
    except Exception:
        connection.send((None, traceback.format_exc()))


class Worker:
    """A program in its own process, asleep between requests."""

    def __init__(self, kind: str, shape: Shape) -> None:
        context = multiprocessing.get_context("spawn")
        self.kind = kind
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(kind, shape, theirs), daemon=False)
        self.process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        """Raises RuntimeError, with the program's traceback, where it failed."""
        try:
            self.connection.send(request)
            answer, error = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise RuntimeError(f"The {self.kind} process ended early, with status {self.process.exitcode}.") from None
        if error is not None:
            raise RuntimeError(f"The {self.kind} process failed:\n{error}")
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # it may have failed already
            self.connection.send(None)
        self.process.join()
