"""Small files that unpack to an endless line: refused in a line, by readers that hold little memory."""

import gzip
import resource
import tempfile
import zipfile

import pytest

from utils.console import UserError
from utils.datasets import file_formats
from utils.datasets.documents import read_documents
from utils.datasets.evaluation_sets import MOST_FILES, unpacked
from utils.datasets.file_formats import read_items

BLOCK = 1 << 24
BOMBS = {  # what comes first, and what is then repeated for 64 MB
    "words.jsonl": (b'{"instruction": "', b"a"),
    "blank.jsonl": (b"{", b" "),
    "zeros.jsonl": (b'{"', b"\0"),
    "bytes.jsonl": (b'{"', b"\xff\xfe"),
    "text.json": (b'[{"instruction": "', b"a"),
    "list.json": (b'[{"instruction": "a", "history": [', b"[],"),
    "texts.json": (b'[{"instruction": "a", "history": [', b'["' + b"a" * 999 + b'"],'),
    "lists.json": (b"[", b"["),
    "cell.csv": (b"instruction,input,output\n", b"a"),
    "quoted.csv": (b'instruction,input,output\n"', b"a" * 999 + b"\n"),
    "cells.tsv": (b"instruction\tinput\toutput\n", b"a\t"),
    "text.txt": (b"", "\u6c49".encode()),
}


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    """The files, of 64 KB each."""
    folder = tmp_path_factory.mktemp("bombs")
    for name, (first, more) in BOMBS.items():
        member = gzip.compress(more * (BLOCK // len(more)), 9)
        (folder / f"{name}.gz").write_bytes(gzip.compress(first) + member * 4)
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=(pytest.mark.slow, pytest.mark.long) if name == "list.json" else ()) for name in BOMBS]
)
def test_a_file_that_unpacks_to_one_endless_line(bombs, name):
    most = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, most[1]))
    try:
        with pytest.raises(UserError) as refused:
            for _ in (read_documents if name.endswith("txt") else read_items)(bombs / f"{name}.gz"):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_AS, most)
    assert name in str(refused.value)


def test_gzipped_parquet_that_unpacks_to_more_than_a_disk_should_give(tmp_path, monkeypatch):
    monkeypatch.setattr(file_formats, "LARGEST", 1 << 22)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1" + bytes(1 << 23)))
    with pytest.raises(UserError, match=r"a\.parquet\.gz: unpacks to more than 0 GB; unpack it yourself"):
        list(read_items(tmp_path / "a.parquet.gz"))


def test_an_archive_that_holds_more_than_it_declares(tmp_path, monkeypatch):
    """No more is written than declared; and of empty files not any number."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(tmp_path / "out"))
    size, told = 1 << 25, 1000
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dev.csv", bytes(size))
    packed = (tmp_path / "a.zip").read_bytes()
    assert packed.count(size.to_bytes(4, "little")) == 2  # before the member, and in the directory
    (tmp_path / "lies.zip").write_bytes(packed.replace(size.to_bytes(4, "little"), told.to_bytes(4, "little")))
    with pytest.raises(UserError, match=r"lies\.zip: cannot be unpacked \(Bad CRC-32"):
        unpacked(tmp_path / "lies.zip")
    assert (tmp_path / "out" / "lies.zip" / "dev.csv").stat().st_size <= told
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for number in range(MOST_FILES + 1):
            archive.writestr(f"{number}.csv", "")
    with pytest.raises(UserError, match=r"many\.zip: would unpack to 0 GB in 10,001 files"):
        unpacked(tmp_path / "many.zip")
