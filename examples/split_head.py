"""A head that is split over ranks: each computes its part of the logits, and all get the text of one process.

torchrun --standalone --nproc-per-node 2 examples/split_head.py
"""

import os
from importlib.resources import files

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsample.distributed import Split
from fastsample.integrations.transformers import fs_generate


class SplitHead(torch.nn.Module):
    """The part of a head that is this rank's. What it returns stands for the logits of all."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        begin, end = (len(weight) * rank // dist.get_world_size() for rank in (dist.get_rank(), dist.get_rank() + 1))
        self.weight, self.split = weight[begin:end].clone(), Split(begin, len(weight))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.split.whole(torch.nn.functional.linear(hidden, self.weight))


path = str(files("fastsample") / "models" / "tiny-gpt2")
tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
text = tokenizer("She walked into the room and", return_tensors="pt")
how = {"do_sample": True, "max_new_tokens": 40, "temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1}
whole = model.generate(**text, **how, custom_generate=fs_generate(seed=7))  # what one process says
dist.init_process_group("gloo")
model.lm_head = SplitHead(model.lm_head.weight.detach())
split = model.generate(**text, **how, custom_generate=fs_generate(seed=7, backend=model.lm_head.split.engine))
same, words = torch.equal(split, whole), tokenizer.decode(split[0])
print(f"rank {dist.get_rank()}: the same text is {same}: {words!r}\n", end="", flush=True)  # in one piece
os._exit(0)  # a thread of Gloo's may abort while Python's interpreter ends
