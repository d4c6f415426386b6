"""--replay: records of earlier steps are learned again, those that the lineage names and that are still as they were."""

import json

import numpy as np
from trainings import options, same, tensors

from utils import lineage
from utils.datasets.dataset import encode_file
from utils.datasets.encoders import Encoder
from utils.datasets.templates import Prompter
from utils.files import sha256
from utils.models.tokenizer import load_tokenizer
from utils.training.replay import parents_files, with_replay


def write(folder, name, answer, count=12):
    path = folder / name
    records = [{"instruction": f"第{n}题", "input": "", "output": answer * (1 + n % 5)} for n in range(count)]
    path.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    return path


def test_what_is_drawn_are_records_of_the_earlier_files(tiny_llama, tmp_path):
    encoder = Encoder(Prompter("alpaca_short"), load_tokenizer(tiny_llama), "", 100, True)
    own, *earlier = (write(tmp_path, f"{answer}.json", answer) for answer in "丙甲乙")
    table, files = encode_file(encoder, own, "own", keep=True), {str(file): file.stem for file in earlier}

    def drawn(share, seed):
        found, numbers, facts = with_replay(table, np.arange(2, 12), share, encoder, files, seed)
        assert len(found) == 36 and numbers[:10].tolist() == [*range(2, 12)]
        assert facts == {"files": files, "records": len(numbers) - 10}
        return numbers[10:].tolist()

    assert drawn(9, 1) == [*range(12, 36)] and drawn(0.5, 1) == drawn(0.5, 1) != drawn(0.5, 2)
    assert [len(drawn(share, 1)) for share in (0.001, 0.5, 0.77, 1.1)] == [1, 5, 8, 11]


def test_the_files_of_all_earlier_steps_of_a_stage_are_found_nearest_first():
    def parent(stage, files, **earlier):
        return {"name": "", "sha256": "", "lineage": {"options": {}, "data": {"files": files} | stage, **earlier}}

    oldest = parent({}, {"a": "1", "b": "2"})  # written before stages were
    preferred = parent({"stage": "preference"}, {"c": "3"}, parent=oldest)
    both = parent({"stage": "instruction"}, {"d": "4", "a": "5"}, parents=[preferred, oldest, {"name": "", "lineage": None}])
    found = [(str(file), content) for file, content in parents_files(both, "instruction")]
    assert found == [("d", "4"), ("a", "5"), ("a", "1"), ("b", "2")] and list(parents_files(None, "text")) == []
    assert [str(file) for file, _ in parents_files(both, "preference")] == ["c", "a", "b"]


def test_a_share_of_all_earlier_steps_is_learned_again(script, bases, tmp_path):
    one, two, three = (write(tmp_path, f"{answer}.json", answer) for answer in "甲乙丙")
    small = {"batch_size": 4, "num_epochs": 1}

    def train(data, name, **more):
        return script("finetune.py", *options(bases["llama"], data, tmp_path / name, **small | more))

    train(one, "f1").ok()
    train(two, "f2", resume_from_checkpoint=tmp_path / "f1").ok()
    more = {"resume_from_checkpoint": tmp_path / "f2", "replay": 0.5}
    out = train(three, "f3", **more).ok()
    data = lineage.read(tmp_path / "f3")["data"]
    [manifest] = (tmp_path / "f3").glob("checkpoint-*/checkpoint.json")
    known = json.loads(manifest.read_text("utf-8"))["run"]["data"]
    assert known == {str(file): sha256(file) for file in (one, two, three)}
    assert data["train"] == 12 + 6 and data["replay"]["records"] == 6 and data["records"] == 12
    assert set(data["replay"]["files"]) == {str(one), str(two)} and "6 of 24 records" in out
    train(three, "again", **more).ok()
    assert same(tensors(tmp_path / "f3"), tensors(tmp_path / "again"))
    write(tmp_path, "甲.json", "变")
    out = train(three, "part", **more).ok()
    assert f"--replay 0.5: 6 of 12 records of {two} are learned again" in out
    two.unlink()
    ended = train(three, "none", **more)
    said = [line for line in ended.out.splitlines() if line.startswith("--replay: ")]
    reasons = [f"{two} no longer exists", f"{one} has changed since it was learned"]
    assert said == [f"--replay: {reason}; its records are not replayed" for reason in reasons]
    error = ended.error
    assert "no data file of an earlier step" in error and not (tmp_path / "none").exists()
    assert "give --resume_from_checkpoint" in train(three, "warm", replay=0.5).error
