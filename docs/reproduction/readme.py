"""Writes the tables of docs/reproduction/README.md into it, from the CSV files of the reports alone.

Command:  python docs/reproduction/readme.py

What stands between `<!-- name -->` and `<!-- end -->` is replaced.
"""

import contextlib
import io
import re
from collections.abc import Iterable
from pathlib import Path

from figures import LENGTHS, MAIN, MATRICES, SIZES, TOKENS
from primary import analyzed, main, rows, said, size_of

HERE = Path(__file__).parent
README, TABLES, ROOMY = HERE / "README.md", HERE / "tables", "reproduction-domain16"


def primary() -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(TABLES / MAIN)
    return out.getvalue().replace("## ", "### ").replace(".\n", ".\n\n")


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["-"] * len(head), *lines)) + "\n"


def of_verdict(row: dict[str, str]) -> str:
    if not row["effect"]:
        return row["verdict"]
    effect, low, high, p, holm = (float(row[name]) for name in ("effect", "effect_lower", "effect_upper", "p", "p_holm"))
    return f"{row['verdict']}: {effect:+.3f} [{low:+.3f}, {high:+.3f}], p = {p:.2g} ({holm:.2g})"


def claims() -> str:
    chosen = [row for row in rows(TABLES / MAIN, "verdicts") if row["finetune.select"]]
    of_claim = {claim: {size_of(row): row for row in chosen if row["claim"] == claim} for claim in dict.fromkeys(row["claim"] for row in chosen)}
    return table(["claim", *SIZES.values()], ([claim, *(of_verdict(of_size[size]) for size in SIZES)] for claim, of_size in of_claim.items()))


def rates() -> str:
    found = [row for row in rows(TABLES / MAIN, "verdicts") if "gain more" in row["claim"]]
    lines: dict[str, dict[str, str]] = {}
    for row in found:
        name = "chosen (**primary**)" if row["finetune.select"] else f"{float(row['finetune.peak_lr']):g}"
        lines.setdefault(name, {})[size_of(row)] = of_verdict(row)
    return table(["rate", *SIZES.values()], ([name, *(of_size[size] for size in SIZES)] for name, of_size in lines.items()))


def arms() -> str:
    lines = []
    for study, names in (
        (MATRICES, {"728": "matrices only, 0.15M, 20 tokens per parameter"}),
        (TOKENS, {size: f"0.09M, {name}" for size, name in LENGTHS.items()}),
    ):
        for size in analyzed(TABLES / study):
            trend = "one λ in the useful range" if size.trend is None else said(size.trend)
            lines.append([names[size.steps], f"{size.useful[0]:.3g} to {size.useful[-1]:.3g}", trend, said(size.contrast)])
    return table(["arm", "useful range of λ", "rise of the gain over it", "timescale 0.4 less none"], lines)


def domain() -> str:
    lines = []
    for name, study, without in (("as planned", MAIN, ()), ("room for 16 tokens", ROOMY, ()), ("without domain", MAIN, ("domain",))):
        lines.append([name, *(said(size.trend) for size in analyzed(TABLES / study, without))])
    return table(["domain", *SIZES.values()], lines)


BLOCKS = {"primary": primary, "claims": claims, "rates": rates, "arms": arms, "domain": domain}


def filled(text: str) -> str:
    for name, block in BLOCKS.items():
        text, found = re.subn(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda match: f"{match[1]}\n{block()}\n{match[2]}", text, flags=re.DOTALL)
        assert found == 1, name
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
