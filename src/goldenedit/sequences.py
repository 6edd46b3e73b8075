"""Thousands of facts: batch after batch into one edit, whose cost and size do not grow with their number."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from transformers.utils.logging import tqdm

from goldenedit.files import folder_at
from goldenedit.requests import EditRequest, Facts, as_requests, distinct
from goldenedit.storage.atomic import check_writable
from goldenedit.storage.folder import Edit

logger = logging.getLogger(__name__)


class SequencesMixin:
    """Edits of many facts for `EditModel`."""

    edits: dict[str, Edit]

    if TYPE_CHECKING:

        def edit(self, *args: Any, **kwargs: Any) -> Edit: ...  # noqa: D102

        def save_pretrained(  # noqa: D102
            self, save_directory: str | os.PathLike[str], selected_adapters: str | list[str] | None = None
        ) -> None: ...

    def edit_in_batches(
        self,
        requests: Facts,
        batch_size: int = 100,
        into: str = "facts",
        save_directory: str | os.PathLike[str] | None = None,
    ) -> Edit:
        """Edit many facts, batch after batch into one edit, and save it after each batch.

        Facts that the edit has already are left out. So a run that was ended goes on where it was: load its folder, and
        call this again with the same facts.

        Args:
            requests: The facts, as in `edit`.
            batch_size: Facts of a batch. Larger batches are faster, and facts of one batch are solved together.
            into: Name of the edit, which may exist already.
            save_directory: A folder that `save_pretrained` writes this edit to after each batch.

        Returns:
            The edit, with all its facts.

        Raises:
            ValueError: A request is invalid, two requests contradict each other, or a batch fails or harms other text
                more than `EditConfig.max_perplexity_ratio` or `max_text_kl` allow. The batches before it stay, and
                the message has the number of facts that are edited.

        Example:
            ```python
            facts = load_requests("facts.csv")
            model.edit_in_batches(facts, save_directory="my-edits")
            # after an interrupt
            model = EditModel.from_pretrained(base, "my-edits")
            model.edit_in_batches(facts, save_directory="my-edits")
            ```
        """
        if batch_size < 1:
            raise ValueError(f"edit_in_batches() needs a batch_size of at least 1, got {batch_size}.")
        every = distinct(as_requests(requests))
        if not every:
            raise ValueError("edit_in_batches() needs at least one request.")
        if save_directory is not None:
            check_writable(folder_at(save_directory))
        known = {_key(fact.request) for fact in self.edits[into].facts} if into in self.edits else set()
        left = [request for request in every if _key(request) not in known]
        if len(left) < len(every):
            logger.info("%d of %d facts are edited already.", len(every) - len(left), len(every))
        with tqdm(total=len(every), initial=len(every) - len(left), desc="Facts", unit="fact") as progress:
            for start in range(0, len(left), batch_size):
                batch = left[start : start + batch_size]
                try:
                    self.edit(batch, into=into)
                except ValueError as error:
                    done = len(every) - len(left) + start
                    saved = "" if save_directory is None or not start else f", and saved in {os.fspath(save_directory)}"
                    raise ValueError(f"{error} Of {len(every)} facts, {done} are edited{saved}.") from error
                if save_directory is not None:
                    self.save_pretrained(save_directory, into)
                progress.update(len(batch))
        return self.edits[into]


def _key(request: EditRequest) -> tuple[object, ...]:
    return request.prompt_key, request.subject, request.target_new.strip()
