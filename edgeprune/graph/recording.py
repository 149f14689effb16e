"""Trace by running: every ATen operator that the eager model calls on fake tensors becomes a node.

Operators are seen before autograd and before composite ones (linear, scaled_dot_product_attention) fall apart, as
`torch.export` sees them, at a fifth of its time: nothing is proven about other inputs, nothing is run twice.
"""

from __future__ import annotations

import gc
import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.nn.modules import module as hooks
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from edgeprune.graph.program import Program, canonical_names, writes_in_place
from edgeprune.graph.shortcuts import shape_without_running, writes_same_shape
from edgeprune.graph.sizes import Comparison, SizeMode, integers, match, sized_attributes

aten = torch.ops.aten
SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
SAME_ELEMENTS = frozenset({aten.view.default, aten.reshape.default, aten.alias.default, aten.detach.default,
                           aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints, aten.contiguous.default,
                           aten.unflatten.int})  # fmt: skip
"""Views under which a write goes back by a reshape to the base's shape."""


_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
"""What a model may give beside tensors, in tuples, lists, dicts and what else torch's pytree knows."""


class NotRecorded(Exception):
    """The recording can't say what the program computes; another tracer has to."""


class _View:
    """How a tensor came from another one of the same memory, and the write after which its node is out of date."""

    __slots__ = ("args", "func", "kwargs", "parent", "version")

    def __init__(self, parent: torch.Tensor | None, func: Any, args: Any, kwargs: Any, version: int) -> None:
        self.parent, self.func, self.args, self.kwargs, self.version = parent, func, args, kwargs, version


class Recorder(SchemaCheckMode):
    """Writes operators into `graph`. A `SchemaCheckMode` only because torch lets no other user mode in this place."""

    def __init__(self, mode: FakeTensorMode, constants: dict[int, tuple[str, torch.Tensor]]) -> None:
        TorchDispatchMode.__init__(self, _dispatch_key=torch._C.DispatchKey.PreDispatch)  # type: ignore[no-untyped-call]
        self.mode = mode
        self.graph = torch.fx.Graph()
        self.nodes: dict[int, torch.fx.Node] = {}
        self.made: dict[int, torch.fx.Node] = {}  # by memory: torch hands out what it makes under another identity
        self.kept: list[torch.Tensor] = []  # an id must stay its tensor's own
        self.views: dict[int, _View] = {}
        self.versions: dict[int, int] = {}
        self.attributes = constants
        self.parameters: dict[str, str] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.stack: dict[str, tuple[str, type]] = {}
        self.results: dict[str, Any] = {}
        self.log: list[Comparison] = []
        self.sizes = SizeMode(self._known, self.log)
        self.first_call: torch.fx.Node | None = None

    def placeholder(self, name: str, tensor: torch.Tensor) -> torch.fx.Node:
        """A placeholder for a tensor that comes from outside, before all calls."""
        if self.first_call is None:
            node = self.graph.placeholder(name)
        else:
            with self.graph.inserting_before(self.first_call):
                node = self.graph.placeholder(name)
        node.meta["val"] = tensor
        self._remember(tensor, node)
        return node

    def _remember(self, tensor: torch.Tensor, node: torch.fx.Node) -> None:
        if id(tensor) not in self.nodes:
            self.kept.append(tensor)
        self.nodes[id(tensor)] = node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            raise NotRecorded(f"{func} is no ATen operator")
        if func.namespace == "prim" or func is aten._assert_async.default:
            return func(*args, **kwargs)
        if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments[1:]):
            raise NotRecorded(f"{func} writes into another argument than its first")
        out = self._output(func, args, kwargs)
        node = self._call(func, args, kwargs, out)
        node.meta["source"] = self.sizes.source
        reached = list(integers((args, kwargs)))
        if reached:
            node.meta["sizes"] = match(self.sizes.integers, reached)
        self._assign(func, args, kwargs, out, node)
        return out

    def _output(self, func: Any, args: Any, kwargs: Any) -> Any:
        if writes_same_shape(func, args, kwargs):
            return args[0]
        shape = shape_without_running(func, args, kwargs)
        if shape is None:
            return func(*args, **kwargs)
        x = args[0]
        with no_dispatch():
            return FakeTensor(self.mode, torch.empty(shape, dtype=x.dtype, device="meta"), x.device)

    def _call(self, func: Any, args: Any, kwargs: Any, out: Any) -> torch.fx.Node:
        new_args = tree_map(self._argument, tuple(args))
        new_kwargs = tree_map(self._argument, dict(kwargs))
        node = self.graph.call_function(func, new_args, new_kwargs)
        self.first_call = self.first_call or node
        node.meta["val"] = list(out) if isinstance(out, (tuple, list)) else out
        node.meta["nn_module_stack"] = dict(self.stack)
        return node

    def _assign(self, func: Any, args: Any, kwargs: Any, out: Any, node: torch.fx.Node) -> None:
        if isinstance(out, torch.Tensor):
            if writes_in_place(node):
                self._written(args[0], node)
            else:
                self._derived(out, func, args, kwargs, node)
        elif isinstance(out, (tuple, list)):
            for i, item in enumerate(out):
                if isinstance(item, torch.Tensor):
                    taken = self.graph.call_function(operator.getitem, (node, i))
                    taken.meta = {"val": item, "nn_module_stack": dict(self.stack)}
                    self._derived(item, None, args, kwargs, taken)

    def _derived(self, out: torch.Tensor, func: Any, args: Any, kwargs: Any, node: torch.fx.Node) -> None:
        parent = next((a for a in args if isinstance(a, torch.Tensor)), None)
        if parent is not None and id(parent) in self.nodes and _storage(parent) == _storage(out):
            version = self.versions.get(_storage(out), 0)
            if parent is not out:
                self.views[id(out)] = _View(parent, func, args, kwargs, version)
        else:
            self.made[_storage(out)] = node
        self._remember(out, node)

    def _known(self, tensor: torch.Tensor) -> torch.fx.Node | None:
        node = self.nodes.get(id(tensor))
        if node is None:
            node = self.made.get(_storage(tensor))
            if node is not None and node.meta["val"].shape == tensor.shape:
                self._remember(tensor, node)
                return node
            return None
        return node

    def as_node(self, value: Any) -> Any:
        """The node that made a tensor; anything else as it is."""
        return self.nodes.get(id(value), value) if isinstance(value, torch.Tensor) else value

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._current(value)
        return int(value) if isinstance(value, int) and not isinstance(value, bool) else value

    def _current(self, tensor: torch.Tensor) -> torch.fx.Node:
        """The node that holds the tensor's value now; a view of memory written since is taken again."""
        node = self._known(tensor)
        if node is None:
            return self._constant(tensor)
        version = self.versions.get(_storage(tensor), 0)
        view = self.views.get(id(tensor))
        if not version or view is None or view.version == version:
            return node
        if view.func is None or view.parent is None:
            raise NotRecorded("memory behind several outputs of one operator is written to")
        parent = view.parent
        again = self._call(view.func, [parent if a is parent else a for a in view.args], view.kwargs, tensor)
        view.version = version
        self.nodes[id(tensor)] = again
        return again

    def _written(self, target: torch.Tensor, node: torch.fx.Node) -> None:
        """The target's value is the node's now, and so is, around it, that of the memory it is a part of."""
        storage = _storage(target)
        self.versions[storage] = self.versions.get(storage, 0) + 1
        tensor, value = target, node
        while True:
            self._remember(tensor, value)
            view = self.views.get(id(tensor))
            if view is None:
                return
            view.version = self.versions[storage]
            parent = view.parent
            if parent is None or id(parent) not in self.nodes:
                raise NotRecorded("memory is written to through a view")
            value = self._put_back(view, parent, value)
            tensor = parent

    def _put_back(self, view: _View, parent: torch.Tensor, value: torch.fx.Node) -> torch.fx.Node:
        func = view.func
        if func in SCATTERS:
            node = self.graph.call_function(
                SCATTERS[func], (self.nodes[id(parent)], value, *map(self._argument, view.args[1:]))
            )
        elif func in SAME_ELEMENTS or _storage_same(view, parent):
            node = self.graph.call_function(aten.reshape.default, (value, list(parent.shape)))
        else:
            raise NotRecorded(f"memory is written to through {func}")
        node.meta = {"val": parent, "nn_module_stack": dict(self.stack)}
        return node

    def _constant(self, tensor: torch.Tensor) -> torch.fx.Node:
        """A tensor that came from nowhere: Python code of the model holds it."""
        if isinstance(tensor, FakeTensor):
            raise NotRecorded("a tensor came up that no call made")
        name, value = self.attributes.get(id(tensor), (f"constant_{len(self.constants)}", tensor))
        node = self.placeholder(f"c_{len(self.constants)}", tensor)
        self.parameters[node.name] = name
        self.constants[name] = value
        return node

    @contextmanager
    def module_stack(self, model: torch.nn.Module) -> Iterator[None]:
        """While active, `stack` names the modules whose forward runs; `name@1` in a module's second call."""
        names: dict[torch.nn.Module, str] = {}
        for name, module in model.named_modules():
            names.setdefault(module, name)
        calls: dict[str, int] = {}

        def enter(module: torch.nn.Module, _: Any) -> None:
            if module in names:
                name = names[module]
                times = calls.get(name, 0)
                calls[name] = times + 1
                self.stack[f"{name}#{times}"] = (f"{name}@{times}" if times else name, type(module))

        def leave(module: torch.nn.Module, _: Any, output: Any) -> None:
            if module in names and self.stack:
                self.stack.popitem()
                if not isinstance(output, torch.Tensor):
                    self.results[names[module]] = output

        with ExitStack() as exit_stack:
            exit_stack.callback(hooks.register_module_forward_pre_hook(enter).remove)
            exit_stack.callback(hooks.register_module_forward_hook(leave, always_call=True).remove)
            yield


def _storage(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _storage_same(view: _View, parent: torch.Tensor) -> bool:
    return view.func is aten.dropout.default or view.func is aten._to_copy.default or view.func is aten.to.dtype


def record(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], *, sized: bool = True) -> Program:
    """Run `model`, as it is set, on fake copies of its tensors and of the inputs, and write down what it calls.

    `sized` follows where sizes come from (`Program.comparisons`, `meta["sizes"]`). Raises `NotRecorded` where the
    program can't be told from the calls, and whatever the model itself raises.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    recorder = Recorder(fake, _constants(model))
    tensors = {name: _fake(fake, tensor) for name, tensor in named.items()}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(uncollected())
        stack.enter_context(_without_fast_attention())
        stack.enter_context(_unchanged(model))
        for i, (name, tensor) in enumerate(tensors.items()):
            node = recorder.placeholder(f"p_{i}", tensor)
            recorder.parameters[node.name] = name
        inputs = tuple(_fake(fake, value) for value in example_inputs)
        names = tuple(recorder.placeholder(f"x_{i}", value).name for i, value in enumerate(inputs))
        if sized:
            stack.enter_context(sized_attributes(model, recorder.log))
        stack.enter_context(recorder.module_stack(model))
        stack.enter_context(enable_python_dispatcher())
        stack.enter_context(fake)
        stack.enter_context(recorder)
        if sized:
            stack.enter_context(recorder.sizes)
        outputs = torch.func.functional_call(model, tensors, inputs)
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    for leaf in tree_leaves(outputs):
        if leaf is not None and not isinstance(leaf, (torch.Tensor, *_PLAIN)):
            raise NotRecorded(f"the model gives a {type(leaf).__name__}, which may hold tensors")
    recorder.graph.output([recorder._current(leaf) for leaf in leaves])
    _drop_unread(recorder.graph)
    for node, name in canonical_names(recorder.graph).items():
        node.name = name
    return Program(
        graph=recorder.graph,
        parameters=recorder.parameters,
        constants=recorder.constants,
        inputs=names,
        comparisons=tuple(recorder.log),
        results={name: tree_map(recorder.as_node, value) for name, value in recorder.results.items()},
    )


@contextmanager
def _unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Whatever the forward keeps in modules (caches) is taken out again: it would be fake."""
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    held = [(v, type(v)(v)) for _, values in before for v in values.values() if type(v) in (dict, list)]
    try:
        yield
    finally:
        for now, values in before:
            now.clear()
            now.update(values)
        for now, values in held:
            now.clear()
            now.update(values) if isinstance(now, dict) else now.extend(values)


def _fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of that shape, layout, type and device without elements."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return mode.from_tensor(tensor)
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    fake = FakeTensor(mode, empty, tensor.device)
    if isinstance(tensor, torch.nn.Parameter):
        fake._is_param = True  # what torch's isinstance looks at
    return fake


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection: walking over all of torch's objects would take longer than the work in between."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _constants(model: torch.nn.Module) -> dict[int, tuple[str, torch.Tensor]]:
    """Tensors that modules hold as plain attributes, by identity."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found.setdefault(id(value), (f"{path}.{name}" if path else name, value))
    return found


def _drop_unread(graph: torch.fx.Graph) -> None:
    """Remove calls whose result nobody reads; writes were rewired, so none is needed for its effect."""
    for node in reversed(list(graph.nodes)):
        if (node.op == "call_function" and not node.users) or (
            node.op == "placeholder" and not node.users and node.name.startswith(("p_", "c_"))
        ):
            graph.erase_node(node)


@contextmanager
def _without_fast_attention() -> Iterator[None]:
    """Torch's fused transformer layer hides its projections from the trace."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
