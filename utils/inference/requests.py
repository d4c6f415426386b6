"""Many parallel requests to one model: each is journaled, none is paid for twice, failures are retried."""

import asyncio
import contextlib
import dataclasses
import random
import signal
import threading
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import openai

from utils.console import UserError, progress, say
from utils.inference.openai_client import (
    EXTENSIONS,
    Messages,
    ModelServer,
    Unusable,
    may_pass,
    reason_of,
    request_completion,
    retry_after,
    run_apart,
)
from utils.journal import Journal

TRIES = 8  # of one request, before the run is aborted
FIRST_TRIES = 2  # if the server has never responded, so that a wrong address shows within a second
LONGEST_WAIT = 3600.0  # seconds; for longer waits (a daily limit) the user should rerun
REFUSALS = 3  # if this many are refused and none answered, the settings are wrong, not the prompts
NOTICEABLE = 10.0  # seconds; longer waits are printed


@dataclasses.dataclass
class Spent:
    """What all requests under the same limits have used, earlier starts included: how many there were, their cost, and that of
    the dearest answer; the most that each of those under way may cost; and the cost of prompts that are announced but not yet
    being sent."""

    requests: int = 0
    cost: float = 0.0
    under_way: list[float] = dataclasses.field(default_factory=list)
    announced: float = 0.0
    dearest: float = 0.0

    def pay(self, cost: float) -> None:
        """Add the cost of an answer."""
        self.cost, self.dearest = self.cost + cost, max(self.dearest, cost)


@dataclasses.dataclass(frozen=True)
class RequestLimits:
    """Limits of requests: how many at once, how many in all (`budget`, None: no limit), prices per million tokens, and the
    highest cost (`max_cost`, None: no limit). They hold for all endpoints with these limits together.

    `backoff`: the first pause after a failure, in seconds.
    """

    concurrency: int = 4
    budget: int | None = None
    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float | None = None
    backoff: float = 1.0
    spent: Spent = dataclasses.field(default_factory=Spent)

    def cost(self, sent: float, received: float) -> float:
        """The cost of these numbers of tokens."""
        return (sent * self.price_in + received * self.price_out) / 1e6

    def cost_of(self, entry: dict[str, Any]) -> float:
        """The cost of an entry of a journal: of an answer by the server's counts, else estimated from its texts; of a failure,
        the most that it may have cost."""
        if "answer" not in entry:
            return entry.get("may_cost", 0.0)
        sent, received = entry["prompt_tokens"], entry["completion_tokens"]
        sent = tokens_of(entry.get("messages") or entry.get("prompt") or []) if sent is None else sent
        return self.cost(sent, tokens_in(entry["answer"]) if received is None else received)


class Reply(NamedTuple):
    """A reply: the text, and why it ended ("stop", "length", …; "refused" with the server's reason as text)."""

    text: str
    finish: str


class Stopped(Exception):
    """Ctrl-C was pressed."""


class Endpoint:
    """Asks the model of `service`; `journal` keeps each request with its answer or failure.

    Temporary failures are retried, after the pause that the server asks for, or growing ones.
    """

    def __init__(self, service: ModelServer, journal: Journal, terms: RequestLimits):
        self.service, self.journal, self.terms = service, journal, terms
        self.spent, self.announced = terms.spent, 0.0
        self.spent.requests += len(journal.values)
        for entry in journal.values.values():
            self.spent.pay(terms.cost_of(entry))
        self.settings = {"temperature": service.temperature, "max_tokens": service.max_tokens} | service.more
        self.stop: Exception | None = None
        self.reached, self.answered, self.refused = False, 0, 0
        self.priced = any("answer" in entry for entry in journal.values.values())  # what an answer costs here is known
        self.resume_at = 0.0

    def gather(self, jobs: Iterable[Coroutine[Any, Any, Any]], name: str) -> list[Any]:
        """Run jobs that call `ask` in parallel; returns their results in order.

        After the first error, or Ctrl-C, no more requests are sent, but those in flight are waited for, since they
        are paid for. Raises UserError if continuing is useless: a wrong key, model or address, an exhausted account,
        a used-up budget.
        """
        self.spent.announced, self.announced = self.spent.announced - self.announced, 0.0
        try:
            return run_apart(self._gather(list(jobs), name), self._interrupted)
        except (Stopped, asyncio.CancelledError):
            raise SystemExit(128 + signal.SIGINT) from None

    async def _gather(self, jobs: list[Coroutine], name: str) -> list[Any]:
        self.slots = asyncio.Semaphore(self.terms.concurrency)
        loop, this = asyncio.get_running_loop(), asyncio.current_task()
        before = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
        if before is not None:
            loop.add_signal_handler(signal.SIGINT, self._interrupted, this)
        bar = progress(total=len(jobs), desc=name)

        async def counted(job: Coroutine) -> Any:
            try:
                result = await job
            except Exception as error:
                self.stop = self.stop or error
                raise
            bar.update()
            return result

        try:
            async with self.service.connect() as self.client:
                results = await asyncio.gather(*map(counted, jobs), return_exceptions=True)
        finally:
            bar.close()
            if before is not None:
                loop.remove_signal_handler(signal.SIGINT)
                signal.signal(signal.SIGINT, before)
        if self.stop is None and self.refused and not self.answered:
            self.stop = UserError(f"{self.service.model}: refused every request; see {self.journal.path}")
        if self.stop is not None:
            raise self.stop
        return results

    def _interrupted(self, task: asyncio.Task | None = None) -> None:
        """Ctrl-C: once lets the requests in flight finish, twice drops them."""
        if self.stop is not None:
            if task is not None:
                task.cancel()
            return
        say("stopping: waiting for the requests in flight (Ctrl-C again drops them); the same command resumes from here")
        self.stop = Stopped()

    def announce(self, prompts: Mapping[str, str]) -> None:
        """Print about how many tokens the prompts not yet in the journal will take, and what they cost.

        Raises UserError if sending them, and what else is announced, costs more than the limit leaves: announce all before
        anything is sent.
        """
        left = [text for key, text in prompts.items() if key not in self.journal.values]
        sent = sum(map(tokens_in, left))
        received = len(left) * (self.service.max_tokens or 0)
        limit = f"up to {received:,} received" if received else "received tokens have no limit (--max_tokens)"
        text = f"{len(left)} requests to send, about {sent:,} tokens, {limit}"
        if self.terms.price_in or self.terms.price_out:
            text += f"; cost about {self.terms.cost(sent, 0):.4f} to {self.terms.cost(sent, received):.4f}"
        say(text)
        self.announced += self.terms.cost(sent, 0)
        self.spent.announced += self.terms.cost(sent, 0)
        if self.terms.max_cost is not None and self.spent.cost + self.spent.announced > self.terms.max_cost:
            raise UserError(
                f"--max_cost {self.terms.max_cost:g}: sending the prompts alone costs about {self.spent.announced:.4f}, "
                f"and {self.spent.cost:.4f} is spent; give fewer prompts or systems, or a higher limit"
            )

    async def ask(self, key: str, prompt: Messages | list[int]) -> Reply:
        """The answer to `prompt`, messages or token ids; from the journal if it has one under `key`."""
        if key not in self.journal.values:
            async with self.slots:
                refusal = await self._send(key, prompt)
            if refusal is not None:
                return Reply(refusal, "refused")
        self.answered += 1
        entry = self.journal.values[key]
        return Reply(entry["answer"], entry["finish"])

    async def _send(self, key: str, prompt: Messages | list[int]) -> str | None:
        """Send until there is an answer in the journal, or a refusal; returns the refusal's reason."""
        tries, most = 0, self._most(prompt)
        while True:
            held = await self._admitted(most)
            tries += 1
            settings = {name: value for name, value in self.settings.items() if value is not None}
            try:
                entry = await request_completion(self.client, self.service.model, prompt, settings)
            except (openai.APIError, Unusable) as error:
                self._failed(key, error, held)
                self._check_fatal(error)
                if self._adapted(error, settings):
                    continue
                if not may_pass(error):
                    self._count_refusal(error)
                    return reason_of(error)
                await self._wait(error, tries)
            else:
                self.reached = self.priced = True
                kind = "messages" if isinstance(prompt[0], dict) else "prompt"
                self.journal.put(key, {kind: prompt} | settings | entry)
                self.spent.pay(self.terms.cost_of(self.journal.values[key]))
                return None
            finally:
                self.spent.under_way.remove(held)

    def _most(self, prompt: Messages | list[int]) -> float:
        """The most that one answer to `prompt` may cost, as estimated; 0 if nothing is limited by it."""
        if self.terms.max_cost is None:
            return 0.0
        return self.terms.cost(tokens_of(prompt), self.service.max_tokens or 0)

    async def _admitted(self, most: float) -> float:
        """Wait until a request that may cost so much, or as much as the dearest yet, may be sent, and count it; returns that
        cost. One that might go beyond the limit waits for those under way, each of which may cost as much as the dearest, and
        until a first answer shows the cost, one is sent at a time. Raises what stopped the run, or UserError if a limit
        is reached."""
        await self._pause(0)
        limit, spent = self.terms.max_cost, self.spent
        while limit is not None and self.stop is None:
            most = max(most, spent.dearest)
            under_way = sum(max(cost, spent.dearest) for cost in spent.under_way)
            if spent.cost + under_way + most <= limit and (self.priced or not spent.under_way):
                break
            if not spent.under_way:
                self.stop = UserError(
                    f"--max_cost {limit:g}: {spent.cost:.4f} is spent, and the next answer may cost {most:.4f}; the answers "
                    f"are kept in {self.journal.path}, and the same command with a larger --max_cost resumes"
                )
            await asyncio.sleep(0.01)
        if self.stop is None and self.terms.budget is not None and spent.requests >= self.terms.budget:
            self.stop = UserError(
                f"--budget {self.terms.budget}: used up, {spent.requests} requests are sent; their answers are kept in "
                f"{self.journal.path}, and the same command with a larger --budget resumes"
            )
        if self.stop is not None:
            raise self.stop
        spent.requests += 1
        spent.under_way.append(most)
        return most

    def _failed(self, key: str, error: Exception, most: float) -> None:
        """Journal a request without an answer: it was sent; cut off or timed out, it may cost as much as `most`."""
        self.reached = self.reached or not isinstance(error, openai.APIConnectionError)
        number = sum(known.startswith(f"{key} failed ") for known in self.journal.values)
        entry: dict[str, Any] = {"error": reason_of(error)}
        if most and isinstance(error, Unusable | openai.APITimeoutError):
            entry["may_cost"] = most
        self.journal.put(f"{key} failed {number + 1}", entry)
        self.spent.pay(self.terms.cost_of(entry))

    def _check_fatal(self, error: Exception) -> None:
        """Stop the run if asking again is useless."""
        fixes = {
            401: "check OPENAI_API_KEY",
            403: "check what your key may do",
            404: "check the model's name and --api_base",
        }
        fix = fixes.get(getattr(error, "status_code", 0))
        if getattr(error, "code", None) == "insufficient_quota":
            fix = "top up the account, then the same command resumes"
        if fix:
            self._give_up(f"{self.service.model} at {self.service.url}: {reason_of(error)}; {fix}")

    def _give_up(self, why: str) -> None:
        """Stop sending requests. Raises UserError."""
        self.stop = self.stop or UserError(why)
        raise self.stop

    def _adapted(self, error: Exception, used: dict[str, Any]) -> bool:
        """True if the server refused a setting that can be left out, as reasoning models do; printed once."""
        named = (name for name in EXTENSIONS if name in used and name in reason_of(error))
        name = getattr(error, "param", None) or next(named, None)
        if not isinstance(error, (openai.BadRequestError, openai.UnprocessableEntityError)) or name not in used:
            return False
        if name == "max_tokens" and "max_completion_tokens" in reason_of(error):
            if name in self.settings:
                self.settings["max_completion_tokens"] = self.settings.pop(name)
                say(f"{self.service.model}: takes max_completion_tokens instead of max_tokens")
            return True
        if name in ("temperature", *EXTENSIONS):
            if self.settings.pop(name, None) is not None:
                say(f"{self.service.model}: does not take {name} {used[name]:g}; its default is used")
            return True
        return False

    def _count_refusal(self, error: Exception) -> None:
        self.refused += 1
        if not self.answered and self.refused >= REFUSALS:
            self._give_up(f"{self.service.model}: refuses every request ({reason_of(error)}); fix what it names")

    async def _wait(self, error: Exception, tries: int) -> None:
        """Sleep before the next try, as long as the server asks, else about twice as long as the last time."""
        if tries >= (TRIES if self.reached or isinstance(error, openai.APITimeoutError) else FIRST_TRIES):
            self._give_up(
                f"{self.service.url}: no answer after {tries} tries ({reason_of(error)}); "
                "check the server, then the same command resumes"
            )
        pause = retry_after(error)
        if pause is not None and pause > LONGEST_WAIT:
            self._give_up(f"{self.service.url}: asks to wait {pause / 3600:.1f} hours; after that the same command resumes")
        if pause is None:
            pause = min(60.0, self.terms.backoff * 2 ** (tries - 1)) * random.uniform(0.75, 1.25)
        if pause >= NOTICEABLE:
            say(f"{self.service.model}: {reason_of(error)}; waiting {pause:.0f} s")
        if isinstance(error, openai.RateLimitError):
            self.resume_at = max(self.resume_at, time.monotonic() + pause)  # the others would hit the same limit
        else:
            await self._pause(pause)

    async def _pause(self, seconds: float) -> None:
        """Sleep that long, and until the server takes requests again; wake up if the run is stopped."""
        until = time.monotonic() + seconds
        while self.stop is None and (left := max(until, self.resume_at) - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.2))


@contextlib.contextmanager
def asking(service: ModelServer, terms: RequestLimits, path: Path, header: dict[str, Any]) -> Iterator[Endpoint]:
    """An endpoint whose journal is the file `path`, which is kept as a record of every request; the same run resumes from it.

    At the end, even after an error, the usage is printed. Raises UserError if `path` belongs to a run with another `header`,
    model, address or settings.
    """
    header = header | {"model": service.model, "api_base": service.url}
    header |= {"temperature": service.temperature, "max_tokens": service.max_tokens}
    journal = Journal(path, header)
    if journal.values:
        say(f"{path}: {len(journal.values)} requests were sent before; their answers are reused")
    try:
        yield Endpoint(service, journal, terms)
    finally:
        journal.close(done=False)
        say(usage(journal, terms))


def tokens_in(text: str) -> int:
    """About how many tokens a text has: one per Chinese character, one per four others."""
    wide = sum(sign > "\u2e7f" for sign in text)
    return wide + (len(text) - wide + 3) // 4


def tokens_of(prompt: Messages | list[int]) -> int:
    """About how many tokens a prompt has, messages or token ids."""
    return sum(tokens_in(str(one.get("content", ""))) if isinstance(one, dict) else 1 for one in prompt)


def usage(journal: Journal, terms: RequestLimits) -> str:
    """A line about the requests, tokens and cost of a run, including its earlier starts."""
    answers = [entry for entry in journal.values.values() if "answer" in entry]
    sent, received = (sum(entry[f"{kind}_tokens"] or 0 for entry in answers) for kind in ("prompt", "completion"))
    failed = len(journal.values) - len(answers)
    text = f"{len(journal.values)} requests ({failed} failed), {sent:,} tokens sent and {received:,} received"
    uncounted = sum(entry["prompt_tokens"] is None for entry in answers)
    text += f" (not counted by the server: those of {uncounted} answers)" if uncounted else ""
    priced = terms.price_in or terms.price_out
    return text + (f", cost {sum(map(terms.cost_of, answers)):.4f}" if priced else "")
