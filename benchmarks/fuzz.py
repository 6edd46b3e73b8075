"""Feed the readers of facts, texts, edits and golden layers whatever reaches more of their code.

Needs atheris, which is no development dependency (`pip install atheris==3.0.0`). It changes files and keeps those that
run code which no other one ran. Each file must be read, or refused by a ValueError that names it; at most 2
GiB and 10 seconds are for each. The files that it starts from are one of each format.

    python fuzz.py facts --runs 200000
    python fuzz.py adapter_model.safetensors
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import atheris

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path += [str(TESTS), str(TESTS / "storage"), str(TESTS / "formats")]

with atheris.instrument_imports(include=["goldenedit", "json"]):
    from contents import edits_with_state, resign
    from samples import SAMPLES

    from goldenedit.lm.covariance import dataset_texts
    from goldenedit.requests import load_requests
    from goldenedit.storage.atlas import read_golden_layers
    from goldenedit.storage.folder import EDIT_CONFIG, EDIT_FILES, write_edit_folder
    from goldenedit.storage.reading import read_edit_folder

ATLAS = TESTS.parent / "model_cards" / "golden_layers.json"
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt")
SCRATCH = tempfile.TemporaryDirectory(prefix="goldenedit-fuzz-")
ROOT = Path(SCRATCH.name)


def facts(data: bytes) -> None:
    """Read facts from a file whose suffix the first byte chooses."""
    path = _written(data)
    _must_name(path, lambda: load_requests(path))
    _must_name(path, lambda: load_requests(path, skip_bad=True))


def texts(data: bytes) -> None:
    """Read texts for statistics in the same way."""
    path = _written(data)
    _must_name(path, lambda: [text for text, _ in zip(dataset_texts(str(path)), range(100), strict=False)])


def golden_layers(data: bytes) -> None:
    """Read a file of golden layers."""
    path = ROOT / "golden_layers.json"
    path.write_bytes(data)
    _must_name(path, lambda: read_golden_layers(path))


def edit_file(name: str, data: bytes) -> None:
    """Read an edit folder with another file of that name, and new digests."""
    folder = ROOT / "edit"
    if not folder.exists():
        write_edit_folder(folder, edits_with_state(), "the card")
    kept = {name: (folder / name).read_bytes() for name in {name, EDIT_CONFIG}}
    (folder / name).write_bytes(data)
    with suppress(ValueError, LookupError, TypeError, AttributeError, OverflowError):  # no config any more
        resign(folder)
    try:
        _must_name(folder, lambda: read_edit_folder(folder))
    finally:
        for name, content in kept.items():
            (folder / name).write_bytes(content)


TARGETS: dict[str, Callable[[bytes], None]] = {
    **{function.__name__: function for function in (facts, texts, golden_layers)},
    **{name: partial(edit_file, name) for name in EDIT_FILES},
}


def _written(data: bytes) -> Path:
    path = (ROOT / "file").with_suffix(SUFFIXES[data[0] % len(SUFFIXES)] if data else SUFFIXES[0])
    path.write_bytes(data[1:])
    return path


def _must_name(path: Path, read: Callable[[], object]) -> None:
    try:
        read()
    except ValueError as error:
        if str(path) not in str(error):
            raise AssertionError(f"An error that does not name {path}: {error}") from error


def corpus(target: str, folder: Path) -> None:
    """Write the files to start from."""
    records = list(SAMPLES.values())
    table = io.StringIO()
    rows = csv.DictWriter(table, ["prompt", "subject", "target"])
    rows.writeheader()
    rows.writerow({"prompt": "The Louvre is in", "subject": "The Louvre", "target": "Rome"})
    lines = "\n".join(map(json.dumps, records))
    files = [json.dumps(records), lines, table.getvalue(), table.getvalue().replace(",", "\t"), "a text\nanother\n"]
    contents = [bytes([number]) + text.encode() for number, text in enumerate(files)]
    contents += [b"\0" + json.dumps(record).encode() for record in records]
    if target == "golden_layers":
        atlas = json.loads(ATLAS.read_text(encoding="utf-8"))
        contents = [json.dumps({**atlas, "golden_layers": atlas["golden_layers"][:2]}).encode()]
    if target in EDIT_FILES:
        write_edit_folder(folder.with_name("right"), edits_with_state(), "the card")
        contents = [(folder.with_name("right") / target).read_bytes()]
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / str(number)).write_bytes(content)


def main() -> None:
    """Run one target; it ends at the first file that is neither read nor refused, and writes it."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("target", choices=TARGETS)
    options.add_argument("--runs", type=int, default=100_000)
    options.add_argument("--seed", type=int, default=1)
    arguments = options.parse_args()
    corpus(arguments.target, ROOT / "corpus")
    limits = ["-rss_limit_mb=4096", "-timeout=10", "-max_len=8192"]
    flags = [f"-runs={arguments.runs}", f"-seed={arguments.seed}", *limits]
    atheris.Setup([sys.argv[0], *flags, str(ROOT / "corpus")], TARGETS[arguments.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
