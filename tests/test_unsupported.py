"""An operator that a format can't take is named, with its place in the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from edgeprune.device import load_device
from edgeprune.errors import EdgepruneError
from edgeprune.exporting import export
from edgeprune.unsupported import unsupported
from tests.small_models import pruned


class Values(nn.Module):
    """Singular values, which ONNX has no operator for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = torch.linalg.svd(x.flatten(2), full_matrices=False)[1]
        return values


def nested() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ModuleList([Values()])[0])


@pytest.mark.integration
def test_operator_place_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EdgepruneError) as caught:
        export(pruned(nested(), (1, 3, 8, 8)), load_device("host-onnxruntime"), tmp_path / "net")
    text = str(caught.value)
    assert text.startswith(
        "ONNX has no counterpart of torch's operator 'aten._linalg_svd', which is called in 1 (Values)"
    )
    assert "replace it in the model" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.unit
def test_what_converters_say() -> None:
    program = torch.export.export(nested().eval(), (torch.randn(1, 3, 8, 8),))
    for said in (
        "Lowering not found: aten._linalg_svd.default",
        "target=torch.ops.aten.linalg_svd.default",
        "aten::linalg_svd",
    ):
        assert "in 1 (Values)" in str(unsupported(program, said, "X"))
    assert "does not name" in str(unsupported(program, "no aten.erfinv", "X"))
    assert unsupported(program, "out of memory", "X") is None
