"""What one Linux machine can check beyond CI: other compilers, Pythons and processors, sanitizers, fuzzing, mutants.

    python dev/check_all.py                    every section, about two hours on two cores
    python dev/check_all.py aarch64 mingw      these alone
    python dev/check_all.py --list             what there is

A section ends in a line of the last table: passed, FAILED with the command that failed, or MISSING with the package
that would have to be installed. Only passed counts: the exit status is 0 where every section passed. What a section
printed stands in build/check/<section>.txt. `make check-all` runs all of them in the environment of `make test`.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "check"
BIN = Path(sys.executable).parent  # holds cmake, ninja and pytest
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NATIVE_TESTS = "tests/test_core.py tests/test_ops.py tests/test_model.py tests/test_quantize.py"


class Missing(Exception):
    """A tool that is not there; a sentence with the package that has it."""


class Failed(Exception):
    """What failed, in words."""


class Log:
    """Runs the commands of one section and keeps what they print."""

    def __init__(self, name: str) -> None:
        self.path = WORK / f"{name}.txt"
        self.path.write_bytes(b"")
        self.folder = WORK / name

    def run(self, command: Sequence[str | Path], cwd: Path = ROOT, **environment: str) -> str:
        """The output of a command; raises Failed where it fails."""
        words = [str(word) for word in command]
        path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
        with self.path.open("ab") as log:
            log.write(f"$ {shlex.join(words)}\n".encode())
            log.flush()
            start = log.tell()
            environment = {**os.environ, "PATH": path, "PGOLF_CUDA": "off", **environment}  # nvcc alone takes minutes
            done = subprocess.run(words, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT)
        with self.path.open("rb") as log:
            log.seek(start)
            output = log.read().decode(errors="replace")
        if done.returncode:
            lines = [line for line in output.splitlines() if re.search("[a-z]", line)]
            last = lines[-1].strip()[:160] if lines else "no output"
            raise Failed(f"{shlex.join(words)[:120]} ended with {done.returncode}: {last}")
        return output

    def fresh_folder(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self.folder


@dataclass(frozen=True)
class Section:
    """A check: its name, what it is, and the function that runs it and returns what it found, in a few words."""

    name: str
    what: str
    check: Callable[[Log], str]


SECTIONS: list[Section] = []


def section(name: str, what: str) -> Callable[[Callable[[Log], str]], Callable[[Log], str]]:
    def add(check: Callable[[Log], str]) -> Callable[[Log], str]:
        SECTIONS.append(Section(name, what, check))
        return check

    return add


def need(*commands: str, apt: str) -> str:
    """The first of the commands that is there; raises Missing."""
    for command in commands:
        if found := shutil.which(command):
            return found
    raise Missing(f"{' or '.join(commands)} is missing: apt install {apt}")


def make(log: Log, target: str, *settings: str) -> str:
    return log.run(["make", target, f"VENV={sys.prefix}", *settings])


def tests_in(output: str) -> str:
    """pytest's own last line, without its time."""
    found = re.findall(r"^(?:=+ )?(\d+ (?:passed|failed)[^=\n]*?) in ", output, re.MULTILINE)
    return "; ".join(found) if found else "no tests were counted"


# ---- Other compilers


def build_and_test(log: Log, cxx: str) -> str:
    """Compiles with warnings as errors and runs the tests of native code against the result."""
    folder = log.fresh_folder()
    pybind11 = log.run([sys.executable, "-m", "pybind11", "--cmakedir"]).strip()
    log.run(
        [
            *("cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja", "-DPGOLF_WERROR=ON"),
            *(f"-DCMAKE_CXX_COMPILER={cxx}", f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"),
        ]
    )
    log.run(["cmake", "--build", folder / "build"])
    package = folder / "site" / "pgolf"
    shutil.copytree(ROOT / "python" / "pgolf", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (module,) = (folder / "build").glob("_C.*.so")
    shutil.copy(module, package)
    # An editable install puts a finder before PYTHONPATH, which would import another build.
    (folder / "site" / "sitecustomize.py").write_text(
        'import sys; sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]\n'
    )
    path = str(folder / "site")
    found = log.run([sys.executable, "-c", "import pgolf._C as c; print(c.__file__)"], PYTHONPATH=path)
    if path not in found:
        raise Failed(f"{found.strip()} was imported; expected the build in {path}")
    output = log.run([sys.executable, "-m", "pytest", "-q", *NATIVE_TESTS.split()], PYTHONPATH=path)
    version = log.run([cxx, "--version"]).splitlines()[0]
    return f"{version}: {tests_in(output)}"


@section("gcc", "the oldest gcc of 11 and 12: warnings are errors, tests of native code")
def gcc(log: Log) -> str:
    return build_and_test(log, need("g++-11", "g++-12", apt="g++-11"))


@section("clang", "clang 14: warnings are errors, tests of native code")
def clang(log: Log) -> str:
    return build_and_test(log, need("clang++-14", apt="clang-14"))


# ---- Other Pythons


def find_python(version: str) -> str:
    """A Python of this version in PATH, or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for command in (f"python{version}", *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))):
        if (found := shutil.which(command)) and _is_python(found, version):
            return found
    raise Missing(
        f"Python {version} is missing: apt install python{version} python{version}-venv python{version}-dev, "
        f"or where apt has none: pyenv install {version}"
    )


def _is_python(command: str, version: str) -> bool:
    """False for another version, and for pyenv's stand-in of a version that is not chosen."""
    code = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([command, "-c", code], capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.strip() == version


def install_and_smoke(log: Log, version: str) -> str:
    """pip install into an empty environment as a user would, then a small run with the command line."""
    python = find_python(version)
    folder = log.fresh_folder()
    log.run([python, "-m", "venv", folder / "venv"])
    log.run([folder / "venv/bin/python", "-m", "pip", "--disable-pip-version-check", "install", f"{ROOT}[plot]"])
    pgolf = folder / "venv/bin/pgolf"
    away = folder / "away"  # from the source tree, whose package would be imported instead
    away.mkdir()
    log.run([pgolf, "doctor"], away)
    log.run([pgolf, "data", "prepare", "--builtin", "--out", "data"], away)
    run = ["--data", "data", "--run-dir", "run", "--set", "train.max_wallclock_seconds=5"]
    log.run([pgolf, "train", "--recipe", "tiny", *run], away)
    log.run([pgolf, "inspect", "run/model.pgolf"], away)
    log.run([pgolf, "generate", "run", "--prompt", "The ", "--max-new-tokens", "20"], away)
    log.run([pgolf, "plot", "run", "--out", "loss.png"], away)
    score = log.run([pgolf, "eval", "run", "--method", "standard", "--json"], away)
    found = re.findall(r'"bpb": ([\d.]+)', score)
    if not found:
        raise Failed("pgolf eval --json printed no bits per byte")
    exact = log.run([python, "--version"]).strip()
    return f"{exact}: installed; 5 s of training, {float(found[-1]):.2f} bits per byte"


def _add_pythons() -> None:
    for version in PYTHONS:
        section(f"python{version}", f"pip install and a small run on Python {version}")(
            lambda log, version=version: install_and_smoke(log, version)
        )


_add_pythons()

# ---- Other processors and systems: tests/native, which needs no Python


def build_native(log: Log, *options: str) -> Path:
    """The program of tests/native."""
    build = log.fresh_folder() / "build"
    log.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DPGOLF_NATIVE_TESTS=ON", "-DPGOLF_WERROR=ON", *options])
    log.run(["cmake", "--build", build])
    (program,) = (build / "tests" / "native").glob("pgolf_native_tests*")
    return program


def run_native(log: Log, *command: str | Path, **environment: str) -> str:
    output = log.run(command, **environment)
    found = re.search(r"\d+ checks, 0 failures \(.*\)", output)
    if found is None:
        raise Failed("the tests printed no count")
    return found[0]


@section("native", "tests/native on this machine, for each instruction set")
def native(log: Log) -> str:
    program = build_native(log)
    return "; ".join(run_native(log, program, PGOLF_CPU_ISA=isa) for isa in _instruction_sets())


@section("aarch64", "cross-compiled for aarch64, tests/native in an emulator")
def aarch64(log: Log) -> str:
    cxx = need("aarch64-linux-gnu-g++", apt="g++-aarch64-linux-gnu")
    emulator = need("qemu-aarch64-static", "qemu-aarch64", apt="qemu-user-static")
    program = build_native(
        log, "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={cxx}"
    )
    return run_native(log, emulator, "-L", "/usr/aarch64-linux-gnu", program)


@section("mingw", "compiled and linked for Windows with mingw-w64; tests/native in Wine, where there is one")
def mingw(log: Log) -> str:
    cxx = need("x86_64-w64-mingw32-g++-posix", apt="g++-mingw-w64-x86-64-posix")
    program = build_native(log, "-DCMAKE_SYSTEM_NAME=Windows", f"-DCMAKE_CXX_COMPILER={cxx}")
    if (wine := shutil.which("wine")) is None:
        return f"{program.name} is linked, but not run, as wine is missing: apt install wine64"
    environment = {"WINEPREFIX": str(log.folder / "wine"), "WINEDEBUG": "-all"}
    return "; ".join(run_native(log, wine, program, PGOLF_CPU_ISA=isa, **environment) for isa in _instruction_sets())


# ---- This machine, more slowly


def _instruction_sets() -> list[str]:
    """Those of this processor, widest last."""
    code = "from pgolf import _C; print(_C.cpu_isa())"
    found = []
    for isa in ("plain", "avx2", "avx512"):
        environment = {**os.environ, "PGOLF_CPU_ISA": isa}
        if subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0:
            found.append(isa)
    return found


@section("isa", "the whole suite on every instruction set")
def isa(log: Log) -> str:
    missing = {"plain", "avx2", "avx512"} - set(_instruction_sets())
    if missing:
        raise Missing(f"This processor has no {' and no '.join(sorted(missing))}; the section needs another machine")
    return tests_in(make(log, "test-isa"))


@section("sanitizers", "damaged files and native tests under AddressSanitizer and UBSan")
def sanitizers(log: Log) -> str:
    output = make(log, "sanitize")
    found = re.search(r"([\d,]+ cases) of seed.*; (\d+ violations)", output)
    return f"{found[1] if found else 'no cases'}, {found[2] if found else ''}; {tests_in(output)}"


@section("fuzz", "ten minutes of coverage-guided fuzzing of the readers")
def fuzz(log: Log) -> str:
    output = make(log, "fuzz")
    found = re.search(r"stat::number_of_executed_units: (\d+)", output)
    return f"{int(found[1]):,} inputs, 0 failures" if found else "no count was printed"


@section("mutants", "every mutant of dev/mutants.toml fails a test")
def mutants(log: Log) -> str:
    found = re.findall(r"^\d+ of \d+ mutants caught$", make(log, "mutants"), re.MULTILINE)
    return found[-1] if found else "no count was printed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.name for section in SECTIONS]
    parser.add_argument("sections", nargs="*", metavar="section", help=f"one of: {', '.join(names)}; default: all")
    parser.add_argument("--list", action="store_true", help="say what the sections are")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.sections if name not in names]
    if unknown:
        parser.error(f"there is no section {', '.join(unknown)}; there are: {', '.join(names)}")
    if arguments.list:
        for each in SECTIONS:
            print(f"{each.name:12}{each.what}")
        return 0
    WORK.mkdir(parents=True, exist_ok=True)
    rows = []
    for each in SECTIONS:
        if arguments.sections and each.name not in arguments.sections:
            continue
        print(f"{each.name}: {each.what} …", flush=True)
        started = time.monotonic()
        try:
            outcome, words = "passed", each.check(Log(each.name))
        except Missing as missing:
            outcome, words = "MISSING", str(missing)
        except Failed as failure:
            outcome, words = "FAILED", f"{failure} ({(WORK / each.name).relative_to(ROOT)}.txt)"
        rows.append((each.name, outcome, time.monotonic() - started, words))
        print(f"    {outcome}: {words}", flush=True)
    print(f"\n{'section':12}{'outcome':9}{'seconds':>8}  what came of it")
    for name, outcome, seconds, words in rows:
        print(f"{name:12}{outcome:9}{seconds:8,.0f}  {words}")
    return 0 if all(outcome == "passed" for _, outcome, _, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
