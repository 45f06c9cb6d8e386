"""Same-subject multi-relation editing (S2RKE, arXiv 2502.06868), in its own schema with questions added.

A file holds `records`, one a subject, and `instruct_templates`, pairs of a system message and a user message with `{q}`. Of a fact
`requested_rewrite` and `edit_question` may be used while editing; everything else is for evaluation alone.
"""

from __future__ import annotations

from pathlib import Path

from rose_engine.edits import Edit

from bench.datasets.cases import Case, DataError, Dataset, SubjectCases, grouped, texts


def from_json(data: object, path: str | Path, limit: int | None = None) -> Dataset:
    """Read what a file of this schema holds; `path` stands in the messages. DataError names the record that does not fit."""
    if not isinstance(data, dict) or not isinstance(data.get("records"), list) or not isinstance(data.get("instruct_templates"), list):
        raise DataError(f"{path}: must be an object with the lists `records` and `instruct_templates`")
    instructions = []
    for template in data["instruct_templates"]:
        try:
            system, user = texts(template, "instruct_templates")
        except ValueError as e:
            raise DataError(f"{path}: an instruction template is a system and a user message, given {template!r:.80}") from e
        before, found, after = user.partition("{q}")
        if not found:
            raise DataError(f"{path}: an instruction template has no {{q}}: {user!r}")
        instructions.append((system, before, after))
    subjects = []
    for number, record in enumerate(data["records"][:limit], 1):
        try:
            subjects.append(_subject(record, f"{path}: record {number}"))
        except (KeyError, TypeError) as e:
            raise DataError(f"{path}: record {number} lacks or misuses the field {e}") from e
    if not subjects:
        raise DataError(f"{path}: holds no records")
    return Dataset(grouped([case for subject in subjects for case in subject.cases]), tuple(instructions))


def _subject(record: dict, source: str) -> SubjectCases:
    name = record["subject"]["name"]
    cases = []
    for fact in record["Star_Topology"]:
        rewrite = fact["requested_rewrite"]
        question = fact.get("edit_question")
        question = question if question and name in question else None  # a question about "him" cannot be used while editing
        edit = Edit(name, rewrite["prompt"], rewrite["target_new"], question, rewrite["relation"], source=source)
        prompts, answers = fact["neighborhood_prompts"], fact["neighborhood_targets"]
        if len(prompts) != len(answers):
            raise DataError(f"{source}: {len(prompts)} neighbourhood prompts but {len(answers)} targets")
        try:
            neighbours = tuple(zip(texts(prompts, "neighborhood_prompts"), texts(answers, "neighborhood_targets"), strict=True))
            asked = [texts(fact[field], field) for field in ("paraphrase_prompts", "question_prompts")]
        except DataError as e:
            raise DataError(f"{source}: {e}") from e
        cases.append(Case(edit, *asked, neighbours))
    return SubjectCases(name, tuple(cases))
