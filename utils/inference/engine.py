"""The engine behind batch runs and chat page: one base, any number of adapters on it, and one way to an answer."""

import contextlib
import functools
import hashlib
from collections.abc import Generator, Iterable, Iterator, Sequence

import psutil
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.adapters import switching
from utils.console import is_out_of_memory, say
from utils.datasets.chat_templates import Channels, ChatPrompter
from utils.datasets.encoding import encode_prompt
from utils.datasets.prompters import make_prompter
from utils.datasets.records import Record
from utils.datasets.templates import Prompter
from utils.inference.answerers import BASE, ChatModel, tokenizer_home
from utils.inference.decoding import Step, decode
from utils.inference.kv_cache import Ids
from utils.inference.sampling_params import SamplingParams
from utils.models.architecture import read_architecture, window_of
from utils.models.loading import check_vocabulary, load_base, without_values
from utils.models.placement import DeviceConfig
from utils.models.tokenizer import end_tokens, load_tokenizer, tell_ends
from utils.models.weights import base_folder

CACHE_SHARE = 0.5  # of the memory that the weights leave; the rest is for activations and other programs
CACHE_OF_WEIGHTS, SMALL_CACHE = 0.2, 1_500_000_000  # on a CPU: share of the weights' bytes, and a size that is small anywhere
MERGED_SHARE = 0.5  # likewise; larger merged weights would leave room for too few prompts at once


class Ending:
    """When an answer ends, and its readable text.

    An answer ends at one of the tokens `ends` or at one of the texts `stops`, such as the heading with which a model would
    write the next question itself.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: list[str],
        ends: Iterable[int],
        markers: frozenset[int] = frozenset(),
        channels: Channels | None = None,
    ):
        """`markers`: control tokens that stay in the text, since they mark tool calls; `channels`: the ids around the parts of
        an answer."""
        self.tokenizer, self.stops, self.markers = tokenizer, stops, markers
        self.channels = channels or Channels([], [], [])
        self.ends = frozenset(ends)
        self.tail = max((len(stop.encode()) for stop in stops), default=0) + 4  # a token has at least one byte
        self.lasts = {stop[-1] for stop in stops} | {"\ufffd"}  # \ufffd: part of a character, which may be one of these
        self.known: dict[int, bool] = {}  # which tokens can be the last of a stop string

    @classmethod
    def after(
        cls, prompter: Prompter | ChatPrompter | None, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], stops: list[str]
    ) -> "Ending":
        """How answers to the prompts of a template (None: to plain text) end; `ends` if it is not a chat template."""
        texts = [*(prompter.stop_strings if prompter else []), *stops]
        if isinstance(prompter, ChatPrompter):
            return cls(tokenizer, texts, prompter.ends, prompter.markers, prompter.channels)
        return cls(tokenizer, texts, ends)

    def __call__(self, ids: Ids) -> bool:
        if ids[-1] in self.ends:
            return True
        if ids[-1] not in self.known:
            self.known[ids[-1]] = bool(self.lasts.intersection(self._decode(ids[-1:])))
        if not self.known[ids[-1]]:
            return False  # so that the tail is decoded for few tokens only
        tail = self._decode(ids[-self.tail :])
        return any(stop in tail for stop in self.stops)

    def text(self, ids: Ids) -> str:
        """The whole answer, without what ended it, or the part of a character at which the token limit cut it."""
        whole = self._cut(self._read(ids))
        if self.ends.intersection(ids[-1:]) or not whole.endswith("\ufffd"):
            return whole.strip()
        # three tokens at most are a part of one character; where more than those cannot be read, the model gave no characters
        shorter = (self._cut(self._read(ids[:-part])) for part in range(1, min(4, len(ids))))
        return next((text for text in shorter if not text.endswith("\ufffd")), whole).strip()

    def so_far(self, ids: Ids) -> str:
        """The part of an unfinished answer that will not change: no partial characters, no beginning of a stop string."""
        text = self._cut(self._read(ids)).rstrip("\ufffd")
        held = max((size for stop in self.stops for size in range(len(stop)) if text.endswith(stop[:size])), default=0)
        return text[: len(text) - held].strip()

    def _cut(self, text: str) -> str:
        return text[: min([text.find(stop) for stop in self.stops if stop in text], default=len(text))]

    def _read(self, ids: Ids) -> str:
        """The text of an answer; a thought in its own channel becomes `<think>…</think>` before the reply."""
        thought, between, reply = self.channels
        if reply[: len(ids)] == ids[: len(reply)]:
            return self._decode(ids[len(reply) :])
        if not thought or thought[: len(ids)] != ids[: len(thought)]:
            return self._decode(ids)
        ids = ids[len(thought) :]
        places = range(len(ids) - len(between) + 1)
        end = next((place for place in places if ids[place : place + len(between)] == between), None)
        if end is None:  # the thought continues, or its end marker is incomplete
            held = next((size for size in range(len(between), 0, -1) if ids[-size:] == between[:size]), 0)
            return f"<think>\n{self._decode(ids[: len(ids) - held])}" if ids else ""
        return f"<think>\n{self._decode(ids[:end])}\n</think>\n\n{self._decode(ids[end + len(between) :])}"

    def _decode(self, ids: Ids) -> str:
        ids = ids[:-1] if ids and ids[-1] in self.ends else ids  # not every tokenizer marks it as special
        if self.markers.intersection(ids):
            known = self.tokenizer.added_tokens_decoder
            ids = [token for token in ids if token in self.markers or not (token in known and known[token].special)]
            return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Engine:
    """A base with its adapters, ready to answer as any of them; the base itself is always one of them.

    The weights are loaded when first needed; what tokenizer and configuration can tell comes before.
    Raises UserError if base, tokenizer or an adapter is broken, or they do not fit each other.
    """

    def __init__(
        self,
        base_model: str,
        answerers: Sequence[ChatModel],
        placement: DeviceConfig,
        stops: Sequence[str] = (),
        thinking: bool | None = None,
    ):
        """`stops`: texts that end each answer; `thinking`: the switch `enable_thinking` of chat templates."""
        self.base_model, self.placement, self.stops, self.thinking = base_model, placement, list(stops), thinking
        self.answerers = list(answerers)
        self.tokenizers = {one.name: load_tokenizer(tokenizer_home(one, base_model)) for one in self.answerers}
        self.ends = {name: end_tokens(base_model, tokenizer) for name, tokenizer in self.tokenizers.items()}
        self.prompters = {one.name: self.make_prompter(one.name, one.template) for one in self.answerers}
        for one in self.answerers:
            tell_ends(tokenizer_home(one, base_model), self.tokenizers[one.name], self.ending(one.name).ends)
        self.config = read_architecture(base_folder(base_model))
        empty = without_values(base_model)
        for tokenizer in self.tokenizers.values():
            check_vocabulary(empty, tokenizer, base_model)

    @functools.cached_property
    def loaded(self) -> tuple[PreTrainedModel, PeftModel | None]:
        """The base model, and the PEFT model wrapping it (None without adapters)."""
        base = load_base(self.base_model, self.tokenizers[self.answerers[0].name], self.placement)
        folders = {one.name: one.folder for one in self.answerers if one.folder}
        adapters = switching.attach(base, folders, self.base_model) if folders else None
        return base.eval(), adapters

    @property
    def model(self) -> PreTrainedModel:
        """The base, which computes as the answerer in use."""
        return self.loaded[0]

    @property
    def adapters(self) -> PeftModel | None:
        """The base with its adapters, to switch between them."""
        return self.loaded[1]

    @property
    def window(self) -> int | None:
        """The longest text of the model, in tokens; None if it has no such limit."""
        return window_of(self.config)

    @functools.cached_property
    def spare(self) -> int:
        """Bytes of memory that the weights leave.

        Counted from all memory, not from what is free now, so that plans based on it are reproducible.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        held = [tensor for tensor in tensors if not tensor.is_meta]  # meta tensors are read for each pass
        total = sum(map(memory_of, {tensor.device for tensor in held}))
        return max(total - sum(tensor.numel() * tensor.element_size() for tensor in held), 0)

    @property
    def room(self) -> int:
        """For how many tokens, over all rows of a computation, memory can hold keys and values."""
        return self.room_as(BASE)

    def room_as(self, name: str) -> int:
        """`room` while the answerer `name` is in use, whose weights may be merged."""
        return int((self.spare - self.merged_bytes(name)) * CACHE_SHARE / self.token_bytes)

    def batch_room(self, name: str) -> int:
        """`room_as` for a batch, which on a CPU leaves memory to other programs: keys and values take at most
        `CACHE_OF_WEIGHTS` of the weights' bytes, or `SMALL_CACHE` if that is more."""
        room = self.room_as(name)
        if self.placement.device.type != "cpu":
            return room
        most = max(CACHE_OF_WEIGHTS * self.model.get_memory_footprint(), SMALL_CACHE)
        return min(room, int(most / self.token_bytes))

    def merged_bytes(self, name: str) -> int:
        """Bytes of the merged weights of the answerer `name`; 0 if they are not merged.

        They are not if the base is quantized, or they would take more than `MERGED_SHARE` of the spare memory.
        """
        if self.adapters is None or name == BASE or self.placement.quantize:
            return 0
        size = switching.merged_bytes(self.adapters, name)
        return size if size <= MERGED_SHARE * self.spare else 0

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values."""
        config = self.model.config.get_text_config()
        queries = getattr(config, "num_attention_heads", None) or 1  # a state-space model has none
        heads = getattr(config, "num_key_value_heads", None) or queries
        heads = max(heads) if isinstance(heads, (list, tuple)) else heads
        size = getattr(config, "head_dim", None) or config.hidden_size // queries
        return 2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize

    def add(self, one: ChatModel) -> None:
        """Add an answerer. Raises UserError if its adapter is broken or does not fit the base."""
        assert one.folder is not None
        base, adapters = self.loaded
        tokenizer = load_tokenizer(tokenizer_home(one, self.base_model))
        ends = end_tokens(self.base_model, tokenizer)
        prompter = make_prompter(one.template, tokenizer, ends, self.thinking)
        check_vocabulary(base, tokenizer, self.base_model)
        self.__dict__["loaded"] = base, switching.attach(base, {one.name: one.folder}, self.base_model, adapters)
        self.prompters[one.name], self.tokenizers[one.name], self.ends[one.name] = prompter, tokenizer, ends
        self.answerers.append(one)

    def remove(self, name: str) -> None:
        """Unload an answerer and its adapter."""
        assert self.adapters is not None
        self.answerers = [one for one in self.answerers if one.name != name]
        self.use(BASE)
        self.adapters.delete_adapter(switching.key_of(name))
        del self.prompters[name], self.tokenizers[name], self.ends[name]

    def use(self, name: str) -> None:
        """Compute as the answerer `name` from now on."""
        if self.adapters:
            switching.activate(self.adapters, name if name != BASE else None)

    @contextlib.contextmanager
    def merged(self, name: str) -> Iterator[None]:
        """Compute as the answerer `name` while the block runs, with its weights merged into the base's if these are not
        quantized and memory has room. Afterwards the base has its own tensors back, bit for bit."""
        self.use(name)
        with contextlib.ExitStack() as stack:
            if self.adapters is not None and self.merged_bytes(name):
                try:
                    stack.enter_context(switching.merged(self.adapters, name))
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    say(f"{name}: no memory for merged weights; its adapter is computed separately")
            yield

    def make_prompter(self, name: str, template: str) -> Prompter | ChatPrompter:
        """The template of that name for the tokenizer of the answerer `name`."""
        return make_prompter(template, self.tokenizers[name], self.ends[name], self.thinking)

    def prompter(self, name: str, template: str = "") -> Prompter | ChatPrompter:
        """The template for the answerer `name`: its own, or another `template`."""
        return self.make_prompter(name, template) if template else self.prompters[name]

    def encode(self, name: str, record: Record, template: str = "") -> Ids:
        """The prompt ids of a record for the answerer `name`."""
        return encode_prompt(record, self.prompter(name, template), self.tokenizers[name])

    def ending(self, name: str, template: str | None = "", stops: Sequence[str] = ()) -> Ending:
        """How answers of `name` end: as the template says (None: there is none), or with one of `stops`."""
        prompter = None if template is None else self.prompter(name, template)
        return Ending.after(prompter, self.tokenizers[name], self.ends[name], [*self.stops, *stops])

    def answer(
        self, name: str, prompts: list[Ids], settings: SamplingParams, template: str | None = "", stops: Sequence[str] = ()
    ) -> Generator[Step]:
        """Answer `prompts` at once as `name` (which must be in use at each step).

        An answer has at most `max_new_tokens`, and prompt and answer together stay within the model's window.
        """
        limits, ending = [self.limit(prompt, settings) for prompt in prompts], self.ending(name, template, stops)
        return decode(self.model, prompts, limits, settings, ending, [seed(settings, ids) for ids in prompts])

    def limit(self, prompt: Ids, settings: SamplingParams) -> int:
        """The number of tokens that the answer to `prompt` may have; below 1 if the window has no room for any."""
        return settings.max_new_tokens if self.window is None else min(settings.max_new_tokens, self.window - len(prompt))


def memory_of(device: torch.device) -> int:
    """The total memory of a device, in bytes."""
    if device.type in ("cuda", "npu"):
        return int(getattr(torch, device.type).get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def seed(settings: SamplingParams, prompt: Ids) -> int:
    """A prompt's own seed, whatever prompts it is answered with."""
    return int.from_bytes(hashlib.sha256(f"{settings.seed} {prompt}".encode()).digest()[:7])
