"""Attention as one operator."""

from __future__ import annotations

import numpy as np

from edgeprune.graph.rules.call import Call, Results, rule
from edgeprune.graph.rules.contractions import broadcast_dims


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Results:
    """softmax(q k^T scale + mask) v with q [..., L, E], k [..., S, E], v [..., S, E_v].

    Without a given scale it is E ** -0.5 and would change with the width. With `enable_gqa` every head of k and v
    serves several heads of q.
    """
    q, k, v = call.of("query"), call.of("key"), call.of("value")
    if call.arguments.get("enable_gqa") and len(q) > 2 and k[-3].shape[1] != q[-3].shape[1]:
        times = q[-3].shape[1] // k[-3].shape[1]
        k = (*k[:-3], np.repeat(k[-3], times, axis=1), *k[-2:])
        v = (*v[:-3], np.repeat(v[-3], times, axis=1), *v[-2:])
    call.unite(q[-1], k[-1], "queries and keys are compared along this dimension")
    if call.arguments.get("scale") is None:
        call.fix(q[-1], "the operator scales by this width, which the call does not give")
    call.unite(k[-2], v[-2], "keys and values are paired along this dimension")
    call.fix(k[-2], "it normalises over a dimension that holds channels")
    if call.arguments.get("is_causal"):
        call.fix(q[-2], "it compares the positions of channels")
    heads = broadcast_dims(call, broadcast_dims(call, q[:-2], k[:-2]), v[:-2])
    if call.given("attn_mask"):
        mask = call.of("attn_mask")
        call.fix(mask[-1], "it normalises over a dimension that holds channels")
        rows = broadcast_dims(call, (*heads, q[-2]), mask[:-1])
        heads, length = rows[:-1], rows[-1]
    else:
        length = q[-2]
    return (*heads, length, v[-1])
