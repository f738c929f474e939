"""Attention and asked columns of its softmax in one pass, for CUDA: flash attention (Dao et al. 2022) in Triton.

Imported only where it is asked for: Triton is no requirement. Columns are kept apart from the values here, so that
only the blocks of the first L keys, the text's, have to do with them. A program has a block of the queries, or of the
keys, of one head of one row; the backward kernel makes its parts of the softmax anew from the queries' log sums.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of float32's products: three on tensor cores, near 1e-6; plain TF32 would be off by 1e-3.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _tile(start, rows, width, row_block: tl.constexpr, width_block: tl.constexpr):
    """Offsets and mask of some rows of a contiguous (rows, width) matrix."""
    row, column = start + tl.arange(0, row_block)[:, None], tl.arange(0, width_block)[None, :]
    return row * width + column, (row < rows) & (column < width)


@triton.jit
def _load(matrix, start, rows, width, row_block: tl.constexpr, width_block: tl.constexpr):
    at, inside = _tile(start, rows, width, row_block, width_block)
    return tl.load(matrix + at, inside, 0.0)


@triton.jit
def _store(matrix, values, start, rows, width, row_block: tl.constexpr, width_block: tl.constexpr):
    at, inside = _tile(start, rows, width, row_block, width_block)
    tl.store(matrix + at, values, inside)


@triton.jit
def _forward(
    q, k, v, columns, out, chosen, log_sums, scale, heads, queries, keys, tokens, width, asked,
    block: tl.constexpr, width_block: tl.constexpr, asked_block: tl.constexpr,
):  # fmt: skip
    head, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * block
    k, v, columns = k + head * keys * width, v + head * keys * width, columns + head // heads * tokens * asked
    q_block = _load(q + head * queries * width, start, queries, width, block, width_block)
    highest = tl.full((block,), float("-inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    sums, picked = tl.zeros((block, width_block), tl.float32), tl.zeros((block, asked_block), tl.float32)
    for key in range(0, keys, block):
        k_block = _load(k, key, keys, width, block, width_block)
        v_block = _load(v, key, keys, width, block, width_block)
        logits = tl.dot(q_block, tl.trans(k_block), input_precision=PRECISION) * scale
        logits = tl.where((key + tl.arange(0, block) < keys)[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        weights, faded = tl.exp(logits - higher[:, None]), tl.exp(highest - higher)
        total, highest = total * faded + tl.sum(weights, 1), higher
        weights = weights.to(v_block.dtype)
        sums = sums * faded[:, None] + tl.dot(weights, v_block, input_precision=PRECISION)
        picked *= faded[:, None]
        if key < tokens:
            ones = _load(columns, key, tokens, asked, block, asked_block).to(v_block.dtype)
            picked += tl.dot(weights, ones, input_precision=PRECISION)
    _store(out + head * queries * width, sums / total[:, None], start, queries, width, block, width_block)
    picked = picked / total[:, None]
    _store(chosen + head * queries * asked, picked, start, queries, asked, block, asked_block)
    row = start + tl.arange(0, block)
    tl.store(log_sums + head * queries + row, highest + tl.log(total), row < queries)


@triton.jit
def _backward(
    q, k, v, columns, log_sums, d_out, d_chosen, shared, dq, dk, dv, scale, heads, queries, keys, tokens, width, asked,
    block: tl.constexpr, width_block: tl.constexpr, asked_block: tl.constexpr, of_keys: tl.constexpr,
):  # fmt: skip
    """of_keys: dk and dv of a block of keys, over all queries; else dq of a block of queries, over all keys."""
    head, own = tl.program_id(1).to(tl.int64), tl.program_id(0) * block
    q, d_out, dq = q + head * queries * width, d_out + head * queries * width, dq + head * queries * width
    k, v = k + head * keys * width, v + head * keys * width
    dk, dv = dk + head * keys * width, dv + head * keys * width
    columns, d_chosen = columns + head // heads * tokens * asked, d_chosen + head * queries * asked
    log_sums, shared = log_sums + head * queries, shared + head * queries
    first, second = tl.zeros((block, width_block), tl.float32), tl.zeros((block, width_block), tl.float32)
    for other in range(0, queries if of_keys else keys, block):
        query, key = (other, own) if of_keys else (own, other)
        q_block = _load(q, query, queries, width, block, width_block)
        d_block = _load(d_out, query, queries, width, block, width_block)
        k_block = _load(k, key, keys, width, block, width_block)
        v_block = _load(v, key, keys, width, block, width_block)
        row, column = query + tl.arange(0, block), key + tl.arange(0, block)
        sums, mean = tl.load(log_sums + row, row < queries, 0.0), tl.load(shared + row, row < queries, 0.0)
        logits = tl.dot(q_block, tl.trans(k_block), input_precision=PRECISION) * scale
        inside = (row < queries)[:, None] & (column < keys)[None, :]
        p = tl.where(inside, tl.exp(logits - sums[:, None]), 0.0)
        d_p = tl.dot(d_block, tl.trans(v_block), input_precision=PRECISION)
        if key < tokens:
            ones = _load(columns, key, tokens, asked, block, asked_block)
            d_picked = _load(d_chosen, query, queries, asked, block, asked_block)
            d_p += tl.dot(d_picked, tl.trans(ones), input_precision=PRECISION)
        d_logits = (p * (d_p - mean[:, None]) * scale).to(k_block.dtype)
        if of_keys:
            first += tl.dot(tl.trans(d_logits), q_block, input_precision=PRECISION)
            second += tl.dot(tl.trans(p.to(d_block.dtype)), d_block, input_precision=PRECISION)
        else:
            first += tl.dot(d_logits, k_block, input_precision=PRECISION)
    if of_keys:
        _store(dk, first, own, keys, width, block, width_block)
        _store(dv, second, own, keys, width, block, width_block)
    else:
        _store(dq, first, own, queries, width, block, width_block)


needs_cuda = isinstance(_forward, triton.JITFunction)  # not where Triton interprets: with TRITON_INTERPRET=1


def _sizes(q: Tensor, k: Tensor, columns: Tensor) -> tuple[tuple[int, ...], dict[str, int]]:
    """Of a kernel: (heads, queries, keys, tokens, width, asked), and the blocks."""
    power, width, asked = triton.next_power_of_2, q.shape[3], columns.shape[2]
    sizes = (q.shape[1], q.shape[2], k.shape[2], columns.shape[1], width, asked)
    block = 128 // q.element_size()  # queries and keys at a time, what a GPU's shared memory has room for
    return sizes, {"block": block, "width_block": max(16, power(width)), "asked_block": max(16, power(asked))}


class Attention(torch.autograd.Function):
    """`attention.attention_with_columns` with its gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, columns = (x.contiguous() for x in (q, k, v, columns.float()))
        out, log_sums = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        chosen = q.new_empty(*q.shape[:3], columns.shape[2], dtype=torch.float32)
        sizes, blocks = _sizes(q, k, columns)
        grid = (triton.cdiv(q.shape[2], blocks["block"]), q.shape[0] * q.shape[1])
        tensors = (q, k, v, columns, out, chosen, log_sums)
        with torch.cuda.device_of(q):  # which may not be the current card, as in a gradient it is
            _forward[grid](*tensors, q.shape[3] ** -0.5, *sizes, **blocks)
        ctx.save_for_backward(q, k, v, columns, out, chosen, log_sums)
        return out, chosen

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_chosen: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, columns, out, chosen, log_sums = ctx.saved_tensors
        d_out, d_chosen = d_out.contiguous(), d_chosen.contiguous()
        # Of every query sum_s p_s dp_s: the softmax's gradient takes it off.
        shared = (d_out.float() * out.float()).sum(-1) + (d_chosen * chosen).sum(-1)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        sizes, blocks = _sizes(q, k, columns)
        tensors = (q, k, v, columns, log_sums, d_out, d_chosen, shared, dq, dk, dv)
        for of_keys, length in ((False, q.shape[2]), (True, k.shape[2])):
            grid = (triton.cdiv(length, blocks["block"]), q.shape[0] * q.shape[1])
            _backward[grid](*tensors, q.shape[3] ** -0.5, *sizes, **blocks, of_keys=of_keys)
        return dq, dk, dv, None


attention_with_columns = Attention.apply
