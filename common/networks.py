"""What no paper claims: normalisers, layers and their initialisation, an action's deviation, a fast GRU for CPUs."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from common.processes import all_sum


class RunningNorm(nn.Module):
    """Standardises by the mean and deviation of all rows so far (Welford's merge); before the first, does nothing."""

    def __init__(self, size, min_std=1e-4):
        super().__init__()
        self.min_std = min_std
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("std", torch.ones(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, rows, alive):
        """rows (B, size), of which those count where alive (B,)."""
        count = all_sum(alive.sum())
        weights = (alive / count.clamp(min=1)).unsqueeze(-1)
        mean = all_sum((rows * weights).sum(0))
        var = all_sum(((rows - mean).square() * weights).sum(0))
        self.count += count
        weight = (count / self.count.clamp(min=1)).float()  # of the new rows
        delta = mean - self.mean
        self.var += weight * (var - self.var + delta.square() * (1 - weight))
        self.mean += weight * delta
        self.std.copy_(self.var.sqrt().clamp(min=self.min_std))

    def forward(self, x):
        return (x - self.mean) / self.std


def mlp(sizes, activation):
    """Linear layers of the given sizes, each but the last followed by the activation."""
    layers = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1])


def normc_(layer, gain):
    """variBAD's code's initialisation: rows of norm `gain` in random directions, no bias."""
    with torch.no_grad():
        layer.weight.normal_()
        layer.weight *= gain / layer.weight.norm(dim=1, keepdim=True)
        layer.bias.zero_()


def xavier_(net):
    """Xavier's normal initialisation of all linear layers, no bias."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


class BoundedStd(nn.Module):
    """The deviations of `size` actions, learnt, softly between bounds: log std = low + (high - low) * sigmoid(raw)."""

    def __init__(self, size, start, low, high):
        super().__init__()
        self.low, self.high = math.log(low), math.log(high)
        place = (math.log(start) - self.low) / (self.high - self.low)
        self.raw = nn.Parameter(torch.full((size,), math.log(place / (1 - place))))

    def forward(self):
        return (self.low + (self.high - self.low) * self.raw.sigmoid()).exp()


class Block(nn.Module):
    """x + attention from x to a memory, then x + W_2 GELU(W_1 x), without normalisation (T-Fixup needs none)."""

    def __init__(self, size, num_heads, feed_forward):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.net = mlp([size, feed_forward, size], nn.GELU)
        nn.init.xavier_uniform_(self.qkv.weight)  # as PyTorch's own attention
        nn.init.zeros_(self.qkv.bias), nn.init.zeros_(self.out.bias)

    def split(self, x):
        """(N, L, D) -> (N, heads, L, D / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, x, keys, values, mask):
        """Queries of x (N, L, D), keys and values (N, heads, L', .), mask bool (N, 1, L or 1, L'): True is seen."""
        size = x.shape[-1]
        queries = self.split(F.linear(x, self.qkv.weight[:size], self.qkv.bias[:size]))
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.net(x)

    def memory(self, x):
        """Keys and values of x (N, L', D), each (N, heads, L', .)."""
        size = x.shape[-1]
        return [self.split(y) for y in F.linear(x, self.qkv.weight[size:], self.qkv.bias[size:]).chunk(2, -1)]

    def forward(self, x, memory=None, mask=None):
        """x (N, L, D), memory (N, L', D), x itself if None -> (N, L, D)."""
        return self.attend(x, *self.memory(x if memory is None else memory), mask)


class GRU(nn.GRU):
    """nn.GRU(input_size, hidden_size), one layer, time-major; on a CPU, for small batches, by `Recurrence`.

    x (T, B, input), start (1, B, D) -> hidden states (T, B, D) and the last of them (1, B, D), as nn.GRU.
    """

    def forward(self, x, start):
        if x.is_cuda or x.shape[1] * self.hidden_size > 8000:  # beyond that there is nothing to gain
            return super().forward(x, start)
        inputs = F.linear(x, self.weight_ih_l0, self.bias_ih_l0)
        hidden = Recurrence.apply(inputs, start[0], self.weight_hh_l0, self.bias_hh_l0)
        return hidden, hidden[-1:]


class Recurrence(torch.autograd.Function):
    """inputs (T, B, 3 D) = W_i x + b_i, start (B, D), weight (3 D, D), bias (3 D) -> h (T, B, D), with nn.GRU's

        s = W_h h' + b_h,  r, z = sigmoid(inputs_rz + s_rz),  n = tanh(inputs_n + r s_n),  h = (1 - z) n + z h'

    Autograd would take some forty small operations a step; here four run a step forwards, and three backwards: what
    multiplies the gradient of h in those of r, z and n does not depend on it and is found for all steps at once.
    """

    @staticmethod
    def forward(ctx, inputs, start, weight, bias):
        T, B, D = *inputs.shape[:2], start.shape[-1]
        hidden, s, gates = inputs.new_empty(T + 1, B, D), torch.empty_like(inputs), torch.empty_like(inputs)
        hidden[0] = start
        transposed = weight.t().contiguous()  # a fifth faster than the view, at these sizes
        columns = [hidden[:-1], hidden[1:], s, gates[..., : 2 * D], *gates.split(D, -1)]
        columns += [part for x in (inputs, s) for part in x.split([2 * D, D], -1)]
        for before, after, s_t, rz, r, z, n, in_rz, in_n, s_rz, s_n in zip(*(x.unbind() for x in columns)):
            torch.addmm(bias, before, transposed, out=s_t)
            torch.add(in_rz, s_rz, out=rz).sigmoid_()
            torch.addcmul(in_n, r, s_n, out=n).tanh_()
            torch.lerp(n, before, z, out=after)
        ctx.save_for_backward(hidden, s[..., 2 * D :], gates, weight)
        return hidden[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, s_n, gates, weight = ctx.saved_tensors
        T, B, D = grad.shape
        r, z, n = gates.split(D, -1)
        slope = (1 - z).mul_((n * n).neg_().add_(1))  # of h in tanh's argument
        local = torch.empty_like(gates)  # of h in s
        local_r, local_z, local_n = local.split(D, -1)
        torch.mul(slope, r, out=local_n)
        torch.mul(local_n, s_n, out=local_r).mul_(1 - r)
        torch.sub(hidden[:-1], n, out=local_z).mul_(z).mul_(1 - z)
        total = torch.cat(
            [torch.zeros_like(grad[:1]), grad]
        )  # once the loop is done: the loss's gradient of h_0 .. h_T
        columns = [total[:-1], total[1:], local.view(T, B, 3, D), local, z]
        for before, after, parts, flat, z_t in zip(*(x.unbind()[::-1] for x in columns)):
            parts.mul_(after.unsqueeze(1))
            before.addcmul_(after, z_t).addmm_(flat, weight)
        rows = local.view(T * B, 3 * D)
        weight_grad, bias_grad = rows.t() @ hidden[:-1].reshape(T * B, D), rows.sum(0)
        torch.mul(total[1:], slope, out=local_n)  # now of the inputs: those of r and z are the same
        return local, total[0], weight_grad, bias_grad
