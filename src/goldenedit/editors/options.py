"""Options of an editor: fields of a dataclass with a help, bounds, and units that fit every model."""

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
        default: Its value where a user gives none.
        help: What it does, in one sentence.
        least: The smallest number that it may be.
        above: A number that it must be above.
        whole: Whether it must be a whole number.

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
) -> Any:
    """Return a field whose default means the same for every model, beside the paper's own number.

    `EditConfig(relative_constants=True)`, the default, gives the editor `default` or what the user set, in units of the
    model at hand; `False` gives it `published` or what the user set, as it is.

    Args:
        default: The default, in units.
        published: The default of the paper's code, without units; by default the same number.
        help: What it does, in one sentence.
        unit: A unit that the problem knows (see `Problem.unit`); None for a plain number.
        least: The smallest number that it may be; None for any above 0.
    """
    bounds = {"least": least, "above": None if least is not None else above, "whole": False}
    published = default if published is None else published
    return field(
        default=None, metadata={"help": help, "default": default, "published": published, "unit": unit, **bounds}
    )


def is_relative(entry: Field[Any]) -> bool:
    """Tell a field made by `relative` from other fields."""
    return "published" in entry.metadata


def default_of(entry: Field[Any], relative_constants: bool) -> Any:
    """Return what a field is where the user sets nothing: for one made by `relative`, by the units in use."""
    if is_relative(entry):
        return entry.metadata["default" if relative_constants else "published"]
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def resolved(options: Options, relative_constants: bool, unit: Callable[[str], float]) -> Options:
    """Return options as the maths reads them: defaults filled in, and units multiplied out.

    Args:
        unit: Returns the size of a unit by its name.
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


@dataclass(kw_only=True)
class TrainingOptions:
    """Constants of training, which every editor that trains has; defaults measured best on development facts."""

    finetune_steps: int = option(25, least=1, whole=True, help="FT-L, FT-M, LoRA: most steps of Adam.")
    finetune_lr: float | None = relative(
        5e-3, published=5e-4, help="FT-L, FT-M, LoRA: learning rate; None for 5e-3, or as published 5e-4."
    )
    finetune_stop_loss: float = option(0.01, least=0.0, help="FT-L, FT-M, LoRA: loss to stop below.")


def check_fields(where: str, entries: Mapping[str, Field[Any]], values: Mapping[str, Any]) -> None:
    """Raise ValueError where a value of an option is out of its bounds, or not of its default's kind.

    Args:
        where: What the options are of, before a dot and their name.
    """
    for name, value in values.items():
        entry = entries[name]
        bounds = entry.metadata
        if bounds.get("least") is not None or bounds.get("above") is not None:
            check_number(
                f"{where}.{name}",
                value,
                least=bounds.get("least"),
                above=bounds.get("above"),
                whole=bounds["whole"],
                optional=entry.default is None,
            )
        elif entry.default is not MISSING and entry.default is not None and not _is_alike(value, entry.default):
            raise ValueError(f"{where}.{name} must be like its default, {entry.default!r}, got {value!r}.")


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
    """Raise ValueError where a value is not a number within these bounds; the message names it by `name`."""
    if optional and value is None:
        return
    kinds = (int,) if whole else (int, float)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    # Not math.isfinite, which raises OverflowError on large ints.
    number = number and (abs(value) <= sys.float_info.max or (infinite and value == float("inf")))
    if not number or (least is not None and value < least) or (above is not None and value <= above):
        kind = "a whole number" if whole else "a number"
        bound = f"above {above}" if above is not None else f"of at least {least}"
        raise ValueError(f"{name} must be {kind} {bound}, got {value!r}.")
