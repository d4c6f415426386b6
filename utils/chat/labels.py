"""What the chat page says, in Chinese and in English."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Labels:
    """The texts of the page in one language; the defaults are the English ones."""

    title: str = "梦想家 DreamerGPT"
    subtitle: str = "Instruction models in Chinese"
    chat: str = "Chat"
    compare: str = "Compare"
    task: str = "Single instruction"
    settings: str = "Settings"
    question_hint: str = "Ask a question; Enter sends"
    send: str = "Send"
    stop: str = "Stop"
    retry: str = "Regenerate"
    clear: str = "Delete conversation"
    save: str = "Save conversation"
    load: str = "Load conversation"
    examples: str = "Examples"
    empty: str = "Ask a question to start; follow-up questions keep the context."
    adapter: str = "Model"
    base: str = "base model"
    template: str = "Prompt template"
    own_template: str = "as trained"
    answerers: str = "Models to compare"
    ask_all: str = "Ask all"
    instruction: str = "Instruction"
    input: str = "Input"
    input_hint: str = "Optional, e.g. a sentence to translate or a text to read"
    output: str = "Output"
    waiting: str = "Beam search, step {tokens} …"
    status: str = "**{base}** · {adapter} · {place} · {speed}"
    speed: str = "{tokens} tokens, {speed:.1f}/s"
    no_speed: str = "no answer yet"
    dropped: str = "The conversation is too long: the oldest {count} turns were not sent to the model"
    not_a_conversation: str = "No conversation in this file: {reason}"
    no_conversation: str = "There is no conversation to save yet"
    none_chosen: str = "Choose at least one model"
    too_long: str = "The question is too long: {size} tokens, there is room for {room}"
    refused: str = "No answer: {reason}"
    queued: str = "Waiting, {count} requests ahead …"
    reading: str = "Reading the prompt ({tokens} tokens, {seconds:.0f} s) …"
    question: str = "Question"
    system: str = "System prompt"
    system_hint: str = "Optional; replaces the template's preamble for the whole conversation"
    persona: str = "System prompt preset"
    personas: dict[str, str] = dataclasses.field(
        default_factory=lambda: {
            "None": "",
            "Assistant": "You are a helpful assistant. Answer accurately and briefly; say so when you are not sure.",
            "Translator": "You are a translator. Translate Chinese into English and English into Chinese. Output only that.",
            "Summary": "Summarize the user's text in at most three sentences, relying only on the text.",
            "Rewrite": "Rewrite the user's text so that it is fluent and formal, keeping its meaning. "
            "Output the new text only.",
            "Programmer": "You are a programmer. First give code that runs, then explain it in a sentence or two.",
        }
    )
    preset: str = "Decoding preset"
    presets: dict[str, dict[str, float]] = dataclasses.field(
        default_factory=lambda: {
            "Precise (greedy)": {"do_sample": False},
            "Balanced": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40},
            "Creative": {"do_sample": True, "temperature": 1.1, "top_p": 0.95, "top_k": 100},
        }
    )
    go_on: str = "Continue"
    nothing_to_continue: str = "The last answer is complete; there is nothing to continue"
    varied: str = "Greedy decoding would give the same answer, so this one is sampled"
    greedy: str = "greedy"
    sampled: str = "sampled: temperature {temperature}, top-p {top_p}, top-k {top_k}, seed {seed}"
    marks: dict[str, str] = dataclasses.field(
        default_factory=lambda: {"length": "⚠ cut at the token limit", "stopped": "⚠ stopped"}
    )
    thoughts: str = "Thoughts"
    too_many_characters: str = "The question is too long: at most {most:,} characters"
    dialogues: str = "Conversations (kept in this browser)"
    new: str = "New conversation"
    name: str = "Conversation name"
    unfinished: str = "When saving, also train on unfinished answers"
    tokens: str = "Prompt and tokens"
    show_tokens: str = "Show"
    prompt: str = "Prompt as the model reads it"
    token_list: str = "Token ids"
    counted: str = "**{count}** tokens, window {window}"
    noted: str = "Written to {path}"
    not_noted: str = "Not recorded: {reason}"
    prompts: str = "List of prompts"
    prompts_hint: str = "One prompt per line, at most 50; differences from the first column are highlighted"
    no_prompts: str = "Enter prompts first, one per line"
    too_many_prompts: str = "At most {most} prompts"
    vote: str = "Vote"
    votes: dict[str, str] = dataclasses.field(
        default_factory=lambda: {
            "left": "A is better",
            "right": "B is better",
            "both": "Both are good",
            "neither": "Both are bad",
        }
    )
    vote_hint: str = (
        "Two models are drawn at random; their names appear after the vote; votes become preference records to train on."
    )
    left_answer: str = "Answer A"
    right_answer: str = "Answer B"
    revealed: str = "A is **{left}**, B is **{right}**"
    nothing_to_vote: str = "Ask first, and vote once both answers are complete"
    same_answers: str = "Both answers are the same; not recorded"
    training: str = "Training"
    run: str = "Training run"
    no_run: str = "Choose a run"
    states: dict[str, str] = dataclasses.field(
        default_factory=lambda: {"running": "**running**", "stopped": "**interrupted**", "finished": "**finished**"}
    )
    steps: str = "step {step} of {steps}"
    loss: str = "loss {loss:.4f}"
    validation: str = "validation loss {loss:.4f}"
    pace: str = "{seconds:.2f} s/step"
    left: str = "{time} left"
    step: str = "step"
    loss_axis: str = "loss"
    curve: str = "curve"
    curve_training: str = "training"
    curve_validation: str = "validation"
    evaluated: str = "Answers at evaluations"
    answer_at: str = "answer at step {step}"
    controls: dict[str, str] = dataclasses.field(default_factory=dict)  # of utils.inference.sampling_params, by the English

    def control(self, text: str) -> str:
        """A label or explanation of a setting in this language."""
        return self.controls.get(text, text)


EN = Labels()
ZH = Labels(
    title="梦想家",
    subtitle="DreamerGPT · 中文指令微调模型",
    chat="对话",
    compare="对比",
    task="单轮指令",
    settings="设置",
    question_hint="输入问题，回车发送",
    send="发送",
    stop="停止",
    retry="重新回答",
    clear="删除对话",
    save="保存对话",
    load="载入对话",
    examples="示例",
    empty="输入一个问题开始对话，可以连续追问。",
    adapter="模型",
    base="基座模型",
    template="提示词模板",
    own_template="训练时的模板",
    answerers="参与对比的模型",
    ask_all="全部回答",
    instruction="指令",
    input="输入",
    input_hint="可选，例如待翻译的句子、待理解的文章",
    output="输出",
    waiting="束搜索进行中，已算 {tokens} 步……",
    speed="{tokens} 个词元，{speed:.1f} 个/秒",
    no_speed="尚未回答",
    dropped="对话太长，最早的 {count} 轮未送入模型",
    not_a_conversation="这个文件里没有对话：{reason}",
    no_conversation="没有可以保存的对话",
    none_chosen="请至少选一个模型",
    too_long="问题太长：{size} 个词元，最多 {room} 个",
    refused="无法回答：{reason}",
    queued="排队中，前面还有 {count} 个请求……",
    reading="正在读取提示词（{tokens} 个词元，{seconds:.0f} 秒）……",
    question="问题",
    system="系统提示词",
    system_hint="可选；代替模板开头的说明，对整段对话有效",
    persona="系统提示词预设",
    personas={
        "无": "",
        "通用助手": "你是一个乐于助人的中文助手，回答准确、简洁；不确定时直接说明。",
        "翻译": "你是一名翻译。把用户发来的中文译成英文，把英文译成中文，只输出译文。",
        "摘要": "把用户发来的文字概括成不超过三句话，只依据原文。",
        "改写润色": "改写用户发来的文字，使其通顺、正式，保持原意，只输出改写后的文字。",
        "编程": "你是一名程序员。先给出可以运行的代码，再用一两句话说明。",
    },
    preset="解码预设",
    presets={
        "精确（贪心）": {"do_sample": False},
        "平衡": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40},
        "发散": {"do_sample": True, "temperature": 1.1, "top_p": 0.95, "top_k": 100},
    },
    go_on="继续",
    nothing_to_continue="最后一个回答已经完整，不需要继续",
    varied="贪心解码会得到同样的回答，这次改用随机采样",
    greedy="贪心",
    sampled="采样：温度 {temperature}，top-p {top_p}，top-k {top_k}，种子 {seed}",
    marks={"length": "⚠ 达到长度上限，未写完", "stopped": "⚠ 已停止，未写完"},
    thoughts="思考过程",
    too_many_characters="问题太长：最多 {most:,} 个字符",
    dialogues="对话记录（保存在本浏览器）",
    new="新对话",
    name="对话名称",
    unfinished="保存为训练数据时，未写完的回答也参与训练",
    tokens="提示词与词元",
    show_tokens="查看",
    prompt="送入模型的提示词",
    token_list="词元编号",
    counted="**{count}** 个词元，窗口 {window}",
    noted="已写入 {path}",
    not_noted="没有记下：{reason}",
    prompts="批量问题",
    prompts_hint="每行一个问题，最多 50 行；与第一列不同之处会标出",
    no_prompts="请先输入问题，每行一个",
    too_many_prompts="最多 {most} 个问题",
    vote="投票",
    votes={"left": "A 更好", "right": "B 更好", "both": "都好", "neither": "都不好"},
    vote_hint="随机抽取两个模型，投票之后才显示名称；结果写成偏好数据，可用于训练。",
    left_answer="回答 A",
    right_answer="回答 B",
    revealed="A 是 **{left}**，B 是 **{right}**",
    nothing_to_vote="请先提问，等两个回答写完再投票",
    same_answers="两个回答相同，未记录",
    training="训练",
    run="训练记录",
    no_run="请选择一次训练",
    states={"running": "**训练中**", "stopped": "**已中断**", "finished": "**已完成**"},
    steps="第 {step} / {steps} 步",
    loss="损失 {loss:.4f}",
    validation="验证损失 {loss:.4f}",
    pace="{seconds:.2f} 秒/步",
    left="剩余 {time}",
    step="步数",
    loss_axis="损失",
    curve="曲线",
    curve_training="训练",
    curve_validation="验证",
    evaluated="评测时的回答",
    answer_at="第 {step} 步的回答",
    controls={
        "Sample": "随机采样",
        "Otherwise the likeliest token is taken": "不勾选时为贪心解码",
        "Temperature": "温度",
        "top-p": "top-p",
        "top-k (0: no limit)": "top-k（0 不限）",
        "Seed (-1: another each time)": "随机种子（-1：每次不同）",
        "Beams": "束搜索宽度",
        "With more than 1 nothing is streamed: the whole answer appears at once": ("大于 1 时无法逐字显示，回答写完后一次出现"),
        "Longest answer (tokens)": "回答长度上限（词元）",
        "Repetition penalty": "重复惩罚",
    },
)

LANGUAGES = {"zh": ZH, "en": EN}
