"""Templates: their exact strings, their checks, dialogue; and the exact labels that encoding gives."""

import json

import datasets
import pytest
import tiny
from scripting import ROOT

from utils.console import UserError
from utils.datasets.dataset import EncodedDataset
from utils.datasets.encoders import Encoder, PairEncoder
from utils.datasets.encoding import IGNORED, encode, encode_last_answers, encode_prompt, opening_ids
from utils.datasets.templates import Prompter

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
EXACT = {
    "alpaca": f"{ALPACA}\n\n### Instruction:\nQ\n\n### Response:\n",
    "alpaca_legacy": f"{ALPACA}\n\n### Instruction:\nQ\n\n### Response:",
    "alpaca_short": "### Instruction:\nQ\n\n### Response:\n",
    "vigogne": "Ci-dessous se trouve une instruction qui décrit une tâche. Écrivez une réponse qui complète correctement la "
    "demande.\n\n### Instruction:\nQ\n\n### Réponse:\n",
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("words"))


@pytest.mark.parametrize("name", EXACT)
def test_the_published_strings(name):
    assert Prompter(name).generate_prompt("Q") == EXACT[name]
    assert Prompter(name).generate_prompt("Q", label="A") == EXACT[name] + "A"


def test_with_an_input():
    prompt = f"{WITH_INPUT}\n\n### Instruction:\nQ\n\n### Input:\nI\n\n### Response:\n"
    assert Prompter().generate_prompt("Q", "I") == prompt
    assert Prompter().generate_prompt("Q", "") == EXACT["alpaca"]


def test_a_chinese_template_is_there():
    assert "指令" in Prompter("chinese").generate_prompt("问")


def test_braces_in_a_record_stay_as_they_are():
    assert "{input} {instruction.__class__} {{}}" in Prompter().generate_prompt("{input} {instruction.__class__} {{}}", "X")


def test_later_turns_repeat_the_blocks_without_the_preamble():
    turns = Prompter().turns({"instruction": "Q2", "input": "I", "output": "A2", "history": [["Q1", "A1"]]})
    assert [turn.prompt for turn in turns] == [
        EXACT["alpaca"].replace("Q", "Q1"),
        "\n\n### Instruction:\nQ2\n\n### Input:\nI\n\n### Response:\n",
    ]
    assert [turn.answer for turn in turns] == ["A1", "A2"]


def test_a_system_text_takes_the_place_of_the_preamble():
    turn = Prompter().turns({"instruction": "Q", "output": "", "system": "Be brief."})[0]
    assert turn.prompt == "Be brief.\n\n### Instruction:\nQ\n\n### Response:\n"
    turns = Prompter().turns({"instruction": "Q2", "output": "", "system": "Be brief.", "history": [["Q", "A"]]})
    assert [one.prompt for one in turns] == [turn.prompt, "\n\n### Instruction:\nQ2\n\n### Response:\n"]


def test_a_model_that_does_not_stop_is_stopped_at_the_next_question():
    """Row 8."""
    assert Prompter().stop_strings == ["### Instruction:"] and Prompter("chinese").stop_strings == ["### 指令："]


def template(tmp_path, **changes):
    texts = json.loads((ROOT / "templates/alpaca.json").read_text()) | changes
    path = tmp_path / "own.json"
    path.write_text(json.dumps({key: text for key, text in texts.items() if text is not None}))
    return str(path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prompt_input": None}, ["prompt_input", "missing"]),
        ({"response_split": None}, ["response_split", "missing"]),
        ({"prompt_inptu": "x"}, ["prompt_inptu", "unknown"]),
        ({"prompt_no_input": "{instruction} {question} ### Response:"}, ["prompt_no_input", "{question}"]),
        ({"prompt_no_input": "{instruction.__class__} ### Response:"}, ["prompt_no_input", "{instruction.__class__}"]),
        ({"prompt_no_input": "{instruction!r} ### Response:"}, ["prompt_no_input", "instruction"]),
        ({"prompt_no_input": "{ {instruction} ### Response:"}, ["prompt_no_input"]),
        ({"prompt_input": "{instruction} ### Response:"}, ["prompt_input", "{input}"]),
        ({"prompt_no_input": "### Response:"}, ["prompt_no_input"]),
        ({"response_split": "### Answer:"}, ["response_split", "### Answer:"]),
        ({"description": 5}, ["texts"]),
    ],
)
def test_a_bad_template_is_named_with_file_and_key(tmp_path, changes, words):
    path = template(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        Prompter(path)
    assert "own.json" in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_an_own_template_with_braces_and_turns(tmp_path):
    path = template(tmp_path, prompt_no_input="{{json}} {instruction} ### Response:", turn_no_input="|{instruction}|")
    prompter = Prompter(path)
    assert prompter.generate_prompt("Q") == "{json} Q ### Response:" and prompter.name == "own"
    assert prompter.turns({"instruction": "b", "history": [["a", "A"]]})[1].prompt == "|b|"


@pytest.mark.parametrize("name", ["alpacca", "../templates/alpaca", "/etc/passwd", "no.json"])
def test_an_unknown_template_lists_the_known_ones(name):
    with pytest.raises(UserError, match="alpaca_short"):
        Prompter(name)


# Encoding

DIALOGUE = {"instruction": "再见", "input": "", "output": "再见！", "history": [["你好</s>", "你好，{input}"], ["谁", "我"]]}


def supervised(encoded, tokenizer) -> str:
    return tokenizer.decode([label for label in encoded.labels if label != IGNORED])


def test_the_loss_is_on_all_answers_and_their_ends_and_on_nothing_else(words):
    encoded = encode([DIALOGUE], Prompter("alpaca_short"), words, 1000, train_on_inputs=False)[0]
    assert supervised(encoded, words) == "你好，{input}</s>我</s>再见！</s>"
    whole = encode([DIALOGUE], Prompter("alpaca_short"), words, 1000, train_on_inputs=True)[0]
    assert whole.labels == whole.input_ids == encoded.input_ids
    (count,) = Encoder(Prompter("alpaca_short"), words, "", 1000, True)([DIALOGUE])["supervised"].to_pylist()
    assert count == len(whole.labels) - 1, "nothing predicts the first"
    assert [
        token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label not in (IGNORED, token)
    ] == []


def test_what_looks_like_a_control_token_in_a_record_stays_text(words):
    ids = encode([DIALOGUE], Prompter("alpaca_short"), words, 1000, train_on_inputs=False)[0].input_ids
    assert ids.count(words.eos_token_id) == 3 and ids.count(words.bos_token_id) == 1 and ids[0] == words.bos_token_id
    assert "你好</s>" in words.decode(ids)


def test_a_question_is_encoded_for_answering_as_it_was_for_training(words):
    prompter = Prompter("alpaca")
    whole = encode([DIALOGUE], prompter, words, 1000, train_on_inputs=False)[0].input_ids
    asked = encode_prompt(DIALOGUE, prompter, words)
    answer = words("再见！", add_special_tokens=False)["input_ids"] + [words.eos_token_id]
    assert whole == asked + answer


def test_a_token_that_straddles_the_boundary_is_supervised(words):
    """The legacy template ends with a colon; a byte-level BPE may join it to the answer's first character."""
    from tokenizers import AddedToken

    words.add_tokens([AddedToken(":A", normalized=False, special=False)])
    record = {"instruction": "Q", "input": "", "output": "A"}
    encoded = encode([record], Prompter("alpaca_legacy"), words, 1000, train_on_inputs=False)[0]
    last = encode_last_answers([record | {"history": [["P", "B"]]}], Prompter("alpaca_legacy"), words, 1000)[0]
    for one in (encoded, last):
        assert [words.convert_ids_to_tokens(label) for label in one.labels if label != IGNORED] == [":A", "</s>"]
        assert one.answer_tokens == 2


def test_a_pair_is_as_long_as_its_longer_answer_and_is_cut_away_with_the_shorter(words):
    texts = [("好", "坏" * 9), ("好" * 9, "坏")]
    pairs = [tuple({"instruction": "Q", "input": "", "output": text} for text in pair) for pair in texts]
    encoder = PairEncoder(Prompter("alpaca_short"), words, "", 1000, False)
    for row in encoder(pairs).to_pylist():
        lengths = len(row["input_ids"]), len(row["rejected_ids"])
        learned = [sum(label != IGNORED for label in row[name]) for name in ("labels", "rejected_labels")]
        assert row["full_length"] == max(lengths) > min(lengths) and row["answer_tokens"] == min(learned) < max(learned)
    rows = EncodedDataset(datasets.Dataset(encoder(pairs)), [0, 1], 20)
    assert rows.lengths == [2 * min(length, 20) for length in rows.full_lengths], "both sequences are computed"


def test_what_is_cut_has_no_end_to_learn(words):
    """Rows 8 and 19."""
    record = {"instruction": "Q", "input": "", "output": "答" * 50}
    full = encode([record], Prompter("alpaca_short"), words, 1000, train_on_inputs=False)[0]
    assert full.input_ids[-1] == full.labels[-1] == words.eos_token_id and full.full_length == len(full.input_ids)
    cut = encode([record], Prompter("alpaca_short"), words, full.full_length - 1, train_on_inputs=False)[0]
    assert cut.input_ids == full.input_ids[:-1] and cut.full_length == full.full_length and words.eos_token_id not in cut.labels
    gone = encode([record], Prompter("alpaca_short"), words, 10, train_on_inputs=False)[0]
    assert gone.answer_tokens == 0 and set(gone.labels) == {IGNORED}


def test_the_opening_is_the_tokenizers_own(words):
    assert opening_ids(words) == [words.bos_token_id]
