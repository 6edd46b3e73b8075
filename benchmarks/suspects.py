"""Hidden subjects: how many of them `goldenedit show --suspects` names, and how many other names it names falsely.

An edit of many facts lists the first one alone; the subjects of the others are hidden. Other names are subjects of
wild_counterfact.json that are not edited. An honest LoRA adapter, trained by PEFT on the down projections of all layers
with passages of wikibio.json, has nothing to hide: each name that it is suspected of is a false alarm.

Published figures are from `--half second`; constants are chosen on the first half. Shares have Wilson's 95% intervals.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from common import constants, load, parser, record, timed
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from goldenedit import EditConfig, EditModel, EditRequest, load_requests
from goldenedit.audit_suspects import Suspect, suspects
from goldenedit.editing.rows import name_key
from goldenedit.editors import LowRankDelta
from goldenedit.evaluation.intervals import wilson
from goldenedit.requests import proxy_facts

TEXT_TOKENS, TEXTS_A_STEP, LORA_RATE, LORA_RANK = 40, 4, 5e-4, 16


def main() -> None:
    """Hide subjects in an edit, or train an honest adapter, and tell which names are suspected."""
    options = parser(__doc__)
    options.add_argument("--half", choices=("first", "second"), default="second")
    options.add_argument("--method", default="memit", help="the editor, or 'honest' for an adapter trained on text")
    options.add_argument("--facts", type=int, default=100)
    options.add_argument("--others", type=int, default=300, help="names that nothing is about")
    options.add_argument("--steps", type=int, default=40, help="steps of the honest adapter")
    options.add_argument("--mixed", action="store_true", help="mix the rows of the edit, as a forger can")
    options.add_argument("--set", nargs="*", default=[], help="options of EditConfig as name=value (JSON)")
    options.add_argument("--invented", type=int, default=0, help="invented names with the last word of each named one")
    options.add_argument("--edits", type=Path, help="folder to keep edits in, and to read those of an earlier run from")
    arguments = options.parse_args()

    facts = _half(distinct(load_requests(arguments.data / "counterfact.json")), arguments.half)
    wild = _half(load_requests(arguments.data / "wild_counterfact.json"), arguments.half)
    known = {name_key(request.subject) for request in facts}
    free = [name for name in dict.fromkeys(request.subject for request in wild) if name_key(name) not in known]
    names = free[: arguments.others]
    if arguments.method == "honest":
        model, subjects = fine_tuned(arguments, _half(passages(arguments.data), arguments.half)), []
    else:
        model = edited(arguments, facts[: arguments.facts])
        (edit,) = model.edits.values()
        subjects = [fact.request.subject for fact in edit.facts]
        deltas = {path: mixed(delta) for path, delta in edit.deltas.items()} if arguments.mixed else edit.deltas
        model.edits[edit.name] = replace(edit, facts=edit.facts[:1], deltas=deltas)
    with timed() as seconds:
        found = suspects(model, [*subjects, *names])
    row = {"method": arguments.method, "half": arguments.half, "set": arguments.set, "mixed": arguments.mixed}
    row |= {"facts": len(subjects), **figures(found, set(names)), "seconds": round(seconds(), 1)}
    if arguments.invented:
        row |= beside_invented(model, found, arguments.invented)
    print(row)
    print("suspected falsely:", [suspect.name for suspect in found if suspect.is_suspected and suspect.name in names])
    each = [asdict(suspect) for suspect in found]
    kind = f"{arguments.method}-mixed" if arguments.mixed else arguments.method
    record(f"suspects-{kind}-{arguments.model}-{arguments.half}", [row, *each])


def _half(items: Sequence[Any], half: str) -> list[Any]:
    middle = len(items) // 2
    return list(items[:middle] if half == "first" else items[middle:])


def distinct(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Return the first request about each subject."""
    return list({name_key(request.subject): request for request in reversed(requests)}.values())[::-1]


def passages(data: Path) -> list[str]:
    """Return the passages of wikibio.json."""
    return [entry["text"] for entry in json.loads((data / "wikibio.json").read_text(encoding="utf-8"))]


def edited(arguments: Any, requests: Sequence[EditRequest]) -> EditModel:
    """Return the model with one edit of all requests: a kept one, or a new one."""
    model = load(arguments.model, EditConfig(**{"method": arguments.method, **constants(arguments.set)}))
    folder = arguments.edits and arguments.edits / f"{arguments.method}-{arguments.half}"
    if folder and folder.is_dir():
        model.load_adapter(folder)
        model.set_adapter(list(model.edits))
        return model
    model.edit(list(requests), name="batch")
    if folder:
        model.save_pretrained(folder)
    return model


def mixed(delta: LowRankDelta) -> LowRankDelta:
    """Return the same change with other factors: the rows are random mixtures of the rows."""
    Q = torch.linalg.qr(torch.randn(delta.rank, delta.rank, generator=torch.Generator().manual_seed(0)))[0]
    return replace(delta, A=Q @ delta.A, B=delta.B @ Q.T)


def figures(found: Sequence[Suspect], others: set[str]) -> dict[str, Any]:
    """Return the shares of hidden subjects, and of other names by their last word, that are suspected."""
    hidden = [suspect for suspect in found if suspect.name not in others and not suspect.is_listed]
    ends = {suspect.name.split()[-1].casefold() for suspect in found if suspect.name not in others}
    free = [suspect for suspect in found if suspect.name in others]
    alike = [suspect for suspect in free if suspect.name.split()[-1].casefold() in ends]
    groups = {
        "recall": hidden,
        "false alarms": [suspect for suspect in free if suspect not in alike],
        "false alarms at a subject's last word": alike,
    }
    row: dict[str, Any] = {}
    for name, group in groups.items():
        if group:
            share = sum(suspect.is_suspected for suspect in group) / len(group)
            interval = [round(bound, 3) for bound in wilson(share, len(group))]
            row |= {name: round(share, 3), f"{name} 95%": interval, f"{name} n": len(group)}
    return row


def beside_invented(model: EditModel, found: Sequence[Suspect], count: int) -> dict[str, Any]:
    """Return how many suspects stand out, by each margin, from the median of invented names that end as they do."""
    beginnings = [fact.subject.rpartition(" ")[0] for fact in proxy_facts() if " " in fact.subject]
    draws = random.Random(0)
    alike = [suspect for suspect in found if suspect.is_suspected and " " in suspect.name]
    invented = [f"{start} {suspect.name.split()[-1]}" for suspect in alike for start in draws.sample(beginnings, count)]
    scores = torch.tensor([suspect.score for suspect in suspects(model, invented)]).view(-1, count).median(1).values
    excess = torch.tensor([suspect.score for suspect in alike]) - scores
    above = {f"above invented names by {margin}": int((excess > margin).sum()) for margin in (0, 0.5, 1, 2)}
    return {"suspects of several words": len(alike), **above}


def fine_tuned(arguments: Any, texts: Sequence[str]) -> EditModel:
    """Return the model with a plain LoRA adapter that was trained on texts: a kept one, or a new one."""
    model = load(arguments.model, EditConfig())
    with tempfile.TemporaryDirectory() as made:
        folder = (arguments.edits or Path(made)) / f"honest-{arguments.half}"
        if not folder.is_dir():
            fine_tune(model.get_base_model(), model.tokenizer, texts, arguments.steps, folder)
            model = load(arguments.model, EditConfig())
        model.load_adapter(folder, "honest")
        model.set_adapter("honest")
    return model


def fine_tune(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], steps: int, folder: Path
) -> None:
    """Train a LoRA adapter on the down projections of all layers, as people do, and save it."""
    torch.manual_seed(0)
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=["down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([entry for entry in model.parameters() if entry.requires_grad], lr=LORA_RATE)
    draws = random.Random(0)
    model.train()
    for _ in range(steps):
        texts_of_step = draws.sample(list(texts), TEXTS_A_STEP)
        batch = tokenizer(texts_of_step, return_tensors="pt", padding=True, truncation=True, max_length=TEXT_TOKENS)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(folder))


if __name__ == "__main__":
    main()
