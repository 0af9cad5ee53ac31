"""The rule for attention with weights of its own, and what it becomes when its widths differ.

The forward pass here computes what the layer's own computes, with operators that can be differentiated twice,
and marks where neurons are read and made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_split.layers.registry import register_layer_rule
from lightning_split.layers.rule import AxisPorts, LayerRule, Marks, Port

__all__ = ["WideMultiheadAttention"]

Axes = dict[str, dict[int, AxisPorts]]


class WideMultiheadAttention(nn.MultiheadAttention):
    """The class of an ``nn.MultiheadAttention`` that has other widths than ``embed_dim`` inside.

    Surgery puts it in the place of the class; nobody makes instances of it. Names of parameters are the same.
    Scores stay divided by the root of the width that heads have had, which ``embed_dim`` tells.
    ``_qkv_same_embed_dim`` is false, which keeps the inference kernels of Transformer layers away, as they
    know one width only.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`torch.nn.MultiheadAttention`."""
        rest = need_weights, attn_mask, average_attn_weights, is_causal
        if not query.is_nested:
            return _attend(self, None, query, key, value, key_padding_mask, *rest)
        # nn.TransformerEncoder packs padded sequences in eval mode, the same for query, key and value.
        lengths = torch.tensor([len(sample) for sample in query.unbind()], device=query.device)
        x = query.to_padded_tensor(0.0)
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        out, weights = _attend(self, None, x, x, x, padding, *rest)
        return torch._nested_tensor_from_mask(out, ~padding), weights

    def extra_repr(self) -> str:
        """Widths that the child's line does not show."""
        return (
            f"num_heads={self.num_heads}, query_width={_query_width(self)}, value_width={_value_width(self)}"
        )


class _AttentionRule(LayerRule):
    """``nn.MultiheadAttention``: a neuron is one channel of every head."""

    role = "mixer"
    linear = True
    attends = True

    def axes(self, layer: nn.Module) -> Axes:
        assert isinstance(layer, nn.MultiheadAttention)
        q, k, v = ((port,) * layer.num_heads for port in ("out:query", "out:key", "out"))
        return {
            "in_proj_weight": {0: q + k + v, 1: "in"},
            "q_proj_weight": {0: q, 1: "in:query"},
            "k_proj_weight": {0: k, 1: "in:key"},
            "v_proj_weight": {0: v, 1: "in:value"},
            "in_proj_bias": {0: q + k + v},
        }

    def port_size(self, layer: nn.Module, port: Port) -> int | None:
        assert isinstance(layer, nn.MultiheadAttention)
        if port in ("out:query", "out:key"):
            return _query_width(layer) // int(layer.num_heads)
        if port == "out":
            return _value_width(layer) // int(layer.num_heads)
        return super().port_size(layer, port)

    def told(self, layer: nn.Module, shapes: Mapping[str, Sequence[int]]) -> Mapping[Port, int]:
        assert isinstance(layer, nn.MultiheadAttention)
        projected = shapes.get("out_proj.weight")  # one tensor holds the rows of all three
        return {} if projected is None else {"out": projected[1] // int(layer.num_heads)}

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        assert isinstance(layer, nn.MultiheadAttention)
        packed = layer.in_proj_weight is not None
        query, layer.kdim, layer.vdim = (
            sizes["in" if packed else f"in:{name}"] for name in ("query", "key", "value")
        )
        inside = {sizes[port] * layer.num_heads for port in ("out:query", "out:key", "out")}
        wide = {layer.embed_dim, query} | inside != {layer.embed_dim}
        layer._qkv_same_embed_dim = packed and not wide
        layer.__class__ = WideMultiheadAttention if wide else nn.MultiheadAttention

    def refusal(self, layer: nn.Module) -> str | None:
        assert isinstance(layer, nn.MultiheadAttention)
        if type(layer) not in (nn.MultiheadAttention, WideMultiheadAttention):
            return "growth would have to change its class, and it is one derived from nn.MultiheadAttention"
        if layer.bias_k is not None or layer.add_zero_attn:
            return "it adds keys and values of its own (add_bias_kv or add_zero_attn)"
        return None

    def neuron_axis(self, layer: nn.Module, activation: Tensor) -> int:
        return -1

    def forward(self, layer: nn.Module, marks: Marks, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(layer, nn.MultiheadAttention)
        return _attend(layer, marks, *args, **kwargs)


def _value_width(layer: nn.MultiheadAttention) -> int:
    if layer.in_proj_weight is None:
        return len(layer.v_proj_weight)
    return int(layer.out_proj.weight.shape[1])


def _query_width(layer: nn.MultiheadAttention) -> int:
    if layer.in_proj_weight is None:
        return len(layer.q_proj_weight)
    return (len(layer.in_proj_weight) - _value_width(layer)) // 2


def _attend(
    layer: nn.MultiheadAttention,
    marks: Marks | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What ``nn.MultiheadAttention`` computes, whatever the widths of its weights; ``marks`` if watched."""
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    packed, batched = layer.in_proj_weight is not None, query.ndim == 3
    inputs = [query, key, value]
    if marks is not None:
        found: dict[tuple[int, str], Tensor] = {}  # what is read twice is one reading
        for i, name in enumerate(("query", "key", "value")):
            port = "in" if packed else f"in:{name}"
            place = id(inputs[i]), port
            if place not in found:
                found[place] = marks.read(port, inputs[i], -1)
        inputs = [
            found[id(x), "in" if packed else f"in:{name}"]
            for x, name in zip(inputs, ("query", "key", "value"), strict=True)
        ]
    if not batched:
        inputs = [x.unsqueeze(0) for x in inputs]
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
    elif not layer.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    q, k, v = _projected(layer, marks, inputs)
    mask = _mask(layer, q, k, attn_mask, key_padding_mask, is_causal and not need_weights)
    dropout = layer.dropout if layer.training else 0.0
    scale = (int(layer.embed_dim) // int(layer.num_heads)) ** -0.5
    weights = None
    if marks is None and not need_weights:
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    else:
        scores = (q * scale) @ k.transpose(-2, -1)
        scores = scores if mask is None else scores + mask
        # Where nothing may be seen, the fused kernels give zero, and softmax gives NaN.
        weights = F.softmax(scores, -1) if need_weights else torch._safe_softmax(scores, -1)
        weights = F.dropout(weights, dropout) if dropout else weights
        y = weights @ v
    out = layer.out_proj(y.transpose(1, 2).flatten(2))
    if not batched:
        out = out.squeeze(0)
    elif not layer.batch_first:
        out = out.transpose(0, 1)
    if not need_weights or weights is None:
        return out, None
    weights = weights.mean(1) if average_attn_weights else weights
    return out, weights if batched else weights.squeeze(0)


def _projected(layer: nn.MultiheadAttention, marks: Marks | None, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Queries, keys and values, ``(samples, heads, positions, channels)``."""
    widths = [_query_width(layer), _query_width(layer), _value_width(layer)]
    if layer.in_proj_weight is None:
        weights: Sequence[Tensor] = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    else:
        weights = layer.in_proj_weight.split(widths)
    bias = layer._parameters["in_proj_bias"]
    biases: Sequence[Tensor | None] = (None,) * 3 if bias is None else bias.split(widths)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (layer.num_heads, -1))
        for x, w, b in zip(inputs, weights, biases, strict=True)
    )
    if marks is not None:
        v = marks.made("out", v, -1)  # first, so that the group of the values has the plain name
        q, k = marks.made("out:query", q, -1), marks.made("out:key", k, -1)
    return [x.transpose(1, 2) for x in (q, k, v)]


def _mask(
    layer: nn.MultiheadAttention,
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    causal: bool,
) -> Tensor | None:
    """What is added to the scores, to be broadcast to ``(samples, heads, queries, keys)``."""
    if causal and key_padding_mask is None:  # the hint stands for the mask
        attn_mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, q)
        if mask.ndim == 3:
            mask = mask.unflatten(0, (len(q), layer.num_heads))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q)[:, None, None, :]
        mask = padding if mask is None else mask + padding
    return mask


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


for _attention_type in (nn.MultiheadAttention, WideMultiheadAttention):
    register_layer_rule(_attention_type, _AttentionRule())
