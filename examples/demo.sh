#!/bin/sh
# The demo: MobileNetV2 with ImageNet weights, pruned to 0.7x of its latency on this machine. Run it by `make demo`.
set -eu
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
work=${DEMO:-.demo}

"$bin/python" examples/demo_data.py "$work"
exec "$bin/edgeprune" fit torchvision:mobilenet_v2 --weights "$work/mobilenet_v2-b0353104.pth" --shape 1x3x224x224 \
    --device "${DEVICE:-host-openvino}" --budget "${BUDGET:-0.7x}" --data "$work/pictures/labels.csv" --out "$work/build/"
