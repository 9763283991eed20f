"""Runs a public training script from outside, unchanged on the disk: what fidelity.py compares pgolf with.

    DATA_PATH=… SEED=42 … python benchmarks/run_script.py train_gpt.py --out FOLDER
    … --qat-from 0.85    with late QAT (docs/spec.md §3), which the 10-layer script has not
    … --export pr286     with that recipe's pruning and quantisation, by tests/reference, in place of the script's own

The script is one of openai/parameter-golf's: a module with CastedLinear, Muon, mixed_quantize_int6,
dequantize_mixed_int6 and main(), which compiles its model with torch.compile and prints its losses. It is imported, a
few names that it looks up are replaced, and main() is called. FOLDER, the script's working folder, gets initial.npz,
the weights before the first step, and final.npz, those that were scored, both as float32 by their own names.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parents[1]
SCRIPT_PRUNES = 0.03  # the quantile that the script asks for where it prunes


class Watched:
    """The script's model, seen when the script compiles it, and its optimizer steps, counted."""

    def __init__(self, module: ModuleType, args: argparse.Namespace) -> None:
        self.module, self.args = module, args
        self.model: torch.nn.Module | None = None
        self.steps = 0
        self.priming = 0  # steps that the script will take back
        if "WARMUP_STEPS" in args.script.read_text(encoding="utf-8"):
            self.priming = int(os.environ.get("WARMUP_STEPS", "20"))
        self.coarse: torch.Tensor | None = None
        """1 while late QAT is active, else 0: a tensor, so that a compiled model need not be compiled again."""
        self._compile = torch.compile

    def compile(self, model: Any = None, **options: Any) -> Any:
        """In place of torch.compile."""
        if isinstance(model, torch.nn.Module):
            self.model = model
            save(self.args.out / "initial.npz", model)
            if self.args.qat_from < 1:
                self.prepare_qat(model)
        return model if self.args.eager else self._compile(model, **options)

    def prepare_qat(self, model: torch.nn.Module) -> None:
        self.coarse = torch.zeros((), device=next(model.parameters()).device)
        for name, part in model.named_modules():
            if isinstance(part, self.module.CastedLinear) and (".mlp." in name or ".attn." in name):
                part.qat_clip = 15 if ".mlp." in name else 31
                part.register_buffer("qat_coarse", self.coarse, persistent=False)
        self.module.CastedLinear.forward = coarse_linear

    def stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After each step of each optimizer."""
        if type(optimizer) is not self.module.Muon:
            return
        if self.priming > 0:
            self.priming -= 1
            return
        self.steps += 1
        if self.args.stop_after and self.steps > self.args.stop_after:  # the loss of the step before has been printed
            sys.exit()
        if self.coarse is not None:
            self.coarse.fill_(float(self.steps / int(os.environ["ITERATIONS"]) >= self.args.qat_from))


def coarse_linear(self: Any, x: torch.Tensor) -> torch.Tensor:
    """A linear layer whose products see fake-quantised weights while it trains; the weights' gradient is unchanged."""
    w = self.weight
    clip = getattr(self, "qat_clip", 0)
    if clip and self.training:
        scale = (w.detach().abs().amax(dim=1, keepdim=True) / clip).clamp_min(1e-12)
        rounded = torch.clamp(torch.round(w.detach() / scale), -clip - 1, clip) * scale
        w = w + self.qat_coarse * (rounded - w.detach())
    return F.linear(x, w.to(x.dtype))


def use_export(module: ModuleType, recipe: str) -> None:
    """Lets the script quantise as the recipe does, by the tests' independent implementation."""
    sys.path.insert(0, str(ROOT))
    from tests.reference.quant import quantize_state

    from pgolf.config import Config

    settings = Config.from_recipe(recipe).export

    def quantise(state: Mapping[str, torch.Tensor], categories: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        arrays = {name: tensor.float().numpy() for name, tensor in state.items()}
        stored, encodings = quantize_state(arrays, settings.policy, settings.small_numel, settings.prune)
        return {name: torch.from_numpy(w) for name, w in stored.items()}, encodings

    def dequantise(stored: Any, encodings: Any, template: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: stored[name].to(tensor.dtype) for name, tensor in template.items()}

    quantile = torch.quantile

    def no_pruning(values: torch.Tensor, q: Any, *rest: Any, **named: Any) -> torch.Tensor:
        return torch.zeros((), device=values.device) if q == SCRIPT_PRUNES else quantile(values, q, *rest, **named)

    module.mixed_quantize_int6, module.dequantize_mixed_int6 = quantise, dequantise
    torch.quantile = no_pruning


def save(path: Path, model: torch.nn.Module) -> None:
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **{name: tensor.detach().float().cpu().numpy() for name, tensor in model.state_dict().items()})
    partial.replace(path)


def load(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("public_script", script)
    if spec is None or spec.loader is None or not script.is_file():
        raise FileNotFoundError(f"There is no script {script}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    needed = ["CastedLinear", "Muon", "main", "mixed_quantize_int6", "dequantize_mixed_int6"]
    if missing := [name for name in needed if not hasattr(module, name)]:
        raise ValueError(f"{script} lacks {', '.join(missing)}: it is no train_gpt.py of the 10-layer recipe's kind.")
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--qat-from", type=float, default=1.0, help="share of ITERATIONS at which late QAT begins")
    parser.add_argument(
        "--stop-after", type=int, default=0, help="steps after which the script is stopped; 0: at its end"
    )
    parser.add_argument("--export", metavar="RECIPE", help="whose quantisation takes the place of the script's")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    module = load(args.script.resolve())
    watched = Watched(module, args)
    torch.compile = watched.compile
    if args.eager:  # the script keeps tables that its first validation made, which no eager training may read
        torch.inference_mode = torch.no_grad
    register_optimizer_step_post_hook(watched.stepped)
    if args.export:
        use_export(module, args.export)
    os.chdir(args.out)
    module.main()
    if watched.model is None or not watched.steps:
        raise ValueError(f"{args.script} compiled no model or took no step of Muon: its curve cannot be compared.")
    save(args.out / "final.npz", watched.model)


if __name__ == "__main__":
    main()
