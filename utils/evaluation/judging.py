"""A model as judge: the published prompt, the order of the systems, and asking until scores are certain."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from utils.datasets.prompts import Record
from utils.evaluation.judge_scores import read_scores
from utils.inference.remote import last_turn
from utils.inference.requests import Endpoint

COUNTS = {2: "两", 3: "三", 4: "四", 5: "五", 6: "六", 7: "七", 8: "八"}
PREAMBLE = (
    "以下是{count}个类似 ChatGPT 的系统的输出。请以 10 分制为每一项打分，并给出解释以证明您的分数。"
    "输出结果格式为：System 分数；System 解释。"
)
REMINDER = "（上一次的回答里，{systems}的分数无法确定。请给每个 System 各打一个 0 到 10 之间的分数。）"
ASKED = 3  # most times a judge is asked, until its verdict is readable, or every system has a certain score
T = TypeVar("T")


class Judgement(NamedTuple):
    """One judgement of one prompt: the order shown, the scores (None: missing), the judge's texts, and what is wrong."""

    prompt: int
    repeat: int
    order: list[str]
    scores: dict[str, float | None]
    answers: list[str]
    problems: list[str]


def judge_prompt(record: Record, answers: list[str], with_reference: bool = False) -> str:
    """The prompt of the published experiment, for 2 to 8 answers; with the record's reference if asked for."""
    lines = [PREAMBLE.format(count=COUNTS[len(answers)]), f"Prompt: {question(record)}"]
    lines += [f"参考答案：{record['reference']}"] if with_reference and record.get("reference") else []
    lines.append("答案：")
    return "\n".join(lines + [f"System{number}: {answer}" for number, answer in enumerate(answers, 1)])


def question(record: Record) -> str:
    """The question to the systems, after the earlier turns of its dialogue."""
    history = record.get("history") or []
    turns = [f"用户：{asked}\n助手：{reply}" for asked, reply in history]
    return "\n".join([*turns, f"用户：{last_turn(record)}"]) if history else last_turn(record)


def shown_order(systems: list[str], seed: int, prompt: int, repeat: int) -> list[str]:
    """The order in which the judge sees the systems: shuffled for each prompt, and rotated by one with each repeat."""
    order = list(systems)
    random.Random(f"{seed} {prompt}").shuffle(order)
    start = repeat % len(order)
    return order[start:] + order[:start]


class Question(NamedTuple):
    """A request to a judge: what it is about (first the position of the prompt), its name, and its text."""

    about: tuple[Any, ...]
    name: str
    content: str

    def key(self, attempt: int) -> str:
        """Its key in the journal at attempt number `attempt`, counted from 0."""
        return f"prompt {self.about[0] + 1}, {self.name}, time {attempt + 1}"


async def ask_for_verdict(
    endpoint: Endpoint, asked: Question, read: Callable[[str], T | None], reminder: str
) -> tuple[T | None, list[str], bool]:
    """Ask a judge until its verdict can be read, with a `reminder` from the second time on.

    Returns the verdict (None: none could be read), the judge's texts, and whether the service refused to answer.
    """
    texts: list[str] = []
    added = ""
    for attempt in range(ASKED):
        reply = await endpoint.ask(asked.key(attempt), [{"role": "user", "content": asked.content + added}])
        texts.append(reply.text)
        if reply.finish == "refused":
            return None, texts, True
        verdict = read(reply.text)
        if verdict is not None:
            return verdict, texts, False
        added = f"\n\n{reminder}"
    return None, texts, False


async def judge(endpoint: Endpoint, asked: Question) -> Judgement:
    """Have the answers to one prompt scored; if a score is uncertain, the judge is asked up to twice more.

    Among several texts of the judge the one with the most certain scores counts; scores are not mixed.
    """
    prompt, repeat, order = asked.about
    texts: list[str] = []
    best, reminder = None, ""
    for attempt in range(ASKED):
        reply = await endpoint.ask(asked.key(attempt), [{"role": "user", "content": asked.content + reminder}])
        texts.append(reply.text)
        reading = read_scores("" if reply.finish == "refused" else reply.text, len(order))
        if best is None or len(reading.problems) < len(best.problems):
            best = reading
        if not reading.problems or reply.finish == "refused":
            break
        reminder = "\n" + REMINDER.format(systems="、".join(problem.partition(":")[0] for problem in reading.problems))
    assert best is not None
    problems = [f"refused: {reply.text}"] if reply.finish == "refused" else list(best.problems)
    problems += ["cut off (--max_tokens)"] if problems and reply.finish == "length" else []
    return Judgement(prompt, repeat, order, dict(zip(order, best.scores, strict=True)), texts, problems)


def questions(
    records: list[Record], answers: dict[str, list[str]], repeats: int, seed: int, with_references: bool = False
) -> list[Question]:
    """The requests that judge every prompt `repeats` times. `answers`: for each system, one for each record."""
    found = []
    for repeat in range(repeats):
        for prompt, record in enumerate(records):
            order = shown_order(list(answers), seed, prompt, repeat)
            content = judge_prompt(record, [answers[system][prompt] for system in order], with_references)
            found.append(Question((prompt, repeat, order), f"repeat {repeat + 1}", content))
    return found


def judge_all(endpoint: Endpoint, asked: list[Question]) -> list[Judgement]:
    """Ask the judge all questions."""
    return endpoint.gather([judge(endpoint, one) for one in asked], "judging")
