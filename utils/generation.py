"""The engine behind batch and page: one base, any number of adapters on it, and one way to an answer."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils import switching
from utils.answerers import BASE, Answerer
from utils.console import UserError
from utils.decoding import Settings, Step, decode
from utils.encoding import encode_prompt
from utils.modeling import Placement, check_vocabulary, load_base, read_architecture
from utils.prompter import Prompter
from utils.rows import Ids
from utils.tokenizer import load_tokenizer
from utils.weights import base_folder

CACHE_SHARE = 0.5  # of the memory that the weights leave: the rest is for activations, and for others


class Ending:
    """When an answer is over, and what of its ids a person reads.

    An answer ends at the end of sequence, or where the model starts to write the next question itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.tail = max((len(stop.encode()) for stop in stops), default=0) + 4  # a token is a byte at least
        self.lasts = {stop[-1] for stop in stops} | {"\ufffd"}  # or a part of a character, which may be one of these
        self.known: dict[int, bool] = {}  # which tokens can be the last of a stop string

    def __call__(self, ids: Ids) -> bool:
        if ids[-1] == self.tokenizer.eos_token_id:
            return True
        if ids[-1] not in self.known:
            self.known[ids[-1]] = bool(self.lasts.intersection(self._decode(ids[-1:])))
        if not self.known[ids[-1]]:
            return False  # so that a tail is decoded for few tokens only
        tail = self._decode(ids[-self.tail :])
        return any(stop in tail for stop in self.stops)

    def text(self, ids: Ids) -> str:
        """The whole answer, without what ended it."""
        return self._cut(self._decode(ids)).strip()

    def so_far(self, ids: Ids) -> str:
        """What of an unfinished answer is sure to stay: no half characters, no beginning of a stop string."""
        text = self._cut(self._decode(ids)).rstrip("\ufffd")
        held = max((size for stop in self.stops for size in range(len(stop)) if text.endswith(stop[:size])), default=0)
        return text[: len(text) - held].strip()

    def _cut(self, text: str) -> str:
        return text[: min([text.find(stop) for stop in self.stops if stop in text], default=len(text))]

    def _decode(self, ids: Ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Engine:
    """A base with its adapters, ready to answer as any of them; the base itself is always one of them.

    The weights are loaded when they are first needed: what can be told from tokenizer and configuration comes before.
    Raises UserError where base, tokenizer or an adapter is broken, or they do not fit each other.
    """

    def __init__(self, base_model: str, answerers: Sequence[Answerer], placement: Placement):
        self.base_model, self.placement = base_model, placement
        self.answerers = list(answerers)
        self.prompters = {one.name: Prompter(one.template) for one in self.answerers}
        self.tokenizers = {one.name: load_tokenizer(tokenizer_home(one, base_model)) for one in self.answerers}
        self.config = read_architecture(base_folder(base_model))

    @functools.cached_property
    def loaded(self) -> tuple[PreTrainedModel, PeftModel | None]:
        """The base, and it with the adapters where there are any."""
        base = load_base(self.base_model, self.tokenizers[self.answerers[0].name], self.placement)
        if getattr(base, "_is_stateful", False):
            kind = self.config.model_type
            raise UserError(
                f"{self.base_model}: {kind} keeps a state instead of a cache, which is not supported; choose another base"
            )
        folders = {one.name: one.folder for one in self.answerers if one.folder}
        adapters = switching.attach(base, folders, self.base_model) if folders else None
        for tokenizer in self.tokenizers.values():
            check_vocabulary(base, tokenizer, self.base_model)
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
        """The longest text, in tokens, that the model was made for; None where it has no such limit, as BLOOM."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def room(self) -> int:
        """For how many tokens, over all rows of a computation, memory can hold keys and values.

        Counted from all the memory there is, not from what is free now, so that a plan made of it can be made again.
        """
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize
        if self.model.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.model.device).total_memory
        else:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return int(max(total - self.model.get_memory_footprint(), 0) * CACHE_SHARE / token)

    def use(self, name: str) -> None:
        """Compute as the answerer `name` from here on."""
        if self.adapters:
            switching.activate(self.adapters, name if name != BASE else None)

    @contextlib.contextmanager
    def merged(self, name: str) -> Iterator[None]:
        """Compute as the answerer `name` while the block runs, its weights added into the base's where these are not
        quantised. Afterwards the base has its own tensors back, bit for bit."""
        self.use(name)
        if self.adapters is None or name == BASE or self.placement.quantise:
            yield
        else:
            with switching.merged(self.adapters, name):
                yield

    def prompter(self, name: str, template: str = "") -> Prompter:
        """The template to ask the answerer `name` with: its own, or another `template`."""
        return Prompter(template) if template else self.prompters[name]

    def encode(self, name: str, record: dict[str, Any], template: str = "") -> Ids:
        """The ids to ask the answerer `name` a record with."""
        return encode_prompt(record, self.prompter(name, template), self.tokenizers[name])

    def ending(self, name: str, template: str = "") -> Ending:
        """How answers of `name` end."""
        return Ending(self.tokenizers[name], self.prompter(name, template).stop_strings)

    def answer(self, name: str, prompts: list[Ids], settings: Settings, template: str = "") -> Generator[Step]:
        """Answer `prompts` at once as `name` (which must be in use at each step); what page and batch both call.

        An answer has at most `max_new_tokens`, and prompt and answer together stay within the model's window.
        """
        limits, ending = [self.limit(prompt, settings) for prompt in prompts], self.ending(name, template)
        return decode(self.model, prompts, limits, settings, ending, [seed(settings, ids) for ids in prompts])

    def limit(self, prompt: Ids, settings: Settings) -> int:
        """The number of tokens that the answer to `prompt` may have; below 1 where the window has no room for any."""
        return settings.max_new_tokens if self.window is None else min(settings.max_new_tokens, self.window - len(prompt))


def tokenizer_home(answerer: Answerer, base_model: str) -> str | Path:
    """The folder of an answerer's tokenizer: the adapter's own where it has one, else the base's."""
    if answerer.folder and any((answerer.folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return answerer.folder
    return base_model


def seed(settings: Settings, prompt: Ids) -> int:
    """A prompt's own seed, the same in whatever company it is answered."""
    return int.from_bytes(hashlib.sha256(f"{settings.seed} {prompt}".encode()).digest()[:7])


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch raises when a device, or the machine, has no more memory to give."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )
