"""The signature of one fused piece of work: what a latency table measures.

Legend: H, W input height and width; k window; s stride; p padding; d dilation; g groups.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any

CONTRACTIONS = ("conv", "linear", "matmul", "attention")
"""Operators whose c_in and c_out are sizes of their own; everywhere else one follows from the other."""

OPERATORS = (
    *CONTRACTIONS,
    *("max_pool", "avg_pool", "mean", "add", "mul", "affine", "activation", "cat"),
    *("layer_norm", "softmax", "copy", "transpose"),
)
"""What a kernel may do: contractions first, then what runtimes run beside them.

`mean` is the global average over H x W; `affine` a per-channel scale and shift (a norm that could not be folded);
`cat` joins its inputs along channels, with `c_in == c_out` the total; in a network its `parts` are known too.

`attention` is all that runs between the projections: heads split off, softmax(q k^T) v, heads joined; `groups` are its
heads, `c_in` the width of the queries over all heads, `c_out` that of the values, `spatial` (queries, keys).
`matmul` multiplies two activations, [batch, groups, spatial, c_in / groups] with [batch, groups, c_in / groups,
c_out / groups]. `layer_norm` runs over the channels, which come last, `softmax` over the last of `spatial`.
`copy` moves rows of channels (permuting positions, roll, pad), `transpose` brings the channels from first to last.
"""

BYTES_PER_ELEMENT = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


@dataclass(frozen=True, kw_only=True, order=True)
class Kernel:
    """One operator with its shapes and everything that the runtime fuses into it.

    `epilogue` names what follows inside the same kernel, in order: `bias`, `add` (a second input of the output's
    shape; in `attention` a bias or mask on the scores), `relu`, `relu6`, `silu`, `hardswish`, `hardsigmoid`,
    `sigmoid`, `gelu`. `parts` are the channels of each input of a `cat` in a network; as a kernel of its own it is
    timed with two halves.
    """

    operator: str
    c_in: int
    c_out: int
    batch: int = 1
    spatial: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    epilogue: tuple[str, ...] = ()
    precision: str = "fp32"
    sparsity: str = "dense"
    parts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise ValueError(f"operator {self.operator!r} is not one of {', '.join(OPERATORS)}")
        if min(self.c_in, self.c_out, self.batch, self.groups, *self.spatial) < 1:
            raise ValueError(f"sizes must be at least 1: {self}")
        if self.c_in % self.groups or self.c_out % self.groups:
            raise ValueError(f"groups={self.groups} divides not both c_in={self.c_in} and c_out={self.c_out}")
        if self.parts and (self.operator != "cat" or min(self.parts) < 1 or sum(self.parts) != self.c_in):
            raise ValueError(f"parts={self.parts} are not the channels that a cat joins to c_in={self.c_in}")

    @property
    def key(self) -> str:
        """A short, unique, readable name: `conv 32>64 g1 b1 56x56 k3x3 s1x1 p1x1 d1x1 +bias+relu fp32 dense`."""
        parts = [self.operator, f"{self.c_in}>{self.c_out}", f"g{self.groups}", f"b{self.batch}"]
        for letter, sizes in (
            ("", self.spatial),
            ("k", self.window),
            ("s", self.stride),
            ("p", self.padding),
            ("d", self.dilation),
        ):
            if sizes:
                parts.append(letter + "x".join(map(str, sizes)))
        if self.parts:
            parts.append("of " + "+".join(map(str, self.parts)))
        if self.epilogue:
            parts.append("+" + "+".join(self.epilogue))
        return " ".join([*parts, self.precision, self.sparsity])

    @property
    def is_depthwise(self) -> bool:
        """Whether each input channel is convolved alone."""
        return self.operator == "conv" and self.groups > 1 and self.groups == self.c_in

    @property
    def family(self) -> str:
        """Kernels of one family share the shape of their staircase and one correction of the cost model."""
        if self.operator != "conv":
            return self.operator
        if self.is_depthwise:
            return "depthwise"
        if self.groups > 1:
            return "grouped"
        return "pointwise" if prod(self.window) == 1 else "conv"

    @property
    def spatial_out(self) -> tuple[int, ...]:
        """Output height and width."""
        if self.operator == "mean":
            return (1,) * len(self.spatial)
        if self.operator == "attention":
            return self.spatial[:1]
        if not self.window:
            return self.spatial
        return tuple(
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                self.spatial, self.window, self.stride, self.padding, self.dilation, strict=True
            )
        )

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the contraction; 0 for anything else."""
        if self.operator == "conv":
            return self.batch * self.c_out * self.c_in // self.groups * prod(self.window) * prod(self.spatial_out)
        if self.operator == "attention":
            return self.batch * prod(self.spatial) * (self.c_in + self.c_out)
        if self.operator in ("linear", "matmul"):
            return self.batch * self.c_in * self.c_out // self.groups * prod(self.spatial)
        return 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        if self.operator not in ("conv", "linear"):
            return 0
        elements = self.c_out * self.c_in // self.groups * (prod(self.window) if self.window else 1)
        return elements * BYTES_PER_ELEMENT[self.precision]

    @property
    def input_bytes(self) -> int:
        """Bytes of the first input."""
        return self.batch * self.c_in * prod(self.spatial) * BYTES_PER_ELEMENT[self.precision]

    @property
    def num_bytes(self) -> int:
        """Bytes read and written once: inputs, weights, second input of an add, output."""
        outputs = self.batch * self.c_out * prod(self.spatial_out)
        elements = self.batch * self.c_in * prod(self.spatial) + outputs
        if self.operator == "matmul":
            elements += self.batch * self.c_out * self.c_in // self.groups
        elif self.operator == "attention":
            queries, keys = self.spatial
            elements = self.batch * (queries + keys) * (self.c_in + self.c_out)
        if self.operator == "add" or "add" in self.epilogue:
            elements += outputs
        return elements * BYTES_PER_ELEMENT[self.precision] + self.weight_bytes

    @property
    def sizes(self) -> tuple[int, int, int]:
        """What its latency is a function of: groups, c_in and c_out of one group; c_out is 1 where it follows."""
        if self.operator not in CONTRACTIONS:
            return 1, self.c_in, 1
        return self.groups, self.c_in // self.groups, self.c_out // self.groups

    def resized(self, sizes: tuple[int, int, int]) -> Kernel:
        """The same piece of work with other `sizes`; what it is joined from is not known then."""
        groups, c_in, c_out = sizes
        if self.operator not in CONTRACTIONS:
            return replace(self, c_in=c_in, c_out=c_in, parts=())
        return replace(self, c_in=groups * c_in, c_out=groups * c_out, groups=groups)

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the defaults, in field order."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, (v, default) in values.items() if v != default}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Kernel:
        """Inverse of `to_json`. `ValueError` for an unknown field, a wrong type or a size below 1."""
        known = {f.name: f.type for f in fields(cls)}
        unknown = sorted(set(document) - set(known))
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r} of a kernel")
        values: dict[str, Any] = {}
        for name, value in document.items():
            kind = known[name]
            if isinstance(value, list) and str(kind).startswith("tuple"):
                value = tuple(value)
                item = str if "str" in str(kind) else int
                if not all(type(v) is item for v in value):
                    raise ValueError(f"field {name!r} holds {value!r}, expected a list of {item.__name__}")
            elif type(value).__name__ != str(kind):
                raise ValueError(f"field {name!r} is {value!r}, expected {kind}")
            values[name] = value
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"a kernel lacks a field: {error}") from None
