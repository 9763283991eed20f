"""Files of a dataset repository on the Hugging Face hub: found, fetched with resumption, and compared with its digests.

`huggingface_hub.hf_hub_download` begins a file anew whenever the process was stopped, so a file is fetched here with
the parts of the library below it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, cast

from pgolf.common.errors import FormatError


@dataclass(frozen=True)
class HubFile:
    """A file of the repository, and how to tell that a copy is whole."""

    path: str
    size: int
    sha256: str | None
    """Of the content, where it is in large file storage."""
    blob_id: str
    """Where it is not: git's SHA-1, of a blob's header and the content."""

    @property
    def digest(self) -> str:
        """The digest that a whole copy has."""
        return self.sha256 or self.blob_id

    def digest_of(self, copy: Path) -> str:
        """The same digest of a copy."""
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(f"blob {copy.stat().st_size}\0".encode())
        with copy.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


class Hub:
    """A dataset repository.

    `endpoint`: the hub's address; None is the library's own default, which HF_ENDPOINT in the environment changes.

    Methods raise ConnectionError where the hub cannot be reached or fails, and FileNotFoundError for a repository or
    revision that it does not have.
    """

    def __init__(self, repo: str, endpoint: str | None = None) -> None:
        try:
            from huggingface_hub import HfApi
        except ImportError:
            raise ImportError(
                "A download needs the package huggingface-hub, which is not installed: pip install 'pgolf[data]'."
            ) from None
        self.repo = repo
        self._api = HfApi(endpoint=endpoint)

    def commit(self, revision: str | None) -> str:
        """The commit that a branch, tag or commit stands for; None is the main branch."""
        with self._errors(revision):
            found = self._api.dataset_info(self.repo, revision=revision).sha
        if not found:
            raise ConnectionError(f"The hub {self._api.endpoint} names no commit of {self.repo}.")
        return found

    def files(self, paths: Sequence[str], commit: str) -> list[HubFile]:
        """What the hub says of these files; raises FileNotFoundError, naming the first, where some are missing."""
        with self._errors(commit):
            found = self._api.get_paths_info(self.repo, list(paths), revision=commit, repo_type="dataset")
        infos: dict[str, Any] = {info.path: info for info in found if hasattr(info, "blob_id")}
        missing = [path for path in paths if path not in infos]
        if missing:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise FileNotFoundError(f"The dataset {self.repo} (commit {commit[:12]}) has no file {missing[0]}{others}.")
        return [
            HubFile(path, info.size, info.lfs.sha256 if info.lfs else None, info.blob_id)
            for path, info in ((path, infos[path]) for path in paths)
        ]

    def fetch(self, file: HubFile, commit: str, part: Path, report: Callable[[int], None]) -> None:
        """Bring a file to `part`, on from where an earlier call was stopped, and compare it with its digest.

        `report` is called with the number of bytes of every piece that arrives.

        Raises OSError where `part` cannot be written, and FormatError, once `part` is removed, where what came is not
        the file.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get

        if part.exists() and part.stat().st_size > file.size:
            part.unlink()
        url = hf_hub_url(self.repo, file.path, repo_type="dataset", revision=commit, endpoint=self._api.endpoint)
        headers = {**self._headers(), "Accept-Encoding": "identity"}  # what is compressed on the way has other offsets
        try:
            with _PartFile(part, report) as target:
                while (begun := target.tell()) < file.size:
                    try:
                        with self._errors(commit), _no_bars():
                            http_get(
                                url, cast(Any, target), resume_size=begun, headers=headers, expected_size=file.size
                            )
                    except ConnectionError:
                        if target.tell() <= begun:  # as long as something comes, it is worth another try
                            raise
                target.sync()
        except _WriteError as error:
            raise error.cause from None
        found = file.digest_of(part)
        if found != file.digest:
            size = part.stat().st_size
            part.unlink()
            raise FormatError(
                f"{file.path} of {self.repo} arrived damaged and was removed: {size:,} bytes with the digest {found}; "
                f"{file.size:,} bytes with {file.digest} are expected. Start the download again."
            )

    def _headers(self) -> dict[str, str]:
        import huggingface_hub

        from pgolf import __version__

        utils: Any = huggingface_hub.utils
        headers: dict[str, str] = utils.build_hf_headers(library_name="pgolf", library_version=__version__)
        return headers

    @contextmanager
    def _errors(self, revision: str | None) -> Iterator[None]:
        """The library's errors as Python's, in sentences."""
        import huggingface_hub

        utils: Any = huggingface_hub.utils
        # The library's own errors stand on those of its HTTP client: requests, httpx or httpx2, by its version.
        client_error = utils.HfHubHTTPError.__mro__[1]
        where = f"The hub {self._api.endpoint}"
        try:
            yield
        except utils.HFValidationError:
            raise ValueError(f"{self.repo!r} is not the name of a dataset; owner/name is expected.") from None
        except utils.GatedRepoError:
            raise PermissionError(
                f"{where} gives the dataset {self.repo} only to users whom its owner allows; "
                "ask there, then set HF_TOKEN in the environment."
            ) from None
        except utils.RepositoryNotFoundError:
            raise FileNotFoundError(
                f"{where} has no dataset {self.repo}, or it is private: then HF_TOKEN in the environment must be set."
            ) from None
        except utils.RevisionNotFoundError:
            raise FileNotFoundError(f"The dataset {self.repo} has no revision {revision!r}.") from None
        except utils.EntryNotFoundError:
            raise FileNotFoundError(f"{where} lists a file of {self.repo} that it does not have.") from None
        except utils.HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else "no"
            raise ConnectionError(
                f"{where} answered with status {status}. What has arrived is kept, and the same call goes on from "
                "there."
            ) from None
        except (OSError, client_error, json.JSONDecodeError) as error:
            raise ConnectionError(
                f"{where} cannot be reached, or the connection was lost ({_first_line(error)}). What has arrived is "
                "kept, and the same call goes on from there."
            ) from None


class _WriteError(Exception):
    """A failure of our own disk, on its way through the library's handling of network errors."""

    def __init__(self, cause: OSError) -> None:
        self.cause = cause


class _PartFile(FileIO):
    """A file to append to that reports what it takes."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(path, "a")
        self._path = path
        self._report = report

    def write(self, data: Any) -> int:
        left = memoryview(data)
        while left:
            try:
                left = left[super().write(left) :]
            except OSError as error:
                raise self._failure(error) from None
        self._report(len(data))
        return len(data)

    def sync(self) -> None:
        """Bring what was written onto the disk."""
        try:
            os.fsync(self.fileno())
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> _WriteError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = (
                "the disk is full; what has arrived is kept, and the same call goes on from there once there is space"
            )
        else:
            what = f"the file cannot be written ({error.strerror})"
        return _WriteError(OSError(error.errno, f"{self._path}: {what}"))


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the library's own progress bars."""
    import huggingface_hub

    utils: Any = huggingface_hub.utils
    disabled = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            utils.enable_progress_bars()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
