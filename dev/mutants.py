"""Bends one piece of the mathematics at a time, in copies of the source tree, and demands that a test fails.

    python dev/mutants.py                 all mutants of dev/mutants.toml; writes docs/mutants.md
    python dev/mutants.py rope skip       those whose names contain one of the words
    python dev/mutants.py --check         only whether every mutant still has exactly one place to bend

The tests must pass on the untouched copy first: all, or for some mutants their own selections. A mutant's own selection
of tests runs first, then, if none of them fails, all tests of the mathematics and formats. What was found is kept in
dev/mutants.done, so an interrupted run goes on where it stopped, on another machine too. The exit status is 1 if a
mutant survives.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "dev" / "mutants.toml"
DONE = ROOT / "dev" / "mutants.done"
TABLE = ROOT / "docs" / "mutants.md"
WORK = ROOT / "build" / "mutants"
# Tests of commands, downloads, plots and the installed package take minutes and would notice mathematics by accident.
OUTSIDE = (
    "benchmarks cli cuda_library demo doctor download environment fidelity forecast full_disk inspect inspect_data"
    " interrupt modules mutants notebook package pages plot prepare run_folder shell_words signals sources train_gpt"
    " typed wheel"
)
ALL_TESTS = " ".join(["tests", *(f"--ignore=tests/test_{name}.py" for name in OUTSIDE.split())])
TIMEOUT = 1800.0  # seconds of one pytest; no selection takes a tenth of it
# An editable install puts a finder before PYTHONPATH that imports pgolf from the working tree, where nothing is bent.
SITE = (
    "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != 'ScikitBuildRedirectingFinder']\n"
)
# A pytest plugin, so that no run of the tests can mistake the working tree for the copy.
GUARD = """
import os, pgolf, pgolf._C
for module in (pgolf, pgolf._C):
    assert module.__file__.startswith(os.environ["MUTANT_TREE"]), module.__file__
"""


class Failure(Exception):
    """What keeps a mutant from being judged; a sentence."""


@dataclass(frozen=True)
class Mutant:
    """One change: in `file`, `old` becomes `new`; `tests` are pytest's arguments for the tests most likely to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def bend(self, source: str) -> str:
        """The source with the change; raises Failure unless it has exactly one place for it."""
        count = source.count(self.old)
        if count != 1:
            raise Failure(f"{self.name}: {self.file} holds {self.old!r} {count} times; exactly once was expected.")
        return source.replace(self.old, self.new)


def read_mutants() -> list[Mutant]:
    """The list, every entry of which has exactly one place in this tree; raises Failure for the others, all at once."""
    mutants = [Mutant(**entry) for entry in tomllib.loads(LIST.read_text(encoding="utf-8"))["mutant"]]
    names = [mutant.name for mutant in mutants]
    wrong = [f"Two mutants have the name {name!r}." for name in sorted({n for n in names if names.count(n) > 1})]
    for mutant in mutants:
        try:
            mutant.bend((ROOT / mutant.file).read_text(encoding="utf-8"))
        except (OSError, Failure) as error:
            wrong.append(str(error))
    if wrong:
        raise Failure("\n".join(wrong))
    return mutants


def sources() -> list[str]:
    """The files that git knows or does not ignore, but for this program's own."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    own = {str(path.relative_to(ROOT)) for path in (LIST, DONE, TABLE, Path(__file__).resolve())}
    return sorted(name for name in set(names) - own if name and (ROOT / name).is_file())


class Tree:
    """A copy of the sources with a build of its own, in which one mutant at a time is tried."""

    def __init__(self, number: int, names: Sequence[str]) -> None:
        self.path = WORK / f"tree{number}"
        self._build, self._pristine = self.path / "build", WORK / f"build{number}"
        self._copy(names)
        if self._pristine.exists():  # of an earlier run; what changed since is compiled
            self._restore_build()
        self._configure()
        self._compile(os.cpu_count() or 1)
        shutil.rmtree(self._pristine, ignore_errors=True)
        shutil.copytree(self._build, self._pristine, symlinks=True)
        (module,) = self._build.glob("_C.*")
        link = self.path / "python" / "pgolf" / module.name
        link.unlink(missing_ok=True)
        link.symlink_to(module)
        site = WORK / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(SITE, encoding="utf-8")
        (site / "mutant_guard.py").write_text(GUARD, encoding="utf-8")
        path = os.pathsep.join([str(site), str(self.path / "python")])
        self._environment = {**_with_tools(), "PYTHONPATH": path, "MUTANT_TREE": str(self.path), "COLUMNS": "400"}
        self._link = self._tool(["ninja", "-C", str(self._build), "-t", "commands", "-s", module.name])
        self._objects = self._objects_that_run()

    def _objects_that_run(self) -> list[str]:
        """All objects but the kernels of the instruction sets that this processor's tests do not run on."""
        isa = self._tool([sys.executable, "-c", "from pgolf import _C; print(_C.cpu_isa())"], self._environment).strip()
        others = {f"pgolf_cpu_{name}{part}.dir" for name in ("plain", "avx2", "avx512") for part in ("", "_backend")}
        others -= {f"pgolf_cpu_{isa}.dir", f"pgolf_cpu_{isa}_backend.dir"}
        objects = [Path(word) for word in shlex.split(self._link) if word.endswith(".o")]
        # The step before linking names some of them again, by their whole paths.
        return [str(path) for path in objects if not path.is_absolute() and others.isdisjoint(path.parts)]

    def _copy(self, names: Sequence[str]) -> None:
        """Copies what differs, so that time stamps of the rest spare their compilation, and removes what is gone."""
        for name in names:
            source, target = ROOT / name, self.path / name
            if not target.is_file() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        known = set(names)
        for path in self.path.rglob("*"):
            place = path.relative_to(self.path)
            if path.is_file() and place.parts[0] != "build" and place.as_posix() not in known:
                path.unlink()

    def _configure(self) -> None:
        pybind11 = subprocess.run(
            [sys.executable, "-m", "pybind11", "--cmakedir"], check=True, capture_output=True, text=True
        ).stdout.strip()
        self._tool(
            [
                "cmake",
                *("-G", "Ninja", "-S", str(self.path), "-B", str(self._build)),
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11}",
                "-DPGOLF_CUDA=off",
            ]
        )

    def _compile(self, jobs: int = 1) -> None:
        self._tool(["ninja", "-C", str(self._build), f"-j{jobs}"])

    def _compile_kernels(self) -> None:
        """A third of a whole build's work: the objects of other instruction sets stay as they were, and are linked."""
        self._tool(["ninja", "-C", str(self._build), "-j1", *self._objects])
        self._tool(["sh", "-c", f"cd {shlex.quote(str(self._build))} && {self._link}"])

    def _tool(self, command: Sequence[str], environment: dict[str, str] | None = None) -> str:
        environment = environment or _with_tools()
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        except FileNotFoundError:
            raise Failure(f"There is no {command[0]}; requirements/build.txt names what a build needs.") from None
        if done.returncode:
            raise Failure(f"{shlex.join(command)[:200]} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def _restore_build(self) -> None:
        shutil.rmtree(self._build, ignore_errors=True)
        shutil.copytree(self._pristine, self._build, symlinks=True)  # with time stamps, as ninja's log has them

    def judge(self, mutant: Mutant) -> str | None:
        """The test that fails on the mutant, or None for a survivor."""
        with self._bent(mutant):
            if failed := self.failing_test(mutant.name, mutant.tests):
                return failed
            failed = self.failing_test(mutant.name, ALL_TESTS)
        if failed is not None and self.failing_test("untouched sources", shlex.quote(failed)):
            raise Failure(f"{mutant.name}: {failed} fails on the untouched sources too.")
        return failed

    @contextmanager
    def _bent(self, mutant: Mutant) -> Iterator[None]:
        """The tree with the mutant in it, compiled."""
        path = self.path / mutant.file
        original, stamp = path.read_text(encoding="utf-8"), path.stat()
        native = not mutant.file.endswith((".py", ".toml"))
        try:
            path.write_text(mutant.bend(original), encoding="utf-8")
            if mutant.file.startswith("csrc/cpu/"):
                self._compile_kernels()
            elif native:
                self._compile()
            yield
        finally:
            path.write_text(original, encoding="utf-8")
            os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
            if native:
                self._restore_build()

    def failing_test(self, name: str, selection: str) -> str | None:
        """The first test of a selection that fails, or None; raises Failure where the tests cannot be run."""
        log = WORK / "logs" / (re.sub(r"\W+", "-", name) + ".txt")
        log.parent.mkdir(exist_ok=True)
        # The profile "ci" has no deadline, which a busy machine would miss, and always draws the same examples.
        options = ["-x", "-q", "--tb=short", "--no-header", "--hypothesis-profile=ci"]
        options += ["-p", "no:cacheprovider", "-p", "mutant_guard"]
        command = [sys.executable, "-m", "pytest", *options, *shlex.split(selection)]
        try:
            done = subprocess.run(
                command,
                cwd=self.path,
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise Failure(f"{name}: pytest {selection} took more than {TIMEOUT:.0f} s.") from None
        log.write_text(done.stdout, encoding="utf-8")
        if done.returncode == 0:
            return None
        failed = re.search(r"^(?:FAILED|ERROR) (tests/\S+\.py::\w+(?:\[.*?\])?)(?: - |$)", done.stdout, re.MULTILINE)
        # No tests, a crash, a module that cannot be imported and the wrong package prove nothing.
        if done.returncode != 1 or failed is None:
            raise Failure(f"{name}: pytest {selection} ended with status {done.returncode}, no test failed; see {log}.")
        return failed[1]


def _with_tools() -> dict[str, str]:
    """The environment with the interpreter's own cmake and ninja in front."""
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}


class Results:
    """What was found so far, by mutant: dev/mutants.done, committed, so that the list is run over several days.

    A result is good while the mutant, the file that it bends and the file of the test that caught it stay as they are;
    a survivor's, while all tests do.
    A line is {"mutant": name, "digest": of these three, "caught_by": the test, or null for a survivor}.
    """

    def __init__(self, path: Path = DONE, root: Path = ROOT) -> None:
        self._path, self._root = path, root
        self._found: dict[str, dict[str, str | None]] = {}
        if path.exists():
            lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            self._found = {line["mutant"]: line for line in lines}
        self._lock = threading.Lock()

    def __contains__(self, mutant: Mutant) -> bool:
        """Whether there is a result that is still good."""
        found = self._found.get(mutant.name)
        return found is not None and found["digest"] == self._digest(mutant, found["caught_by"])

    def __getitem__(self, mutant: Mutant) -> str | None:
        """The test that caught it, None for a survivor."""
        return self._found[mutant.name]["caught_by"]

    def __setitem__(self, mutant: Mutant, caught_by: str | None) -> None:
        with self._lock:
            digest = self._digest(mutant, caught_by)
            self._found[mutant.name] = {"mutant": mutant.name, "digest": digest, "caught_by": caught_by}
            text = "".join(json.dumps(self._found[name], ensure_ascii=False) + "\n" for name in sorted(self._found))
            temporary = self._path.with_suffix(".new")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self._path)

    def _digest(self, mutant: Mutant, caught_by: str | None) -> str:
        tests = [self._root / caught_by.split("::")[0]] if caught_by else sorted(self._root.glob("tests/*.py"))
        contents = [file.read_bytes() if file.exists() else b"" for file in (self._root / mutant.file, *tests)]
        parts = [json.dumps(astuple(mutant)).encode(), *contents]
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def run(
    mutants: Sequence[Mutant], results: Results, names: Sequence[str], jobs: int, first_tests: Sequence[str]
) -> list[str]:
    """Judges what has no result yet and prints a line for each; returns what kept mutants from being judged.

    first_tests: selections that must pass on the untouched sources before.
    """
    waiting = [mutant for mutant in mutants if mutant not in results]
    trees: queue.SimpleQueue[Tree] = queue.SimpleQueue()
    if waiting:
        first = Tree(0, names)
        for selection in first_tests:
            print(f"untouched sources: {selection}", flush=True)
            if failed := first.failing_test("untouched sources", selection):
                raise Failure(f"{failed} fails on the untouched sources; no mutant can be judged.")
        for tree in (first, *(Tree(number, names) for number in range(1, jobs))):
            trees.put(tree)

    def judge(mutant: Mutant) -> str | None:
        started = time.monotonic()
        if mutant not in results:
            tree = trees.get()
            try:
                results[mutant] = tree.judge(mutant)
            except Failure as failure:
                return str(failure)
            finally:
                trees.put(tree)
        seconds = time.monotonic() - started
        print(f"{mutant.name:60} {seconds:6.1f} s  {results[mutant] or 'SURVIVED'}", flush=True)
        return None

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(judge, mutant) for mutant in mutants]
        try:
            return [failure for future in futures if (failure := future.result()) is not None]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_table(mutants: Sequence[Mutant], results: Results) -> None:
    """docs/mutants.md: every mutant and the test that caught it."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    judged = [mutant for mutant in mutants if mutant in results]
    caught = sum(results[mutant] is not None for mutant in judged)
    lines = [
        "# Mutants",
        "",
        f"`make mutants` bends {len(mutants)} pieces of the mathematics, one at a time and in copies of the sources,",
        "and demands that a test fails. The changes themselves are in `dev/mutants.toml`, what was found in",
        "`dev/mutants.done`; `make mutants` wrote this table.",
        "",
        f"Judged on today's text of their file and of the test: {len(judged)}. **Caught: {caught}.** The other",
        f"{len(mutants) - len(judged)} wait for the next run, new or with a changed file since they were last judged.",
        "",
        "| mutant | file | caught by |",
        "| --- | --- | --- |",
    ]
    for mutant in mutants:
        if mutant not in results:
            caught_by = "waits"
        elif (test := results[mutant]) is None:
            caught_by = "**survived**"
        else:
            caught_by = f"`{cell(test)}`"
        lines.append(f"| {cell(mutant.name)} | `{mutant.file}` | {caught_by} |")
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutants whose names contain one of these")
    parser.add_argument("--check", action="store_true", help="only check that every mutant has exactly one place")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tried at a time (default: 2)")
    arguments = parser.parse_args()
    try:
        mutants = read_mutants()
        chosen = [m for m in mutants if not arguments.words or any(w in m.name for w in arguments.words)]
        if not chosen:
            raise Failure(f"No mutant's name contains {' or '.join(arguments.words)}.")
        if arguments.check:
            print(f"{len(mutants)} mutants, each with one place")
            return 0
        WORK.mkdir(parents=True, exist_ok=True)
        names = sources()
        results = Results()
        first_tests = [ALL_TESTS] if chosen == mutants else sorted({m.tests for m in chosen if m not in results})
        failures = run(chosen, results, names, max(1, arguments.jobs), first_tests)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    survivors = [m.name for m in chosen if m in results and results[m] is None]
    print(f"{len(chosen) - len(survivors) - len(failures)} of {len(chosen)} mutants caught")
    for line in [*failures, *(f"SURVIVED: {name}" for name in survivors)]:
        print(line)
    write_table(mutants, results)
    return 1 if failures or survivors else 0


if __name__ == "__main__":
    sys.exit(main())
