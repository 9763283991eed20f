"""What lies under the model: random numbers, the thread pool, the choice of instructions, the allocation counter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgolf
from pgolf import _C, ops
from tests.reference import rng

words = st.integers(0, 2**32 - 1)


def run_isolated(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own, however long a busy machine takes."""
    path = os.pathsep.join([str(Path(pgolf.__file__).parent.parent), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )


# Random numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """Random123's published vectors for philox4x32, 10 rounds."""
    assert _C.philox4x32(counter, key) == expected


@given(st.tuples(words, words, words, words), st.tuples(words, words))
def test_philox_equals_the_reference(counter, key):
    assert _C.philox4x32(counter, key) == tuple(int(word) for word in rng.philox4x32(counter, key))


# Threads --------------------------------------------------------------------------------------------------------------


def test_the_number_of_threads_is_what_was_set(one_thread):
    for count in (1, 2, 5, 1):
        pgolf.set_num_threads(count)
        assert pgolf.get_num_threads() == count


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_an_impossible_number_of_threads_changes_nothing(one_thread, count):
    with pytest.raises(ValueError, match=rf"The number of threads is {count}; it must be from 1 to 1024\."):
        pgolf.set_num_threads(count)
    assert pgolf.get_num_threads() == 1


@pytest.mark.parametrize("value", ["1", "3", "17"])
def test_the_environment_sets_the_first_number_of_threads(value):
    result = run_isolated("import pgolf; print(pgolf.get_num_threads())", PGOLF_NUM_THREADS=value)
    assert result.stdout.strip() == value, result.stderr


@pytest.mark.parametrize("value", ["0", "-2", "1025", "two", "2.5", "2 threads", "99999999999999999999"])
def test_a_bad_number_of_threads_in_the_environment_is_a_sentence(value):
    result = run_isolated("import pgolf; pgolf.get_num_threads()", PGOLF_NUM_THREADS=value)
    expected = f'ValueError: PGOLF_NUM_THREADS is "{value}"; it must be a whole number from 1 to 1024.'
    assert result.stderr.strip().splitlines()[-1] == expected


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_task_runs_exactly_once(one_thread, count):
    pgolf.set_num_threads(count)
    for tasks in (0, 1, 2, 1000):
        seen: list[int] = []
        _C.run_tasks(tasks, seen.append)
        assert sorted(seen) == list(range(tasks))


def test_tasks_run_on_several_threads(one_thread):
    """The first two tasks wait for each other, which one thread alone could not end."""
    pgolf.set_num_threads(2)
    both = threading.Barrier(2, timeout=60)
    seen = set()

    def task(_: int) -> None:
        both.wait()
        seen.add(threading.get_ident())

    _C.run_tasks(2, task)
    assert len(seen) == 2


def test_tasks_within_tasks_run_where_they_are(one_thread):
    pgolf.set_num_threads(3)
    seen = []

    def outer(i: int) -> None:
        here = threading.get_ident()
        _C.run_tasks(5, lambda j: seen.append((i, j, threading.get_ident() == here)))

    _C.run_tasks(4, outer)
    assert sorted(seen) == [(i, j, True) for i in range(4) for j in range(5)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_exception_of_a_task_is_raised_and_the_pool_goes_on(one_thread, count):
    pgolf.set_num_threads(count)
    done = []

    def task(i: int) -> None:
        if i == 3:
            raise KeyError(f"task {i}")

    for _ in range(3):
        with pytest.raises(KeyError, match="task 3"):
            _C.run_tasks(1000, task)
    _C.run_tasks(10, done.append)
    assert sorted(done) == list(range(10))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_thread_whose_task_failed_takes_no_other(one_thread, count):
    """So where every task fails, no more begin than there are threads, however they are scheduled."""
    pgolf.set_num_threads(count)
    for _ in range(20):
        begun = []

        def task(i: int, begun: list = begun) -> None:
            begun.append(i)
            raise KeyError(f"task {i}")

        with pytest.raises(KeyError) as caught:
            _C.run_tasks(1000, task)
        assert 1 <= len(begun) <= count
        assert caught.value.args[0] in {f"task {i}" for i in begun}


def test_two_python_threads_compute_at_once(one_thread):
    """One has the pool, the other computes alone; both are right. (Calls of one dtype wait for each other.)"""
    pgolf.set_num_threads(2)
    x = np.random.default_rng(0).standard_normal((2, 300, 16))
    w = np.random.default_rng(1).standard_normal((24, 16))
    wrong = []

    def work(dtype: str) -> None:
        arguments = x.astype(dtype), w.astype(dtype)
        expected = ops.mlp_up(*arguments)[0].tobytes()
        for _ in range(100):
            if ops.mlp_up(*arguments)[0].tobytes() != expected:
                wrong.append(dtype)

    threads = [threading.Thread(target=work, args=(dtype,)) for dtype in ("float32", "float64")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


if hasattr(os, "fork"):

    def test_a_forked_child_computes_the_same():
        """A child has none of its parent's threads and makes its own."""
        code = """
import os, numpy as np, pgolf
from pgolf import _C, ops

pgolf.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((2, 600, 16))
w = np.random.default_rng(1).standard_normal((24, 16))
expected = ops.mlp_up(x, w)[0].tobytes()
child = os.fork()
same = ops.mlp_up(x, w)[0].tobytes() == expected
if not child:
    pgolf.set_num_threads(3)
    tasks = []
    _C.run_tasks(100, tasks.append)
    same = same and ops.mlp_up(x, w)[0].tobytes() == expected and sorted(tasks) == list(range(100))
    os._exit(0 if same else 1)
assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
        result = run_isolated(code)
        assert result.returncode == 0, result.stderr


# Instructions ---------------------------------------------------------------------------------------------------------


def test_subnormals_are_zero_inside_calls_only():
    tiny = np.full(4, 1e-40, np.float32)
    assert ops.axpby(1.0, tiny, 0.0, tiny).max() == 0.0
    assert (tiny * np.float32(0.5)).min() > 0.0


def test_an_unknown_instruction_set_is_a_sentence():
    result = run_isolated("from pgolf import _C; _C.cpu_isa()", PGOLF_CPU_ISA="sse9")
    last = result.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r'ValueError: PGOLF_CPU_ISA is "sse9"; this build knows: (\w+, )*plain\.', last)


def test_an_empty_choice_of_instructions_is_none():
    result = run_isolated("from pgolf import _C; print(_C.cpu_isa())", PGOLF_CPU_ISA="")
    assert result.stdout.strip() in ("avx512", "avx2", "plain"), result.stderr


# Memory ---------------------------------------------------------------------------------------------------------------


def test_the_allocation_counter_only_rises():
    counts = [_C.allocation_count()]
    for _ in range(3):
        ops.sum(np.ones(1000))
        counts.append(_C.allocation_count())
    assert all(before < after for before, after in pairwise(counts))
    assert _C.allocation_count() == _C.allocation_count()


def test_the_number_of_threads_may_change_while_another_thread_computes(one_thread):
    """A call keeps the threads that its scratch was made for."""
    x = np.random.default_rng(0).standard_normal((4, 600, 32))
    w = np.random.default_rng(1).standard_normal((64, 32))
    expected = ops.mlp_up(x, w)[0].tobytes()
    done = threading.Event()

    def change() -> None:
        count = 0
        while not done.is_set():
            pgolf.set_num_threads(1 + count % 8)
            count += 1

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert all(ops.mlp_up(x, w)[0].tobytes() == expected for _ in range(100))
    finally:
        done.set()
        thread.join()
