"""The page about the format names every field that a table holds, and the golden files hold every field once."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from edgeprune.device import Device
from edgeprune.device_state import cpu_facts
from edgeprune.fingerprint import fingerprint_of
from edgeprune.folders import shipped_tables
from edgeprune.kernel import Kernel
from edgeprune.table_lines import LINES, UnitEntry

pytestmark = pytest.mark.golden

PAGE = (shipped_tables() / "README.md").read_text()
GOLDEN = [
    json.loads(line)
    for path in (Path(__file__).parent / "golden").glob("*_v1.jsonl")
    for line in path.read_text().splitlines()
]


def fields(line: type[BaseModel]) -> set[str]:
    """As they are spelled in the file; `type` is the heading."""
    return {info.alias or name for name, info in line.model_fields.items()} - {"type"}


def section(kind: str) -> set[str]:
    """All words in code style between "`kind` — ..." and the next such heading."""
    lines = PAGE.split("## Lines\n")[1].split("## Reading\n")[0]
    parts = re.split(r"^`(\w+)` — ", lines, flags=re.MULTILINE)
    text = dict(zip(parts[1::2], parts[2::2], strict=True))[kind]
    return set(re.findall(r"`(\w+)`", text))


@pytest.mark.parametrize("kind", LINES)
def test_every_field_of_a_line_stands_on_the_page(kind: str) -> None:
    assert fields(LINES[kind]) - section(kind) == set()


def test_so_do_the_fields_of_kernels_units_and_facts() -> None:
    assert {field.name for field in dataclasses.fields(Kernel)} - section("row") == set()
    assert fields(UnitEntry) - section("network") == set()
    hello = {"modelled": False, "version": "1", "cpu": cpu_facts(), "accelerator": {"gpu": "g"}}
    hello["board"] = {"board": "b", "soc": "s", "l4t": "R", "power_mode": "15W"}
    facts = fingerprint_of(Device(name="d", backend="openvino", lock_clocks=True), "fp32", hello).facts
    assert {*facts, *facts["cpu"], *facts["board"]} - section("fingerprint") == set()


@pytest.mark.parametrize("kind", LINES)
def test_every_field_of_a_line_is_pinned_by_a_golden_file(kind: str) -> None:
    pinned = {field for line in GOLDEN if line["type"] == kind for field in line}
    assert pinned - {"type"} == fields(LINES[kind])


def test_a_field_that_nobody_wrote_about_would_be_missed() -> None:
    """The negative control of the tests above."""
    assert "humidity" not in section("row")
    assert section("failure") == {"kernel", "fingerprint", "session", "reason"}
