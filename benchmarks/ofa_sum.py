"""A table in Once-for-All's format is imported and a network's entries add up to exactly the sum made by hand.

    python benchmarks/ofa_sum.py

The real Note10 tables are not shipped here. This writes files of their format (the keys of
https://github.com/mit-han-lab/once-for-all/blob/master/ofa/tutorial/latency_table.py) with made-up latencies for
resolution 160, every block of the search space, and predicts 100 random networks from them. By hand: the decimals as
they stand in the YAML text, added by `decimal`, without edgeprune. Exit code 1 where one sum differs by a bit.
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

from edgeprune.foreign_tables import additive_model, import_table
from edgeprune.table_listing import read_listing

RESOLUTION = 160
WIDTHS = (32, 48, 96, 136, 192)
STRIDES = (2, 2, 2, 1, 2)
KERNELS = (3, 5, 7)
EXPANSIONS = (3, 4, 6)
LAYERS = 4
NETWORKS = 100


def block(size: int, c_in: int, out: int, c_out: int, mid: int, kernel: int, stride: int, stage: int) -> str:
    """Key of one inverted residual; stages 1, 3, 4 have squeeze-and-excite, stages 2 to 4 hard-swish."""
    skip = int(stride == 1 and c_in == c_out)
    where = f"input:{size}x{size}x{c_in}-output:{out}x{out}x{c_out}"
    rest = f"idskip:{skip}-se:{int(stage in (1, 3, 4))}-hs:{int(stage >= 2)}"
    return f"expanded_conv-{where}-expand:{mid}-kernel:{kernel}-stride:{stride}-{rest}"


def places() -> Iterator[tuple[int, int, int, int, int, int]]:
    """Stage, stride, sizes and widths of the first and the other layers of every stage."""
    size, c_in = RESOLUTION // 2, 24
    for stage, (c_out, stride) in enumerate(zip(WIDTHS, STRIDES, strict=True)):
        out = (size - 1) // stride + 1
        yield stage, stride, size, c_in, out, c_out
        yield stage, 1, out, c_out, out, c_out
        size, c_in = out, c_out


def fixed() -> list[str]:
    """What every network has."""
    half, last = RESOLUTION // 2, RESOLUTION // 32
    return [
        f"Conv-input:{RESOLUTION}x{RESOLUTION}x3-output:{half}x{half}x24",
        f"expanded_conv-input:{half}x{half}x24-output:{half}x{half}x24-expand:24-kernel:3-stride:1-idskip:1-se:0-hs:0",
        f"Conv_1-input:{last}x{last}x192-output:{last}x{last}x1152",
        f"AvgPool2D-input:{last}x{last}x1152-output:1x1x1152",
        "Conv_2-input:1x1x1152-output:1x1x1536",
        "Logits-input:1x1x1536-output:1000",
    ]


def network(draw: random.Random) -> list[str]:
    """The entries of one network of the search space, in order, some more than once."""
    names = fixed()
    stages = list(places())
    for first, other in zip(stages[::2], stages[1::2], strict=True):
        for layer in range(draw.randint(2, LAYERS)):
            stage, stride, size, c_in, out, c_out = first if layer == 0 else other
            mid, kernel = c_in * draw.choice(EXPANSIONS), draw.choice(KERNELS)
            names.append(block(size, c_in, out, c_out, mid, kernel, stride, stage))
    return names


def write_table(path: Path, draw: random.Random) -> None:
    names = fixed() + [
        block(size, c_in, out, c_out, c_in * expansion, kernel, stride, stage)
        for stage, stride, size, c_in, out, c_out in places()
        for expansion in EXPANSIONS
        for kernel in KERNELS
    ]
    path.write_text("".join(f"{name}:\n  mean: {latency_ms(name, draw):.10f}\n" for name in dict.fromkeys(names)))


def latency_ms(name: str, draw: random.Random) -> float:
    """Made up, more for more channels and larger kernels."""
    wide = re.search(r"expand:(\d+)-kernel:(\d)", name)
    work = int(wide[1]) * (7 + int(wide[2])) / 7000 if wide else 0.1
    return work + draw.uniform(0.0, 0.01)


def main() -> int:
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        source, table = Path(folder) / "160_lookup_table.yaml", Path(folder) / "note10.jsonl"
        write_table(source, draw)
        done = import_table(source, table)
        model = additive_model(read_listing(str(table)))
        pairs = re.findall(r"^(\S+):\n  mean: (\S+)$", source.read_text(), re.MULTILINE)
    by_hand = {name: Decimal(text) for name, text in pairs}
    networks = [network(draw) for _ in range(NETWORKS)]
    wrong = [names for names in networks if model.predict(names) != float(sum(by_hand[name] for name in names))]
    print(f"{done.entries} entries imported in {done.unit}, {len(done.flags)} flagged")
    print(f"first network: {len(networks[0])} entries, {model.predict(networks[0])!r} {model.unit}")
    print(f"{NETWORKS} networks: {NETWORKS - len(wrong)} sums equal the sum by hand exactly, {len(wrong)} differ")
    return 1 if wrong or len(by_hand) != done.entries else 0


if __name__ == "__main__":
    sys.exit(main())
