"""What W&B's client writes for an offline run, read back: a LevelDB log of protocol buffers."""

import json
import struct
import time
from typing import Any, NamedTuple


class Run(NamedTuple):
    """An offline run.

    Attributes:
        about: W&B's own record of it: project, group, name, …
        config: As logged; nested.
        summary: The last values; names of nested ones joined by "/".
        history: A dictionary for each step.
        metrics: What ``define_metric`` was called with.
        exit_code: 0 where it ended well.
    """

    about: Any
    config: dict
    summary: dict
    history: list
    metrics: list
    exit_code: int


def read_run(path):
    """Read ``run-ID.wandb`` of a run that was finished; W&B's own process writes the last records a moment later."""
    found = {}
    deadline = time.monotonic() + 30
    while "exit" not in found:
        assert time.monotonic() < deadline, f"{path} has no end: was the run finished?"
        found = {}
        for record in _records(path):
            kind = record.WhichOneof("record_type")
            found.setdefault(kind, []).append(getattr(record, kind))
        time.sleep(0 if "exit" in found else 0.1)
    (about,) = found["run"]
    config = _values(about.config.update)
    for record in found.get("config", []):
        config |= _values(record.update)
    summary = {}
    for record in found.get("summary", []):
        summary |= _values(record.update)
    history = [_values(record.item) for record in found.get("history", [])]
    return Run(about, config, summary, history, found.get("metric", []), found["exit"][0].exit_code)


def _values(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(path):
    """In blocks of 32 KiB; a record may span several."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, content = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:  # too short for a header: padding
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(content)
            content = b""
