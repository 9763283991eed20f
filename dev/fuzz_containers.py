"""A coverage-guided fuzzer of the artifact container, the shard reader and the manifest: pip install atheris

    python dev/fuzz_containers.py --minutes 10

The first byte of an input says for which reader the rest is. Containers of both versions are tried as they are and, so
that the fuzzer gets past the checksums, as content that is given right ones. The readers may refuse with FormatError,
or FileNotFoundError for what a manifest names; another exception, a crash, 5 seconds or 1 GiB end the run, and
libFuzzer writes the input that did it to build/fuzz. Inputs that reached new code are kept in build/fuzz/corpus for the
next run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris
import corrupt

from pgolf.artifacts import container
from pgolf.common.errors import FormatError
from pgolf.data import manifest, shards

OUT = Path(__file__).resolve().parent.parent / "build" / "fuzz"
SECONDS = 5
MEMORY_MIB = 1024
SEALS = {
    "artifact": bytes,
    "artifact, sealed": corrupt.seal_streams,
    "artifact 1": bytes,
    "artifact 1, sealed": corrupt.seal_content,
}
KINDS = (*SEALS, "shard", "manifest")


class Target:
    """One input to one reader."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, data: bytes) -> None:
        if not data:
            return
        kind, content = KINDS[data[0] % len(KINDS)], data[1:]
        try:
            if kind in SEALS:
                container.unpack(SEALS[kind](content))
            elif kind == "shard":
                int(shards.read_shard(self._write("fuzz.bin", content)).sum())
            else:
                shards.find_data(self._write(manifest.NAME, content).parent, splits=())
        except (FormatError, FileNotFoundError) as refusal:
            assert len(str(refusal).split()) >= 4, repr(refusal)

    def _write(self, name: str, content: bytes) -> Path:
        path = self._folder / name
        path.unlink(missing_ok=True)  # never written in place: a map of the old one may still be open
        path.write_bytes(content)
        return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1, help="libFuzzer's; 0 draws one")
    parser.add_argument("inputs", nargs="*", help="files to run again, in place of fuzzing")
    arguments = parser.parse_args()
    corpus = OUT / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="pgolf-fuzz-", dir=corrupt.memory_folder()))
    kinds = corrupt.make_kinds(folder)
    for number, name in enumerate(KINDS):
        (corpus / f"sample-{number}").write_bytes(bytes([number]) + kinds[name].sample)
    atheris.instrument_all()  # its import hook sees nothing of an editable install
    options = [
        f"-max_total_time={round(60 * arguments.minutes)}",
        f"-seed={arguments.seed}",
        f"-timeout={SECONDS}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-artifact_prefix={OUT}/",
        "-max_len=16384",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, *(arguments.inputs or [str(corpus)])], Target(folder))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
