"""The network of the bundled model (a small Llama) and its optimiser.

Rotary embedding turns neighbouring pairs, as llama.cpp does for the `llama`
architecture, so the weights go into the GGUF file without a permutation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the network, as they are written to the GGUF file."""

    vocabulary: int = 2048
    layers: int = 8
    width: int = 256
    heads: int = 8
    kv_heads: int = 4
    hidden: int = 640
    context: int = 2048
    rope_base: float = 10000.0
    epsilon: float = 1e-5

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learnt gain."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """The normed vectors."""
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each neighbouring pair of x (batch, heads, time, width) by its angle."""
    pairs = x.float().unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by the way that is fastest on a CPU at this length."""
    time = q.shape[-2]
    if time > 512:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if time > 128:
        whole = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
        return whole.to(q.dtype)
    later = torch.full((time, time), -1e4, dtype=q.dtype).triu(1)
    flat = (q.shape[0] * q.shape[1], time, time)
    scores = torch.baddbmm(later.expand(flat), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v.flatten(0, 1)).view_as(q)


class Block(nn.Module):
    """Attention with grouped keys and values, then a SwiGLU feed-forward part."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_width = shape.kv_heads * shape.head_width
        self.attn_norm = RMSNorm(shape.width, shape.epsilon)
        self.attn_q = nn.Linear(shape.width, shape.width, bias=False)
        self.attn_k = nn.Linear(shape.width, kv_width, bias=False)
        self.attn_v = nn.Linear(shape.width, kv_width, bias=False)
        self.attn_output = nn.Linear(shape.width, shape.width, bias=False)
        self.ffn_norm = RMSNorm(shape.width, shape.epsilon)
        self.ffn_gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.ffn_up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.ffn_down = nn.Linear(shape.hidden, shape.width, bias=False)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What attention adds to x."""
        batch, time, _ = x.shape
        size = self.shape
        q = self.attn_q(x).view(batch, time, size.heads, size.head_width).transpose(1, 2)
        k = self.attn_k(x).view(batch, time, size.kv_heads, size.head_width).transpose(1, 2)
        v = self.attn_v(x).view(batch, time, size.kv_heads, size.head_width).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = size.heads // size.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = attention(q, k, v)
        return self.attn_output(out.transpose(1, 2).reshape(batch, time, size.width))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The vectors after the block."""
        x = x + self.attend(self.attn_norm(x), cos, sin)
        normed = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(normed)) * self.ffn_up(normed))


class Llama(nn.Module):
    """The whole network; the output head is the token embedding."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = RMSNorm(shape.width, shape.epsilon)
        steps = torch.arange(0, shape.head_width, 2).float() / shape.head_width
        angles = torch.outer(torch.arange(shape.context).float(), shape.rope_base**-steps)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                wide = name.startswith("token_embd")
                nn.init.normal_(parameter, std=0.02 if wide else parameter.shape[1] ** -0.5 * 0.6)
            if name.endswith(("attn_output.weight", "ffn_down.weight")):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits after every token."""
        time = tokens.shape[1]
        cos, sin = self.cos[:time], self.sin[:time]
        x = self.token_embd(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(self.output_norm(x), self.token_embd.weight)


def orthogonal(gradient: Tensor, rounds: int = 5) -> Tensor:
    """Newton-Schulz iteration: the nearest orthogonal matrices to a stack of matrices."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = gradient.shape[-2] > gradient.shape[-1]
    x = gradient.mT if tall else gradient
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(rounds):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Momentum with orthogonal updates for matrices, Adam for everything else."""

    def __init__(self, model: Llama, rate: float, adam_rate: float) -> None:
        self.rate, self.adam_rate = rate, adam_rate
        groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name.startswith("blocks"):
                groups.setdefault(tuple(parameter.shape), []).append(parameter)
            else:
                rest.append(parameter)
        self.groups = list(groups.values())
        self.momenta = [torch.zeros(len(group), *group[0].shape) for group in self.groups]
        self.adam = torch.optim.Adam(rest, lr=adam_rate, betas=(0.9, 0.95), eps=1e-10)

    @torch.no_grad()
    def step(self, scale: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        """One update with the learning rates times `scale`; clears the gradients."""
        for group, buffer in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            buffer.lerp_(gradient, 1 - momentum)
            update = orthogonal(gradient.lerp_(buffer, momentum))
            rows, columns = buffer.shape[1:]
            rate = self.rate * scale * max(1.0, rows / columns) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - self.rate * scale * decay).sub_(change, alpha=rate)
                parameter.grad = None
        for options in self.adam.param_groups:
            options["lr"] = self.adam_rate * scale
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, object]:
        """What a checkpoint must keep."""
        return {"momenta": self.momenta, "adam": self.adam.state_dict()}

    def load(self, state: dict) -> None:  # type: ignore[type-arg]
        """Takes up what `state` gave."""
        self.momenta = state["momenta"]
        self.adam.load_state_dict(state["adam"])
