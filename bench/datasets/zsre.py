"""zsRE (Levy et al. 2017) as Mitchell et al. (2022) split it: questions, their rephrasings, and unrelated questions."""

from __future__ import annotations

from rose_engine.edits import Edit

from bench.datasets.cases import Case, slot, texts


def case(record: dict, source: str) -> Case:
    """A record: the question `src` is the prompt, `rephrase` is asked, `loc` must keep its answer."""
    subject = record["subject"]
    target = record["answers"][0] if record.get("answers") else record["alt"]
    neighbour = record["loc"].removeprefix("nq question: ").strip()
    neighbour = neighbour if neighbour.endswith("?") else f"{neighbour}?"
    edit = Edit(subject, slot(record["src"], subject), target, question=record["src"], source=source)
    rephrased = texts([record["rephrase"]], "rephrase")
    return Case(edit, rephrased, rephrased, (texts([neighbour, record["loc_ans"]], "loc, loc_ans"),))
