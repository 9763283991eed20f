"""Files that torch.save writes: read as plain data and NumPy arrays, with nothing in them run, and written.

Such a file is a zip archive of a pickle, which names tensors and plain data, and of the tensors' bytes. A pickle can
name any function of the machine to be called. So its instructions are first listed, not executed, and a file that names
anything but what tensors and dictionaries are made of is refused before PyTorch sees it; torch.load(weights_only=True),
which has such a list of its own, is the second wall. The archive's sizes are checked before, for entries that are
compressed or lie about their size could fill the memory.

PyTorch is imported only here, and only when such a file is read or written.
"""

from __future__ import annotations

import importlib
import io
import pickletools
import warnings
import zipfile
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from pgolf.artifacts.container import MAX_CONTENT_BYTES, MAX_HEADER_BYTES
from pgolf.common.errors import FormatError

MAX_VALUES = 100_000
MAX_DEPTH = 8

_STORAGES = ("Float", "Half", "BFloat16", "Double", "Char", "Byte", "Short", "Int", "Long", "Bool")
_NAMED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in _STORAGES),
}
"""All that a pickle of tensors and plain data names."""
_NAMING = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}
"""Other instructions that name or make objects; torch.save writes none of them."""


def read_torch(file: BinaryIO, name: str) -> Any:
    """What torch.save wrote: dictionaries, lists, numbers and texts as they are, tensors as arrays.

    Args:
        file: a seekable file.
        name: what messages call it.

    Returns:
        The value. Tensors are owned arrays of their own dtype on the CPU; bfloat16 ones are float32, which is exact.

    Raises:
        FormatError: no zip file of torch.save's, damaged, above 1 GiB, or something that is not a tensor or plain data.
        ModuleNotFoundError: PyTorch is not installed.
    """
    _check_archive(file, name)
    torch = _import_torch(f"To read {name}")
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch has no type of its own for what is damaged
        _fail(name, f"PyTorch cannot read it ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
    return _Plain(torch, name).of(value)


def write_torch(value: dict[str, Any]) -> bytes:
    """The bytes of a file that torch.load reads: dictionaries of plain data, with tensors where there are arrays.

    Raises ModuleNotFoundError where PyTorch is not installed.
    """
    torch = _import_torch("To write a torch file")
    buffer = io.BytesIO()
    torch.save(_with_tensors(torch, value), buffer)
    return buffer.getvalue()


def _import_torch(purpose: str) -> Any:
    # By name, so that nothing that checks this package has to read PyTorch's own sources.
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{purpose}, PyTorch is needed; install it with: pip install 'pgolf[torch]'"
        ) from None


def _with_tensors(torch: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tensors(torch, item) for key, item in value.items()}
    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value


def _fail(name: str, sentence: str) -> NoReturn:
    raise FormatError(f"{name}: {sentence[:1000]}.")


def _check_archive(file: BinaryIO, name: str) -> None:
    """Refuses an archive that could fill the memory, and a pickle that names what is not a tensor."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            size = sum(entry.file_size for entry in entries)
            if size > MAX_CONTENT_BYTES:
                _fail(name, f"its entries have {size:,} bytes; at most {MAX_CONTENT_BYTES:,} were expected")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                _fail(name, "an entry is compressed; torch.save stores all of them as they are")
            if len(pickles) != 1 or len({entry.filename for entry in entries}) != len(entries):
                _fail(name, f"the archive has {len(pickles)} entries data.pkl; one was expected, and no name twice")
            if pickles[0].file_size > MAX_HEADER_BYTES:
                _fail(name, f"data.pkl has {pickles[0].file_size:,} bytes; at most {MAX_HEADER_BYTES:,} were expected")
            if (bad := archive.testzip()) is not None:  # PyTorch itself does not look at the checksums
                _fail(name, f"its entry {bad} has another CRC-32 than the archive says")
            text = archive.read(pickles[0])
        instructions = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(text)]
    except FormatError:
        raise
    except Exception as error:  # zipfile, zlib, struct and pickletools each have their own for what is damaged
        _fail(name, f"a zip file as torch.save writes it was expected ({error})")
    for instruction, argument in instructions:
        if instruction in _NAMING:
            _fail(name, f"its pickle has the instruction {instruction}, which tensors and plain data do not need")
        if instruction == "GLOBAL" and argument not in _NAMED:
            named = str(argument).replace(" ", ".")
            _fail(name, f"its pickle names {named!r}; only tensors and plain data are read, and nothing was run")


class _Plain:
    """From what torch.load returned to plain data; it counts, for a small pickle can hold one list a million times."""

    def __init__(self, torch: Any, name: str) -> None:
        self._torch, self._name = torch, name
        self._values = self._bytes = 0

    def of(self, value: Any, depth: int = 0) -> Any:
        self._values += 1
        if self._values > MAX_VALUES or depth > MAX_DEPTH:
            _fail(self._name, f"it holds more than {MAX_VALUES:,} values or nests them more than {MAX_DEPTH} deep")
        if isinstance(value, self._torch.Tensor):
            return self._array(value)
        if isinstance(value, dict):
            return {self._key(key): self.of(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(item, depth + 1) for item in value]
        if value is None or isinstance(value, (str, int, float)):
            return value
        _fail(self._name, f"it holds a {type(value).__name__}; tensors and plain data were expected")

    def _key(self, key: Any) -> str | int:
        if not isinstance(key, (str, int)):
            _fail(self._name, f"a dictionary has a {type(key).__name__} as key; texts were expected")
        return key

    def _array(self, tensor: Any) -> npt.NDArray[Any]:
        # A tensor's shape may claim more than its storage holds: its strides may be 0.
        self._bytes += tensor.numel() * max(tensor.element_size(), 4)
        if self._bytes > MAX_CONTENT_BYTES:
            _fail(self._name, f"its tensors take more than the {MAX_CONTENT_BYTES:,} bytes that were expected")
        try:
            plain = tensor.detach().float() if tensor.dtype == self._torch.bfloat16 else tensor.detach()
            return np.array(plain.numpy(), order="C")
        except (TypeError, RuntimeError) as error:
            _fail(self._name, f"a tensor of {tensor.dtype} cannot be read ({error})")
