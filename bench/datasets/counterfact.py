"""CounterFact (Meng et al. 2022): counterfactual targets, paraphrases, and neighbours that have the true target.

Two layouts: the authors' nested JSON, and the flat records of later repositories, one paraphrase and one neighbour each.
"""

from __future__ import annotations

from rose_engine.edits import Edit

from bench.datasets.cases import Case, slot, texts


def nested_case(record: dict, source: str) -> Case:
    """A record of the authors' file."""
    rewrite = record["requested_rewrite"]
    true = rewrite["target_true"]["str"]
    edit = Edit(rewrite["subject"], rewrite["prompt"], rewrite["target_new"]["str"], relation=rewrite.get("relation_id"), source=source)
    neighbours = tuple((prompt, true) for prompt in texts(record["neighborhood_prompts"], "neighborhood_prompts"))
    return Case(edit, texts(record["paraphrase_prompts"], "paraphrase_prompts"), (), neighbours)


def flat_case(record: dict, source: str) -> Case:
    """A flat record."""
    subject = record["subject"]
    edit = Edit(subject, slot(record["prompt"], subject), record["target_new"], id=str(record.get("case_id", "")) or None, source=source)
    neighbour = texts([record["locality_prompt"], record["locality_ground_truth"]], "locality_prompt, locality_ground_truth")
    return Case(edit, texts([record["rephrase_prompt"]], "rephrase_prompt"), (), (neighbour,))
