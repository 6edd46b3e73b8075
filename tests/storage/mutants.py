"""Edit folders made by a model of the format: any part of any file changed in ways that the format has words for.

The digests are then recomputed, as an author does who wants the folder believed, or left, as an accident leaves them.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from contents import change_json, resign

from goldenedit.storage.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDIT_CONFIG, EDIT_STATE, EDITS

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", "", 3, None)
_TEXTS = (
    "",
    " ",
    "\0",
    "a" * 100_000,
    "../x",
    "/etc/passwd",
    "{}",
    "é",
    "\ud83d",
    "nan",
    "1",
    "edit_1",
    "model",
    "#{}",
)
_NUMBERS = (0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, 5e-324, float("inf"), float("nan"))
_VALUES: tuple[Any, ...] = (*_TEXTS, *_NUMBERS, None, True, False, [], {}, [[]], [None], {"": None})

_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


def mutate(rng: random.Random, folder: Path) -> bool:
    """Change one to three parts of a folder's files, and return whether the digests were recomputed."""
    files = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDITS, EDIT_CONFIG, EDIT_STATE)
    names = [name for name in files if (folder / name).exists()]
    is_signed = rng.random() < 0.8
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(names)
        with suppress(*_UNREADABLE):  # after an earlier change
            if name.endswith(".json"):
                _mutate_json(rng, folder / name, is_signed)
            else:
                _mutate_tensors(rng, folder / name)
    if is_signed:
        with suppress(*_UNREADABLE):  # it lists no digests any more
            resign(folder)
    return is_signed


def _mutate_json(rng: random.Random, path: Path, is_signed: bool) -> None:
    def change(content: Any) -> None:
        places = list(_places(content))
        if places:
            container, key = rng.choice(places)
            rng.choice(_CHANGES)(rng, container, key, places)

    if is_signed:
        change_json(path, change)
    else:
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container in a JSON value with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _replace(rng: random.Random, container: Any, key: Any, places: Any) -> None:
    container[key] = copy.deepcopy(rng.choice(_VALUES))


def _delete(rng: random.Random, container: Any, key: Any, places: Any) -> None:
    del container[key]


def _copy_from_elsewhere(rng: random.Random, container: Any, key: Any, places: Any) -> None:
    other, name = rng.choice(places)
    container[key] = copy.deepcopy(other[name])


def _repeat(rng: random.Random, container: Any, key: Any, places: Any) -> None:
    if isinstance(container, list):
        container.insert(rng.randrange(len(container) + 1), copy.deepcopy(container[key]))
    else:
        container[rng.choice([f"{key}_", str(key).upper(), *_TEXTS])] = copy.deepcopy(container[key])


def _shuffle(rng: random.Random, container: Any, key: Any, places: Any) -> None:
    if isinstance(container, list):
        rng.shuffle(container)
    else:
        items = list(container.items())
        rng.shuffle(items)
        container.clear()
        container.update(items)


def _nudge(rng: random.Random, container: Any, key: Any, places: Any) -> None:
    value = container[key]
    if isinstance(value, bool):
        container[key] = not value
    elif isinstance(value, int | float):
        container[key] = rng.choice([value + 1, value - 1, -value, value * 10**6, float(value), str(value)])
    elif isinstance(value, str):
        container[key] = rng.choice(
            [value + "x", value[:-1], value.upper(), value[::-1], f" {value}", value + "\n", [value]]
        )
    else:
        container[key] = [value]


_CHANGES: tuple[Callable[[random.Random, Any, Any, Any], None], ...] = (
    *(_replace, _replace, _delete, _copy_from_elsewhere, _repeat, _shuffle, _nudge, _nudge),
)


def _mutate_tensors(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    kind = rng.choice(("value", "value", "header", "header", "length", "bytes"))
    if kind == "value" and len(body) >= 4:
        place = 4 * rng.randrange(len(body) // 4)
        values = (float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, 0.0, 1.0, rng.gauss(0, 1))
        body[place : place + 4] = struct.pack("<f", rng.choice(values))
    elif kind == "header":
        _mutate_header(rng, header)
    text = json.dumps(header).encode()
    length = len(text)
    if kind == "length":
        length = rng.choice([0, 1, length - 1, length + 1, length + len(body), 2**31, 2**63, 2**64 - 1])
    elif kind == "bytes":
        if rng.random() < 0.5:
            body = body[: rng.randrange(len(body) + 1)]
        else:
            body += rng.randbytes(rng.choice([1, 4, 4096]))
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(body))


def _mutate_header(rng: random.Random, header: dict[str, Any]) -> None:
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    kind = rng.choice(("dtype", "shape", "offsets", "name", "drop", "swap", "metadata", "any"))
    if kind == "dtype":
        entry["dtype"] = rng.choice(_DTYPES)
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice([shape[::-1], [*shape, 1], shape[:1], [], [0, *shape], [-1], [2**62, 4], [10**400]])
    elif kind == "offsets":
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            [[0, end], [start, end + 4], [end, start], [start], [-4, end], [2**63, 2**64]]
        )
    elif kind == "name":
        header[rng.choice([f"{name}x", name.replace("lora_A", "lora_B"), name.upper(), *_TEXTS[:6]])] = header.pop(name)
    elif kind == "drop":
        del header[name]
    elif kind == "swap":
        other = rng.choice([name for name in header if name != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    elif kind == "metadata":
        header["__metadata__"] = rng.choice([{}, {"format": "tf"}, {"a": "b" * 10**6}, {"format": 3}, None, [], "pt"])
    else:
        container, key = rng.choice(list(_places(header)))
        container[key] = copy.deepcopy(rng.choice(_VALUES))
