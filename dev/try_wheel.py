"""Installs a wheel where there is no compiler, in an empty environment and an empty folder, and runs it.

    python dev/try_wheel.py                                      the newest in dist/ or dist/trial/ for this Python
    python dev/try_wheel.py WHEEL --packages DIR --device cuda   packages from wheels in a folder, no network; on a GPU
    python dev/try_wheel.py --tests tests/test_package.py        then these tests against what was installed

The Python that runs this must be of the version that the wheel is for, and have pip; the environment gets none of its
packages. Commands see the new environment alone in PATH. In order: pip install, pip check, pgolf doctor, a corpus from
Python's own documentation, a short run of the recipe tiny on the device, its artifact's score on the device and on the
CPU, a continuation. For the tests, pytest and torch come from the Python that runs this, and binutils are in PATH. A
table at the end; the exit status is 1 where something failed, with the command and what it printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "cmake", "ninja", "make")
# An artifact's score on a GPU may differ from the CPU's by what 16-bit storage rounds; garbage differs by more.
TOLERANCE = 0.01  # bits per byte
STEPS = 20
# Besides what pip needs to reach its index: where this machine has its GPU's driver and cuBLASLt.
KEPT = ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "PGOLF_CUBLASLT")


class Failed(Exception):
    """What went wrong, in words."""


class Trial:
    """An environment, an empty folder to work in, and what came of each step."""

    def __init__(self, folder: Path, rows: list[tuple[str, float, str]]) -> None:
        self.bin = folder / "environment" / "bin"
        self.away = folder / "away"
        self.away.mkdir()
        self.rows = rows
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in KEPT or name.startswith(("PIP_", "SSL_CERT_")) or name.lower().endswith("_proxy")
        }
        self.environment = {**kept, "PATH": str(self.bin), "HOME": str(folder), "LANG": "C.UTF-8", "PYTHONUTF8": "1"}

    def run(self, *command: str | Path, **environment: str) -> str:
        """What a command prints; raises Failed where it fails."""
        words = [str(word) for word in command]
        done = subprocess.run(
            words, cwd=self.away, env={**self.environment, **environment}, capture_output=True, text=True
        )
        if done.returncode:
            raise Failed(
                f"{shlex.join(words)} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        return done.stdout

    def pgolf(self, *arguments: str) -> Any:
        """The JSON that ends what the command pgolf prints."""
        return json.loads(self.run(self.bin / "pgolf", *arguments, "--json").strip().splitlines()[-1])

    def pip(self, *arguments: str | Path) -> None:
        # The outer pip, so that the environment holds nothing but the package and what it requires.
        self.run(
            sys.executable, "-m", "pip", "--python", self.bin / "python", "--disable-pip-version-check", *arguments
        )

    def done(self, name: str, since: float, words: str) -> None:
        self.rows.append((name, time.monotonic() - since, words))
        print(f"{name}: {words}", flush=True)


def install(trial: Trial, wheel: Path, packages: Path | None) -> None:
    start = time.monotonic()
    # --without-pip: some systems' venv has none to give.
    trial.run(sys.executable, "-m", "venv", "--without-pip", trial.bin.parent)
    compilers = [name for name in COMPILERS if shutil.which(name, path=trial.environment["PATH"])]
    if compilers:
        raise Failed(f"The environment has compilers: {', '.join(compilers)}.")
    source = ["--no-index", "--find-links", packages] if packages else []
    trial.pip("install", "--quiet", "--only-binary", ":all:", *source, wheel)
    trial.pip("check")
    where = trial.run(trial.bin / "python", "-c", "import pgolf; print(pgolf.__version__, pgolf.__file__)").strip()
    if str(trial.bin.parent) not in where:
        raise Failed(f"pgolf was imported from {where}; expected it in {trial.bin.parent}.")
    trial.done("install", start, f"{wheel.name}: {where.split()[0]}, no compiler in PATH")


def doctor(trial: Trial, wheel: Path, device: str) -> None:
    start = time.monotonic()
    report = trial.pgolf("doctor")
    gpu = next(check for check in report["checks"] if check["name"] == "GPU")
    if not report["works"]:
        raise Failed(f"pgolf doctor finds something broken: {json.dumps(report['checks'], indent=1)}")
    if device != "cpu" and gpu["status"] != "ok":
        raise Failed(f"pgolf doctor says of the GPU: {gpu['found']}")
    with zipfile.ZipFile(wheel) as archive:
        has_backend = "pgolf/libpgolf_cuda.so" in archive.namelist()
    # A backend of another build, or one that cannot be opened, is a defect on any machine; a missing driver is none.
    missing = trial.run(trial.bin / "python", "-c", "from pgolf import _C; print(_C.cuda_status().missing)").strip()
    if has_backend and missing in ("backend", "working backend"):
        raise Failed(f"The CUDA backend of the wheel cannot be used: {gpu['found']}")
    trial.done("doctor", start, f"GPU: {gpu['found']}")


def train_and_score(trial: Trial, device: str) -> None:
    start = time.monotonic()
    trial.pgolf("data", "prepare", "--builtin", "--out", "data")
    trial.done("data", start, "the built-in corpus, tokenized")

    start = time.monotonic()
    settings = [f"train.iterations={STEPS}", "train.max_wallclock_seconds=0", "train.val_loss_every=0"]
    options = [word for setting in settings for word in ("--set", setting)]
    report = trial.pgolf(
        "train", "--recipe", "tiny", "--data", "data", "--run-dir", "run", "--device", device, *options
    )
    trial.done("train", start, f"{report['steps']} steps on {report['device']}, {report['artifact_bytes']:,} bytes")

    scores = {}
    for place in dict.fromkeys([device, "cpu"]):
        start = time.monotonic()
        scores[place] = trial.pgolf("eval", "run", "--method", "standard", "--device", place)["bpb"]
        trial.done(f"eval {place}", start, f"{scores[place]:.4f} bits per byte")
    if not all(0 < score < 8 for score in scores.values()):
        raise Failed(f"The scores are {scores}; expected bits per byte between 0 and 8.")
    if abs(scores[device] - scores["cpu"]) > TOLERANCE:
        raise Failed(f"The scores are {scores}; expected a difference of {TOLERANCE} at most.")

    start = time.monotonic()
    text = trial.run(
        trial.bin / "pgolf", "generate", "run", "--prompt", "The ", "--max-new-tokens", "20", "--device", device
    )
    trial.done("generate", start, f"{len(text)} characters")


def run_tests(trial: Trial, tests: list[str]) -> None:
    start = time.monotonic()
    # Behind the environment's own packages: pgolf and what it requires stay those that were installed.
    packages = trial.run(trial.bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(packages) / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    path = os.pathsep.join([str(trial.bin), "/usr/bin", "/bin"])
    command = [trial.bin / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    output = trial.run(*command, *(ROOT / test for test in tests), PATH=path)
    trial.done("tests", start, output.strip().splitlines()[-1].strip("= "))


def newest_wheel() -> Path:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels = sorted((ROOT / "dist").rglob(f"pgolf-*-{tag}-{tag}-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        raise Failed(f"There is no wheel for {tag} in {ROOT / 'dist'}: make wheel")
    return wheels[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", type=Path)
    parser.add_argument(
        "--packages", type=Path, metavar="DIR", help="wheels of what pgolf requires; default: the index"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: cpu")
    parser.add_argument(
        "--tests", nargs="+", default=[], metavar="FILE", help="tests to run against what was installed"
    )
    arguments = parser.parse_args()
    rows: list[tuple[str, float, str]] = []
    failure = ""
    try:
        wheel = (arguments.wheel or newest_wheel()).resolve()
        packages = arguments.packages.resolve() if arguments.packages else None
        with tempfile.TemporaryDirectory(prefix="pgolf-wheel-") as folder:
            trial = Trial(Path(folder), rows)
            install(trial, wheel, packages)
            doctor(trial, wheel, arguments.device)
            train_and_score(trial, arguments.device)
            if arguments.tests:
                run_tests(trial, arguments.tests)
    except Failed as failed:
        failure = str(failed)
    print()
    for name, seconds, words in rows:
        print(f"{name:10}{seconds:7.1f} s  {words}")
    if failure:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
