"""Analysis of a transformer of seven billion parameters on meta tensors: no weight exists.

    python benchmarks/large_transformer.py

A Llama-shaped model as transformers' default configuration has it (32 layers, 4096 wide, 32 heads, vocabulary 32,000),
64 tokens. Prints seconds and the peak of resident memory; needs transformers.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from edgeprune.graph import analyse, tracing


class Logits(torch.nn.Module):
    """The tensor that the model's answer is about."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [N, T] to [N, T, vocabulary]."""
        logits: torch.Tensor = self.model(tokens).logits
        return logits


def main() -> None:
    with torch.device("meta"):
        model = Logits(LlamaForCausalLM(LlamaConfig(use_cache=False))).eval()
    tokens = (torch.zeros(1, 64, dtype=torch.long, device="meta"),)
    started = time.perf_counter()
    program = tracing.trace_program(model, tokens)
    traced = time.perf_counter()
    graph = analyse(program)
    analysed = time.perf_counter()
    count = sum(p.numel() for p in model.parameters())
    widths = sorted({group.num_channels for group in graph.groups}, reverse=True)
    print(f"{count / 1e9:.2f} billion parameters, {len(program.graph.nodes)} nodes")
    print(f"{len(graph.groups)} groups of {sorted(set(widths), reverse=True)} channels")
    print(f"{len(graph.blocks)} blocks, {graph.prunable_macs_share:.1%} of MACs, {len(graph.refused)} refused")
    print(f"trace {traced - started:.1f} s, analysis {analysed - traced:.1f} s")
    print(f"peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
