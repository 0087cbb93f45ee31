"""One call of the Triton engine: its launches, and the tables that they read."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import torch

from fastsample.backends import Outputs
from fastsample.backends.triton_launch import launch_options
from fastsample.backends.triton_memory import ARRIVALS, SEMAPHORES, Layout, Memory, State, Table, history_words, kernels
from fastsample.inputs import Bias, Rows

Tensor = torch.Tensor
Verified: TypeAlias = "tuple[Tensor, Tensor, Tensor]"  # drafts int64 [B, K]; num_accepted and status int32 [B]

ROUNDS = {torch.bfloat16: 4, torch.float16: 5, torch.float32: 8}  # of 4 bits each, from the top: what its keys need
EDIT_PARTS = 8
MIN_CHUNKS = 128  # smaller sizes are not worth a kernel of their own
WORDS = 128  # of a kept set that are listed at once


class Plans(Protocol):
    """What this takes of `fastsample.backends.triton.TritonEngine`."""

    one_launch: bool

    def layout(self, table: Table) -> Layout: ...

    def memory(self, logits: Tensor, rows: Rows) -> Memory: ...


class Call:
    """One call's launches, all on the current stream."""

    def __init__(self, engine: Plans, logits: Tensor, rows: Rows, out: Outputs, verified: Verified | None) -> None:
        self.engine, self.logits, self.rows, self.out = engine, logits, rows, out
        self.verified = verified
        self.batch, self.vocab = logits.shape
        self.probs = out.input == "probs"
        self.memory = engine.memory(logits, rows)
        self.options = launch_options(logits.device)

    def run(self) -> None:
        if self.batch == 0:
            return
        out = self.out
        table = self.processed()
        state = self.sample("state", table, self.rows.records, out.status, out.tokens)
        for kind, target in (("FILTERED", out.filtered), ("PROBABILITIES", out.probabilities)):
            if target is not None:
                self.write(kind, table, state, target)
        if out.tokens is not None and out.weights is not None:
            self.law(table, state, out.tokens, out.weights)
        if out.tokens is not None:
            self.keep(table, state, out.tokens)
        if out.tokens is not None and out.mode is not None:
            self.logprobs(table, state, out.tokens)

    def processed(self) -> Table:
        """Stages 0 to 2, and what stage 3 needs; the logits themselves where a call has no mask, bias or token ids."""
        rows, logits = self.rows, self.logits
        rounds = ROUNDS[logits.dtype]
        counted = bool(rows.lists)
        if rows.bitmask is None and rows.bias is None and not counted:
            return Table(logits, rounds)
        width = -(-self.vocab // 16) * 16
        x = self.memory("x", self.batch * width, torch.float32).view(self.batch, width)
        counts = x  # stands in for a pointer that no kernel follows
        if counted:
            counts = self.memory("counts", 2 * self.batch * width, torch.int32).view(2 * self.batch, width)
        if counted or rows.bias is not None:
            rounds = ROUNDS[torch.float32]
        table = Table(x[:, : self.vocab], rounds, counts if counted else None)
        mask = rows.bitmask
        block = self.engine.layout(table).block
        kernels("process").prepare[(self.batch, -(-self.vocab // block))](
            logits,
            logits.stride(0),
            logits if mask is None else mask,
            0 if mask is None else _stride(mask),
            0 if mask is None else mask.shape[1],
            x,
            counts,
            width,
            self.vocab,
            rows.records,
            _stride(rows.records),
            HAS_MASK=mask is not None,
            HAS_COUNTS=counted,
            PROBS=self.probs,
            BLOCK=block,
            **self.options,
        )
        if counted or rows.bias is not None:
            self.edit(x, counts, rows.bias)
        return table

    def edit(self, x: Tensor, counts: Tensor, bias: Bias | None) -> None:
        rows = self.rows
        words = history_words(sum(ids.shape[1] for ids in rows.lists))
        row_ptr, bias_ids, bias_values = (x, x, x) if bias is None else bias.tensors
        kernels("process").edit[(self.batch, EDIT_PARTS)](
            x,
            counts,
            x.stride(0),
            row_ptr,
            bias_ids,
            bias_values,
            *_list(rows.prompt_ids, x),
            *_list(rows.output_ids, x),
            *_list(rows.breakers, x),
            *_list(rows.drafted_ids, x),
            x if rows.requests is None else rows.requests,
            self.vocab,
            rows.records,
            _stride(rows.records),
            self.memory("history", self.batch * words, torch.int32),
            words,
            HAS_BIAS=bias is not None,
            HAS_PROMPT=rows.prompt_ids is not None,
            HAS_OUTPUT=rows.output_ids is not None,
            HAS_DRAFTS=rows.drafted_ids is not None,
            HAS_REQUESTS=rows.requests is not None,
            BLOCK=256,
            **self.options,
        )

    def sample(self, name: str, table: Table, records: Tensor, status: Tensor, tokens: Tensor | None = None) -> State:
        """What is kept, and tokens where wanted, in one launch; one per phase where interpreted rows are split."""
        layout = self.engine.layout(table)
        size = self.batch * layout.record
        words = self.memory(name, size, torch.int64)
        sems = self.memory(SEMAPHORES, self.batch, torch.int32)
        split = layout.parts > 1
        options = self.options | ({"launch_cooperative_grid": True} if split and self.options else {})
        phases = [(0, layout.last)]
        if split and not self.engine.one_launch:
            phases = [(phase, phase + 1) for phase in range(layout.last)]
        seeds, offsets = self.rows.seeds, self.rows.offsets
        verified = self.verified if tokens is not None else None
        drafts = (words, words, words, words, 1) if verified is None else (*verified, *self.arrivals(verified[0]))
        for first, last in phases:
            kernels("sample").sample[(self.batch, layout.parts)](
                table.x,
                table.stride,
                words if table.counts is None else table.counts,
                records,
                _stride(records),
                seeds,
                _stride(seeds),
                offsets,
                _stride(offsets),
                status,
                words if tokens is None else tokens,
                0 if tokens is None else self.out.num_samples,
                words,
                layout.record,
                sems,
                self.vocab,
                layout.chunks,
                first,
                last,
                *drafts,
                VERIFIES=verified is not None,
                HAS_COUNTS=table.counts is not None,
                PROBS=self.probs,
                ROUNDS=layout.rounds,
                SPLIT=split and self.engine.one_launch,
                CHUNKS=max(MIN_CHUNKS, _power_of_two(layout.chunks)),
                VEC=layout.vec,
                BLOCK=layout.block,
                **options,
            )
        return State(words.view(self.batch, layout.record), layout)

    def arrivals(self, ids: Tensor) -> tuple[Tensor, int]:
        """How many rows of each request have drawn, and how many there are of one."""
        return self.memory(ARRIVALS, len(ids), torch.int32), ids.shape[1] + 1

    def write(self, what: str, table: Table, state: State, target: Tensor) -> None:
        module = kernels("outputs")
        module.write[(self.batch, state.layout.chunks)](
            table.x,
            table.stride,
            self.rows.records,
            _stride(self.rows.records),
            state.words,
            state.layout.record,
            target,
            self.vocab,
            WHAT=getattr(module, what).value,
            PROBS=self.probs,
            BLOCK=state.layout.block,
            **self.options,
        )

    def law(self, table: Table, state: State, tokens: Tensor, weights: Tensor) -> None:
        """The law of draw 0, and tokens that are given instead of those that were drawn."""
        rows, given, masses, module = self.rows, self.out.given, self.out.masses, kernels("law")
        seen = (
            *(table.x, table.stride, rows.records, _stride(rows.records)),
            *(rows.seeds, _stride(rows.seeds), rows.offsets, _stride(rows.offsets)),
            *(state.words, state.layout.record),
        )
        module.weigh_tokens[(self.batch,)](
            *seen, tokens, tokens if given is None else given, weights, self.vocab,
            HAS_GIVEN=given is not None, PROBS=self.probs, **self.options,
        )  # fmt: skip
        if masses is not None:
            module.write_masses[(self.batch, state.layout.chunks)](
                *seen, masses, self.vocab, PROBS=self.probs, BLOCK=state.layout.block, **self.options,
            )  # fmt: skip

    def keep(self, table: Table, state: State, tokens: Tensor) -> None:
        """What is kept and what it weighs, if anything is wanted of that."""
        out, layout, records = self.out, state.layout, self.rows.records
        asked = {"COUNT": out.kept_count, "BITMASK": out.kept_bitmask}
        asked |= {"MASS": out.log_kept_mass, "ENTROPY": out.entropy}
        if all(buffer is None for buffer in asked.values()):
            return
        kernels("keep").keep[(self.batch, layout.chunks)](
            table.x, table.stride, records, _stride(records), state.words, layout.record, tokens, out.num_samples,
            *(tokens if buffer is None else buffer for buffer in asked.values()),
            self.memory(ARRIVALS, self.batch, torch.int32), self.vocab, layout.chunks,
            **{name: buffer is not None for name, buffer in asked.items()},
            PROBS=self.probs, CHUNKS=max(MIN_CHUNKS, _power_of_two(layout.chunks)), BLOCK=layout.block, **self.options,
        )  # fmt: skip

    def logprobs(self, table: Table, state: State, tokens: Tensor) -> None:
        """Log-probabilities and ranks of the tokens, and the top-n: launches that only these outputs need."""
        out, raw = self.out, self.out.mode == "raw"
        unused = self.memory("unused", self.batch, torch.int32)
        listed = self.memory("listed", self.batch, torch.int32)
        records = self.rows.records
        if raw:
            table = Table(self.logits, ROUNDS[self.logits.dtype])
            records = self.memory.record(top_k=0)
            state = self.sample("raw", table, records, unused)
        draws = out.num_samples
        assert out.logprobs is not None
        assert out.ranks is not None
        kernels("logprobs").sampled[(self.batch * draws,)](
            table.x, table.stride, records, _stride(records), state.words, state.layout.record,
            tokens, out.logprobs, out.ranks, listed, draws, RAW=raw, PROBS=self.probs,
            **self.options,
        )  # fmt: skip
        layout = state.layout
        kernels("logprobs").rank[(self.batch, layout.parts)](
            table.x, table.stride, tokens, out.ranks, draws, self.vocab, layout.chunks, BLOCK=layout.block,
            **self.options,
        )  # fmt: skip
        if out.top_ids is not None and out.top_logprobs is not None:
            self.top(table, state, records, tokens, listed, unused, out.top_ids, out.top_logprobs)

    def top(
        self,
        table: Table,
        state: State,
        records: Tensor,
        tokens: Tensor,
        listed: Tensor,
        unused: Tensor,
        top_ids: Tensor,
        top_logprobs: Tensor,
    ) -> None:
        """The first N of the rank order, which top-k finds."""
        raw, n, draws = self.out.mode == "raw", self.out.num_top, self.out.num_samples
        if not raw:
            # A floor on mass may leave gaps in the rank order, so what is kept is written out first.
            kept = self.memory("kept", self.batch * self.vocab, torch.float32)
            kept = kept.view(self.batch, self.vocab)
            self.write("KEPT", table, state, kept)
            table = Table(kept, table.rounds)
        cuts = self.sample("cuts", table, self.memory.record(top_k=n), unused)
        layout = cuts.layout
        found = self.memory("found", self.batch * n, torch.int64)
        kernels("logprobs").collect[(self.batch, layout.chunks)](
            table.x, table.stride, state.words, state.layout.record, cuts.words, layout.record, tokens, draws, listed,
            found, n,
            self.vocab, BLOCK=layout.block, **self.options,
        )  # fmt: skip
        block = min(256, _power_of_two(n))
        kernels("logprobs").arrange[(self.batch, -(-n // block))](
            records, _stride(records), state.words, state.layout.record, tokens, draws, listed, found, n,
            top_ids, top_logprobs, RAW=raw, PROBS=self.probs, BLOCK=block, **self.options,
        )  # fmt: skip


def _stride(tensor: Tensor) -> int:
    """Row stride; 0 where all rows share the first."""
    return tensor.stride(0) if tensor.shape[0] > 1 else 0


def _list(ids: Tensor | None, unused: Tensor) -> tuple[Tensor, int, int]:
    """A list per row as kernels take it: pointer, row stride, length."""
    return (unused, 0, 0) if ids is None else (ids, _stride(ids), ids.shape[1])


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
