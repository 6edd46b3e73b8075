"""Edits of tiny models to audit, and what an audit doubts about them."""

from __future__ import annotations

from dataclasses import replace

from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model
from goldenedit.audit import EditAudit
from goldenedit.storage.folder import write_edit_folder
from models import tiny_model

TOWER = EditRequest("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome", "Paris")
MERKEL = EditRequest("The mother tongue of Angela Merkel is", "Angela Merkel", "Cambodia", "German")
FAST = {"layer": 1, "steps": 4, "contexts": 2, "context_length": 3, "covariance_tokens": 300}


def edited(tokenizer, **options) -> EditModel:
    model = get_edit_model(tiny_model("llama"), EditConfig(**FAST | options), tokenizer)
    model.edit([TOWER], name="tower")
    model.edit([MERKEL], name="merkel")
    return model


def loaded(model: EditModel, tokenizer, tmp_path, **changes) -> EditModel:
    """Return what others load where the tower's edit was changed by hand, and signed anew."""
    content = model._content(["tower"])
    forged = replace(content, edits=[replace(content.edits[0], **changes)])
    write_edit_folder(tmp_path / "forged", forged, "")
    return EditModel.from_pretrained(tiny_model("llama"), tmp_path / "forged", tokenizer=tokenizer)


def doubts(found: EditAudit) -> list[str]:
    """Return the warnings about changes: few facts of a tiny model take, and the others have warnings of their own."""
    return [warning for warning in found.warnings if "is not answered" not in warning]
