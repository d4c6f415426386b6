"""data/couplets/prepare.py: the halves of two files, of the archive's folder or of one .tsv, and halves that do not match."""

import gzip
import tarfile

from raw_sets import (
    TEST,
    TRAIN,
    record,
    records_in,
    write_couplets,
)


def test_couplets(prepare, tmp_path):
    write_couplets(tmp_path / "raw", TRAIN, TEST)
    said = prepare("couplets").ok()
    train = [record(*pair) for pair in (TRAIN[0], TRAIN[1], TRAIN[3])]
    test = [record(*TEST[0])]
    assert records_in(tmp_path / "out" / "couplet-0.json") == train
    assert records_in(tmp_path / "out" / "couplet-1.json") == test
    assert records_in(tmp_path / "out" / "couplet-all.json") == train + test
    assert f"1 dropped, 3 kept: halves of different length; first: {tmp_path}/raw/train/in.txt, line 3" in said
    prepare("couplets", "--dedupe", "--instruction", "对下联").ok()
    assert records_in(tmp_path / "out" / "couplet-0.json") == [record("对下联", second, first) for first, second in TRAIN[:2]]


def test_couplets_in_the_folder_that_the_archive_makes(prepare, tmp_path):
    write_couplets(tmp_path / "raw" / "couplet", TRAIN, TEST)
    prepare("couplets").ok()
    assert len(records_in(tmp_path / "out" / "couplet-all.json")) == 4


def test_couplets_of_a_tsv_file(prepare, tmp_path):
    (tmp_path / "raw").write_text("\ufeff晚风，树\t晨露，花\r\n一\t二三\n没有制表符\n", "utf-8", newline="")
    said = prepare("couplets").ok()
    assert records_in(tmp_path / "out" / "couplet-all.json") == [record("晚风，树", "晨露，花")]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["couplet-all.json"]
    assert "1 dropped, 1 kept: halves of different length" in said
    assert "1 dropped, 1 kept: not two halves with a tab between them" in said


def test_couplets_with_a_header_without_spaces_and_gzipped(prepare, tmp_path):
    for part, name, text in (
        ("train", "in.txt", "上联\n春风送暖\n江山如画\n2008 年 春\n"),
        ("train", "out.txt", "下联\n瑞雪兆丰\n岁月\n一 二 三 四 年 春\n"),
        ("test", "in.txt", "红 梅\n"),
        ("test", "out.txt", "绿 柳\n"),
    ):
        (tmp_path / "raw" / part).mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / part / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    said = prepare("couplets").ok()
    assert records_in(tmp_path / "out" / "couplet-all.json") == [
        record("春风送暖", "瑞雪兆丰"),
        record("2008年春", "一二三四年春"),
        record("红梅", "绿柳"),
    ]
    assert "1 dropped, 2 kept: a header, not a couplet" in said
    assert "1 dropped, 2 kept: halves of different length" in said


def test_couplets_whose_files_do_not_match(prepare, tmp_path):
    write_couplets(tmp_path / "raw", TRAIN, TEST)
    out = tmp_path / "raw" / "train" / "out.txt"
    out.write_text("晨 露\n", "utf-8")
    assert f"{out}: ends before line 2" in prepare("couplets").error
    out.unlink()
    assert f"{out}: no such file" in prepare("couplets").error
    half = out.with_name("in.txt")
    assert f"{half}: holds one half of each couplet; name the folder" in prepare("couplets", raw=half).error
    with tarfile.open(tmp_path / "couplet.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "raw", "couplet")
    assert "couplet.tar.gz: is an archive; unpack it" in prepare("couplets", raw=tmp_path / "couplet.tar.gz").error
    assert not (tmp_path / "out").exists()
