"""Puts results/*.json into docs/performance.md and docs/reliability.md, between the lines `<!-- results: NAME -->` and `<!-- end -->`.

Command: python benchmarks/page.py
"""

import json
import re
import sys
from typing import Any

from side_by_side import RESULTS, ROOT, markdown

PAGES = [ROOT / "docs" / name for name in ("performance.md", "reliability.md")]
SECTION = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def section(result: dict[str, Any]) -> str:
    machine = result["machine"]
    where = f"{machine['processor']} ({', '.join(machine['units']) or 'no vector units known'}), {machine['cores']} cores"
    parts = [f"`{result['command']}` on {where}; load before {machine['load before']}."]
    for heading, rows in result["tables"].items():
        # What all rows share is said once.
        versions = {row.get("versions") for row in rows}
        shown = [{key: value for key, value in row.items() if key != "versions"} for row in rows] if len(versions) == 1 else rows
        common = f" ({versions.pop()})" if len(versions) == 1 and None not in versions else ""
        parts.append(f"{heading}{common}:\n\n{markdown(shown)}".rstrip())
    return "\n\n".join(parts)


def main() -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    names = [match[1] for text in texts.values() for match in SECTION.findall(text)]
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    for name in names:
        if name not in results:
            print(f"the page keeps its old {name}: benchmarks/{name.partition('-')[0]}.py has written no results", file=sys.stderr)
    for name in results.keys() - set(names):
        print(f"no page has a section for {name}: give one the lines <!-- results: {name} --> and <!-- end -->", file=sys.stderr)
    for name, result in results.items():
        for heading, rows in result["tables"].items():
            for row in rows:
                if row.get("missing"):
                    print(f"{name}, {heading}: {next(iter(row.values()))} is left out: {row['missing']}", file=sys.stderr)
    for page, text in texts.items():
        page.write_text(SECTION.sub(lambda m: f"{m[1]}\n{section(results[m[2]])}\n\n{m[3]}" if m[2] in results else m[0], text), encoding="utf-8")


if __name__ == "__main__":
    main()
