"""Units: the kernel instances of one network as a runtime fuses them, with widths as functions of the groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgeprune.graph.structure import ModelGraph, Node, Width
from edgeprune.kernel import Kernel

ACTIVATIONS = {
    "relu": "relu",
    "relu6": "relu6",
    "hardtanh": "relu6",
    "silu": "silu",
    "hardswish": "hardswish",
    "hardsigmoid": "hardsigmoid",
    "sigmoid": "sigmoid",
    "gelu": "gelu",
}
"""ATen activation to its name in a kernel's epilogue; any other activation is timed as a `relu`."""

NORMS = frozenset({"batch_norm", "_native_batch_norm_legit_no_training"})
FREE = frozenset(
    "view reshape flatten unflatten squeeze unsqueeze dropout feature_dropout clone contiguous getitem alias detach "
    "placeholder output".split()
)
"""Operators that no runtime spends time on."""

POOLS = {"max_pool2d": "max_pool", "avg_pool2d": "avg_pool"}


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One kernel instance. `name`, unique, is the qualified module of a contraction's weight, else the node's name.

    `nodes` are the graph nodes that it covers; `dense` its kernel in the dense network.
    """

    name: str
    dense: Kernel
    c_in: Width
    c_out: Width
    nodes: frozenset[str]

    @property
    def groups(self) -> tuple[str, ...]:
        """Ids of the groups that its widths depend on, in order of appearance."""
        return tuple(dict.fromkeys((*self.c_in.groups, *self.c_out.groups)))

    def kernel(self, widths: Mapping[str, int]) -> Kernel:
        """Its kernel when group g keeps `widths[g]` channels."""
        c_in, c_out = self.c_in.at(widths), self.c_out.at(widths)
        dense = self.dense
        convolution_groups = dense.groups * c_out // dense.c_out if dense.groups > 1 else 1
        return replace(dense, c_in=c_in, c_out=c_out, groups=convolution_groups)


def fuse(graph: ModelGraph, precision: str, *, activations: frozenset[str], adds: bool) -> tuple[Unit, ...]:
    """Partition a graph for a runtime that folds norms into contractions and fuses what follows them.

    `activations` are the epilogues it fuses; `adds` whether a residual add goes into the contraction before it.
    """
    builder = _Builder(graph=graph, precision=precision, activations=activations, adds=adds)
    return tuple(unit for node in graph.nodes if (unit := builder.unit(node)) is not None)


class _Builder:
    """Walks the graph once; `taken` holds the nodes that an earlier unit has fused."""

    def __init__(self, *, graph: ModelGraph, precision: str, activations: frozenset[str], adds: bool) -> None:
        self.precision, self.activations, self.adds = precision, activations, adds
        self.shapes = graph.parameter_shapes
        self.nodes = {node.name: node for node in graph.nodes}
        self.users: dict[str, list[Node]] = {}
        self.order = {node.name: i for i, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            for source in node.inputs:
                self.users.setdefault(source, []).append(node)
        self.taken: set[str] = set()
        self.named: dict[str, int] = {}

    def unit(self, node: Node) -> Unit | None:
        if node.name in self.taken or node.operator in FREE or not node.shape:
            return None
        if node.operator in ("conv1d", "conv2d", "conv3d", "linear"):
            return self._contraction(node)
        return self._other(node)

    def _contraction(self, node: Node) -> Unit:
        source = self.nodes[node.inputs[0]]
        weight = next((name for name in node.parameters if len(self.shapes[name]) > 1), None)
        weight_shape = self.nodes[node.inputs[1]].shape if weight is None else self.shapes[weight]
        covered, epilogue = [node.name], ["bias"]
        end = node
        while (follower := self._fusible(end, tuple(epilogue))) is not None:
            covered.append(follower.name)
            if follower.operator not in NORMS and follower.operator not in FREE:
                epilogue.append(ACTIVATIONS.get(follower.operator, follower.operator))
            end = follower
        self.taken.update(covered)
        is_linear = node.operator == "linear"
        axis = -1 if is_linear else 1
        return self._make(
            node,
            name=self._unique(node.name if weight is None else weight.removesuffix(".weight")),
            operator="linear" if is_linear else "conv",
            widths=(source.widths[axis], node.widths[axis]),
            sizes=(source.shape[axis], node.shape[axis]),
            spatial=source.shape[1:-1] if is_linear else source.shape[2:],
            nodes=covered,
            epilogue=epilogue,
            **({} if is_linear else _window(node, source, weight_shape[2:])),
        )

    def _unique(self, name: str) -> str:
        """The name, or `name@1` for the second layer with that weight."""
        times = self.named.get(name, 0)
        self.named[name] = times + 1
        return f"{name}@{times}" if times else name

    def _fusible(self, node: Node, epilogue: tuple[str, ...]) -> Node | None:
        users = self.users.get(node.name, [])
        if len(users) != 1:
            return None
        (user,) = users
        if user.operator in NORMS or (user.operator == "getitem" and node.operator in NORMS):
            return user if epilogue == ("bias",) else None
        if user.operator in ("dropout", "feature_dropout"):
            return user
        if ACTIVATIONS.get(user.operator) in self.activations:
            return user
        same = user.operator == "add" and len(user.inputs) == 2 and user.shape == node.shape and self.adds
        if same and "add" not in epilogue:
            other = next((name for name in user.inputs if name != node.name), node.name)
            return user if self._is_last(node, other) and self.nodes[other].shape == node.shape else None
        return None

    def _is_last(self, node: Node, other: str) -> bool:
        """Of the two operands of an add the one computed last fuses it."""
        return self.order[other] < self.order[node.name]

    def _other(self, node: Node) -> Unit | None:
        source = self.nodes[node.inputs[0]] if node.inputs else node
        if node.operator in ("adaptive_avg_pool2d", "mean"):
            if node.operator == "adaptive_avg_pool2d" and node.shape[2:] == source.shape[2:]:
                return None
            return self._simple(node, source, "mean" if node.shape[2:] in ((), (1, 1)) else "avg_pool")
        if node.operator in POOLS:
            return self._simple(node, source, POOLS[node.operator])
        if node.operator == "cat":
            return self._simple(node, node, "cat")
        if node.operator in NORMS:
            return self._with_activation(node, source, "affine")
        if node.operator in ("add", "sub"):
            return self._with_activation(node, node, "add")
        if node.operator in ("mul", "div"):
            return self._with_activation(node, node, "mul")
        return self._simple(node, source, "activation") if len(node.shape) > 1 else None

    def _with_activation(self, node: Node, source: Node, operator: str) -> Unit:
        covered, epilogue, end = [node.name], list[str](), node
        users = self.users.get(end.name, [])
        if len(users) == 1 and users[0].operator == "getitem":
            covered.append(users[0].name)
            end = users[0]
            users = self.users.get(end.name, [])
        if len(users) == 1 and ACTIVATIONS.get(users[0].operator) in self.activations:
            covered.append(users[0].name)
            epilogue.append(ACTIVATIONS[users[0].operator])
        self.taken.update(covered)
        return self._simple(node, source, operator, covered, epilogue)

    def _simple(
        self,
        node: Node,
        source: Node,
        operator: str,
        covered: list[str] | None = None,
        epilogue: list[str] | None = None,
    ) -> Unit:
        window: dict[str, Any] = {}
        if operator in ("max_pool", "avg_pool"):
            window = _pool_window(node, source)
        if operator == "activation":
            epilogue = [ACTIVATIONS.get(node.operator, "relu")]
        widths = node.widths[1] if len(node.widths) > 1 else Width(fixed=node.shape[-1])
        return self._make(
            node,
            name=node.name,
            operator=operator,
            widths=(widths, widths),
            sizes=(node.shape[1] if len(node.shape) > 1 else 1,) * 2,
            spatial=source.shape[2:] or (1, 1),
            nodes=covered or [node.name],
            epilogue=epilogue or [],
            **window,
        )

    def _make(
        self,
        node: Node,
        *,
        name: str,
        operator: str,
        widths: tuple[Width, Width],
        sizes: tuple[int, int],
        spatial: tuple[int, ...],
        nodes: list[str],
        epilogue: list[str],
        **window: Any,
    ) -> Unit:
        kernel = Kernel(
            operator=operator,
            c_in=sizes[0],
            c_out=sizes[1],
            batch=node.shape[0],
            spatial=spatial,
            epilogue=tuple(epilogue),
            precision=self.precision,
            **window,
        )
        return Unit(name=name, dense=kernel, c_in=widths[0], c_out=widths[1], nodes=frozenset(nodes))


def _window(node: Node, source: Node, window: tuple[int, ...]) -> dict[str, Any]:
    attributes = node.attributes
    rank = len(source.shape) - 2
    dilation = _sizes(attributes.get("dilation", 1), rank)
    padding = attributes.get("padding", 0)
    if padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, window, strict=True)]
    return {
        "window": window,
        "stride": _sizes(attributes.get("stride", 1), rank),
        "padding": _sizes(0 if padding == "valid" else padding, rank),
        "dilation": dilation,
        "groups": attributes.get("groups", 1),
    }


def _pool_window(node: Node, source: Node) -> dict[str, Any]:
    rank = len(source.shape) - 2
    if "kernel_size" in node.attributes:
        window = _sizes(node.attributes["kernel_size"], rank)
        stride = _sizes(node.attributes.get("stride") or window, rank)
        padding = _sizes(node.attributes.get("padding", 0), rank)
    else:
        window = tuple(max(1, a // b) for a, b in zip(source.shape[2:], node.shape[2:], strict=True))
        stride, padding = window, (0,) * rank
    return {"window": window, "stride": stride, "padding": padding, "dilation": (1,) * rank}


def _sizes(value: Any, rank: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * rank if len(values) == 1 else values))
