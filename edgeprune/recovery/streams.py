"""Which layer ends a residual branch, told by the sums that read it while a model runs.

Legend: in y = s + f(x) the *stream* is y, s the shortcut, and the layer that ends f, alone or with a batch norm behind
it, the *end* of the branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

SUMS = frozenset(("add", "add_", "__add__", "__radd__", "__iadd__"))
Handler = Callable[[str, torch.Tensor, torch.Tensor], Callable[[torch.Tensor], None] | None]


class Streams(TorchFunctionMode):
    """While it is entered, every sum of two tensors of one shape is shown to `meet(layer, branch, shortcut)`.

    Only sums are shown of which an operand is the output of one of the `layers`, or of a batch norm right behind one,
    and the first such sum of each output; of two such operands the first is the branch. What `meet` writes into the
    branch is what is summed; what it returns is given the sum.
    """

    def __init__(self, layers: Mapping[str, torch.nn.Module], norms: Iterable[torch.nn.Module], meet: Handler) -> None:
        super().__init__()
        self.meet = meet
        self.layer_of: Any = WeakTensorKeyDictionary()  # what a layer or its norm gave, while it lives
        self.hooks: list[RemovableHandle] = []
        for name, layer in layers.items():
            self.hooks.append(layer.register_forward_hook(self._layer_hook(name)))
        for norm in norms:
            self.hooks.append(norm.register_forward_hook(self._norm_hook))

    def __exit__(self, *details: Any) -> None:
        """The hooks go with the mode."""
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*details)  # type: ignore[no-untyped-call]

    def _layer_hook(self, name: str) -> Callable[[Any, Any, torch.Tensor], None]:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            self.layer_of[output] = name

        return hook

    def _norm_hook(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        if inputs[0] in self.layer_of:
            self.layer_of[output] = self.layer_of[inputs[0]]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The call itself, with the sum shown before and after."""
        then = None
        if getattr(func, "__name__", "") in SUMS and not kwargs and _are_alike(args):
            then = self._shown(args)
        result = func(*args, **(kwargs or {}))
        if then is not None:
            then(result)
        return result

    def _shown(self, operands: tuple[torch.Tensor, torch.Tensor]) -> Callable[[torch.Tensor], None] | None:
        for branch, shortcut in (operands, operands[::-1]):
            if branch in self.layer_of:
                return self.meet(self.layer_of.pop(branch), branch, shortcut)
        return None


def _are_alike(operands: tuple[Any, ...]) -> bool:
    return (
        len(operands) == 2
        and all(isinstance(operand, torch.Tensor) for operand in operands)
        and operands[0].shape == operands[1].shape
        and operands[0] is not operands[1]
    )
