"""Reads from the CUDA extension's own binaries what the contract and the tuning demand of them.

python cuda_gates.py    # the table of all kernels and targets
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from sass import BIN, is_fused

CSRC = Path(__file__).parent.parent / "csrc"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99}  # KiB that one block may have
DTYPES = {"f": "float32", "NS_4HalfE": "float16", "NS_6BFloatE": "bfloat16"}
POLICIES = ("cluster", "block", "grid")
