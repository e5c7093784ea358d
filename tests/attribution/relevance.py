"""Relevance propagation through a one-layer Vim, equation by equation: explicit matrices, no autograd, one image."""

import torch
import torch.nn.functional as F

from tests.attribution.cases import layers_of, per_channel


def hand_on(x, weight, z, relevance, gamma=0.0):
    """Relevance of x from that of z = weight @ x + bias: R_j = sum_k x_j w_kj R_k / z_k.

    The gamma rule: terms (and biases) of the sign of z_k count 1 + gamma times, above and below. x (tokens, in).
    """
    terms = x.unsqueeze(1) * weight  # (tokens, out, in)
    bias = z - terms.sum(2)
    same = torch.where(terms * z.unsqueeze(2) > 0, 1 + gamma, 1.0)
    below = (terms * same).sum(2) + bias * torch.where(bias * z > 0, 1 + gamma, 1.0)
    return (terms * same * (relevance / below).unsqueeze(2)).sum(1)


def toeplitz(weight, tokens):
    """(channels, tokens, tokens) of a causal depthwise convolution."""
    width = weight.shape[-1]
    T = torch.zeros(len(weight), tokens, tokens, dtype=weight.dtype)
    for i in range(tokens):
        for j in range(max(0, i - width + 1), i + 1):
            T[:, i, j] = weight[:, 0, width - 1 - (i - j)]
    return T


def of_one_layer_vim(model, image, target, *, to_y=0.5, to_gate=0.5, gamma=0.0):
    """(logit, relevance of every token); the shares of a gate's two factors, and gamma on every dense layer."""
    (layer,) = layers_of(model, image)
    block, record = model.layers[0], layer.scan
    with torch.no_grad():
        E = model.embed(image)[0]
        tokens = len(E)
        n = E / (E.square().mean(1, keepdim=True) + 1e-5).sqrt() * block.norm.weight
        mixer = block.mixer
        W_in, W_out = mixer.in_proj.weight, mixer.out_proj.weight
        x, z = (n @ W_in.T).chunk(2, 1)
        gate, M, u, ps, Ts = F.silu(z), per_channel(layer)[0], [], [], []
        y = torch.zeros_like(x)
        for route, conv in enumerate((mixer.conv1d, mixer.conv1d_b)):
            order = record.read_order[route]
            T = toeplitz(conv.weight, tokens)
            p = torch.einsum("cij,jc->ic", T, x[order]) + conv.bias
            u.append(F.silu(p)), ps.append(p), Ts.append(T)
            M[route] += torch.diag_embed(record.D[route].unsqueeze(1).expand(-1, tokens))
            y[order] += 0.5 * torch.einsum("cij,jc->ic", M[route], u[route])
        g = y * gate
        o = g @ W_out.T
        f = E + o
        normed = f / (f.square().mean(1, keepdim=True) + 1e-5).sqrt() * model.norm_f.weight
        place = layer.layout.class_tokens[0]
        logit = (normed[place] @ model.head.weight[target]) + model.head.bias[target]

        R_f = torch.zeros_like(f)  # the norm hands on what it gets
        scores = logit.view(1, 1)
        R_f[place] = hand_on(normed[place, None], model.head.weight[target, None], scores, scores, gamma)[0]
        R_E, R_o = R_f * E / f, R_f * o / f
        R_g = hand_on(g, W_out, o, R_o, gamma)
        R_y, R_z = to_y * R_g, to_gate * R_g
        R_x = torch.zeros_like(x)
        for route in range(2):
            order = record.read_order[route]
            R_u = u[route] * torch.einsum("cij,ic->jc", 0.5 * M[route], (R_y / y)[order])
            R_x[order] += convolved(x[order], Ts[route], ps[route], R_u, gamma)
        inner, R_inner = torch.cat([x, z], 1), torch.cat([R_x, R_z], 1)
        R_E = R_E + hand_on(n, W_in, inner, R_inner, gamma)
    return logit, R_E.sum(1)


def convolved(x, T, p, relevance, gamma):
    """hand_on, channel by channel, through a convolution's matrix."""
    columns = [hand_on(x[:, c].unsqueeze(0), T[c], p[:, c].unsqueeze(0), relevance[:, c].unsqueeze(0), gamma)[0]
               for c in range(x.shape[1])]  # fmt: skip
    return torch.stack(columns, 1)
