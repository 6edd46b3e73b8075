"""Named parts that other packages may add to: editors and layer selectors, found by entry points."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import pkgutil
import re
from typing import Generic, Protocol, TypeVar

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class Named(Protocol):
    """What a registry holds."""

    @property
    def name(self) -> str:
        """The name that users give in a config."""


Record = TypeVar("Record", bound=Named)


class Registry(Generic[Record]):
    """Records by name: those of this package's own modules, and those that installed packages declare.

    Nothing is imported before a name is asked for. A module adds its records when it is imported; an entry point names
    such a module (`my_package.my_editor`) or something in it, and its own name is that of a record.

    Args:
        kind: What a record is, for messages: `"editor"`.
        package: The package whose modules hold the built-in records.
        group: The group of entry points.
    """

    def __init__(self, kind: str, package: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._package = package
        self._records: dict[str, Record] = {}
        self._is_loaded = False

    def add(self, record: Record) -> None:
        """Add a record.

        Raises:
            ValueError: The name is taken by another one, or not plain.
        """
        name = record.name
        if (
            not name
            or name != name.strip().lower()
            or any(character.isspace() or character in ":,/" for character in name)
        ):
            raise ValueError(f"{name!r} cannot name {self._a_kind}: use lowercase letters, digits, '-', '_' and '.'.")
        there = self._records.get(name)
        if there is not None and _origin(there) != _origin(record):
            raise ValueError(
                f"There is {self._a_kind} {name!r} already, from {_origin(there)}: choose another name than "
                f"{_origin(record)} does."
            )
        self._records[name] = record

    def get(self, name: str) -> Record:
        """Return the record of a name; an installed package that has it is imported now.

        Raises:
            UnknownNameError: There is none.
            ValueError: The package that declares it cannot be imported, or does not add it.
        """
        self._load_builtin()
        if name not in self._records and name in (declared := self._declared()):
            entry, *others = declared[name]
            if others:
                raise ValueError(
                    f"Two packages declare {self._a_kind} {name!r}: {entry.value} and {others[0].value}. Uninstall one."
                )
            try:
                entry.load()
            except Exception as error:  # whatever a stranger's module raises, the name of the package says whom to ask
                raise ValueError(
                    f"The {self.kind} {name!r} of {entry.value} cannot be loaded ({type(error).__name__}: {error})."
                ) from error
            if name not in self._records:
                raise ValueError(
                    f"{entry.value} declares the {self.kind} {name!r} as an entry point, but does not add it: its "
                    f"decorator must have the same name."
                )
        if name not in self._records:
            raise UnknownNameError(
                f"Unknown {self.kind} {name!r}: use one of {self.names()}, or install the package that has it "
                f"(entry point {self.group!r})."
            )
        return self._records[name]

    def find(self, name: str) -> Record | None:
        """Return the record of a name, None where no package has it or the one that has it cannot be loaded."""
        try:
            return self.get(name)
        except ValueError:
            return None

    def available(self) -> list[Record]:
        """Return all records, in the order of their names; a warning tells of those that cannot be loaded."""
        records = []
        for name in self.names():
            try:
                records.append(self.get(name))
            except ValueError as error:  # one broken package must not hide the others
                logger.warning("%s", error)
        return records

    def names(self) -> list[str]:
        """Return all names, those of the built-in records first, in the order of their modules."""
        self._load_builtin()
        return list(dict.fromkeys([*self._records, *sorted(self._declared())]))

    def __contains__(self, name: object) -> bool:
        self._load_builtin()
        return name in self._records or name in self._declared()  # looking through all packages takes a while

    @property
    def _a_kind(self) -> str:
        return f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"

    def _load_builtin(self) -> None:
        if not self._is_loaded:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__, f"{self._package}."):
                importlib.import_module(module.name)
            self._is_loaded = True

    def _declared(self) -> dict[str, list[importlib.metadata.EntryPoint]]:
        """Return the entry points by name; a package that is found twice declares the same."""
        declared: dict[str, dict[str, importlib.metadata.EntryPoint]] = {}
        for entry in importlib.metadata.entry_points(group=self.group):
            declared.setdefault(entry.name, {}).setdefault(entry.value, entry)
        return {name: list(entries.values()) for name, entries in declared.items()}


def is_plain(name: str) -> bool:
    """Tell whether a text can name an editor or a layer selector."""
    return _NAME.fullmatch(name) is not None


class UnknownNameError(ValueError):
    """No built-in part and no installed package has this name."""


def _origin(record: Named) -> str:
    """Return where a record was defined, so that a module may be imported anew."""
    function = getattr(record, "function", record)
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"
