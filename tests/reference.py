"""The reference that exactness is judged by: the dense ATen program in float64 with zeros for what was pruned."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from edgeprune.graph import ModelGraph, tracing
from edgeprune.plan_json import Plan
from edgeprune.surgery import positions_of, read_plan

CONTRACTIONS = {"conv1d", "conv2d", "conv3d", "linear", "matmul", "bmm"}


def redraw(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Re-draw every parameter and buffer so that outputs are of order one and depend on the input."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, mean: float, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * std + mean)

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.5)
            elif name.endswith("running_mean"):
                normal(tensor, 0.0, 0.3)
            elif tensor.dim() > 1:
                fan_in = tensor[0].numel()
                normal(tensor, 0.0, (2.0 / fan_in) ** 0.5)
            elif name.endswith("bias"):
                normal(tensor, 0.1, 0.3)
            else:
                normal(tensor, 1.0, 0.2)
    return model.eval()


def random_plan(graph: ModelGraph, seed: int, *, share: float = 1 / 3, drop: float = 0.3) -> Plan:
    """Prune every group by about `share` at random places and drop some blocks."""
    rng = np.random.default_rng(seed)
    kept = {}
    for group in graph.groups:
        number = min(group.num_channels - 1, round(group.num_channels * (1 - share * rng.uniform(0.5, 1.5))))
        channels = np.sort(rng.choice(group.num_channels, size=max(number, group.least_channels), replace=False))
        kept[group.id] = positions_of(graph, group.id, channels)
    dropped = tuple(block.id for block in graph.blocks if rng.random() < drop)
    return Plan(structure_hash=graph.structure_hash, kept=kept, dropped=dropped)


def shift_one(plan: Plan, graph: ModelGraph) -> Plan:
    """The same plan with one kept channel replaced by a removed one: the negative control.

    Taken from the group with the most members that no dropped block hides, so that the change reaches the output.
    """
    hidden = {group for block in graph.blocks if block.id in plan.dropped for group in block.inside}
    shown = [g for g in graph.groups if g.id not in hidden and len(plan.kept[g.id]) < (g.first.channels >= 0).sum()]
    group_id = max(shown, key=lambda g: (len(g.members), g.id)).id
    kept = np.unique(graph.group(group_id).first.channels[list(plan.kept[group_id])])
    gone = np.setdiff1d(np.arange(graph.group(group_id).num_channels), kept)
    moved = np.sort(np.append(kept[kept != kept[0]], gone[0]))
    return Plan(
        structure_hash=plan.structure_hash,
        kept={**plan.kept, group_id: positions_of(graph, group_id, moved)},
        dropped=plan.dropped,
    )


class Masked(torch.fx.Interpreter):
    """Run the dense program, multiplying the inputs of contractions by masks and zeroing dropped branches."""

    def __init__(self, graph: ModelGraph, plan: Plan) -> None:
        super().__init__(graph.program.graph_module, garbage_collect_values=False)
        kept = read_plan(plan, graph).kept
        keep = [channel in set(kept[group].tolist()) for group, channel in graph.channel_names]
        self.keep = np.array([*keep, True])  # the last entry answers -1: an index of no group stays
        self.graph_ = graph
        self.zero = {n for block in graph.blocks if block.id in plan.dropped for n in block.nodes}

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        fetched, kwargs = self.fetch_args_kwargs_from_env(n)
        args: list[Any] = list(fetched)
        name = tracing.operator_name(n)
        if name in CONTRACTIONS:
            for position in (0, 1) if name in ("matmul", "bmm") else (0,):
                args[position] = self.masked(n.args[position], args[position])
        if name == "add" and n.name not in self.zero:
            for position, source in enumerate(n.args):
                if isinstance(source, torch.fx.Node) and source.name in self.zero:
                    args[position] = torch.zeros_like(args[position])
        if tracing.writes_in_place(n):
            args[0] = args[0].clone()
        return n.target(*args, **kwargs)  # type: ignore[operator]

    def masked(self, source: Any, value: torch.Tensor) -> torch.Tensor:
        for dim, channels in enumerate(self.graph_.channels[source.name]):
            if (channels >= 0).any():
                mask = torch.from_numpy(self.keep[channels]).to(value.dtype)
                value = value * mask.reshape([-1 if i == dim else 1 for i in range(value.dim())])
        return value


def masked_output(graph: ModelGraph, plan: Plan, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
    """Output of the dense program in float64 under the plan's masks; `model` holds the (float64) weights."""
    constants = {n: t.double() if t.is_floating_point() else t for n, t in graph.program.constants.items()}
    state = {**constants, **dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    names = tracing.parameter_names(graph.program)
    values: list[torch.Tensor] = []
    rest = list(inputs)
    for node in graph.program.graph.nodes:
        if node.op == "placeholder":
            values.append(state[names[node.name]] if node.name in names else rest.pop(0))
    with torch.no_grad():
        return Masked(graph, plan).run(*values)[0]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())
