"""What queries cost, in dollars, from the prices in the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from routellm.settings import Price, Settings


@dataclass(frozen=True)
class Money:
    """Prices by model, and the tokens of a query whose own are not known.

    Attributes
    ----------
    prices : dict
        Dollars per million tokens.
    input_tokens, output_tokens : float
    """

    prices: Mapping[str, Price] = field(default_factory=dict)
    input_tokens: float = 0.0
    output_tokens: float = 0.0

    @classmethod
    def of(cls, settings: Settings) -> Money:
        usual = settings.evaluation
        return cls(settings.prices, usual.input_tokens, usual.output_tokens)

    def usd(
        self, model: str, input_tokens: int | None = None, output_tokens: int | None = None
    ) -> float | None:
        """Return what a query costs with a model; None if its price is not set."""
        price = self.prices.get(model)
        if price is None:
            return None
        read = self.input_tokens if input_tokens is None else input_tokens
        written = self.output_tokens if output_tokens is None else output_tokens
        return (price.input * read + price.output * written) / 1e6

    def saved_usd(
        self,
        strong: str,
        answered: str,
        input_tokens: int | None = None,
        output_tokens: int | None = None,
    ) -> float | None:
        """Return what an answer costs less than strong's would have, of as many tokens."""
        dear = self.usd(strong, input_tokens, output_tokens)
        paid = self.usd(answered, input_tokens, output_tokens)
        return None if dear is None or paid is None else dear - paid
