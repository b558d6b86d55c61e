"""How wrong the gradients of a fused loss may be: one bar, which fused_loss.py and the tests of the kernels hold to.

Right is fp64 from the same bf16 inputs. `best` are the errors of a kernel that rounds d(logits) and the gradients to
bf16 and nothing else; eager torch in bf16 rounds the logits, too, and has several times these.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

EPS_LOW, EPS_HIGH = 0.2, 0.28
NOISE = 1.5  # of logits


def make_case(n: int, width: int, vocab: int, sequence: int, device: str) -> dict[str, Tensor]:
    """Logits as a trained model's: the target's is from 5 below to 17 above the log-sum-exp of the others, so that its
    probability is between near 0 and near 1; old_logp is near the log of that.

    `sequence` targets have one advantage. W's first column is 1, which moves all logits of a target alike: d(hidden)'s
    first column is the sum of d(logits).
    """
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    weight = (normal(vocab, width) / width**0.5).bfloat16()
    target = torch.randint(vocab, (n,), generator=g, device=device)
    peak = math.log(vocab) + NOISE**2 / 2 - 5 + 22 * torch.rand(n, 1, generator=g, device=device)
    hidden = (NOISE * normal(n, width) + peak * weight[target]).bfloat16()
    weight[:, 0] = 1
    case = {"hidden": hidden, "weight": weight, "pred_index": torch.arange(n, device=device), "target_id": target}
    chunks = (case | {"pred_index": i, "target_id": target[i]} for i in case["pred_index"].split(1024))
    return case | {
        "old_logp": torch.cat([eager_logp(chunk) for chunk in chunks]) + 0.2 * normal(n),
        "advantage": normal(n // sequence).repeat_interleave(sequence),
        "rl_weight": torch.full((n,), 1 / n, device=device),
        "ce_weight": torch.zeros(n, device=device),
    }


def clipped_loss(logp: Tensor, case: dict) -> Tensor:
    q, a = (logp - case["old_logp"]).exp(), case["advantage"]
    return -(case["rl_weight"] * torch.minimum(q * a, q.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * a)).sum()


def eager_logp(case: dict) -> Tensor:
    """What trainers do without a fused head: bf16 logits, upcast for the log-softmax."""
    z = (case["hidden"][case["pred_index"]] @ case["weight"].T).float()
    return z.log_softmax(-1).gather(1, case["target_id"][:, None])[:, 0]


def eager(case: dict) -> Tensor:
    return clipped_loss(eager_logp(case), case)


def step(loss: Callable[[dict], Tensor], case: dict) -> list[Tensor]:
    """Forward and backward: gradients of hidden and weight."""
    leaves = [case["hidden"].detach().requires_grad_(), case["weight"].detach().requires_grad_()]
    return list(torch.autograd.grad(loss(case | dict(zip(("hidden", "weight"), leaves, strict=True))), leaves))


class Exact(NamedTuple):
    """fp64 of bf16 inputs; of the rows asked for."""

    logp: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def exact(case: dict, of_logp: Callable[[Tensor, dict], Tensor], rows: Tensor, ids: Tensor, rounded: bool) -> Exact:
    """Gradients of hidden's `rows` and of the weight's rows `ids`, 1,024 targets at a time. `rounded`: as `best`."""
    hidden, weight = case["hidden"].double(), case["weight"].double()
    d_logits = (lambda dz: dz.bfloat16().double()) if rounded else (lambda dz: dz)
    logp = torch.cat([
        (x @ weight.T).log_softmax(-1).gather(1, t[:, None])[:, 0]
        for x, t in zip(hidden.split(1024), case["target_id"].split(1024), strict=True)
    ])  # fmt: skip
    leaf = logp.clone().requires_grad_()
    [g] = torch.autograd.grad(of_logp(leaf, case), leaf)
    d_hidden, d_weight = hidden[:0], torch.zeros_like(weight[ids])
    for i in torch.arange(len(g), device=g.device).split(1024):
        dz = -g[i, None] * (hidden[i] @ weight.T).softmax(-1)
        dz.scatter_add_(1, case["target_id"][i, None], g[i, None])
        dz = d_logits(dz)
        d_weight += dz[:, ids].T @ hidden[i]
        d_hidden = torch.cat([d_hidden, dz[torch.isin(i, rows)] @ weight])
    if rounded:
        d_hidden, d_weight = d_hidden.bfloat16().double(), d_weight.bfloat16().double()
    return Exact(logp, d_hidden, d_weight)


def errors(found: list[Tensor], right: Exact) -> dict[str, float]:
    """Relative errors of both gradients as a whole, and of the worst row that is not next to nothing; and the largest
    sum of a target's d(logits), which ought to be 0, relative to its row of d(hidden)."""
    result = {}
    for name, d, e in zip(("d_hidden", "d_weight"), found, (right.d_hidden, right.d_weight), strict=True):
        size, error = e.norm(dim=1), (d.double() - e).norm(dim=1)
        counts = size > 1e-4 * size.max()
        result[name] = (error.norm() / size.norm()).item()
        result[f"{name}_row"] = (error / size)[counts].max().item()
    d_hidden, size = found[0].double(), right.d_hidden.norm(dim=1)
    result["d_logits_sum"] = (d_hidden[:, 0].abs() / size)[size > 1e-4 * size.max()].max().item()
    return result


def within(found: dict[str, float], best: dict[str, float]) -> bool:
    """The bar of a fused loss. As a whole twice the best kernel's error. A lost tile is a small part of that whole, so
    the worst row has at most three times the best kernel's, or three roundings to bf16 (d(logits), the factor of a row,
    the gradient), and the d(logits) of a target sum to 0 but for their rounding."""
    whole = all(found[name] <= 2 * best[name] for name in ("d_hidden", "d_weight"))
    rows = all(found[name] <= 3 * max(best[name], 2**-9) for name in ("d_hidden_row", "d_weight_row"))
    return whole and rows and found["d_logits_sum"] <= 2**-7


def as_good_as_eager(found: dict[str, float], eager: dict[str, float]) -> bool:
    """The bar of a peer, whose method is eager's at best: three times its errors, as a whole and in the worst row."""
    return all(found[name] <= 3 * max(error, 2**-9) for name, error in eager.items() if name != "d_logits_sum")
