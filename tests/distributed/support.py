"""The support matrix, from what the methods did: ``python -m tests.distributed.support`` writes it into the docs."""

import re

from tests.distributed.launching import ROOT
from tests.distributed.running import answers_of

ORDER = ("single", "DDP", "DDP m-SAM", "FSDP2", "TP", "FSDP+TP", "HSDP", "CPU offload")
BEGIN, END = "<!-- support matrix, generated -->", "<!-- end of the support matrix -->"
DOCUMENTS = ("docs/distributed.md",)

Answers = dict[str, dict[str, str]]


def table(answers: list[Answers]) -> str:
    """Markdown: a row for all that behaves alike, and the sentences of what is refused below."""
    cells = {row: {engine: a[row][engine] for a in answers for engine in a[row]} for row in answers[0]}
    sentences: list[str] = []

    def short(answer: str) -> str:
        answer = re.sub(r"\(\d+, \d+\)", "(n, m)", answer)
        if answer == "yes":
            return answer
        if answer not in sentences:
            sentences.append(answer)
        return f"no ({sentences.index(answer) + 1})"

    alike: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for row, by_engine in cells.items():
        method, where = row.split("/", 1)
        pattern = tuple(short(by_engine[engine]) for engine in ORDER)
        alike.setdefault(pattern, {}).setdefault(where, []).append(method)
    lines = ["| method | ascent, ε in | " + " | ".join(ORDER) + " |", "| --- " * (len(ORDER) + 2) + "|"]
    for pattern, places in alike.items():
        merged: dict[tuple[str, ...], list[str]] = {}
        for where, methods in places.items():
            merged.setdefault(tuple(methods), []).append(where.replace("/", ", "))
        for methods, wheres in merged.items():
            where = "any" if len(wheres) == 4 else "; ".join(wheres)
            lines.append(f"| {', '.join(methods)} | {where} | " + " | ".join(pattern) + " |")
    return "\n".join([*lines, "", *(f"{i}. {sentence}" for i, sentence in enumerate(sentences, 1))])


def written(document: str) -> str:
    """The matrix as it stands in a document."""
    return (ROOT / document).read_text().split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    answers = [answers_of(n, "checks", words=("support",))["checks"]["support"]["value"] for n in (2, 4)]
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        before, rest = text.split(BEGIN)
        (ROOT / document).write_text(f"{before}{BEGIN}\n{table(answers)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
