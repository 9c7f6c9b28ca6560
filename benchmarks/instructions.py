"""Instructions a packet, counted: ``python -m benchmarks.instructions``; fails above a bound.

Counts do not depend on what else the machine does, so they tell what a change costs where times
cannot. Each case runs under callgrind twice, for two numbers of batches of 64; what the longer run
takes more, by packet, is what a packet takes. Only the core's way of a batch is counted, and the C
loop of ``reference.c`` beside it, built like the core.

The bounds are times the C loop. That of known connections is what the core took before it had
fragments, helpers, the sync protocol and policies, and a tenth more for all of these; their packets
take 343 instructions (2.87 times the C loop's). A first packet takes 1110 (4.37 times), and its
bound leaves some thirty more.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from svcdp import Dataplane, PacketBatch, TunnelSpec, Verdict

from .cases import service_spec
from .reference import STRIDE, Packets

SOURCE = Path(__file__).with_suffix(".c")
BATCH = 64
FLOWS = 1024
#: Batches of the shorter run, and of the longer.
ROUNDS = (20, 120)
#: Times the C loop: see above.
RATIO_MAX = {"hit": 3.16, "new": 4.5}
#: A packet into a tunnel, times one by NAT.
TUNNEL_MAX = 1.2


def run(case: str, rounds: int) -> None:
    """What callgrind looks at."""
    spec = service_spec(0)
    if case == "tunnel":
        tunnel = TunnelSpec("ipip", "192.0.2.1")
        wrapped = [replace(d, port=0, method="tunnel", tunnel=tunnel) for d in spec.destinations]
        spec = replace(spec, destinations=tuple(wrapped))
    dp = Dataplane(1 << 15, seed=1)
    dp.apply([spec])
    packets = Packets(BATCH)
    batch = PacketBatch(BATCH, STRIDE, headroom=64)

    def process() -> None:
        batch.clear()
        for i, length in enumerate(packets.lengths):
            batch.append(packets.memory[i * STRIDE : i * STRIDE + min(length, STRIDE - 64)])
        dp.process_batch(batch)
        if set(batch.verdicts()) != {Verdict.FORWARD}:
            sys.exit(f"{case}: not all packets were forwarded")

    if case != "new":
        for syn in (True, False):
            for first in range(0, FLOWS, BATCH):
                packets.of_flows(first, syn=syn)
                process()
    for i in range(rounds):
        if case == "new":
            packets.of_flows(i * BATCH, syn=True)
        else:
            packets.of_any(FLOWS)
        process()


def collected(function: str, *command: str) -> int:
    """Instructions of a function and of what it calls."""
    options = ["--tool=callgrind", "--callgrind-out-file=/dev/null", f"--toggle-collect={function}"]
    done = subprocess.run(
        ["valgrind", *options, *command], capture_output=True, text=True, check=False
    )
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or found is None:
        sys.exit(done.stdout + done.stderr)
    return int(found[1])


def per_packet(function: str, *command: str) -> float:
    """Instructions a packet of a command whose last argument is the number of batches."""
    with ThreadPoolExecutor(len(ROUNDS)) as pool:
        fewer, more = pool.map(lambda n: collected(function, *command, str(n)), ROUNDS)
    return (more - fewer) / (ROUNDS[1] - ROUNDS[0]) / BATCH


def counts() -> tuple[dict[str, float], dict[str, float]]:
    """Of svcdp and of the C loop, by case."""
    with tempfile.TemporaryDirectory() as directory:
        program = os.path.join(directory, "loop")
        compiler = shlex.split(os.environ.get("CC", "cc"))
        subprocess.run([*compiler, "-std=gnu11", "-O3", str(SOURCE), "-o", program], check=True)
        c = {case: per_packet("reference_run", program, case) for case in RATIO_MAX}
    core = [sys.executable, "-m", __spec__.name]
    ours = {
        case: per_packet("*process_contiguous*", *core, case) for case in (*RATIO_MAX, "tunnel")
    }
    return ours, c


def main() -> None:
    if len(sys.argv) == 3:
        run(sys.argv[1], int(sys.argv[2]))
        return
    ours, c = counts()
    wrong = []
    for case, most in RATIO_MAX.items():
        verdict = f"{case}: {ours[case]:.0f} instructions, {ours[case] / c[case]:.2f} x C"
        print(f"{verdict}, at most {most}")
        if ours[case] > most * c[case]:
            wrong.append(verdict)
    verdict = f"tunnel: {ours['tunnel']:.0f} instructions, {ours['tunnel'] / ours['hit']:.2f} x hit"
    print(f"{verdict}, at most {TUNNEL_MAX}")
    if ours["tunnel"] > TUNNEL_MAX * ours["hit"]:
        wrong.append(verdict)
    if wrong:
        sys.exit("\n".join(["missed:", *wrong]))


if __name__ == "__main__":
    main()
