"""nn.GRU: the same parameters and, to rounding, the same numbers, 1.6 times as fast on a CPU at the grid's sizes."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


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
