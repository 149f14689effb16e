"""Fusion: from a graph to the units that a runtime makes of it, which operators it takes into which kernel."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from edgeprune.attention import MATMULS, Attention, computed, find_attention, moved, operands
from edgeprune.graph.structure import ModelGraph, Node, Width
from edgeprune.kernel import Kernel
from edgeprune.kernel_sizes import ONE, ConvolutionGroups, Product, Size, width_of
from edgeprune.precision import KINDS, Computes, precision_of
from edgeprune.unit import Unit

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
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze dropout feature_dropout clone contiguous getitem "
    "alias detach expand select placeholder output".split()
)
"""Operators that no runtime spends time on."""

BETWEEN = NORMS | {"getitem", "dropout", "feature_dropout"}
"""What may stand between a contraction and a residual add that it takes in."""

COPIES = frozenset(
    "permute transpose t movedim slice roll pad constant_pad_nd flip repeat index index_select embedding".split()
)
"""Operators that move their input about; where its shape and order stay as they were, nothing is done."""

CONTRACTIONS = frozenset({"conv1d", "conv2d", "conv3d", "linear", "mm", "addmm"})

LAYER_NORMS = frozenset({"layer_norm", "native_layer_norm", "rms_norm"})

POOLS = {"max_pool2d": "max_pool", "avg_pool2d": "avg_pool"}


def fuse(
    graph: ModelGraph, precision: str, *, activations: frozenset[str], adds: bool, computes: Computes | None = None
) -> tuple[Unit, ...]:
    """Partition a graph for a runtime that folds norms into contractions and fuses what follows them.

    `activations` are the epilogues it fuses; `adds` whether a residual add goes into a contraction before it that has
    no activation, the first operand if both are such (so do OpenVINO and ONNX Runtime, by their own listings). Kernels
    are in `precision` where the runtime `computes` such in it (all of them unless told), else in fp32.
    """
    computes = {precision: KINDS} if computes is None else computes
    builder = _Builder(graph=graph, precision=precision, activations=activations, adds=adds, computes=computes)
    return tuple(unit for node in graph.nodes if (unit := builder.unit(node)) is not None)


class _Builder:
    """Walks the graph once; `taken` holds the nodes that an earlier unit has fused."""

    def __init__(
        self, *, graph: ModelGraph, precision: str, activations: frozenset[str], adds: bool, computes: Computes
    ) -> None:
        self.precision, self.activations, self.adds = precision, activations, adds
        self.computes = computes
        self.shapes = graph.parameter_shapes
        self.dense = graph.dense_widths
        self.computed = computed(graph)
        self.nodes = {node.name: node for node in graph.nodes}
        self.users: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for source in node.inputs:
                self.users.setdefault(source, []).append(node)
        self.attention = {found.core: found for found in find_attention(graph)}
        self.attended = frozenset(name for found in self.attention.values() for name in found.nodes)
        self.taken = set(self.attended)
        self.named: dict[str, int] = {}

    def unit(self, node: Node) -> Unit | None:
        if node.name in self.attention:
            return self._attention(self.attention[node.name])
        if node.name in self.taken or node.name not in self.computed or node.operator in FREE or not node.shape:
            return None
        if self._is_contraction(node):
            return self._contraction(node)
        return self._matmul(node) if node.operator in MATMULS else self._other(node)

    def _is_contraction(self, node: Node) -> bool:
        """Of one activation; a product of two is a matmul."""
        if node.operator in MATMULS:
            return bool(node.parameters) or not self.computed.issuperset(operands(node))
        return node.operator in CONTRACTIONS

    def _attention(self, found: Attention) -> Unit:
        kernel = Kernel(
            operator="attention",
            c_in=found.num_heads * found.query_size,
            c_out=found.num_heads * found.value_size,
            groups=found.num_heads,
            batch=found.batch,
            spatial=(found.queries, found.keys),
            epilogue=("add",) if found.biased else (),
            precision=self._precision("attention"),
        )
        return Unit(
            name=self._unique(found.core),
            dense=kernel,
            c_in=Product((found.heads, found.query_width)),
            c_out=Product((found.heads, found.value_width)),
            nodes=found.nodes,
            kernel_groups=found.heads,
        )

    def _matmul(self, node: Node) -> Unit:
        first = self.nodes[operands(node)[0]]
        heads = width_of(node, -3) if len(node.shape) > 2 else ONE
        groups = node.shape[-3] if len(node.shape) > 2 else 1
        kernel = Kernel(
            operator="matmul",
            c_in=groups * first.shape[-1],
            c_out=groups * node.shape[-1],
            groups=groups,
            batch=prod(node.shape[:-3]),
            spatial=node.shape[-2:-1],
            precision=self._precision("matmul"),
        )
        return Unit(
            name=self._unique(node.name),
            dense=kernel,
            c_in=Product((heads, width_of(first, -1))),
            c_out=Product((heads, width_of(node, -1))),
            nodes=frozenset({node.name}),
            kernel_groups=heads,
        )

    def _contraction(self, node: Node) -> Unit:
        source = self.nodes[next(name for name in node.inputs if name in self.computed)]
        weight = next((name for name in node.parameters if len(self.shapes[name]) > 1), None)
        weight_shape = self.nodes[operands(node)[1]].shape if weight is None else self.shapes[weight]
        covered, epilogue = [node.name], ["bias"]
        end = node
        while (follower := self._fusible(end, tuple(epilogue))) is not None:
            covered.append(follower.name)
            if follower.operator not in NORMS and follower.operator not in FREE:
                epilogue.append(ACTIVATIONS.get(follower.operator, follower.operator))
            end = follower
        self.taken.update(covered)
        is_linear = not node.operator.startswith("conv")
        axis = -1 if is_linear else 1
        return self._make(
            node,
            name=self._unique(node.name if weight is None else weight.removesuffix(".weight")),
            operator="linear" if is_linear else "conv",
            widths=(width_of(source, axis), width_of(node, axis)),
            sizes=(source.shape[axis], node.shape[axis]),
            spatial=source.shape[1:-1] if is_linear else source.shape[2:],
            nodes=covered,
            epilogue=epilogue,
            **({} if is_linear else _window(node, source, weight_shape[2:])),
        )

    def _precision(self, operator: str, *epilogue: str) -> str:
        return precision_of(operator, epilogue, self.precision, self.computes)

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
        if user.name in self.taken:
            return None
        if user.operator in NORMS or (user.operator == "getitem" and node.operator in NORMS):
            return user if epilogue == ("bias",) else None
        if user.operator in ("dropout", "feature_dropout"):
            return user
        if ACTIVATIONS.get(user.operator) in self.activations:
            return user
        same = user.operator == "add" and len(user.inputs) == 2 and user.shape == node.shape and self.adds
        if same and epilogue == ("bias",):
            first, second = (self.nodes[name] for name in user.inputs)
            return user if first.shape == second.shape and (node is first or not self._takes_an_add(first)) else None
        return None

    def _takes_an_add(self, operand: Node) -> bool:
        """Whether a contraction without an activation ends here: of two such operands of an add the first fuses it."""
        while len(self.users[operand.name]) == 1:
            if operand.name not in self.computed or operand.name in self.attended:
                return False
            if self._is_contraction(operand):
                return True
            if operand.operator not in BETWEEN:
                return False
            operand = self.nodes[operand.inputs[0]]
        return False

    def _other(self, node: Node) -> Unit | None:
        source = self.nodes[node.inputs[0]] if node.inputs else node
        if node.operator in ("adaptive_avg_pool2d", "mean"):
            if node.operator == "adaptive_avg_pool2d" and node.shape[2:] == source.shape[2:]:
                return None
            return self._simple(node, source, "mean" if node.shape[2:] in ((), (1, 1)) else "avg_pool")
        if node.operator in POOLS:
            return self._simple(node, source, POOLS[node.operator])
        if node.operator == "cat":
            return self._cat(node)
        if node.operator in NORMS:
            return self._with_activation(node, source, "affine")
        if node.operator in ("add", "sub"):
            return self._with_activation(node, node, "add")
        if node.operator in ("mul", "div"):
            return self._with_activation(node, node, "mul")
        if node.operator in COPIES:
            return self._copy(node, source)
        if node.operator in LAYER_NORMS:
            return self._rows(node, "layer_norm", last=len(node.attributes.get("normalized_shape", (1,))))
        if node.operator in ("softmax", "_softmax"):
            return self._simple(node, node, "softmax")
        return self._simple(node, source, "activation") if len(node.shape) > 1 else None

    def _cat(self, node: Node) -> Unit:
        """With the width of every part, where it joins channels."""
        unit = self._simple(node, node, "cat")
        axis = int(node.attributes.get("dim", 0)) % len(node.shape)
        sources = [self.nodes[name] for name in node.inputs if name in self.nodes]
        parts = tuple(width_of(source, axis) for source in sources)
        if _channel_axes(node) != (axis,) or sum(source.shape[axis] for source in sources) != node.shape[axis]:
            return unit
        dense = replace(unit.dense, parts=tuple(source.shape[axis] for source in sources))
        return replace(unit, dense=dense, parts=parts)

    def _copy(self, node: Node, source: Node) -> Unit | None:
        """None where neither shape nor order changes, or one row is all there is."""
        order = moved(node, source)
        if order is None:
            stays = node.operator in ("slice", "pad", "constant_pad_nd") and node.shape == source.shape
            return None if stays or prod(node.shape[:-1]) == 1 else self._rows(node, "copy")
        if order == tuple(sorted(order)):
            return None
        return self._rows(node, "copy" if order[-1] == max(order) else "transpose")

    def _rows(self, node: Node, operator: str, last: int = 1) -> Unit:
        """A kernel over rows of channels: the `last` dimensions, or those that are pruned."""
        rank = len(node.shape)
        axes = _channel_axes(node, -1) if operator != "layer_norm" else tuple(range(rank - last, rank))
        return self._over(node, axes, operator=operator, spatial=_other_axes(node, axes) or (1,))

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
        axes = _channel_axes(node)
        spatial = source.shape[2:] or (1, 1)
        if axes != (1,):
            spatial = _other_axes(node, axes) or (1, 1)
        elif operator == "mean" and source.shape[1] != node.shape[1]:
            spatial = source.shape[1:-1]  # tokens first, channels last
        return self._over(
            node,
            axes,
            operator=operator,
            spatial=spatial,
            nodes=covered or [node.name],
            epilogue=epilogue or [],
            **window,
        )

    def _over(self, node: Node, axes: tuple[int, ...], **fields: Any) -> Unit:
        """A unit of the node's name with one width: that of its output over these axes."""
        width = Product(tuple(width_of(node, axis) for axis in axes))
        size = prod(node.shape[axis] for axis in axes)
        told: dict[str, Any] = {"nodes": [node.name], "epilogue": [], **fields}
        return self._make(node, name=node.name, widths=(width, width), sizes=(size, size), **told)

    def _make(
        self,
        node: Node,
        *,
        name: str,
        operator: str,
        widths: tuple[Size, Size],
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
            precision=self._precision(operator, *epilogue),
            **window,
        )
        return Unit(
            name=name,
            dense=kernel,
            c_in=widths[0],
            c_out=widths[1],
            nodes=frozenset(nodes),
            kernel_groups=self._kernel_groups(kernel, *widths),
        )

    def _kernel_groups(self, kernel: Kernel, c_in: Size, c_out: Size) -> Size:
        if kernel.groups == 1 or not isinstance(c_in, Width):
            return Width(fixed=kernel.groups)
        common = tuple(group for group in c_in.groups if group in c_out.groups)
        channels = kernel.c_in // kernel.groups
        return ConvolutionGroups(c_in=c_in, groups=common, channels=channels, dense=self.dense)


def _channel_axes(node: Node, otherwise: int = 1) -> tuple[int, ...]:
    """The axes, but for the first, that pruning changes; where there is none the usual one."""
    pruned = tuple(axis for axis in range(1, len(node.shape)) if width_of(node, axis).groups)
    return pruned or (() if len(node.shape) < 2 else (otherwise % len(node.shape),))


def _other_axes(node: Node, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of all but the batch and these axes."""
    return tuple(size for axis, size in enumerate(node.shape) if axis not in (0, *axes))


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
