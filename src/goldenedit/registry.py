"""Registries of editors and layer selectors, which other packages extend by entry points."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import logging
import pkgutil
import re
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class Named(Protocol):
    """A record of a registry."""

    @property
    def name(self) -> str:
        """The name that selects the record in a config."""


Record = TypeVar("Record", bound=Named)


class Registry(Generic[Record]):
    """Records by name, from the modules of this package and from installed packages.

    Nothing is imported until a name is looked up. A module adds its records when it is imported. The name of an entry
    point is the name of a record, and its value is the module (`my_package.my_editor`) or an object in it.

    Args:
        kind: The kind of record in messages, such as `"editor"`.
        package: The package whose modules add the built-in records.
        group: The group of entry points.
    """

    def __init__(self, kind: str, package: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._package = package
        self._records: dict[str, Record] = {}
        self._is_loaded = False
        self._is_loading = False

    def add(self, record: Record) -> None:
        """Add a record.

        Raises:
            ValueError: Another record has this name, or the name has characters that are not allowed.
        """
        name = record.name
        if not is_plain(name):
            raise ValueError(
                f"{name!r} cannot name {self._a_kind}. Use lowercase letters, digits, '-', '_' and '.', and begin with "
                "a letter or digit."
            )
        if not _origin(record).startswith(f"{self._package}."):
            self._load_builtin()  # so that a built-in record comes first, whatever is imported first
        existing = self._records.get(name)
        if existing is not None and _origin(existing) != _origin(record):
            raise ValueError(
                f"The {self.kind} {name!r} already exists in {_origin(existing)}. Use another name in "
                f"{_origin(record)}."
            )
        self._records[name] = record

    def get(self, name: str) -> Record:
        """Return the record of a name. If an installed package declares it, its module is imported first.

        Raises:
            UnknownNameError: No record has this name.
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
            except Exception as error:  # whatever the module raises, the message must name its package
                raise ValueError(
                    f"The {self.kind} {name!r} of {entry.value} cannot be loaded ({type(error).__name__}: {error}). "
                    "Update or uninstall its package."
                ) from error
            if name not in self._records:
                raise ValueError(
                    f"{entry.value} declares the {self.kind} {name!r} as an entry point, but does not add it. Its "
                    "decorator must have the same name."
                )
        if name not in self._records:
            raise UnknownNameError(
                f"Unknown {self.kind} {name!r}.{meant(name, self.names())} Use one of {self.names()}, or install the "
                f"package that has it (entry point {self.group!r})."
            )
        return self._records[name]

    def find(self, name: str) -> Record | None:
        """Return the record of a name, or None if no package has it or its package cannot be loaded."""
        try:
            return self.get(name)
        except ValueError:
            return None

    def available(self) -> list[Record]:
        """Return all records in the order of `names`. Those that cannot be loaded are logged as warnings."""
        records = []
        for name in self.names():
            try:
                records.append(self.get(name))
            except ValueError as error:  # one broken package must not hide the others
                logger.warning("%s", error)
        return records

    def names(self) -> list[str]:
        """Return all names: first those of the built-in records in the order of their modules, then all others."""
        self._load_builtin()
        return list(dict.fromkeys([*self._records, *sorted(self._declared())]))

    def __contains__(self, name: object) -> bool:
        self._load_builtin()
        return name in self._records or name in self._declared()  # last, because searching all packages is slow

    @property
    def _a_kind(self) -> str:
        return f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"

    def _load_builtin(self) -> None:
        if self._is_loaded or self._is_loading:
            return
        self._is_loading = True
        try:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__, f"{self._package}."):
                importlib.import_module(module.name)
            self._is_loaded = True
        finally:
            self._is_loading = False

    def _declared(self) -> dict[str, list[importlib.metadata.EntryPoint]]:
        """Return the entry points by name. A package that is listed twice declares the same value twice."""
        declared: dict[str, dict[str, importlib.metadata.EntryPoint]] = {}
        for entry in importlib.metadata.entry_points(group=self.group):
            declared.setdefault(entry.name, {}).setdefault(entry.value, entry)
        return {name: list(entries.values()) for name, entries in declared.items()}


def meant(name: object, known: Iterable[str]) -> str:
    """Return a sentence, with a space before it, on the known name that a misspelled one is closest to; or nothing.

    Example:
        ```python
        >>> from goldenedit.registry import meant
        >>> meant("memmit", ["rome", "memit"]), meant("x", ["rome"])
        (" Did you mean 'memit'?", '')
        ```
    """
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def is_plain(name: str) -> bool:
    """Return whether a text can name an editor or a layer selector."""
    return _NAME.fullmatch(name) is not None


class UnknownNameError(ValueError):
    """No built-in record and no installed package has this name."""


def _origin(record: Named) -> str:
    """Return the place where a record is defined. A module may be imported again and define it once more."""
    function = getattr(record, "function", record)
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"
