"""The least version of a runtime that reads a file, by what the file says of its own format.

Tables: https://docs.openvino.ai/2024/documentation/openvino-ir-format/operation-sets/available-opsets.html and
https://onnxruntime.ai/docs/reference/compatibility.html (up to ONNX Runtime 1.20).
"""

from __future__ import annotations

import re
from pathlib import Path

OPENVINO = {
    8: "2022.1",
    9: "2022.2",
    10: "2022.3",
    11: "2023.0",
    12: "2023.1",
    13: "2023.2",
    14: "2024.0",
    15: "2024.5",
}
"""Operation set to the first release that has it. IR version 11 came with 2022.1, so older ones don't matter."""
ONNXRUNTIME = {"1.12": (17, 8), "1.14": (18, 8), "1.15": (19, 8), "1.16": (19, 9), "1.17": (20, 9), "1.18": (21, 10)}
"""Release to the newest operator set and the newest IR version of ONNX that it reads."""


def openvino_for(ir: str) -> str | None:
    """`ir` is the text of an .xml file."""
    newest = max((int(number) for number in re.findall(r'version="opset(\d+)"', ir)), default=0)
    return OPENVINO.get(max(newest, min(OPENVINO)))


def onnxruntime_for(path: Path) -> str | None:
    """By the header of an ONNX file, its weights unread where they are in files beside it."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    for release, (operators, ir) in ONNXRUNTIME.items():
        if opset <= operators and model.ir_version <= ir:
            return release
    return None
