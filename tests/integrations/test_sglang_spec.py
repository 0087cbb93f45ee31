"""The verification of SGLang's drafts, on trees without an engine: each node is what plain sampling gives there."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_engine import VOCAB, make_model
from sglang_spec import kernels, linked
from stacks import missing

import fastsample as fs

WHY = missing("SGLang", "sglang")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHY is not None, reason=str(WHY)),
    pytest.mark.filterwarnings("default"),
]

IDS = 4  # the drafts are of the first ids only, so that they repeat
ROWS: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_k": 30, "repetition_penalty": 1.3, "min_new_tokens": 4},
    {"top_p": 0.8, "min_p": 0.01, "frequency_penalty": 0.37, "presence_penalty": 0.21},
    {"temperature": 1.4, "frequency_penalty": -0.3, "repetition_penalty": 0.7, "min_new_tokens": 2},
    {"top_k": 1},
]
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8], [9, 9]]
OUTPUTS = [[3, 3, 1], [2], [0, 5], [7, 7, 7, 7]]  # each ends in the root
SEEDS = [5, -7, 2**40, 8]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def ours(model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that verifies, as in a server that has chosen fastsample and whose schedule does not run ahead."""
    monkeypatch.syspath_prepend(model)
    from sglang.srt.speculative import eagle_utils

    from fastsample.integrations.sglang import penalties, speculation

    def walk(topk: int, **tensors: Any) -> Any:
        names = {name: name.replace("retrieve", "retrive") for name in tensors}  # spelt so by SGLang's kernels
        kernels().verify_tree_greedy_cpu(**{names[name]: value for name, value in tensors.items()})
        return tensors["predicts"], tensors["accept_index"], tensors["accept_token_num"]

    group = SimpleNamespace(world_size=1)
    monkeypatch.setattr(eagle_utils, "verify_tree_greedy_func", walk)
    monkeypatch.setattr(speculation, "is_chosen", lambda: True)
    monkeypatch.setattr(speculation, "left", lambda algorithm: None)
    monkeypatch.setattr(speculation, "is_dp_attention_enabled", lambda: False)
    monkeypatch.setattr(speculation, "get_parallel", lambda: SimpleNamespace(tp_group=group))
    monkeypatch.setattr(penalties, "get_schedule", lambda: SimpleNamespace(disable_overlap_schedule=True))
    return speculation


def params(row: dict[str, Any]) -> SimpleNamespace:
    off = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "min_new_tokens": 0}
    return SimpleNamespace(**{"stop_token_ids": {2, 5, 40}, **off, **row})


class Requests(SimpleNamespace):
    """A batch of SGLang, which its penalizers refer to weakly."""


def penalizers(rows: list[dict[str, Any]]) -> Any:
    """SGLang's, of requests that have no output yet."""
    from sglang.srt.sampling import penaltylib as p

    stop = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=None)
    reqs = [SimpleNamespace(sampling_params=params(row), eos_token_ids=None, tokenizer=stop) for row in rows]
    kinds = (p.BatchedFrequencyPenalizer, p.BatchedMinNewTokensPenalizer)
    more = (p.BatchedPresencePenalizer, p.BatchedRepetitionPenalizer)
    batch = Requests(reqs=reqs, device="cpu")
    return p.BatchedPenalizerOrchestrator(VOCAB, batch, {*kinds, *more})


def info(rows: list[dict[str, Any]], **more: Any) -> SimpleNamespace:
    columns = {
        "temperatures": torch.tensor([[row.get("temperature", 1.0)] for row in rows]),
        "top_ks": torch.tensor([row.get("top_k", 1 << 30) for row in rows], dtype=torch.int32),
        "top_ps": torch.tensor([row.get("top_p", 1.0) for row in rows]),
        "min_ps": torch.tensor([row.get("min_p", 0.0) for row in rows]),
        "sampling_seed": torch.tensor(SEEDS[: len(rows)]),
    }
    names = ("acc_additive_penalties", "acc_scaling_penalties", "logit_bias", "_fastsample_penalizers")
    nothing = dict.fromkeys((*names, "sampling_mask_batch_indices", "sampling_support_logprobs_capture_indices"))
    no = dict.fromkeys(("is_all_greedy", "has_watermark_candidates", "has_custom_logit_processor"), False)
    return SimpleNamespace(**{**columns, **nothing, **no, **more})


def batch_of(given: SimpleNamespace) -> SimpleNamespace:
    count = len(given.temperatures)
    mode = SimpleNamespace(is_idle=lambda: False)
    return SimpleNamespace(
        forward_mode=mode, sampling_info=given, spec_algorithm=None, seq_lens=[0] * count, device="cpu"
    )


def trees(trial: int, requests: int, nodes: int, kind: str) -> list[list[int]]:
    """Parents of random trees; a node of a ragged one may be in no tree."""
    g = torch.Generator().manual_seed(trial)

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=g))

    found = []
    for _ in range(requests):
        above = [-1]
        for node in range(1, nodes):
            inside = [at for at in range(node) if at == 0 or above[at] >= 0]
            parent = {"chain": node - 1, "wide": inside[pick(min(2, len(inside)))]}.get(kind, inside[pick(len(inside))])
            above.append(-1 if kind == "ragged" and pick(4) == 0 else parent)
        found.append(above)
    return found


def way(above: list[int], node: int) -> list[int]:
    """From below the root to the node."""
    found = []
    while node > 0 and above[node] >= 0:
        found.append(node)
        node = above[node]
    return found[::-1]


def walked(above: list[int], tokens: list[int], drawn: list[int]) -> list[int]:
    path, node = [0], 0
    while True:
        right = [child for child in range(1, len(above)) if above[child] == node and tokens[child] == drawn[node]]
        if not right:
            return path
        node = right[0]
        path.append(node)


KINDS = ["chain", "wide", "any", "ragged"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [1, 2, 7, 12])
def test_the_way_to_each_node(ours: Any, kind: str, nodes: int) -> None:
    for trial in range(5):
        parents = trees(trial, 3, nodes, kind)
        tree = ours.Tree(linked(torch.zeros(3, nodes, dtype=torch.int64), parents, [0] * 3, nodes), 3)
        for request, above in enumerate(parents):
            for node in range(nodes):
                if node == 0 or above[node] >= 0:
                    assert tree.way[request, node].nonzero().flatten().tolist() == sorted(way(above, node))


def sharp(trial: int, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits that favour the ids of the drafts, so that some are accepted."""
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(trial)) * 2
    logits[:, :IDS] += 8
    return logits.to(dtype)


def drafts(trial: int, requests: int, nodes: int) -> torch.Tensor:
    tokens = torch.randint(IDS, (requests, nodes), generator=torch.Generator().manual_seed(trial))
    tokens[:, 0] = torch.tensor([output[-1] for output in OUTPUTS[:requests]])
    return tokens


def starts() -> list[int]:
    return [len(prompt) + len(output) - 1 for prompt, output in zip(PROMPTS, OUTPUTS, strict=True)]


def check(given: SimpleNamespace, parents: list[list[int]], drawn: list[list[int]], found: Any) -> int:
    """What verify returns against the walk by hand over what was drawn; returns the number of accepted drafts."""
    predict, lengths, index = found
    nodes = given.draft_token_num
    assert (predict.dtype, lengths.dtype, index.dtype) == (torch.int32,) * 3
    assert (predict.shape, lengths.shape) == ((len(parents) * nodes,), (len(parents),))
    assert index.shape == (len(parents), given.max_tree_depth)
    for request, above in enumerate(parents):
        tokens = given.draft_token[request * nodes : (request + 1) * nodes].tolist()
        path = [request * nodes + node for node in walked(above, tokens, drawn[request])]
        assert index[request].tolist() == path + [-1] * (given.max_tree_depth - len(path))
        assert int(lengths[request]) == len(path)
        assert predict[path].tolist() == [drawn[request][node - request * nodes] for node in path]
    return int(lengths.sum()) - len(parents)


FIELDS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_nodes_are_drawn_as_fastsample_draws(ours: Any, kind: str, dtype: torch.dtype) -> None:
    accepted = 0
    for trial in range(12):
        parents, tokens, logits = trees(trial, 4, 8, kind), drafts(trial, 4, 8), sharp(trial, 32, dtype)
        given = linked(tokens, parents, starts(), 8)
        asked = info(ROWS)
        fields = {name: [row.get(name, off) for row in ROWS for _ in range(8)] for name, off in FIELDS.items()}
        seeds = torch.tensor(SEEDS).repeat_interleave(8)
        offsets = [
            start + len(way(above, node)) for start, above in zip(starts(), parents, strict=True) for node in range(8)
        ]
        wanted = fs.sample(
            logits, **fields, order="joint", seed=seeds, offset=torch.tensor(offsets), backend="reference"
        )
        found = ours.verify(None, given, batch_of(asked), SimpleNamespace(next_token_logits=logits.clone()))
        accepted += check(given, parents, wanted.tokens.view(4, 8).tolist(), found)
    assert accepted > 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1 << 20, 20])
def test_masks_are_what_was_kept_of_the_nodes_along_the_ways(
    ours: Any, monkeypatch: pytest.MonkeyPatch, kind: str, limit: int
) -> None:
    """Of three requests, the last two of which ask for the probabilities of all ids; some ids are beyond the cap."""
    monkeypatch.setattr(ours.masks, "cap", lambda: limit)
    rows, support, statuses = torch.tensor([0, 1, 3]), torch.tensor([1, 2]), set()
    for trial in range(6):
        parents, tokens, logits = trees(trial, 4, 8, kind), drafts(trial, 4, 8), sharp(trial, 32)
        more = {"sampling_mask_batch_indices": rows, "sampling_support_logprobs_capture_indices": support}
        asked = info(ROWS, **more, sampling_mask_top_ks=[row.get("top_k", 1 << 30) for row in ROWS])
        output = SimpleNamespace(next_token_logits=logits.clone())
        predict, lengths, index = ours.verify(None, linked(tokens, parents, starts(), 8), batch_of(asked), output)
        masks = output.sampling_mask_output
        assert torch.equal(masks.num_accept_tokens, lengths[rows])
        fields = {name: [row.get(name, off) for row in ROWS for _ in range(8)] for name, off in FIELDS.items()}
        wanted = fs.probabilities(logits, **fields, order="joint", backend="reference").double()
        for row, request in enumerate(rows.tolist()):
            for at, node in enumerate(index[request, : lengths[request]].tolist()):
                n, ids = int(masks.lengths[row, at]), masks.token_ids[row, at].long()
                kept = wanted[node].nonzero()[:, 0].tolist()
                statuses.add(int(masks.statuses[row, at]))
                assert masks.statuses[row, at] == int(len(kept) > limit)
                assert n == min(len(kept), limit)
                if n == len(kept):
                    assert sorted(ids[:n].tolist()) == kept
                chosen = wanted[node, predict[node].long()].log()
                torch.testing.assert_close(masks.selected_logprobs[row, at].double(), chosen, atol=1e-5, rtol=0)
                if request != 0:
                    found = masks.support_logprobs[row - 1, at, :n].double()
                    torch.testing.assert_close(found, wanted[node, ids[:n]].log(), atol=1e-5, rtol=0)
    assert statuses == ({0} if limit > VOCAB else {0, 1})


def test_masks_of_a_greedy_batch_are_its_tokens(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours.masks, "cap", lambda: 1)
    rows, output = torch.tensor([0, 2]), SimpleNamespace(next_token_logits=sharp(1, 32))
    asked = info(ROWS, is_all_greedy=True, sampling_mask_batch_indices=rows)
    given = linked(drafts(1, 4, 8), trees(1, 4, 8, "any"), starts(), 8)
    predict, lengths, index = ours.verify(None, given, batch_of(asked), output)
    masks = output.sampling_mask_output
    for row, request in enumerate(rows.tolist()):
        n = int(lengths[request])
        assert masks.token_ids[row, :n, 0].tolist() == predict[index[request, :n].long()].tolist()
        assert masks.lengths[row, :n].tolist() == [1] * n
        assert masks.selected_logprobs[row, :n].tolist() == [0.0] * n
        assert masks.statuses[row, :n].tolist() == [0] * n


def test_a_greedy_batch_takes_the_best(ours: Any) -> None:
    parents, tokens, logits = trees(1, 4, 8, "any"), drafts(1, 4, 8), sharp(1, 32)
    given = linked(tokens, parents, starts(), 8)
    found = ours.verify(
        None, given, batch_of(info(ROWS, is_all_greedy=True)), SimpleNamespace(next_token_logits=logits)
    )
    check(given, parents, logits.argmax(-1).view(4, 8).tolist(), found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "only", [None, "repetition_penalty", "frequency_penalty", "presence_penalty", "min_new_tokens"]
)
def test_penalties_are_sglangs_with_the_drafts_before_each_node(ours: Any, kind: str, only: str | None) -> None:
    """To the bit: what SGLang's penalizers do without drafts, a token at a time. And so after the accepted ones."""
    names = ("repetition_penalty", "frequency_penalty", "presence_penalty", "min_new_tokens")
    rows = [{name: row[name] for name in names if name in row and only in (None, name)} for row in ROWS]

    def plain(histories: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        """One row for each of the four requests, with SGLang's own code."""
        from sglang.srt.sampling.penaltylib.repetition_penalty import apply_scaling_penalties

        lines = []
        for at, history in enumerate(histories):
            own = penalizers([rows[at]])
            for token in history:
                own.cumulate_output_tokens(torch.tensor([token]))
            additive = torch.zeros(1, VOCAB)
            own.accumulate_additive_penalties(additive)
            line = logits[at, None] + additive
            scaling = own.accumulate_scaling_penalties()
            if scaling is not None:
                apply_scaling_penalties(line, scaling)
            lines.append(line)
        return torch.cat(lines)

    nodes = 10
    for trial in range(3):
        parents, tokens, logits = trees(trial, 4, nodes, kind), drafts(trial, 4, nodes), sharp(trial, 4 * nodes)
        tokens[1:3, 1:] = 2  # so often that a sum rounds otherwise than a product
        given = linked(tokens, parents, starts(), nodes)
        state = penalizers(rows)
        count_outputs(state, OUTPUTS)
        view = logits.clone()
        tree = ours.Tree(given, 4)
        ours.Penalties.of(info(rows, _fastsample_penalizers=state)).apply(view.view(4, nodes, VOCAB), tree)
        for node in range(nodes):
            histories = [
                output + tokens[row, way(above, node)].tolist()
                for row, (output, above) in enumerate(zip(OUTPUTS, parents, strict=True))
            ]
            inside = [row for row in range(4) if node == 0 or parents[row][node] >= 0]
            wanted = plain(histories, logits.view(4, nodes, VOCAB)[:, node])
            assert torch.equal(view.view(4, nodes, VOCAB)[inside, node], wanted[inside])


def count_outputs(state: Any, outputs: list[list[int]]) -> None:
    """Have SGLang's penalizers count outputs of different lengths, each request by itself."""
    for row, output in enumerate(outputs):
        for token in output:
            for one in state.penalizers.values():
                if one.is_prepared():
                    count_one(one, row, token)


def count_one(one: Any, row: int, token: int) -> None:
    """A penalizer's own counting on a view of one row."""
    views = {name: value for name, value in vars(one).items() if isinstance(value, torch.Tensor)}
    copy = object.__new__(type(one))
    vars(copy).update({name: value[row, None] for name, value in views.items()})
    copy._cumulate_output_tokens(torch.tensor([token]))


def test_penalties_go_on_with_what_was_accepted(ours: Any) -> None:
    """After a step and SGLang's own counting of the last token, the penalizers are as after as many plain steps."""
    accepted = 0
    for trial in range(8):
        parents, tokens = trees(trial, 4, 8, "wide"), drafts(trial, 4, 8)
        given = linked(tokens, parents, starts(), 8)
        state, wanted = penalizers(ROWS), penalizers(ROWS)
        count_outputs(state, OUTPUTS)
        logits = SimpleNamespace(next_token_logits=sharp(trial, 32))
        predict, lengths, index = ours.verify(None, given, batch_of(info(ROWS, _fastsample_penalizers=state)), logits)
        news = [predict[line[line >= 0].long()].tolist() for line in index]
        accepted += int(lengths.sum()) - 4
        state.cumulate_output_tokens(torch.tensor([new[-1] for new in news]))
        count_outputs(wanted, [output + new for output, new in zip(OUTPUTS, news, strict=True)])
        for kind, one in state.penalizers.items():
            for name, value in vars(one).items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, vars(wanted.penalizers[kind])[name]), (kind, name)
    assert accepted > 3


def test_penalties_of_an_overlapped_schedule_are_sglangs(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsample.integrations.sglang import penalties

    monkeypatch.setattr(penalties, "get_schedule", lambda: SimpleNamespace(disable_overlap_schedule=False))
    additive, scaling = torch.randn(4, VOCAB), torch.rand(4, VOCAB) + 0.5
    state = penalizers(ROWS)
    more = {"_fastsample_penalizers": state, "acc_additive_penalties": additive, "acc_scaling_penalties": scaling}
    given, logits = linked(drafts(0, 4, 3), trees(0, 4, 3, "chain"), starts(), 3), sharp(0, 12)
    found = logits.clone()
    assert ours._process(found, info(ROWS, **more), ours.Tree(given, 4), None) is None
    wanted = logits + additive.repeat_interleave(3, 0)
    factor = scaling.repeat_interleave(3, 0)
    assert torch.equal(found, torch.where(wanted < 0, wanted * factor, wanted / factor))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_newest_token_is_counted_when_it_is_known(ours: Any, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """On a CPU, where a schedule that runs ahead has it before the penalties are applied."""
    from fastsample.integrations.sglang import penalties

    schedule = SimpleNamespace(disable_overlap_schedule=False, enable_mixed_chunk=False)
    monkeypatch.setattr(penalties, "get_schedule", lambda: schedule)
    monkeypatch.setattr(penalties, "is_chosen", lambda: True)
    counted: list[Any] = []
    state = SimpleNamespace(cumulate_output_tokens=lambda ids: counted.append(ids.tolist()))
    batch = SimpleNamespace(
        device=device,
        reqs=[1, 2],
        spec_algorithm=SimpleNamespace(is_none=lambda: True),
        sampling_info=SimpleNamespace(penalizer_orchestrator=state),
    )

    def theirs(batch: Any, tokens: Any) -> None:
        batch.input_ids = tokens

    penalties.count(lambda batch: counted.append("SGLang"), batch)
    for _ in range(2):  # each is counted once
        penalties.feed(theirs, batch, torch.tensor([7, 8]))
    assert counted == ([[7, 8]] if device == "cpu" else ["SGLang"])
    schedule.disable_overlap_schedule = True
    penalties.count(lambda batch: counted.append("SGLang"), batch)
    assert counted[-1] == "SGLang"


def test_masks_and_bias_come_behind_the_penalties(ours: Any) -> None:
    bias, allowed = torch.randn(4, VOCAB), torch.rand(12, VOCAB) < 0.5
    mask = SimpleNamespace(apply=lambda logits: logits.masked_fill_(~allowed, -torch.inf))
    given, logits = linked(drafts(0, 4, 3), trees(0, 4, 3, "chain"), starts(), 3), sharp(0, 12)
    found = logits.clone()
    ours._process(found, info(ROWS, logit_bias=bias), ours.Tree(given, 4), mask)
    assert torch.equal(found, (logits + bias.repeat_interleave(3, 0)).masked_fill(~allowed, -torch.inf))


EXTRAS: list[dict[str, Any]] = [
    {"typical_p": 0.8, "order": "temperature_last"},
    {},
    {"dry_multiplier": 1.5, "dry_allowed_length": 1, "dry_breakers": [9]},
    {"no_repeat_ngram_size": 2, "xtc_probability": 0.5, "xtc_threshold": 0.05},
]


def test_the_filters_that_sglang_lacks_know_the_drafts(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsample.integrations import sglang

    seen, walk = [], ours._walk

    def look(given: Any, tree: Any, drawn: torch.Tensor, device: Any) -> Any:
        seen.append(drawn)
        return walk(given, tree, drawn, device)

    monkeypatch.setattr(ours, "_walk", look)

    requests = [
        SimpleNamespace(
            sampling_params=SimpleNamespace(custom_params=extra or None),
            origin_input_ids=array("q", prompt),
            output_ids=array("q", output),
        )
        for extra, prompt, output in zip(EXTRAS, PROMPTS, OUTPUTS, strict=True)
    ]
    for trial in range(6):
        parents, tokens, logits = trees(trial, 4, 8, "any"), drafts(trial, 4, 8), sharp(trial, 32)
        given, drawn = linked(tokens, parents, starts(), 8), []
        asked = info(ROWS, _fastsample=sglang._asked(requests))
        for row, above in enumerate(parents):
            fields = {
                **{name: ROWS[row].get(name, off) for name, off in FIELDS.items()},
                "order": "joint",
                **EXTRAS[row],
            }
            breakers = fields.pop("dry_breakers", None)
            line = []
            for node in range(8):
                history = OUTPUTS[row] + tokens[row, way(above, node)].tolist()
                sampled = fs.sample(
                    logits[row * 8 + node, None],
                    **fields,
                    prompt_ids=[PROMPTS[row]],
                    output_ids=[history],
                    dry_breakers=breakers,
                    seed=torch.tensor([SEEDS[row]]),
                    offset=len(PROMPTS[row]) + len(history) - 1,
                    backend="reference",
                )
                line.append(int(sampled.tokens))
            drawn.append(line)
        found = ours.verify(None, given, batch_of(asked), SimpleNamespace(next_token_logits=logits.clone()))
        check(given, parents, drawn, found)
        assert seen.pop().tolist() == drawn


def test_requests_without_a_seed_are_drawn_afresh(ours: Any) -> None:
    given, logits = linked(drafts(0, 1, 8), trees(0, 1, 8, "chain"), [3], 8), torch.zeros(8, VOCAB)

    def roots() -> list[int]:
        torch.manual_seed(1)
        asked = [info([{}], sampling_seed=None) for _ in range(5)]
        return [int(ours._inputs(logits, one, ours.Tree(given, 1)).draw()[0]) for one in asked]

    assert len(set(roots())) > 3
    assert roots() == roots()


def test_what_is_sglangs_goes_on_to_sglang(ours: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def theirs(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    given = linked(drafts(0, 4, 3), trees(0, 4, 3, "chain"), starts(), 3)
    output = SimpleNamespace(next_token_logits=sharp(0, 12))

    def ask(batch: Any) -> Any:
        return ours.verify(theirs, given, batch, output, "mask", uno_target_max_top_k=3)

    marked, idle, plain = (
        batch_of(info(ROWS, has_watermark_candidates=True)),
        batch_of(info(ROWS)),
        batch_of(info(ROWS)),
    )
    idle.forward_mode = SimpleNamespace(is_idle=lambda: True)
    for batch in (marked, idle):
        assert ask(batch) == ((given, batch, output, "mask"), {"uno_target_max_top_k": 3})
    monkeypatch.setattr(ours, "left", lambda algorithm: "some reason")
    assert ask(plain)[0][1] is plain
    assert "SGLang verifies drafts by itself: some reason" in caplog.text
    monkeypatch.setattr(ours, "left", lambda algorithm: None)
    monkeypatch.setattr(ours, "is_chosen", lambda: False)
    assert ask(plain)[0][1] is plain


def test_it_is_left_to_sglang_where_that_was_asked_for(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm as A

    monkeypatch.undo()  # of `left`
    rejects = [False]
    monkeypatch.setattr(ours, "get_spec", lambda: SimpleNamespace(speculative_use_rejection_sampling=rejects[0]))
    exec_ = SimpleNamespace(deterministic=SimpleNamespace(rl_on_policy_target=None))
    monkeypatch.setattr(ours, "get_exec", lambda: exec_)
    assert [one.name for one in A if ours.left(one) is None] == [
        "EAGLE",
        "EAGLE3",
        "FROZEN_KV_MTP",
        "STANDALONE",
        "NGRAM",
    ]
    exec_.deterministic.rl_on_policy_target = "fsdp"
    assert "rl_on_policy_target" in ours.left(A.EAGLE)
    rejects[0] = True
    assert "rejection" in ours.left(A.EAGLE)
