"""What the page's other tabs do: answers side by side, single instructions, votes, and training runs."""

import difflib
import html
import random
from collections.abc import Iterator
from typing import Any

import gradio as gr
import pandas as pd

from utils.chat.display import Pace, put
from utils.chat.handlers import Handlers
from utils.chat.runs import read_run, runs_beside
from utils.chat.sessions import ChatReply
from utils.console import UserError
from utils.datasets.records import Record

MOST_PROMPTS = 50  # in a list
TIES = ("both", "neither")


class Tabs:
    """The functions of these tabs."""

    def __init__(self, handlers: Handlers):
        self.handlers, self.service, self.labels = handlers, handlers.service, handlers.labels

    # answers side by side

    def compare(self, talk, compared_question, answerers, template, **knobs) -> Iterator[list]:
        """Ask several answerers one question; yields the text of each column, and the status."""
        names = list(self.handlers.answerers)
        columns = [""] * len(names)
        yield [*map(put, columns), gr.skip()]
        if not answerers:
            self.handlers.warn(self.labels.none_chosen)
            return
        for settings, replies in self.replies(talk, compared_question, answerers, template, knobs):
            for place, name in enumerate(names):
                if name in replies:
                    columns[place] = self.handlers.text(replies[name], settings)
            yield [*map(put, columns), put(self.compared(replies))]

    def replies(self, talk, question, answerers, template, knobs, record: Any = None) -> Iterator[tuple]:
        """The settings and growing replies of several answerers to one question, whenever the page is to be updated."""
        pace = Pace()
        try:
            for name in answerers:
                self.handlers.known(name)
            settings = self.handlers.settings(**knobs)
            asked: Record = {"instruction": question, "input": ""} if record is None else record
            for replies in self.service.replies(answerers, asked, settings, template, **self.handlers.way(talk, knobs)):
                if pace.is_due(all(reply.done for reply in replies.values())):
                    yield settings, replies
        except UserError as error:
            self.handlers.warn(self.handlers.reason(error))

    def compared(self, replies: dict[str, ChatReply]) -> str:
        """Base, device and dtype, and the tokens and speed of several answers."""
        shown = self.handlers.shown
        answers = (f"{shown(name)} {reply.tokens} ({reply.speed:.1f}/s)" for name, reply in replies.items())
        return " · ".join((f"**{self.handlers.base}**", str(self.service.engine.placement), *answers))

    def choose(self, answerers) -> list:
        """Show the columns of the chosen answerers."""
        shown = [gr.update(visible=name in answerers) for name in self.handlers.answerers]
        return shown if len(shown) > 1 else shown[0]

    def compare_list(self, talk, prompts, answerers, template, **knobs) -> Iterator[str]:
        """Ask several answerers each line of `prompts`; yields a table with differences from the first marked."""
        questions = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not answerers or not questions:
            self.handlers.warn(self.labels.none_chosen if questions else self.labels.no_prompts)
            return
        if len(questions) > MOST_PROMPTS:
            self.handlers.warn(self.labels.too_many_prompts.format(most=MOST_PROMPTS))
            return
        rows: list[list[str]] = []
        for question in questions:
            texts: list[str] = []
            for settings, replies in self.replies(talk, question, answerers, template, knobs):
                texts = [self.handlers.text(replies[name], settings) for name in answerers]
                yield self.table(answerers, [*rows, [question, *texts]])
            rows.append([question, *(texts or [""] * len(answerers))])

    def table(self, answerers: list[str], rows: list[list[str]]) -> str:
        """A table of questions and answers, as HTML."""
        heads = [self.labels.question, *map(self.handlers.shown, answerers)]
        lines = ["<tr>" + "".join(f"<th scope=col>{html.escape(head)}</th>" for head in heads) + "</tr>"]
        for question, first, *others in rows:
            cells = [html.escape(question), html.escape(first), *(marked(first, other) for other in others)]
            lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        return f"<table>{''.join(lines)}</table>"

    # single instructions

    def task(self, talk, instruction, input, adapter, template, **knobs) -> Iterator[tuple]:
        """Answer an instruction with its input; yields the answer and the status."""
        yield "", gr.skip()
        record = {"instruction": instruction, "input": input}
        for settings, replies in self.replies(talk, instruction, [adapter], template, knobs, record):
            yield self.handlers.text(replies[adapter], settings), put(self.handlers.status(adapter, replies[adapter]))

    # votes

    def duel(self, talk, duel, vote_question, template, **knobs) -> Iterator[tuple]:
        """Ask two answerers whose names are hidden; yields their texts, the message, and the buttons."""
        left, right = random.sample(list(self.handlers.answerers), 2)
        duel.clear()
        off = [gr.update(interactive=False)] * 4
        yield put(""), put(""), put(""), *off
        done: dict[str, ChatReply] = {}
        for settings, replies in self.replies(talk, vote_question, [left, right], template, knobs):
            done = {name: reply for name, reply in replies.items() if reply.done}
            texts = [put(self.handlers.text(replies[name], settings)) for name in (left, right)]
            if len(done) == 2:
                by = self.handlers.giver(left, template, settings, {})["settings"]
                answers = {name: done[name].text for name in (left, right)}
                duel.update(question=vote_question, names=(left, right), answers=answers, settings=by)
                off = [gr.update(interactive=True)] * 4
            yield *texts, put(""), *off

    def vote(self, duel, vote: str) -> tuple:
        """Take a vote: `left`, `right`, `both` or `neither`; reveals the names. One not written can be given again."""
        off = [gr.update(interactive=False)] * 4
        if not duel:
            return put(self.labels.nothing_to_vote), *off
        names, answers = duel["names"], duel["answers"]
        names_shown = self.labels.revealed.format(left=self.handlers.shown(names[0]), right=self.handlers.shown(names[1]))
        better = "" if vote in TIES else names[vote == "right"]
        if better and len({text.strip() for text in answers.values()}) < 2:
            return put(f"{names_shown} · {self.labels.same_answers}"), *off
        if better and not all(text.strip() for text in answers.values()):
            better = ""
        assert self.handlers.feedback is not None
        question = {"instruction": duel["question"], "input": ""}
        try:
            path = self.handlers.feedback.vote(question, answers, better, duel["settings"], vote)
        except UserError as error:
            return put(self.labels.not_noted.format(reason=error)), *[gr.skip()] * 4
        duel.clear()
        return put(f"{names_shown} · {self.labels.noted.format(path=path.name)}"), *off

    # training

    def runs(self) -> list[str]:
        """The names of the runs beside the loaded adapters."""
        return list(runs_beside(one.folder for one in self.handlers.answerers.values() if one.folder))

    def show_runs(self) -> dict:
        """The current list of runs."""
        return gr.update(choices=self.runs())

    def show_run(self, run) -> tuple[Any, Any, Any]:
        """A run's state in words, its curves, and its answers at evaluations."""
        folder = runs_beside(one.folder for one in self.handlers.answerers.values() if one.folder).get(run or "")
        if folder is None:
            return put(self.labels.no_run), gr.skip(), gr.skip()
        labels, found = self.labels, read_run(folder)
        parts = [labels.states[found.state], labels.steps.format(step=found.step, steps=found.steps or "?")]
        parts += [labels.loss.format(loss=found.loss)] if found.loss is not None else []
        parts += [labels.validation.format(loss=found.validation)] if found.validation is not None else []
        parts += [f"{name} {value:.1f}" for name, value in found.scores.items()]
        parts += [labels.pace.format(seconds=found.pace)] if found.pace else []
        parts += [labels.left.format(time=spelled(found.left))] if found.left is not None else []
        names = {"training": labels.curve_training, "validation": labels.curve_validation}
        rows = [(step, loss, names[kind]) for step, loss, kind in found.points]
        frame = pd.DataFrame(rows, columns=[labels.step, labels.loss_axis, labels.curve])
        first, newest = found.answered or (0, 0)
        headers = [labels.question, labels.answer_at.format(step=first), labels.answer_at.format(step=newest)]
        answers = gr.update(value=[list(one) for one in found.answers], headers=headers, visible=bool(found.answers))
        return put(" · ".join(parts)), put(frame), answers


def spelled(seconds: float) -> str:
    """A time as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def marked(first: str, other: str) -> str:
    """A text as HTML, with its differences from another marked."""
    parts = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, first, other, autojunk=False).get_opcodes():
        text = html.escape(other[start:end])
        parts.append(text if kind == "equal" or not text else f"<mark>{text}</mark>")
    return "".join(parts)
