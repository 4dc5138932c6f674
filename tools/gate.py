# SPDX-License-Identifier: Apache-2.0
"""Regression test of the CPU kernels: ratios to eager attention of three shapes, against those in gate.json.

    python -m tools.gate [--update]

Ratios, because seconds differ between machines and days; one thread. gate.json holds what was measured on a CPU (the
lower of this and of a whole run); on others the kernel may not be slower than eager attention. A ratio may be a tenth
below; a case that is gets two more tries, because other load can hit one variant. ``--update`` writes this CPU's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from spatial_pe._utils import environment
from spatial_pe.lab.bench import result
from spatial_pe.lab.bench.cases import SPEED
from spatial_pe.lab.bench.suites import Attention

FLOORS = Path(__file__).with_name("gate.json")
TOLERANCE = 0.9
TRIES = 3
CASES = {
    f"{name}, {dtype}, {direction}": Attention("gate", name, SPEED[name], dtype, direction, 1, ("eager", "ours"), 9)
    for name, dtype, direction in (
        ("196", "bf16", "forward"),
        ("196", "fp32", "forward"),
        ("729", "fp32", "forward"),
        ("729", "bf16", "backward"),
        ("windows", "bf16", "forward"),
        ("windows", "fp32", "backward"),
    )
}


def measure(case: Attention) -> float:
    ratio = result.speedup(case.run("cpu"), "eager")
    assert ratio is not None
    return ratio


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write what is measured as this CPU's ratios")
    update = parser.parse_args().update
    known = json.loads(FLOORS.read_text())
    cpu = environment.cpu_name()
    print(f"{cpu}: times as fast as eager attention, and as it was" + ("" if cpu in known else " (not measured: 1)"))
    slower, found = [], {}
    for name, case in CASES.items():
        before = known.get(cpu, {}).get(name, 1.0)
        best = 0.0
        for _ in range(TRIES):
            best = max(best, measure(case))
            if update or best >= TOLERANCE * before:
                break
        print(f"{name}: {best:.2f}, {before:.2f}", flush=True)
        found[name] = round(best, 2)
        if best < TOLERANCE * before:
            slower.append(name)
    if update:
        FLOORS.write_text(json.dumps(known | {cpu: found}, indent=1) + "\n")
        return 0
    if slower:
        print(f"slower than {TOLERANCE:.0%} of what it was: {'; '.join(slower)}", file=sys.stderr)
    return bool(slower)


if __name__ == "__main__":
    sys.exit(main())
