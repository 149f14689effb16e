"""What TensorRT prints, quoted from public documents, each with where it stands."""

from __future__ import annotations

BANNERS = {
    # https://github.com/ultralytics/yolov5/issues/9076
    "&&&& RUNNING TensorRT.trtexec [TensorRT v8001] # trtexec --loadEngine=best.engine": (8, 0, 1),
    # https://github.com/OE4T/meta-tegra/pull/952
    "&&&& PASSED TensorRT.trtexec [TensorRT v8400] # trtexec --loadEngine=mnist16.trt --batch=16": (8, 4, 0),
    # https://github.com/NVIDIA/TensorRT/issues/3183
    "&&&& FAILED TensorRT.trtexec [TensorRT v8402] # tensorrt/bin/trtexec --useCudaGraph": (8, 4, 2),
    # https://github.com/NVIDIA/TensorRT/issues/4036
    "&&&& RUNNING TensorRT.trtexec [TensorRT v100200] # D:\\TensorRT-10.2.0.19\\bin\\trtexec.exe": (10, 2, 0),
}

# https://docs.nvidia.com/deeplearning/tensorrt/developer-guide/index.html#structured-sparsity
SPARSE_PICKED = """\
[03/23/2021-00:14:05] [I] [TRT] (Sparsity) Layers eligible for sparse math: conv1, conv2, conv3
[03/23/2021-00:14:05] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: conv2, conv3
"""

# https://github.com/pytorch/TensorRT/issues/1340
SPARSE_NONE = """\
[09/16/2022-09:55:37] [I] [TRT] (Sparsity) Layers eligible for sparse math:
[09/16/2022-09:55:37] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers:
[09/16/2022-09:55:38] [I] Engine built in 31.1935 sec.
"""

# https://github.com/VoltaML/voltaML-fast-stable-diffusion/issues/15
OUT_OF_MEMORY = (
    "[12/09/2022-20:25:24] [TRT] [E] 2: [virtualMemoryBuffer.cpp::resizePhysical::145] "
    "Error Code 2: OutOfMemory (no further information)\n"
)

# https://github.com/NVIDIA/TensorRT/issues/4020, from the file of --exportLayerInfo; inputs and outputs left out
LAYER_INFO = """\
{"Layers": [{
  "Name": "Reformatting CopyNode for Input Tensor 0 to resnetv15_conv0_fwd + resnetv15_batchnorm0_fwd",
  "LayerType": "Reformat",
  "ParameterType": "Reformat",
  "Origin": "REFORMAT",
  "TacticValue": "0x00000000000003e8",
  "StreamId": 0,
  "Metadata": ""
},{
  "Name": "resnetv15_conv0_fwd + resnetv15_batchnorm0_fwd + resnetv15_relu0_fwd + resnetv15_pool0_fwd",
  "LayerType": "CaskConvActPool"
}]}
"""
