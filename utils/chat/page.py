"""What the chat page shows: its components, and which of them each function gets, matched by name."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from utils.chat.conversations import Talk
from utils.chat.display import PRESET
from utils.chat.feedback import Feedback
from utils.chat.handlers import Handlers
from utils.chat.labels import Labels
from utils.chat.markdown import LATEX
from utils.chat.page_api import PageApi
from utils.chat.sessions import ChatService
from utils.chat.tabs import Tabs
from utils.datasets.records import read_records
from utils.datasets.templates import CHAT, TEMPLATES
from utils.inference.sampling_params import CONTROLS, KINDS, SHOWN, SamplingParams

TEST_DATA = Path(__file__).parents[2] / "test_data"
COLUMNS = 4  # answerers that are compared by default
FONTS = ["system-ui", "-apple-system", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]
SENT = "(sent, now) => (sent && now === sent ? '' : now)"  # keeps what has been typed since
VOTES = ("left", "right", "both", "neither")
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}  # of events that are the page's own
POLLED = 5.0  # seconds between updates of a run


def build(service: ChatService, defaults: SamplingParams, labels: Labels, feedback: Feedback | None = None) -> gr.Blocks:
    """The page, not yet listening."""
    page = Page(service, defaults, labels, feedback)
    with gr.Blocks(title=labels.title, analytics_enabled=False) as blocks:
        with gr.Row():
            main = gr.Column(scale=4, min_width=320)
            with gr.Column(scale=1, min_width=280, elem_id="settings"):
                page.draw_settings()
        with main:
            gr.Markdown(f"# {labels.title}\n{labels.subtitle}", elem_id="head")
            with gr.Tab(labels.chat, id="chat"):
                page.draw_chat()
            if len(page.names) > 1:
                with gr.Tab(labels.compare, id="compare"):
                    page.draw_compare()
                if feedback:
                    with gr.Tab(labels.vote, id="vote"):
                        page.draw_vote()
            with gr.Tab(labels.task, id="task"):
                page.draw_task()
            if page.tabs.runs():
                with gr.Tab(labels.training, id="training") as training:
                    page.draw_training(training)
        page.wire_kept(blocks)
        api = PageApi(page.handlers)
        gr.api(api.typed_answer(), api_name="answer", **page.growing)
        gr.api(api.answerers, api_name="answerers")
    return blocks


class Page:
    """The components of the page, by name."""

    def __init__(self, service: ChatService, defaults: SamplingParams, labels: Labels, feedback: Feedback | None):
        self.handlers, self.labels = Handlers(service, labels, feedback), labels
        self.tabs = Tabs(self.handlers)
        self.defaults, self.longest = defaults, service.longest_answer
        self.names = list(self.handlers.answerers)
        self.parts: dict[str, Any] = {}
        self.growing: dict[str, Any] = {"concurrency_limit": None}  # the scheduler has its own queue

    def wire(self, event: Callable, function: Callable, outputs: list[str], **options: Any) -> Any:
        """Call `function` on `event`, with the components named like its parameters, and the whole panel for `**knobs`."""
        names: list[str] = []
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                names += SHOWN
            elif name != "event":
                names.append(name)
        inputs = {name: self.parts[name] for name in names}
        options = QUIET | options
        if not outputs:
            return event(fn=function, inputs_kwargs=inputs, **options)
        return event(fn=function, outputs=[self.parts[name] for name in outputs], inputs_kwargs=inputs, **options)

    def draw_settings(self) -> None:
        """The panel beside the page."""
        labels, parts = self.labels, self.parts
        gr.Markdown(f"### {labels.settings}")
        choices = [(self.handlers.shown(name), name) for name in self.names]
        parts["adapter"] = gr.Dropdown(choices, value=self.names[-1], label=labels.adapter, elem_id="adapter")
        templates = sorted(path.stem for path in TEMPLATES.glob("*.json"))
        templates += [CHAT] if self.handlers.service.engine.tokenizers[self.names[-1]].chat_template else []
        choices = [(labels.own_template, ""), *((name, name) for name in templates)]
        parts["template"] = gr.Dropdown(choices, value="", label=labels.template, elem_id="template")
        preset = gr.Dropdown(list(labels.presets), value=None, label=labels.preset, elem_id="preset")
        for name in SHOWN:
            parts[name] = self.control(name)
        drawing = [name for name in SHOWN if CONTROLS[name].only]
        self.wire(parts["do_sample"].change, self.handlers.show_effective, drawing, queue=False)
        changed = [parts[name] for name in PRESET]
        preset.input(self.handlers.preset, preset, changed, **QUIET, queue=False)

    def control(self, name: str) -> gr.Checkbox | gr.Slider | gr.Number:
        """A setting with its bounds, as sampling_params describes it."""
        control, value = CONTROLS[name], getattr(self.defaults, name)
        label, info = self.labels.control(control.label), self.labels.control(control.info) or None
        if KINDS[name] is bool:
            return gr.Checkbox(value, label=label, info=info, elem_id=name)
        most = self.longest if name == "max_new_tokens" else control.most
        value = min(max(value if control.start is None else control.start, control.least), most)
        on = not control.only or bool(getattr(self.defaults, control.only))
        if most - control.least > 10_000 * control.step:  # too many values for a slider
            bounds = {"precision": 0, "minimum": control.least, "maximum": most}
            return gr.Number(value, **bounds, label=label, info=info, elem_id=name, interactive=on)
        return gr.Slider(control.least, most, value, step=control.step, label=label, info=info, elem_id=name, interactive=on)

    def status(self, name: str) -> gr.Markdown:
        """A tab's status line: base, adapter and its chain, device and dtype, speed of the last answer."""
        self.parts[name] = gr.Markdown(self.handlers.status(self.names[-1]), elem_id=name, elem_classes="status")
        return self.parts[name]

    def draw_chat(self) -> None:
        """The chat tab: a conversation of many turns."""
        parts, labels = self.parts, self.labels
        parts["talk"], parts["wanted"] = gr.State(Talk()), gr.State(0)
        for name in ("sent", "file", "kept", "list_kept", "reopened"):
            parts[name] = gr.Textbox(visible=False)
        with gr.Row(equal_height=True, elem_id="kept_row"):
            parts["dialogues"] = gr.Dropdown([], label=labels.dialogues, scale=4, min_width=200, elem_id="dialogues")
            parts["name"] = gr.Textbox("", label=labels.name, max_length=200, scale=3, min_width=140, elem_id="name")
            new = gr.Button(labels.new, size="sm", scale=1, min_width=90, elem_id="new")
        with gr.Accordion(labels.system, open=False, elem_id="system_part"):
            persona = gr.Dropdown(list(labels.personas), value=None, label=labels.persona, elem_id="persona")
            parts["system"] = gr.Textbox(
                "", label=labels.system, placeholder=labels.system_hint, lines=2, max_lines=8, elem_id="system"
            )
        parts["chat"] = gr.Chatbot(
            label=labels.chat,
            show_label=False,
            height="52vh",
            editable="user",
            placeholder=labels.empty,
            buttons=["copy", "copy_all"],
            latex_delimiters=[{"left": left, "right": right, "display": own} for left, right, own in LATEX],
            elem_id="chat",
        )
        self.status("status")
        with gr.Row(equal_height=True):
            parts["question"] = self.box("question")
            send = gr.Button(labels.send, variant="primary", scale=1, min_width=76, elem_id="send")
            stop = gr.Button(labels.stop, scale=1, min_width=76, elem_id="stop")
        with gr.Row():
            go_on, again, clear, save, load = (
                gr.Button(getattr(labels, name), size="sm", min_width=60, elem_id=name)
                for name in ("go_on", "retry", "clear", "save", "load")
            )
        parts["unfinished"] = gr.Checkbox(False, label=labels.unfinished, container=False, elem_id="unfinished")
        answering = self.wire_chat(send, stop, go_on, again, clear, new)
        self.wire_files(save, load, answering)
        self.wire(parts["adapter"].change, self.handlers.show_adapter, ["status"], queue=False)
        persona.input(labels.personas.get, persona, parts["system"], **QUIET, queue=False)
        self.draw_tokens()
        self.offer([[text] for text, given in examples() if not given][:6], ["question"])

    def wire_chat(self, send: gr.Button, stop: gr.Button, go_on: gr.Button, again: gr.Button, clear: gr.Button, new: gr.Button):
        """Wire the buttons of the conversation; whatever changes it stops the growing answer."""
        parts, do, chat = self.parts, self.handlers, self.parts["chat"]
        growing = self.growing | {"trigger_mode": "multiple"}  # at once, without waiting for the stopped answer to end
        answering = self.wire(parts["wanted"].change, do.grow, ["chat", "status", "kept"], **growing)
        taken = ["wanted", "chat", "kept"]
        asked = self.wire(both(send.click, parts["question"].submit), do.ask, [*taken, "sent"], cancels=answering)
        asked.then(None, [parts["sent"], parts["question"]], parts["question"], js=SENT, api_visibility="private")
        for event, function in ((again.click, do.again), (chat.retry, do.retry), (go_on.click, do.go_on)):
            self.wire(event, function, taken, cancels=answering)
        self.wire(chat.edit, do.edit, [*taken, "question"], cancels=answering)
        self.wire(stop.click, do.stop, ["chat", "kept"], cancels=answering)
        for event in (clear.click, chat.clear):
            self.wire(event, do.clear, ["chat", "kept", "system", "name"], cancels=answering)
        self.wire(new.click, do.begin, ["chat", "kept", "name"], cancels=answering)
        self.wire(chat.undo, do.undo, ["chat", "kept", "question"], cancels=answering)
        if do.feedback:
            self.wire(chat.like, do.like, ["chat"])
        return answering

    def wire_files(self, save: gr.Button, load: gr.Button, answering: Any) -> None:
        """Wire conversations in files, and those that the browser keeps."""
        parts, do = self.parts, self.handlers
        saving = self.wire(save.click, do.save, ["file"])
        saving.then(None, parts["file"], js="(text) => dreamer.save(text, 'conversation.json')", api_visibility="private")
        picked = load.click(None, None, parts["file"], js="() => dreamer.load()", api_visibility="private")
        self.wire(picked.then, do.load, ["chat", "kept", "system"], cancels=answering)
        # in two steps: gradio (6.31) keeps one more copy per change of a component that the server both changes and reads
        kept = parts["kept"].change(None, parts["kept"], parts["list_kept"], js="(text) => dreamer.keep(text)", **QUIET)
        self.wire(kept.then, do.listed, ["dialogues"])
        chosen = parts["dialogues"].input(None, parts["dialogues"], parts["reopened"], js="(id) => dreamer.open(id)", **QUIET)
        self.wire(chosen.then, do.reopen, ["chat", "system", "name"], cancels=answering)
        for event in (parts["name"].submit, parts["name"].blur):
            self.wire(event, do.rename, ["kept"])

    def wire_kept(self, blocks: gr.Blocks) -> None:
        """Restore the conversation after a refresh."""
        parts = self.parts
        blocks.load(
            self.handlers.resume,
            [parts["talk"], parts["list_kept"], parts["kept"]],
            [parts[name] for name in ("chat", "system", "name", "dialogues", "adapter")],
            js="(talk) => [talk, dreamer.keep(''), dreamer.last()]",
            **QUIET,
        )

    def draw_tokens(self) -> None:
        """What the model reads: the prompt as text, and its tokens."""
        parts, labels = self.parts, self.labels
        with gr.Accordion(labels.tokens, open=False, elem_id="tokens_part"):
            show = gr.Button(labels.show_tokens, size="sm", elem_id="show_tokens")
            parts["counted"] = gr.Markdown(elem_id="counted")
            with gr.Row():
                for name in ("prompt", "token_list"):
                    parts[name] = self.answer_box(getattr(labels, name), name, min_width=250)
        self.wire(show.click, self.handlers.tokens, ["prompt", "token_list", "counted"])

    def draw_compare(self) -> None:
        """The compare tab: one question to several models, with their answers side by side."""
        parts, names = self.parts, self.names
        with gr.Row(equal_height=True):
            parts["compared_question"] = self.box("compared_question")
            send = gr.Button(self.labels.ask_all, variant="primary", scale=1, min_width=100, elem_id="ask_all")
            stop = gr.Button(self.labels.stop, scale=1, min_width=76, elem_id="stop_all")
        choices = [(self.handlers.shown(name), name) for name in names]
        first = [*names[: COLUMNS - 1], names[-1]] if len(names) > COLUMNS else names
        parts["answerers"] = gr.CheckboxGroup(choices, value=first, label=self.labels.answerers, elem_id="answerers")
        columns = [f"column_{place}" for place in range(len(names))]
        with gr.Row():
            for name, column in zip(names, columns, strict=True):
                label = self.handlers.shown(name)
                parts[column] = self.answer_box(label, column, visible=name in first, min_width=250)
        self.status("status_compare")
        self.wire(parts["answerers"].change, self.tabs.choose, columns, queue=False)
        ask = both(send.click, parts["compared_question"].submit)
        running = self.wire(ask, self.tabs.compare, [*columns, "status_compare"], **self.growing)
        stop.click(None, cancels=running, api_visibility="private")
        self.offer([[text] for text, given in examples() if not given][:6], ["compared_question"])
        self.draw_list()

    def draw_list(self) -> None:
        """A list of prompts to several models, with differences marked."""
        parts, labels = self.parts, self.labels
        with gr.Accordion(labels.prompts, open=False, elem_id="prompts_part"):
            parts["prompts"] = gr.Textbox(
                "", label=labels.prompts, info=labels.prompts_hint, lines=4, max_lines=12, elem_id="prompts"
            )
            with gr.Row():
                send = gr.Button(labels.ask_all, variant="primary", min_width=80, elem_id="ask_list")
                stop = gr.Button(labels.stop, min_width=80, elem_id="stop_list")
            parts["marked"] = gr.HTML(elem_id="marked", elem_classes="marked")
        running = self.wire(send.click, self.tabs.compare_list, ["marked"], **self.growing)
        stop.click(None, cancels=running, api_visibility="private")

    def draw_vote(self) -> None:
        """The vote tab: a question to two models whose names are shown after the vote."""
        parts, labels = self.parts, self.labels
        parts["duel"] = gr.State({})
        gr.Markdown(labels.vote_hint)
        with gr.Row(equal_height=True):
            parts["vote_question"] = self.box("vote_question")
            send = gr.Button(labels.send, variant="primary", scale=1, min_width=76, elem_id="send_vote")
            stop = gr.Button(labels.stop, scale=1, min_width=76, elem_id="stop_vote")
        with gr.Row():
            parts["left"] = self.answer_box(labels.left_answer, "left", min_width=250)
            parts["right"] = self.answer_box(labels.right_answer, "right", min_width=250)
        names = [f"vote_{vote}" for vote in VOTES]
        with gr.Row():
            for vote, name in zip(VOTES, names, strict=True):
                parts[name] = gr.Button(labels.votes[vote], interactive=False, min_width=110, elem_id=name)
        parts["voted"] = gr.Markdown(elem_id="voted")
        ask = both(send.click, parts["vote_question"].submit)
        running = self.wire(ask, self.tabs.duel, ["left", "right", "voted", *names], **self.growing)
        stop.click(None, cancels=running, api_visibility="private")
        for vote, name in zip(VOTES, names, strict=True):
            function = functools.partial(self.tabs.vote, vote=vote)
            parts[name].click(function, parts["duel"], [parts["voted"], *(parts[one] for one in names)], **QUIET)

    def draw_training(self, tab: gr.Tab) -> None:
        """The training tab: a run's loss, speed and time left, read from its log repeatedly while the tab is open."""
        parts, labels = self.parts, self.labels
        names = self.tabs.runs()
        parts["run"] = gr.Dropdown(names, value=names[0], label=labels.run, elem_id="run")
        parts["progress"] = gr.Markdown(elem_id="progress")
        parts["curve"] = gr.LinePlot(
            x=labels.step,
            y=labels.loss_axis,
            color=labels.curve,
            label=labels.loss_axis,
            show_label=False,  # its axis says the same, and a label would cut off the plot's lower edge
            height=320,
            elem_id="curve",
            buttons=[],
        )
        parts["evaluated"] = gr.Dataframe(
            headers=[labels.question, "", ""],
            label=labels.evaluated,
            type="array",
            wrap=True,
            interactive=False,
            visible=False,
            elem_id="evaluated",
        )
        timer = gr.Timer(POLLED, active=False)
        shown = ["progress", "curve", "evaluated"]
        for event in (parts["run"].change, timer.tick, tab.select):
            self.wire(event, self.tabs.show_run, shown)
        self.wire(tab.select, self.tabs.show_runs, ["run"])
        tab.select(lambda: gr.Timer(active=True), None, timer, **QUIET)

    def draw_task(self) -> None:
        """The single-instruction tab: an instruction and an input, as in the template, without a conversation."""
        parts, labels = self.parts, self.labels
        with gr.Row():
            with gr.Column(min_width=300):
                for name, lines, hint in (("instruction", 3, None), ("input", 4, labels.input_hint)):
                    parts[name] = gr.Textbox(
                        "",
                        label=getattr(labels, name),
                        placeholder=hint,
                        lines=lines,
                        max_lines=20,
                        elem_id=name,
                    )
                with gr.Row():
                    send = gr.Button(labels.send, variant="primary", min_width=80, elem_id="send_task")
                    stop = gr.Button(labels.stop, min_width=80, elem_id="stop_task")
            with gr.Column(min_width=300):
                parts["output"] = self.answer_box(labels.output, "output")
                self.status("status_task")
        running = self.wire(send.click, self.tabs.task, ["output", "status_task"], **self.growing)
        stop.click(None, cancels=running, api_visibility="private")
        self.offer([list(pair) for pair in examples() if pair[1]][:4], ["instruction", "input"])

    def box(self, name: str) -> gr.Textbox:
        """A growing one-line box for a question."""
        return gr.Textbox(
            "",
            label=self.labels.question,
            placeholder=self.labels.question_hint,
            show_label=False,
            container=False,
            max_lines=8,
            scale=8,
            min_width=140,
            elem_id=name,
        )

    def answer_box(self, label: str, name: str, **options: Any) -> gr.Textbox:
        """A field for an answer, as plain text."""
        return gr.Textbox(
            label=label,
            lines=12,
            max_lines=12,  # the rest scrolls, so that columns have the same height
            interactive=False,
            buttons=["copy"],
            elem_id=name,
            elem_classes="answer",
            **options,
        )

    def offer(self, rows: list[list[str]], names: list[str]) -> None:
        """Examples to click, if there are any."""
        if rows:
            boxes = [self.parts[name] for name in names]
            gr.Examples(rows, boxes, label=self.labels.examples, api_visibility="private", examples_per_page=len(rows))


def both(*triggers: Callable) -> Callable:
    """One event on several triggers."""
    return lambda **options: gr.on(list(triggers), **options)


def examples() -> list[tuple[str, str]]:
    """Short prompts of the evaluation set, one of each category in turn, as instruction and input.

    Prompts that should be refused are left out.
    """
    paths = [path for path in sorted(TEST_DATA.glob("*.json")) if "alignment" not in path.stem]
    files = [[r for r in read_records(path, need_output=False) if "history" not in r] for path in paths]
    in_turn = [found[place] for place in range(max(map(len, files), default=0)) for found in files if place < len(found)]
    pairs = [(record["instruction"], record["input"]) for record in in_turn]
    return [(asked, given) for asked, given in pairs if len(asked) <= 40 and len(given) <= 120]
