# SPDX-License-Identifier: Apache-2.0
"""Results of ``python -m bench.run``: their schema, and tables of them as plain text cells.

One schema for all ops: ``{"env", "ceilings": {"copy_gbps", "matmul_tflops"}, "command", "rows"}``. A row has the keys
of ``ROW_KEYS``, null where one does not apply; ``limit_share`` is floor time over measured time, a ratio ``x_...`` is
the other's time over ours, so above 1 we are faster.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from obs_kernels.report.values import MISSING, number

ROW_KEYS: dict[str, tuple[type, ...]] = {
    "op": (str,),
    "shape": (dict,),
    "pattern": (str, type(None)),
    "dtype": (str, type(None)),
    "path": (str,),
    "config": (dict,),
    "us": (int, float),
    "p20": (int, float, type(None)),
    "p80": (int, float, type(None)),
    "gbps": (int, float, type(None)),
    "tflops": (int, float, type(None)),
    "limit_share": (int, float, type(None)),
    "x_dense": (int, float, type(None)),
    "x_peer": (dict,),
    "ok": (bool,),
}
"""Every row has them."""
OPTIONAL_ROW_KEYS = {"name": (str,), "parts": (dict,), "detail": (dict,)}
PATHS = ("kernel", "call", "model")
ENV_KEYS = (
    "label",
    "device",
    "compute_capability",
    "driver",
    "cuda",
    "torch",
    "triton",
    "python",
    "commit",
    "dirty",
    "date",
    "clocks",
)
"""The header of every result, null for what the machine has not."""
SLOWER = "slower"


def is_bench_result(value: Any) -> bool:
    """Whether a JSON value claims to be a result of this schema; other result files have no rows and ceilings."""
    return isinstance(value, dict) and "rows" in value and "ceilings" in value


def schema_problems(doc: Any) -> list[str]:
    """What is missing or of a wrong type in a result; empty if it is one."""
    if not isinstance(doc, dict):
        return ["it is no JSON object"]
    wanted = {"env": dict, "ceilings": dict, "command": str, "rows": list}
    problems = [
        f"{key} is missing or no {kind.__name__}" for key, kind in wanted.items() if not isinstance(doc.get(key), kind)
    ]
    if problems:
        return problems
    problems += [f"env has no {key}" for key in ENV_KEYS if key not in doc["env"]]
    if doc["env"].get("label") not in ("CPU", "GPU"):
        problems.append(f"env.label must be CPU or GPU, got {doc['env'].get('label')!r}")
    for key in ("copy_gbps", "matmul_tflops"):
        if not _positive(doc["ceilings"].get(key)):
            problems.append(f"ceilings.{key} must be a positive number, got {doc['ceilings'].get(key)!r}")
    for index, row in enumerate(doc["rows"]):
        problems += [f"rows[{index}]: {problem}" for problem in _row_problems(row)]
    for index, entry in enumerate(doc.get("refused", [])):
        if not isinstance(entry, dict) or set(entry) != {"op", "shape", "variant", "why"}:
            problems.append(f"refused[{index}] must have op, shape, variant and why")
    return problems


def _row_problems(row: Any) -> list[str]:
    if not isinstance(row, dict):
        return ["it is no JSON object"]
    problems = [f"{key} is missing" for key in ROW_KEYS if key not in row]
    for key, value in row.items():
        kinds = ROW_KEYS.get(key) or OPTIONAL_ROW_KEYS.get(key)
        if kinds is None:
            problems.append(f"{key} is no key of a row")
        elif not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            problems.append(f"{key} has the wrong type {type(value).__name__}")
    if problems:
        return problems
    if row["path"] not in PATHS:
        problems.append(f"path must be one of {', '.join(PATHS)}, got {row['path']!r}")
    if not row["ok"]:
        problems.append("ok must be true: a red check makes no row")
    problems += [
        f"{key} must be a positive number, got {row[key]!r}"
        for key in ("us", "p20", "p80", "gbps", "tflops", "limit_share", "x_dense")
        if row[key] is not None and not _positive(row[key])
    ]
    if not problems and row["path"] != "model" and not (_at(row, "p20") <= row["us"] <= _at(row, "p80")):
        problems.append("p20, us and p80 must be given, in that order")
    for name in ("x_peer", "parts"):
        problems += [f"{name}[{key!r}] must be positive" for key, x in row.get(name, {}).items() if not _positive(x)]
    sizes = row["shape"].values()
    if not row["shape"] or not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
        problems.append("shape must hold whole numbers by letter")
    if "backend" not in row["config"] and "peer" not in row["config"] and row["path"] != "model":
        problems.append("config must name a backend or a peer")
    return problems


def _at(row: Mapping[str, Any], key: str) -> float:
    return float(row[key]) if row[key] is not None else math.nan


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def bench_title(doc: Mapping[str, Any]) -> str:
    """The ops of a result and the device, with "CPU" said where it is one."""
    ops = ", ".join(dict.fromkeys(str(row["op"]) for row in doc["rows"])) or "no rows"
    env = doc["env"]
    return f"{ops} on {env['device']}" if env["label"] == "GPU" else f"{ops} on the CPU ({env['device']})"


def bench_facts(doc: Mapping[str, Any]) -> list[str]:
    """The header in a few lines: ceilings first, then versions, command, and what has no row."""
    env, ceilings = doc["env"], doc["ceilings"]
    kind = "" if env["label"] == "GPU" else f"CPU, threads: {env.get('threads', MISSING)}; "
    changed = " with changes" if env["dirty"] else ""
    versions = [f"{key} {env[key]}" for key in ("driver", "cuda", "torch", "triton", "python") if env[key] is not None]
    lines = [
        f"Ceilings: copy {number(ceilings['copy_gbps'], ',.1f')} GB/s (read + written), "
        f"dense product {number(ceilings['matmul_tflops'], ',.2f')} TFLOP/s.",
        f"{kind}{', '.join(versions)}, commit {str(env['commit'])[:12] if env['commit'] else 'not known'}{changed}, "
        f"{env['date']}.",
    ]
    if env["clocks"]:
        lines.append("Clocks as read: " + ", ".join(f"{key} {value}" for key, value in env["clocks"].items()) + ".")
    lines.append(f"Command: {doc['command']}")
    if any((row.get("detail") or {}).get("real_shape") for row in doc["rows"]):
        lines.append("Sizes are cut down for a CPU: no figure here says anything about a GPU.")
    for op, reasons in (env.get("unavailable") or {}).items():
        lines += [f"{op}: no {backend} rows: {reason}." for backend, reason in reasons.items()]
    for key, what in (("refused", "RED, no row"), ("skipped", "not measured")):
        for entry in doc.get(key) or ():
            lines.append(f"{what}: {entry['op']} {sizes_text(entry['shape'])}, {entry['variant']}: {entry['why']}.")
    return lines


def bench_table(doc: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of text; a column that has nothing in any row is left out."""
    rows = doc["rows"]
    peers = list(dict.fromkeys(name for row in rows for name in row["x_peer"]))
    ops = dict.fromkeys(row["op"] for row in rows)
    columns: list[tuple[str, list[str]]] = [
        ("op", [str(row["op"]) for row in rows] if len(ops) > 1 else []),
        ("shape", [_shape_cell(row) for row in rows]),
        ("pattern", [row["pattern"] or MISSING for row in rows]),
        ("dtype", [row["dtype"] or MISSING for row in rows]),
        ("path", [row["path"] for row in rows]),
        ("config", [config_text(row["config"]) for row in rows]),
        ("median µs", [number(row["us"], ",.1f") for row in rows]),
        ("p20", [number(row["p20"], ",.1f") for row in rows]),
        ("p80", [number(row["p80"], ",.1f") for row in rows]),
        ("GB/s", [number(row["gbps"], ",.1f") for row in rows]),
        ("TFLOP/s", [number(row["tflops"], ",.3g") for row in rows]),
        ("effective TFLOP/s", [number(_effective(row), ",.3g") for row in rows]),
        ("% of floor", [number(_percent(row["limit_share"]), ".1f") for row in rows]),
        ("× dense", [ratio_text(row["x_dense"]) for row in rows]),
        *((f"× {name}", [ratio_text(row["x_peer"].get(name)) for row in rows]) for name in peers),
        ("parts", [parts_text(row.get("parts") or {}) for row in rows]),
    ]
    kept = [(head, cells) for head, cells in columns if any(cell != MISSING for cell in cells)]
    return [head for head, _ in kept], [list(row) for row in zip(*(cells for _, cells in kept), strict=True)]


TEXT_COLUMNS = ("op", "shape", "pattern", "dtype", "path", "config", "parts")
"""Columns of ``bench_table`` that hold no numbers."""


def ratio_text(ratio: Any) -> str:
    """1.85, or "0.62 slower": a losing row says so."""
    text = number(ratio, ".2f")
    return f"{text} {SLOWER}" if text != MISSING and ratio < 1 else text


def sizes_text(shape: Mapping[str, Any]) -> str:
    """{"B": 100, "D": 8} -> "B=100 D=8"."""
    return " ".join(f"{letter}={size}" for letter, size in shape.items())


def _shape_cell(row: Mapping[str, Any]) -> str:
    """Name and sizes; a size that was cut down says of what."""
    real = (row.get("detail") or {}).get("real_shape") or row["shape"]
    sizes = (
        f"{letter}={size}" + (f" (of {real[letter]})" if real.get(letter, size) != size else "")
        for letter, size in row["shape"].items()
    )
    return " ".join([*filter(None, [row.get("name")]), *sizes])


def config_text(config: Mapping[str, Any]) -> str:
    """Backend (or peer), and what was chosen with it."""
    if "peer" in config:
        return f"peer: {config['peer']}"
    left_out = ("backend", "config", "blocks", "threads", "forced")  # the grid is in the JSON and the CSV
    chosen = [str(config[key]) for key in ("backend", "config") if config.get(key)]
    chosen[1:1] = [
        str(value) if key == "path" else f"{key}={value}" for key, value in config.items() if key not in left_out
    ]
    return " ".join(chosen) + (" (forced)" if config.get("forced") else "")


def parts_text(parts: Mapping[str, Any]) -> str:
    """{"forward": 1200.0} -> "forward 1.2 ms", the longest first."""
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {number(us / 1e3, ',.1f')} ms" for name, us in ordered) or MISSING


def csv_text(doc: Mapping[str, Any]) -> str:
    """The rows as CSV, with the intensity (flops a byte) of the roofline plot."""
    peers = list(dict.fromkeys(name for row in doc["rows"] for name in row["x_peer"]))
    letters = list(dict.fromkeys(letter for row in doc["rows"] for letter in row["shape"]))
    plain = ("dtype", "path", "us", "p20", "p80", "gbps", "tflops", "limit_share", "x_dense")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["device", "op", "name", *letters, "pattern", "config", *plain, "flops_per_byte"]
    writer.writerow([*head, *(f"x {name}" for name in peers)])
    for row in doc["rows"]:
        cells = [doc["env"]["device"], row["op"], row.get("name"), *(row["shape"].get(letter) for letter in letters)]
        cells += [row["pattern"], config_text(row["config"]), *(row[key] for key in plain), intensity(row)]
        writer.writerow(["" if cell is None else cell for cell in [*cells, *map(row["x_peer"].get, peers)]])
    return out.getvalue()


def intensity(row: Mapping[str, Any]) -> float | None:
    """Operations a byte of the floor, where a row has both."""
    return row["tflops"] * 1e3 / row["gbps"] if row["gbps"] and row["tflops"] else None


def roofline_rows(doc: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    """The rows that the roofline plot can show."""
    return [row for row in doc["rows"] if intensity(row) is not None]


def _effective(row: Mapping[str, Any]) -> float | None:
    """By the operations of the dense product that a sparse one stands for."""
    flops = (row.get("detail") or {}).get("dense_flops")
    return flops / row["us"] / 1e6 if isinstance(flops, (int, float)) else None


def _percent(share: Any) -> float | None:
    return 100 * share if isinstance(share, (int, float)) else None
