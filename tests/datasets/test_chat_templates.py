"""Chat templates of seven published kinds: prompts as transformers', what is learned, where answers end."""

import itertools

import chat_templates
import datasets
import numpy as np
import pytest
import tiny
from sentencepieces import llama
from transformers import AutoTokenizer

from utils.console import UserError
from utils.datasets.chat_templates import ChatPrompter
from utils.datasets.dataset import usable
from utils.datasets.encoders import Encoder, JudgedEncoder, PairEncoder, QuestionEncoder
from utils.datasets.encoding import IGNORED, encode, encode_prompt
from utils.datasets.jinja_export import SAMPLES, messages_of, proven, write_chat_template
from utils.datasets.preferences import Judged
from utils.datasets.prompters import make_prompter
from utils.datasets.prompts import answered
from utils.datasets.templates import TEMPLATES, Prompter, split_thinking
from utils.evaluation.answers import side_by_side
from utils.files import read_json, write_json
from utils.models.tokenizer import load_tokenizer, read_tokenizer, save_tokenizer

KINDS = list(chat_templates.KINDS)
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.json"))
RECORDS = [
    {"instruction": "你是谁？", "output": "我是梦想家。"},
    {"instruction": "Translate", "input": "fox", "output": "狐狸 🦊", "system": "Be brief."},
    {"instruction": "And?", "output": "x\n\ny", "history": [["a ", "b"], ["c\n", " d"]]},
    {
        "instruction": "2+2",
        "output": "<think>\ntwo and two\n</think>\n\n4",
        "history": [["1+1", "<think>\none\n</think>\n\n2"]],
    },
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    words = chat_templates.tokenizer(folder, request.param)
    return request.param, words, ChatPrompter(words, [words.eos_token_id]), folder


def learned(words, encoded) -> list[str]:
    """The answers that the labels of a sequence hold, each with its end."""
    runs, last = [], False
    for label in encoded.labels:
        if label != IGNORED:
            runs = [*runs[:-1], [*runs[-1], label]] if last else [*runs, [label]]
        last = label != IGNORED
    return [words.decode(run) for run in runs]


@pytest.mark.parametrize("record", RECORDS, ids=["one", "system", "turns", "thoughts"])
def test_each_answer_is_learned_once_after_the_prompt_that_transformers_makes(kind, record):
    name, words, prompter, folder = kind
    sequences = encode([record], prompter, words, 1000, train_on_inputs=False)
    end = chat_templates.KINDS[name][2] or "</s>"
    answers = [answer for _, answer in [*record.get("history", []), (None, record["output"])]]
    texts = [text for one in sequences for text in learned(words, one)]
    assert len(texts) == len(answers)
    for text, answer in zip(texts, answers, strict=True):
        thought, said = split_thinking(answer)
        assert text.endswith(end) and text.count(end) == 1 and text.removesuffix(end).strip().endswith(said.strip())
        assert split_thinking(text)[0] == thought and ("think>" in text) == bool(thought)
    plain = AutoTokenizer.from_pretrained(folder)
    messages = prompter.messages(record | {"output": ""})
    if "system" in record:  # and an input
        system, asked = {"role": "system", "content": "Be brief."}, "Translate\nfox"
        alone = [{"role": "user", "content": f"Be brief.\n\n{asked}"}]
        assert messages == (alone if name == "gemma" else [system, {"role": "user", "content": asked}])
    asked = plain.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(record, prompter, words) == asked == sequences[-1].input_ids[: len(asked)]
    assert set(sequences[-1].labels[: sequences[-1].full_length - len(words.tokenize(texts[-1]))]) <= {IGNORED, *asked}


def test_a_dialogue_is_one_sequence_unless_the_template_rewrites_its_history(kind):
    name, words, prompter, _ = kind
    counts = [len(encode([record], prompter, words, 1000, False)) for record in RECORDS]
    rewriting = {"qwen3": [1, 1, 1, 2], "glm": [1, 1, 3, 2], "r1": [1, 1, 3, 2]}
    assert counts == rewriting.get(name, [1, 1, 1, 1])


def test_every_answer_of_a_template_ends_in_the_engine_where_it_was_learned_to_end(kind):
    from utils.inference.engine import Ending

    _, words, prompter, _ = kind
    ending = Ending(words, [*prompter.stop_strings], prompter.ends)
    for record in RECORDS:
        last = encode([record | {"history": []}], prompter, words, 1000, False)[-1].labels
        answer = [label for label in last if label != IGNORED]
        assert [ending(answer[: place + 1]) for place in range(len(answer))] == [False] * (len(answer) - 1) + [True]
        assert split_thinking(ending.text(answer))[1].strip() == split_thinking(record["output"])[1].strip()


def test_words_between_control_tokens_tell_a_thought_from_what_is_said(tmp_path):
    from utils.inference.answerers import BASE, ChatModel
    from utils.inference.engine import Engine
    from utils.models.placement import place

    words = chat_templates.tokenizer(tmp_path, "harmony")
    tiny.llama(tmp_path, vocab_size=len(words))
    words = chat_templates.tokenizer(tmp_path, "harmony")  # written anew, since the model brought its own
    prompter = ChatPrompter(words, [words.eos_token_id])
    ending = Engine(str(tmp_path), [ChatModel(BASE, None, "chat", None)], place(False, False)).ending(BASE)
    for record in RECORDS:
        answer = [label for label in encode([record], prompter, words, 1000, False)[-1].labels if label != IGNORED]
        assert words.decode(answer[:1]) == "<|channel|>"
        assert split_thinking(ending.text(answer)) == split_thinking(record["output"])
        shown = [ending.so_far(answer[:length]) for length in range(1, len(answer) + 1)]
        assert all(later.startswith(sooner.strip()) for sooner, later in itertools.pairwise(shown)), shown
        assert shown[-1] == ending.text(answer)


def test_an_empty_thought_is_read_only_where_it_is_asked_with_and_never_learned(tmp_path):
    """Without the switch answers follow the prompt that is asked with by default; the saved template keeps the switch."""
    words = chat_templates.tokenizer(tmp_path, "qwen3")
    block = "<think>\n\n</think>\n\n"
    for thinking in (None, False, True):
        prompter = ChatPrompter(words, [words.eos_token_id], thinking)
        encoded = encode(RECORDS[:1], prompter, words, 1000, False)[0]
        asked = encode_prompt(RECORDS[0], prompter, words)
        assert encoded.input_ids[: len(asked)] == asked and encoded.labels[: len(asked)] == [IGNORED] * len(asked)
        assert words.decode(asked).endswith(block) == (thinking is False)
        assert words.decode(encoded.input_ids[len(asked) :]) == "我是梦想家。<|im_end|>" and not encoded.raw_answers
        assert learned(words, encoded) == ["我是梦想家。<|im_end|>"]
        thoughtful = encode(RECORDS[3:], prompter, words, 1000, False)
        assert [text.count("two and two") for text in learned(words, thoughtful[-1])] == [1]
        saved = AutoTokenizer.from_pretrained(tmp_path, chat_template=prompter.texts["chat_template"])
        alone = saved.apply_chat_template(prompter.messages(RECORDS[0] | {"output": ""}), add_generation_prompt=True)
        assert alone["input_ids"] == asked
        other = saved.apply_chat_template([{"role": "user", "content": "Q"}], add_generation_prompt=True, enable_thinking=True)
        assert not saved.decode(other["input_ids"]).endswith(block)
    for kept in ("\n\n\n", ""):  # an answer's line breaks are its own, unless the template removes them
        encoded = encode([RECORDS[0] | {"output": "\n\n\n好"}], ChatPrompter(words, [words.eos_token_id]), words, 1000, False)
        assert learned(words, encoded[0]) == [f"{kept}好<|im_end|>"]
        words.chat_template = words.chat_template.replace("content + '<|im_end|>", "content.lstrip() + '<|im_end|>")


def test_answers_that_a_template_drops_are_counted(kind, capsys):
    name, words, prompter, _ = kind
    encoder = Encoder(prompter, words, "", 1000, False)
    table = datasets.Dataset(encoder([*RECORDS, RECORDS[2] | {"learn": [True, False, True]}]))
    usable(table, np.arange(len(table)), 1000)
    counted = "9 answers are learned as the records have them, since the chat template writes them differently\n"
    assert capsys.readouterr().out == (counted if name == "r1" else "")


def test_records_that_a_template_refuses_are_dropped_and_counted(tmp_path, capsys):
    """Alone, as a pair, as a labelled answer and as a question; of an answer that holds an end token, too."""
    words = chat_templates.tokenizer(tmp_path, "chatml")
    refuse = "{{ raise_exception('not ' + message['content']) }}"
    words.chat_template = words.chat_template.replace(
        "{{", f"{{% if 'bad' in message['content'] %}}{refuse}{{% endif %}}{{{{", 1
    )
    rules = (make_prompter("chat", words, [words.eos_token_id]), words, "", 1000, False)
    good, bad, ended = RECORDS[0], RECORDS[0] | {"instruction": "bad"}, RECORDS[0] | {"output": "a<|im_end|>"}
    encoded = {
        "records": Encoder(*rules)([good, bad, ended, good]),
        "pairs": PairEncoder(*rules)([(good, good), (good, bad), (good, ended), (good, good)]),
        "labelled": JudgedEncoder(*rules)([Judged(one, True) for one in (good, bad, ended, good)]),
        "questions": QuestionEncoder(*rules, 10)([good, bad, bad, good]),
    }
    for table in encoded.values():
        assert usable(datasets.Dataset(table), np.arange(4), 1000).tolist() == [0, 3]
        told = "2 of 4 records dropped, since the chat template refuses them; the first: 'bad': the chat template cannot render"
        assert told in capsys.readouterr().out
        with pytest.raises(UserError, match="refuses all 2 records; the first: 'bad'"):
            usable(datasets.Dataset(table), np.arange(1, 3), 1000)


def test_excluded_answers_are_read_and_not_learned_also_where_questions_are(kind):
    _, words, prompter, _ = kind
    record = RECORDS[2] | {"learn": [True, False, False]}
    first = encode([{"instruction": "a ", "output": "b"}], prompter, words, 1000, False)[0].answer_tokens
    for train_on_inputs in (False, True):
        sequences = encode([record], prompter, words, 1000, train_on_inputs)
        assert sum(one.answer_tokens for one in sequences) == first
        labels = [label for one in sequences for label in one.labels]
        assert "x\n\ny" not in words.decode([label for label in labels if label != IGNORED])


def test_an_answer_that_holds_an_end_token_is_refused(kind):
    name, words, prompter, _ = kind
    end = chat_templates.KINDS[name][2] or "</s>"
    with pytest.raises(UserError, match="ends an answer"):
        encode([{"instruction": "q", "output": f"a {end} b"}], prompter, words, 1000, False)


def test_a_template_with_control_tokens_is_refused(tmp_path):
    words = chat_templates.tokenizer(tmp_path, "gemma")
    path = tmp_path / "own.json"
    for text in ("<start_of_turn>user\\n{instruction}X", "<|im_start|>{instruction}X", "{instruction}<｜Assistant｜>X"):
        given = text.replace("X", "{input}X")
        path.write_text(f'{{"prompt_no_input": "{text}", "prompt_input": "{given}", "response_split": "X"}}')
        with pytest.raises(UserError, match="control token"):
            make_prompter(str(path), words, [words.eos_token_id])
    words.add_tokens(["Below"])  # of the vocabulary, but no control token
    assert make_prompter("alpaca", words, [words.eos_token_id]).name == "alpaca"


def test_without_a_chat_template_chat_is_refused(tmp_path):
    words = tiny.tokenizer(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        make_prompter("chat", words, [2])
    words.chat_template = "{% for message in messages %}{{ message.content "
    with pytest.raises(UserError, match=r"its chat template fails .unexpected end of template.*; fix it, or name a template"):
        make_prompter("chat", words, [2])


def test_the_mark_that_an_editor_puts_before_a_template_begins_no_prompt(tmp_path):
    chat_templates.tokenizer(tmp_path, KINDS[0])
    file = tmp_path / "chat_template.jinja"
    plain = read_tokenizer(tmp_path).chat_template
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_tokenizer(tmp_path).chat_template == plain


# What travels


@pytest.mark.parametrize("name", NAMES)
def test_the_written_template_gives_the_ids_of_training(tmp_path, name):
    words = chat_templates.tokenizer(tmp_path, "chatml")  # whose own template must not survive
    prompter, further = Prompter(name), tmp_path / "additional_chat_templates"
    further.mkdir()
    (further / "tool_use.jinja").write_text("old")
    config = read_json(tmp_path / "tokenizer_config.json")
    write_json(tmp_path / "tokenizer_config.json", config | {"chat_template": "old"})
    write_chat_template(name, prompter.texts, words, tmp_path)
    assert not further.exists() and read_json(tmp_path / "tokenizer_config.json") == config
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert "im_start" not in plain.chat_template
    for record in [*SAMPLES, {"instruction": 'quotes " \\ and {{ braces }}', "system": " \t"}]:
        ids = plain.apply_chat_template(messages_of(record), add_generation_prompt=True, return_dict=False)
        assert ids == encode_prompt(record, prompter, words)


def test_names_of_further_templates_are_no_paths(tmp_path):
    words, named = chat_templates.tokenizer(tmp_path, "chatml"), {"chat_template": "a", "chat_template:../../x": "b"}
    write_chat_template("chat", named, words, tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "a"
    assert (tmp_path / "additional_chat_templates" / ".._.._x.jinja").read_text() == "b"


def test_where_no_text_gives_the_ids_no_template_is_left_and_that_is_printed(tmp_path, capsys):
    words = chat_templates.tokenizer(tmp_path, "chatml")
    words.add_tokens(["指令"])  # the folder's tokenizer does not know it
    write_chat_template("chinese", Prompter("chinese").texts, words, tmp_path)
    assert "gets no chat_template.jinja" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None


@pytest.mark.parametrize("legacy", [True, False])
def test_a_template_for_sentencepiece_gives_its_ids(tmp_path, legacy):
    source = llama(tmp_path / "source", legacy=legacy)
    words = load_tokenizer(source)
    (tmp_path / "saved").mkdir()
    save_tokenizer(words, source, tmp_path / "saved")
    assert proven(Prompter("alpaca"), words, tmp_path / "saved")


@pytest.mark.parametrize(
    "text, parts",
    [
        ("plain", ("", "plain")),
        ("<think>\na\n</think>\n\nb", ("a", "b")),
        ("a\n</think>\n\nb", ("a", "b")),
        ("<think>\nnever ends", ("never ends", "")),
        ("a <think> amid", ("", "a <think> amid")),
    ],
)
def test_thoughts_stand_apart(text, parts):
    assert split_thinking(text) == parts


def test_an_open_end_is_what_opens_the_next_turn_where_the_models_files_say_so(tmp_path):
    """GLM's own ends are the marks of the next speaker."""
    words = chat_templates.tokenizer(tmp_path, "glm")
    user = words.convert_tokens_to_ids("<|user|>")
    prompter = ChatPrompter(words, [words.eos_token_id, user])
    assert encode(RECORDS[:1], prompter, words, 1000, False)[0].labels[-1] == user
    assert (
        encode(RECORDS[:1], ChatPrompter(words, [words.eos_token_id]), words, 1000, False)[0].labels[-1] == words.eos_token_id
    )


def test_thoughts_stand_apart_in_the_result_and_the_judge_reads_none(tmp_path, capsys):
    asked = {"instruction": "2+2", "input": ""}
    result = [answered(asked, "<think>\ntwo and two\n</think>\n\n4"), answered(asked | {"instruction": "1"}, "one")]
    assert result == [
        {"instruction": "2+2", "output": "4", "reasoning": "two and two"},
        {"instruction": "1", "output": "one"},
    ]
    write_json(tmp_path / "test.json", result)
    assert side_by_side({"a": tmp_path / "test.json"})[1] == {"a": ["4", "one"]}
    write_json(tmp_path / "test.json", [asked | {"output": "<think>\ntwo and two\n</think>\n\n4"}])  # another program's
    assert side_by_side({"a": tmp_path / "test.json"})[1] == {"a": ["4"]}
    assert "1 of 1 answers begin with thoughts, which are ignored" in capsys.readouterr().out
