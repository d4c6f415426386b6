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

from data.couplets.prepare import tsv_pairs
from utils.datasets.items import UnreadableItem


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


def test_the_names_of_columns_in_the_first_line_are_no_couplet(tmp_path):
    names = "上联 下联 上句 下句 上聯 下聯 出句 对句 First Second IN OUT input output instruction output up down upper lower "
    names += "shanglian xialian question answer text1 text2 source target src tgt left right text label"
    for one, other in zip(names.split()[::2], names.split()[1::2], strict=True):
        (tmp_path / "a.tsv").write_text(f"{one}\t{other}\n春\t秋\n{one}\t{other}\n", "utf-8")
        header = UnreadableItem("a header, not a couplet", f"{one} {other}")
        couplets = [{"first": first, "second": second} for first, second in (("春", "秋"), (one, other))]
        assert [item for _, item in tsv_pairs(tmp_path / "a.tsv")] == [header, *couplets]


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
    out.with_name("out.txt.gz").write_bytes(gzip.compress("晨 露\n".encode()))
    assert f"{out}.gz: ends before line 2" in prepare("couplets").error
    out.write_text("晨 露\n月\n", "utf-8")  # is taken, since it is not gzipped
    assert f"{out}: ends before line 3" in prepare("couplets").error
    out.unlink()
    half = out.with_name("in.txt")
    assert f"{half}: holds one half of each couplet; name the folder" in prepare("couplets", raw=half).error
    with tarfile.open(tmp_path / "couplet.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "raw", "couplet")
    assert "couplet.tar.gz: is an archive; unpack it" in prepare("couplets", raw=tmp_path / "couplet.tar.gz").error
    assert not (tmp_path / "out").exists()
