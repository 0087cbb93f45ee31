"""Train the tiny GPT-2 that ships in fastsample/models/tiny-gpt2.

The text is plain English from two Debian packages: the example sentences and the definitions of WordNet 3.0
(wordnet-base), and Jane Austen's novels (r-cran-janeaustenr). `apt-get download` fetches both, or --packages names a
folder that holds them, packed or unpacked. A run with the same seed, threads, package versions and CPU gives the same
model again.

    python examples/train_tiny_gpt2.py --out fastsample/models/tiny-gpt2
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import re
import struct
import subprocess
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

PACKAGES = ("wordnet-base", "r-cran-janeaustenr")
CONTEXT = 256  # tokens
HEAD_DIM = 32
END = "<|endoftext|>"
PAD = "<|pad|>"

RARE = 2  # a text with a word that occurs less often in all of it is left out: 4096 tokens can't spell them all
LONG = 800  # characters after which a document ends
WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
TO_ASCII = str.maketrans({"‘": "'", "’": "'", "`": "'", "“": '"', "”": '"', "—": "-", "–": "-"})  # noqa: RUF001
COARSE = re.compile(
    r"obscen|offensive|slur\b|vulgar|sexual|intercourse|prostitut|disparag|derogat|genital|slang|\brap(e|ist)\b", re.I
)
# An example is a sentence, not a phrase, when it has one of these; a verb's examples need none.
FINITE = frozenset(
    re.findall(
        r"[\w']+",
        "am is are was were has had have do does did will would can could may might must shall should cannot isn't "
        "aren't wasn't weren't don't doesn't didn't can't couldn't won't wouldn't hasn't haven't hadn't i'm it's that's "
        "he's she's they're we're you're i'll i've there's let's became began bought broke brought built came caught "
        "died fell felt found gave got grew heard held kept knew laughed learned left lived looked lost loved made met "
        "moved needs played ran said sat saw seemed seems sent showed stood started stopped talked taught thought took "
        "tried turned waited walked wanted wants went won worked wrote",
    )
)


def unpack(packages: Path | None, to: Path) -> Path:
    """Return the folder under which the packages' files lie; without one of one's own they are fetched."""
    folder = packages or to
    if packages is None:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=to, check=True)
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, to], check=True)
    return to if any(folder.glob("*.deb")) else folder


def r_strings(stored: bytes) -> Iterator[list[str]]:
    """Yield the character vectors of an R package's lazy-load file: per vector a length, then zlib of R's format 3."""
    while stored:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(stored[4:])
        stored = unpacker.unused_data
        (encoding,) = struct.unpack_from(">i", data, 14)  # "X\n", three versions, the encoding's name
        count, place = *struct.unpack_from(">i", data, 22 + encoding), 26 + encoding
        lines = []
        for _ in range(count):
            (size,) = struct.unpack_from(">i", data, place + 4)
            lines.append(data[place + 8 : place + 8 + size].decode())
            place += 8 + size
        yield lines


def novels(root: Path) -> Iterator[list[str]]:
    """Yield each novel's paragraphs, without titles."""
    for lines in r_strings(next(root.rglob("janeaustenr/data/Rdata.rdb")).read_bytes()):
        text = "\n".join(lines).translate(TO_ASCII).replace("_", "").replace("--", " - ")
        paragraphs = (re.sub(r"\s+", " ", part).strip() for part in text.split("\n\n"))
        yield [part for part in paragraphs if re.fullmatch(r'["A-Z].{40,}[.!?"]', part)]


def sentence(text: str) -> str:
    """Begin with a capital and end with a stop."""
    text = re.sub(r"\s+", " ", text).strip(" ;,")
    return text[:1].upper() + text[1:] + ("" if text[-1:] in ".!?" else ".")


def definition(noun: str, meaning: str) -> str | None:
    """Say what a noun means: "A dog is a ..."; None where the meaning's first word fits no such sentence."""
    first = meaning.partition(" ")[0]
    if first in {"a", "an", "any", "one", "someone", "something"} and noun.islower():
        return sentence(f"{'an' if noun[0] in 'aeio' else 'a'} {noun} is {meaning}")
    return sentence(f"{noun} is {meaning}") if first in {"a", "an", "the"} else None


def synset(line: str, kind: str, common: set[str]) -> list[str]:
    """Return the sentences of one line of WordNet's data files: a common noun's definition, examples, no quotations."""
    fields, _, gloss = line.partition(" | ")
    _, topic, _, _, word, number, *_ = fields.split()
    meaning, *examples = re.split(r'"([^"]*)"', gloss.translate(TO_ASCII))
    meaning = re.split("[;:]", re.sub(r"\([^)]*\)", "", meaning))[0].strip()
    defined = kind == "noun" and meaning and f"{word.lower()}%1:{topic}:{int(number, 16):02}::" in common
    found = [definition(word.replace("_", " "), meaning)] if defined else []
    for example, rest in zip(examples[::2], examples[1::2], strict=True):
        words = WORD.findall(example.lower())
        clause = kind == "verb" or not FINITE.isdisjoint(words)
        if clause and len(words) >= 4 and "- " not in rest:  # a dash: what follows is its author
            found.append(sentence(example))
    return [text for text in found if text and not COARSE.search(line)]


def examples(root: Path) -> Iterator[list[str]]:
    """Yield the sentences of each part of WordNet, in the order of the files, where neighbours are alike in meaning."""
    folder = next(root.rglob("wordnet/cntlist.rev")).parent
    counts = (folder / "cntlist.rev").read_text(encoding="ascii")  # the meanings that a corpus of running text has
    common = {line.partition(" ")[0] for line in counts.splitlines()}
    for kind in ("noun", "verb", "adj", "adv"):
        lines = (folder / f"data.{kind}").read_text(encoding="ascii").splitlines()
        yield [text for line in lines if not line.startswith(" ") for text in synset(line, kind, common)]


def joined(texts: Iterable[str], between: str) -> Iterator[str]:
    """Put neighbours together until a document is long enough."""
    document = ""
    for text in texts:
        document += between * bool(document) + text
        if len(document) > LONG:
            yield document
            document = ""
    if document:
        yield document


def documents(root: Path) -> list[str]:
    """Collect the corpus: sentences and paragraphs of common words only, no one twice, as documents."""
    parts = [(" ", part) for part in examples(root)] + [("\n\n", part) for part in novels(root)]
    count = Counter(word for _, part in parts for text in part for word in WORD.findall(text.lower()))
    seen: set[str] = set()
    found = []
    for between, part in parts:
        kept = []
        for text in part:
            if text.isascii() and text not in seen and all(count[word] >= RARE for word in WORD.findall(text.lower())):
                seen.add(text)
                kept.append(text)
        found += joined(kept, between)
    return found


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> GPT2TokenizerFast:
    """Train a byte-level BPE tokenizer like GPT-2's, with a padding token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return GPT2TokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: GPT2TokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return all texts as one row of token ids, each text opened and the row closed by END."""
    stream = END + END.join(texts) + END
    return torch.tensor(tokenizer.backend_tokenizer.encode(stream).ids)


def build_model(tokenizer: GPT2TokenizerFast, layers: int, width: int) -> GPT2LMHeadModel:
    """Make a randomly initialised GPT-2 of the given depth and width."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_layer=layers,
        n_embd=width,
        n_head=width // HEAD_DIM,
        embd_pdrop=0.0,  # the run is short: no dropout anywhere
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = GPT2LMHeadModel(config)
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=pad)
    return model


def make_optimizers(model: GPT2LMHeadModel, rate: float) -> list[torch.optim.Optimizer]:
    """Make Muon for the layers' matrices, and AdamW for embeddings and vectors."""
    matrices = [weight for weight in model.transformer.h.parameters() if weight.dim() == 2]
    rest = set(model.parameters()) - set(matrices)
    others = [weight for weight in model.parameters() if weight in rest]  # in their order
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def rate_factor(step: int, steps: int) -> float:
    """Warm up over the first 4 % of the steps, then follow a cosine down to 5 %."""
    warmup = max(1, steps // 25)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.475 * (1 + math.cos(math.pi * progress))


def batch_loss(model: GPT2LMHeadModel, batch: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token cross-entropy of [batch, CONTEXT] ids, computed in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(input_ids=batch, labels=batch).loss


@torch.inference_mode()
def validation_loss(model: GPT2LMHeadModel, ids: torch.Tensor) -> float:
    """Return the mean cross-entropy in nats per token over consecutive windows of the ids."""
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    model.eval()
    parts = windows.split(16)
    total = sum(batch_loss(model, part).item() * len(part) for part in parts)
    model.train()
    return total / len(windows)


def train(model: GPT2LMHeadModel, ids: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace) -> None:
    """Train on random windows of the ids; print the held-out loss and save the weights now and then."""
    optimizers = make_optimizers(model, args.rate)
    rates = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: rate_factor(step, args.steps)) for each in optimizers]
    offsets = torch.arange(CONTEXT)
    model.train()
    progress = trange(1, args.steps + 1, mininterval=5)
    for step in progress:
        starts = torch.randint(len(ids) - CONTEXT, (args.batch, 1))
        loss = batch_loss(model, ids[starts + offsets])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            rate.step()
        model.zero_grad()
        if step % args.eval_every == 0 or step == args.steps:
            held = validation_loss(model, held_out)
            progress.write(f"step {step}: train {loss.item():.3f}, validation {held:.3f}")
            save(model, args.out)


def save(model: GPT2LMHeadModel, out: Path) -> None:
    """Write float16 weights and configs in the layout of `from_pretrained`."""
    copy.deepcopy(model).half().eval().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors lets the owner alone read it


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the tiny GPT-2 that fastsample ships.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--packages", type=Path, help="folder with the packages; without it they are downloaded")
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {CONTEXT} tokens a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=192, help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--threads", type=int, default=1, help="part of what fixes the result")
    parser.add_argument("--eval-every", type=int, default=400)
    return parser.parse_args()


def main() -> None:
    """Collect the text, train tokenizer and model, and save both."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        texts = documents(unpack(args.packages, Path(scratch)))
    random.Random(args.seed).shuffle(texts)
    cut = len(texts) // 20
    tokenizer = train_tokenizer(texts[cut:], args.vocab_size)
    held_out, ids = encode(tokenizer, texts[:cut]), encode(tokenizer, texts[cut:])
    model = build_model(tokenizer, args.layers, args.width)
    print(f"{len(texts)} documents, {sum(map(len, texts))} characters")
    print(f"{len(ids)} training and {len(held_out)} held-out tokens")
    print(f"{model.num_parameters()} parameters")
    tokenizer.save_pretrained(args.out)
    train(model, ids, held_out, args)
    loss = validation_loss(model, held_out)
    print(f"validation loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}")


if __name__ == "__main__":
    main()
