"""Structured output: text that matches a JSON schema, a regular expression or one of some choices, every time.

    compiler = GrammarCompiler(tokenizer)
    grammar = compiler.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]})
    model.generate(**inputs, do_sample=True, custom_generate=fs_generate(seed=7, grammar=grammar))

A grammar engine (llguidance, xgrammar or outlines-core, whichever is installed) says which tokens may come next; the
fused pass takes them as its bitmask. The text that must match is that of the new tokens, without the prompt. Special
tokens are never part of it. A model's end-of-sequence tokens are allowed where the text is complete, and are all that
is allowed where it cannot go on. A text counts as complete only after a second check that does not rely on the engine
(jsonschema, formats included). In a decoding loop of your own, `GrammarBatch` keeps the masks of a batch:

    batch = GrammarBatch([grammar, None], stop_ids=[tokenizer.eos_token_id])
    tokens = sampler(logits, bitmask=batch.bitmask(logits)).tokens
    batch.accept(tokens)
"""

from fastsample.integrations.grammar.batch import GrammarBatch, GrammarError, TruncatedWarning
from fastsample.integrations.grammar.compiler import Grammar, GrammarCompiler

__all__ = ["Grammar", "GrammarBatch", "GrammarCompiler", "GrammarError", "TruncatedWarning"]
