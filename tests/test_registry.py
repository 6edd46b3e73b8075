"""Parts of other packages, by entry points: found when asked for, and never in the way of others."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from goldenedit import registry
from goldenedit.registry import Registry, UnknownNameError


@dataclass(frozen=True)
class Part:
    name: str


GROUP = "goldenedit.tests"
RECORDS = Registry[Part]("part", "json", GROUP)  # any package without parts of its own


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.setattr(RECORDS, "_records", {"builtin": Part("builtin")})
    monkeypatch.setattr(RECORDS, "_is_loaded", True)
    return RECORDS


@pytest.fixture
def install(tmp_path, monkeypatch, request):
    """Return a function that installs a package with a module and its entry points."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def installed(package: str, code: str, **names: str) -> None:
        (tmp_path / f"{package}.py").write_text(code, encoding="utf-8")
        request.addfinalizer(lambda: sys.modules.pop(package, None))
        metadata = tmp_path / f"{package}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
        lines = [f"[{GROUP}]", *(f"{name} = {value}" for name, value in names.items())]
        (metadata / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")

    return installed


ADDS = "import test_registry\ntest_registry.RECORDS.add(test_registry.Part('{}'))\n"


def test_a_part_is_imported_when_it_is_asked_for(parts, install):
    install("ge_good", ADDS.format("good"), good="ge_good")
    assert parts.names() == ["builtin", "good"]
    assert "good" in parts
    assert "ge_good" not in sys.modules
    assert parts.get("good") == Part("good")


def test_a_broken_package_breaks_no_other(parts, install, caplog):
    install("ge_broken", "import a_package_that_is_not_there", broken="ge_broken")
    install("ge_good", ADDS.format("good"), good="ge_good")
    assert parts.get("good") == Part("good")
    assert parts.available() == [Part("builtin"), Part("good")]
    assert "The part 'broken' of ge_broken cannot be loaded" in caplog.text
    assert parts.find("broken") is None
    with pytest.raises(ValueError, match=r"ge_broken cannot be loaded .*a_package_that_is_not_there"):
        parts.get("broken")


def test_a_package_that_adds_another_name_than_it_declares_is_told(parts, install):
    install("ge_other", ADDS.format("other"), declared="ge_other")
    with pytest.raises(ValueError, match=r"ge_other declares the part 'declared'.*does not add it"):
        parts.get("declared")


def test_two_packages_with_one_name_are_told_and_not_chosen_between(parts, install):
    install("ge_one", ADDS.format("same"), same="ge_one")
    install("ge_two", ADDS.format("same"), same="ge_two")
    with pytest.raises(ValueError, match=r"Two packages declare a part 'same': ge_(one|two) and ge_(one|two)\."):
        parts.get("same")


def test_an_unknown_name_names_the_group_and_what_there_is(parts):
    with pytest.raises(UnknownNameError, match=rf"'mine': use one of \['builtin'\].*'{GROUP}'"):
        parts.get("mine")


def test_a_name_is_taken_once(parts, monkeypatch):
    monkeypatch.setattr(registry, "_origin", lambda record: id(record))
    with pytest.raises(ValueError, match="There is a part 'builtin' already"):
        parts.add(Part("builtin"))
