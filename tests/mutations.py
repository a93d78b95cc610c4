# SPDX-License-Identifier: Apache-2.0
"""Faults seeded into the kernels one by one: does the suite see each of them?

    python tests/mutations.py [--only TEXT] [--list]

Signs, tie rules, masks, barriers: each fault is put into a copy of the repository, and the tests that run that kernel
on the CPU must fail there. Prints a line a fault, and exits 1 if one survives. Takes minutes: a build under sanitizers
for each.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEARCH = "tests/test_search_on_cpu.py"
UPDATE = "tests/test_update_on_cpu.py"
QUADRATIC = "tests/test_quadratic_on_cpu.py"
INVERSE = "tests/test_inverse_on_cpu.py"
ACCUMULATE = "tests/test_accumulate_on_cpu.py"


@dataclass(frozen=True)
class Fault:
    """One change of one file: ``old`` stands in it exactly ``times`` times."""

    what: str
    file: str
    old: str
    new: str
    tests: str
    times: int = 1


FAULTS = (
    # search: the gains of pairs
    Fault("sign of the cross term", "search/gains.cuh", "__fsub_rn(first, cross)", "__fadd_rn(first, cross)", SEARCH),
    Fault("determinant without the coupling", "search/gains.cuh", "__fmul_rn(fab, fab)", "0.0f", SEARCH),
    Fault("dead entries not told apart", "search/gains.cuh", "return dead ? -", "return false ? -", SEARCH),
    Fault("closed columns left open", "search/gains.cuh", "column_bits == nullptr", "column_bits != nullptr", SEARCH),
    Fault(
        "later pairs win ties, m to 16",
        "search/indexed.cuh",
        "!(pairs.gain[e] <= best)",
        "!(pairs.gain[e] < best)",
        SEARCH,
    ),
    Fault("weight that is not finite passes", "search/pairs.cuh", "if (weight_poison != 0.0f)", "if (false)", SEARCH),
    Fault("bad group keeps something", "search/pairs.cuh", "kept = 0u;", "", SEARCH),
    Fault("later pairs win ties, m to 32", "search/wide.cu", "if (!(gain <= best))", "if (!(gain < best))", SEARCH),
    Fault("higher code wins between lanes", "search/wide.cu", "other_code < code)", "other_code > code)", SEARCH),
    # search: sets of more than two
    Fault("sign of the elimination", "search/sets.cuh", "next.u[i] = fmaf(-part", "next.u[i] = fmaf(part", SEARCH),
    Fault("later sets win ties", "search/sets.cuh", "key > best.key", "key < best.key", SEARCH),
    Fault(
        "gain without the first half",
        "search/sets.cuh",
        "gain = grown(gain, value, pivot, inverse[k]);",
        "gain = grown(0.0f, value, pivot, inverse[k]);",
        SEARCH,
    ),
    Fault(
        "kept weights of the wrong sign",
        "search/rows.cuh",
        "const float change = value - row.w;",
        "const float change = -value - row.w;",
        SEARCH,
    ),
    # search: panels
    Fault(
        "rows of a panel summed wrong",
        "search/panels.cu",
        "total[turn] = __fadd_rn(total[turn], gain);",
        "total[turn] = __fsub_rn(total[turn], gain);",
        SEARCH,
    ),
    Fault(
        "higher column set wins ties",
        "search/panels.cu",
        "other_set < sets[thread]",
        "other_set > sets[thread]",
        SEARCH,
    ),
    Fault(
        "columns without a live entry first",
        "search/panels.cu",
        "used ? __popc(bits & below)",
        "!used ? __popc(bits & below)",
        SEARCH,
    ),
    Fault(
        "saliency of the last row left out",
        "search/panels.cu",
        "for (int64_t line = 0; line < p.v; ++line) sum",
        "for (int64_t line = 1; line < p.v; ++line) sum",
        SEARCH,
    ),
    # update
    Fault(
        "sign of the elimination",
        "update/eliminate.cuh",
        "row[column - 1] = fmaf(-factor",
        "row[column - 1] = fmaf(factor",
        UPDATE,
    ),
    Fault("damping left out", "update/joint.cuh", "rank] += damp;", "rank] += 0.0f;", UPDATE),
    Fault("pruned weights stay", "update/joint.cuh", "own >= 0 ? after : 0.0f", "after", UPDATE),
    Fault(
        "bad pivot passes",
        "update/joint.cuh",
        "!(pivot > 0.0f && pivot <= FLT_MAX), place.group",
        "false, place.group",
        UPDATE,
    ),
    Fault(
        "single updates added, not taken off", "update/quadratic.cu", "weight - change;", "weight + change;", QUADRATIC
    ),
    Fault(
        "loss without the damping",
        "update/quadratic.cu",
        "change * fmaf(damp, change, product)",
        "change * product",
        QUADRATIC,
    ),
    # inverse and accumulation
    Fault(
        "sign of the solo elimination",
        "fisher/inverse_solo.cuh",
        "a[i][j] = fmaf(-w[i]",
        "a[i][j] = fmaf(w[i]",
        INVERSE,
    ),
    Fault(
        "sign of the step of four pivots",
        "fisher/inverse_step.cuh",
        "block.lower[i][j] = fmaf(-block",
        "block.lower[i][j] = fmaf(block",
        INVERSE,
    ),
    Fault(
        "scale left out, a thread a block",
        "fisher/accumulate_thread.cuh",
        "fmaf(scale, sum.at[e]",
        "fmaf(1.0f, sum.at[e]",
        ACCUMULATE,
    ),
    Fault(
        "scale left out, tiles", "fisher/accumulate_tiles.cuh", "fmaf(scale, row[f]", "fmaf(1.0f, row[f]", ACCUMULATE
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose file or text holds this")
    parser.add_argument("--list", action="store_true", help="check that every fault can be seeded, run nothing")
    args = parser.parse_args(argv)
    chosen = [fault for fault in FAULTS if args.only in f"{fault.file} {fault.what}"]
    for fault in chosen:
        count = (ROOT / "csrc" / fault.file).read_text().count(fault.old)
        if count != fault.times:
            print(f"{fault.file}: {fault.old!r} stands there {count} times, not {fault.times}", file=sys.stderr)
            return 1
    if args.list:
        print("\n".join(f"{fault.file}: {fault.what}" for fault in chosen))
        return 0
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        skipped = shutil.ignore_patterns(".git", ".venv*", "build", ".*cache", "bench", "*.safetensors")
        shutil.copytree(ROOT, copy, ignore=skipped)
        for fault in chosen:
            path = copy / "csrc" / fault.file
            text = path.read_text()
            path.write_text(text.replace(fault.old, fault.new))
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", fault.tests]
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
            path.write_text(text)
            found = done.returncode == 1
            survivors += not found
            last = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
            print(f"{'found' if found else 'SURVIVED'}: {fault.file}: {fault.what} ({last})", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} faults found")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
