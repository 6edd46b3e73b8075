"""Options of an editor: dataclass fields with a help text, bounds, and units that suit every model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, TypeVar

Options = TypeVar("Options")


def option(
    default: Any, *, help: str, least: float | None = None, above: float | None = None, whole: bool = False
) -> Any:
    """Return a field of an options dataclass.

    Args:
        default: The default value.
        help: What the option does, in one sentence.
        least: Smallest allowed number.
        above: Number that the value must be greater than.
        whole: Whether the value must be a whole number.

    Example:
        ```python
        >>> from dataclasses import dataclass
        >>> from goldenedit.editors import option
        >>> @dataclass
        ... class Options:
        ...     ridge: float = option(0.1, help="Weight of the size of the update.", least=0.0)
        >>> Options().ridge
        0.1
        ```
    """
    return field(default=default, metadata={"help": help, "least": least, "above": above, "whole": whole})


def relative(
    default: float,
    *,
    published: float | None = None,
    help: str,
    unit: str | None = None,
    above: float = 0.0,
    least: float | None = None,
    whole: bool = False,
) -> Any:
    """Return a field whose default means the same for every model, next to the number that the paper published.

    With `EditConfig(relative_constants=True)`, which is the default, the editor reads the user's value or `default`,
    multiplied by a unit measured on the model. With `False` it reads the user's value or `published` without a unit.

    Args:
        default: The default, in units.
        published: The default of the paper's code, without units. If omitted, it equals `default`.
        help: What the option does, in one sentence.
        unit: Name of a unit (see `Problem.unit`); None for a plain number.
        above: Number that the value must be greater than, unless `least` is given.
        least: Smallest allowed number.
        whole: Whether the value must be a whole number.
    """
    bounds = {"least": least, "above": None if least is not None else above, "whole": whole}
    published = default if published is None else published
    return field(
        default=None, metadata={"help": help, "default": default, "published": published, "unit": unit, **bounds}
    )


def is_relative(entry: Field[Any]) -> bool:
    """Return whether a field was made by `relative`."""
    return "published" in entry.metadata


def default_of(entry: Field[Any], relative_constants: bool) -> Any:
    """Return the default of a field; for one made by `relative`, the default that goes with the units in use."""
    if is_relative(entry):
        return entry.metadata["default" if relative_constants else "published"]
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def resolved(options: Options, relative_constants: bool, unit: Callable[[str], float]) -> Options:
    """Return options as the maths reads them, with defaults filled in and units multiplied out.

    Args:
        unit: Returns the size of a unit from its name.
    """
    values = {}
    entries: tuple[Field[Any], ...] = fields(options)  # type: ignore[arg-type]
    for entry in filter(is_relative, entries):
        value = getattr(options, entry.name)
        value = default_of(entry, relative_constants) if value is None else value
        if relative_constants and entry.metadata["unit"] is not None:
            value *= unit(entry.metadata["unit"])
        values[entry.name] = value
    return replace(options, **values)  # type: ignore[type-var]


LEARNING_RATE = (
    "Learning rate, in units of the root mean square of the edited weights. None means 0.027 (0.011 for LocFT-BF) or, "
    "with relative_constants=False, the published 5e-4 without a unit."
)
CUT = (
    "Largest share of the change, in the Frobenius norm, that is cut off to keep its rank low. None means 0.4 (0.3 for "
    "CrispEdit) or, with relative_constants=False, nothing, as in the papers."
)


@dataclass(kw_only=True)
class TrainingOptions:
    """Constants of every editor that trains. The defaults were the best on development facts."""

    finetune_steps: int = option(
        25,
        least=1,
        whole=True,
        help="Largest number of passes over the facts. Editors without mini-batches take one step of Adam in each.",
    )
    finetune_lr: float | None = relative(0.027, published=5e-4, unit="weight", help=LEARNING_RATE)
    finetune_stop_loss: float = option(0.01, least=0.0, help="Training stops when the loss is below this.")


@dataclass(kw_only=True)
class BatchTrainingOptions(TrainingOptions):
    """Constants of every editor that trains on mini-batches."""

    finetune_batch: int | None = relative(
        4,
        published=100,
        least=1,
        whole=True,
        help="Number of facts of a step of Adam, drawn by the seed. None means 4 or, with relative_constants=False, "
        "the published 100.",
    )
    finetune_rehearsal: float | None = relative(
        1.0,
        published=0.0,
        least=0.0,
        help="Facts of earlier edits that are trained along in each pass, as a share of the number of new facts. None "
        "means 1 or, with relative_constants=False, the published 0.",
    )
    finetune_cut: float | None = relative(0.4, published=0.0, least=0.0, help=CUT)


def check_fields(where: str, entries: Mapping[str, Field[Any]], values: Mapping[str, Any]) -> None:
    """Raise ValueError if the value of an option is out of bounds, or of another type than the default.

    Args:
        where: Name of the config, which error messages put before a dot and the option's name.
        entries: Fields by name.
        values: Values to check, by name.
    """
    for name, value in values.items():
        entry = entries[name]
        bounds = entry.metadata
        least, above, whole = bounds.get("least"), bounds.get("above"), bool(bounds.get("whole"))
        if least is not None or above is not None or whole or isinstance(value, float):
            is_optional = entry.default is None
            check_number(f"{where}.{name}", value, least=least, above=above, whole=whole, optional=is_optional)
        if entry.default is not MISSING and entry.default is not None and not _is_alike(value, entry.default):
            raise ValueError(f"{where}.{name} must be of the type of its default {entry.default!r}, got {value!r}.")


def _is_alike(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, int | float) if isinstance(default, int | float) else isinstance(value, type(default))


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    whole: bool = False,
    infinite: bool = False,
    optional: bool = False,
) -> None:
    """Raise ValueError if a value is not a number within the bounds. The message calls it `name`."""
    if optional and value is None:
        return
    kinds = (int,) if whole else (int, float)
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    # math.isfinite raises OverflowError on large ints.
    is_number = is_number and (abs(value) <= sys.float_info.max or (infinite and value == float("inf")))
    if not is_number or (least is not None and value < least) or (above is not None and value <= above):
        kind = "a whole number" if whole else "a number"
        bound = f" above {above}" if above is not None else "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} must be {kind}{bound}, got {value!r}.")
