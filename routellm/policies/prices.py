"""Prices of the models of published tables, where the settings say nothing else.

Dollars per million tokens. OpenAI's, Anthropic's and Mistral's list prices when the answers were
recorded (early 2024); open models at a host's price for their size (Together's: 0.20 up to 8
billion parameters, 0.80 up to 41, 0.90 up to 80); those of ``model_pool`` as LLMRouter prices them,
which published the table.
"""

from __future__ import annotations

from routellm.settings import Price, Settings

_BOTH = {
    "gemma-2-9b-it": 0.1,
    "alpaca-7b": 0.2, "codegemma-7b": 0.2, "gemma-7b-it": 0.2, "llama-3.1-8b-instruct": 0.2,
    "llama3-chatqa-1.5-8b": 0.2, "mistral-7b-instruct-v0.2": 0.2, "mistral-7b-instruct-v0.3": 0.2,
    "openhermes-2.5-mistral-7b": 0.2, "qwen2.5-7b-instruct": 0.2,
    "vicuna-33b-v1.3": 0.8,
    "llama-2-70b-chat-hf": 0.9, "llama-3.1-nemotron-51b-instruct": 0.9,
    "llama-3.3-nemotron-super-49b-v1": 0.9, "llama3-chatqa-1.5-70b": 0.9,
}  # fmt: skip
LIST_PRICES = {
    **{model: Price(input=usd, output=usd) for model, usd in _BOTH.items()},
    "claude-2.1": Price(input=8.0, output=24.0),
    "gpt-3.5-turbo-1106": Price(input=1.0, output=2.0),
    "gpt-4-0314": Price(input=30.0, output=60.0),
    "mistral-medium": Price(input=2.7, output=8.1),
}


def price_of(model: str, settings: Settings) -> Price | None:
    """Return a model's price as it is set, else its list price, else None."""
    return settings.prices.get(model) or LIST_PRICES.get(model)
