"""Who answers: base and template as the adapters record them, what contradicts that, and the names they go by."""

import json

import pytest
import tiny

from utils import lineage
from utils.adapters import switching
from utils.console import UserError
from utils.datasets.templates import TEMPLATES, Prompter
from utils.inference.answerers import ChatModel, common_base, labels, resolve, with_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaMA and two adapters on it."""
    folder = tmp_path_factory.mktemp("models")
    tiny.llama(folder / "llama")
    tiny.adapter(folder / "llama", folder / "a", 1)
    tiny.adapter(folder / "llama", folder / "b", 2, modules_to_save=["lm_head"])
    return folder


def test_base_and_template_come_from_what_the_adapter_records(folder, tmp_path, capsys):
    base, answerers = resolve("", [str(folder / "a"), str(folder / "b")], "")
    assert base == str(folder / "llama")
    assert answerers == [ChatModel(name, folder / name, "alpaca", None) for name in "ab"]
    assert capsys.readouterr().out.splitlines() == [
        f"base model: {folder}/llama, which the adapter was trained on",
        *(f"{folder}/{name}: records no template; alpaca is used, as in alpaca-lora" for name in "ab"),
    ]
    base_alone = [ChatModel("base", None, "chinese", None)]
    assert resolve(str(folder / "llama"), [], "chinese") == (base, base_alone) and with_base(base_alone) == base_alone
    with pytest.raises(UserError, match="--base_model"):
        resolve("", [], "")


def test_what_contradicts_an_adapters_lineage_is_an_error(folder, tmp_path):
    """Pitfall 7: base and template come from lineage.json, and another base or template is refused."""
    adapter = tiny.adapter(folder / "llama", tmp_path / "run", 1)
    other = tiny.llama(tmp_path / "other", seed=5)
    template = tmp_path / "mine.json"
    template.write_text((TEMPLATES / "chinese.json").read_text("utf-8"), "utf-8")
    known = {
        "kind": "finetune",
        "options": {"prompt_template_name": str(template), "output_dir": str(adapter)},
        "base": {"name": str(folder / "llama"), "fingerprint": lineage.fingerprint(str(folder / "llama"))},
        "template": {"name": "mine", "texts": Prompter(str(template)).texts},
    }
    lineage.write(adapter, known)
    base, (one,) = resolve("", [str(adapter)], "")
    assert (base, one) == (str(folder / "llama"), ChatModel("run", adapter, str(template), known))
    _, both = resolve("", [str(adapter), str(folder / "a")], "")
    assert with_base(both) == [ChatModel("base", None, str(template), None), *both]
    assert resolve("", [str(adapter)], "chinese")[1][0].template == "chinese"  # the same by another name
    with pytest.raises(UserError, match="another base"):
        resolve(str(other), [str(adapter)], "")
    with pytest.raises(UserError, match=r"--prompt_template alpaca: .*mine"):
        resolve("", [str(adapter)], "alpaca")
    texts = json.loads(template.read_text("utf-8"))
    for changes in (json.loads((TEMPLATES / "vigogne.json").read_text("utf-8")), texts | {"turn_no_input": "{instruction}"}):
        template.write_text(json.dumps(changes), "utf-8")
        with pytest.raises(UserError, match="has changed since training"):
            resolve("", [str(adapter)], "")
    copies = {"a": str(tmp_path / "gone"), "b": str(folder / "llama")}
    assert common_base(copies, [known["base"]] * 2) == copies["b"], "of copies the first that is there"
    tiny.adapter(other, tmp_path / "stranger", 1)
    with pytest.raises(UserError, match="several bases"):
        resolve("", [str(folder / "a"), str(tmp_path / "stranger")], "")


def test_a_larger_vocabulary_has_to_be_merged_first(folder, tmp_path):
    """Pitfall 5."""
    large = tiny.llama(tmp_path / "large", vocab_size=500)
    tiny.adapter(large, tmp_path / "wide", 1, modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(UserError, match=r"500 tokens.*merge_weights.py"):
        resolve(str(folder / "llama"), [str(tmp_path / "wide")], "")


def test_labels_are_short_and_distinct():
    assert labels(["out/f1", "out/f2/"]) == ["f1", "f2"]
    keys = {switching.key_of(name) for name in ("a.b", "a_b", "lora_A", "default")}  # as peft takes them beside each other
    assert len(keys) == 4 and not any("." in key or key in ("lora_A", "default") for key in keys)
    assert labels(["x/run", "y/run"]) == ["x/run", "y/run"]
    assert labels(["models/base"]) == ["models/base"]
    with pytest.raises(UserError, match="twice"):
        labels(["x", "x"])
