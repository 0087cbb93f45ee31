"""ONNX Runtime GenAI: two texts as one batch, byte by byte. Needs onnxruntime-genai and onnx; runs offline."""

from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime_genai as og
from tiny_models import bigrams, write_onnx

from fastsample.integrations.onnx_genai import generate

with TemporaryDirectory() as folder:
    write_onnx(Path(folder), bigrams())
    model = og.Model(folder)
    prompts = ["You may ", "Sampling "]
    # A folder with a tokenizer takes texts, and knows these two ids.
    ids, known = [list(prompt.encode()) for prompt in prompts], {"eos_token_ids": 0, "pad_token_id": 0}
    found = generate(model, ids, max_new_tokens=60, temperature=0.7, min_p=0.05, seed=[7, 8], **known)
for prompt, new in zip(prompts, found, strict=True):
    print(prompt + bytes(new).decode())
