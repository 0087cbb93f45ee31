"""MLX-LM: one text as it comes, then a batch. Needs mlx-lm (on Linux also mlx[cpu]); runs offline."""

from mlx_lm import stream_generate
from mlx_lm.generate import BatchGenerator
from tiny_models import shipped_mlx

from fastsample.integrations.mlx_lm import MlxSampler

model, tokenizer = shipped_mlx()
sampler = MlxSampler(seed=7, temperature=0.8, top_p=0.95, repetition_penalty=1.1)
options = {"sampler": sampler, "logits_processors": sampler.logits_processors, "max_tokens": 30}
for part in stream_generate(model, tokenizer, "The future of AI is", **options):
    print(part.text, end="", flush=True)

prompts = [tokenizer.encode(text) for text in ("The future of AI is", "Use this function to")]
samplers = [MlxSampler(seed=seed, temperature=0.8, top_p=0.95) for seed in (7, 8)]
batch = BatchGenerator(model, stop_tokens=[[token] for token in tokenizer.eos_token_ids])
texts = {uid: [] for uid in batch.insert(prompts, [30] * len(prompts), samplers=samplers)}
while responses := batch.next_generated():
    for response in responses:
        texts[response.uid].append(response.token)
batch.close()
for ids in texts.values():
    print("\n---\n" + tokenizer.decode(ids))
