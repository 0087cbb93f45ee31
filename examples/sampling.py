"""Sample with fastsample inside `model.generate`: one argument more. Runs offline, on the model that ships."""

from importlib.resources import files

from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsample.integrations.transformers import fs_generate

path = str(files("fastsample") / "models" / "tiny-gpt2")
tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(path)
inputs = tokenizer(["The future of AI is", "She walked into the room and"], return_tensors="pt", padding=True)

options = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "max_new_tokens": 40}
tokens = model.generate(**inputs, **options, custom_generate=fs_generate(seed=[7, 8]))  # a seed per sequence
print("\n---\n".join(tokenizer.batch_decode(tokens, skip_special_tokens=True)))
