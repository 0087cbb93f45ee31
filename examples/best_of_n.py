"""Best-of-N and self-consistency: continuations from one prefill, ranked by a scorer, and a vote that ends early."""

from importlib.resources import files

from transformers import AutoModelForCausalLM, AutoTokenizer

import fastsample as fs

path = str(files("fastsample") / "models" / "tiny-gpt2")
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
options = {"tokenizer": tokenizer, "seed": 7, "max_new_tokens": 30, "temperature": 0.8, "top_p": 0.95}


def words_per_token(text, tokens, logprobs):
    """A scorer: any number made of a candidate's text, ids and log-probabilities; higher is better."""
    return len(text.split()) / len(tokens)


result = fs.best_of_n(model, "She walked into the room and", 8, score=words_per_token, **options)
for candidate in result.candidates:
    print(f"{candidate.score:.3f} {candidate.text!r}")


def first_word(text):
    """A ballot: what a candidate answers, or None to abstain."""
    words = text.split()
    return words[0] if words else None


# Eight at a time, until those that are still to come cannot change the answer.
result = fs.best_of_n(model, "A good friend is", 64, vote=first_word, round_size=8, progress=True, **options)
print(f"most say {result.answer!r}, after {result.drawn} of 64: {result.votes}")
