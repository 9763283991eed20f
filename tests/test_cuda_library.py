"""How the CUDA backend and cuBLASLt are found, checked and refused. No GPU is needed: the libraries are stand-ins."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pgolf import _C
from pgolf.model import gpt as model

BACKEND = Path(_C.__file__).with_name("libpgolf_cuda.so")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
CXX_COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
SOURCES = Path(__file__).parents[1] / "csrc"

compiled = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler for the stand-ins")
built = pytest.mark.skipif(not BACKEND.exists(), reason="the CUDA backend is not built")

# What cuBLASLt must have, as stand-ins that do nothing.
CUBLASLT = [
    *("GetStatusName", "Create", "Destroy", "MatmulDescCreate", "MatmulDescDestroy", "MatmulDescSetAttribute"),
    *("MatrixLayoutCreate", "MatrixLayoutDestroy", "MatrixLayoutSetAttribute", "MatmulPreferenceCreate"),
    *("MatmulPreferenceDestroy", "MatmulPreferenceSetAttribute", "MatmulAlgoGetHeuristic"),
    *("MatmulAlgoConfigGetAttribute", "Matmul"),
]


def stand_in(path: Path, source: str) -> Path:
    """A shared library of C code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert COMPILER is not None
    soname = f"-Wl,-soname,{path.name}"
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", soname, "-x", "c", "-", "-o", path], input=source, text=True, check=True
    )
    return path


def stand_in_cublaslt(path: Path, version: int = 130100, without: str = "") -> Path:
    functions = [f"int cublasLt{name}(void) {{ return 1; }}" for name in CUBLASLT if name != without]
    return stand_in(
        path, f"#include <stddef.h>\nsize_t cublasLtGetVersion(void) {{ return {version}; }}" + "\n".join(functions)
    )


def stand_in_gpu(path: Path, major: int = 9, minor: int = 0, problem: str = "", cublaslt: str = "") -> Path:
    """A backend (csrc/cuda/api.h) with one GPU, as far as its capabilities are asked for.

    problem: why the GPU cannot be used; cublaslt: why cuBLASLt cannot be opened.
    """
    return stand_in(
        path,
        f"""
#include <stddef.h>
#include <stdint.h>
#include <string.h>
typedef struct {{ char text[4096]; }} Text;
typedef struct {{ const char* missing; Text sentence; }} Problem;
typedef struct {{ int version, devices; Problem problem; }} Driver;
typedef struct {{ Text name; int major, minor; uint64_t memory; Problem problem; }} Device;
typedef struct {{ Text path; int version; }} BlasInfo;
static void driver(Driver* found) {{ *found = (Driver){{ 13000, 1, {{ "" }} }}; }}
static void device(int index, Device* found) {{
  static const Device gpu = {{
    {{"stand-in"}}, {major}, {minor}, 16000000000u, {{ "{"newer GPU" if problem else ""}", {{"{problem}"}} }}
  }};
  *found = gpu;
}}
static int open_blas(const char* const* folders, size_t count, BlasInfo* found, Text* message) {{
  *found = (BlasInfo){{ {{"stand-in"}}, 130100 }};
  strcpy(message->text, "{cublaslt}");
  return {2 if cublaslt else 0};
}}
static struct {{
  const char* stamp; int runtime; const char* compiled_for; void (*driver)(Driver*); void (*device)(int, Device*);
  int (*open_blas)(const char* const*, size_t, BlasInfo*, Text*);
}} api = {{ "{_C.build_stamp()}", 13000, "75-real", driver, device, open_blas }};
void* pgolf_cuda_open(void) {{ return &api; }}
""",
    )


def python(program: str, load: str = "from pgolf import _C", **environment: str | Path) -> str:
    """What a program prints in a process of its own: a library, once found, stays open."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("PGOLF_") and k != "LD_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", f"{load}\n{program}"],
        capture_output=True,
        text=True,
        env=plain | {name: str(value) for name, value in environment.items()},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def missing(**environment: str | Path) -> tuple[str, str]:
    """What lacks before a GPU can be used, in a word and as a sentence."""
    program = "import json; s = _C.cuda_status(); print(json.dumps([s.usable, s.missing, s.problem]))"
    usable, word, sentence = json.loads(python(program, **environment))
    assert usable == (word == "") == (sentence == "")
    return word, sentence


def cublaslt(before: str = "", load: str = "from pgolf import _C", **environment: str | Path) -> str:
    """What `open_cublaslt` returns or raises."""
    program = f"""{before}
try:
    print(*_C.open_cublaslt())
except RuntimeError as error:
    assert type(error).__name__ == "DeviceError"
    print(error)
"""
    return python(program, load, **environment)


NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
# The extension, loaded from a file.
LOAD = """
import importlib.util, pgolf.common.errors
spec = importlib.util.spec_from_file_location("pgolf._C", {path!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
"""


def copy_of_extension(folder: Path) -> Path:
    """Beside it lies no CUDA backend."""
    (folder / "pgolf").mkdir()
    return Path(shutil.copy(_C.__file__, folder / "pgolf"))


# The library of the CUDA backend


def test_importing_opens_nothing() -> None:
    maps = python("import pgolf.cli, pgolf.model; print(open('/proc/self/maps').read())")
    assert "pgolf/_C." in maps
    assert not re.search(r"libcuda|libcublas|libpgolf_cuda", maps)


def test_a_build_without_the_backend(tmp_path: Path) -> None:
    extension = copy_of_extension(tmp_path)
    program = "s = _C.cuda_status(); print(s.missing, s.problem, sep='\\n')"
    word, sentence = python(program, LOAD.format(path=str(extension))).splitlines()
    assert word == "backend"
    assert sentence.startswith("This build of pgolf has no CUDA backend: there is no file ")
    assert str(extension.with_name("libpgolf_cuda.so")) in sentence


@compiled
def test_a_backend_from_other_sources(tmp_path: Path) -> None:
    api = 'struct { const char* stamp; } api = {"0.0.9+c0ffee"}; void* pgolf_cuda_open(void) { return &api; }'
    library = stand_in(tmp_path / "backend.so", api)
    assert missing(PGOLF_CUDA_LIBRARY=library) == (
        "working backend",
        f"The CUDA backend {library} was built from other sources than this package: its stamp is 0.0.9+c0ffee, the "
        f"package's {_C.build_stamp()}; install pgolf again.",
    )


@compiled
def test_a_library_that_is_no_backend(tmp_path: Path) -> None:
    library = stand_in(tmp_path / "other.so", "int other(void) { return 0; }")
    assert missing(PGOLF_CUDA_LIBRARY=library) == (
        "working backend",
        f"{library} is not a CUDA backend of pgolf: it has no function pgolf_cuda_open.",
    )


@compiled
def test_a_backend_that_lacks_something_itself(tmp_path: Path) -> None:
    library = stand_in(
        tmp_path / "needy.so", "int nowhere(void); void* pgolf_cuda_open(void) { return (void*)nowhere; }"
    )
    word, sentence = missing(PGOLF_CUDA_LIBRARY=library)
    assert word == "working backend"
    assert sentence.startswith(f"The CUDA backend cannot be opened: {library}: undefined symbol: nowhere")


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    file = tmp_path / "text.so"
    for content, reason in ((None, "No such file or directory"), ("not a library", "file too short")):
        if content is not None:
            file.write_text(content)
        word, sentence = missing(PGOLF_CUDA_LIBRARY=file)
        assert word == "working backend"
        assert sentence.startswith(f"The CUDA backend cannot be opened: {file}: ") and reason in sentence


def test_a_model_on_a_gpu_that_is_not_there() -> None:
    program = """
import pgolf
config = pgolf.Config.from_recipe("tiny").model
try:
    pgolf.GPT(config, device="cuda")
except pgolf.DeviceError as error:
    assert str(error) == _C.cuda_status().problem, (error, _C.cuda_status().problem)
    print(error)
print(pgolf.GPT(config).device)
"""
    sentence, device = python(program, **NO_GPU).splitlines()
    assert sentence.endswith(".") and device == "cpu"


# What a model without a device says

ANY_DEVICE = """
import warnings
from pathlib import Path
from pgolf.model import gpt as model
from pgolf.system import doctor
model.shows_nvidia_gpu = lambda: {there}
config = model.ModelConfig(vocab_size=8, num_layers=1, model_dim=8, num_heads=2, num_kv_heads=1, bigram_vocab_size=0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    doctor.examine(Path.cwd())
    assert model.GPT(config, device="cpu").device == "cpu" and not caught
    for _ in range(3):
        assert model.GPT(config).device == "cpu"
for warning in caught:
    print(warning.message)
    assert warning.category is UserWarning and warning.filename == "<string>"
"""


def said(there: bool, **environment: str | Path) -> list[str]:
    """The warnings of three models without a device, on a machine with or without the device file of a GPU."""
    return python(ANY_DEVICE.format(there=there), **environment).splitlines()


def sentence(problem: str) -> str:
    return (
        f"The CPU is used, although this machine has an NVIDIA GPU: {problem} The device 'cpu', where it is named, is "
        "used without this warning."
    )


@compiled
@pytest.mark.parametrize("what", ["problem", "cublaslt"])
def test_a_gpu_that_cannot_be_used_is_told_once(tmp_path: Path, what: str) -> None:
    library = stand_in_gpu(tmp_path / "gpu.so", **{what: "It lacks something."})
    for there in (False, True):  # some systems show no device file
        assert said(there, PGOLF_CUDA_LIBRARY=library) == [sentence("It lacks something.")]


def test_a_backend_that_does_not_work_is_told_where_there_is_a_gpu(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.so"
    _, problem = missing(PGOLF_CUDA_LIBRARY=nowhere)
    assert said(True, PGOLF_CUDA_LIBRARY=nowhere) == [sentence(problem)]
    assert said(False, PGOLF_CUDA_LIBRARY=nowhere) == []


def test_a_build_without_the_backend_is_silent_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "shows_nvidia_gpu", lambda: True)
    lacking = SimpleNamespace(usable=False, missing="backend", problem="There is none.", devices=[])
    monkeypatch.setattr(model._C, "cuda_status", lambda: lacking)
    assert model.resolve_device(None) == ("cpu", -1)


@pytest.mark.parametrize(("visible", "told"), [("", False), ("-1", False), ("7", True), (None, True)])
def test_gpus_that_are_hidden_are_not_missed(visible: str | None, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = SimpleNamespace(usable=False, missing="GPU", problem="The driver shows none.", devices=[])
    monkeypatch.setattr(model._C, "cuda_status", lambda: lacking)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(model, "shows_nvidia_gpu", lambda: False)
    assert model.resolve_device(None) == ("cpu", -1)
    monkeypatch.setattr(model, "shows_nvidia_gpu", lambda: True)
    if told:
        with pytest.warns(UserWarning, match="although this machine has an NVIDIA GPU: The driver shows none"):
            assert model.resolve_device(None) == ("cpu", -1)
    assert model.resolve_device(None) == ("cpu", -1)
    model._warn_of_cpu.cache_clear()


@built
def test_the_backend_exports_one_function_and_needs_neither_driver_nor_python() -> None:
    tools = [shutil.which(tool) for tool in ("nm", "readelf")]
    if None in tools:
        pytest.skip("nm and readelf are not installed")
    nm = subprocess.run(["nm", "-D", "--defined-only", BACKEND], check=True, capture_output=True, text=True)
    assert [line.split()[-1] for line in nm.stdout.splitlines()] == ["pgolf_cuda_open"]
    elf = subprocess.run(["readelf", "-d", BACKEND], check=True, capture_output=True, text=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", elf.stdout)
    system = {
        "libstdc++",
        "libgcc_s",
        "libc",
        "libm",
        "libdl",
        "librt",
        "libpthread",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }
    assert {name.split(".so")[0] for name in needed} <= system


# The driver, whose library the CUDA runtime looks for by name


@built
def test_no_driver() -> None:
    if int(python("print(_C.cuda_status().driver)")):
        pytest.skip("this machine has a driver")
    word, sentence = missing()
    assert word == "driver"
    assert re.match(
        r"No NVIDIA driver is installed; pgolf needs driver 580 or newer|The NVIDIA driver .+ is loaded, but", sentence
    )


@built
@compiled
@pytest.mark.parametrize(
    ("version", "word", "text"),
    [
        (12080, "newer driver", "too old: it supports CUDA 12.8, pgolf needs CUDA 13.0, that is driver 580 or newer."),
        (13000, "GPU", "The NVIDIA driver shows no GPU: there is none, or CUDA_VISIBLE_DEVICES hides it."),
    ],
)
def test_an_old_driver_and_one_without_a_gpu(tmp_path: Path, version: int, word: str, text: str) -> None:
    no_device = "int cuInit(unsigned flags) { return 100; }"
    driver = f"int cuDriverGetVersion(int* version) {{ *version = {version}; return 0; }} {no_device}"
    stand_in(tmp_path / "libcuda.so.1", driver)
    found, sentence = missing(LD_LIBRARY_PATH=tmp_path)
    assert found == word and sentence.endswith(text)


# cuBLASLt


@built
@compiled
def test_cublaslt_of_another_version(tmp_path: Path) -> None:
    for version, text in ((120902, "12.9.2"), (140000, "14.0.0")):
        library = stand_in_cublaslt(tmp_path / str(version) / "lt.so", version)
        assert cublaslt(PGOLF_CUBLASLT=library) == f"{library} is cuBLASLt {text}; pgolf needs version 13."


@built
@compiled
@pytest.mark.parametrize("name", ["Create", "MatmulAlgoGetHeuristic", "Matmul"])
def test_cublaslt_that_lacks_a_function(tmp_path: Path, name: str) -> None:
    library = stand_in_cublaslt(tmp_path / "lt.so", without=name)
    assert cublaslt(PGOLF_CUBLASLT=library) == f"{library} cannot serve as cuBLASLt: it has no function cublasLt{name}."


@built
@compiled
def test_cublaslt_that_is_something_else(tmp_path: Path) -> None:
    library = stand_in(tmp_path / "other.so", "int other(void) { return 0; }")
    found = cublaslt(PGOLF_CUBLASLT=library)
    assert found == f"{library} cannot serve as cuBLASLt: it has no function cublasLtGetVersion."
    nowhere = tmp_path / "nowhere.so"
    found = cublaslt(PGOLF_CUBLASLT=nowhere)
    assert found.startswith(f'PGOLF_CUBLASLT is "{nowhere}", which cannot be opened: ')


@built
@compiled
def test_the_order_in_which_cublaslt_is_looked_for(tmp_path: Path) -> None:
    """A loaded one first, then the variable, the wheel, the system; and one that was found stays."""
    loaded, wheel, system = (
        stand_in_cublaslt(tmp_path / folder / "libcublasLt.so.13", version)
        for folder, version in (("loaded", 130100), ("site/nvidia/cu13/lib", 130300), ("system", 130400))
    )
    named = stand_in_cublaslt(tmp_path / "named.so", 130200)
    load = f"import ctypes; ctypes.CDLL({str(loaded)!r})"
    paths = {"LD_LIBRARY_PATH": str(system.parent)}
    assert cublaslt(**paths) in (f"{system} 130400", cublaslt())  # where a wheel is installed, that one
    paths["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert cublaslt(**paths) == f"{wheel} 130300"
    paths["PGOLF_CUBLASLT"] = str(named)
    assert cublaslt(**paths) == f"{named} 130200"
    assert cublaslt(load, **paths) == f"{loaded} 130100"
    again = f"import os; _C.open_cublaslt(); os.environ['PGOLF_CUBLASLT'] = {str(loaded)!r}"
    assert cublaslt(again, **paths) == f"{named} 130200"


@built
def test_no_cublaslt() -> None:
    load = LOAD.format(path=_C.__file__).replace("spec =", "import sys; sys.path[:] = []; spec =")
    found = cublaslt(load=load)
    if found.endswith(tuple("0123456789")):
        pytest.skip("the system has cuBLASLt")
    assert found == (
        "cuBLASLt 13 (libcublasLt.so.13) is neither in the Python environment nor on the system; "
        "pip install 'pgolf[cuda]' brings it."
    )


# What a backend cannot compute


def stand_in_backend(path: Path) -> Path:
    """A backend whose attention has the CUDA backend's head widths and which has no memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = f"""
#include "cuda/api.h"
#include "cuda/head_width.h"
using namespace pgolf;
using namespace pgolf::abi;
static Text said;
static Status fails(Status status, const char* what) noexcept {{ said.set(what); return status; }}
static Status widths(void*, SublayerMemory*, const AttentionSublayer* op, bool) noexcept {{
  try {{
    cuda::require_head_width(op->wq.shape[0] / op->gain.shape[0]);
    return kDone;
  }} catch (const std::invalid_argument& error) {{
    return fails(kInvalidArgument, error.what());
  }}
}}
extern "C" const Api* pgolf_cuda_open() noexcept {{
  static Api api{{}};
  api.stamp = "{_C.build_stamp()}";
  api.compiled_for = "75-real";
  api.driver = [](Driver* found) noexcept {{ found->devices = 1; }};
  api.device = [](int, Device* found) noexcept {{ found->major = 9; }};
  api.open_blas = [](const char* const*, std::size_t, BlasInfo*, Text*) noexcept {{ return kDone; }};
  api.create = [](int, DType, void** self, Text*) noexcept {{ *self = &said; return kDone; }};
  api.destroy = [](void*) noexcept {{}};
  api.message = [](const void*) noexcept -> const char* {{ return said.text; }};
  api.dtype = [](void*, DType* out) noexcept {{ *out = DType::bf16; return kDone; }};
  api.master_dtype = [](void*, DType* out) noexcept {{ *out = DType::f32; return kDone; }};
  api.attention_sublayer_memory = widths;
  api.allocate = [](void*, void**, std::size_t) noexcept {{ return fails(kDeviceError, "memory was asked for"); }};
  return &api;
}}
"""
    assert CXX_COMPILER is not None
    command = [CXX_COMPILER, "-std=c++20", "-shared", "-fPIC", "-I", SOURCES, "-x", "c++", "-", "-o", path]
    subprocess.run(command, input=source, text=True, check=True)
    return path


@pytest.mark.skipif(CXX_COMPILER is None, reason="there is no C++ compiler for the stand-in")
def test_a_head_width_that_attention_lacks_is_refused_when_the_model_is_made(tmp_path: Path) -> None:
    """Before memory is asked for: of a width that it has, memory is the first that a model lacks."""
    program = """
import pgolf
from pgolf.config import ModelConfig
from pgolf.common.errors import DeviceError
for width in (2, 8, 16, 24, 30, 32, 36, 40, 64, 120, 128, 132, 136, 256, 512):
    for heads, groups in ((1, 1), (6, 2)):
        try:
            pgolf.GPT(ModelConfig(model_dim=width * heads, num_heads=heads, num_kv_heads=groups), device="cuda")
        except (ValueError, DeviceError) as error:
            print(width, type(error).__name__, error)
"""
    found = python(program, load="", PGOLF_CUDA_LIBRARY=stand_in_backend(tmp_path / "backend.so")).splitlines()
    rule = "on a GPU the width of a head must be a multiple of 8 from 32 to 128."
    expected = [
        f"{width} DeviceError memory was asked for"
        if width in (32, 40, 64, 120, 128)
        else f"{width} ValueError Attention heads are {width} wide; {rule}"
        for width in (2, 8, 16, 24, 30, 32, 36, 40, 64, 120, 128, 132, 136, 256, 512)
    ]
    assert found == [line for line in expected for _ in range(2)]


# The build stamp


def test_the_stamp_is_that_of_the_native_sources(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("stamp", Path(__file__).parents[1] / "cmake" / "stamp.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def stamp(version: str = "1.2.3", **files: str) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in {"python/pgolf/__init__.py": f'__version__ = "{version}"\n', **files}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return str(module.stamp(root))

    one = stamp(**{"csrc/a.h": "1", "csrc/cuda/b.cu": "2"})
    assert re.fullmatch(r"1\.2\.3\+[0-9a-f]{16}", one)
    assert one == stamp(**{"csrc/cuda/b.cu": "2", "csrc/a.h": "1", "csrc/notes.md": "x", "python/pgolf/c.py": "y"})
    others = [
        stamp("1.2.4", **{"csrc/a.h": "1", "csrc/cuda/b.cu": "2"}),
        stamp(**{"csrc/a.h": "1", "csrc/cuda/b.cu": "3"}),
        stamp(**{"csrc/a.h": "1", "csrc/cuda/c.cu": "2"}),
        stamp(**{"csrc/a.h": "12", "csrc/cuda/b.cu": ""}),
        stamp(**{"csrc/a.h": "1"}),
    ]
    assert len({one, *others}) == len(others) + 1
    assert re.fullmatch(r".+\+[0-9a-f]{16}", _C.build_stamp())
