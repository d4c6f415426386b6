"""The engine: the same answers as transformers gives one at a time, ends, adapters merged and taken out again."""

import dataclasses
import random

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, MistralConfig, MptConfig

from utils.adapters import switching
from utils.console import UserError
from utils.datasets.templates import Prompter
from utils.inference import engine as engine_module
from utils.inference.answerers import BASE, resolve
from utils.inference.decoding import decode, gumbel_noise, top_k_top_p
from utils.inference.engine import Ending, Engine, seed
from utils.inference.kv_cache import GrowingLayer, check_scores, common_opening, families, groups
from utils.inference.sampling_params import SamplingParams
from utils.models.placement import place
from utils.models.tokenizer import load_tokenizer

CPU = place(False, False)
SMALL = {"vocab_size": 280, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaMA, a BLOOM, and two adapters on the former."""
    folder = tmp_path_factory.mktemp("models")
    tiny.llama(folder / "llama")
    tiny.bloom(folder / "bloom")
    tiny.adapter(folder / "llama", folder / "a", 1)
    tiny.adapter(folder / "llama", folder / "b", 2, modules_to_save=["lm_head"])
    return folder


def prompts_of(vocabulary, lengths=(90, 61, 58, 30, 29, 12, 5, 3, 1)):
    chance = random.Random(0)
    return [[1] + [chance.randrange(4, vocabulary) for _ in range(length)] for length in lengths]


def answers(model, prompts, settings, ended=lambda ids: ids[-1] == 2, seeds=None):
    finished = {}
    limits, seeds = [settings.max_new_tokens] * len(prompts), seeds or [0] * len(prompts)
    for step in decode(model, prompts, limits, settings, ended, seeds):
        finished |= step.finished
    return [finished[row] for row in range(len(prompts))]


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1, "repetition_penalty": 0.8},
        {"num_beams": 4},
        {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"num_beams": 1, "repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
    ],
)
def test_a_batch_of_mixed_lengths_gives_what_transformers_gives_one_by_one(folder, family, options, opened):
    """Pitfall 11, with and without an opening that is computed once for all.

    Also that padding reaches neither positions, nor ALiBi, nor the repetition penalty.
    """
    model = AutoModelForCausalLM.from_pretrained(folder / family)
    plain = prompts_of(280)
    opening = plain[0][:20]
    others = [7, *plain[0][:30]]  # a template has more than one opening
    prompts = [(others if row in (1, 4, 5) else opening) + prompt for row, prompt in enumerate(plain)] if opened else plain
    single = model.generate(torch.tensor(prompts[:1]), max_new_tokens=30, do_sample=False, eos_token_id=None, num_beams=1)
    end = single[0, -8].item()  # a token that is really written ends the answer
    ours = answers(model, prompts, SamplingParams(max_new_tokens=24, **options), lambda ids: ids[-1] == end)
    for prompt, answer in zip(prompts, ours, strict=True):
        tensor = torch.tensor([prompt])
        plain = model.generate(
            tensor,
            attention_mask=torch.ones_like(tensor),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=0,
            **options,
        )
        plain = plain[0, len(prompt) :].tolist()
        assert answer == (plain[: plain.index(end) + 1] if end in plain else plain)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(sliding_window=8, num_key_value_heads=2, intermediate_size=96, **SMALL),
        MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=280, initializer_range=0.3),
    ],
)
def test_windows_and_biases_that_go_by_columns_meet_no_gap(config):
    """A common opening is not shared where attention counts columns: padding would stand between it and the rest."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    opening = prompts_of(280, (12,))[0]
    prompts = [opening + prompt for prompt in prompts_of(280, (40, 39, 21, 20, 7, 3))]
    ours = answers(model, prompts, SamplingParams(num_beams=1, max_new_tokens=20), lambda ids: False)
    for prompt, answer in zip(prompts, ours, strict=True):
        plain = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert answer == plain[0, len(prompt) :].tolist()


def test_rows_that_have_their_answer_leave_the_batch(folder, monkeypatch):
    """Pitfall 11: a batch does as much work as its answers need, not as its longest answer would."""
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    computed = []
    model.register_forward_hook(lambda module, inputs, output: computed.append(output.logits.shape[:2].numel()))
    prompts = prompts_of(280, (20, 20, 20, 20))
    list(decode(model, prompts, [2, 5, 9, 40], SamplingParams(num_beams=1), lambda ids: False, [0] * 4))
    assert sum(computed) == 4 + (2 - 1) + (5 - 1) + (9 - 1) + (40 - 1)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_beams_go_on_as_alone_where_the_longest_prompt_has_left_the_batch(folder, family):
    """Its padding leaves with it, so that answers begin at another column from then on."""
    model = AutoModelForCausalLM.from_pretrained(folder / family)
    prompts, found = prompts_of(280, (60, 9, 5)), {}
    for step in decode(model, prompts, [2, 30, 30], SamplingParams(num_beams=4), lambda ids: False, [0] * 3):
        found |= step.finished
    for row in (1, 2):
        alone = answers(model, [prompts[row]], SamplingParams(num_beams=4, max_new_tokens=30), lambda ids: False)
        assert [found[row]] == alone


def test_closing_the_iterator_ends_the_computation(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    computed = []
    model.register_forward_hook(lambda module, inputs, output: computed.append(1))
    steps = decode(model, prompts_of(280, (9,)), [100], SamplingParams(num_beams=1), lambda ids: False, [0])
    next(steps), next(steps), next(steps)
    steps.close()
    assert len(computed) == 3


def test_what_is_sampled_does_not_depend_on_the_company(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    prompts, seeds = prompts_of(280, (9, 30, 14)), [1, 2, 3]
    for beams in (1, 3):
        settings = SamplingParams(num_beams=beams, do_sample=True, temperature=1.0, top_p=0.9, max_new_tokens=12)
        together = answers(model, prompts, settings, seeds=seeds)
        alone = [answers(model, [prompt], settings, seeds=[seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
        assert together == alone
        assert answers(model, prompts, settings, seeds=[4, 5, 6]) != together
        cold, plain = dataclasses.replace(settings, temperature=0.0), SamplingParams(num_beams=beams, max_new_tokens=12)
        assert answers(model, prompts, cold, seeds=seeds) == answers(model, prompts, plain, seeds=seeds)
    own = {engine_module.seed(SamplingParams(seed=number), ids) for number in (1, 2) for ids in ([1], [2])}
    assert len(own) == 4, "a seed for each prompt, which follows from that of the run"


def test_sampling_follows_temperature_top_k_and_top_p():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, -9.0]])
    best, tokens = top_k_top_p(scores, SamplingParams(temperature=0.5, top_k=3, top_p=0.97), 1)
    assert tokens.tolist() == [[0, 1, 2]]
    expected = torch.tensor([4.0, 2.0, 0.0]).softmax(0)  # 0.867, 0.117, 0.016: the first two make up 0.984
    assert best[0, 2] == -torch.inf
    assert top_k_top_p(torch.zeros(1, 90), SamplingParams(top_k=0, top_p=1.0), 1)[0].isfinite().sum() == 90
    generator = torch.Generator().manual_seed(0)
    drawn = (
        torch.bincount(torch.cat([(best + gumbel_noise(tokens, 5, [generator])).argmax(1) for _ in range(4000)]), minlength=3)
        / 4000
    )
    assert torch.allclose(drawn[:2], expected[:2] / expected[:2].sum(), atol=0.03)
    assert drawn[2] == 0


def test_beams_are_drawn_from_two_tokens_at_least(folder):
    """As transformers does it: with one, every beam would be the same."""
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    settings = SamplingParams(num_beams=2, do_sample=True, temperature=1.0, top_k=1, max_new_tokens=6)
    found = [answers(model, prompts_of(280, (5,)), settings, lambda ids: False, [seed]) for seed in range(6)]
    assert any(one != found[0] for one in found)


def test_prompts_are_read_in_groups_of_like_length():
    prompts = [[0] * length for length in (700, 335, 104, 100, 99, 42, 40)]
    assert list(groups(list(range(7)), prompts)) == [[0], [1], [2, 3, 4], [5, 6]]
    assert list(groups([1, 2, 4], prompts)) == [[1], [2, 4]]


def test_what_all_prompts_begin_with_is_read_once(folder):
    prompts = [list(range(20)) + [tail] * tail for tail in (30, 29, 3)]
    assert common_opening(prompts) == list(range(20))
    assert common_opening([prompts[0], prompts[0][:15]]) == list(range(14))  # a token of each is left to go on from
    assert common_opening([[1, 2, 3], [1, 2, 4]]) == common_opening([prompts[0]]) == []
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    read = []
    model.register_forward_hook(
        lambda module, inputs, kwargs, output: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    list(decode(model, prompts, [1, 1, 1], SamplingParams(num_beams=1), lambda ids: False, [0] * 3))
    assert read == [20, 2 * 30, 3]
    read.clear()
    other = [[9] * 15 + [tail] * tail for tail in (30, 3)]
    list(
        decode(
            model,
            [prompts[0], other[0], prompts[2], other[1]],
            [1] * 4,
            SamplingParams(num_beams=1),
            lambda ids: False,
            [0] * 4,
        )
    )
    assert families([prompts[0], other[0], prompts[2], other[1]]) == [[0, 2], [1, 3]]
    assert read == [20, 30, 3, 15, 30, 3]


def test_the_cache_grows_in_place_and_keeps_its_content():
    layer, whole = GrowingLayer(), torch.randn(2, 3, 200, 4)
    layer.update(whole[:, :, :5], whole[:, :, :5])
    for column in range(5, 200):
        keys, values = layer.update(whole[:, :, column : column + 1], -whole[:, :, column : column + 1])
    assert torch.equal(keys, whole)
    assert torch.equal(values[:, :, 5:], -whole[:, :, 5:])


def test_answers_end_at_the_next_question_and_not_at_a_quoted_response(folder):
    """Pitfalls 8 and 17."""
    tokenizer = load_tokenizer(folder / "llama")
    ending = Ending(tokenizer, Prompter("alpaca").stop_strings, [2])
    quoted = tokenizer("The template ends with ### Response:\nand that is all.", add_special_tokens=False)["input_ids"]
    more = tokenizer("\n\n### Instruction:\nWhat else?", add_special_tokens=False)["input_ids"]
    assert not any(ending(quoted[: size + 1]) for size in range(len(quoted)))
    ids = quoted + more
    size = next(size for size in range(len(quoted), len(ids)) if ending(ids[: size + 1]))
    assert ending.text(ids[: size + 1]) == "The template ends with ### Response:\nand that is all."
    assert ending.text([*quoted, 2]) == ending.text(quoted)
    assert ending([*quoted, 2])
    assert Ending(tokenizer, ["that", "with"], [2]).text(quoted) == "The template ends"
    stop = "下一个问题在这里"  # of more tokens than characters
    assert Ending(tokenizer, [stop], [2])(tokenizer(f"好{stop}", add_special_tokens=False)["input_ids"])


def test_streaming_shows_whole_characters_and_no_half_stop_strings(folder):
    """Pitfall 9."""
    tokenizer = load_tokenizer(folder / "llama")
    ending = Ending(tokenizer, ["### Instruction:"], [2])
    text = "Zażółć 𠮷 我们👍🏽 # ## ###\n\n### Instruction:"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown = [ending.so_far(ids[: size + 1]) for size in range(len(ids))]
    assert all("\ufffd" not in part and "Instr" not in part for part in shown)
    assert all(text.startswith(part) for part in shown)
    assert ending.text(ids) == "Zażółć 𠮷 我们👍🏽 # ## ###"
    assert not any("\ufffd" in ending.text(ids[: size + 1]) for size in range(len(ids)))  # cut by the token limit
    assert ending.text(tokenizer("好 𠮷", add_special_tokens=False)["input_ids"][:-1]) == "好"
    assert len(set(shown)) > 8


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"lora_bias": True}],
)
def test_merging_in_memory_is_the_adapter_and_leaves_the_base_as_it_was(folder, tmp_path, settings):
    """Pitfall 7."""
    tiny.adapter(folder / "llama", tmp_path / "c", 3, **settings)
    engine = Engine(str(folder / "llama"), resolve("", [str(folder / "a"), str(tmp_path / "c")], "")[1], CPU)
    ids = torch.tensor(prompts_of(280, (20,)))
    base = AutoModelForCausalLM.from_pretrained(folder / "llama")
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    with torch.inference_mode():
        for name, path in (("c", tmp_path / "c"), ("a", folder / "a"), ("c", tmp_path / "c")):
            expected = (
                PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "llama"), path).eval()(ids).logits
            )
            engine.use(name)
            assert torch.allclose(engine.model(ids).logits, expected, atol=1e-4)
            with engine.merged(name):
                assert torch.allclose(engine.model(ids).logits, expected, atol=1e-4)
        engine.use(BASE)
        assert torch.equal(engine.model(ids).logits, base(ids).logits)
    after = engine.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_biases_are_merged_in_memory_and_the_bases_own_come_back(tmp_path):
    base = tiny.llama(tmp_path / "base", attention_bias=True)
    adapter = tiny.adapter(base, tmp_path / "a", 3, lora_bias=True)
    engine, ids = Engine(str(base), resolve(str(base), [str(adapter)], "")[1], CPU), torch.tensor(prompts_of(280, (20,)))
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    with torch.inference_mode(), engine.merged("a"):
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()(ids).logits
        assert torch.allclose(engine.model(ids).logits, expected, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.model.state_dict().items())


def test_weights_are_merged_where_memory_has_room_for_the_sums(folder, monkeypatch, capsys):
    """What the sums take is no room for keys and values; without any, the adapter is computed beside the base."""
    engine = Engine(str(folder / "llama"), resolve("", [str(folder / "a")], "")[1], CPU)
    ids, layer = torch.tensor(prompts_of(280, (20,))), engine.model.model.layers[0].self_attn.q_proj
    original = layer.get_base_layer().weight
    taken, adapted = engine.merged_bytes("a"), [one for one in engine.model.modules() if hasattr(one, "lora_A")]
    assert taken == sum(one.get_base_layer().weight.nbytes for one in adapted)
    assert engine.room - engine.room_as("a") == pytest.approx(engine_module.CACHE_SHARE * taken / engine.token_bytes, abs=2)

    cached = engine.model(ids, use_cache=True).past_key_values.layers
    assert engine.token_bytes == sum(one.keys.nbytes + one.values.nbytes for one in cached) / ids.numel()
    most = max(0.2 * engine.model.get_memory_footprint(), 1.5e9) / engine.token_bytes
    assert engine.batch_room("a") == min(int(most), engine.room_as("a"))

    def fails(adapter_names):
        torch.empty(2**50)

    with torch.inference_mode(), monkeypatch.context() as short:
        with engine.merged("a"):
            assert layer.get_base_layer().weight is not original
            expected = engine.model(ids).logits
        short.setattr(adapted[-1], "merge", fails)
        with engine.merged("a"):
            assert layer.get_base_layer().weight is original
            assert torch.allclose(engine.model(ids).logits, expected, atol=1e-4)
        assert "a: no memory for merged weights" in capsys.readouterr().out
        short.setattr(engine_module, "MERGED_SHARE", 0)
        assert engine.merged_bytes("a") == 0 and engine.room_as("a") == engine.room
        with engine.merged("a"):
            assert torch.allclose(engine.model(ids).logits, expected, atol=1e-4)
    assert capsys.readouterr().out == ""


def test_an_adapter_on_tied_embeddings_changes_the_half_it_was_trained_for(tmp_path):
    base = tiny.llama(tmp_path / "base", tie_word_embeddings=True)
    tiny.adapter(base, tmp_path / "e", 1, target_modules=["embed_tokens", "q_proj"])
    engine = Engine(str(base), resolve("", [str(tmp_path / "e")], "")[1], CPU)
    ids = torch.tensor(prompts_of(280, (20,)))
    with torch.inference_mode():
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "e").eval()(ids).logits
        with engine.merged("e"):
            assert torch.allclose(engine.model(ids).logits, expected, atol=1e-4)
    assert engine.model.lm_head.weight is engine.model.model.embed_tokens.get_base_layer().weight


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_base_keeps_its_weights_and_has_the_adapters_beside_them(folder, bits):
    """Pitfall 7: nothing is merged into quantized weights."""
    engine = Engine(str(folder / "llama"), resolve("", [str(folder / "a")], "")[1], place(bits == 8, bits == 4))
    prompts, settings = prompts_of(280, (12, 7)), SamplingParams(num_beams=1, max_new_tokens=6)
    with engine.merged("a"):
        adapted = [step.running for step in engine.answer("a", prompts, settings)][-2]
    layer = engine.model.model.layers[0].self_attn.q_proj
    assert not layer.merged_adapters
    assert layer.get_base_layer().weight.dtype == (torch.int8 if bits == 8 else torch.uint8)
    engine.use(BASE)
    one = engine.answerers[0].name
    plain = [step.running for step in decode(engine.model, prompts, [6, 6], settings, engine.ending(one), [0, 0])][-2]
    assert adapted != plain


def test_the_window_limits_prompt_and_answer_together(folder, tmp_path):
    base = tiny.llama(tmp_path / "short", max_position_embeddings=64)
    engine = Engine(str(base), resolve(str(base), [], "")[1], CPU)
    assert engine.limit([1] * 50, SamplingParams(max_new_tokens=2048)) == 14
    assert (
        Engine(str(folder / "bloom"), resolve(str(folder / "bloom"), [], "")[1], CPU).limit([1] * 50, SamplingParams()) == 2048
    )
    stopped = Engine(str(base), resolve(str(base), [], "")[1], CPU, ["END"])
    assert stopped.ending(BASE, stops=["x"]).stops == ["### Instruction:", "END", "x"]
    for row in (0, 1):  # of a batch
        with pytest.raises(UserError, match="not numbers"):
            check_scores(torch.tensor([[0.0, 1.0]] * 2).index_fill(0, torch.tensor([row]), torch.nan))
    assert switching.key_of("v1.2/lora") != switching.key_of("v1-2/lora")
    assert seed(SamplingParams(), [1, 2]) != seed(SamplingParams(), [2, 1])
