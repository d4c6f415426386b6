"""A model as judge: the published prompt, the order the systems are shown in, and asking until scores are certain."""

import random
from typing import NamedTuple

from utils.api import Messages
from utils.console import say
from utils.endpoint import Endpoint
from utils.prompts import Record, answered
from utils.scores import read_scores

COUNTS = {2: "两", 3: "三", 4: "四", 5: "五", 6: "六", 7: "七", 8: "八"}
PREAMBLE = (
    "以下是{count}个类似 ChatGPT 的系统的输出。请以 10 分制为每一项打分，并给出解释以证明您的分数。"
    "输出结果格式为：System 分数；System 解释。"
)
REMINDER = "（上一次的回答里，{systems}的分数无法确定。请给每个 System 各打一个 0 到 10 之间的分数。）"
ASKED = 3  # times in all, until every system has a certain score


class Judgement(NamedTuple):
    """What the judge said about one prompt, once: the order shown, the scores (None: missing), its answers, what is wrong."""

    prompt: int
    repeat: int
    order: list[str]
    scores: dict[str, float | None]
    answers: list[str]
    problems: list[str]


def judge_prompt(record: Record, answers: list[str]) -> str:
    """The prompt of the published experiment, for 2 to 8 answers."""
    lines = [PREAMBLE.format(count=COUNTS[len(answers)]), f"Prompt: {question(record)}", "答案："]
    return "\n".join(lines + [f"System{number}: {answer}" for number, answer in enumerate(answers, 1)])


def question(record: Record) -> str:
    """What the systems were asked, after the earlier turns of a dialogue."""
    history = record.get("history") or []
    turns = [f"用户：{asked}\n助手：{reply}" for asked, reply in history]
    return "\n".join([*turns, f"用户：{last_turn(record)}"]) if history else last_turn(record)


def last_turn(record: Record) -> str:
    """Instruction and input as one text."""
    return f"{record['instruction']}\n{record['input']}" if record.get("input") else record["instruction"]


def messages(record: Record) -> Messages:
    """A record as the messages that ask a model to answer it."""
    found = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for asked, reply in record.get("history") or []:
        found += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
    return [*found, {"role": "user", "content": last_turn(record)}]


def shown_order(systems: list[str], seed: int, prompt: int, repeat: int) -> list[str]:
    """The order in which the judge sees the systems: shuffled for each prompt, and moved on by one with each repeat."""
    order = list(systems)
    random.Random(f"{seed} {prompt}").shuffle(order)
    start = repeat % len(order)
    return order[start:] + order[:start]


async def judge(endpoint: Endpoint, prompt: int, repeat: int, record: Record, answers: dict[str, str], seed: int) -> Judgement:
    """Have the answers to one prompt scored; where a score is not certain, the judge is asked again, twice.

    Of several answers of the judge the one with the most certain scores counts; scores are not mixed.
    """
    order = shown_order(list(answers), seed, prompt, repeat)
    content = judge_prompt(record, [answers[system] for system in order])
    said: list[str] = []
    best, reminder = None, ""
    for attempt in range(ASKED):
        key = f"prompt {prompt + 1}, repeat {repeat + 1}, time {attempt + 1}"
        reply = await endpoint.ask(key, [{"role": "user", "content": content + reminder}])
        said.append(reply.text)
        reading = read_scores("" if reply.finish == "refused" else reply.text, len(order))
        if best is None or len(reading.problems) < len(best.problems):
            best = reading
        if not reading.problems or reply.finish == "refused":
            break
        reminder = "\n" + REMINDER.format(systems="、".join(problem.partition(":")[0] for problem in reading.problems))
    assert best is not None
    problems = [f"refused: {reply.text}"] if reply.finish == "refused" else list(best.problems)
    problems += ["cut off (--max_tokens)"] if problems and reply.finish == "length" else []
    return Judgement(prompt, repeat, order, dict(zip(order, best.scores, strict=True)), said, problems)


def judge_all(
    endpoint: Endpoint, records: list[Record], answers: dict[str, list[str]], repeats: int, seed: int
) -> list[Judgement]:
    """Have every prompt judged `repeats` times. `answers`: of each system, one for each record."""
    jobs = [
        judge(endpoint, prompt, repeat, record, {system: given[prompt] for system, given in answers.items()}, seed)
        for repeat in range(repeats)
        for prompt, record in enumerate(records)
    ]
    return endpoint.gather(jobs, "judging")


def answer_all(endpoint: Endpoint, records: list[Record]) -> list[Record]:
    """Have the model answer records itself; an answer that it refuses is empty, which is said, as are those cut off."""
    jobs = [endpoint.ask(f"prompt {number}", messages(record)) for number, record in enumerate(records, 1)]
    replies = endpoint.gather(jobs, "answering")
    for finish, what in (("refused", "refused by the server, and left empty"), ("length", "cut off (--max_tokens)")):
        count = sum(reply.finish == finish for reply in replies)
        if count:
            say(f"{count} of {len(replies)} answers were {what}")
    texts = ["" if reply.finish == "refused" else reply.text for reply in replies]
    return [answered(record, text) for record, text in zip(records, texts, strict=True)]
