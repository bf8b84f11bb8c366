r"""What an answer says, apart from how it is written: the clause that states it, without markup, quotes, delimiters, currencies and units.

The rules are listed in docs/evaluation.md. Every function takes linear time, because it looks at the first `MAX_CHARACTERS` characters only.
"""

import re
from decimal import Decimal

MAX_CHARACTERS = 2000  # no benchmark has an answer nearly this long

_LIKE_ASCII = str.maketrans(
    {
        **dict.fromkeys("“”„«»″", '"'),
        **dict.fromkeys("‘’‚′", "'"),
        **dict.fromkeys("−﹣－", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
        "×": r"\times ",
        "÷": r"\div ",
        "·": r"\cdot ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "°": r"^\circ ",
        "²": "^2",
        "³": "^3",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
    }
)
_THIN_SPACE = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")  # separates thousands
_TAG = re.compile(r"</?(?:b|i|u|p|em|strong|code|span|div|answer|final_answer|mark)>|<br ?/?>", re.IGNORECASE)
_FENCE = re.compile(r"```[A-Za-z]*+")
_BOLD = re.compile(r"(?<![\w*])\*\*(?=[^\s*])([^*\n]*)\*\*(?![\w*])|(?<!\w)__(?=[^\s_])([^_\n]*)__(?!\w)")
_EXCLAMATION = re.compile(r"(?<=[A-Za-z]{2})!+$")  # not a factorial
_CODE = re.compile(r"`([^`\n]*)`")
# A wrapper around the whole text: (what opens it, what closes it).
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("*", "*"), ("_", "_"), ("`", "`"), ('"', '"'), ("'", "'"))
_COMMAND = re.compile(r"\\(?:boxed|fbox|text|textbf|textit|textrm|mathrm|mathbf|mbox|displaystyle)\s*\{")
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")

_FORMULA = r"\$\$(?:[^$\\]|\\.)+?\$\$|(?<![\\$])\$(?=[^\s$])(?:[^$\n\\]|\\.)*?(?<=\S)\$(?![\d$])|\\\((?:[^\\]|\\[^)])*\\\)|\\\[(?:[^\\]|\\[^\]])*\\\]"
_DELIMITED = re.compile(_FORMULA, re.DOTALL)
_AFTER = (
    "because|since|as|so|for|which|where|hence|thus|therefore|meaning|due|given|while|whereas|although|though|but|not|i\\.e\\.|e\\.g\\.|that is|"
    "(?:and|or) (?:so|the|this|that|it|we|he|she|they|there|therefore|thus|hence|not|is|are|was)"
)
_PIECE = re.compile(
    rf"(?P<formula>{_FORMULA})|(?P<open>\\begin\{{|\{{)|(?P<close>\\end\{{|\}})|\\.|"
    # A full stop, unless it is a decimal point or belongs to an initial or an abbreviation such as "a.m."; a semicolon; a dash; a tag.
    r"(?P<end>(?:[.?]|(?<=[A-Za-z]{{2}})!)(?=[\"'*_`)\]]*(?:\s|$))(?!\s*\d)(?<![ap]\.m\.)|;(?=\s|$)|\s-{2,3}\s|\s*—|\s–\s|\s-\s(?=[A-Za-z]{2})|</|"
    # A line, if the next one is empty or holds prose; words that begin a reason or a remark; a remark in parentheses.
    r"\n(?=\s*\n|[^\n\\]*[A-Za-z]{3})|"
    rf",?\s+(?:{_AFTER})(?![\w'])|,\s+(?=[A-Za-z]{{3,}})|\s\((?=[A-Za-z]{{2,}}|I\s|\\?\$))",
    re.DOTALL | re.IGNORECASE,
)


def own_clause(text: str) -> str:
    """The first clause of what follows "answer is", which states the answer: what a model adds to it decides nothing.

    The clause ends, outside of formulas and braces, with its sentence, before a line of prose or an empty line, before a dash, a semicolon or a remark
    in parentheses, before a comma that a word follows, and before words such as "because", "so", "which", "but" or "and the".
    """
    text = text.strip()[:MAX_CHARACTERS]
    depth = 0
    for piece in _PIECE.finditer(text):
        if piece["open"]:
            depth += 1
        elif piece["close"]:
            depth -= 1
        elif piece["end"] and depth <= 0 and text[: piece.start()].strip("\"'*_`([ \n"):
            # The closing quote or mark of the sentence belongs to it.
            closing = re.match(r"[\"'*_`)\]]*", text[piece.end() :]) if piece["end"] in ".!?" else None
            return (text[: piece.start()] + (closing[0] if closing else "")).strip()
    return text


def in_ascii(text: str) -> str:
    """The first `MAX_CHARACTERS` with plain quotes, minus signs, spaces and formulas in the place of typographic ones."""
    return _THIN_SPACE.sub(",", text[:MAX_CHARACTERS]).translate(_LIKE_ASCII)


def with_bold_tags(text: str) -> str:
    """The text with Markdown's stars in the place of HTML tags."""
    return _TAG.sub("**", text)


def bare(text: str) -> str:
    r"""The text without what only marks it: Markdown and HTML, quotes, and delimiters and commands such as \text{...} around the whole."""
    text = _FENCE.sub(" ", _TAG.sub(" ", in_ascii(text)))
    text = _CODE.sub(r"\1", _BOLD.sub(lambda bold: bold[1] or bold[2] or "", text)).strip()
    while True:
        stripped = _unwrapped(text)
        if stripped == text:
            return text
        text = stripped


def _unwrapped(text: str) -> str:
    text = _EXCLAMATION.sub("", text.strip().rstrip(",;:?").rstrip())
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    for opens, closes in _WRAPPERS:
        inner = text[len(opens) : len(text) - len(closes)]
        if len(text) > len(opens) + len(closes) and text.startswith(opens) and text.endswith(closes) and opens not in inner and closes not in inner:
            return inner.strip()
    command = _COMMAND.match(text)
    if command and text.endswith("}") and _closes_at_end(text, command.end()):
        return text[command.end() : -1].strip()
    # Half of a pair, where a clause was cut off.
    return re.sub(r"^(?:\*\*|[\"`*#>])\s*+|(?<!\\)(?:\*\*|[\"`*])$", "", text).strip()


def _closes_at_end(text: str, start: int) -> bool:
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return start + brace.end() == len(text)
    return False


# -------------------------------------------------------------------------------------------------------------------------- mathematics

_CONNECTOR = r"(?:\s*,?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\}|(?<![A-Za-z\\])(?:and|or|&)(?![A-Za-z]))\s*|\s*;\s*)"
_CONNECTORS = re.compile(_CONNECTOR)
_BETWEEN_FORMULAS = re.compile(rf"\s*(?:,|{_CONNECTOR})\s*")
_CURRENCY = re.compile(r"[€£¥₹]\s*|(?:\\\$|(?<!\$)\$(?!\$)|\\(?:pounds|euro)\b)\s*(?=[-+]?[\d.\\])|(?<=\d)\s*\\?\$")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?:,|\{,\}|,\\!|\\,)\d{3})++(?!\d|,\d)")
_SEPARATOR = re.compile(r"\{,\}|,\\!|\\,|,")
_MIXED = re.compile(r"(?<![\d.^_/{])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/.])")
_ROOT = re.compile(r"√\s*(\d+|[A-Za-z]|\([^()]*\))")
_PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d+)(?!\w)")
_MATHEMATICAL = (
    "sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|lim|max|min|gcd|lcm|det|mod|inf|infty|infinity|alpha|beta|"
    "gamma|delta|theta|lambda|sigma|omega|phi|psi|pi|and|or|frac|times|cdot|pm|cup|cap|in"
)
_WORD = rf"(?!(?:{_MATHEMATICAL})(?![A-Za-z]))[A-Za-z][A-Za-z'-]*[A-Za-z]"
_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
# Words with a capital are names, such as "June 20", unless they begin a sentence or stand for a currency.
_OPENING = "The|This|That|It|There|So|Therefore|Thus|Hence|We|You|They|He|She|Total|Exactly|About|Approximately|Only|Just|Rs|[A-Z]{3}"
_WORDS_BEFORE = re.compile(rf"(?:(?:(?={_OPENING}|[a-z]){_WORD}|a|A)[,:]?\s+)++(?=[-+(\[\\$.\d]|[a-zA-Z]\s*=)")
_UNIT_LETTER = r"(?:[mgsLlhNJWVAKCF])"
_CIRCUMSTANCE = re.compile(rf"([-+]?[\d.,/]+(?:\s+{_WORD}){{1,3}}?)\s+(?:in|at|on|from|during|with|after|before|when|if)\s.*")  # "6 miles in 2 hours"
_UNIT_OF_FORMULAS = (
    "dollars?|cents?|euros?|pounds?|[cmk]?m|kg|units?|square|cubic|inch(?:es)?|feet|ft|miles?|degrees?|percent|hours?|minutes?|days?|years?"
)
_POWER = r"(?:\s*\^?\{?[23]\}?(?![\d.]))?"
_WORDS_AFTER = re.compile(
    rf"(?:(?<=[\d)}}\]%])(?:\s*(?!{_MONTH}){_WORD}|\s+{_UNIT_LETTER})|(?<=[A-Za-z])\s+(?:{_UNIT_OF_FORMULAS}))(?![A-Za-z])\.?{_POWER}"
    rf"(?:(?:\s*/\s*|\s+)(?!{_MONTH})(?:{_WORD}|{_UNIT_LETTER}){_POWER},?)*$"
)
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)", re.ASCII)
_IN_PARENTHESES = re.compile(r"(?<=\d)\s+\([^()]*\)\.?$")
_SCIENTIFIC_ALONE = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE](?P<power>[-+]?\d{1,3})(?!\w)", re.ASCII)
_LONG_WORD = re.compile(rf"(?<![A-Za-z\\])(?=[A-Za-z]{{3}}){_WORD}")


def formula(text: str) -> str:
    """The mathematics of an answer, as one LaTeX formula without delimiters: "the total is **$9$** dollars", "€9" and "9 cm^2" are all "9".

    Several answers, such as "1331 and 1728", stand with commas between them.
    """
    text = bare(" ".join(text[:MAX_CHARACTERS].split()))
    spans = [_inside(span) for span in _DELIMITED.finditer(text)]
    if spans:
        between = _DELIMITED.split(text)
        joined = len(spans) > 1 and all(_BETWEEN_FORMULAS.fullmatch(words) for words in between[1:-1])
        text = bare(", ".join(spans) if joined else spans[-1])
    text = _THOUSANDS.sub(lambda number: _SEPARATOR.sub("", number[0]), _CURRENCY.sub("", text))
    text = bare(_WORDS_BEFORE.sub("", text, count=1) if _WORDS_BEFORE.match(text) else text)
    text = _CIRCUMSTANCE.sub(r"\1", text)
    text = ", ".join(_without_unit(part) for part in _CONNECTORS.split(text))
    text = _ROOT.sub(r"\\sqrt{\1}", _PI.sub(r"\\pi ", text.replace("**", "^")))
    text = _SCIENTIFIC.sub(r"\1\\cdot 10^{\2}", _MIXED.sub(r"\1\\frac{\2}{\3}", text))
    return text


def exact_number(text: str) -> Decimal | None:
    """The value of a text whose first clause is one number, such as "1,234.", "-$5", "1e3" or "3 apples", but not "1,3,2" or "3 or 4"."""
    plain = _IN_PARENTHESES.sub("", own_clause(text))
    plain = bare(_SCIENTIFIC_ALONE.sub(_expanded, bare(plain)))
    if plain.startswith("(") and plain.endswith(")"):
        plain = plain[1:-1]
    found = re.sub(r"^([-+]) ", r"\1", formula(plain))
    return Decimal(found) if _NUMBER.fullmatch(found) else None


def _expanded(number: re.Match) -> str:
    """1e3 as 1000. Powers that no answer has stay as they are."""
    return format(Decimal(number[0]), "f") if abs(int(number["power"])) < 100 else number[0]


def has_word(text: str) -> bool:
    """Whether a text has a word of three letters or more that is no mathematical function."""
    return _LONG_WORD.search(text) is not None


def _inside(span: re.Match) -> str:
    opening = 2 if span[0].startswith(("$$", "\\")) else 1
    return span[0][opening:-opening].strip()


def _without_unit(part: str) -> str:
    if re.search(r"(?i)\b[ap]\.?\s?m\.?$", part):  # a time of day
        return part
    return _WORDS_AFTER.sub("", part)
