"""What a prompt must not keep: e-mail addresses, phone numbers, keys and card numbers.

Two maintained libraries find them. Kingfisher (MongoDB's, native code) scans for keys with its own
catalogue of some 500 rules, and with the few of `redaction.yml` for addresses and cards; it checks
nothing over the network. phonenumbers is Google's libphonenumber. Neither needs a language model,
so names and postal addresses stay.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from routellm.errors import UsageError

EMAIL, PHONE, SECRET, CARD = "<EMAIL>", "<PHONE>", "<SECRET>", "<CARD>"

_RULES = Path(__file__).with_name("redaction.yml")
_OURS = {"routellm.email": EMAIL, "routellm.card": CARD}  # by the start of the rule's id
_ORDER = (SECRET, CARD, EMAIL, PHONE)  # of two that overlap, the first one's name is kept
_ENOUGH_DIGITS = re.compile(r"(?:\d\D{0,8}){6}\d")  # fewer are no phone number
_PASSES = 4  # two findings that share a character are found one after the other

Span = tuple[int, int, str]  # start and end in characters, placeholder


class Redactor:
    """Replaces what it finds by placeholders; safe to call from several threads.

    Parameters
    ----------
    cache_dir : Path, optional
        Where the compiled rules are kept: compiling them takes seconds, loading them a third of
        one. By default the user's cache folder.
    phone_regions : sequence of str
        Countries (ISO 3166) whose numbers are recognised without their ``+`` and country code.

    Raises
    ------
    UsageError
        If one of the libraries is not installed.
    """

    def __init__(
        self, *, cache_dir: Path | None = None, phone_regions: Sequence[str] = ("US",)
    ) -> None:
        try:
            import phonenumbers
            from kingfisher_sdk import Rules, Scanner
        except ImportError as error:
            raise UsageError(
                f"prompts are stored redacted only, and {error.name} is not installed: pip install "
                "'routellm-mlops[feedback]', or do not store prompts"
            ) from error
        wrong = [r for r in phone_regions if r not in phonenumbers.SUPPORTED_REGIONS]
        if wrong:
            raise UsageError(f"{wrong[0]!r} is not the two-letter code of a country with phones")
        self.phone_regions = tuple(phone_regions)
        # `low` is all of the catalogue: a prompt that loses too much is better than one that
        # keeps a key
        self._scanner = Scanner(Rules([_RULES], confidence="low", cache_dir=cache_dir))

    def __call__(self, text: str) -> str:
        """Return the text without what must not be kept; what is not valid Unicode becomes "?"."""
        text = text.encode("utf-8", "replace").decode()
        for _ in range(_PASSES):
            spans = _merged([*self._scanned(text), *self._phones(text)])
            if not spans:
                break
            text = _replaced(text, spans)
        return text

    def _scanned(self, text: str) -> list[Span]:
        raw = text.encode()
        found = []
        for finding in self._scanner.scan(raw):
            start, end = finding.location["start_offset"], finding.location["end_offset"]
            if len(raw) != len(text):  # the scanner counts bytes
                start, end = (len(raw[:i].decode(errors="ignore")) for i in (start, end))
            family = ".".join(finding.rule_id.split(".")[:2])
            found.append((start, end, _OURS.get(family, SECRET)))
        return found

    def _phones(self, text: str) -> list[Span]:
        if not _ENOUGH_DIGITS.search(text):  # the matcher takes 2 ms a kilobyte
            return []
        from phonenumbers import Leniency, PhoneNumberMatcher

        found = []
        # with a + it need not be a number in use; without, a possible one is any long number
        ways = [(None, Leniency.POSSIBLE), *((r, Leniency.VALID) for r in self.phone_regions)]
        for region, leniency in ways:
            for match in PhoneNumberMatcher(text, region, leniency=leniency, max_tries=10_000):
                found.append((match.start, match.end, PHONE))
        return found


@functools.cache
def _default() -> Redactor:
    return Redactor()


def redact(text: str) -> str:
    """Return the text with placeholders for what must not be kept, as `Redactor` does.

    Raises
    ------
    UsageError
        If one of the libraries is not installed.
    """
    return _default()(text)


def _merged(spans: list[Span]) -> list[Span]:
    """Return the spans in order, those that overlap as one."""
    out: list[Span] = []
    for start, end, name in sorted(spans):
        if out and start < out[-1][1]:
            before = out[-1]
            name = min(name, before[2], key=_ORDER.index)
            out[-1] = (before[0], max(end, before[1]), name)
        elif end > start:
            out.append((start, end, name))
    return out


def _replaced(text: str, spans: list[Span]) -> str:
    parts, at = [], 0
    for start, end, name in spans:
        parts += [text[at:start], name]
        at = end
    return "".join([*parts, text[at:]])
