"""NVIDIA's compute-sanitizer over the CUDA engine: what to run, and what its output says.

https://docs.nvidia.com/compute-sanitizer/ComputeSanitizer has the options.
"""

from __future__ import annotations

import re
import sys
from typing import Any

TOOLS = ("memcheck", "synccheck", "initcheck", "racecheck")  # the last is the one that may be wrong
KERNELS = "fastsample.*_kernel"  # in their mangled names

CALLS = """
import os
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor an allocation of its own, whose ends are watched
import torch, fastsample as fs
logits = (torch.randn(3, 20001, device="cuda") * 4).round() / 4
ids = torch.randint(20001, (3, 90), device="cuda")
mask = torch.full((3, 626), -2, dtype=torch.int32, device="cuda")
for x in (logits, logits.bfloat16(), logits[:, 1:]):
    for more in ({}, {"output_ids": ids, "frequency_penalty": 0.5, "bitmask": mask}):
        fs.sample(x, seed=1, top_k=50, top_p=0.9, min_p=0.01, backend="cuda", num_samples=2, **more)
        fs.sample(x, seed=1, top_p=0.9, logprobs="raw", top_logprobs=20, backend="cuda", **more)
        fs.sample(x, seed=1, top_p=0.9, kept="ids", kept_mass=True, entropy=True, backend="cuda", **more)
        fs.filter_logits(x, top_k=500, order="joint", top_p=0.8, backend="cuda", **more)
torch.cuda.synchronize()
"""


def command(sanitizer: str, tool: str) -> list[str]:
    """compute-sanitizer over CALLS.

    Kernels are named by `--kernel-name regex=...`; nsys and ncu write `regex:...`, which is ignored here. initcheck
    gets all kernels, since it does not see what those that it leaves out write, and would call it uninitialised.
    """
    named = () if tool == "initcheck" else ("--kernel-name", f"regex={KERNELS}")
    return [sanitizer, "--tool", tool, "--error-exitcode", "9", *named, sys.executable, "-c", CALLS]


def verdict(tool: str, output: str) -> dict[str, Any]:
    """`passed`, or `inconclusive` or `failed` with the reason, and the summary.

    Without a summary the tool did not end, which is a failure. What racecheck reports is inconclusive: it knows the
    shared memory of one block, and the blocks of a cluster write to each other's.
    """
    summaries = re.findall(r"========= ((?:\w+ )?SUMMARY: .*)", output)
    if not summaries:
        return {"failed": f"no summary: {output.strip()[-600:]}"}
    found: dict[str, Any] = {"summary": summaries[-1]}
    if re.search(r"SUMMARY: 0 (errors|hazards)", summaries[-1]):
        return found | {"passed": True}
    reports = [line for line in output.splitlines() if line.startswith("========= ") and "SUMMARY" not in line]
    return found | {"inconclusive" if tool == "racecheck" else "failed": "\n".join(reports[1:13])}
