"""Which models are kin: a model with few battles is likely to err where its relatives do.

A new model meets few others before it must be routed to. What its family is known for (a base
model's weakness in arithmetic, a house style that people like) is the best first guess there is.
On published judgements the residual preferences of two models of a family agree more often than
those of two models of different families (docs/routers.md has the figures).
"""

from __future__ import annotations

import re

# the base model decides, not who fine-tuned it; first match wins
_FAMILIES: tuple[tuple[str, str], ...] = (
    ("mistral", r"mi[sx]tral|ministral|zephyr"),
    ("gpt", r"\bgpt|davinci|chatgpt|^o[1-9]\b"),
    ("claude", r"claude"),
    ("gemini", r"gemini|gemma|\bpalm|\bbard"),
    ("qwen", r"qwen|qwq"),
    ("deepseek", r"deepseek"),
    ("llama", r"llama|vicuna|alpaca|wizardlm|nemotron|tulu|koala|guanaco"),
    ("yi", r"^yi[-_]"),
    ("command", r"command|cohere|\baya"),
    ("phi", r"\bphi[-_]?\d"),
    ("grok", r"grok"),
    ("glm", r"\bglm|chatglm"),
    ("falcon", r"falcon"),
    ("pythia", r"pythia|dolly"),
)


def family(model: str) -> str:
    """Return the family of a model by its name; a model we do not know is its own family."""
    name = model.lower()
    return next((known for known, pattern in _FAMILIES if re.search(pattern, name)), name)
