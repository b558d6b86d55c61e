"""Log-probs and entropies of targets under a linear LM head, without an [N, V] tensor.

    x = hidden[pred_index]                                                # [N, H]
    z = softcap * tanh((x W^T + b) / softcap) / temperature               # [N, V], in chunks of targets
    logp = z[target] - lse(z),   H = -sum_v p_v log p_v,   p = softmax(z)

`fused_linear_logprob_reference` is the definition. `ChunkedHead` computes the same, and its gradients, one chunk
of targets at a time; the log-prob op here and the loss in fused_linear_cipo_loss.py both run on it, or on its Triton
form in fused_linear_cipo_loss_triton.py.
Log-probs and gradient accumulators are fp32 (fp64 when an input is fp64), whatever the inputs are.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .dispatch import implementation


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """fp32, or fp64 when either input is fp64."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def linear_logits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    out: Tensor | None = None,
) -> Tensor:
    """Logits z [n, V] of x [n, H], weight [V, H], bias [V]; temperature a number or [n, 1]; every step in `out`."""
    z = torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)  # [n, V]
    if softcap is not None:
        z = torch.mul(torch.tanh(torch.div(z, softcap, out=out), out=out), softcap, out=out)
    if isinstance(temperature, Tensor) or temperature != 1.0:
        z = torch.div(z, temperature, out=out)
    return z


def logp_and_entropy(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of target [n] under logits z [n, V], and the entropy, both [n] in z's dtype."""
    logp_v = torch.log_softmax(z, dim=-1)  # [n, V]
    return logp_v.gather(-1, target[:, None])[:, 0], -(logp_v.exp() * logp_v).sum(-1)


def fused_linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    pred_index: Tensor,
    target_id: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(logp [N], entropy [N]) as eager torch under plain autograd: the definition."""
    dtype = compute_dtype(hidden, weight)
    x = hidden[pred_index].to(dtype)  # [N, H]
    b = None if bias is None else bias.to(dtype)
    t = temperature[:, None].to(dtype) if isinstance(temperature, Tensor) else temperature
    with torch.autocast(hidden.device.type, enabled=False):  # which would round x and W to its dtype once more
        return logp_and_entropy(linear_logits(x, weight.to(dtype), b, t, softcap), target_id)


class Chunk(NamedTuple):
    """One chunk of n targets after `ChunkedHead.forward`; the [n, V] are the head's buffers: the next overwrites."""

    rows: Tensor  # [n] pred_index
    target: Tensor  # [n, 1]
    temperature: float | Tensor  # or [n, 1]
    x: Tensor  # [n, H]
    logp_v: Tensor  # [n, V] log p
    p: Tensor  # [n, V]
    lse: Tensor  # [n, 1]: z = logp_v + lse
    logp: Tensor  # [n]
    entropy: Tensor  # [n]


class ChunkedHead:
    """Forward and backward of the head for one chunk of targets at a time, in three [chunk, V] buffers.

    A bf16 head is upcast once, so its products are those of fp32 operands: exact inputs, fp32 accumulation.
    `needs_grad` says which gradients of (hidden, weight, bias) `backward` accumulates; `gradients` hands them out.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs_grad: Sequence[bool],
        pred_index: Tensor,
        target_id: Tensor,
        temperature: Tensor | None,
        softcap: float | None,
        chunk_targets: int,
    ) -> None:
        self.dtype = compute_dtype(hidden, weight)
        self.hidden, self.weight = hidden, weight.to(self.operand_dtype(hidden, weight))
        self.bias = None if bias is None else bias.to(self.dtype).contiguous()
        self.pred_index, self.target_id = pred_index.contiguous(), target_id.contiguous()
        self.temperature = None if temperature is None else temperature.to(self.dtype).contiguous()
        self.softcap = softcap
        self.allocate(min(chunk_targets, pred_index.numel()))
        self.needs_grad = needs_grad
        unset = torch.empty if pred_index.numel() else torch.zeros  # the first chunk writes over what is there
        self.d_hidden, self.d_weight, self.d_bias = (
            None if p is None or not needed else new(p.shape, dtype=self.dtype, device=p.device)
            for p, needed, new in zip(
                (hidden, weight, bias), needs_grad, (torch.zeros, unset, torch.zeros), strict=True
            )
        )
        self.beta = 0  # 1 once d_weight holds a chunk's gradient

    @staticmethod
    def auto_chunk_targets(weight: Tensor) -> int:
        """2^23 logits on CPU, 2^27 on a GPU (32 and 512 MiB a buffer), at least 64 targets."""
        return max(64, 2 ** (27 if weight.is_cuda else 23) // weight.shape[0])

    def operand_dtype(self, hidden: Tensor, weight: Tensor) -> torch.dtype:
        """Of x, weight and d(logits) in the GEMMs."""
        return self.dtype

    def allocate(self, rows: int) -> None:
        self.buffers = self.weight.new_empty(3, rows, self.weight.shape[0])  # z then p, log p, scratch

    def new_vector(self) -> Tensor:
        return torch.empty(self.target_id.shape, dtype=self.dtype, device=self.weight.device)  # [N]

    def gather(self, start: int, end: int) -> Tensor:
        return self.hidden.index_select(0, self.pred_index[start:end]).to(self.weight.dtype)  # [n, H]

    def forward(self, start: int, end: int) -> Any:
        """Targets start:end: one GEMM, then their log-probs and entropies. The chunk has them as `logp`, `entropy`."""
        buffer_z, buffer_logp, scratch = self.buffers[:, : end - start]
        rows, target = self.pred_index[start:end], self.target_id[start:end, None]
        t = 1.0 if self.temperature is None else self.temperature[start:end, None]
        x = self.gather(start, end)
        z = linear_logits(x, self.weight, self.bias, t, self.softcap, out=buffer_z)  # [n, V]
        logp_v = torch.log_softmax(z, 1, out=buffer_logp)
        logp = logp_v.gather(1, target)
        lse = z.gather(1, target) - logp
        p = torch.exp(logp_v, out=z)
        entropy = -torch.mul(p, logp_v, out=scratch).sum(1)
        return Chunk(rows, target, t, x, logp_v, p, lse, logp[:, 0], entropy)

    def backward(self, chunk: Any, g_logp: Tensor, g_entropy: Tensor | None) -> None:
        """Add the chunk's gradients, given d loss/d logp and d loss/d entropy [n]. Overwrites the chunk.

        dz = g_logp * (onehot - p) - g_entropy * p * (log p + H), then through temperature and softcap.
        """
        rows, target, t, x, logp_v, p, lse, _, entropy = chunk
        if self.softcap is not None:  # tanh' = 1 - tanh^2, where tanh = z * temperature / softcap
            tanh = torch.add(logp_v, lse, out=self.buffers[2, : len(p)]).mul_(t / self.softcap)
            slope = tanh.square_().neg_().add_(1)
        g = g_logp[:, None] / t
        if g_entropy is None:
            dz = p.mul_(-g)
        else:
            dz = p.mul_(logp_v.add_(entropy[:, None]).mul_(-g_entropy[:, None] / t).sub_(g))
        dz.scatter_add_(1, target, g)
        if self.softcap is not None:
            dz.mul_(slope)
        self.accumulate(rows, x, dz)

    def accumulate(self, rows: Tensor, x: Tensor, dz: Tensor, scale: Tensor | None = None) -> None:
        """Add to the gradients what d(logits) gives: dz [n, V], times scale [n]. Hidden rows [n] are x [n, H]."""
        if self.d_hidden is not None:
            dx = gemm(torch.empty(x.shape, dtype=self.dtype, device=x.device), dz, self.weight)
            dx = dx if scale is None else dx.mul_(scale[:, None])
            self.d_hidden.index_add_(0, rows, dx)  # a branch point repeats its hidden row
        if self.d_weight is not None:
            gemm(self.d_weight, dz.T, x if scale is None else (x * scale[:, None]).to(x.dtype), beta=self.beta)
            self.beta = 1
        if self.d_bias is not None and scale is None:
            self.d_bias.add_(dz.sum(0, dtype=self.dtype))
        elif self.d_bias is not None and scale is not None:
            gemm(self.d_bias[:, None], dz.T, scale[:, None].to(dz.dtype), beta=1)

    def gradients(self) -> list[Tensor]:
        """Gradients of (hidden, weight, bias) in fp32 or fp64, empty where not asked for. The head's last call."""
        self.allocate(0)  # the chunk's buffers go before a gradient is rounded to its parameter's dtype
        found = (self.d_hidden, self.d_weight, self.d_bias)
        return [self.weight.new_empty(0, dtype=self.dtype) if d is None else d for d in found]


def gemm(out: Tensor, a: Tensor, b: Tensor, beta: float = 0) -> Tensor:
    """out = beta * out + a @ b, accumulated in out's dtype, which may be wider than that of a and b.

    fp32 operands on CUDA are rounded to TF32 if torch.backends.cuda.matmul.allow_tf32 asks for it.
    """
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, out=out)
    if out.is_cuda:
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)  # an fp32 `out`: torch >= 2.10
    return torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def head_class(hidden: Tensor) -> type[ChunkedHead]:
    """What runs the head for a tensor on `hidden.device`."""
    if implementation(hidden) != "triton":
        return ChunkedHead
    from .fused_linear_cipo_loss_triton import TritonHead  # here: only where it runs must triton be installed

    return TritonHead


@torch.library.custom_op("cipo_kernels::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pred_index: Tensor,
    target_id: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    chunk_targets: int | None,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) [N]: 2NHV FLOPs, nothing [N, V] is kept."""
    return head_log_probs(hidden, weight, bias, pred_index, target_id, temperature, softcap, chunk_targets)


def head_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pred_index: Tensor,
    target_id: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    chunk_targets: int | None,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) [N] without gradients. Triton stores no logit, except fp32 on a GPU, by cuBLAS."""
    Head = head_class(hidden)
    if Head is not ChunkedHead and (hidden.dtype == torch.bfloat16 or not hidden.is_cuda):
        from .logp_gemm import CHUNK_TARGETS, log_probs

        dtype, w = compute_dtype(hidden, weight), weight.contiguous()
        b = None if bias is None else bias.to(dtype).contiguous()
        inv_t = None if temperature is None else temperature.to(dtype).reciprocal()

        def of(start: int, end: int) -> tuple[Tensor, Tensor]:
            x, target = hidden.index_select(0, pred_index[start:end]), target_id[start:end].contiguous()
            return log_probs(x, w, b, target, None if inv_t is None else inv_t[start:end].contiguous(), softcap)

        size = chunk_targets or CHUNK_TARGETS
    else:
        size = chunk_targets or Head.auto_chunk_targets(weight)
        head = Head(hidden, weight, bias, (False, False, False), pred_index, target_id, temperature, softcap, size)

        def of(start: int, end: int) -> tuple[Tensor, Tensor]:
            chunk = head.forward(start, end)
            return chunk.logp, chunk.entropy

    logp = torch.empty(pred_index.shape, dtype=compute_dtype(hidden, weight), device=hidden.device)
    entropy = torch.empty_like(logp)
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        for start, end in chunk_ranges(pred_index.numel(), size):
            logp[start:end], entropy[start:end] = of(start, end)
    return logp, entropy


@_linear_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, pred_index: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    n, dtype = pred_index.shape, compute_dtype(hidden, weight)
    return hidden.new_empty(n, dtype=dtype), hidden.new_empty(n, dtype=dtype)


@torch.library.custom_op("cipo_kernels::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pred_index: Tensor,
    target_id: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    chunk_targets: int | None,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (hidden, weight, bias), empty where not asked for: 6NHV FLOPs, the logits are recomputed."""
    Head = head_class(hidden)
    size = chunk_targets or Head.auto_chunk_targets(weight)
    head = Head(hidden, weight, bias, needs_grad, pred_index, target_id, temperature, softcap, size)
    g_logp = torch.zeros_like(head.new_vector()) if g_logp is None else g_logp.contiguous()
    g_entropy = None if g_entropy is None else g_entropy.contiguous()
    with torch.cuda.device_of(hidden):
        for start, end in chunk_ranges(pred_index.numel(), size):
            g_h = None if g_entropy is None else g_entropy[start:end]
            head.backward(head.forward(start, end), g_logp[start:end], g_h)
    parameters = (hidden, weight, weight if bias is None else bias)
    d_hidden, d_weight, d_bias = (d.to(p.dtype) for d, p in zip(head.gradients(), parameters, strict=True))
    return d_hidden, d_weight, d_bias


@_linear_logprob_backward.register_fake
def _(
    g_logp: Tensor | None, g_entropy: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return fake_gradients((hidden, weight, bias), rest[-1], None)


def fake_gradients(
    parameters: tuple[Tensor, Tensor, Tensor | None], needs_grad: Sequence[bool], dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    """Gradients for torch's shape propagation, in `dtype`, or in their parameters' own; empty where not asked for."""
    _, weight, _ = parameters
    return tuple(
        (weight if p is None else p).new_empty(0 if p is None or not needed else p.shape, dtype=dtype)
        for p, needed in zip(parameters, needs_grad, strict=True)
    )


def needed_gradients(gradients: Sequence[Tensor | None], needs_grad: Sequence[bool]) -> list[Tensor | None]:
    return [d if needed else None for d, needed in zip(gradients, needs_grad, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # an unused entropy then has gradient None, and costs nothing
    *tensors, ctx.softcap, ctx.chunk_targets = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_create_graph("fused_linear_logprob")
    needs_grad = list(ctx.needs_input_grad[:3])
    gradients = _linear_logprob_backward(
        g_logp, g_entropy, *ctx.saved_tensors, ctx.softcap, ctx.chunk_targets, needs_grad
    )
    return *needed_gradients(gradients, needs_grad), None, None, None, None, None


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)


def fused_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    pred_index: Tensor,
    target_id: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    chunk_targets: int | Literal["auto"] = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each target, differentiable in hidden, weight and bias. Formulas: this file's docstring.

    hidden [T, H], weight [V, H], bias [V]: floating; pred_index, target_id [N] int64: target n is the token
    target_id[n], predicted from hidden[pred_index[n]] (rows may repeat). temperature: a number, or [N]. softcap: in
    logits, before the temperature. Logits must be finite. Without grad only the forward runs (2NHV FLOPs);
    the backward recomputes the logits.

    hidden and weight are of one dtype, bf16, fp32 or fp64; under torch.autocast both are cast to its dtype.

    Returns logp [N] in nats, fp32 (fp64 for fp64 inputs), and the entropy [N] if `return_entropy`.
    Raises ValueError for shapes and dtypes that do not fit. Source: ours; the chunking is common practice.
    """
    hidden, weight = autocast_operands(hidden, weight)
    check_inputs(hidden, weight, pred_index, target_id, bias, temperature, softcap)
    if implementation(hidden) == "reference":
        logp, entropy = fused_linear_logprob_reference(
            hidden, weight, pred_index, target_id, bias=bias, temperature=temperature, softcap=softcap
        )
    else:
        t, size = per_target(temperature, pred_index), check_chunk_targets(chunk_targets)
        logp, entropy = _linear_logprob(hidden, weight, bias, pred_index, target_id, t, softcap, size)
    return (logp, entropy) if return_entropy else logp


def refuse_create_graph(op: str) -> None:
    """For a backward whose own gradient is not implemented; once_differentiable misses a constant incoming gradient."""
    if torch.is_grad_enabled():  # in a backward: create_graph=True
        raise RuntimeError(f"{op} can be differentiated once: backward with create_graph=True is not supported")


def autocast_operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where that is on, as F.linear has them (fp64 stays); it does not know our operators."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    h, w = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (hidden, weight))
    return h, w


def chunk_ranges(n: int, chunk_targets: int) -> list[tuple[int, int]]:
    """[start, end) of each chunk of n targets: as few as can be, and of about one size, for a short last one would be
    bound by the traffic of W and dW. Multiples of 128 where chunk_targets is."""
    if n == 0:
        return []
    align = 128 if chunk_targets % 128 == 0 else 1
    size = -(-n // -(-n // chunk_targets) // align) * align
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def per_target(temperature: float | Tensor, pred_index: Tensor) -> Tensor | None:
    """The temperature as [N], None for 1."""
    if isinstance(temperature, Tensor):
        return temperature
    n = pred_index.shape
    return None if temperature == 1.0 else torch.full(n, temperature, dtype=torch.float64, device=pred_index.device)


def check_chunk_targets(chunk_targets: int | Literal["auto"]) -> int | None:
    """None for "auto": the head's own choice."""
    if chunk_targets == "auto":
        return None
    if not isinstance(chunk_targets, int) or chunk_targets < 1:
        raise ValueError(f'chunk_targets={chunk_targets!r}: expected "auto" or a positive integer')
    return chunk_targets


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    pred_index: Tensor,
    target_id: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> None:
    """ValueError, one sentence, for what the head cannot take. Values on the device are not looked at: no sync."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)}: expected [T, H] and [V, H]")
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: both must be floating point")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them to the other's dtype")
    if hidden.dtype == torch.float16:
        raise ValueError("hidden and weight are torch.float16, in which small gradients are 0: expected bfloat16")
    n, vocab = pred_index.shape[:1], weight.shape[:1]
    for name, index in (("pred_index", pred_index), ("target_id", target_id)):
        if index.shape != n or index.dim() != 1 or index.dtype != torch.int64:
            raise ValueError(f"{name} is {index.dtype} {list(index.shape)}: expected int64 [N], one per target")
    if bias is not None and bias.shape != vocab:
        raise ValueError(f"bias is {list(bias.shape)}: expected [V] = {list(vocab)}")
    if isinstance(temperature, Tensor):
        if temperature.shape != n:
            raise ValueError(f"temperature is {list(temperature.shape)}: expected a number or [N] = {list(n)}")
    elif not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: must be positive, or None for no softcap")
