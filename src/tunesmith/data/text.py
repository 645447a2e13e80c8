"""What is wrong with a text itself, whatever its place: lost encodings, invisible characters, secrets, boilerplate.

`findings` is called for every text of a data set, so each check has a cheap test before it: 4 us for 1 KB of clean ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

# A secret is known by its fixed beginning: each is searched as a plain string before the expression runs.
SECRETS = {
    "sk-": r"\bsk-(?:proj-|ant-|or-)?(?=[\w-]{0,60}\d)[A-Za-z0-9_-]{20,200}",  # a digit: not a class name
    "sk_live_": r"\bsk_live_[A-Za-z0-9]{16,}",
    "slack.com/services/": r"hooks\.slack\.com/services/[\w/]{20,80}",
    "AKIA": r"\bAKIA[0-9A-Z]{16}\b",
    "ghp_": r"\bghp_[A-Za-z0-9]{36}",
    "github_pat_": r"\bgithub_pat_\w{22,}",
    "glpat-": r"\bglpat-[\w-]{20}",
    "hf_": r"\bhf_[A-Za-z]{30,}",
    **{f"xox{kind}-": rf"\bxox{kind}-[\w-]{{10,}}" for kind in "abprs"},
    "AIza": r"\bAIza[\w-]{35}",
    "eyJ": r"\beyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{10,}",
    "-----BEGIN": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "://": r"\b[a-z][a-z0-9+.-]{0,20}://[^\s/:@]{1,100}:[^\s/@]{3,100}@",
}
SPECIAL = re.compile(  # control tokens of common models, as text
    r"<\|\w{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|\[TOOL_CALLS\]|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|"
    "<fim_(?:prefix|middle|suffix)>|<\uff5c[^\uff5c]{1,30}\uff5c>"
)
_EMAIL = re.compile(r"\b(?!git@)[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b")
_CARD = re.compile(r"(?<![\d.,/-])[3-6]\d{3}(?:[ -]?\d){9,15}(?![\d-]|[.,]\d)")  # the first digits that cards have
_PHONE = re.compile(  # with a country's or an area's sign, or beside a word that says so: figures alone are too often figures
    r"(?<![\w.,/+-])(?:\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,5}\d{2,4}|\(\d{2,5}\) ?\d{3}[ .-]?\d{2,5})(?![\w/-]|[.,]\d)"
    r"|(?i:\b(?:phone|mobile|tel|telephone|call|fax|whatsapp|sms)\b\W{0,3}(?:[a-z]+\W{1,2}){0,3}?)"
    r"(?:\d[ .-]?){7,12}\d(?![\w/-]|[.,]\d)"
)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b")
_EXAMPLE = re.compile(r"@(?:[\w-]+\.)*(?:example\.(?:com|org|net)|test|invalid|localhost)\b", re.I)  # RFC 2606
_REFUSAL = re.compile(
    r"\W*(?:as an ai(?:[ -]?(?:language )?(?:model|assistant))?[,.]|as a (?:large )?language model\b|"
    r"i(?:['\u2019]m| am) (?:just |only )?an ai(?: (?:language model|model|assistant))?[,. ]|"
    r"(?:i(?:['\u2019]m| am) sorry|i apologi[sz]e|sorry|unfortunately),? (?:but )?i (?:can(?:['\u2019]t|not)|"
    r"(?:am|['\u2019]m) (?:not able|unable)) (?:to )?(?:assist|help|fulfil|comply|provide|answer|do that|discuss|generate)|"
    r"i(?: can(?:['\u2019]t|not)|(?: am|['\u2019]m) (?:unable|not able) to) "
    r"(?:assist|help you|help with|fulfil|comply|provide that))",
    re.I,
)
_PRINTABLE = bytes([9, 10, 13, *range(32, 127), *range(128, 256)])
# Most of any text. Every beginning of a secret has a character that is not among these: its mark
_HARMLESS = b"abcdefghijklmnopqrstuvwxyABCDEFGHILMNOPQRSTUVWXYZ \n.,!?;'\"()" + bytes(range(128, 256))
_MARKS = {beginning: next(c for c in beginning.encode()[::-1] if c not in _HARMLESS) for beginning in SECRETS}
_NOT_DIGITS = bytes(b for b in range(256) if not 48 <= b <= 57)
INVISIBLE = re.compile("[\u200b\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\u00ad\U000e0000-\U000e007f]")

Finding = tuple[str, str, str]  # code, message, fix


def innocent(contents: list[str]) -> bool:
    """Whether `findings` can have nothing to say about these texts of one row: 3 to 10 us for 1 KB, and true of most rows."""
    for text in contents:
        if text != text.strip() or (text[:1] in "aisuAISU" or not text[0].isalnum()) and _REFUSAL.match(text):
            return False
    text = "\n".join(contents)
    if not text.isascii() and _odd(text):
        return False
    rest = text.encode("utf-8", "replace").translate(None, _HARMLESS)
    if rest:
        if rest.translate(None, _PRINTABLE) or b"@" in rest or len(rest.translate(None, _NOT_DIGITS)) >= 7:
            return False
        if (b"<" in rest or b"[" in rest) and SPECIAL.search(text):
            return False
        for beginning, mark in _MARKS.items():
            if mark in rest and beginning in text:
                return False
    return True


def _odd(text: str) -> bool:
    """Whether a text holds lost or invisible characters, or signs of a wrong encoding. Looks at runs beyond ASCII alone,
    with the spaces in them: ftfy's own search over the whole text takes 66 us for 1 KB."""
    from ftfy.chardata import UTF8_DETECTOR_RE

    beyond = "\n".join(_RUNS.findall(text))
    return bool(
        "\ufffd" in beyond
        or INVISIBLE.search(beyond)
        or CONTROL.search(beyond)
        or _mac().search(beyond)
        or UTF8_DETECTOR_RE.search(beyond)
    )


_RUNS = re.compile("[^\x00-\x7f][^\x00-\x1f\x21-\x7f]*")


def findings(text: str, answer: bool) -> Iterator[Finding]:
    """(code, message, fix) for one message's text. `answer`: it is to be learnt."""
    ascii_ = text.isascii()
    raw = text.encode("ascii" if ascii_ else "utf-8", "replace")
    if not ascii_:
        yield from _beyond_ascii(text)
    if ascii_ and raw.translate(None, _PRINTABLE) or not ascii_ and CONTROL.search(text):
        yield from _control(text)
    if "<" in text or "[" in text:
        mark = SPECIAL.search(text)
        if mark:
            yield (
                "special-token",
                f"holds {mark[0]!r}, which tokenizers read as a control token",
                "write it in another way, or remove it",
            )
    yield from _private(text, raw)
    if answer and refuses(text):
        yield (
            "refusal",
            f'the answer refuses: "{text[:60].strip()}"',
            "remove the row, unless refusing is what you teach",
        )
    if text != text.strip():
        yield "outer-space", "begins or ends with white space", "--fix trims it (indents stay)"


def refuses(answer: str) -> bool:
    """Whether an answer begins by saying that it will not or cannot, or as boilerplate ("As an AI language model, …")."""
    return bool(_REFUSAL.match(answer))


CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def _control(text: str) -> Iterator[Finding]:
    found = CONTROL.search(text)
    assert found
    if found[0] == "\x00":
        yield "nul", "holds a NUL character", "--fix removes it"
    else:
        yield "control-character", f"holds the control character U+{ord(found[0]):04X}", "--fix removes it"


def _beyond_ascii(text: str) -> Iterator[Finding]:
    if "\ufffd" in text:
        yield (
            "replacement-character",
            "holds U+FFFD, the mark of a lost character",
            "restore the text from its source",
        )
    mended = unmangle(text)
    if mended != text:
        was, now = _difference(text, mended)
        yield "mojibake", f'text decoded with the wrong encoding: "{was}" should read "{now}"', "--fix restores it"
    odd = INVISIBLE.search(text)
    if odd:
        yield "invisible-character", f"holds the invisible character U+{ord(odd[0]):04X}", "--fix removes it"


def _difference(a: str, b: str) -> tuple[str, str]:
    """The first place where two texts differ: what stands there beyond ASCII, at most 20 characters."""
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    was, now = (_BEYOND.match(text, start) for text in (a, b))
    return (was[0] if was else "")[:20], (now[0] if now else "")[:20]


_BEYOND = re.compile("[^\x00-\x7f]*")


def _private(text: str, raw: bytes) -> Iterator[Finding]:
    for beginning, whole in SECRETS.items():
        if beginning in text and (found := re.search(whole, text)):
            yield "secret", f'looks like a secret: "{found[0][:8]}…"', "remove it, and revoke it where it was issued"
            break
    kinds = []
    if "@" in text and any(not _EXAMPLE.search(m[0]) for m in _EMAIL.finditer(text)):
        kinds.append("an e-mail address")
    if len(raw.translate(None, _NOT_DIGITS)) >= 7:
        if any(_luhn(m[0]) for m in _CARD.finditer(text)):
            kinds.append("a card number")
        elif any(_iban(m[0]) for m in _IBAN.finditer(text)):
            kinds.append("an IBAN")
        elif any(sum(map(str.isdigit, m[0])) >= 9 for m in _PHONE.finditer(text)):
            kinds.append("a telephone number")
    if kinds:
        yield "personal-data", f"holds {' and '.join(kinds)}", "replace it with a made-up one, or remove the row"


def _luhn(number: str) -> bool:
    """The check digit of card numbers (ISO/IEC 7812)."""
    digits = [int(c) for c in number if c.isdigit()]
    doubled = [sum(divmod(2 * d, 10)) for d in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _iban(text: str) -> bool:
    """The check digits of bank accounts (ISO 13616): the rearranged number is 1 modulo 97."""
    plain = text.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


# ---- mojibake


def unmangle(text: str) -> str:
    """The text with wrongly decoded UTF-8 restored; itself where nothing is wrong.

    ftfy restores what it is sure of. It leaves signs that were read as Mac Roman alone ("‚úÖ" for "✅"): these are
    restored here where three or four such characters spell a symbol, an emoji, a dash or a quotation mark.
    """
    if text.isascii():
        return text
    import ftfy
    from ftfy.chardata import UTF8_DETECTOR_RE

    text = _mac().sub(_from_mac, text)
    return ftfy.fix_encoding(text, _ftfy()) if UTF8_DETECTOR_RE.search(text) else text


@cache
def _ftfy():  # type: ignore[no-untyped-def]
    """Only the encoding is restored: no quotes are straightened, nothing is normalised."""
    from ftfy import TextFixerConfig

    return TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        fix_surrogates=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )


@cache
def _mac() -> re.Pattern[str]:
    """Three characters that are a lead byte E2 or EF, or four of F0, and continuation bytes, as Mac Roman shows them."""
    follow = "".join(map(re.escape, bytes(range(0x80, 0xC0)).decode("mac_roman")))
    three, four = (re.escape(bytes([b]).decode("mac_roman")) for b in (0xE2, 0xF0))
    variation = "".join(map(re.escape, "\ufe0f".encode().decode("mac_roman")))
    return re.compile(f"(?:{three}[{follow}]{{2}}|{four}[{follow}]{{3}}|{variation})")


def _from_mac(match: re.Match[str]) -> str:
    try:
        sign = match[0].encode("mac_roman").decode("utf-8")
    except UnicodeError:
        return match[0]
    known = "\u2010" <= sign <= "\u2bff" or sign == "\ufe0f" or "\U0001f000" <= sign <= "\U0001faff"
    return sign if known else match[0]
