"""The reference that exactness is judged by: the dense ATen program in float64 with zeros for what was pruned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edgeprune.graph import ModelGraph
from edgeprune.graph.program import operator_name, writes_in_place
from edgeprune.plan_json import Plan
from edgeprune.surgery import positions_of, read_plan

CONTRACTIONS = {
    **dict.fromkeys("conv1d conv2d conv3d linear conv_transpose1d conv_transpose2d conv_transpose3d".split(), (0,)),
    **dict.fromkeys("matmul mm bmm mv dot bilinear".split(), (0, 1)),
    **dict.fromkeys(("addmm", "baddbmm"), (1, 2)),
    "scaled_dot_product_attention": (0, 1, 2),
    "einsum": (1,),
    "deform_conv2d": (0,),
}
"""Operators that sum over channels, with the positions of what they sum."""
STATISTICS = {"mean", "layer_norm", "rms_norm", "group_norm"}


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


def shift_one(plan: Plan, graph: ModelGraph, which: int = 0) -> Plan:
    """The same plan with one kept channel replaced by a removed one: the negative control.

    Taken from the group with the most members that no dropped block hides, so that the change reaches the output; it
    may be one that a ReLU silences all the same: `which` takes others.
    """
    hidden = {group for block in graph.blocks if block.id in plan.dropped for group in block.inside}
    shown = [g for g in graph.groups if g.id not in hidden and len(plan.kept[g.id]) < (g.first.channels >= 0).sum()]
    ordered = sorted(shown, key=lambda g: (len(g.members), g.id), reverse=True)
    group_id = ordered[which % len(ordered)].id
    kept = np.unique(graph.group(group_id).first.channels[list(plan.kept[group_id])])
    gone = np.setdiff1d(np.arange(graph.group(group_id).num_channels), kept)
    moved = np.sort(np.append(kept[kept != kept[which % len(kept)]], gone[which % len(gone)]))
    return Plan(
        structure_hash=plan.structure_hash,
        kept={**plan.kept, group_id: positions_of(graph, group_id, moved)},
        dropped=plan.dropped,
    )


class Masked(torch.fx.Interpreter):
    """Run the dense program, multiplying the inputs of contractions by masks and zeroing dropped branches.

    A norm whose statistics run over pruned channels is evaluated over the kept ones.
    """

    def __init__(self, graph: ModelGraph, plan: Plan) -> None:
        super().__init__(graph.program.module, garbage_collect_values=True)
        kept = {group: set(channels.tolist()) for group, channels in read_plan(plan, graph).kept.items()}
        keep = [channel in kept[group] for group, channel in graph.channel_names]
        self.keep = np.array([*keep, True])  # the last entry answers -1: an index of no group stays
        self.channels = graph.channels
        self.zero = {n for block in graph.blocks if block.id in plan.dropped for n in block.nodes}

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        fetched, kwargs = self.fetch_args_kwargs_from_env(n)
        args: list[Any] = list(fetched)
        name = operator_name(n)
        for position in CONTRACTIONS.get(name, ()):
            source = n.args[position]
            if isinstance(source, torch.fx.Node):
                args[position] = self.masked(source, args[position])
            elif isinstance(source, (tuple, list)):
                sources: list[Any] = list(source)
                args[position] = [self.masked(a, b) for a, b in zip(sources, args[position], strict=True)]
        if name == "add" and n.name not in self.zero:
            for position, source in enumerate(n.args):
                if isinstance(source, torch.fx.Node) and source.name in self.zero:
                    args[position] = torch.zeros_like(args[position])
        if writes_in_place(n):
            args[0] = args[0].clone()
        axes = self.statistics(n, args)
        if axes:
            return self.over_kept(n, name, args, kwargs, axes)
        return n.target(*args, **kwargs)  # type: ignore[operator]

    def lives(self, channels: Any) -> torch.Tensor:
        return torch.from_numpy(self.keep[channels].all(axis=0))

    def masked(self, source: Any, value: torch.Tensor) -> torch.Tensor:
        for dim, channels in enumerate(self.channels[source.name]):
            if (channels >= 0).any():
                mask = self.lives(channels).to(value.dtype)
                value = value * mask.reshape([-1 if i == dim else 1 for i in range(value.dim())])
        return value

    def statistics(self, n: torch.fx.Node, args: list[Any]) -> dict[int, torch.Tensor]:
        """Axis to the indices that live, of the axes with pruned channels that a norm's statistics run over."""
        name, source = operator_name(n), n.args[0] if n.args else None
        if not isinstance(source, torch.fx.Node) or name not in STATISTICS:
            return {}
        rank = args[0].dim()
        if name == "mean":
            given: Any = args[1] if len(args) > 1 else n.kwargs.get("dim") or list(range(rank))
            over = [axis % rank for axis in ([given] if isinstance(given, int) else given)]
        elif name == "group_norm":
            over = [1] if args[1] == 1 else []
        else:
            over = [rank - 1 - i for i in range(len(args[1]))]
        lives = {axis: self.lives(self.channels[source.name][axis]) for axis in over}
        return {axis: torch.nonzero(alive)[:, 0] for axis, alive in lives.items() if not alive.all()}

    def over_kept(
        self, n: torch.fx.Node, name: str, args: list[Any], kwargs: Any, axes: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        x = args[0]
        for axis, kept in axes.items():
            x = x.index_select(axis, kept)
        if name == "mean":
            return n.target(x, *args[1:], **kwargs)  # type: ignore[operator, no-any-return]
        (axis, kept), *_ = axes.items()
        assert len(axes) == 1
        own = 0 if name == "group_norm" else axis - args[0].dim()
        tensors = [a.index_select(own, kept) if isinstance(a, torch.Tensor) else a for a in args[2:4]]
        size = args[1] if name == "group_norm" else list(x.shape[-len(args[1]) :])
        small = n.target(x, size, *tensors, *args[4:], **kwargs)  # type: ignore[operator]
        return torch.zeros_like(args[0]).index_copy(axis, kept, small)


def masked_output(graph: ModelGraph, plan: Plan, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
    """First output of the dense program in float64 under the plan's masks; `model` holds the (float64) weights."""
    return masked_outputs(graph, plan, model, inputs)[0]


def masked_outputs(
    graph: ModelGraph, plan: Plan, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]
) -> list[torch.Tensor]:
    """Outputs of the dense program in float64 under the plan's masks; `model` holds the (float64) weights."""
    constants = {n: t.double() if t.is_floating_point() else t for n, t in graph.program.constants.items()}
    state = {**constants, **dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    names = graph.program.parameters
    values: list[torch.Tensor] = []
    rest = dict(zip(graph.program.inputs, inputs, strict=True))
    for node in graph.program.graph.nodes:
        if node.op == "placeholder":
            values.append(state[names[node.name]] if node.name in names else rest[node.name])
    with torch.no_grad(), in_double():
        return list(Masked(graph, plan).run(*values))


class _Doubled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Casts to float32 become casts to float64: code that computes its norms in float32 is judged by its structure."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*(wide(a) for a in args), **{k: wide(v) for k, v in (kwargs or {}).items()})


@contextmanager
def in_double() -> Iterator[None]:
    """While active, whatever the code would compute in float32 is computed in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubled():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(before)


def outputs_of(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The tensors that an eager module returns, computed in float64."""
    with torch.no_grad(), in_double():
        return [leaf for leaf in tree_leaves(module(*inputs)) if isinstance(leaf, torch.Tensor)]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())
