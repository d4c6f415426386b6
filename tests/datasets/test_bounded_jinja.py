"""Chat templates of strangers: none takes forever or fills the memory; what conversations need is rendered as by jinja2."""

import json
import resource

import pytest
import tiny
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from utils.datasets import bounded_jinja
from utils.datasets.chat_templates import ChatPrompter
from utils.datasets.encoding import encode_prompt

MESSAGES = [{"role": "user", "content": "你好 " * 20}, {"role": "assistant", "content": "a\nb"}]
AGAIN = "{{% set ns = namespace(s={0}) %}}{{% for i in range(60) %}}{{% set ns.s {1} %}}{{% endfor %}}{2}"
LONG = "{% set s = 'x' * 1000000 %}"
HOSTILE = {
    "a product": "{{ 'x' * 10**10 }}",
    "a list": "{{ [1] * 10**10 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop that calls itself": "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "macros that call macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
    "filled up": "{{ 'x'.center(10 ** 10) }}",
    "filled up by a filter": "{{ 'x' | center(9999999999) }}",
    "batches": "{{ [1] | batch(9999999999, 'x') | list }}",
    "a width": "{{ '%9999999999d' % 1 }}",
    "a width in braces": "{{ '{:>9999999999}'.format('x') }}",
    "a width beside": "{{ '{:>{}}'.format('x', 999999999) }}",
    "a width for a filter": "{{ '%*d' | format(999999999, 1) }}",
    "doubled": AGAIN.format("'x'", "= ns.s + ns.s", ""),
    "doubled by a tilde": AGAIN.format("'x'", "= ns.s ~ ns.s", ""),
    "doubled by a block": AGAIN.format("'x'", "%}{{ ns.s }}{{ ns.s }}{% endset", ""),
    "lists of lists": AGAIN.format("[1]", "= [ns.s, ns.s]", "{{ ns.s }}"),
    "lists of lists as JSON": AGAIN.format("[1]", "= [ns.s, ns.s]", "{{ ns.s | tojson | length }}"),
    "lists of lists formatted": AGAIN.format("[1]", "= [ns.s, ns.s]", "{{ '{}'.format(ns.s) | length }}"),
    "replaced": LONG + "{{ s.replace('x', s) | length }}",
    "joined": LONG + "{{ s.join(s) | length }}",
    "joined by a filter": LONG + "{{ s | join(s) | length }}",
    "indented": "{% set s = 'x\n' * 100000 %}{{ s | indent(9999) | length }}",
    "long and often": "{% for i in range(99999) %}" + "y" * 200_000 + "{% endfor %}",
}


def render(template):
    return render_jinja_template([MESSAGES], chat_template=template)[0][0]


@pytest.fixture(autouse=True)
def little_memory():
    """What would fill the memory fails at once instead."""
    most = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**29, most[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, most)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_without_end(name, monkeypatch):
    monkeypatch.setattr(bounded_jinja, "MOST_STEPS", 20_000)
    monkeypatch.setattr(bounded_jinja, "MOST_LENGTH", 200_000 if "lists" in name else 2_000_000)
    if name == "macros that call macros":
        monkeypatch.setattr(bounded_jinja, "MOST_STEPS", 500)
    with pytest.raises(bounded_jinja.TooMuch, match="as no conversation needs; use one from a source that you trust"):
        render(HOSTILE[name])


def test_what_conversations_need_is_as_jinja_renders_it():
    assert render("{{ 1 ~ '-' ~ none ~ [1, 'a'] ~ messages[0].role }}|{{ 7 * 3 + 2 ** 5 % 4 }}|{{ '%s-%03d' % ('a', 7) }}") == (
        "1-None[1, 'a']user|21|a-007"
    )
    loop = "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ '' if loop.last else ', ' }}{% endfor %}"
    assert render(loop + "{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}") == "1/2, 2/2a2b1"
    block = "{% set s %}{{ messages[1].content }}!{% endset %}{{ s | replace('\\n', '/') | upper }}"
    assert render(block + "{{ messages | map(attribute='role') | join(', ') }}{{ 'a,b'.split(',') }}") == (
        "A/B!user, assistant['a', 'b']"
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny.llama(tmp_path_factory.mktemp("base"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% if 'boom' in m.content %}{{ m.content * 10**10 }}"
    tokenizer.chat_template = text + "{% endif %}{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_asking_with_such_a_template(base):
    """What page, endpoint and batch runs do; each gives a UserError's line."""
    prompter = ChatPrompter(AutoTokenizer.from_pretrained(base), [2])
    with pytest.raises(bounded_jinja.TooMuch):
        encode_prompt({"instruction": "boom", "input": "", "output": ""}, prompter, prompter.tokenizer)


def test_the_template_is_at_fault_and_not_a_record(base, tmp_path, script):
    records = [{"instruction": "a", "output": "b"}, {"instruction": "boom", "output": "c"}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    argv = ("--base_model", base, "--data_path", tmp_path / "data.json", "--output_dir", tmp_path / "out", "--val_set_size", 0)
    assert "the chat template takes more than" in script("finetune.py", *argv, "--prompt_template_name", "chat").error
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / "q.json").write_text('[{"instruction": "boom"}]')
    argv = ("--base_model", base, "--is_ui", "False", "--test_input_path", tmp_path / "asked", "--num_beams", 1)
    assert "the chat template takes more than" in script("generate.py", *argv, "--output_path", tmp_path / "a.json").error
    assert not (tmp_path / "a.json").exists()
