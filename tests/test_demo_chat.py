"""The demo on a real chat template, at toy scale, and the second family, whose terms come first."""

import json
import os
import re
import subprocess
import tarfile

import chat_templates
import families
import pytest
import tiny
from scripting import ROOT
from transformers import AutoTokenizer


def bash(script, *argv, folder, given="", **env):
    """Run a shell script to its end; it reads `given`."""
    paths = {"MODEL_DIR": str(folder / "models"), "OUTPUT_DIR": str(folder / "output")}
    command = ["bash", str(ROOT / "scripts" / f"{script}.sh"), *argv]
    return subprocess.run(command, input=given, env=os.environ | paths | env, text=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.long
def test_a_model_trained_with_its_own_template_answers_transformers_alone_with_the_same_texts(tmp_path):
    """Both steps, the merge and the comparison, on a tiny model with ChatML."""
    base = tmp_path / "models" / "smollm2-135m"
    tiny.llama(base, vocab_size=700)
    chat_templates.tokenizer(base, "default system")
    for number in ("1", "2"):
        ended = bash(f"demo-chat-{number}", folder=tmp_path, TRAIN_OPTIONS="--max_steps 3")
        assert ended.returncode == 0, ended.stderr
    assert "asked by transformers alone: 20 of 20 texts are those of" in ended.stdout
    merged = tmp_path / "models" / "demo-chat-smollm2-135m"
    assert (merged / "chat_template.jinja").read_text("utf-8") == chat_templates.DEFAULT_SYSTEM
    ends = json.loads((merged / "generation_config.json").read_text("utf-8"))["eos_token_id"]
    assert AutoTokenizer.from_pretrained(merged).convert_ids_to_tokens(ends)[-1] == "<|im_end|>"
    answers = tmp_path / "output" / "demo-chat-2" / "test.json"
    changed = json.loads(answers.read_text("utf-8"))
    changed[3]["output"] += "x"
    answers.write_text(json.dumps(changed, ensure_ascii=False), "utf-8")
    ended = bash("demo-chat-2", folder=tmp_path, SKIP_DONE="1")
    assert ended.returncode == 1 and "19 of 20 texts" in ended.stdout, ended.stderr


REFUSED = [
    ((), "", "the terms were not accepted; nothing was downloaded"),
    ((), "no\n", "the terms were not accepted; nothing was downloaded"),
    (("--hub", "gemma"), "yes\n", "--hub gemma: unknown; give --hub OWNER/NAME"),
    (("--mirror", "x/y"), "yes\n", "--mirror x/y: unknown"),
    (("--url", "file:///nowhere/x.tar"), "yes\n", "file:///nowhere/x.tar: <urlopen error"),
    (("--hub", "owner/name"), "yes\n", "owner/name: "),
]


@pytest.mark.parametrize(("argv", "given", "cause"), REFUSED)
def test_gemma_is_not_fetched_without_a_yes_or_from_nowhere(tmp_path, argv, given, cause):
    ended = bash("get-gemma3-270m", *argv, folder=tmp_path, given=given, HF_HUB_OFFLINE="1")
    errors = [line for line in ended.stderr.splitlines() if ": error: " in line]
    assert ended.returncode == 2 and len(errors) == 1 and cause in errors[0], ended.stderr
    assert not list(tmp_path.rglob("config.json")) and not list(tmp_path.rglob("*.part"))
    assert ("ai.google.dev/gemma/terms" in ended.stdout) == ("unknown" not in cause)


@pytest.mark.parametrize("kind", ["gemma3_text", "llama"])
def test_gemma_comes_from_an_archive_and_nothing_else_does(tmp_path, kind):
    folder = families.make(kind, tmp_path / "gemma-3-270m")
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
        archive.add(folder, "gemma-3-270m")
    ended = bash("get-gemma3-270m", "--url", f"file://{tmp_path}/model.tar.gz", folder=tmp_path, given="yes\n")
    made = tmp_path / "models" / "gemma3-270m"
    if kind == "llama":
        assert ended.returncode == 2 and "is not that of a Gemma 3" in ended.stderr and not made.exists()
        return
    assert ended.returncode == 0 and (made / "model.safetensors").is_file(), ended.stderr
    assert re.search("done already: .*gemma3-270m", bash("get-gemma3-270m", folder=tmp_path).stdout)
