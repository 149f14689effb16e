"""The tables that come with edgeprune: whole, measured, and enough for the networks that they are said to hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import edgeprune as ep
from edgeprune.cost import cost_model
from edgeprune.graph import trace
from edgeprune.table import read_lines, read_table

pytestmark = pytest.mark.golden
TABLES = sorted((Path(ep.__file__).parent / "latency_tables").glob("*/*.jsonl"))


@pytest.mark.parametrize("path", TABLES, ids=[path.stem for path in TABLES])
def test_every_line_is_read_and_every_number_was_measured(path: Path) -> None:
    file = read_lines([path])
    assert not file.warnings
    table = read_table(path, allow_other=True)
    assert table.origin == "measured" and path.stem == f"{table.facts['backend']}_{table.facts['precision']}"
    assert path.parent.name in {session.device for session in file.sessions.values()}


@pytest.mark.parametrize("path", TABLES, ids=[path.stem for path in TABLES])
def test_mobilenet_is_told_with_its_own_networks(path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    graph = trace(torchvision.models.mobilenet_v2(weights=None).eval(), (torch.randn(1, 3, 224, 224),))
    model = cost_model(graph, read_table(path, allow_other=True))
    dense, half = model.predict({}), model.predict({g.id: max(1, g.num_channels // 2) for g in graph.groups})
    assert model.networks >= 13 and 0.1 < half.us / dense.us < 0.8
    assert dense.error_us < 0.1 * dense.us
