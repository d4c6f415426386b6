"""What the chat page shows: its components, and which of them each function gets, by name."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from utils.chat_handlers import Handlers
from utils.chat_labels import Labels
from utils.conversations import Talk
from utils.decoding import Settings
from utils.prompter import TEMPLATES
from utils.records import read_records
from utils.serving import MOST_CHARACTERS, Service

TEST_DATA = Path(__file__).parent.parent / "test_data"
KNOBS = (
    "max_new_tokens",
    "num_beams",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
)
COLUMNS = 4  # answerers that are compared unless others are chosen
FONTS = ["system-ui", "-apple-system", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]
STYLE = """
.gradio-container {max-width: 1440px !important; margin: 0 auto}
#settings {gap: 8px}
#head h1 {margin: 0; font-size: 1.6rem}
#head p {margin: 0; opacity: .7}
#status {font-size: .85rem; opacity: .85}
.answer textarea {line-height: 1.6}
"""
SAVE = """(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = "conversation.json";
  link.click();
  URL.revokeObjectURL(link.href);
}"""
LOAD = """() => new Promise((resolve) => {
  const input = document.createElement("input");
  input.type = "file";
  input.accept = ".json,.jsonl";
  input.onchange = async () => resolve(await input.files[0].text());
  input.oncancel = () => resolve("");
  input.click();
})"""


def build(service: Service, defaults: Settings, labels: Labels) -> gr.Blocks:
    """The page, not yet listening."""
    page = Page(service, defaults, labels)
    with gr.Blocks(title=labels.title, analytics_enabled=False) as blocks:
        with gr.Row():
            main = gr.Column(scale=4, min_width=340)
            with gr.Column(scale=1, min_width=280, elem_id="settings"):
                page.draw_settings()
        with main:
            gr.Markdown(f"# {labels.title}\n{labels.subtitle}", elem_id="head")
            page.draw_status()
            with gr.Tab(labels.chat, id="chat"):
                page.draw_chat()
            if len(page.names) > 1:
                with gr.Tab(labels.compare, id="compare"):
                    page.draw_compare()
            with gr.Tab(labels.task, id="task"):
                page.draw_task()
        gr.api(page.handlers.api_answer, api_name="answer", **page.growing)
        gr.api(page.handlers.api_answerers, api_name="answerers")
    return blocks


class Page:
    """The components of the page, by name."""

    def __init__(self, service: Service, defaults: Settings, labels: Labels):
        self.handlers, self.labels = Handlers(service, labels), labels
        self.defaults, self.bounds = defaults, service.bounds
        self.names = list(self.handlers.answerers)
        self.parts: dict[str, Any] = {}
        self.growing: dict[str, Any] = {"concurrency_id": "answers", "concurrency_limit": service.at_once}

    def wire(self, event: Callable, function: Callable, outputs: list[str], **options: Any) -> Any:
        """Call `function` on `event`, with the components of its parameters' names, and the whole panel for `**knobs`."""
        names: list[str] = []
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                names += KNOBS
            elif name != "event":
                names.append(name)
        inputs = {name: self.parts[name] for name in names}
        options = {"api_visibility": "private", "show_progress": "hidden"} | options
        return event(fn=function, outputs=[self.parts[name] for name in outputs], inputs_kwargs=inputs, **options)

    def draw_settings(self) -> None:
        """The panel beside the page."""
        labels, parts = self.labels, self.parts
        gr.Markdown(f"### {labels.settings}")
        choices = [(self.handlers.shown(name), name) for name in self.names]
        parts["adapter"] = gr.Dropdown(choices, value=self.names[-1], label=labels.adapter, elem_id="adapter")
        templates = sorted(path.stem for path in TEMPLATES.glob("*.json"))
        choices = [(labels.own_template, ""), *((name, name) for name in templates)]
        parts["template"] = gr.Dropdown(choices, value="", label=labels.template, elem_id="template")
        longest = int(self.bounds["max_new_tokens"][1])
        parts["max_new_tokens"] = self.slider("max_new_tokens", 1, min(512, longest))
        parts["num_beams"] = self.slider("num_beams", 1, 1, labels.num_beams_info)
        parts["do_sample"] = gr.Checkbox(
            self.defaults.do_sample, label=labels.do_sample, info=labels.do_sample_info, elem_id="do_sample"
        )
        for name, step in (("temperature", 0.01), ("top_p", 0.01), ("top_k", 1), ("repetition_penalty", 0.01)):
            parts[name] = self.slider(name, step, getattr(self.defaults, name))

    def slider(self, name: str, step: float, value: float, info: str | None = None) -> gr.Slider:
        """A setting with its bounds."""
        least, most = self.bounds[name]
        value = min(max(value, least), most)
        return gr.Slider(least, most, value, step=step, label=getattr(self.labels, name), info=info, elem_id=name)

    def draw_status(self) -> None:
        """One line: base, adapter and what it was trained on, device and type, speed of the last answer."""
        self.parts["status"] = gr.Markdown(self.handlers.status(self.names[-1]), elem_id="status")
        self.wire(self.parts["adapter"].change, self.handlers.show_adapter, ["status"], queue=False)

    def draw_chat(self) -> None:
        """A conversation of many turns."""
        parts = self.parts
        parts["talk"], parts["wanted"] = gr.State(Talk()), gr.State(0)
        parts["chat"] = gr.Chatbot(
            show_label=False,
            height="52vh",
            editable="user",
            placeholder=self.labels.empty,
            buttons=["copy", "copy_all"],
            feedback_options=None,
            elem_id="chat",
        )
        with gr.Row(equal_height=True):
            parts["question"] = self.box("question")
            send = gr.Button(self.labels.send, variant="primary", scale=1, min_width=76, elem_id="send")
            stop = gr.Button(self.labels.stop, variant="stop", scale=1, min_width=76, elem_id="stop")
        with gr.Row():
            again, clear, save, load = (
                gr.Button(getattr(self.labels, name), size="sm", min_width=60, elem_id=name)
                for name in ("retry", "clear", "save", "load")
            )
        self.wire_chat(send, stop, again, clear, save, load)
        self.offer([[text] for text, given in examples() if not given][:6], ["question"])

    def wire_chat(self, send: gr.Button, stop: gr.Button, again: gr.Button, clear: gr.Button, save: gr.Button, load: gr.Button):
        """What the buttons of the conversation do; whatever changes it stops the answer that is being written."""
        parts, do = self.parts, self.handlers
        growing = self.growing | {"trigger_mode": "multiple"}  # at once, not when the answer that is stopped has ended
        answering = self.wire(parts["wanted"].change, do.grow, ["chat", "status"], **growing)
        asking = ((both(send.click, parts["question"].submit), do.ask), (again.click, do.again))
        for event, function in (*asking, (parts["chat"].retry, do.retry), (parts["chat"].edit, do.edit)):
            self.wire(event, function, ["wanted", "chat", "question"], cancels=answering)
        stop.click(None, cancels=answering, api_visibility="private")
        for event in (clear.click, parts["chat"].clear):
            self.wire(event, do.clear, ["chat"], cancels=answering)
        self.wire(parts["chat"].undo, do.undo, ["chat", "question"], cancels=answering)
        parts["file"] = gr.Textbox(visible=False)
        self.wire(save.click, do.save, ["file"]).then(None, parts["file"], js=SAVE, api_visibility="private")
        picked = load.click(None, None, parts["file"], js=LOAD, api_visibility="private")
        self.wire(picked.then, do.load, ["chat"], cancels=answering)

    def draw_compare(self) -> None:
        """One question to several, their answers beside each other."""
        parts, names = self.parts, self.names
        with gr.Row(equal_height=True):
            parts["compared_question"] = self.box("compared_question")
            send = gr.Button(self.labels.ask_all, variant="primary", scale=1, min_width=100, elem_id="ask_all")
            stop = gr.Button(self.labels.stop, variant="stop", scale=1, min_width=76, elem_id="stop_all")
        choices = [(self.handlers.shown(name), name) for name in names]
        first = [*names[: COLUMNS - 1], names[-1]] if len(names) > COLUMNS else names
        parts["answerers"] = gr.CheckboxGroup(choices, value=first, label=self.labels.answerers, elem_id="answerers")
        columns = [f"column_{place}" for place in range(len(names))]
        with gr.Row():
            for name, column in zip(names, columns, strict=True):
                label = self.handlers.shown(name)
                parts[column] = self.answer_box(label, column, visible=name in first, min_width=250)
        self.wire(parts["answerers"].change, self.handlers.choose, columns, queue=False)
        ask = both(send.click, parts["compared_question"].submit)
        running = self.wire(ask, self.handlers.compare, [*columns, "status"], **self.growing)
        stop.click(None, cancels=running, api_visibility="private")
        self.offer([[text] for text, given in examples() if not given][:6], ["compared_question"])

    def draw_task(self) -> None:
        """An instruction and an input, as in the template, without a conversation."""
        parts, labels = self.parts, self.labels
        with gr.Row():
            with gr.Column(min_width=300):
                for name, lines, hint in (("instruction", 3, None), ("input", 4, labels.input_hint)):
                    parts[name] = gr.Textbox(
                        label=getattr(labels, name),
                        placeholder=hint,
                        lines=lines,
                        max_lines=20,
                        max_length=MOST_CHARACTERS,
                        elem_id=name,
                    )
                with gr.Row():
                    send = gr.Button(labels.send, variant="primary", min_width=80, elem_id="send_task")
                    stop = gr.Button(labels.stop, variant="stop", min_width=80, elem_id="stop_task")
            with gr.Column(min_width=300):
                parts["output"] = self.answer_box(labels.output, "output")
        running = self.wire(send.click, self.handlers.task, ["output", "status"], **self.growing)
        stop.click(None, cancels=running, api_visibility="private")
        self.offer([list(pair) for pair in examples() if pair[1]][:4], ["instruction", "input"])

    def box(self, name: str) -> gr.Textbox:
        """A line for a question, which grows."""
        return gr.Textbox(
            placeholder=self.labels.question_hint,
            show_label=False,
            container=False,
            max_lines=8,
            max_length=MOST_CHARACTERS,
            scale=8,
            min_width=140,
            elem_id=name,
        )

    def answer_box(self, label: str, name: str, **options: Any) -> gr.Textbox:
        """A field for an answer, as plain text."""
        return gr.Textbox(
            label=label,
            lines=12,
            max_lines=12,  # the rest scrolls, so that columns stay of one height
            interactive=False,
            buttons=["copy"],
            elem_id=name,
            elem_classes="answer",
            **options,
        )

    def offer(self, rows: list[list[str]], names: list[str]) -> None:
        """Examples to click, where there are any."""
        if rows:
            boxes = [self.parts[name] for name in names]
            gr.Examples(rows, boxes, label=self.labels.examples, api_visibility="private", examples_per_page=len(rows))


def both(*triggers: Callable) -> Callable:
    """One event on several triggers."""
    return lambda **options: gr.on(list(triggers), **options)


def examples() -> list[tuple[str, str]]:
    """Short prompts of the evaluation set, one of each category in turn, as instruction and input.

    Those that ask for a refusal stay out: they are no suggestions.
    """
    paths = [path for path in sorted(TEST_DATA.glob("*.json")) if "alignment" not in path.stem]
    files = [[r for r in read_records(path, need_output=False) if "history" not in r] for path in paths]
    in_turn = [found[place] for place in range(max(map(len, files), default=0)) for found in files if place < len(found)]
    pairs = [(record["instruction"], record["input"]) for record in in_turn]
    return [(asked, given) for asked, given in pairs if len(asked) <= 40 and len(given) <= 120]
