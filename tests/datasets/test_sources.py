"""utils/datasets/sources.py: where a --data_path leads, on this disk or on the hub."""

import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from record_files import RECORDS, ROOT, as_lines

from utils.console import UserError
from utils.datasets.record_writer import write_records
from utils.datasets.records import read_records
from utils.datasets.sources import data_files, sources


def write(path, count, name="r"):
    records = [{"instruction": f"{name}{number}", "input": "", "output": "x"} for number in range(count)]
    write_records(path, records)
    return records


def test_file_names_with_commas_and_colons(tmp_path):
    path = tmp_path / "a,b:0.5.json"
    write(path, 2)
    assert data_files(str(path)) == [path]
    colon = tmp_path / "c:2"
    write(colon, 1)
    assert [(source.files, source.weight) for source in sources(f"{colon},{colon}:3")] == [([colon], 1), ([colon], 3)]


@pytest.mark.parametrize(
    ("data_path", "message"),
    [
        ("", "names no file"),
        ("{good},", "names no file"),
        ("{good}:0", "0 is not a weight"),
        ("{good}:-1", "-1 is not a weight"),
        ("{good}:nan", "nan is not a weight"),
        ("{good}:1e9", "1e9 is not a weight"),
        ("{good}:half", "half is not a weight"),
        ("{folder}", "is a folder; name files in it (good.json)"),
        ("{folder}/god.json", "no such file; did you mean {folder}/good.json?"),
        ("{folder}/sub/good.json", "no such file; check the path"),
        ("{folder}/link.json", "is a broken link"),
        ("{folder}/pipe", "is not a regular file"),
        ("data/nowhere.json", "data/nowhere.json: no such file"),
        ("datasets/firefly", "not available from the hub"),
        ("./owner/name", "no such file"),
        ("just_a_name", "no such file"),
        ("x" * 5000, "no such file"),
        ("bad\0name", "no such file"),
    ],
)
def test_data_path_that_leads_nowhere(tmp_path, monkeypatch, data_path, message):
    folder = tmp_path / "folder"
    good = folder / "good.json"
    write(good, 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "link" in data_path:
        (folder / "link.json").symlink_to("gone.json")
    if "pipe" in data_path:
        os.mkfifo(folder / "pipe")
    with pytest.raises(UserError) as error:
        for file in data_files(data_path.format(good=good, folder=folder)):
            list(read_records(file))
    assert message.format(folder=folder) in str(error.value)


def test_name_under_an_existing_folder_is_a_path_and_no_hub_name(tmp_path, monkeypatch):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "firefly_train").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file; did you mean datasets/firefly_train\?"):
        data_files("datasets/firefly_trian")


def test_folder_of_the_hub_reads_each_split_once(tmp_path, capsys):
    folder = tmp_path / "datasets--owner--name" / "snapshots" / "abc"
    for name in ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, 2, name)
    write(folder / "data/train-00000-of-00002.jsonl.gz", 2)
    for name in (
        "data/train.csv",
        "lineage.json",
        ".cache/train.json",
        "checkpoint-5/train.json",
        "dataset_infos.json",
        "trainer_state.json",
        *("state.json", "config.json", "generation_config.json", "package.json", "tokenizer.json", "tokenizer_config.json"),
        *("all_results.json", "model.index.json", "training_args.json", "special_tokens_map.json", "added_tokens.json"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("instruction,input,output\na,,b\n")
    (tmp_path / "datasets--owner--name" / "refs").mkdir()
    (tmp_path / "datasets--owner--name" / "refs" / "main").write_text("abc")
    for path in (folder, tmp_path / "datasets--owner--name"):
        assert [file.name for file in data_files(str(path))] == [f"train-0000{n}-of-00002.jsonl" for n in (0, 1)]
        said = capsys.readouterr().out
        assert "left out as copies in another format: data/train-00000-of-00002.jsonl.gz, data/train.csv" in said
        assert "reading 2 of its 5 files" in said
    for name in ("news.jsonl", "2/news.jsonl"):  # no split is in their names: those beside a test set
        (tmp_path / "plain" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "plain" / name, 1)
    write(tmp_path / "plain" / "test.jsonl", 1)
    assert data_files(str(tmp_path / "plain")) == [tmp_path / "plain" / name for name in ("2/news.jsonl", "news.jsonl")]
    for place, name in enumerate(("part", "shard", "chunk", "of", "data", "file", "split", "default")):  # which only number
        (tmp_path / "numbered" / name).mkdir(parents=True)
        write(tmp_path / "numbered" / name / f"{'train' if place % 2 else 'training'}-{name}-0.jsonl", 1)
    capsys.readouterr()
    assert len(data_files(str(tmp_path / "numbered"))) == 8 and "split/training-split-0.jsonl\n" in capsys.readouterr().out
    (tmp_path / "words").mkdir()
    for name in ("test", "eval", "evaluation", "valid", "validation", "val", "dev", "news"):
        write(tmp_path / "words" / f"{name}.jsonl", 1)
    assert data_files(str(tmp_path / "words")) == [tmp_path / "words" / "news.jsonl"]
    for name in ("eval/train.jsonl", "train/dev.jsonl"):  # a file's own name says more than its folder's
        (tmp_path / "named" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "named" / name, 1)
    assert data_files(str(tmp_path / "named")) == [tmp_path / "named/eval/train.jsonl"]
    (folder / "other").mkdir()
    write(folder / "other" / "train.json", 1)
    with pytest.raises(UserError, match=r"holds several training sets \(data, other\); name the folder"):
        data_files(f"{folder}/")


def test_folder_of_save_to_disk(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(RECORDS)
    table.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"of an earlier map")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "both")
    for name in ("one", "both", "both/train"):
        assert [record for file in data_files(str(tmp_path / name)) for record in read_records(file)] == RECORDS
    shard = next((tmp_path / "one").glob("data-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(UserError, match=r"cut off or damaged \(Arrow: "):
        list(read_records(shard))
    shard.unlink()
    with pytest.raises(UserError, match="written by save_to_disk, but lacks data-"):
        data_files(str(tmp_path / "one") + "/")


SHA = "1" * 40
HUB = {
    "README.md": b"---\nlicense: mit\n---\n",
    "dataset_infos.json": b"{}",
    "data/train-0.jsonl": as_lines(RECORDS[:2]).encode(),
    "data/train-1.json.gz": gzip.compress(json.dumps(RECORDS[2:]).encode()),
    "data/test.jsonl": as_lines([{"instruction": "held", "output": "back"}]).encode(),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as fetching a data set needs."""

    def do_GET(self, body=True):
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/owner/name"):
            siblings = [{"rfilename": name} for name in HUB]
            tree = [{"type": "file", "path": name, "size": len(data), "oid": SHA} for name, data in HUB.items()]
            found = tree if "/tree/" in path else {"id": "owner/name", "sha": SHA, "siblings": siblings}
            self.answer(200, json.dumps(found).encode(), body)
        elif path.startswith("/datasets/owner/name/resolve/"):
            self.answer(200, HUB[path.split("/", 6)[6]], body)
        else:
            self.answer(404, b'{"error": "Repository not found"}', body)

    def do_HEAD(self):
        self.do_GET(body=False)

    def answer(self, status, data, body):
        self.send_response(status)
        for name, value in {"Content-Length": len(data), "ETag": f'"{hash(data) & 0xFFFF}"', "X-Repo-Commit": SHA}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_hub_name_is_fetched_and_then_found_without_network(tmp_path):
    program = (
        "import json, sys\nfrom utils.datasets.records import read_records\nfrom utils.datasets.sources import data_files\n"
        "from utils.console import UserError\n"
        "try: files = data_files(sys.argv[1]); "
        "print(json.dumps([[r for file in files for r in read_records(file)], list(map(str, files))]))\n"
        "except UserError as error: print(json.dumps(str(error)))"
    )

    def load(name, offline="0"):
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": offline,
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-c", program, name], env=environment, capture_output=True, text=True, cwd=tmp_path, check=True
        )
        *said, last = done.stdout.splitlines()
        return "\n".join(said), json.loads(last)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said, (records, files) = load("owner/name")
        assert records == RECORDS
        assert "taken for a dataset on the Hugging Face hub" in said
        assert "reading 2 of its 3 files: data/train-0.jsonl, data/train-1.json.gz" in said
        assert [Path(file).name for file in files] == ["train-0.jsonl", "train-1.json.gz"]
        _, error = load("owner/other")
        assert error.startswith("owner/other: no such file, and not available from the hub (")
        server.shutdown()
    assert load("owner/name", offline="1")[1] == [records, files]
    _, error = load("owner/other", offline="1")
    assert error.startswith("owner/other: no such file, and not available from the hub (")
