"""What the chat page says, in Chinese and in English."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Labels:
    """One language. Names with a trailing `_info` explain the control of the same name."""

    title: str
    subtitle: str
    chat: str
    compare: str
    task: str
    settings: str
    question_hint: str
    send: str
    stop: str
    retry: str
    clear: str
    save: str
    load: str
    examples: str
    empty: str
    adapter: str
    base: str
    template: str
    own_template: str
    do_sample: str
    do_sample_info: str
    temperature: str
    top_p: str
    top_k: str
    num_beams: str
    num_beams_info: str
    max_new_tokens: str
    repetition_penalty: str
    answerers: str
    ask_all: str
    instruction: str
    input: str
    input_hint: str
    output: str
    waiting: str
    status: str
    speed: str
    no_speed: str
    dropped: str
    not_a_conversation: str
    no_conversation: str
    none_chosen: str
    too_long: str
    refused: str


ZH = Labels(
    title="梦想家",
    subtitle="DreamerGPT · 中文指令微调模型",
    chat="对话",
    compare="对比",
    task="单项任务",
    settings="设置",
    question_hint="输入问题，回车发送",
    send="发送",
    stop="停止",
    retry="重新回答",
    clear="清空",
    save="保存对话",
    load="载入对话",
    examples="例题",
    empty="问点什么吧：可以接着追问，回答会逐字出现。",
    adapter="回答者",
    base="底座",
    template="提示词模板",
    own_template="训练时的模板",
    do_sample="随机采样",
    do_sample_info="不勾选时总取最可能的词，温度、top-p、top-k 不起作用",
    temperature="温度",
    top_p="top-p",
    top_k="top-k（0 不限）",
    num_beams="束宽",
    num_beams_info="大于 1 时无法逐字显示，整个回答会一次出现",
    max_new_tokens="回答上限（词元）",
    repetition_penalty="重复惩罚",
    answerers="谁来回答",
    ask_all="一起回答",
    instruction="指令",
    input="输入",
    input_hint="可以不填；例如要翻译的句子、要理解的文章",
    output="输出",
    waiting="束搜索进行中，已算 {tokens} 步……",
    status="**{base}** · {adapter} · {place} · {speed}",
    speed="上次回答 {tokens} 个词元，每秒 {speed:.1f} 个",
    no_speed="还没有回答",
    dropped="对话太长，最早的 {count} 轮没有送给模型",
    not_a_conversation="这个文件里没有对话：{reason}",
    no_conversation="还没有可以保存的对话",
    none_chosen="请至少选一个回答者",
    too_long="问题太长：{size} 个词元，最多 {room} 个",
    refused="没能回答：{reason}",
)

EN = Labels(
    title="梦想家 DreamerGPT",
    subtitle="Instruction models in Chinese",
    chat="Chat",
    compare="Compare",
    task="Single task",
    settings="Settings",
    question_hint="Ask; Enter sends",
    send="Send",
    stop="Stop",
    retry="Answer again",
    clear="Clear",
    save="Save conversation",
    load="Load conversation",
    examples="Examples",
    empty="Ask something, then ask on: answers appear as they are written.",
    adapter="Who answers",
    base="base",
    template="Prompt template",
    own_template="the one trained with",
    do_sample="Sample",
    do_sample_info="Otherwise the likeliest token is taken, and temperature, top-p and top-k have no effect",
    temperature="Temperature",
    top_p="top-p",
    top_k="top-k (0: no limit)",
    num_beams="Beams",
    num_beams_info="With more than 1 nothing can be streamed: the whole answer comes at once",
    max_new_tokens="Longest answer (tokens)",
    repetition_penalty="Repetition penalty",
    answerers="Who answers",
    ask_all="Ask them all",
    instruction="Instruction",
    input="Input",
    input_hint="May be empty; such as a sentence to translate, or a text to read",
    output="Output",
    waiting="Searching with beams, step {tokens} …",
    status="**{base}** · {adapter} · {place} · {speed}",
    speed="last answer: {tokens} tokens, {speed:.1f} a second",
    no_speed="no answer yet",
    dropped="The conversation is too long: its oldest {count} turns were not sent to the model",
    not_a_conversation="This file holds no conversation: {reason}",
    no_conversation="There is no conversation to save yet",
    none_chosen="Choose at least one to answer",
    too_long="The question is too long: {size} tokens, there is room for {room}",
    refused="No answer: {reason}",
)

LANGUAGES = {"zh": ZH, "en": EN}
