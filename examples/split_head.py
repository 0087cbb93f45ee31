"""A head that is split over ranks: each computes its part of the logits, and all get the text of one process.

torchrun --standalone --nproc-per-node 2 examples/split_head.py
"""

import os
from importlib.resources import files

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsample.distributed import ShardedSampler
from fastsample.integrations.transformers import fs_generate

path = str(files("fastsample") / "models" / "tiny-gpt2")
tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
text = tokenizer("Use this function to", return_tensors="pt")["input_ids"]
how = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}

options = {"do_sample": True, "max_new_tokens": 40, "use_cache": False}
whole = model.generate(text, **how, **options, custom_generate=fs_generate(seed=7))  # what one process says

dist.init_process_group("gloo")
vocab, rank = model.config.vocab_size, dist.get_rank()
own = slice(vocab * rank // dist.get_world_size(), vocab * (rank + 1) // dist.get_world_size())
head = model.lm_head.weight[own]  # all of it that this rank needs
sampler = ShardedSampler(batch_size=1, seed=7, vocab_start=own.start, vocab_size=vocab, **how)
with torch.inference_mode():
    while text.shape[1] < whole.shape[1]:
        logits = torch.nn.functional.linear(model.transformer(text).last_hidden_state[:, -1], head)  # [1, a part]
        text = torch.cat([text, sampler(logits, output_ids=text).tokens[:, None]], 1)

if rank == 0:
    print(tokenizer.decode(text[0]))
print(f"rank {rank}, with {len(head)} of {vocab} logits: the same text is {torch.equal(text, whole)}", flush=True)
os._exit(0)  # a thread of Gloo's may abort while Python's interpreter ends
