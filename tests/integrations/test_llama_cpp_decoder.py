"""llama.cpp decoding with fastsample, against fs.sample by hand on llama.cpp's own logits, and its own greedy text."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoded import drawn, output_of, tiny_models

import fastsample as fs

lc = pytest.importorskip("llama_cpp", reason="`nox -s llama_cpp` installs llama-cpp-python and runs these tests")
pytest.importorskip("gguf")
adapter = pytest.importorskip("fastsample.integrations.llama_cpp")
BatchSampler, generate, logits_of = adapter.BatchSampler, adapter.generate, adapter.logits_of
sampling, stream, Context = adapter.sampling, adapter.stream, adapter.batch.Context

pytestmark = pytest.mark.filterwarnings(  # llama-cpp-python opens /dev/null and leaves it to the garbage collector
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed file:ResourceWarning"
)
PROMPT, STEPS = "The future of AI is", 24
PROMPTS = [PROMPT, "Use this function to", "class"]
SEEDS = [7, 2**64 - 1, 9]
LAST = {"order": "temperature_last"}
OWN = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, **LAST}


def load(path: Path, **options: Any) -> Any:
    return lc.Llama(str(path), **({"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False} | options))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    tiny_models().write_shipped_gguf(path)
    return path


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[Any]:
    """It keeps the logits of every position, as `logprobs` needs them."""
    model = load(path, logits_all=True)
    yield model
    model.close()


def text_of(response: Any) -> str:
    return str(response["choices"][0]["text"])


def ids_of(llm: Any, prompt: str = PROMPT, **options: Any) -> list[int]:
    """The new ids of a completion of STEPS tokens."""
    llm(prompt, max_tokens=STEPS, **options)
    start = len(llm.tokenize(prompt.encode(), special=True))
    return [int(token) for token in llm.input_ids[start : llm.n_tokens]]  # the last one is never decoded


def own_logits(llm: Any, prompt: str = PROMPT) -> Any:
    """Those that the last completion's tokens but the last were drawn from."""
    start = len(llm.tokenize(prompt.encode(), special=True))
    return llm.scores[start - 1 : llm.n_tokens - 1].copy()


CALLS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({}, {}, OWN),
    ({}, {"temperature": 1.3, "top_k": 0, "top_p": 1.0, "min_p": 0.2}, {"temperature": 1.3, "min_p": 0.2, **LAST}),
    ({}, {"top_k": -1, "typical_p": 0.8}, {**OWN, "top_k": 0, "typical_p": 0.8}),
    (
        {},
        {"repeat_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1},
        {**OWN, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1},
    ),
    ({"temperature": 1.5, "top_n_sigma": 1.0}, {"temperature": 0.1}, {**OWN, "temperature": 1.5, "top_n_sigma": 1.0}),
    ({"params": fs.SamplingParams(top_p=0.7)}, {"temperature": 0.1}, {"top_p": 0.7}),
    ({"params": fs.SamplingParams(top_p=0.7), "xtc_probability": 1.0}, {}, {"top_p": 0.7, "xtc_probability": 1.0}),
    ({"dry_multiplier": 2.0, "dry_allowed_length": 1}, {}, {**OWN, "dry_multiplier": 2.0, "dry_allowed_length": 1}),
]


@pytest.mark.parametrize(("fields", "call", "wanted"), CALLS, ids=str)
def test_a_completion_is_sample_by_hand(llm: Any, fields: Any, call: Any, wanted: Any) -> None:
    with sampling(llm, seed=7, **fields):
        found = ids_of(llm, **call)
    prompt = llm.tokenize(PROMPT.encode(), special=True)
    assert found == drawn(own_logits(llm), len(found), 7, prompt, **wanted)
    assert len(found) > 5


def test_seeds_and_offsets(llm: Any) -> None:
    with sampling(llm):
        by_call = [text_of(llm(PROMPT, max_tokens=STEPS, seed=seed)) for seed in (7, 8, 7)]
    with sampling(llm, seed=7):
        by_context = [text_of(llm(PROMPT, max_tokens=STEPS, seed=seed)) for seed in (1, 2)]
    with sampling(llm, seed=7, offset=3):
        other = text_of(llm(PROMPT, max_tokens=STEPS))
    assert by_call[0] == by_call[2] == by_context[0] == by_context[1]
    assert len({by_call[0], by_call[1], other}) == 3


def test_a_seed_that_nobody_gave_is_fresh(llm: Any) -> None:
    """`generate` has no argument for it, and llama.cpp's default means a random one."""
    ids = llm.tokenize(PROMPT.encode())
    texts = []
    llm.set_seed(lc.LLAMA_DEFAULT_SEED)
    with sampling(llm, temperature=2.0, top_k=0):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            texts.append([token for token, _ in zip(llm.generate(ids), range(8), strict=False)])
    assert texts[0] == texts[1] != texts[2]


def test_greedy_is_llama_cpps_own(llm: Any) -> None:
    own = [text_of(llm(prompt, max_tokens=STEPS, temperature=0)) for prompt in PROMPTS]
    with sampling(llm):
        assert [text_of(llm(prompt, max_tokens=STEPS, temperature=0)) for prompt in PROMPTS] == own
    with sampling(llm, temperature=0):
        assert [text_of(llm(prompt, max_tokens=STEPS)) for prompt in PROMPTS] == own
    found = generate(llm, PROMPTS, temperature=0, max_tokens=STEPS)
    assert [llm.detokenize(ids).decode() for ids in found] == own


def test_streaming_stop_and_logprobs(llm: Any) -> None:
    with sampling(llm, seed=7):
        whole = text_of(llm(PROMPT, max_tokens=STEPS))
        parts = [text_of(part) for part in llm(PROMPT, max_tokens=STEPS, stream=True)]
        word = whole.split()[4]
        stopped = llm(PROMPT, max_tokens=STEPS, stop=[word])
        told = llm(PROMPT, max_tokens=STEPS, logprobs=2)
    assert len(parts) > 3
    assert "".join(parts) == whole
    assert text_of(stopped) == whole[: whole.index(word)]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert text_of(told) == whole
    assert all(value <= 0 for value in told["choices"][0]["logprobs"]["token_logprobs"])


def test_chat(llm: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    options: dict[str, Any] = {"max_tokens": STEPS, "temperature": 0.9}
    with sampling(llm, seed=7):
        whole = llm.create_chat_completion(messages, **options)["choices"][0]["message"]["content"]
        again = llm.create_chat_completion(messages, **options, stream=True)
        assert "".join(part["choices"][0]["delta"].get("content") or "" for part in again) == whole


def test_a_grammar_of_llama_cpps(llm: Any) -> None:
    grammar = lc.LlamaGrammar.from_string('root ::= "yes" | "no" | [0-9]{3}', verbose=False)
    with sampling(llm, top_k=0, top_p=1.0, min_p=0.0, temperature=3.0):
        found = {text_of(llm(PROMPT, max_tokens=STEPS, grammar=grammar, seed=seed)) for seed in range(12)}
    assert all(text in {"yes", "no"} or (len(text) == 3 and text.isdigit()) for text in found), found
    assert len(found) > 2


def test_processors_and_bias(llm: Any) -> None:
    banned = list(range(0, 4096, 2))
    seen: list[int] = []

    def odd(input_ids: Any, scores: Any) -> Any:
        seen.append(len(input_ids))
        scores[banned] = -np.inf
        return scores

    with sampling(llm, seed=7, top_k=0, top_p=1.0, min_p=0.0):
        processed = ids_of(llm, logits_processor=lc.LogitsProcessorList([odd]))
        bias = dict.fromkeys(banned, -1e9)
        biased = ids_of(llm, logit_bias=bias)
        plain = ids_of(llm)
    assert processed == biased != plain
    assert all(token % 2 for token in processed)
    start = len(llm.tokenize(PROMPT.encode(), special=True))
    assert seen == list(range(start, start + STEPS))


def test_a_draft_model_changes_nothing(path: Path) -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    prompt = "return self.name, return self.name, return self.name, return"
    texts = []
    for draft in (None, LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=4)):
        llm = load(path, draft_model=draft, logits_all=True)
        with sampling(llm, seed=7, temperature=0.3, frequency_penalty=0.1):
            texts.append(text_of(llm(prompt, max_tokens=STEPS)))
        llm.close()
    assert texts[0] == texts[1]


def test_the_context_puts_everything_back(llm: Any) -> None:
    before = dict(vars(llm))
    with sampling(llm, seed=7):
        with sampling(llm, seed=8):
            inner = text_of(llm(PROMPT, max_tokens=STEPS))
        outer = text_of(llm(PROMPT, max_tokens=STEPS))
    assert inner != outer
    with pytest.raises(ValueError, match="tfs_z"), sampling(llm, seed=7):
        llm(PROMPT, tfs_z=0.5)
    assert "_init_sampler" not in vars(llm)
    assert vars(llm)["_sampler"] is before["_sampler"]
    own = [text_of(llm(PROMPT, max_tokens=STEPS, seed=5)) for _ in range(2)]
    assert own[0] == own[1]


@pytest.mark.parametrize(
    ("fields", "call", "told"),
    [
        ({}, {"mirostat_mode": 2}, "mirostat_mode = 2: expected 0"),
        ({}, {"tfs_z": 0.5}, "tfs_z = 0.5: expected 1.0"),
        ({}, {"temperature": -1.0}, "temperature = -1.0: expected"),
        ({}, {"top_p": 0.0}, "top_p = 0.0: expected"),
        ({"top_q": 1}, {}, "top_q .did you mean top_p"),
        ({"min_p": 2.0}, {}, "min_p = 2.0: expected"),
        ({"temperature": [1.0, 2.0]}, {}, "temperature"),
        ({"seed": "x"}, {}, "seed"),
        ({"offset": -1}, {}, "offset"),
        ({"backend": "x"}, {}, "backend"),
    ],
)
def test_bad_arguments_of_completions(llm: Any, fields: Any, call: Any, told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told), sampling(llm, **fields):
        llm(PROMPT, max_tokens=2, **call)
    assert "_init_sampler" not in vars(llm)


def test_what_is_no_llama(llm: Any) -> None:
    with pytest.raises(TypeError, match=r"llm: expected a llama_cpp\.Llama, got 5"), sampling(5):
        pass
    with pytest.raises(TypeError, match=r"llm: expected a llama_cpp\.Llama, got 5"):
        stream(5, PROMPTS)
    with pytest.raises(RuntimeError, match=r"llm.sample: no text has begun"), sampling(llm):
        llm.sample()


def test_logits_are_llama_cpps_memory(llm: Any) -> None:
    vocab = llm.n_vocab()
    context = Context(llm, 3, 16)
    context._decode([(0, 5), (1, 6), (2, 7)], wanted=3)
    start = ctypes.addressof(lc.llama_get_logits(context._context).contents)
    whole = np.ctypeslib.as_array(lc.llama_get_logits(context._context), (3 * vocab,)).reshape(3, vocab)
    for positions in ([0, 1, 2], [1, 2], [2], [-1], [-2, -1]):
        found = logits_of(context._context, positions)
        assert torch.equal(found, torch.from_numpy(whole[positions]))
        assert found.data_ptr() == start + positions[0] % 3 * vocab * 4
    for positions in ([2, 0], [0, 2], [1, 1]):
        assert torch.equal(logits_of(context._context, positions), torch.from_numpy(whole[positions]))
    assert logits_of(context._context, []).shape == (0, vocab)
    for bad in (3, -4):
        with pytest.raises(ValueError, match=rf"positions\[1\] = {bad}: expected a token of the last batch"):
            logits_of(context._context, [0, bad])
    context.close()
    with pytest.raises(TypeError, match=r"positions\[0\]"):
        logits_of(llm, [0.5])
    with pytest.raises(TypeError, match="context: expected"):
        logits_of(None, [0])


BATCHED = [OWN, {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.2}]


@pytest.mark.parametrize("fields", BATCHED, ids=str)
def test_a_batch_is_sample_by_hand(llm: Any, fields: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: dict[int, list[Any]] = {}

    def prefill(context: Any, sequence: int, ids: list[int], own: Any = Context.prefill) -> Any:
        logits = own(context, sequence, ids)
        recorded[sequence] = [logits[0].clone()]
        return logits

    def advance(context: Any, tokens: dict[int, int], own: Any = Context.advance) -> Any:
        logits = own(context, tokens)
        for sequence, row in zip(tokens, logits.clone(), strict=True):
            recorded[sequence].append(row)
        return logits

    monkeypatch.setattr(Context, "prefill", prefill)
    monkeypatch.setattr(Context, "advance", advance)
    found = generate(llm, PROMPTS, seed=SEEDS, max_tokens=STEPS, **fields)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        ids = llm.tokenize(prompt.encode(), special=True)
        assert found[row] == drawn(recorded[row], len(found[row]), seed, ids, **fields)


@pytest.mark.parametrize("fields", BATCHED, ids=str)
def test_a_sequence_is_the_same_alone_and_in_a_batch(path: Path, fields: Any) -> None:
    """llama.cpp's own logits of the two differ by 1e-4, which moves next to no draw among as few tokens as are kept."""
    llm = load(path)
    found = generate(llm, PROMPTS, seed=SEEDS, max_tokens=STEPS, **fields)
    steps = list(stream(llm, PROMPTS, seed=SEEDS, max_tokens=STEPS, **fields))
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        assert [step[row] for step in steps if row in step] == found[row]
        assert generate(llm, [prompt], seed=[seed], max_tokens=STEPS, **fields) == [found[row]]
        with sampling(llm, fs.SamplingParams(**fields), seed=seed):
            completed = ids_of(llm, prompt)
        assert completed == found[row][: len(completed)]
    llm.close()


def test_a_long_prompt_is_decoded_in_parts(path: Path) -> None:
    short, whole = (load(path, n_batch=n_batch) for n_batch in (8, 256))
    ids = short.tokenize(PROMPT.encode() * 5, special=True)
    options: dict[str, Any] = {"seed": [7, 8], "max_tokens": 8, "temperature": 0.5}
    assert generate(short, [ids, [3]], **options) == generate(whole, [ids, [3]], **options)
    for llm in (short, whole):
        llm.close()


def test_slots_come_and_go(llm: Any) -> None:
    """Three texts in two slots, of which one begins when another has ended."""
    prompts = [llm.tokenize(prompt.encode(), special=True) for prompt in PROMPTS]
    wanted = generate(llm, PROMPTS, seed=SEEDS, max_tokens=6, **OWN)
    context = Context(llm, 3, 64)
    batch = BatchSampler(context._context, 2, temperature=2.0)
    first = {row: context.prefill(row, prompts[row]).clone() for row in range(3)}
    found: dict[int, list[int]] = {row: [] for row in range(3)}
    texts = {batch.admit(prompts[row], seed=SEEDS[row], **OWN): row for row in (0, 1)}
    assert list(texts) == [0, 1]
    for slot, row in texts.items():  # their first tokens, from what was kept of the prompts' logits
        found[row].append(int(batch._sequences.draw(first[row], [slot]).tokens[0]))
    while texts:
        tokens = {row: found[row][-1] for row in texts.values()}
        context.advance(tokens)
        out = batch(range(len(texts)), list(texts))
        for slot, token in zip(list(texts), out.tokens.tolist(), strict=True):
            row = texts[slot]
            found[row].append(token)
            if len(found[row]) == (4 if row == 0 else 6):
                batch.release(slot)
                del texts[slot]
                if row == 0:
                    texts[batch.admit(prompts[2], seed=SEEDS[2], **OWN)] = 2
                    found[2].append(int(batch._sequences.draw(first[2], [slot]).tokens[0]))
    context.close()
    assert found == {0: wanted[0][:4], 1: wanted[1], 2: wanted[2]}


def test_bad_slots(llm: Any) -> None:
    llm.eval([5, 6])
    batch = BatchSampler(llm, 1)
    with pytest.raises(ValueError, match=r"slots\[0\] = 0: expected a slot that `admit` has given"):
        batch([-1], [0])
    with pytest.raises(TypeError, match="prompt_ids: expected a list"):
        batch.admit("text")
    with pytest.raises(ValueError, match="temperature"):
        batch.admit([1], temperature=-1)
    assert batch.admit([1], seed=3) == 0
    with pytest.raises(RuntimeError, match="all 1 slots are taken"):
        batch.admit([1])
    with pytest.raises(ValueError, match="positions: expected 1, one for each slot, got 2"):
        batch([-1, -1], [0])
    assert batch([-1], [0]).tokens.tolist() == drawn([logits_of(llm, [-1])[0]], 1, 3)
    for slot in (1, -1):
        with pytest.raises(ValueError, match=f"slot = {slot}: expected a slot"):
            batch.release(slot)
    batch.release(0)
    with pytest.raises(ValueError, match="slot = 0: expected a slot"):
        batch.release(0)


def test_a_fresh_seed_for_each_sequence(llm: Any) -> None:
    batch = BatchSampler(llm, 3)
    for _ in range(3):
        batch.admit([1])
    assert len(set(batch._sequences.sampler.seeds.tolist())) == 3


@pytest.mark.parametrize(
    ("prompts", "options", "told"),
    [
        ("text", {}, "prompts: expected a list of prompts"),
        ([], {}, "prompts: expected at least one"),
        ([""], {}, r"prompts\[0\]: expected at least 1 token id"),
        (["a", [1.5]], {}, r"prompts\[1\]: expected a list or an array"),
        (["a"], {"max_tokens": 0}, "max_tokens = 0"),
        (["a"], {"max_tokens": 256}, r"prompts\[0\]: 1 ids and max_tokens = 256: expected at most llm.n_ctx.. = 256"),
        (["a"], {"temperature": [1.0, 2.0]}, "temperature"),
        (["a"], {"seed": [1, 2]}, "seed"),
        (["a"], {"top_q": 2}, "top_q"),
    ],
)
def test_bad_arguments_of_batches(llm: Any, prompts: Any, options: Any, told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        stream(llm, prompts, **options)


def test_the_example() -> None:
    text = output_of("llama_cpp_batch")
    assert text.count("\n- ") == 3
    assert len(text) > 300
