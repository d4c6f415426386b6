"""Many requests on one engine: answered in company as alone, places shared fairly, caches used again."""

import dataclasses
import threading
import time

import pytest
import tiny
import torch

from utils.inference.answerers import resolve, with_base
from utils.inference.engine import Engine
from utils.inference.sampling_params import SamplingParams
from utils.inference.scheduler import AT_ONCE, QueueFull, Request, Scheduler
from utils.inference.shared_forward import Part, SharedForward, Text
from utils.models.placement import place

GREEDY = SamplingParams(num_beams=1, max_new_tokens=24)
DRAWN = SamplingParams(num_beams=1, max_new_tokens=24, do_sample=True, temperature=1.5, top_p=0.95, top_k=0, seed=7)


@pytest.fixture(name="folder", scope="module")
def fixture_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.llama(folder / "llama")
    tiny.mistral(folder / "mistral")
    tiny.bloom(folder / "bloom")
    tiny.adapter(folder / "llama", folder / "f1", 1)
    tiny.adapter(folder / "llama", folder / "embedded", 2, modules_to_save=["embed_tokens", "lm_head"])
    tiny.adapter(folder / "llama", folder / "dora", 3, use_dora=True)
    return folder


def engine_of(folder, base, *adapters):
    return Engine(*answering(folder, base, adapters), place(False, False))


def answering(folder, base, adapters):
    name, answerers = resolve(str(folder / base), [str(folder / one) for one in adapters], "")
    return name, with_base(answerers)


@pytest.fixture(name="scheduler", scope="module")
def fixture_scheduler(folder):
    scheduler = Scheduler(engine_of(folder, "llama", "f1", "embedded", "dora"))
    yield scheduler
    scheduler.close()


@pytest.fixture(name="read")
def fixture_read(scheduler):
    """How many tokens each pass of the model reads, from now on."""
    found = []
    hook = scheduler.engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    yield found
    hook.remove()


def prompt_of(engine, name, number):
    return engine.encode(name, {"instruction": "问题" * (1 + 3 * number % 11) + str(number)})


def answers(scheduler, requests):
    """What each is answered, all asked before the first is computed."""
    done = threading.Semaphore(0)
    tickets = []

    def submit():  # between two tokens, so that they are one batch from the start
        tickets.extend(scheduler.submit(request, lambda: None) for request in requests)

    with scheduler.news:
        submit()
    for ticket in tickets:
        ticket.changed = done.release
    while not all(ticket.finish or ticket.error for ticket in tickets):
        done.acquire(timeout=1)
    assert not any(ticket.error for ticket in tickets)
    return [ticket.answer for ticket in tickets]


def plainly(engine, name, prompt, settings):
    """What the engine answers to one prompt that has it to itself."""
    engine.use(name)
    return [step for step in engine.answer(name, [prompt], settings)][-1].finished[0]


@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_in_company_each_is_answered_as_alone(scheduler, settings, read):
    """Four answerers in one batch, one of whom can only take turns; each with a prompt and length of its own."""
    names = ["base", "f1", "embedded", "dora"] * 3
    requests = [
        Request(name, prompt_of(scheduler.engine, name, number), settings, exact=True) for number, name in enumerate(names)
    ]
    together = answers(scheduler, requests)
    assert scheduler.forward.takes_turns == {"dora"}
    scheduler.call(lambda: scheduler.kept.clear())
    read.clear()
    alone = [answers(scheduler, [request])[0] for request in requests]
    assert together == alone and min(read) >= 16, "the bits of a row do not depend on others from so many on"
    assert len({tuple(answer) for answer in together}) == len(names)
    expected = scheduler.call(lambda: [plainly(scheduler.engine, r.name, r.prompt, r.settings) for r in requests])
    assert together == expected


@pytest.mark.parametrize("family", ["mistral", "bloom"])
def test_windows_are_kept_and_who_cannot_share_takes_turns(folder, family):
    engine = engine_of(folder, family)
    scheduler = Scheduler(engine)
    requests = [Request("base", prompt_of(engine, "base", number), GREEDY) for number in range(5)]
    assert answers(scheduler, requests) == scheduler.call(lambda: [plainly(engine, "base", r.prompt, GREEDY) for r in requests])
    assert scheduler.forward.works == (family == "mistral")
    with scheduler.news:
        left = [scheduler.submit(request, lambda: None) for request in requests[:1] * (AT_ONCE + 3)]
    scheduler.close()
    assert {ticket.error for ticket in left} == {"the server is stopping"}


def test_beams_run_beside_the_others(scheduler):
    beams = SamplingParams(num_beams=3, max_new_tokens=12)
    requests = [Request("f1", prompt_of(scheduler.engine, "f1", n), (GREEDY, beams)[n % 2]) for n in range(4)]
    found = answers(scheduler, requests)
    assert found == scheduler.call(lambda: [plainly(scheduler.engine, "f1", r.prompt, r.settings) for r in requests])


def test_an_exact_row_is_the_same_bits_in_any_company(folder):
    forward = SharedForward(engine_of(folder, "llama", "f1"))
    texts = [[(row * 31 + place) % 300 for place in range(5 + row)] for row in range(9)]

    def scores(rows):
        known = [Text() for _ in rows]
        names = ["f1" if row % 2 else "base" for row in rows]
        forward([Part(text, texts[row], name) for text, row, name in zip(known, rows, names, strict=True)], exact=True)
        return forward([Part(text, [row], name) for text, row, name in zip(known, rows, names, strict=True)], exact=True)

    company = scores(range(9))
    for row in range(9):
        assert torch.equal(scores([row])[0], company[row])


def test_a_next_turn_reads_only_what_is_new(scheduler, read):
    """Also that what ended requests keep is within its limit, and goes oldest first."""
    engine = scheduler.engine
    scheduler.call(lambda: scheduler.kept.clear())
    record = {"instruction": "讲一个很长很长的故事", "history": []}
    first = engine.encode("f1", record)
    (answer,) = answers(scheduler, [Request("f1", first, GREEDY)])
    said = first + answer + [9] * 20
    read.clear()
    (second,) = answers(scheduler, [Request("f1", said, GREEDY)])
    assert sum(read) == 20 + 1 + 23  # the end of the first answer, the new question, the tokens of the second answer
    assert answers(scheduler, [Request("f1", said, GREEDY)]) == [second], "all of it is known"
    scheduler.call(lambda: scheduler.kept.clear())
    assert answers(scheduler, [Request("f1", said, GREEDY)]) == [second]
    limit, scheduler.kept_columns = scheduler.kept_columns, 300
    for number in range(6):
        answers(scheduler, [Request("base", [number + 5] * 60, GREEDY)])
        kept = scheduler.call(lambda: [text for _, text in scheduler.kept])
        assert kept[-1].ids[0] == number + 5 and sum(text.columns for text in kept) <= 300
    assert len(kept) > 1
    scheduler.kept_columns = limit


def test_an_opening_that_several_share_is_read_once(scheduler, read):
    scheduler.call(lambda: scheduler.kept.clear())
    opening = list(range(50, 90))
    answers(
        scheduler, [Request("f1", opening + [tail] * 5, SamplingParams(num_beams=1, max_new_tokens=1)) for tail in range(4)]
    )
    assert sum(read) == 40 + 4 * 5


@pytest.mark.parametrize(
    ("short", "long", "most"), [(3, 1, [1280, 3 + 256, 3 + 256]), (2, 2, [1280, 2 + 1280, 3 + 256])], ids=["few", "half"]
)
def test_much_is_read_at_once_until_most_answers_grow(scheduler, read, short, long, most):
    scheduler.call(lambda: scheduler.kept.clear())
    prompts = [[number] * 5 for number in range(5, 5 + short)] + [[number, *range(100, 400)] * 6 for number in range(long)]
    answers(scheduler, [Request("base", prompt, GREEDY) for prompt in prompts])
    assert read[:3] == most


def test_places_are_shared_fairly_and_the_queue_has_an_end(scheduler):
    """Who asks one thing does not wait behind all that another asks; one too many is refused; a place given up is free."""
    before = []  # how many of the others had been given a place when there was news of the one
    long, many = SamplingParams(num_beams=1, max_new_tokens=300), []

    def note():
        before.append(sum(ticket.running for ticket in many))

    with scheduler.news:
        many += [scheduler.submit(Request("f1", [5, 6, 7 + n], long, asker="many"), str) for n in range(AT_ONCE + 8)]
        one = scheduler.submit(Request("f1", [9, 9, 9], GREEDY, asker="one"), note)
        assert scheduler.ahead(one) == AT_ONCE + 8
        with pytest.raises(QueueFull):
            for n in range(100):
                many.append(scheduler.submit(Request("f1", [8, n], long, asker="many"), str))
        assert len(scheduler.waiting) == 64
    while not one.finish:
        time.sleep(0.01)
    assert before[0] == 1
    for ticket in many:
        scheduler.cancel(ticket)
    (answer,) = answers(scheduler, [Request("f1", [9, 9, 9], GREEDY)])
    assert answer == one.answer
    given_up = time.monotonic() + 60
    while scheduler.running and time.monotonic() < given_up:  # the last place is given back after its answer is there
        time.sleep(0.01)
    assert not scheduler.waiting and not scheduler.running
    growing = scheduler.submit(Request("f1", [9, 9, 9], GREEDY), str)
    while not growing.running:
        time.sleep(0.001)
    assert scheduler.call(lambda: growing.finish, "f1"), "what changes an answerer waits for its answers"


def test_where_memory_ends_kept_caches_are_dropped_and_then_the_latest_request(scheduler, monkeypatch):
    requests = [Request("f1", [5, 6, 7], GREEDY), Request("base", [7, 8, 9], GREEDY)]
    expected, plain, failures = answers(scheduler, requests), SharedForward.__call__, [1]
    answers(scheduler, [Request("base", [*range(5, 45)], GREEDY)])

    def short(self, parts, exact):
        scores = plain(self, parts, exact)
        if len(parts) > 1 and failures:
            failures.pop()
            raise MemoryError
        return scores

    monkeypatch.setattr(SharedForward, "__call__", short)
    assert scheduler.kept and answers(scheduler, requests) == expected and not failures
    failures += [1, 1]
    with scheduler.news:
        first, latest = (scheduler.submit(request, lambda: None) for request in requests)
    while not (first.finish or first.error):
        time.sleep(0.01)
    assert first.answer == expected[0] and "out of memory" in latest.error


def test_a_failure_ends_one_request_and_not_the_others(scheduler):
    requests = [Request("f1", [5, 6, 7], GREEDY), Request("base", [7, 8, 9], GREEDY)]
    expected = answers(scheduler, requests[1:])[0]
    with scheduler.news:
        broken, fine = (scheduler.submit(request, lambda: None) for request in requests)
        broken.generator, broken.request = "none", dataclasses.replace(broken.request, settings=DRAWN)
    while not (fine.finish or fine.error):
        time.sleep(0.01)
    assert "internal error" in broken.error
    assert fine.answer == expected
