"""SAM2's memory attention over compact memory, for many classes at once.

    embedding ─ layers: self-attention, attention to memory, MLP ─ conditioned embedding, one per class

The layers and weights are SAM2's own, and with memory on the embedding's grid so is the result. What differs:

- The memory may be on a coarser grid than the embedding (`SAM2SGP`'s `memory_pool`): a token then stands for a square
  of places, and its rotary position is the square's centre. Attention to memory is the largest part of a query at
  1024 px, and falls with the square of the factor. Pooling it is EfficientTAM's idea (arXiv 2411.18933).
- Before the first attention to memory all classes of an image are the same, so that is computed once per image.
- Memory tokens are narrower than the values made of them, so on a CPU, where no gradient is needed, attention averages
  the tokens and makes a value of the average: softmax(A) (m W + b) = (softmax(A) m) W + b.
"""

import torch
import torch.nn.functional as F
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.sam.transformer import RoPEAttention
from torch import Tensor

from sam2sgp.errors import ConfigError
from sam2sgp.networks.rows import for_each_class

# Share of the positional encoding that SAM2 adds to the embedding.
INPUT_ENCODING = 0.1
# Bytes of attention weights held at a time where they are held at all; what fits into a cache is fastest.
WEIGHT_BYTES = 4 * 2**20


def attend_to_memory(
    attention: MemoryAttention,
    embedding: Tensor,
    position: Tensor,
    memory: Tensor,
    memory_position: Tensor,
    pool: int = 1,
) -> Tensor:
    """Condition embeddings on memory.

    Args:
        attention: SAM2's module.
        embedding: (B, D, g, g). position: its positional encoding, (B, D, g, g).
        memory: (B, C, K, M, T / pool^2), K items for each image and class, T = g * g.
        memory_position: (B, C, K, M, T / pool^2) positional encoding of it.
        pool: side of the square of places that a memory token stands for.

    Returns:
        (B * C, D, g, g).
    """
    classes = memory.shape[1]
    side = embedding.shape[-1]
    tokens, position = (values.flatten(2).transpose(1, 2).contiguous() for values in (embedding, position))
    values = _in_sequence(memory)
    keys = _in_sequence(memory + memory_position)
    cross = attention.layers[0].cross_attn_image
    at_query = rotation(side, 1, cross, tokens.device)
    at_memory = rotation(side, pool, cross, tokens.device)
    if attention.pos_enc_at_input:
        tokens = tokens + INPUT_ENCODING * position
    for number, layer in enumerate(attention.layers):
        normed = layer.norm1(tokens)
        tokens = tokens + layer.dropout1(_attend(layer.self_attn, normed, normed, normed, at_query, at_query))
        if number == 0:
            tokens = for_each_class(tokens, classes)
        attended = _attend(layer.cross_attn_image, layer.norm2(tokens), keys, values, at_query, at_memory)
        tokens = tokens + layer.dropout2(attended)
        tokens = tokens + layer.dropout3(_mlp(layer, layer.norm3(tokens)))
    return attention.norm(tokens).transpose(1, 2).unflatten(2, (side, side))


def check_layout(attention: MemoryAttention) -> None:
    """Raise `ConfigError` unless a memory attention is put together as in all of SAM 2.1's models."""
    for layer in attention.layers:
        positions = layer.pos_enc_at_attn, layer.pos_enc_at_cross_attn_queries, layer.pos_enc_at_cross_attn_keys
        if positions != (False, False, True) or layer.activation_str != "relu":
            raise ConfigError("The backbone's memory attention adds positions, or activates, as no model of SAM 2.1.")


def rotation(side: int, pool: int, attention: RoPEAttention, device: torch.device) -> Tensor:
    """The axial rotary encoding (P, d / 2), complex, on a grid of P = (side / pool)^2 squares.

    The first half of the d / 2 frequencies turns with x, the second with y, as in SAM2's `compute_axial_cis`.
    """
    dim = attention.internal_dim // attention.num_heads
    theta = attention.compute_cis.keywords["theta"]
    frequencies = theta ** -(torch.arange(0, dim, 4, device=device)[: dim // 4].float() / dim)
    places = torch.arange(side // pool, device=device) * pool + (pool - 1) / 2
    angles = torch.outer(places, frequencies)
    length = len(places)
    x = angles[None].expand(length, -1, -1)
    y = angles[:, None].expand(-1, length, -1)
    turned = torch.cat([x, y], -1).flatten(0, 1)
    return torch.complex(turned.cos(), turned.sin())


def _in_sequence(memory: Tensor) -> Tensor:
    """(B, C, K, M, T) -> (B * C, K * T, M)."""
    return memory.transpose(3, 4).flatten(2, 3).flatten(0, 1).contiguous()


def _attend(
    attention: RoPEAttention, query: Tensor, key: Tensor, value: Tensor, at_query: Tensor, at_key: Tensor
) -> Tensor:
    """Attention of (R, T, D) to (R, L, M) with rotated queries and keys; L is a multiple of the key grid's places."""
    heads = attention.num_heads
    query = _rotated(attention.q_proj, query, heads, at_query)
    key = _rotated(attention.k_proj, key, heads, at_key)
    if _averages_first(query, value):
        return attention.out_proj(_average_first(attention, query, key, value).transpose(1, 2).flatten(2))
    value = attention.v_proj(value).unflatten(-1, (heads, -1)).transpose(1, 2)
    dropout = attention.dropout_p if attention.training else 0.0
    attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return attention.out_proj(attended.transpose(1, 2).flatten(2))


def _averages_first(query: Tensor, memory: Tensor) -> bool:
    """Whether that is exact and faster than PyTorch's fused attention, which takes only values as wide as keys."""
    return memory.shape[-1] < query.shape[-1] and query.device.type == "cpu" and not torch.is_grad_enabled()


def _average_first(attention: RoPEAttention, query: Tensor, key: Tensor, memory: Tensor) -> Tensor:
    """Attention of heads (R, h, T, d) to memory (R, L, M) through keys (R, h, L, d): (R, h, T, d)."""
    rows, heads, length, dim = key.shape
    count = max(1, WEIGHT_BYTES // (4 * rows * heads * length))
    tokens, transposed = memory[:, None].expand(-1, heads, -1, -1), key.transpose(2, 3)
    parts = [torch.softmax(part @ transposed, -1) @ tokens for part in (query * dim**-0.5).split(count, 2)]
    weight, bias = (part.unflatten(0, (heads, -1)) for part in (attention.v_proj.weight, attention.v_proj.bias))
    return torch.cat(parts, 2) @ weight.transpose(1, 2) + bias[:, None]


def _rotated(projection: torch.nn.Linear, values: Tensor, heads: int, turn: Tensor) -> Tensor:
    """Project (R, L, D) to heads (R, h, L, d), rotated by (P, d / 2); L is P or, for several items one after the other,
    a multiple of it.

    SAM2's pairs of channels (2i, 2i + 1) are complex numbers.
    """
    projected = projection(values)
    pairs = projected.float().unflatten(1, (-1, len(turn))).unflatten(-1, (-1, 2))
    turned = torch.view_as_real(torch.view_as_complex(pairs) * turn.repeat(1, heads)).to(projected.dtype)
    return turned.flatten(-2).flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)


def _mlp(layer: MemoryAttentionLayer, values: Tensor) -> Tensor:
    hidden = F.relu(layer.linear1(values), inplace=not torch.is_grad_enabled())
    return layer.linear2(layer.dropout(hidden))
