"""What ranks exchange, counted: how many messages a call takes, and how many bytes each rank sends to each other."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from cases import flat, lm, pack_bits
from ranks import on_ranks

import fastsample as fs
import fastsample.distributed as fd
from fastsample.distributed.answers import Answers
from fastsample.distributed.plan import RAW_LISTED

FIRST_WORDS = Answers.first_words

ROWS, VOCAB, RANKS = 4, 50257, 4
CUTS = tuple(VOCAB * rank // RANKS for rank in range(RANKS + 1))
G = torch.Generator().manual_seed(2)
LM, FLAT = lm(ROWS, VOCAB, G), flat(ROWS, VOCAB, G)
OF_LOGITS = 4 * (CUTS[1] - CUTS[0])  # bytes of a row that a rank would send, if logits were gathered
LIST = 8 * 256  # bytes of a row: a rank's first tokens
SUMS = 128  # bytes of a row: sums of the whole row
REFINED = 32 * 1024  # bytes of a row for each level of a search
IDS = {"output_ids": torch.arange(40).expand(ROWS, 40)}


class Traffic(NamedTuple):
    rounds: int
    bytes_of_a_row: int


def traffic(logits: torch.Tensor, call: Any = None, **how: Any) -> Traffic:
    """Of a second call, which every rank counts alike; and its tokens are those of the whole rows."""
    call = call or fs.sample

    def on_rank(wire: Any, begin: int, end: int) -> Traffic:
        split = fd.Split(begin, VOCAB, group=wire)
        for _ in range(2):
            rounds, sent = split.rounds, split.sent
            out = fs.sample(split.whole(logits[:, begin:end]), backend=split.engine, seed=1, **how)
        assert torch.equal(out.tokens, expected)
        return Traffic(split.rounds - rounds, -(-(split.sent - sent) // len(logits)))

    expected = fs.sample(logits, seed=1, **how).tokens
    found = on_ranks(CUTS, on_rank)
    assert found == [found[0]] * RANKS
    return found[0]


ENOUGH: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (1, {"temperature": 0.0}),
    "greedy with penalties": (1, {"temperature": 0.0, "repetition_penalty": 1.5, **IDS}),
    "greedy with a mask": (1, {"temperature": 0.0, "bitmask": torch.full((1571,), -2, dtype=torch.int32)}),
    "top-k": (50, {"top_k": 50}),
    "top-k of 1024": (1024, {"top_k": 1024, "temperature": 1.4}),
    "top-k, top-p": (50, {"top_k": 50, "top_p": 0.9}),
    "top-k, min-p": (20, {"top_k": 20, "min_p": 0.1, "order": "min_p_first"}),
    "top-k, everything": (40, {"top_k": 40, "top_p": 0.9, "typical_p": 0.9, "eta_cutoff": 1e-3, "top_a": 0.01}),
    "top-k, XTC": (40, {"top_k": 40, "xtc_probability": 0.5, "order": "temperature_last", "min_p": 0.01}),
    "top-k, penalties, bias": (40, {"top_k": 40, "presence_penalty": 1.0, "bias": {7: 3.0}, **IDS}),
    "top-k, history": (40, {"top_k": 40, "dry_multiplier": 1.0, "no_repeat_ngram_size": 3, **IDS}),
    "top-k, draws, reports": (
        40,
        {"top_k": 40, "num_samples": 9, "logprobs": "processed", "top_logprobs": 5, "kept": "ids", "entropy": True},
    ),
    "rows of top-k and greedy": (30, {"top_k": [30, 5, 9, 0], "temperature": [1.0, 0.5, 1.0, 0.0]}),
}


@pytest.mark.parametrize("logits", [LM, FLAT], ids=["lm", "flat"])
@pytest.mark.parametrize(("k", "how"), ENOUGH.values(), ids=ENOUGH)
def test_one_round_where_top_k_decides(k: int, how: dict[str, Any], logits: torch.Tensor) -> None:
    """8 bytes for each of the k first tokens, and nothing else."""
    assert traffic(logits, **how) == Traffic(1, 8 * k)


FLOORS: dict[str, dict[str, Any]] = {
    "min-p": {"min_p": 0.02},
    "min-p, top-p": {"min_p": 0.02, "top_p": 0.9, "order": "min_p_first"},
    "min-p, typical, XTC": {"min_p": 0.02, "typical_p": 0.9, "xtc_probability": 0.5, **IDS, "presence_penalty": 1.0},
    "rows of min-p, top-k and greedy": {"min_p": [0.02, 0.0, 0.5, 0.1], "top_k": [0, 7, 0, 0]},
}


@pytest.mark.parametrize("how", FLOORS.values(), ids=FLOORS)
def test_one_round_where_min_p_leaves_listed_tokens(how: dict[str, Any]) -> None:
    assert traffic(LM, **how) == Traffic(1, LIST)
    assert traffic(FLAT, **how).rounds > 1


LISTED: dict[str, dict[str, Any]] = {
    "top-p": {"top_p": 0.95},
    "typical": {"typical_p": 0.9},
    "epsilon": {"epsilon_cutoff": 1e-3},
    "eta": {"eta_cutoff": 1e-3},
    "top-a": {"top_a": 0.05},
    "p-less": {"p_less": True},
    "n-sigma": {"top_n_sigma": 1.0},
    "top-p, min-p": {"top_p": 0.9, "min_p": 0.05, "order": "min_p_first"},
    "temperature last": {"top_p": 0.95, "min_p": 0.02, "temperature": 0.7, "order": "temperature_last"},
    "top-k, ties": {"top_k": 40, "ties": "all"},
    "top-k, joint": {"top_k": 40, "top_p": 0.9, "order": "joint"},
    "penalties": {"top_p": 0.95, "frequency_penalty": 0.3, **IDS},
    "reports": {"top_p": 0.9, "logprobs": "processed", "top_logprobs": 5, "kept": "ids", "entropy": True},
    "kept mass": {"top_k": 40, "kept": "count", "kept_mass": True},
}


@pytest.mark.parametrize("how", LISTED.values(), ids=LISTED)
def test_at_most_two_rounds_where_lists_decide(how: dict[str, Any]) -> None:
    found = traffic(LM, **how)
    assert found.rounds <= 2
    assert found.bytes_of_a_row <= LIST + SUMS


@pytest.mark.parametrize("how", LISTED.values(), ids=LISTED)
def test_raw_logprobs_of_given_logits_come_in_the_second_round(how: dict[str, Any]) -> None:
    """With the sums of the whole rows."""
    how = {name: value for name, value in how.items() if name not in ("frequency_penalty", *IDS)}
    found = traffic(LM, **{**how, "logprobs": "raw", "top_logprobs": 20})
    assert found.rounds == 2
    assert found.bytes_of_a_row <= LIST + SUMS


EDITS: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "output_ids": LM.topk(20).indices},
    "bias": {"bias": {int(LM[0].argmax()): -2.0, int(LM[1].argmax()): -40.0}},
    "mask": {"bitmask": pack_bits(LM.topk(9).values[:, -1:] > LM)},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("how", LISTED.values(), ids=LISTED)
def test_raw_logprobs_of_edited_logits_come_in_the_second_round(how: dict[str, Any], edit: dict[str, Any]) -> None:
    """Where the lists come with the logits of their tokens, as these were given, and the first ones of those."""
    found = traffic(LM, **{**how, **edit, "logprobs": "raw", "top_logprobs": 20})
    assert found.rounds == 2
    assert found.bytes_of_a_row <= LIST + LIST // 2 + 8 * RAW_LISTED + SUMS


@pytest.mark.parametrize("logits", [LM, FLAT], ids=["lm", "flat"])
@pytest.mark.parametrize(
    ("how", "k"), [({"temperature": 0.0}, 1), ({"top_k": 40}, 40), ({"top_k": 1024}, 1024)], ids=str
)
def test_raw_logprobs_take_a_round_more_where_one_decides(how: dict[str, Any], k: int, logits: torch.Tensor) -> None:
    """A mass, and the ranks of draws that lists do not tell; a bit says whether any rank has a mask of its own."""
    how = {**how, "logprobs": "raw", "num_samples": 3}
    assert traffic(logits, **how, top_logprobs=20) == Traffic(2, 8 * max(k, 20) + 8 + 8)
    for edit in EDITS.values():
        found = traffic(logits, **how, **edit)
        assert found.rounds == 2
        assert 8 * k <= found.bytes_of_a_row - 8 * -(-k // 2) - 8 - 8 <= 8 * k + 3 * 8


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_raw_logprobs_of_draws_that_rank_low(edit: dict[str, Any]) -> None:
    """How many tokens lie above them, ranks tell in one round more; of no other rows."""
    how = {**edit, "logprobs": "raw"}
    kept, given = traffic(FLAT, top_p=0.95, **EDITS["penalties"]), traffic(FLAT, top_p=0.95, **how)
    assert (kept.rounds, given.rounds) == (4, 5)
    assert traffic(FLAT, min_p=0.02, **how).rounds == 4
    assert traffic(FLAT, **how).rounds == 3


def test_only_rows_whose_draws_rank_low_take_more() -> None:
    first = LM.topk(300).values[:, -1:] <= LM
    low = torch.cat([first[:-1], LM[-1:] <= LM[-1].topk(9, largest=False).values[-1]])
    all_, some = (traffic(LM, top_p=0.95, logprobs="raw", bitmask=pack_bits(allowed)) for allowed in (first, low))
    assert some == Traffic(all_.rounds + 1, all_.bytes_of_a_row + 8 // ROWS)


@pytest.mark.parametrize("how", [{"top_p": 0.95}, {"top_k": 40}, {}], ids=str)
def test_raw_logprobs_where_a_rank_has_a_mask_of_its_own(how: dict[str, Any]) -> None:
    """Others know only once it has told so, and expect one in the next call."""
    allowed = torch.ones(ROWS, VOCAB, dtype=torch.bool)
    allowed[:, CUTS[1] : CUTS[2] : 2] = False
    how = {**how, "logprobs": "raw", "seed": 1}
    whole = [fs.sample(LM, **how), fs.sample(LM, bitmask=pack_bits(allowed), **how)]

    def on_rank(wire: Any, begin: int, end: int) -> list[int]:
        split, counts = fd.Split(begin, VOCAB, group=wire), []
        for masked in (False, False, True, True, True, False, False):
            rounds, mask = split.rounds, pack_bits(allowed[:, begin:end]) if masked and begin == CUTS[1] else None
            out = fs.sample(split.whole(LM[:, begin:end], mask), backend=split.engine, **how)
            counts.append(split.rounds - rounds)
            assert torch.equal(out.tokens, whole[masked].tokens)
            assert torch.equal(out.ranks, whole[masked].ranks)
        return counts

    found = on_ranks(CUTS, on_rank)
    at_first = 4 if "top_p" in how else 3 if "top_k" in how else 2
    assert found == [[3, 2, at_first, 2, 2, 2, 2]] * RANKS


def of_rules(logits: torch.Tensor, rule: str, probs: bool, accepted: int, **how: Any) -> tuple[int, int]:
    """Rounds and bytes of a second verification of a request, whose drafts after so many are no tokens: 4 rows are
    those of the target, and 3 others those that drafts were drawn from."""
    rows = logits.view(1, 4, VOCAB)
    draft = rows[:, :3]
    ids = draft.argmax(-1)
    ids[:, accepted:] = -1
    given = {"draft_probs": draft.softmax(-1)} if probs else {"draft_logits": draft}
    whole = fs.verify(rows, ids, seed=1, rule=rule, **given, **how)
    assert whole.num_accepted.tolist() == [accepted]

    def on_rank(wire: Any, begin: int, end: int) -> tuple[int, int]:
        split, own = fd.Split(begin, VOCAB, group=wire), rows[..., begin:end]
        for _ in range(2):
            rounds, sent = split.rounds, split.sent
            more = split.whole_drafts(own, {name: rows[..., begin:end] for name, rows in given.items()})
            out = fs.verify(split.whole(own), ids, backend=split.engine, seed=1, rule=rule, **more, **how)
        assert torch.equal(out.tokens, whole.tokens)
        return split.rounds - rounds, split.sent - sent

    found = on_ranks(CUTS, on_rank)
    assert found == [found[0]] * RANKS
    return found[0]


OF_LAWS = pytest.mark.parametrize("probs", [False, True], ids=["logits", "probs"])
OF_RULES = pytest.mark.parametrize("rule", ["chain", "block"])


@OF_LAWS
@OF_RULES
@pytest.mark.parametrize("accepted", [0, 3])
def test_laws_that_are_listed_need_no_more(accepted: int, rule: str, probs: bool) -> None:
    """The target's rows are listed, and then the drafts'."""
    for logits in (LM, FLAT):
        assert of_rules(logits, rule, probs, accepted, top_k=50) == (2, 7 * 8 * 50)
    rounds, sent = of_rules(LM, rule, probs, accepted, top_p=0.95)
    assert rounds <= 4
    assert sent <= 7 * (LIST + SUMS)


@OF_LAWS
@OF_RULES
@pytest.mark.parametrize("accepted", [0, 3])
def test_laws_that_are_not_listed_are_compared_in_place(accepted: int, rule: str, probs: bool) -> None:
    """What each weighs in all, and its draft; what is left after each draft, and to draw from; the token."""
    rounds, sent = of_rules(FLAT, rule, probs, accepted)
    tested, rejected = rule == "block" and accepted == 3, accepted == 0
    assert rounds == 2 + 1 + tested + rejected + 1
    assert sent == 7 * (LIST + 40) + 2 * 8 * tested + 8 * rejected + 8


SEARCHED: dict[str, dict[str, Any]] = {
    "top-p": {"top_p": 0.95},
    "typical": {"typical_p": 0.9},
    "large top-k": {"top_k": 20000},
    "large top-k, ties": {"top_k": 20000, "ties": "all"},
    "top-p, min-p": {"top_p": 0.5, "min_p": 1e-6},
    "count": {"top_p": 0.95, "kept": "count", "num_samples": 5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", SEARCHED.values(), ids=SEARCHED)
def test_flat_rows_take_four_messages(how: dict[str, Any], dtype: torch.dtype) -> None:
    """The list; sums with bins; what is in those bins that the place may be in; what is drawn."""
    found = traffic(FLAT.to(dtype), **how)
    assert found.rounds == 4 + ("ties" in how)  # ties at the last token are weighed in a message of their own
    assert found.bytes_of_a_row <= LIST + SUMS + REFINED + 8 * 1024 + SUMS


SPREAD: dict[str, tuple[int, dict[str, Any]]] = {
    "min-p": (3, {"min_p": 0.02}),
    "epsilon": (4, {"epsilon_cutoff": 1e-6}),
    "n-sigma": (4, {"top_n_sigma": 2.0}),
    "temperature last": (5, {"top_p": 0.9, "temperature": 1.5, "order": "temperature_last"}),
    "ids": (5, {"top_p": 0.95, "kept": "ids"}),
    "ranks": (5, {"top_p": 0.95, "logprobs": "processed"}),
    "raw": (5, {"top_p": 0.95, "logprobs": "raw", "top_logprobs": 20}),
    "min-p first": (5, {"top_p": 0.95, "min_p": 0.02, "order": "min_p_first"}),
    "kept mass": (5, {"top_p": 0.9, "kept_mass": True}),
    "xtc": (4, {"top_p": 0.95, "xtc_probability": 0.5, "xtc_threshold": 1e-3}),
    "xtc past the lists": (6, {"top_p": 0.95, "xtc_probability": 1.0, "xtc_threshold": 1e-4}),
    "floor behind top-p": (5, {"top_p": 0.95, "epsilon_cutoff": 1e-5}),
    "floor behind typical": (4, {"typical_p": 0.9, "epsilon_cutoff": 1e-6}),
    "two searches": (6, {"top_k": 2000, "top_p": 0.9}),
    "two searches, the second about a mean": (7, {"top_p": 0.95, "typical_p": 0.9}),
    "three searches": (9, {"top_k": 5000, "top_p": 0.9, "typical_p": 0.8}),
    "all, with an entropy": (3, {"entropy": True}),
    "all, with ranks": (4, {"logprobs": "processed"}),
    "all, many draws": (3, {"num_samples": 40}),
}


@pytest.mark.parametrize(("rounds", "how"), SPREAD.values(), ids=SPREAD)
def test_what_else_takes_more(rounds: int, how: dict[str, Any]) -> None:
    assert traffic(FLAT, **how).rounds == rounds


def test_only_rows_that_need_it_are_searched() -> None:
    """In a batch of both kinds, bins come a message after the sums."""
    mixed = torch.cat([LM[:3], FLAT[:1]])
    found, all_flat = traffic(mixed, top_p=0.95), traffic(FLAT, top_p=0.95)
    assert found.rounds == all_flat.rounds + 1
    assert found.bytes_of_a_row < LIST + SUMS + (all_flat.bytes_of_a_row - LIST) // 3


def test_ties_without_end_are_searched_level_by_level() -> None:
    """Where more tokens are equal than a rank may tell, the key is searched for, bits after bits."""
    equal = torch.zeros(ROWS, VOCAB)
    found = traffic(equal, top_p=0.95)
    assert 4 < found.rounds <= 2 + 1 + 5 + 1 + 2
    assert found.bytes_of_a_row <= LIST + SUMS + 5 * REFINED + SUMS


def test_a_wrong_guess_that_rows_are_flat_changes_no_token() -> None:
    """It costs bytes, or a message more."""
    for judged, logits in ((True, LM), (False, FLAT)):

        def told(*given: Any, flat: bool = judged) -> torch.Tensor:
            words = FIRST_WORDS(*given)
            words[:, -1] = flat
            return words

        with patch.object(Answers, "first_words", told):
            assert traffic(logits, top_p=0.95).rounds <= 5
            assert traffic(logits, typical_p=0.9).rounds <= 5


@pytest.mark.parametrize("logits", [LM, FLAT], ids=["lm", "flat"])
@pytest.mark.parametrize(
    "how", [{}, {"temperature": 1.5}, {"num_samples": 3}, {"logprobs": "raw"}, {"logprobs": "raw", "temperature": 0.7}]
)
def test_two_rounds_where_all_is_kept(how: dict[str, Any], logits: torch.Tensor) -> None:
    """A token and a mass; then the exact mass, and for each draw a place and four tokens with their ends. With raw
    log-probabilities, the first message has the first tokens as well, a bit that says that nothing is edited and the
    logit of its token; if the temperature is not 1, the second has another mass; and one more counts the tokens above
    those that rank low."""
    raw = "logprobs" in how
    words = 2 + 1 + 9 * how.get("num_samples", 1) + raw * (2 + RAW_LISTED + ("temperature" in how))
    low = int((fs.sample(logits, seed=1, **how).ranks > RAW_LISTED).sum()) if raw else 0
    assert bool(low) == (raw and logits is FLAT)
    assert traffic(logits, **how) == Traffic(2 + (low > 0), 8 * words + 8 * low // ROWS)


@pytest.mark.parametrize("how", [{"top_logprobs": 3}, *EDITS.values()], ids=["top", *EDITS])
def test_raw_logprobs_of_all_that_is_kept(how: dict[str, Any]) -> None:
    """Each draw's tokens are told as they were given."""
    found = traffic(LM, logprobs="raw", **how)
    assert found.rounds == 2
    assert found.bytes_of_a_row <= 2 * 8 + 8 + 8 + 8 * RAW_LISTED + 8 * (1 + 9) + 8


def test_a_wrong_guess_takes_two_rounds_more() -> None:
    """Where what ranks have told of their masses first is far from these, nobody has told of the token."""

    def told(*given: Any) -> torch.Tensor:
        words = FIRST_WORDS(*given)
        words[:, -1] //= 3
        return words

    with patch.object(Answers, "first_words", told):
        assert traffic(LM, num_samples=5).rounds == 4


@pytest.mark.parametrize(
    "how", [{}, {"top_p": 0.95}, {"min_p": 1e-5}, {"typical_p": 0.5}, {"top_p": 0.9, "logprobs": "raw"}]
)
def test_never_as_much_as_the_logits(how: dict[str, Any]) -> None:
    assert traffic(LM, **how).bytes_of_a_row < OF_LOGITS / 10
    assert traffic(FLAT, **how).bytes_of_a_row < VOCAB * 4 / 2


def test_a_first_call_compares_in_one_round_more() -> None:
    def on_rank(wire: Any, begin: int, end: int) -> list[tuple[int, int]]:
        split = fd.Split(begin, VOCAB, group=wire)
        counts = [(0, 0)]
        for temperature in (0.0, 0.0, 1.0):
            rows = split.whole(LM[:, begin:end])
            fs.sample(rows, backend=split.engine, seed=1, temperature=temperature, top_k=3)
            counts.append((split.rounds, split.sent))
        return counts

    first, second, third = on_ranks(CUTS, on_rank)[0][1:]
    assert first[0] == 2
    assert 0 < first[1] - 8 * ROWS <= 256
    assert second == (first[0] + 1, first[1] + 8 * ROWS)
    assert third == (second[0] + 1, second[1] + 3 * 8 * ROWS)
