"""Train the tiny GPT-2 that ships in fastsample/models/tiny-gpt2.

The text is the English that every CPython carries: the language reference behind `help()` and the
docstrings and comments of the standard library. Nothing is downloaded, and a run with the same
seed, threads, package versions and CPU gives the same model again.

    python examples/train_tiny_gpt2.py --out fastsample/models/tiny-gpt2
"""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

CONTEXT = 256  # tokens
HEAD_DIM = 32
END = "<|endoftext|>"
PAD = "<|pad|>"
SKIPPED_PACKAGES = {
    "dist-packages", "idlelib", "idle_test", "lib2to3", "pydoc_data", "site-packages", "test",
    "tests", "turtledemo",
}  # fmt: skip

# A paragraph reads like English when enough of its words are these.
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and any are as at be been but by can do does each either every for from had has have "
        "if in into is it its may more most must no not of on one only or other should so some "
        "such than that the their them then there these they this those to use used using was "
        "were what when where whether which while who will with without would you your",
    )
)
WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
CODE = re.compile(r">>>|::=|->|==|[{}|\\<>]|\w\([^()]*[=\[(]|https?:|@|\w:\w|\$|%\w|=\S")
RST_ROLE = re.compile(r":[\w:+.-]+:`~?([^`]+)`")
RST_QUOTES = re.compile(r"`{1,2}([^`]+)`{1,2}_{0,2}|(?<!\w)\*{1,2}(\w[^*]*)\*{1,2}(?!\w)")
BULLET = re.compile(r"^\s*(?:[*+-]|\d+[.)]|\([a-z0-9]\))\s+")
TO_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "-", "–": "-", "…": "..."})  # noqa: RUF001
UNDERLINE = re.compile(r"^\s*([=\-~^*+#\".])\1{2,}\s*$")


def docstring_owners(tree: ast.Module) -> Iterator[list[str]]:
    """Yield the docstrings that belong together: the module's, then each class's or function's."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    yield [ast.get_docstring(tree) or ""]
    for owner in (node for node in tree.body if isinstance(node, kinds)):
        nodes = [node for node in ast.walk(owner) if isinstance(node, kinds)]
        yield [ast.get_docstring(node) or "" for node in nodes]


def comments(source: str) -> list[str]:
    """Return the texts of the comments that stand on lines of their own."""
    runs = re.findall(r"(?:^[ \t]*#.*\n)+", source, flags=re.MULTILINE)
    return [re.sub(r"^[ \t]*#+ ?", "", run, flags=re.MULTILINE) for run in runs]


def stdlib_texts() -> Iterator[list[str]]:
    """Yield groups of docstrings and comments from the standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_PACKAGES.isdisjoint(path.relative_to(root).parts):
            with suppress(SyntaxError, UnicodeDecodeError):
                source = path.read_text(encoding="utf-8")
                yield from docstring_owners(ast.parse(source))
                yield comments(source)


def blocks(text: str) -> Iterator[str]:
    """Yield the blocks between blank lines, one per bullet, without literal blocks and titles."""
    literal = False
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        lines = block.splitlines()
        if not lines or any(UNDERLINE.match(line) for line in lines):
            continue
        if literal and lines[0][:1].isspace():
            continue
        literal = block.rstrip().endswith("::")
        if literal or block.lstrip().startswith(("..", "|", "+-")):
            continue
        starts = [i for i, line in enumerate(lines) if i == 0 or BULLET.match(line)]
        for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
            yield "\n".join(lines[start:stop])


def unwrap(block: str) -> str:
    """Join hard-wrapped lines into one and drop the markup."""
    text = BULLET.sub("", block).translate(TO_ASCII)
    text = RST_ROLE.sub(r"\1", text)
    text = RST_QUOTES.sub(lambda match: match[1] or match[2], text)
    return re.sub(r"\s+", " ", text).replace(" -- ", " - ").strip()


def is_prose(text: str) -> bool:
    """Tell sentences from code, tables, signatures and fragments."""
    if not text.isascii() or CODE.search(text) or not re.match(r'["(]?[A-Z]', text):
        return False
    if text[-1] not in '.!?)"' or "." not in text[-3:]:
        return False
    words = [word.lower() for word in WORD.findall(text)]
    letters = sum(char.isalpha() or char == " " for char in text)
    common = sum(word in FUNCTION_WORDS for word in words)
    return len(words) >= 4 and letters >= 0.85 * len(text) and common >= 0.22 * len(words)


def documents() -> list[str]:
    """Collect the corpus: one document per topic, module, class or function, no paragraph twice."""
    seen: set[str] = set()
    found = []
    for group in [*([text] for _, text in sorted(topics.items())), *stdlib_texts()]:
        paragraphs = []
        for block in (block for text in group for block in blocks(text)):
            paragraph = unwrap(block)
            if paragraph and paragraph not in seen and is_prose(paragraph):
                seen.add(paragraph)
                paragraphs.append(paragraph)
        if paragraphs:
            found.append("\n\n".join(paragraphs))
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


def make_optimizer(model: GPT2LMHeadModel, rate: float) -> torch.optim.AdamW:
    """Make AdamW that decays the matrices only."""
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


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
    """Train on random windows of the ids, and print the held-out loss now and then."""
    optimizer = make_optimizer(model, args.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, args.steps))
    offsets = torch.arange(CONTEXT)
    model.train()
    progress = trange(1, args.steps + 1, mininterval=5)
    for step in progress:
        starts = torch.randint(len(ids) - CONTEXT, (args.batch, 1))
        loss = batch_loss(model, ids[starts + offsets])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % args.eval_every == 0 or step == args.steps:
            held = validation_loss(model, held_out)
            progress.write(f"step {step}: train {loss.item():.3f}, validation {held:.3f}")


def save(model: GPT2LMHeadModel, tokenizer: GPT2TokenizerFast, out: Path) -> None:
    """Write float16 weights, configs and tokenizer in the layout of `from_pretrained`."""
    model.half().eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors lets the owner alone read it


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the tiny GPT-2 that fastsample ships.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=2800)
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
    texts = documents()
    random.Random(args.seed).shuffle(texts)
    cut = len(texts) // 20
    tokenizer = train_tokenizer(texts[cut:], args.vocab_size)
    held_out, ids = encode(tokenizer, texts[:cut]), encode(tokenizer, texts[cut:])
    model = build_model(tokenizer, args.layers, args.width)
    print(f"{len(texts)} documents, {sum(map(len, texts))} characters")
    print(f"{len(ids)} training and {len(held_out)} held-out tokens")
    print(f"{model.num_parameters()} parameters")
    train(model, ids, held_out, args)
    loss = validation_loss(model, held_out)
    print(f"validation loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}")
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
