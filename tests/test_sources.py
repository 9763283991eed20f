"""What is a document: JSON Lines and JSON by content, fields, folders, a single text, and other encodings."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import string
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pgolf.common import errors
from pgolf.data import documents as documents_module
from pgolf.data.documents import FileReader
from pgolf.data.preparation import prepare
from tests.runs import last_json, pgolf_, refused


def texts(*paths: Path, **options: Any) -> list[str]:
    return [document.text() for document in FileReader(paths, **options).documents()]


def lines(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def prose(words: int, seed: int = 0) -> str:
    """Made-up words, enough of them for a small tokenizer."""
    draw = random.Random(seed)
    known = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(300)]
    return " ".join(draw.choice(known) for _ in range(words))


# JSON

OBJECTS = [
    {"text": "one"},
    {"id": 2, "text": 'two "quoted" \\ {[]}'},
    {"text": "drei, ü\n\n", "more": [{"text": "no"}]},
]
TEXTS = [value["text"] for value in OBJECTS]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize(
    "content",
    [
        lines(*OBJECTS),
        lines(*OBJECTS).replace("\n", "\r\n\r\n"),
        json.dumps(OBJECTS),
        json.dumps(OBJECTS, indent=2, ensure_ascii=False),
        "\n \n" + json.dumps(OBJECTS, separators=(",", ":")) + "\n\n",
        "\n".join(json.dumps(value, indent=1) for value in OBJECTS),
        "".join(json.dumps(value) for value in OBJECTS),
        json.dumps(TEXTS),
        lines(*TEXTS),
    ],
)
def test_json_is_read_by_what_it_holds(tmp_path: Path, content: str, bom: str, ending: str) -> None:
    path = tmp_path / f"Some.JSON{ending}"
    data = (bom + content).encode()
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[ending](data))
    assert texts(path) == TEXTS


@given(
    st.lists(
        st.one_of(
            st.text(max_size=12),
            st.fixed_dictionaries({"text": st.text('ab"\\{}[],\n é', max_size=12), "n": st.integers() | st.none()}),
        ),
        max_size=6,
    ),
    st.sampled_from([None, 1]),
    st.integers(1, 9),
)
def test_json_in_blocks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, block: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "blocks.json"
    meant = [value if isinstance(value, str) else value["text"] for value in values]
    for content in (json.dumps(values, indent=indent), "\n".join(json.dumps(v, indent=indent) for v in values)):
        path.write_text(content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents_module, "_BLOCK_BYTES", block)
            found = list(FileReader([path]).documents())
        assert [document.text() for document in found] == meant
        whole = content.splitlines()
        assert all(document.raw.decode().splitlines()[0] in whole[document.line - 1] for document in found)


def test_a_single_object_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"title": "x", "text": "all of it"}, indent=2))
    assert texts(path) == ["all of it"]


@pytest.mark.parametrize("content", ["", " \n", "[]", " [ \n ] "])
def test_json_without_documents(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    assert texts(path) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "a"}\n{"text": "b"}]', r"a\.json, line 2: this is not JSON \(',' or ']' was expected"),
        ('[{"text": "a"},\n', r"line 2: this is not JSON \(the file ends inside its array"),
        ('[{"text": "a"}\n', r"line 2: this is not JSON \(the file ends inside its array"),
        ("[", "the file ends inside its array"),
        ('[{"text": "a"},]', r"an element of the array was expected, not ']'"),
        ('[, "a"]', r"an element of the array was expected, not ','"),
        ('["a"]\n["b"]', "line 2: this is not JSON .the file goes on after its array"),
        ('["a"] x', "the file goes on after its array"),
        ('["a", 3]', "line 1: this is a JSON int; an object with the field 'text' or a string is expected"),
        ('["a",\n["b"]]', "line 2: this is a JSON list; an object"),
        ('["a",\n[[]', "line 2: this is not JSON"),
        ('{"text": "a"},\n{"text": "b"}', "line 1: this is not JSON"),
        ("12\n", "line 1: this is a JSON int"),
        ('{"text": "a"}\n{"text": "b\n', "line 2: this is not JSON"),
        ('{"data": [{"text": "a"}]}', r"the field 'text' is missing; the object's fields are: 'data'.*field=NAME"),
        ("}", "line 1: this is not JSON"),
        ("<html>", "line 1: this is not JSON"),
        ('["\\ud800"]', "the string has a lone surrogate"),
        ('["\\', "line 1: this is not JSON"),
    ],
)
def test_json_that_is_broken_is_named_by_file_and_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(errors.FormatError, match=words):
        texts(path)


def test_a_long_array_is_never_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": f"{i} " * 20} for i in range(500)]))

    class Counted(io.BytesIO):
        asked = 0

        def read(self, size: int | None = -1) -> bytes:
            assert size is not None and 0 < size <= 512
            self.asked += 1
            return super().read(size)

    file = Counted(path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "_BLOCK_BYTES", 256)
        assert sum(1 for _ in documents_module._json_values(file, path)) == 500
    assert file.asked > path.stat().st_size / 512


def test_json_lines_are_told_by_their_first_line_where_no_ending_does(tmp_path: Path) -> None:
    content = lines(*OBJECTS)
    for name in ("dump", "part-0001", "corpus.json.1", "a.log.gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
        assert texts(path) == TEXTS
        assert texts(path, field="other") == [content]  # then it is text


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.MD"])
def test_text_stays_text_and_a_likely_mistake_is_said(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(lines(*OBJECTS))
    reader = FileReader([path])
    assert [document.text() for document in reader.documents()] == [lines(*OBJECTS)]
    list(reader.documents())
    (note,) = reader.notes
    assert name in note and "read as text" in note and ".jsonl" in note
    path.write_text('{"this" is prose}\n')
    reader = FileReader([path])
    assert [document.text() for document in reader.documents()] == ['{"this" is prose}\n'] and reader.notes == ()


def test_a_list_in_json_lines_names_the_ending_for_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('["a", "b"]\n')
    with pytest.raises(errors.FormatError, match=r"line 1: this is a JSON list; .* array of them in .* ends in \.json"):
        texts(path)


def test_the_field_that_holds_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(lines({"body": "one", "text": "no"}, {"body": "two"}, {"body": 3}))
    reader = FileReader([path], field="body").documents()
    assert [next(reader).text(), next(reader).text()] == ["one", "two"]
    with pytest.raises(errors.FormatError, match="the field 'body' is of type int; a string is expected"):
        next(reader).text()
    refused(
        pgolf_("data", "prepare", path, "--out", tmp_path / "out", "--workers", 1),
        r"the field 'text' is missing; the object's fields are: 'body'\. Say .*: --field NAME\.",
    )
    path.write_text(lines(*({"body": prose(60, i), "text": 0} for i in range(20))))
    made = pgolf_("data", "prepare", path, "--out", tmp_path / "out", "--field", "body", "--vocab-size", 300)
    assert made.exit_code == 0, made.output
    with pytest.raises(ValueError, match="field is 'body'; the built-in corpus is text"):
        prepare([], tmp_path / "other", builtin=True, field="body")


# Other encodings


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.json.gz"])
@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-be", "UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("utf-32", "UTF-32"),
    ],
)
def test_other_encodings_are_named(tmp_path: Path, name: str, encoding: str, named: str) -> None:
    data = '{"text": "naïve"}\n'.encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(
        errors.FormatError, match=rf"{name}, line 1: .* UTF-8.*: the file is {named}\. .*iconv -f {named}"
    ):
        texts(path)


# Folders


def test_a_folder_stands_for_the_texts_below_it(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    for name, content in {
        "b.txt": "b",
        "a/z.md": "a/z",
        "a/k.jsonl": lines({"text": "k1"}, {"text": "k2"}),
        "c.JSON": json.dumps(["c1", "c2"]),
        "d.txt.gz": gzip.compress(b"d"),
        "e.ndjson.zst": zstandard.compress(b'{"text": "e"}'),
        "f.py": "no text",
        "g": "no ending",
        "picture.gz": "no ending before .gz",
        ".hidden.txt": "hidden",
        ".git/x.txt": "hidden",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (tmp_path / "last.txt").write_text("last")
    reader = FileReader([folder, tmp_path / "last.txt"])
    assert reader.names == ("a/k.jsonl", "a/z.md", "b.txt", "c.JSON", "d.txt.gz", "e.ndjson.zst", "last.txt")
    assert " ".join(document.text() for document in reader.documents()) == "k1 k2 a/z b c1 c2 d e last"


@pytest.mark.parametrize("where", ["", "out", "deep/out", ".."])
def test_the_output_may_lie_among_the_sources(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "place" / "books"
    folder.mkdir(parents=True)
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(prose(60, i))
    out = folder / where
    first = prepare(folder, out, vocab_size=300, workers=1).manifest
    second = prepare(folder, out, vocab_size=300, workers=1).manifest
    assert first == second and len(first.sources) == 30 and first.sources[0] == "00.txt"


def test_a_folder_without_texts_is_refused_with_the_endings(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x")
    refused(
        pgolf_("data", "prepare", tmp_path, "--out", tmp_path / "out"),
        r"the folder holds no text; files are expected that end in \.txt, \.md, \.jsonl, \.ndjson, \.json, alone or",
    )


# A single text


def split(text: str, path: Path, documents: int = 20, least: int = 2) -> list[str]:
    path.write_bytes(text.encode())
    reader = FileReader([path])
    assert reader.split_single_text(documents, least)
    found = list(reader.documents())
    assert "".join(document.text() for document in found) == text
    for document in found:
        assert text.encode().count(b"\n", 0, text.encode().index(document.raw)) == document.line - 1
    return [document.text() for document in found]


@pytest.mark.parametrize("blank", ["\n\n", "\r\n\r\n", "\n \t\n\n"])
def test_a_single_text_is_split_at_blank_lines(tmp_path: Path, blank: str) -> None:
    paragraphs = [f"{i}: {prose(30, i)}" for i in range(100)]
    found = split(blank.join(paragraphs), tmp_path / "a.txt")
    assert 18 <= len(found) <= 20 and all(text.endswith(blank) for text in found[:-1])
    few = split(blank.join(paragraphs[:3]), tmp_path / "a.txt")
    assert [text.strip() for text in few] == paragraphs[:3]


def test_a_single_text_without_blank_lines_is_split_at_lines(tmp_path: Path) -> None:
    poem = [prose(6, i) for i in range(40)]
    found = split("\n".join(poem), tmp_path / "a.txt")
    assert 18 <= len(found) <= 20 and all(text.endswith("\n") for text in found[:-1])
    assert len(split("one\n\ntwo\nthree\nfour", tmp_path / "a.txt", least=4)) == 4
    assert split("all in one line", tmp_path / "a.txt") == ["all in one line"]
    assert split("\n\nonly\n\n", tmp_path / "a.txt") == ["\n\nonly\n\n"]
    assert split("", tmp_path / "a.txt") == []
    assert len(split("x" * 200_000, tmp_path / "a.txt")) == 13  # as a long line always is


@given(st.lists(st.sampled_from(["word ", "é", "\n", "\n\n", " \n"]), max_size=60).map("".join), st.integers(2, 30))
def test_a_single_text_is_split_without_loss(
    tmp_path_factory: pytest.TempPathFactory, text: str, documents: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "single.txt"
    path.write_bytes(text.encode())
    reader = FileReader([path])
    assert reader.split_single_text(documents, 2)
    assert "".join(document.text() for document in reader.documents()) == text


def test_other_sources_are_not_split(tmp_path: Path) -> None:
    for name, content in (
        ("a.txt", "a\n\nb"),
        ("b.txt", "c\n\nd"),
        ("long.txt", "x y\n\n" * 100_000),
        ("a.json", '["a"]'),
    ):
        (tmp_path / name).write_text(content)
    for names in (["a.txt", "b.txt"], ["long.txt"], ["a.json"]):
        reader = FileReader([tmp_path / name for name in names])
        assert not reader.split_single_text(20, 2)
    assert texts(tmp_path / "a.txt", tmp_path / "b.txt") == ["a\n\nb", "c\n\nd"]


def test_a_book_becomes_a_data_folder(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(prose(40, i) for i in range(40)))
    arguments = ("data", "prepare", book, "--out", tmp_path / "out", "--vocab-size", 300, "--workers", 1)
    made = pgolf_(*arguments)
    assert made.exit_code == 0, made.output
    assert re.search(r"book\.txt is a single text\. It was split into \d+ documents at blank lines", made.stdout)
    value = last_json(pgolf_(*arguments, "--json"))
    assert value["manifest"]["val"]["documents"] == 1 and value["manifest"]["train"]["documents"] in (18, 19)
    assert len(value["notes"]) == 1
    assert last_json(pgolf_(*arguments, "--val-docs", 25, "--json"))["manifest"]["train"]["documents"] >= 1


def test_too_small_a_text_names_the_options_that_mend_it(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(prose(30, i) for i in range(6)))
    arguments = ("data", "prepare", book, "--out", tmp_path / "out", "--workers", 1)
    too_many = pgolf_(*arguments, "--vocab-size", 5000)
    refused(
        too_many,
        r"--vocab-size is 5,000; the text is enough for at most 1,597\. Give --vocab-size 1597, or more text\.",
    )
    found = re.search(r"Give --vocab-size (\d+)", too_many.stderr)
    assert found and pgolf_(*arguments, "--vocab-size", found[1]).exit_code == 0
    too_few = pgolf_(*arguments, "--vocab-size", 262)
    refused(too_few, r"--vocab-size is 262; the text's characters need at least \d+\. Give --vocab-size \d+\.")
    found = re.search(r"Give --vocab-size (\d+)", too_few.stderr)
    assert found and pgolf_(*arguments, "--vocab-size", found[1]).exit_code == 0
    refused(pgolf_(*arguments, "--val-docs", 6), r"6 documents; .* Give more text, or fewer .*: --val-docs 5\.")
    refused(pgolf_(*arguments, "--val-docs", 0), "--val-docs is 0; it must be at least 1")
