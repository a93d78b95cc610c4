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
CHOICE = "tests/test_choice_on_cpu.py"
SWEEP = "tests/test_sweep_on_cpu.py"
UPDATE = "tests/test_update_on_cpu.py"
QUADRATIC = "tests/test_quadratic_on_cpu.py"
INVERSE = "tests/test_inverse_on_cpu.py"
ACCUMULATE = "tests/test_accumulate_on_cpu.py"
PREPACK = "tests/test_prepack_on_cpu.py"


@dataclass(frozen=True)
class Fault:
    """One change of one file of csrc/: ``old`` stands in it exactly once."""

    what: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = (
    # gains of pairs
    Fault(
        "sign of the cross term", "common/pair_gain.cuh", "__fsub_rn(first, cross)", "__fadd_rn(first, cross)", SEARCH
    ),
    Fault("determinant without coupling", "common/pair_gain.cuh", "__fmul_rn(fab, fab)", "0.0f", SEARCH),
    Fault("dead entries not told apart", "search/gains.cuh", "return dead ? -", "return false ? -", SEARCH),
    Fault("closed columns left open", "search/gains.cuh", "column_bits == nullptr", "column_bits != nullptr", SEARCH),
    Fault("higher set wins ties", "search/gains.cuh", "key > best.key", "key < best.key", SEARCH),
    Fault("later pairs win", "search/indexed.cuh", "!(pairs.gain[e] <= best)", "!(pairs.gain[e] < best)", SEARCH),
    Fault("weight that is not finite passes", "search/pairs.cuh", "if (weight_poison != 0.0f)", "if (false)", SEARCH),
    Fault("bad group keeps something", "search/pairs.cuh", "kept = 0u;", "", SEARCH),
    Fault("later pairs win, m to 32", "search/wide.cu", "if (!(gain <= best))", "if (!(gain < best))", SEARCH),
    Fault("higher code wins between lanes", "search/wide.cu", "other_code < code)", "other_code > code)", SEARCH),
    # sets of more than two
    Fault("sign of the elimination", "search/sets.cuh", "next.u[i] = fmaf(-part", "next.u[i] = fmaf(part", SEARCH),
    Fault(
        "first half counts nothing", "search/sets.cuh", "gain = grown(gain, value", "gain = grown(0.0f, value", SEARCH
    ),
    Fault("closed columns couple", "search/sets.cu", "if (open != row.live) {", "if (false) {", SEARCH),
    Fault("sign of the pruned side", "search/wide_sets.cu", "by_kept ? 1.0f : -1.0f", "by_kept ? 1.0f : 1.0f", SEARCH),
    Fault("tie rule of the pruned side", "search/wide_sets.cu", "by_kept ? 0u : 0xFFFFFFFFu", "0u", SEARCH),
    Fault(
        "sign of the growth", "search/wide_sets.cu", "fmaf(-ratio[kCount], value", "fmaf(ratio[kCount], value", SEARCH
    ),
    Fault(
        "kept weights of the wrong sign", "search/rows.cuh", "change = value - row.w", "change = -value - row.w", SEARCH
    ),
    # panels
    Fault(
        "rows of a panel taken off", "search/panels.cu", "total[turn] = __fadd_rn(", "total[turn] = __fsub_rn(", SEARCH
    ),
    Fault(
        "unused columns first",
        "search/panels.cu",
        "used ? __popc(bits & below)",
        "!used ? __popc(bits & below)",
        SEARCH,
    ),
    Fault(
        "a row left out of the saliency",
        "search/panels.cu",
        "(int64_t line = 0; line < p.v",
        "(int64_t line = 1; line < p.v",
        SEARCH,
    ),
    Fault(
        "largest of two, not three",
        "search/panels.cu",
        "fmaxf(fmaxf(all.at[line], second.at[line]), third.at[line])",
        "fmaxf(all.at[line], second.at[line])",
        SEARCH,
    ),
    Fault("next rows loaded twice", "search/panels.cu", "stride, row + kRows, thread)", "stride, row, thread)", SEARCH),
    # other choices
    Fault("dead entries of a given choice kept", "search/given.cu", "given) & row.live", "given)", CHOICE),
    Fault("one pruned wins ties", "search/pairwise.cu", "if (with_one < best)", "if (with_one <= best)", CHOICE),
    Fault("two pruned win ties", "search/pairwise.cu", "if (with_two < best)", "if (with_two <= best)", CHOICE),
    Fault("dead entries count as kept", "search/pairwise.cu", "m - min(__popc(live), n)", "m - n", CHOICE),
    Fault(
        "sign of a sweep",
        "search/greedy.cu",
        "fmaf(is_pivot ? sign : -across",
        "fmaf(is_pivot ? sign : across",
        CHOICE,
    ),
    Fault("sign of the residual", "search/greedy.cu", "fmaf(-share_of_row, s.b", "fmaf(share_of_row, s.b", CHOICE),
    # row curvature
    Fault("higher set wins ties", "sweep/sweep.cuh", "other_set < set)", "other_set > set)", SWEEP),
    Fault("errors not passed on", "sweep/sweep.cuh", "pushed[i] = fmaf(four.at[e]", "pushed[i] = fmaf(0.0f", SWEEP),
    Fault("scale of a row left out", "sweep/panels.cu", "if (p.row_scale != nullptr)", "if (false)", SWEEP),
    Fault(
        "sums of a panel taken off",
        "sweep/panel_sets.cu",
        "total = __fadd_rn(total, best",
        "total = __fsub_rn(total, best",
        SWEEP,
    ),
    Fault("dead members gain too", "sweep/panel_sets.cu", "dead ? -INFINITY", "false ? -INFINITY", SWEEP),
    Fault(
        "sums of the last rows alone",
        "sweep/panel_sets.cu",
        "float total = panel.total[set];",
        "float total = 0.0f;",
        SWEEP,
    ),
    Fault("tables of other rows", "sweep/panel_sets.cu", "    row -= tables.lines;", "    row = 0;", SWEEP),
    Fault("short rows keep a dead entry", "sweep/panel_sets.cu", "all ? left : bits & live", "bits & live", SWEEP),
    Fault(
        "unused columns first",
        "sweep/panels.cuh",
        "== static_cast<unsigned>(turn)",
        "!= static_cast<unsigned>(turn)",
        SWEEP,
    ),
    Fault(
        "sign of the shared elimination",
        "sweep/sets.cuh",
        "fmaf(-lower[i][k], rest[j][k]",
        "fmaf(lower[i][k], rest[j][k]",
        SWEEP,
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
    Fault("bad pivot passes", "update/joint.cuh", "!(pivot > 0.0f && pivot <= FLT_MAX), place", "false, place", UPDATE),
    Fault("sign of a single update", "update/quadratic.cu", "weight - change;", "weight + change;", QUADRATIC),
    Fault(
        "loss without damping",
        "update/quadratic.cu",
        "change * fmaf(damp, change, product)",
        "change * product",
        QUADRATIC,
    ),
    # inverse and accumulation
    Fault("sign, a thread a matrix", "fisher/inverse_solo.cuh", "a[i][j] = fmaf(-w[i]", "a[i][j] = fmaf(w[i]", INVERSE),
    Fault(
        "sign of four pivots",
        "fisher/inverse_step.cuh",
        "block.lower[i][j] = fmaf(-block",
        "block.lower[i][j] = fmaf(block",
        INVERSE,
    ),
    Fault(
        "scale left out", "fisher/accumulate_thread.cuh", "fmaf(scale, sum.at[e]", "fmaf(1.0f, sum.at[e]", ACCUMULATE
    ),
    Fault("scale left out", "fisher/accumulate_tiles.cuh", "fmaf(scale, row[f]", "fmaf(1.0f, row[f]", ACCUMULATE),
    # the order in which the sparse product reads a weight
    Fault(
        "second value in the first half", "matmul/prepack.cu", "pair |= values[c] << 16", "pair |= values[c]", PREPACK
    ),
    Fault("positions not ascending", "matmul/prepack.cu", "(low | high << 2)", "(high | low << 2)", PREPACK),
    Fault(
        "metadata of the other row",
        "matmul/prepack.cu",
        "pair.code << (16 * half",
        "pair.code << (16 * (1 - half)",
        PREPACK,
    ),
    Fault("values not swizzled", "matmul/prepack.cu", "q ^ (row / 2 % 4)", "q", PREPACK),
    Fault("columns of a panel left out", "matmul/prepack.cu", "args.v == 0 ? code", "true ? code", PREPACK),
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
        if count != 1:
            print(f"{fault.file}: {fault.old!r} stands there {count} times, not once", file=sys.stderr)
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
