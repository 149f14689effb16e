"""Where the sizes in a program come from: module attributes, shapes of tensors, or numbers fixed in Python code.

While the model runs for the trace, the integers that its modules hold and those that it reads from shapes are `Size`s:
integers that remember how they were computed. What reaches an operator (`view(n, t, self.num_heads, -1)`) is kept as an
*expression*; surgery sets the attributes, and what no attribute explains is fixed by the code at that line.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.overrides import TorchFunctionMode

Expression: TypeAlias = tuple[Any, ...]
"""("attribute", module, name, index or None, value), ("dimension", node, axis), ("number", n) or
(operator, left, right)."""

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}
COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Python code found `left symbol right` to be `result`, at `source` (file:line).

    Where it computes with a size in a way that can't be followed (a root, a division) the size is compared (`==`) with
    its own value: it must not change.
    """

    left: Expression
    symbol: str
    right: Expression
    result: bool
    source: str


_METHODS = {"==": "__eq__", "!=": "__ne__", "<": "__lt__", "<=": "__le__", ">": "__gt__", ">=": "__ge__"}


class Size(int):
    """An integer that knows how it was computed."""

    expression: Expression
    log: list[Comparison]

    @classmethod
    def of(cls, value: int, expression: Expression, log: list[Comparison]) -> Size:
        """`value` with its origin; comparisons that Python code makes with it go to `log`."""
        size = cls(value)
        size.expression = expression
        size.log = log
        return size

    def __reduce__(self) -> Any:
        return (int, (int(self),))

    def __copy__(self) -> int:
        return int(self)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)

    __hash__ = int.__hash__

    def _compared(self, symbol: str, other: object) -> Any:
        if type(other) not in (int, Size):
            return getattr(int, _METHODS[symbol])(self, other)
        result = COMPARISONS[symbol](int(self), int(other))  # type: ignore[call-overload]
        self.log.append(
            Comparison(
                left=self.expression,
                symbol=symbol,
                right=expression_of(other),
                result=result,
                source=source_line(),
            )
        )
        return result

    def __eq__(self, other: object) -> Any:
        return self._compared("==", other)

    def __ne__(self, other: object) -> Any:
        return self._compared("!=", other)

    def __lt__(self, other: int) -> Any:
        return self._compared("<", other)

    def __le__(self, other: int) -> Any:
        return self._compared("<=", other)

    def __gt__(self, other: int) -> Any:
        return self._compared(">", other)

    def __ge__(self, other: int) -> Any:
        return self._compared(">=", other)

    def __bool__(self) -> bool:
        return bool(self._compared("!=", 0))

    def __neg__(self) -> Size:
        return Size.of(-int(self), ("-", ("number", 0), self.expression), self.log)

    def _converted(self) -> None:
        self._compared("==", int(self))

    def __float__(self) -> float:
        self._converted()
        return int.__float__(self)

    def __truediv__(self, other: Any) -> Any:
        self._converted()
        return int(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        self._converted()
        return other / int(self)

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        self._converted()
        return pow(int(self), other, modulus)

    def __rpow__(self, other: Any, modulus: Any = None) -> Any:
        self._converted()
        return pow(other, int(self), modulus)


def _unfollowed(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: Size, *others: Any) -> Any:
        self._converted()
        return plain(int(self), *others)

    return method


for _name in "and rand or ror xor rxor lshift rlshift rshift rrshift divmod rdivmod round invert".split():
    setattr(Size, f"__{_name}__", _unfollowed(f"__{_name}__"))


def _arithmetic(symbol: str, function: Callable[[int, int], int]) -> tuple[Any, Any]:
    def forward(self: Size, other: Any) -> Any:
        if type(other) not in (int, Size):
            if isinstance(other, float):
                self._converted()
            return function(int(self), other) if not isinstance(other, (tuple, list, str)) else NotImplemented
        value = function(int(self), int(other))
        return Size.of(value, (symbol, self.expression, expression_of(other)), self.log)

    def backward(self: Size, other: Any) -> Any:
        if type(other) not in (int, Size):
            if isinstance(other, float):
                self._converted()
            return function(other, int(self)) if not isinstance(other, (tuple, list, str)) else NotImplemented
        value = function(int(other), int(self))
        return Size.of(value, (symbol, expression_of(other), self.expression), self.log)

    return forward, backward


for _symbol, _name in (("+", "add"), ("-", "sub"), ("*", "mul"), ("//", "floordiv"), ("%", "mod")):
    _forward, _backward = _arithmetic(_symbol, OPERATORS[_symbol])
    setattr(Size, f"__{_name}__", _forward)
    setattr(Size, f"__r{_name}__", _backward)


def expression_of(value: Any) -> Expression:
    """How an integer was computed; a plain one is a number of the code."""
    return value.expression if type(value) is Size else ("number", int(value))


_TORCH = torch.__file__.removesuffix("__init__.py")


def source_line() -> str:
    """`file:line` of the innermost code that is neither of torch nor of this project, "" where there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _OWN, "<")):
            return f"{name}:{frame.f_lineno}"
        if frame.f_back is None or (frame.f_code.co_name == "record" and name.startswith(_OWN)):
            break
        frame = frame.f_back
    return ""


_OWN = __file__.removesuffix("graph/sizes.py")


@contextmanager
def sized_attributes(model: torch.nn.Module, log: list[Comparison]) -> Iterator[None]:
    """While active, the integers that modules hold as attributes, alone or in tuples and lists, are `Size`s."""
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, module in model.named_modules():
            held = vars(module)
            for name, value in list(held.items()):
                sized = _sized(value, path, name, log)
                if sized is not None:
                    replaced.append((held, name, value))
                    held[name] = sized
        yield
    finally:
        for held, name, value in replaced:
            held[name] = value


def _sized(value: Any, path: str, name: str, log: list[Comparison]) -> Any:
    if type(value) is int and value > 0:
        return Size.of(value, ("attribute", path, name, None, value), log)
    if type(value) in (tuple, list, torch.Size) and value and all(type(item) is int for item in value):
        items = [Size.of(item, ("attribute", path, name, i, item), log) for i, item in enumerate(value)]
        return type(value)(items)
    return None


class SizeMode(TorchFunctionMode):
    """Gives shapes as `Size`s, and notes the integers that torch functions are called with."""

    def __init__(self, node_of: Callable[[torch.Tensor], Any], log: list[Comparison]) -> None:
        super().__init__()
        self.node_of = node_of
        self.log = log
        self.integers: list[Any] = []
        self.source = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _GET_SHAPE or func is _SIZE:
            return self._shape(func, args, kwargs)
        if func is torch.nn.functional.multi_head_attention_forward:
            self._keep_widths(args[:3])
        if func in _TENSORS:
            for value in integers((args, kwargs)):
                if type(value) is Size:
                    value._converted()
        outer = self.integers, self.source
        self.integers, self.source = list(integers((args, kwargs))), source_line()
        try:
            return func(*args, **kwargs)
        finally:
            self.integers, self.source = outer

    def _keep_widths(self, tensors: Any) -> None:
        """The function checks the widths of query, key and value against numbers, out of this mode's sight."""
        for tensor in tensors:
            node = self.node_of(tensor)
            if node is not None:
                width = tensor.dim() - 1
                bool(Size.of(int(tensor.shape[-1]), ("dimension", node, width), self.log) == int(tensor.shape[-1]))

    def _shape(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        node = self.node_of(args[0])
        if node is None:
            return result
        if isinstance(result, torch.Size):
            return torch.Size([Size.of(n, ("dimension", node, i), self.log) for i, n in enumerate(result)])
        axis = int(args[1] if len(args) > 1 else kwargs["dim"]) % args[0].dim()
        return Size.of(int(result), ("dimension", node, axis), self.log)


_GET_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_SIZE = torch.Tensor.size
_TENSORS = (torch.tensor, torch.as_tensor, torch.scalar_tensor)
"""What makes a tensor out of a number: it enters the computation."""


def integers(value: Any) -> Iterator[int]:
    """All integers of nested arguments in order of appearance, booleans left out."""
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from integers(item)
    elif isinstance(value, dict):
        yield from integers(list(value.values()))


def match(called: Sequence[int], reached: Sequence[int]) -> list[Expression]:
    """For each integer that reached an ATen operator how the code computed it.

    `called` are those that the torch function got. Where the two lists differ (defaults filled in), an integer is
    found by its value, and counts as a number of the code where several could have been meant.
    """
    common = min(len(called), len(reached))
    if common and list(map(int, called[:common])) == list(map(int, reached[:common])):
        return [*map(expression_of, called[:common]), *(("number", int(n)) for n in reached[common:])]
    found = []
    for value in reached:
        same = {expression_of(c) for c in called if int(c) == value}
        sized = {e for e in same if e[0] != "number"}
        found.append(next(iter(sized)) if len(sized) == 1 else ("number", int(value)))
    return found
