"""Chat templates of the published formats, long ones as short twins, and tiny tokenizers that know their control tokens."""

from pathlib import Path

import tiny
from tokenizers import AddedToken

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
QWEN3 = (  # thoughts are removed from all answers but the last, which gets an empty thought where it has none
    "{% for message in messages %}{% set content = message['content'] %}{% set thought = '' %}"
    "{% if message['role'] == 'assistant' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
GLM = (  # writes no end after an answer
    "{{ '[gMASK]<sop>' }}{% for message in messages %}{% set content = message['content'] %}"
    "{{ '<|' + message['role'] + '|>\\n' }}{% if message['role'] == 'assistant' %}{% if '</think>' in content %}"
    "{% if loop.last %}{{ '<think>' + content.split('</think>')[0].split('<think>')[-1].strip() + '</think>\\n' }}"
    "{% else %}{{ '<think></think>\\n' }}{% endif %}{% set content = content.split('</think>')[-1].strip() %}"
    "{% else %}{{ '<think></think>\\n' }}{% endif %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{{ '\\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\\n\\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
R1 = (  # opens a thought in the prompt, and removes it from every answer
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
KINDS = {  # the template, its control tokens, the one that ends an answer (None: it writes none)
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "qwen3": (QWEN3, ["<|im_start|>", "<|im_end|>", "<think>", "</think>"], "<|im_end|>"),
    "glm": (GLM, ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<think>", "</think>"], None),
    "mistral": (MISTRAL, ["[INST]", "[/INST]"], "</s>"),
    "r1": (R1, ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<think>", "</think>"], "<｜end▁of▁sentence｜>"),
}


def tokenizer(folder: Path, kind: str):
    """A tiny tokenizer with the chat template of a kind, saved into `folder`; the tokens of thoughts are not special."""
    words = tiny.tokenizer(folder)
    template, tokens, _ = (KINDS | MORE_KINDS | CALLING_KINDS)[kind]
    words.add_tokens([AddedToken(token, normalized=False, special="think" not in token) for token in tokens])
    words.chat_template = template
    words.save_pretrained(folder)
    return words


# Twins of more formats, each with something that the ones above do not have

TURNS = "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
OPEN = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
SIGNS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
PHI3 = (  # a line break after the end, and an end of sequence where no answer is asked for
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}" + CHATML
)
STRICT = (  # takes no system text, strips what is said, and no other order
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}{{ message['content'].strip() + eos_token }}{% endif %}"
    "{% endfor %}"
)
HUNYUAN = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '<｜hy_3｜>' }}"
    "{% elif message['role'] == 'user' %}{{ '<｜hy_User｜>' + message['content'] }}"
    "{% else %}{{ '<｜hy_Assistant｜>' + message['content'] + '<｜hy_2｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜hy_Assistant｜>' }}{% endif %}"
)
MARKED = (  # for transformers' own mask
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|end|>' }}"
    "{% endif %}{% endfor %}" + OPEN
)
NUMBERED = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + loop.index|string + ': ' + message['content'] }}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|assistant|>' + (messages|length + 1)|string + ': ' }}{% endif %}"
)
DATED = "{{ '<|system|>Today is ' + strftime_now('%d %b %Y') + '.<|end|>' }}" + TURNS + OPEN
TRIMMED = TURNS.replace("message['content']", "message['content']|trim") + OPEN
OPENED = (  # opens a thought in its prompts, whether or not one follows
    "{% for message in messages %}{% set content = message['content'] %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' and loop.last and '</think>' not in content %}{{ '<think>\n\n</think>\n\n' }}"
    "{% elif message['role'] == 'assistant' and not loop.last %}{% set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}{{ content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
APART = (  # takes thoughts under a key of their own, and drops them from the history
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% if message['reasoning_content'] and loop.last %}"
    "{{ '<think>' + message['reasoning_content'] + '</think>' }}{% endif %}{{ message['content'] + '<|end|>' }}{% endfor %}"
    + OPEN
)
LATE_SYSTEM = (  # puts the system text before the last question
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' + (system + '\n\n' if loop.last and system else '') + message['content'] "
    "+ '[/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
TEXT_END = (  # ends answers with a text
    "{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] + '\n### End\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
NO_END = (  # ends answers with nothing
    "{% for message in messages %}{{ message['role']|upper + ': ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
COLLAPSED = TURNS.replace("message['content']", "message['content'].replace('\n\n', '\n')") + OPEN
HARMONY = (  # gpt-oss': words between control tokens say what is thought and what is said; the history ends otherwise
    "{% for message in messages %}{% set last = loop.last and not add_generation_prompt %}"
    "{% if message['role'] != 'assistant' %}{{ '<|start|>' + message['role'] + '<|message|>' + message['content'] }}"
    "{{ '<|end|>' }}{% else %}{% if message['thinking'] and last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + message['thinking'] + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + message['content'] + ('<|return|>' if last else '<|end|>') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
MORE_KINDS = {
    "harmony": (HARMONY, ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"], "<|return|>"),
    "phi3": (PHI3, SIGNS, "<|end|>"),
    "default system": (DEFAULT_SYSTEM, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "strict": (STRICT, ["[INST]", "[/INST]"], "</s>"),
    "hunyuan": (HUNYUAN, ["<｜hy_3｜>", "<｜hy_2｜>", "<｜hy_User｜>", "<｜hy_Assistant｜>"], "<｜hy_2｜>"),
    "marked": (MARKED, SIGNS, "<|end|>"),
    "numbered": (NUMBERED, SIGNS, "<|end|>"),
    "dated": (DATED, SIGNS, "<|end|>"),
    "trimmed": (TRIMMED, SIGNS, "<|end|>"),
    "opened": (OPENED, [*SIGNS, "<think>", "</think>"], "<|end|>"),
    "apart": (APART, [*SIGNS, "<think>", "</think>"], "<|end|>"),
    "late system": (LATE_SYSTEM, ["[INST]", "[/INST]"], "</s>"),
    "text end": (TEXT_END, [], None),
    "no end": (NO_END, [], None),
    "collapsed": (COLLAPSED, SIGNS, "<|end|>"),
}

# Formats of calls

DEFINED = (
    "{% if tools %}{{ '<|system|># Tools\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}{{ '<|end|>' }}"
    "{% endif %}"
)
RESULT = "{% elif message['role'] == 'tool' %}{{ '<|tool|>' + message['content'] + '<|end|>' }}"
SAID = "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
CALLS_AS_OBJECTS = (  # Qwen's and Hermes'
    DEFINED + "{% for message in messages %}{% if message.tool_calls %}{{ '<|assistant|>' + message['content'] }}"
    '{% for call in message.tool_calls %}{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' '
    "+ call.function.arguments | tojson + '}\n</tool_call>' }}{% endfor %}{{ '<|end|>' }}" + RESULT + SAID + OPEN
)
CALLS_AS_TEXT = (  # DeepSeek's, without the tools' definitions
    "{% for message in messages %}{% if message.tool_calls %}{{ '<|assistant|><｜calls｜>' }}"
    "{% for call in message.tool_calls %}"
    "{{ call.function.name + '\n```json\n' + call.function.arguments + '\n```' }}{% endfor %}{{ '<|end|>' }}" + RESULT + SAID
    + "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)  # fmt: skip
CALLS_BY_KEY = (  # GLM's
    DEFINED + "{% for message in messages %}{% if message.tool_calls %}{{ '<|assistant|>' }}"
    "{% for call in message.tool_calls %}"
    "{{ '<tool_call>' + call.function.name }}{% for key, value in call.function.arguments.items() %}"
    "{{ '<key>' + key + '</key><value>' + (value if value is string else value | tojson) + '</value>' }}{% endfor %}"
    "{{ '</tool_call>' }}{% endfor %}{{ '<|end|>' }}" + RESULT + SAID + OPEN
)
CALLS_WITH_SHORT_IDS = (  # Mistral's, with the definitions before the last question
    "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% for message in messages %}"
    "{% if message.tool_calls %}{{ '[TOOL_CALLS]' }}{% for call in message.tool_calls %}{% if call.id | length != 9 %}"
    "{{ raise_exception('ids have nine signs') }}{% endif %}"
    "{{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' }}{% endfor %}{{ eos_token }}"
    "{% elif message['role'] == 'tool' %}{% if message.tool_call_id | length != 9 %}"
    "{{ raise_exception('ids have nine signs') }}{% endif %}"
    "{{ '[TOOL_RESULTS]' + message.tool_call_id + message['content'] + '[/TOOL_RESULTS]' }}{% elif message['role'] == 'user' %}"
    "{% if tools and message == asked[-1] %}{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif %}"
    "{{ '[INST]' + message['content'] + '[/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
CALLING_KINDS = {  # "plain" has no place for them
    "objects": (CALLS_AS_OBJECTS, [*SIGNS, "<|tool|>"], "<|end|>"),
    "text": (CALLS_AS_TEXT, [*SIGNS, "<|tool|>", "<｜calls｜>", "<think>", "</think>"], "<|end|>"),
    "keys": (CALLS_BY_KEY, [*SIGNS, "<|tool|>"], "<|end|>"),
    "short ids": (CALLS_WITH_SHORT_IDS, ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], "</s>"),
    "plain": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
}


def without_empty_thought(text: str) -> str:
    """What a template writes, without a thought of nothing and the line breaks after it."""
    head, closed, rest = text.partition("</think>")
    return rest.lstrip("\n") if closed and not head.strip().removeprefix("<think>") else text
