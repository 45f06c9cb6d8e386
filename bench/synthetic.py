"""A second model to edit: a small GPT-NeoX, trained here on a made-up world, with data in the same-subject schema.

    python -m bench.synthetic --out world
    python -m bench.quality --model world/model --data world/data.json --recipes vanilla,rose_paper,rose --subjects 20

What defaults are chosen on the embedded model is tried here on another architecture (LayerNorm, parallel residual, partial rotation, a
tokenizer of its own), another size and other facts. The people, relations and objects are drawn with --seed; every fact is said in every
wording and in every frame in which the benchmarks ask and the engine edits, so that the model knows what they mean. Wordings are split:
an edit is given the first statement and the first question, paraphrases and questions of the evaluation are others.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rose_engine.edits import Edit
from rose_engine.files import replacing
from rose_engine.forms import PAPER_PLAIN_FORMS, PLAIN_FORMS, render
from tokenizers import ByteLevelBPETokenizer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from bench.datasets.cases import INSTRUCTIONS
from bench.subjects import note

END = "<|end|>"


@dataclass(frozen=True)
class Relation:
    """statements and questions: wordings with `{}` for the subject, the first of each for editing; a statement is ended by an object."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    objects: tuple[str, ...]


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


RELATIONS = {
    "city": Relation(
        ("{} lives in the city of", "{} has a home in", "The city in which {} lives is", "The home of {} is in", "{} is at home in"),
        ("In which city does {} live?", "Where is the home of {}?", "Which city is {} at home in?"),
        words("Paris Rome Oslo Cairo Lima Quito Delhi Tokyo Dublin Madrid Vienna Athens Warsaw Havana Boston Geneva"),
    ),
    "instrument": Relation(
        ("{} plays the", "{} makes music on the", "The instrument of {} is the", "The instrument that {} plays is the", "{} practises the"),
        ("Which instrument does {} play?", "What does {} make music on?", "What is the instrument of {}?"),
        words("piano violin guitar cello flute trumpet harp drum organ banjo tuba lute"),
    ),
    "language": Relation(
        ("{} speaks the language", "{} talks in", "The language of {} is", "The mother tongue of {} is", "{} writes letters in"),
        ("Which language does {} speak?", "What is the mother tongue of {}?", "In what language does {} talk?"),
        words("French Latin Greek Dutch Danish Polish Hindi Arabic Welsh Czech Irish Korean"),
    ),
    "trade": Relation(
        ("{} works as a", "{} earns a living as a", "The job of {} is that of a", "The trade of {} is that of a", "{} is known as a"),
        ("What does {} work as?", "What is the trade of {}?", "Which job does {} have?"),
        words("baker miner doctor farmer tailor sailor lawyer painter banker potter hunter singer"),
    ),
}
EVALUATED = ((2, 3, 4), (1, 2))  # statements and questions that no edit is given
Facts = dict[str, dict[str, str]]


def facts_of(people: int, draw: random.Random) -> Facts:
    """name -> relation -> object."""
    syllables = [a + b for a in "bdfgklmnprstv" for b in ("a", "e", "i", "o", "u", "an", "el", "or")]
    word = lambda: "".join(draw.sample(syllables, 2)).capitalize()  # noqa: E731
    names: set[str] = set()
    while len(names) < people:
        names.add(f"{word()} {word()}")
    return {name: {r: draw.choice(relation.objects) for r, relation in RELATIONS.items()} for name in sorted(names)}


def texts_of(facts: Facts, draw: random.Random) -> list[str]:
    """Every fact in every wording once, in frames that are drawn: as it stands, as an edit's form, as an evaluation's instruction."""
    out = []
    forms = sorted({*PLAIN_FORMS, *PAPER_PLAIN_FORMS}, key=lambda form: form.name)
    for name, known in facts.items():
        for r, answer in known.items():
            relation = RELATIONS[r]
            for statement in relation.statements:
                text, target, _ = render(Edit(name, statement, answer, draw.choice(relation.questions)), draw.choice(forms), None)
                out += [statement.replace("{}", name) + f" {answer}", text + target]
            for question in relation.questions:
                system, before, after = draw.choice(INSTRUCTIONS)
                out.append(f"{system}\n{before}{question.replace('{}', name)}{after}\nAnswer: {answer}")
    draw.shuffle(out)
    return out


def records_of(facts: Facts, count: int, draw: random.Random) -> list[dict]:
    """Of some people every fact with a new object; neighbours are others with their true ones."""
    names = list(facts)
    out = []
    for number, name in enumerate(draw.sample(names, count)):
        star = []
        for r, relation in RELATIONS.items():
            others = draw.sample([other for other in names if other != name], min(4, len(names) - 1))
            said = lambda wordings, which, name=name: [wordings[i].replace("{}", name) for i in which]  # noqa: E731
            star.append(
                {
                    "requested_rewrite": {
                        "prompt": relation.statements[0],
                        "relation": r,
                        "target_true": facts[name][r],
                        "target_new": draw.choice([o for o in relation.objects if o != facts[name][r]]),
                    },
                    "edit_question": relation.questions[0].replace("{}", name),
                    "paraphrase_prompts": said(relation.statements, EVALUATED[0]),
                    "question_prompts": said(relation.questions, EVALUATED[1]),
                    "neighborhood_prompts": [relation.statements[0].replace("{}", other) for other in others],
                    "neighborhood_targets": [facts[other][r] for other in others],
                }
            )
        out.append({"subjectID": number, "class": "person", "subject": {"name": name}, "Star_Topology": star})
    return out


def tokenizer_of(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,024 tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=1024, min_frequency=2, special_tokens=[END])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END)


def trained(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, epochs: int, layers: int, width: int, seed: int
) -> GPTNeoXForCausalLM:
    """A model that has read the texts so many times, each text a row of its own; AdamW, one cycle of the learning rate."""
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": max(1, width // 32)}
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, hidden_dropout=0.0, attention_dropout=0.0, **shape, **ends
    )
    model = GPTNeoXForCausalLM(config)
    rows = sorted((tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts), key=len)
    batches = [rows[i : i + 64] for i in range(0, len(rows), 64)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=epochs * len(batches))
    draw, began = random.Random(seed), time.perf_counter()
    for epoch in range(epochs):
        total = 0.0
        for batch in draw.sample(batches, len(batches)):
            longest = max(map(len, batch))
            ids = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in batch])
            places = torch.arange(longest) < torch.tensor([len(row) for row in batch])[:, None]
            loss = model(input_ids=ids, labels=torch.where(places, ids, -100)).loss
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += loss.item()
        note(f"epoch {epoch + 1}/{epochs}: loss {total / len(batches):.3f}, {time.perf_counter() - began:.0f} s")
    return model.eval()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.synthetic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="gets model/ and data.json")
    parser.add_argument("--people", type=int, default=60)
    parser.add_argument("--edited", type=int, default=20, help="of whom this many have records to edit")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    draw = random.Random(args.seed)
    facts = facts_of(args.people, draw)
    texts = texts_of(facts, draw)
    tokenizer = tokenizer_of(texts)
    model = trained(texts, tokenizer, args.epochs, args.layers, args.width, args.seed)
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    data = {"records": records_of(facts, args.edited, draw), "instruct_templates": [[s, f"{b}{{q}}{a}"] for s, b, a in INSTRUCTIONS]}
    with replacing(args.out / "data.json") as temporary:
        temporary.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
