"""Many requests on one engine: they join and leave a running batch at any token, each with its own answerer and settings.

One thread computes. A request's cache is kept for a while, so that the next turn of its dialogue, or another request with
the same opening, reads only what is new.
"""

import dataclasses
import functools
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable
from concurrent.futures import Future
from typing import Any

import torch

from utils.console import UserError, is_out_of_memory, reason
from utils.inference.decoding import Step, choose, penalize, penalties
from utils.inference.engine import Engine, seed
from utils.inference.kv_cache import WORTHWHILE, Ids, check_scores, common
from utils.inference.sampling_params import SamplingParams
from utils.inference.shared_forward import Part, SharedForward, Text

WAITING = 64  # requests in the queue; more are refused
AT_ONCE = 32  # answers that grow in parallel, if memory suffices
READ_AT_ONCE = 1280  # prompt tokens per pass while few answers grow; fewer passes over the weights are faster
READ_BESIDE = 256  # and if more grow than wait: few enough that they do not stall
KEPT = 0.5  # most memory for the caches of ended requests, as a share of the weights' size


class QueueFull(UserError):
    """Too many requests are waiting; another is refused."""

    def __init__(self) -> None:
        super().__init__(f"the queue is full: {WAITING} requests are waiting; ask again later")


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt's ids, which answerer is asked, and how. `asker`: who takes turns with others for a place in the batch.

    `exact` makes a seeded answer bit for bit independent of other requests, at some cost if there are none.
    """

    name: str
    prompt: Ids
    settings: SamplingParams
    template: str | None = ""  # None: the prompt is plain text, without a template
    asker: Hashable = None
    stops: tuple[str, ...] = ()
    exact: bool = False
    begun: tuple[int, ...] = ()  # the answer's first tokens, if it was cut and is continued


class Ticket:
    """A submitted request: its `answer` so far, and how it ended (`finish` "stop" or "length", or an `error`).

    `changed` is called, from the computing thread, whenever there is something new.
    """

    def __init__(self, request: Request, limit: int, ending: Callable[[Ids], bool], changed: Callable[[], None]):
        self.request, self.limit, self.ending, self.changed = request, limit, ending, changed
        self.answer: Ids = list(request.begun)
        self.steps = 0  # tokens computed, counting all beams
        self.finish, self.error = "", ""
        self.cancelled = self.running = False
        self.text: Text | None = None  # None until reading its prompt begins
        self.alone: Generator[Step] | None = None  # computes it if it cannot be computed with others
        self.processors = penalties(request.settings)
        self.generator = torch.Generator().manual_seed(seed(request.settings, self.ids))

    @property
    def over(self) -> bool:
        """True once nothing more will come."""
        return bool(self.finish or self.error or self.cancelled)

    @property
    def ids(self) -> Ids:
        """Prompt and answer."""
        return self.request.prompt + self.answer

    @property
    def need(self) -> int:
        """The most tokens whose keys and values its cache may have to hold."""
        return self.request.settings.num_beams * (len(self.request.prompt) + self.limit)

    def take(self, token: int) -> None:
        """Append a token, and check whether it is the last."""
        self.answer.append(token)
        self.steps += 1
        if self.ending(self.answer):
            self.finish = "stop"
        elif len(self.answer) >= self.limit:
            self.finish = "length"

    def end(self, error: str = "") -> None:
        """Announce that nothing more will come."""
        self.error = error or self.error
        if self.alone is not None:
            self.alone.close()
        self.changed()


class Scheduler:
    """Takes requests from any thread; computes them in its own."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.room = max(engine.room, 1)
        weights = engine.model.get_memory_footprint() / engine.token_bytes
        self.kept_columns = int(min(KEPT * weights, self.room / 4))
        self.forward = SharedForward(engine)
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []
        self.kept: deque[tuple[str, Text]] = deque()  # answerer and text, oldest first
        self.jobs: list[tuple[Callable[[], Any], Future, str]] = []
        self.news = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self.thread.start()

    # from any thread

    def submit(self, request: Request, changed: Callable[[], None]) -> Ticket:
        """Queue a request. Raises QueueFull."""
        ending = self.engine.ending(request.name, request.template, request.stops)
        limit = len(request.begun) + self.engine.limit([*request.prompt, *request.begun], request.settings)
        ticket = Ticket(request, limit, ending, changed)
        with self.news:
            if len(self.waiting) >= WAITING:
                raise QueueFull
            self.waiting.append(ticket)
            self.news.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Stop computing a request; its place becomes free at the next token."""
        with self.news:
            ticket.cancelled = True
            self.news.notify()

    def ahead(self, ticket: Ticket) -> int:
        """How many requests wait before this one; 0 once it is being computed."""
        with self.news:
            return self.waiting.index(ticket) if ticket in self.waiting else 0

    def call(self, job: Callable[[], Any], name: str = "") -> Any:
        """Run `job` between two tokens, once no request is answered as `name`; returns its result."""
        future: Future = Future()
        with self.news:
            self.jobs.append((job, future, name))
            self.news.notify()
        return future.result()

    def close(self) -> None:
        """End the thread; requests not answered by then get an error."""
        with self.news:
            self.closed = True
            self.news.notify()
        self.thread.join()

    # in the computing thread

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self.news:
                self.news.wait_for(lambda: self.running or self.waiting or self.jobs or self.closed)
                if self.closed:
                    break
                self._do_jobs()
                self._admit()
            self._round()
            for ticket in [ticket for ticket in self.running if ticket.over]:
                self._leave(ticket)
        for ticket in (*self.running, *self.waiting):
            ticket.end("the server is stopping")

    def _do_jobs(self) -> None:
        """Run the jobs whose answerer is not in use."""
        for entry in list(self.jobs):
            job, future, name = entry
            if any(ticket.request.name == name for ticket in self.running):
                continue
            self.jobs.remove(entry)
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

    def _admit(self) -> None:
        """Give free places to waiting requests: first to the asker with the fewest places, then to the earliest."""
        for ticket in [ticket for ticket in self.waiting if ticket.cancelled]:
            self.waiting.remove(ticket)
            ticket.end()
        going = {name for _, _, name in self.jobs}  # for these no new answers are started
        while len(self.running) < AT_ONCE:
            places = [ticket.request.asker for ticket in self.running]
            staying = [ticket for ticket in self.waiting if ticket.request.name not in going]
            first = min(staying, key=lambda ticket: places.count(ticket.request.asker), default=None)
            if first is None:
                return
            used = sum(ticket.need for ticket in self.running)
            if self.running and used + first.need > self.room - self.kept_columns:
                return
            self.waiting.remove(first)
            first.running = True
            self.running.append(first)
            first.changed()

    def _leave(self, ticket: Ticket) -> None:
        """Free a request's place, and keep its cache."""
        self.running.remove(ticket)
        if ticket.text is not None and not ticket.error:
            self.kept.append((ticket.request.name, ticket.text))
            while sum(text.columns for _, text in self.kept) > self.kept_columns:
                self.kept.popleft()
        ticket.end()

    def forget(self, name: str) -> None:
        """Drop the caches of an answerer; requests still waiting for it get an error."""
        for ticket in [ticket for ticket in self.waiting if ticket.request.name == name]:
            self.waiting.remove(ticket)
            ticket.end(f"{name}: was unloaded")
        self.forward.takes_turns.discard(name)
        self.kept = deque(entry for entry in self.kept if entry[0] != name)

    def _round(self) -> None:
        """Compute one token for each growing request, and read a part of the prompts of the others."""
        shared = [ticket for ticket in self.running if not ticket.over and self._is_shared(ticket)]
        turns = self.forward.takes_turns
        groups = [[ticket for ticket in shared if ticket.request.name not in turns]]
        groups += [[ticket for ticket in shared if ticket.request.name == name] for name in sorted(turns)]
        for group in filter(None, groups):
            self._guarded(group, self._grow)
        for ticket in [ticket for ticket in self.running if not ticket.over and ticket not in shared]:
            self._guarded([ticket], self._grow_alone)

    def _is_shared(self, ticket: Ticket) -> bool:
        return self.forward.works and ticket.request.settings.num_beams == 1

    def _guarded(self, tickets: list[Ticket], work: Callable[[list[Ticket]], None]) -> None:
        """Do `work`; if it fails, its requests get the error, and the others continue."""
        try:
            work(tickets)
        except UserError as error:
            for ticket in tickets:
                ticket.error = str(error)
        except Exception as error:
            if is_out_of_memory(error):
                self._make_room(tickets)
                return
            traceback.print_exc()
            for ticket in tickets:
                ticket.error = f"internal error ({reason(error)})"

    def _make_room(self, tickets: list[Ticket]) -> None:
        """After memory ran out: drop the kept caches; if there are none, give up the latest request."""
        if self.kept and tickets[-1].alone is None:
            self.kept.clear()
        else:
            tickets[-1].error = "out of memory; ask again later, with fewer beams or a shorter conversation"
        for ticket in tickets:
            ticket.text = None  # some layers may have grown and others not, so read again
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _grow(self, tickets: list[Ticket]) -> None:
        """One pass over the new tokens of all `tickets`."""
        parts: list[tuple[Ticket, Part]] = []
        begun: list[Ticket] = []
        reading = sum(not ticket.steps for ticket in tickets)
        left = READ_AT_ONCE if 2 * reading >= len(tickets) else READ_BESIDE
        for ticket in tickets:
            if ticket.text is None:
                if left <= 0 or self._is_being_read(ticket, begun):
                    continue
                ticket.text = self._open(ticket)
            ids = ticket.ids[len(ticket.text.ids) :]
            if len(ids) > 1:
                begun.append(ticket)
                ids = ids[: max(left, 0)]
                left -= len(ids)
            if ids:
                parts.append((ticket, Part(ticket.text, ids, ticket.request.name)))
        scores = self.forward([part for _, part in parts], exact=any(ticket.request.exact for ticket, _ in parts))
        for row, (ticket, part) in enumerate(parts):
            if len(part.text.ids) == len(ticket.ids):
                self._guarded([ticket], functools.partial(self._choose, scores[row : row + 1]))

    def _choose(self, scores: torch.Tensor, tickets: list[Ticket]) -> None:
        """Append to a request the token that its settings choose from `scores`, (1, vocabulary)."""
        (ticket,) = tickets
        check_scores(scores)
        own = penalize(scores, [ticket.ids], ticket.processors)
        ticket.take(choose(own, ticket.request.settings, [ticket.generator])[0])
        ticket.changed()

    def _grow_alone(self, tickets: list[Ticket]) -> None:
        """One step of a request that is computed separately."""
        (ticket,) = tickets
        request = ticket.request
        self.engine.use(request.name)
        if ticket.alone is None:
            asked = [*request.prompt, *request.begun]
            ticket.alone = self.engine.answer(request.name, [asked], request.settings, request.template, request.stops)
        step = next(ticket.alone)
        ticket.steps += step.rows
        ticket.answer = [*request.begun, *(step.finished or step.running).get(0, [])]
        if step.finished:
            ticket.finish = "stop" if ticket.ending(ticket.answer) else "length"
        ticket.changed()

    def _is_being_read(self, ticket: Ticket, begun: Iterable[Ticket]) -> bool:
        """True if another request is reading more of the prompt's opening than is known, so that waiting is better."""
        name, prompt = ticket.request.name, ticket.request.prompt
        same = [common(prompt, other.request.prompt) for other in begun if other.request.name == name]
        return bool(same) and max(same) >= WORTHWHILE + max(shared for shared, _, _ in self._openings(ticket))

    def _openings(self, ticket: Ticket) -> list[tuple[int, bool, Text]]:
        """What is known of a prompt's opening: how many tokens, whether their text can be reused, and the text."""
        name, prompt = ticket.request.name, ticket.request.prompt
        found = [(common(prompt, text.ids), True, text) for one, text in self.kept if one == name]
        texts = [other.text for other in self.running if other.text is not None and other.request.name == name]
        return found + [(common(prompt, text.ids), False, text) for text in texts]

    def _open(self, ticket: Ticket) -> Text:
        """The text that a request will extend: with as much of its prompt's opening as is known.

        A kept text that would lose little is reused; of any other, the part is copied. At least one token is left to
        compute, since its scores are needed.
        """
        shared, kept, text = max(self._openings(ticket), key=lambda known: known[:2], default=(0, False, Text()))
        shared = min(shared, len(ticket.request.prompt) - 1)
        if shared < WORTHWHILE:
            return Text()
        if kept and shared >= 0.75 * len(text.ids):
            self.kept = deque(entry for entry in self.kept if entry[1] is not text)
            text.cut(shared)
            return text
        return text.opening(shared)
