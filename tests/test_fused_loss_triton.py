"""The Triton head: interpreted on CPU tensors in fp64, compiled in fp32 where there is a GPU; always against fp64."""

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported

from cipo_kernels import LossOutput, fused_linear_cipo_loss, fused_linear_logprob
from cipo_kernels.lm_head import exp_gemm, gemm_tiles, row_kernel
from cipo_kernels.lm_head import head as head_file
from cipo_kernels.lm_head.head import chunk_ranges
from cipo_kernels.lm_head.logprob import (
    _linear_logprob,
    _linear_logprob_backward,
    fused_linear_logprob_reference,
)
from cipo_kernels.lm_head.loss import _linear_cipo_loss
from cipo_kernels.lm_head.terms import Terms, target_loss, target_loss_gradient
from loss_accuracy import EPS_HIGH, EPS_LOW, clipped_loss, eager, errors, exact, make_case, step, within
from test_fused_loss import EVERY_TERM, HEADS, TERMS, WHOLE, extreme_head, make_inputs, make_terms, terms_and_options

if torch.cuda.is_available():
    DEVICE, DTYPE, RTOL, ATOL = "cuda", torch.float32, 1e-4, 1e-5
else:
    DEVICE, DTYPE, RTOL, ATOL = "cpu", torch.float64, 1e-10, 1e-12
N, CHUNK = 13, 5


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("CIPO_KERNELS", "triton")
    monkeypatch.setattr(row_kernel, "BLOCK", row_kernel.Block(64, 8))  # several blocks a row, the last one ragged


cpu_only = pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU `exp` takes bf16 only")


def small_tiles(monkeypatch, k=16):
    monkeypatch.setattr(gemm_tiles, "POINTER_TILES", gemm_tiles.Tiles(2, 64, k, 4, 1, group=2))
    monkeypatch.setattr(gemm_tiles, "TMA_TILES", gemm_tiles.Tiles(4, 64, k, 4, 1, group=2))


@pytest.fixture
def exp_chunks(monkeypatch) -> list:
    """Small tiles, several of each, none of them whole; and a list that grows by one for each chunk `exp` runs."""
    chunks, token_loss = [], exp_gemm.token_loss

    def counted(*args):
        chunks.append(1)
        return token_loss(*args)

    monkeypatch.setattr(exp_gemm, "token_loss", counted)
    if DEVICE == "cpu":
        small_tiles(monkeypatch)
    return chunks


def repaired_rows(monkeypatch) -> list[list[int]]:
    """A list of the rows that each chunk of `exp` computed again."""
    repaired, kernel = [], exp_gemm.bad_rows_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(*, rows, count, **arguments):
                kernel[grid](rows=rows, count=count, **arguments)
                repaired.append(rows[: int(count)].tolist())

            return launch

    monkeypatch.setattr(exp_gemm, "bad_rows_kernel", Spy())
    return repaired


def to_device(x):
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().to(DEVICE, DTYPE if x.is_floating_point() else x.dtype)


def loss_and_grads(inputs, kwargs) -> tuple[LossOutput, list]:
    (hidden, weight, bias), pred_index, target_id = inputs
    leaves = [None if p is None else p.detach().requires_grad_() for p in (hidden, weight, bias)]
    out = fused_linear_cipo_loss(*leaves[:2], pred_index, target_id, bias=leaves[2], **kwargs)
    (out.loss * 1.7).backward()
    return out, [p.grad for p in leaves if p is not None]


def assert_matches_reference(inputs, kwargs, monkeypatch, place=to_device):
    """Outputs and gradients against the fp64 reference on CPU; not two_pass_rows, which is about how, not what."""
    monkeypatch.setenv("CIPO_KERNELS", "reference")
    expected = loss_and_grads(inputs, kwargs)
    monkeypatch.setenv("CIPO_KERNELS", "triton")
    parameters, *index = inputs
    inputs = ([place(p) for p in parameters], *(place(i) for i in index))
    actual = loss_and_grads(inputs, {"chunk_targets": CHUNK} | {k: place(v) for k, v in kwargs.items()})
    for a, e in zip((*actual[0][:-1], *actual[1]), (*expected[0][:-1], *expected[1]), strict=True):
        torch.testing.assert_close(a.cpu().to(e.dtype), e, rtol=RTOL, atol=ATOL)
    return actual


# ---- the formula


@pytest.mark.parametrize(("name", "ratio"), EVERY_TERM)
def test_derivative_of_the_target_loss(name, ratio):
    inputs = make_inputs()
    kwargs = make_terms(*inputs) | TERMS[name] | {"ratio": ratio}
    rows = torch.tensor(kwargs.pop("row_lengths"))
    stacked, options = terms_and_options(len(inputs[1]), **kwargs)
    terms = Terms(*stacked)
    logp = fused_linear_logprob_reference(*inputs[0][:2], *inputs[1:], bias=inputs[0][2])[0].detach().requires_grad_()
    entropy = torch.rand_like(logp).requires_grad_()
    loss, q, clipped = target_loss(logp, entropy, terms, options, rows)
    expected = torch.autograd.grad(loss.sum(), (logp, entropy), materialize_grads=True)
    g_logp, g_entropy = target_loss_gradient(logp.detach(), q, clipped, terms, options, rows)
    torch.testing.assert_close(g_logp, expected[0], rtol=1e-12, atol=1e-14)
    if options.entropy_coef == 0:
        assert g_entropy is None
    else:
        torch.testing.assert_close(g_entropy, expected[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "ratio"), EVERY_TERM)
def test_matches_reference_for_every_term(name, ratio, monkeypatch):
    inputs = make_inputs(n=N)
    assert_matches_reference(inputs, make_terms(*inputs) | TERMS[name] | {"ratio": ratio}, monkeypatch)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1875])
@pytest.mark.parametrize("name", HEADS)
def test_matches_reference_for_every_head(name, entropy_coef, monkeypatch):
    inputs = make_inputs(n=N)
    head = {k: v[:N] if isinstance(v, torch.Tensor) else v for k, v in HEADS[name].items()}
    kwargs = make_terms(*inputs, **head) | head | {"entropy_coef": entropy_coef}
    assert_matches_reference(inputs, kwargs, monkeypatch)


@pytest.mark.parametrize("vocab", [37, 257, 1000])
@pytest.mark.parametrize("n", [0, 1, CHUNK, CHUNK + 1])
def test_matches_reference_for_ragged_sizes(vocab, n, monkeypatch):
    inputs = make_inputs(n=n, vocab=vocab)
    assert_matches_reference(inputs, make_terms(*inputs) | {"entropy_coef": 0.125}, monkeypatch)


def test_matches_reference_without_bias_and_for_branch_points(monkeypatch):
    (hidden, weight, _), _, target_id = make_inputs(n=N)
    pred_index = torch.arange(N) // 6  # six targets of one chunk share a hidden row
    kwargs = make_terms((hidden, weight, None), pred_index, target_id)
    assert_matches_reference(((hidden, weight, None), pred_index, target_id), kwargs, monkeypatch)


def strided(x):
    """The values of x on its device, every other element along the last axis of something larger."""
    x = to_device(x)
    return torch.stack((x, torch.full_like(x, 9)), -1).flatten(-2)[..., ::2] if isinstance(x, torch.Tensor) else x


def test_strided_inputs(monkeypatch):
    inputs = make_inputs(n=N)
    kwargs = make_terms(*inputs) | {
        "entropy_coef": 0.125,
        "temperature": torch.linspace(0.5, 2, N, dtype=torch.float64),
    }
    assert_matches_reference(inputs, kwargs, monkeypatch, place=strided)


HOW = {
    "token": {"entropy_coef": 0.1875},
    "sequence": {"entropy_coef": 0.1875, "ratio": "sequence"},
    "exp": {"impl": "exp"},
    "exp of on-policy rows": {
        "impl": "exp",
        "ratio": "sequence",
        "row_lengths": [9, 4],
        "old_logp": None,
        "is_cap": None,
    },
}
every_how = pytest.mark.parametrize("how", [pytest.param(h, marks=[cpu_only] if "exp" in h else []) for h in HOW])


@every_how
def test_no_output_depends_on_uninitialised_memory(how, exp_chunks, monkeypatch):
    """Deterministic mode fills what torch.empty returns with nan."""
    inputs = make_inputs(n=N)
    kwargs = make_terms(*inputs) | HOW[how]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert_matches_reference(inputs, kwargs, monkeypatch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(exp_chunks) == ("exp" in how)


@every_how
def test_zero_weight_targets_give_exactly_nothing(how, exp_chunks):
    parameters, *index = make_inputs(n=N)
    kwargs = make_terms(parameters, *index) | {"beta": 0.3125, "is_cap": 1.125} | HOW[how]
    inputs = ([to_device(p) for p in parameters], *(to_device(i) for i in index))
    off = torch.arange(N, device=DEVICE) % 2 == 0
    kwargs = {k: to_device(v) for k, v in kwargs.items()} | {"chunk_targets": CHUNK}
    kwargs |= {k: kwargs[k].masked_fill(off, 0) for k in ("rl_weight", "ce_weight")}
    clean = loss_and_grads(inputs, kwargs)
    # `exp` anchors on old_logp, so that a sane one in place of nan changes its rounding
    tolerance = {"rtol": RTOL, "atol": ATOL} if "exp" in how else {"rtol": 0, "atol": 0}
    for poison in (math.inf, math.nan):
        given = [k for k in ("old_logp", "ref_logp", "sampler_logp", "advantage") if kwargs[k] is not None]
        dirty = {k: kwargs[k].masked_fill(off, poison) for k in given}
        actual = loss_and_grads(inputs, kwargs | dirty)
        for a, e in zip((*actual[0], *actual[1]), (*clean[0], *clean[1]), strict=True):
            torch.testing.assert_close(a, e, **tolerance)
    nothing = {k: torch.zeros_like(kwargs[k]) for k in ("rl_weight", "ce_weight")}
    out, grads = loss_and_grads(inputs, kwargs | nothing)
    assert out.loss == 0
    assert all((g == 0).all() for g in grads)
    assert bool(exp_chunks) == ("exp" in how)


# ---- impl="exp"; on a GPU: test_bf16_inputs and bench/gpu/fused_loss.py


@cpu_only
@pytest.mark.parametrize("name", ["rl", "rl tight clip", "kl", "is_cap", "dual clip", "cispo", "temperature",
                                  "per-target temperature"])  # fmt: skip
def test_exp_matches_reference(name, exp_chunks, monkeypatch):
    inputs = make_inputs(n=N)
    head = {"temperature": HEADS[name]["temperature"]} if name in HEADS else {}
    head = {k: v[:N] if isinstance(v, torch.Tensor) else v for k, v in head.items()}
    kwargs = make_terms(*inputs, **head) | TERMS.get(name, {}) | head | {"impl": "exp"}
    assert_matches_reference(inputs, kwargs, monkeypatch)
    assert len(exp_chunks) == math.ceil(N / CHUNK)


@cpu_only
@pytest.mark.parametrize("vocab", [37, 257])
@pytest.mark.parametrize("n", [0, 1, CHUNK + 1])
def test_exp_matches_reference_for_ragged_sizes(vocab, n, exp_chunks, monkeypatch):
    (hidden, weight, _), *index = make_inputs(n=n, vocab=vocab)
    inputs = ((hidden, weight, None), *index)
    kwargs = make_terms(*inputs) | {"old_logp": None, "is_cap": 1.125, "beta": 0.3125, "impl": "exp"}
    assert_matches_reference(inputs, kwargs, monkeypatch)
    assert len(exp_chunks) == math.ceil(n / CHUNK)


@cpu_only
def test_exp_through_tensor_descriptors(exp_chunks, monkeypatch):
    monkeypatch.setattr(gemm_tiles, "use_tma", lambda weight: True)
    inputs = make_inputs(n=N)
    assert_matches_reference(inputs, make_terms(*inputs) | {"impl": "exp"}, monkeypatch)
    assert exp_chunks


@cpu_only
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_exp_recomputes_rows_whose_anchor_is_far_off(exp_chunks, monkeypatch):
    """Cross-entropy targets whose old_logp is 40 too low or missing at -40 nats: S is exp(-40), exp(40)."""
    (hidden, weight, bias), pred_index, target_id = make_inputs(n=N)
    bias = bias.detach().clone()
    bias[target_id[1]] = bias[target_id[4]] = -40
    inputs = ((hidden, weight, bias.requires_grad_()), pred_index, target_id)
    kwargs = make_terms(*inputs) | {"ce_weight": torch.linspace(0.1, 1, N, dtype=torch.float64), "impl": "exp"}
    kwargs["old_logp"][1], kwargs["old_logp"][2] = math.nan, kwargs["old_logp"][2] - 40
    kwargs["rl_weight"][1] = kwargs["rl_weight"][2] = 0
    repaired = repaired_rows(monkeypatch)
    assert_matches_reference(inputs, kwargs, monkeypatch)
    assert len(exp_chunks) == 3
    assert repaired == [[1, 2], [], []]  # 4's old_logp is near its log-prob of -40


BAD = {
    "none": [],
    "one": [6],
    "the first and the last": [0, N - 1],
    "most": [0, 1, 2, 4, 5, 7, 8, 10, 12],
    "all": [*range(N)],
}


@cpu_only
@pytest.mark.parametrize("chunk", [N, CHUNK])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("which", BAD)
def test_exp_recomputes_any_number_of_rows(which, tma, chunk, exp_chunks, monkeypatch):
    """Half of them have an S near exp(40), half near exp(-40). Two rows a tile: several tiles, and a ragged one."""
    monkeypatch.setattr(gemm_tiles, "use_tma", lambda weight: tma)
    monkeypatch.setattr(exp_gemm, "BLOCK", 4)  # several blocks of rows, and of parts
    inputs = make_inputs(n=N)
    head = {"temperature": torch.linspace(0.5, 2, N, dtype=torch.float64)}
    kwargs = make_terms(*inputs, **head) | head | {"impl": "exp", "chunk_targets": chunk}
    bad = torch.isin(torch.arange(N), torch.tensor(BAD[which], dtype=torch.int64))
    # z[target] - old_logp is the anchor: a bias of -80 hides the target, an old_logp of -59 is far below the others
    low, high = bad & (torch.arange(N) % 2 == 0), bad & (torch.arange(N) % 2 == 1)
    kwargs["rl_weight"] = kwargs["rl_weight"].masked_fill(bad, 0)
    kwargs["old_logp"] = kwargs["old_logp"].masked_fill(low, -59).masked_fill(high, math.nan)
    (_, _, bias), _, target_id = inputs
    target_id[:] = torch.arange(N) * 5
    bias.data[target_id[high]] = -80
    repaired = repaired_rows(monkeypatch)
    assert_matches_reference(inputs, kwargs, monkeypatch)
    assert repaired == [[i - a for i in BAD[which] if a <= i < b] for a, b in chunk_ranges(N, chunk)]
    assert len(exp_chunks) == len(repaired)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("which", ["W", "hidden"])
def test_exp_does_not_recompute_rows_that_are_nan(which, exp_chunks, monkeypatch):
    """A step that diverged has a nan in every row, and none has a better anchor."""
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    parameters, *index = make_inputs(n=N)
    terms = {k: to_device(v) for k, v in make_terms(parameters, *index).items()}
    hidden, weight, bias = (p.detach().clone().to(DEVICE, dtype) for p in parameters)
    (weight if which == "W" else hidden)[..., 3] = math.nan
    repaired = repaired_rows(monkeypatch)
    inputs = (hidden, weight, bias), *map(to_device, index)
    out, grads = loss_and_grads(inputs, terms | {"impl": "exp", "chunk_targets": CHUNK})
    assert exp_chunks
    assert repaired == [[]] * len(exp_chunks)
    assert out.logp.isnan().all()
    assert grads[0].isnan().any()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp", "ignore:All-NaN slice")
def test_exp_gives_the_numbers_of_the_logits_where_it_recomputes(exp_chunks):
    """S = inf, S = exp(-40), and a nan in a hidden row: that one stays nan, in its own targets alone."""
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    (hidden, weight, bias), pred_index, target_id = make_inputs(n=N, tokens=N)
    pred_index, nan = torch.arange(N), torch.arange(N) == 4
    bias = bias.detach().clone()
    bias[target_id[1]] = -100
    terms = make_terms((hidden, weight, bias), pred_index, target_id)
    terms["old_logp"][1], terms["old_logp"][2] = math.nan, terms["old_logp"][2] - 40
    terms["rl_weight"][1] = terms["rl_weight"][2] = 0
    terms["ce_weight"] += 0.1
    hidden = hidden.detach().clone()
    hidden[4, 0] = math.nan
    terms = {k: to_device(v) for k, v in terms.items()}
    inputs = (
        [p.detach().to(DEVICE, dtype) for p in (hidden, weight, bias)],
        to_device(pred_index),
        to_device(target_id),
    )
    (out, grads), (expected, expected_grads) = (loss_and_grads(inputs, terms | {"impl": i}) for i in ("exp", "logits"))
    assert exp_chunks
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if DEVICE == "cpu" else {"rtol": 2e-2, "atol": 2e-2}
    for a, e in zip((*out[:4], grads[0]), (*expected[:4], expected_grads[0]), strict=True):
        torch.testing.assert_close(a, e, equal_nan=True, **tolerance)
    assert torch.equal(out.logp.isnan().cpu(), nan)
    assert out.loss.isnan()
    assert torch.equal(grads[0].isnan().any(1).cpu(), nan)


def test_exp_runs_on_the_logits_where_it_does_not_apply(exp_chunks, monkeypatch):
    inputs = make_inputs(n=3)
    for other in ({"entropy_coef": 0.125}, {"softcap": 3.0}, {"ratio": "sequence"}):
        assert_matches_reference(inputs, make_terms(*inputs) | other | {"impl": "exp"}, monkeypatch)
    assert not exp_chunks


# ---- numbers


@pytest.fixture
def case(monkeypatch, bfloat16_of_a_gpu) -> dict[str, torch.Tensor]:
    """bf16, 64 targets of 2,000 tokens; interpreted, tiles of 32 targets and 128 columns."""
    if DEVICE == "cpu":
        monkeypatch.setattr(gemm_tiles, "POINTER_TILES", gemm_tiles.Tiles(32, 128, 128, 4, 1))
        monkeypatch.setattr(row_kernel, "BLOCK", row_kernel.Block(512, 8))
    return make_case(64, 128, vocab=2000, sequence=8, device=DEVICE)


def fused(case, impl):
    return fused_linear_cipo_loss(**case, eps_low=EPS_LOW, eps_high=EPS_HIGH, impl=impl, chunk_targets=40)


def gradient_errors(case, impl) -> tuple[dict, dict, dict]:
    """Of impl, of the best kernel, of eager torch."""
    everything = torch.arange(len(case["hidden"]), device=DEVICE), torch.arange(len(case["weight"]), device=DEVICE)
    right = exact(case, clipped_loss, *everything, rounded=False)
    best = exact(case, clipped_loss, *everything, rounded=True)
    losses = (lambda given: fused(given, impl).loss), eager
    found, of_eager = (errors(step(loss, case), right) for loss in losses)
    return found, errors([best.d_hidden, best.d_weight], right), of_eager


@pytest.mark.parametrize("impl", ["logits", "exp"])
def test_bf16_inputs(impl, exp_chunks, case, monkeypatch):
    """Log-probs within 1e-5 of fp64 from the same inputs; gradients within the bar, half of eager torch's errors."""
    repaired = repaired_rows(monkeypatch)
    found, best, of_eager = gradient_errors(case, impl)
    assert len(exp_chunks) == (2 if impl == "exp" else 0)
    assert not any(repaired)  # the GEMM's own sums are what is tested
    assert within(found, best), (found, best)
    assert all(found[name] <= 0.5 * of_eager[name] for name in ("d_hidden", "d_weight")), (found, of_eager)
    z = case["hidden"].double() @ case["weight"].double().T
    logp = z.log_softmax(-1).gather(1, case["target_id"][:, None])[:, 0]
    trained = case | {"weight": case["weight"].detach().requires_grad_()}
    torch.testing.assert_close(fused(trained, impl).logp.double(), logp, rtol=0, atol=1e-5)


def lose_the_last_tile(dz):
    dz[:, -(dz.shape[1] % 128) :] = 0


def lose_every_33rd_column(dz):
    dz[:, ::33] = 0


def lose_a_row(dz):
    dz[3] = 0


def lose_a_fiftieth_of_a_row(dz):
    dz[3] *= 0.98


@pytest.mark.parametrize("impl", ["logits", "exp"])
@pytest.mark.parametrize("lose", [lose_the_last_tile, lose_every_33rd_column, lose_a_row, lose_a_fiftieth_of_a_row])
def test_the_bar_sees_what_a_kernel_loses(lose, impl, exp_chunks, case, monkeypatch):
    """Of d(logits), in the last of two chunks."""
    how = exp_gemm if impl == "exp" else row_kernel
    token_loss = how.token_loss

    def lossy(head, buffer, start, *rest):
        x, dz, *factor = token_loss(head, buffer, start, *rest)
        if start:
            lose(dz)
        return x, dz, *factor

    monkeypatch.setattr(how, "token_loss", lossy)
    found, best, _ = gradient_errors(case, impl)
    assert bool(exp_chunks) == (impl == "exp")
    assert not within(found, best), (found, best)


def confident_head(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden [N, H], weight [V, H], target_id): of target n, 1 - p is 10^-(2 + n / 2), down to 1e-6."""
    g = torch.Generator().manual_seed(1)
    n, width, vocab = 9, 1024, 300
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64).to(dtype).double() / 8
    target = torch.randperm(vocab, generator=g)[:n]
    toward = weight[target] / weight[target].norm(dim=1, keepdim=True)
    noise = torch.randn(n, width, generator=g, dtype=torch.float64) / 16
    low, high = torch.zeros(n, 1), torch.full((n, 1), 100.0)
    for _ in range(60):
        scale = (low + high) / 2
        z = (scale * toward + noise).to(dtype).double() @ weight.T
        others = z.scatter(1, target[:, None], -math.inf)
        rest = -torch.expm1(-torch.nn.functional.softplus(others.logsumexp(1) - z.gather(1, target[:, None])[:, 0]))
        above = rest[:, None] > 10.0 ** -(2 + torch.arange(n)[:, None] / 2)
        low, high = torch.where(above, scale, low), torch.where(above, high, scale)
    return (scale * toward + noise).to(dtype), weight.to(dtype), target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("how", ["logits", "exp", "logprob"])
def test_confident_targets(how, dtype, exp_chunks, monkeypatch):
    """1 - p from 1e-2 to 1e-6: log-probs within 1% of 1 - p, and each row of d(hidden) within 1%."""
    if how == "exp" and DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("on a GPU `exp` takes bf16 only")
    if DEVICE == "cpu":
        small_tiles(monkeypatch, k=256)
    hidden, weight, target = confident_head(dtype)
    index = torch.arange(len(target)), target
    repaired = repaired_rows(monkeypatch)

    def grad_and_logp(hidden, weight, index):
        hidden = hidden.requires_grad_()
        if how == "logprob":
            logp = fused_linear_logprob(hidden, weight, *index)
            (-logp).sum().backward()
        else:
            one, none = torch.ones(len(target), device=hidden.device), torch.zeros(len(target), device=hidden.device)
            out = fused_linear_cipo_loss(
                hidden, weight, *index, old_logp=None, advantage=none, rl_weight=none, ce_weight=one, impl=how
            )
            logp = out.logp
            out.loss.backward()
        return hidden.grad.cpu().double(), logp.detach().cpu().double()

    grad, logp = grad_and_logp(hidden.to(DEVICE), weight.to(DEVICE), [i.to(DEVICE) for i in index])
    assert bool(exp_chunks) == (how == "exp")
    assert not any(repaired)
    exact, wide = hidden.detach().double().requires_grad_(), weight.double()
    z = exact @ wide.T
    others = z.scatter(1, target[:, None], -math.inf).logsumexp(1) - z.gather(1, target[:, None])[:, 0]
    expected = -torch.nn.functional.softplus(others)
    (-expected).sum().backward()
    rest = -torch.expm1(expected.detach())
    assert ((logp - expected).abs() <= 0.01 * rest).all()
    assert ((grad - exact.grad).norm(dim=1) <= 0.01 * exact.grad.norm(dim=1)).all()


@pytest.mark.parametrize("how", ["logits", "exp", "logprob"])
@pytest.mark.parametrize("unknown", [-1, -(2**40), 300, 2**40])
def test_a_target_outside_the_vocabulary_is_nan_and_writes_nothing(how, unknown, exp_chunks, monkeypatch):
    if DEVICE == "cpu":
        small_tiles(monkeypatch, k=256)
    hidden, weight, target = confident_head(torch.float32 if DEVICE == "cpu" else torch.bfloat16)
    target[3] = unknown
    hidden, weight = hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_()
    index = torch.arange(len(target), device=DEVICE), target.to(DEVICE)
    if how == "logprob":
        logp = fused_linear_logprob(hidden, weight, *index)
        logp.sum().backward()
    else:
        one = torch.ones(len(target), device=DEVICE)
        out = fused_linear_cipo_loss(
            hidden, weight, *index, old_logp=None, advantage=one, rl_weight=one, ce_weight=one, impl=how
        )
        logp = out.logp
        out.loss.backward()
    assert bool(exp_chunks) == (how == "exp")
    bad = torch.arange(len(target)) == 3
    assert torch.equal(logp.isnan().cpu(), bad)
    assert torch.equal(hidden.grad.isnan().any(1).cpu(), bad)


def test_extreme_logits_in_fp32():
    """All -1e4; a target at -80 nats; a probability within 1e-7 of 1; a target at -1e4: finite and fp32-accurate."""
    z = torch.full((4, 137), -1e4)
    z[1:] = 0
    z[1, 5], z[2, 0], z[3, 100] = 80.0, 20.0, 1e4
    hidden, weight = (x.to(DEVICE).requires_grad_() for x in extreme_head(z))
    index = torch.arange(4, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    logp, entropy = fused_linear_logprob(hidden, weight, *index, return_entropy=True)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = fused_linear_logprob_reference(*exact, *index)
    torch.testing.assert_close(logp.double(), expected[0], rtol=2e-7, atol=1e-7)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-6, atol=1e-6)
    assert (logp <= 0).all()
    (logp.sum() + entropy.sum()).backward()
    (expected[0].sum() + expected[1].sum()).backward()
    for p, e in zip((hidden, weight), exact, strict=True):
        torch.testing.assert_close(p.grad.double(), e.grad, rtol=1e-5, atol=1e-5 * e.grad.abs().max().item())


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_logp_is_bitwise_the_same_for_any_chunk_size(impl, monkeypatch):
    """Inputs of small integers make every GEMM exact, however a library blocks it: what is left is our own work."""
    monkeypatch.setenv("CIPO_KERNELS", impl)
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randint(-3, 4, (m, 8), generator=g).float().to(DEVICE) for m in (N, 257))
    index = torch.arange(N, device=DEVICE), torch.randint(257, (N,), generator=g).to(DEVICE)
    outputs = [fused_linear_logprob(hidden, weight, *index, return_entropy=True, chunk_targets=c) for c in (1, 4, 50)]
    for logp, entropy in outputs[1:]:
        assert torch.equal(logp, outputs[0][0])
        assert torch.equal(entropy, outputs[0][1])


def test_exp_logp_is_bitwise_the_same_for_any_chunk_size(exp_chunks):
    """Of any inputs, the GEMM being ours: tiles of 2 targets, and sizes that are below it, odd, and all N."""
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    parameters, *index = make_inputs(n=N, width=40)
    terms = {k: to_device(v) for k, v in make_terms(parameters, *index).items()}
    inputs = ([p.detach().to(DEVICE, dtype) for p in parameters], *(to_device(i) for i in index))
    sizes = (1, 2, 3, 7, N, 50)
    runs = [loss_and_grads(inputs, terms | {"impl": "exp", "chunk_targets": c}) for c in sizes]
    assert len(exp_chunks) == sum(math.ceil(N / c) for c in sizes)
    (first, first_grads), *others = runs
    for out, grads in others:
        for name in ("logp", "entropy", "ratio", "clipped"):
            assert torch.equal(getattr(out, name), getattr(first, name)), name
        torch.testing.assert_close(grads, first_grads)  # sums over chunks: to the rounding of their dtype


# ---- modes


def test_logprob_matches_reference():
    inputs = make_inputs(n=N)
    head = {"softcap": 3.0, "temperature": 1.3}
    parameters, *index = inputs
    expected = fused_linear_logprob_reference(*parameters[:2], *index, bias=parameters[2], **head)
    leaves = [to_device(p).requires_grad_() for p in parameters]
    index = [to_device(i) for i in index]
    actual = fused_linear_logprob(*leaves[:2], *index, bias=leaves[2], return_entropy=True, chunk_targets=CHUNK, **head)
    mix = torch.linspace(-1, 2, N, dtype=torch.float64)
    for a, b in ((mix, mix.flip(0)), (mix, None), (None, mix)):
        grads = []
        for values, of in ((actual, leaves), (expected, parameters)):
            total = sum((c.to(v) * v).sum() for c, v in zip((a, b), values, strict=True) if c is not None)
            grads.append(torch.autograd.grad(total, of, retain_graph=True))
        for d, e in zip(*grads, strict=True):
            torch.testing.assert_close(d.cpu().double(), e, rtol=RTOL, atol=ATOL)
    for v, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(v.cpu().double(), e, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("vocab", [37, 257, 1000])
@pytest.mark.parametrize("n", [0, 1, CHUNK + 1, N])
def test_log_probs_without_grad(n, vocab, tma, monkeypatch):
    """Several tiles each way, ragged; one whose only column is the target's own; bias, softcap and temperatures."""
    if DEVICE == "cpu":
        small_tiles(monkeypatch)
        monkeypatch.setattr(gemm_tiles, "use_tma", lambda weight: tma)
    parameters, pred_index, target_id = make_inputs(n=n, vocab=vocab)
    target_id[: n // 2] = vocab - 1
    heads = [{}, {"temperature": 0.7}, {"softcap": 3.0, "temperature": torch.linspace(0.5, 2, n, dtype=torch.float64)}]
    for head in heads:
        for bias in (None, parameters[2]):
            given = {"bias": bias, **head}
            expected = fused_linear_logprob_reference(*parameters[:2], pred_index, target_id, **given)
            place = {k: to_device(v) for k, v in given.items()}
            with torch.no_grad():
                actual = fused_linear_logprob(
                    *map(to_device, (*parameters[:2], pred_index, target_id)), return_entropy=True,
                    chunk_targets=CHUNK, **place,
                )  # fmt: skip
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a.cpu().double(), e.detach(), rtol=RTOL, atol=ATOL)


def test_log_probs_without_grad_of_odd_rows(monkeypatch):
    """A nan stays in its row; a target outside the vocabulary is nan; a target at -80 nats and one near 1 are exact."""
    if DEVICE == "cpu":
        small_tiles(monkeypatch)
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, 200, generator=g, dtype=torch.float64)
    target = torch.tensor([3, 150, 199, 200, -1])
    z[0, 7], z[1, 150], z[2, 199] = math.nan, -80, 40
    hidden, weight = to_device(z), to_device(torch.eye(200, dtype=torch.float64))  # the logits are z, rounded
    with torch.no_grad():
        logp, entropy = fused_linear_logprob(
            hidden, weight, to_device(torch.arange(5)), to_device(target), return_entropy=True
        )
    assert logp.isnan().tolist() == [True, False, False, True, True]
    z = hidden.double().cpu()[1:3]
    expected = z.log_softmax(1)
    rest = z[1:, :199].logsumexp(1) - z[1, 199]  # log(e^rest + 1) = -logp
    torch.testing.assert_close(logp[1].double().cpu(), expected[0, 150], rtol=2e-7, atol=0)
    torch.testing.assert_close(logp[2].double().cpu(), -torch.log1p(rest.exp())[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(entropy[1:3].double().cpu(), -(expected.exp() * expected).sum(1), rtol=1e-4, atol=1e-15)


def count_gemms(monkeypatch) -> list:
    calls, gemm = [], head_file.gemm

    def counted(*args, **kwargs):
        calls.append(args)
        return gemm(*args, **kwargs)

    monkeypatch.setattr(head_file, "gemm", counted)
    monkeypatch.setattr(row_kernel, "gemm", counted)
    return calls


MODES = {"both": ((True, True), 3), "frozen head": ((True, False), 2), "frozen hidden": ((False, True), 2)}


@pytest.mark.parametrize("mode", [*MODES, "no grad"])
def test_each_mode_runs_only_the_gemms_it_needs(mode, monkeypatch):
    (hidden, weight, bias), *index = make_inputs(n=N)
    kwargs = make_terms((hidden, weight, bias), *index) | {"bias": bias.detach()}
    kwargs = {k: to_device(v) for k, v in kwargs.items()} | {"chunk_targets": N}
    requires_grad, gemms = MODES.get(mode, ((True, True), 0))  # without grad it is logp_gemm.py's own
    leaves = [to_device(p).requires_grad_(r) for p, r in zip((hidden, weight), requires_grad, strict=True)]
    index = [to_device(i) for i in index]
    calls = count_gemms(monkeypatch)
    with torch.set_grad_enabled(mode != "no grad"):
        out = fused_linear_cipo_loss(*leaves, *index, **kwargs)
    assert len(calls) == gemms  # of 2NHV FLOPs each
    assert out.loss.requires_grad == (mode != "no grad")
    if mode != "no grad":
        out.loss.backward()
        assert len(calls) == gemms
        assert [p.grad is not None for p in leaves] == list(requires_grad)


def test_a_row_longer_than_a_chunk_takes_two_passes(monkeypatch):
    inputs = make_inputs(n=N)
    kwargs = make_terms(*inputs) | {"ratio": "sequence", "row_lengths": [3, 8, 2]}
    calls = count_gemms(monkeypatch)
    out, _ = assert_matches_reference(inputs, kwargs, monkeypatch)  # chunks of at most 5: [3], [4 + 4] twice, [2]
    assert out.two_pass_rows == 1
    assert len(calls) == 3 + (4 + 4) + 3


@pytest.mark.parametrize("op", ["logprob", "loss"])
def test_tied_embeddings(op, monkeypatch):
    """The table's gradient as embedding, by autograd, and as head, by us, add up."""
    inputs = make_inputs(n=N)
    index, terms = [to_device(i) for i in inputs[1:]], {k: to_device(v) for k, v in make_terms(*inputs).items()}
    tokens = to_device(torch.arange(30) * 7)
    grads = {}
    for impl in ("reference", "triton"):
        monkeypatch.setenv("CIPO_KERNELS", impl)
        table = to_device(inputs[0][1]).requires_grad_()
        hidden = torch.tanh(torch.nn.functional.embedding(tokens, table))
        if op == "loss":
            total = fused_linear_cipo_loss(hidden, table, *index, chunk_targets=CHUNK, **terms).loss
        else:
            total = fused_linear_logprob(hidden, table, *index, chunk_targets=CHUNK).sum()
        grads[impl] = torch.autograd.grad(total, table)[0]
    torch.testing.assert_close(grads["triton"], grads["reference"], rtol=RTOL, atol=ATOL)


FACTORS = (1.7, -0.5, 1.0)  # incoming gradients


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("impl", ["logits", "exp"])
def test_the_gradient_of_a_bf16_head_is_rounded_once(impl, exp_chunks):
    """Whatever the incoming gradient is, and as often as backward runs: half an ulp of the fp32 gradient times it."""
    (hidden, weight, bias), *index = make_inputs(n=N)
    terms = {k: to_device(v) for k, v in make_terms((hidden, weight, bias), *index).items()}
    leaves = [p.detach().to(DEVICE, torch.bfloat16).requires_grad_() for p in (hidden, weight)]
    out = fused_linear_cipo_loss(*leaves, *map(to_device, index), chunk_targets=CHUNK, impl=impl, **terms)
    assert bool(exp_chunks) == (impl == "exp")
    exact = out.loss.grad_fn.saved_tensors
    for factor in FACTORS:
        grads = torch.autograd.grad(out.loss * factor, leaves, retain_graph=True)
        for d, e in zip(grads, exact, strict=False):
            assert e.dtype == torch.float32
            torch.testing.assert_close(d, (e * factor).bfloat16(), rtol=0, atol=0)


def test_differentiable_once():
    parameters, *index = make_inputs(n=N)
    leaves = [to_device(p).requires_grad_() for p in parameters]
    terms = {k: to_device(v) for k, v in make_terms(parameters, *index).items()}
    index = [to_device(i) for i in index]
    out = fused_linear_cipo_loss(*leaves[:2], *index, bias=leaves[2], **terms)
    assert [x.requires_grad for x in out] == [True] + [False] * (len(out) - 1)
    logp = fused_linear_logprob(*leaves[:2], *index, bias=leaves[2])
    for loss in (out.loss, logp.sum()):
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            torch.autograd.grad(loss, leaves[1], create_graph=True)


# ---- as operators of torch


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opcheck(impl, monkeypatch):
    monkeypatch.setenv("CIPO_KERNELS", impl)
    parameters, *index = make_inputs(n=4, vocab=37)
    terms = {k: to_device(v) for k, v in make_terms(parameters, *index).items()}
    leaves, index = [to_device(p).requires_grad_() for p in parameters], [to_device(i) for i in index]
    head = (*leaves, *index, torch.rand_like(terms["old_logp"]) + 0.5, 3.0, 3)
    del terms["row_lengths"]
    options = {"beta": 0.1, "entropy_coef": 0.1, "is_cap": 2.0, "dual_clip": 3.0}
    for ratio, rows in (("token", None), ("sequence", [3, 1])):
        stacked, given = terms_and_options(4, **terms, **options, ratio=ratio)
        loss = (to_device(stacked), given.to_floats(), rows, "logits", *WHOLE)
        torch.library.opcheck(_linear_cipo_loss, (*head, [True] * 3, *loss))
    torch.library.opcheck(_linear_logprob, (*head, *WHOLE))
    torch.library.opcheck(
        _linear_logprob_backward,
        (terms["old_logp"], None, *(x.detach() for x in leaves), *head[3:], *WHOLE, [True, True, False]),
    )


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_as_one_graph(impl, ratio, monkeypatch):
    monkeypatch.setenv("CIPO_KERNELS", impl)
    parameters, *index = make_inputs(n=6, vocab=37)
    kwargs = make_terms(parameters, *index) | {"ratio": ratio}
    kwargs = {k: to_device(v) for k, v in kwargs.items()} | {"chunk_targets": 4}
    leaves, index = [to_device(p).requires_grad_() for p in parameters], [to_device(i) for i in index]

    def step(hidden, weight, bias):
        hidden = torch.tanh(hidden)
        out = fused_linear_cipo_loss(hidden, weight, *index, bias=bias, **kwargs)
        return out.loss + fused_linear_logprob(hidden, weight, *index, bias=bias, temperature=0.7).sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = run(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


# ---- chunk size


@pytest.mark.parametrize("bytes_each", [2, 4])
@pytest.mark.parametrize("vocab", [151936, 151669, 50257, 2**26])
def test_chunk_of_a_large_vocabulary(vocab, bytes_each):
    most = row_kernel.gpu_chunk_targets(vocab, bytes_each)
    assert most % 128 == 0
    assert most == 128 or bytes_each * most * vocab <= 2**31 < bytes_each * (most + 128) * vocab


@pytest.mark.parametrize("most", [1, 5, 128, 3328])
@pytest.mark.parametrize("n", [1, 127, 128, 129, 3328, 3329, 3400, 7000, 10000])
def test_chunks_are_of_about_one_size(n, most):
    chunks = chunk_ranges(n, most)
    assert [0, *(end for _, end in chunks)] == [*(start for start, _ in chunks), n]
    sizes = [end - start for start, end in chunks]
    assert max(sizes) <= most
    assert len(chunks) == math.ceil(n / most)
    align = 128 if most % 128 == 0 else 1
    assert all(size == max(sizes) and size % align == 0 for size in sizes[:-1])
    assert max(sizes) - sizes[-1] < align * len(chunks)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="an interpreter runs programs one after another")
@pytest.mark.parametrize("how", ["token", "sequence", "exp"])
def test_no_host_synchronisation_and_the_same_bits_again(how, exp_chunks):
    """Each target has a hidden row of its own here: those that share one are added up by atomics."""
    parameters, *index = make_inputs(n=N, tokens=N)
    index[0] = torch.arange(N)
    kwargs = {k: to_device(v) for k, v in make_terms(parameters, *index).items()}
    kwargs |= {"beta": 0.125, "is_cap": 2.0, "chunk_targets": CHUNK} | HOW[how]
    if how == "exp":  # some rows are computed again
        kwargs["old_logp"][::3], kwargs["rl_weight"][::3] = -59, 0
    dtype = torch.bfloat16 if how == "exp" else DTYPE
    inputs = ([p.detach().to(DEVICE, dtype) for p in parameters], *map(to_device, index))
    out, grads = loss_and_grads(inputs, kwargs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        again, grads_again = loss_and_grads(inputs, kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(exp_chunks) == (how == "exp")
    for a, b in zip((*out, *grads), (*again, *grads_again), strict=True):
        assert torch.equal(a, b)
