"""The fused LM-head ops against their references, against numbers worked by hand, and at the edges."""

import math
from itertools import pairwise

import pytest
import torch
from cipo_kernels import LossOutput, fused_linear_cipo_loss, fused_linear_logprob
from cipo_kernels.lm_head import chunked
from cipo_kernels.lm_head.logprob import fused_linear_logprob_reference
from cipo_kernels.lm_head.loss import _linear_cipo_loss
from cipo_kernels.lm_head.terms import Options, Terms, k3, stack_terms, target_loss
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CHUNK = 16


@pytest.fixture(autouse=True)
def _chunked(monkeypatch):
    monkeypatch.setenv("CIPO_KERNELS", "torch")


def make_inputs(n=41, vocab=257, width=24, tokens=30, dtype=torch.float64, seed=0):
    """(hidden, weight, bias), then pred_index and target_id: fewer tokens than targets, so rows repeat."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=g, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=g, dtype=dtype) * 0.4).requires_grad_()
    bias = torch.randn(vocab, generator=g, dtype=dtype).requires_grad_()
    pred_index = torch.randint(tokens, (n,), generator=g)
    return (hidden, weight, bias), pred_index, torch.randint(vocab, (n,), generator=g)


def make_terms(parameters, pred_index, target_id, seed=1, **head):
    """Every per-target input and the clips; old_logp is near logp, so that ratios lie on both sides of both."""
    hidden, weight, bias = parameters
    n, g = len(pred_index), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logp, _ = fused_linear_logprob_reference(hidden, weight, pred_index, target_id, bias=bias, **head)

    def near(x, scale):
        return x + scale * torch.randn(n, generator=g, dtype=x.dtype)

    old = near(logp, 0.5)
    return {
        "old_logp": old,
        "advantage": near(torch.zeros_like(logp), 1.0),
        "rl_weight": torch.rand(n, generator=g, dtype=logp.dtype) * (torch.arange(n) % 5 != 3),
        "ce_weight": torch.rand(n, generator=g, dtype=logp.dtype) * (torch.arange(n) % 3 == 0),
        "ref_logp": near(logp, 0.7),
        "sampler_logp": near(old, 0.3),
        "row_lengths": [min(7, n - start) for start in range(0, n, 7)],
        "eps_low": 0.25,
        "eps_high": 0.28125,
    }


def terms_and_options(
    n, *, eps_low=0.2, eps_high=0.28, clip="ppo", dual_clip=None, beta=0.0, entropy_coef=0.0, is_cap=None,
    ratio="token", **given,
):  # fmt: skip
    """What fused_linear_cipo_loss makes of its arguments, in fp64."""
    terms = stack_terms(n, torch.float64, torch.device("cpu"), **dict.fromkeys(Terms._fields) | given)
    is_cap = None if given.get("sampler_logp") is None else is_cap
    on_policy = given.get("old_logp") is None
    sequence, cispo = ratio == "sequence", clip == "cispo"
    return terms, Options(eps_low, eps_high, dual_clip, beta, entropy_coef, is_cap, on_policy, cispo, sequence)


def run(impl, parameters, pred_index, target_id, monkeypatch, **kwargs) -> tuple[LossOutput, list]:
    monkeypatch.setenv("CIPO_KERNELS", impl)
    for p in parameters:
        p.grad = None
    hidden, weight, bias = parameters
    out = fused_linear_cipo_loss(hidden, weight, pred_index, target_id, bias=bias, **kwargs)
    (out.loss * 1.7).backward()  # an incoming gradient other than 1
    return out, [None if p.grad is None else p.grad.clone() for p in parameters]


def assert_same(actual, expected, rtol=1e-10, atol=1e-12):
    """Outputs and gradients of two `run`s. atol is far under the gradients here, of order 1e-2 to 1.

    Not two_pass_rows, the last: it says how the others were computed.
    """
    for a, b in zip((*actual[0][:-1], *actual[1]), (*expected[0][:-1], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# Options that fp32 holds exactly: a kernel's scalar arguments are fp32, whatever the tensors are.
TERMS = {
    "rl": {},
    "rl tight clip": {"eps_low": 0.0078125, "eps_high": 0.015625},
    "kl": {"beta": 0.3125},
    "entropy": {"entropy_coef": 0.1875},
    "is_cap": {"is_cap": 1.125},
    "all": {"beta": 0.3125, "entropy_coef": 0.1875, "is_cap": 1.125},
    "on-policy": {"old_logp": None},
    "kl and entropy on-policy": {"beta": 0.3125, "entropy_coef": 0.1875, "old_logp": None, "dual_clip": 1.5},
    "all on-policy": {"beta": 0.3125, "entropy_coef": 0.1875, "is_cap": 1.125, "old_logp": None},
    "dual clip": {"dual_clip": 1.5},
    "all dual clip": {"dual_clip": 1.5, "beta": 0.3125, "entropy_coef": 0.1875, "is_cap": 1.125},
    "cispo": {"clip": "cispo"},
    "all cispo": {"clip": "cispo", "beta": 0.3125, "entropy_coef": 0.1875, "is_cap": 1.125},
}
WHOLE = (None, 0)  # an operator's shard: all of the vocabulary
EVERY_TERM = [
    (name, ratio) for name in TERMS for ratio in ("token", "sequence") if ratio == "token" or "cispo" not in name
]


@pytest.mark.parametrize(("name", "ratio"), EVERY_TERM)
def test_matches_reference_for_every_term(name, ratio, monkeypatch):
    inputs = make_inputs()
    kwargs = make_terms(*inputs) | TERMS[name] | {"ratio": ratio}
    expected = run("reference", *inputs, monkeypatch, **kwargs)
    actual = run("torch", *inputs, monkeypatch, chunk_targets=CHUNK, **kwargs)
    assert_same(actual, expected)
    if name == "rl" and ratio == "token":
        q, a = expected[0].ratio, kwargs["advantage"]
        for beyond in (q > 1.28, q < 0.8):  # the cases meant to be covered are there
            assert (beyond & (a > 0)).any()
            assert (beyond & (a < 0)).any()
        assert 0 < expected[0].clip_fraction < 1
    if name == "dual clip" and ratio == "token":  # on top of PPO's there are targets that only the dual clip holds
        out, a = expected[0], kwargs["advantage"]
        assert (out.clipped & (out.ratio > 1.5) & (a < 0)).any()
        assert ((out.ratio < 1.5) & (out.ratio > 1.28) & (a < 0)).any()


@pytest.mark.parametrize("which", ["rl_weight", "ce_weight"])
def test_matches_reference_for_one_stream_alone(which, monkeypatch):
    inputs = make_inputs()
    kwargs = make_terms(*inputs)
    kwargs[which] = torch.zeros_like(kwargs[which])
    expected = run("reference", *inputs, monkeypatch, **kwargs)
    assert_same(run("torch", *inputs, monkeypatch, chunk_targets=CHUNK, **kwargs), expected)


HEADS = {
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "both": {"temperature": 1.3, "softcap": 3.0},
    "per-target temperature": {"temperature": torch.linspace(0.5, 2.0, 41, dtype=torch.float64), "softcap": 3.0},
}


@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
@pytest.mark.parametrize("name", HEADS)
def test_matches_reference_for_every_head(name, entropy_coef, monkeypatch):
    inputs, head = make_inputs(), HEADS[name]
    kwargs = make_terms(*inputs, **head) | head | {"entropy_coef": entropy_coef}
    expected = run("reference", *inputs, monkeypatch, **kwargs)
    assert_same(run("torch", *inputs, monkeypatch, chunk_targets=CHUNK, **kwargs), expected)


@pytest.mark.parametrize("vocab", [37, 257, 1000])
@pytest.mark.parametrize("n", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_matches_reference_for_ragged_sizes(vocab, n, ratio, monkeypatch):
    inputs = make_inputs(n=n, vocab=vocab)
    kwargs = make_terms(*inputs) | {"ratio": ratio, "entropy_coef": 0.1}
    expected = run("reference", *inputs, monkeypatch, **kwargs)
    actual = run("torch", *inputs, monkeypatch, chunk_targets=CHUNK, **kwargs)
    assert_same(actual, expected)
    if n == 0:
        assert actual[0].loss == 0
        assert not any(g.any() for g in actual[1])


def test_rows_longer_and_shorter_than_a_chunk(monkeypatch):
    lengths = [3, 40, 1, 0, 15, 16, 17, 2, 2, 0]  # chunk 16: several rows a chunk, one exact, two in several chunks
    inputs = make_inputs(n=sum(lengths))
    kwargs = make_terms(*inputs) | {"ratio": "sequence", "entropy_coef": 0.1}
    kwargs["row_lengths"] = lengths
    expected = run("reference", *inputs, monkeypatch, **kwargs)
    actual = run("torch", *inputs, monkeypatch, chunk_targets=CHUNK, **kwargs)
    assert_same(actual, expected)
    assert actual[0].two_pass_rows == 2  # of 40 and 17 targets
    with torch.no_grad():
        out = fused_linear_cipo_loss(*inputs[0][:2], *inputs[1:], bias=inputs[0][2], chunk_targets=CHUNK, **kwargs)
    assert out.two_pass_rows == 0
    assert run("torch", *inputs, monkeypatch, chunk_targets=40, **kwargs)[0].two_pass_rows == 0


def test_on_policy_rows_take_one_pass(monkeypatch):
    """No old_logp and no importance weight: a ratio of 1 is known before the logits are, however long the row."""
    inputs = make_inputs()
    kwargs = make_terms(*inputs) | {"ratio": "sequence", "row_lengths": [30, 11], "old_logp": None}
    kwargs["rl_weight"] = kwargs["rl_weight"] * torch.logspace(-6, 0, 41, dtype=torch.float64)  # far from equal
    for weighed in ({"is_cap": None}, {"is_cap": 1.125, "sampler_logp": None}):
        out, grads = run("torch", *inputs, monkeypatch, chunk_targets=CHUNK, **kwargs | weighed)
        assert_same((out, grads), run("reference", *inputs, monkeypatch, **kwargs | weighed))
        assert out.two_pass_rows == 0
        assert (out.ratio == 1).all()
        assert not out.clipped.any()
    weighed = run("torch", *inputs, monkeypatch, chunk_targets=CHUNK, **kwargs | {"is_cap": 1.125})
    assert weighed[0].two_pass_rows == 1


class Ops(TorchDispatchMode):
    """Names and shapes of the first operand of all that runs within."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func.overloadpacket.__name__, getattr(args[0], "shape", None) if args else None))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("ratio", ["token", "sequence", "on-policy sequence"])
def test_the_host_reads_nothing_from_the_device_and_no_sum_of_a_row_is_atomic(ratio, needs_grad):
    """Fake tensors hold no values: whatever would read one, or a shape that depends on one, raises. The operator's own
    body runs on them, in the chunks that a GPU's launches follow; there is a row of several."""
    parameters, *index = make_inputs()
    terms = make_terms(parameters, *index) | {"beta": 0.1, "entropy_coef": 0.1, "is_cap": 2.0}
    terms |= {"ratio": ratio.split()[-1]} | ({"old_logp": None, "is_cap": None} if "on-policy" in ratio else {})
    del terms["row_lengths"]
    stacked, options = terms_and_options(41, **terms)
    mode = FakeTensorMode()
    *given, fake = (mode.from_tensor(x.detach()) for x in (*parameters, *index, stacked))
    with mode, Ops() as ops:
        with pytest.raises(DataDependentOutputException):
            given[0].sum().item()
        rows = [20, 21] if options.sequence else None
        body = _linear_cipo_loss._init_fn
        body(*given, None, None, CHUNK, [needs_grad] * 3, fake, options.to_floats(), rows, "logits", *WHOLE)
    atomic = [shape for name, shape in ops.seen if name.startswith(("index_add", "scatter_add", "index_put"))]
    assert {len(shape) for shape in atomic} <= {2}  # d(hidden) and d(logits); a target has one id, a token may repeat
    assert ("segment_reduce" in {name for name, _ in ops.seen}) == (ratio != "token")


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_chunk_size_changes_nothing(ratio, monkeypatch):
    inputs = make_inputs()
    kwargs = make_terms(*inputs) | {"ratio": ratio, "beta": 0.1, "entropy_coef": 0.1}
    runs = [run("torch", *inputs, monkeypatch, chunk_targets=c, **kwargs) for c in (1, 7, 16, 41, 1000, "auto")]
    for a, b in pairwise(runs):
        assert_same(a, b)


def test_strided_inputs(monkeypatch):
    inputs = make_inputs()
    kwargs = make_terms(*inputs)
    expected = run("torch", *inputs, monkeypatch, chunk_targets=CHUNK, **kwargs)

    def strided(x):  # every other column of a tensor twice as wide
        wide = torch.stack((x, torch.full_like(x, 9)), dim=-1)
        return wide[..., 0] if x.dim() == 1 else wide.flatten(-2)[..., ::2]

    (hidden, weight, bias), pred_index, target_id = inputs
    leaves = (strided(hidden.detach()), weight.detach().T.contiguous().T, strided(bias.detach()))
    assert not any(x.is_contiguous() for x in leaves)
    leaves = tuple(x.requires_grad_() for x in leaves)
    terms = {k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    assert_same(
        run("torch", leaves, strided(pred_index), strided(target_id), monkeypatch, chunk_targets=CHUNK, **terms),
        expected,
    )


# Values worked by hand from the formula, for p = (1/2, 1/4, 1/4) and target 0: logp = -ln 2, H = 1.5 ln 2.
LN2, LN3 = math.log(2), math.log(3)
BY_HAND = {
    # (old_logp, advantage, rl_weight, ce_weight, options): loss
    "above the clip, A > 0": ((-2 * LN2, 1, 1, 0, {}), -1.28),  # q = 2: min(2, 1.28)
    "above the clip, A < 0": ((-2 * LN2, -1, 1, 0, {}), 2.0),  # min(-2, -1.28)
    "below the clip, A > 0": ((0, 1, 1, 0, {}), -0.5),  # q = 1/2: min(.5, .8)
    "below the clip, A < 0": ((0, -1, 1, 0, {}), 0.8),  # min(-.5, -.8)
    "cross-entropy": ((0, 1, 0, 3, {}), 3 * 0.6931471805599453),
    "entropy": ((-LN2, 0, 2, 0, {"entropy_coef": 0.1}), -0.2 * 1.0397207708399179),
    "kl": ((-LN2, 0, 2, 0, {"beta": 0.5, "ref_logp": -2 * LN2}), 0.1931471805599453),  # k3 = 1/2 + ln 2 - 1
    "is below the cap": ((-LN2, 1, 1, 0, {"is_cap": 4.0, "sampler_logp": -LN2 - LN3}), -3.0),  # is = 3, q = 1
    "is above the cap": ((-LN2, 1, 1, 0, {"is_cap": 2.0, "sampler_logp": -LN2 - LN3}), -2.0),
    "dual clip, q above it": ((-3 * LN2, -1, 1, 0, {"dual_clip": 3.0}), 3.0),  # q = 4: max(min(-4, -1.28), -3)
    "dual clip, q below it": ((-2 * LN2, -1, 1, 0, {"dual_clip": 3.0}), 2.0),  # max(min(-2, -1.28), -3)
    "dual clip, A > 0": ((-3 * LN2, 1, 1, 0, {"dual_clip": 3.0}), -1.28),  # PPO's
    "cispo above": ((-2 * LN2, 1, 1, 0, {"clip": "cispo"}), 1.28 * LN2),  # -clip(2) A logp
    "cispo below": ((0, -2, 1, 0, {"clip": "cispo"}), -2 * 0.8 * LN2),
    "cispo within": ((-LN2, 1, 1, 0, {"clip": "cispo", "is_cap": 2.0, "sampler_logp": -LN2 - LN3}), 2 * LN2),
}
CLIPPED = {"above the clip, A > 0", "below the clip, A < 0", "dual clip, q above it", "dual clip, A > 0",
           "cispo above", "cispo below"}  # fmt: skip


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", BY_HAND)
def test_values_worked_by_hand(name, impl, monkeypatch):
    monkeypatch.setenv("CIPO_KERNELS", impl)
    (old, advantage, rl, ce, options), loss = BY_HAND[name]

    def one(x):
        return torch.tensor([x], dtype=torch.float64)

    weight = torch.tensor([[0.5], [0.25], [0.25]], dtype=torch.float64).log()
    index = torch.zeros(1, dtype=torch.int64)
    options = {k: one(v) if k.endswith("logp") else v for k, v in options.items()}
    terms = {"old_logp": old, "advantage": advantage, "rl_weight": rl, "ce_weight": ce}
    terms = {k: one(v) for k, v in terms.items()}
    out = fused_linear_cipo_loss(one(1.0)[None], weight, index, index, **terms, **options)
    assert out.loss.item() == pytest.approx(loss, rel=1e-12)
    assert out.logp.item() == pytest.approx(-LN2, rel=1e-12)
    assert out.entropy.item() == pytest.approx(1.5 * LN2, rel=1e-12)
    assert out.clipped.item() == (name in CLIPPED)


SLOPES = {
    # (clip, dual_clip): d loss / d logp of targets with q, A = (2, 1), (1/2, 1), (1, -1), (2, -1), (1/2, -1), (4, -1)
    ("ppo", None): [0, -0.5, 1, 2, 0, 4],
    ("ppo", 3.0): [0, -0.5, 1, 2, 0, 0],
    ("cispo", None): [-1.28, -0.8, 1, 1.28, 0.8, 1.28],  # every token teaches: the clipped ones with a bounded weight
}


@pytest.mark.parametrize(("clip", "dual_clip"), SLOPES)
def test_gradients_worked_by_hand(clip, dual_clip):
    q = torch.tensor([2, 0.5, 1, 2, 0.5, 4], dtype=torch.float64)
    logp = torch.full((6,), -5.0, dtype=torch.float64, requires_grad=True)
    one, zero = torch.ones_like(q), torch.zeros_like(q)
    given = {"old_logp": logp.detach() - q.log(), "advantage": torch.tensor([1.0, 1, -1, -1, -1, -1])}
    terms, options = terms_and_options(6, **given, rl_weight=one, clip=clip, dual_clip=dual_clip)
    loss, _, _ = target_loss(logp, zero, Terms(*terms), options)
    loss.sum().backward()
    expected = torch.tensor(SLOPES[clip, dual_clip], dtype=torch.float64)
    torch.testing.assert_close(logp.grad, expected, rtol=1e-12, atol=0)


def test_sequence_ratio_and_stats_by_hand():
    """Row 0: d = ln 4, 0 and a masked target, so q = exp(ln 4 / 2) = 2. Row 1: d = -ln 2, so q = 1/2."""
    logp = torch.tensor([-LN2, -LN2, -LN2, -LN2], dtype=torch.float64, requires_grad=True)
    terms = {
        "old_logp": [-3 * LN2, -LN2, math.inf, 0.0],
        "advantage": [1.0, -1.0, 1.0, 1.0],
        "rl_weight": [1.0, 1.0, 0.0, 10.0],
        "ce_weight": [0.0] * 4,
    }
    terms = {k: torch.tensor(v, dtype=torch.float64) for k, v in terms.items()}
    terms, options = terms_and_options(4, **terms, ratio="sequence")
    loss, q, clipped = target_loss(logp, torch.zeros(4), Terms(*terms), options, torch.tensor([3, 1]))
    torch.testing.assert_close(loss, torch.tensor([-1.28, 2.0, 0.0, -5.0], dtype=torch.float64))
    torch.testing.assert_close(q, torch.tensor([2.0, 2.0, 1.0, 0.5], dtype=torch.float64))
    assert clipped.tolist() == [True, False, False, False]
    loss.sum().backward()
    # only target 1 of row 0 is free: d loss/dq = 1, dq/d logp = q / 2 for each of the row's two targets
    torch.testing.assert_close(logp.grad, torch.tensor([1.0, 1.0, 0.0, -5.0], dtype=torch.float64))


def test_k3_by_hand():
    r, p = torch.tensor([-1.0, -2.0, -1.5]), torch.tensor([-2.0, -1.0, -1.5])
    expected = torch.tensor([math.e - 2, 1 / math.e, 0.0])  # e - 1 - 1 and 1/e + 1 - 1
    torch.testing.assert_close(k3(r, p), expected)


def test_stats_cover_targets_with_rl_weight(monkeypatch):
    inputs = make_inputs()
    kwargs = make_terms(*inputs)
    out, _ = run("torch", *inputs, monkeypatch, chunk_targets=CHUNK, **kwargs)
    rl = kwargs["rl_weight"] != 0
    d = (out.logp - kwargs["old_logp"])[rl]
    torch.testing.assert_close(out.ratio[rl], d.exp())
    torch.testing.assert_close(out.approx_kl, (d.exp() - 1 - d).mean())
    torch.testing.assert_close(out.ratio_max, d.exp().max())
    torch.testing.assert_close(out.clip_fraction, out.clipped[rl].double().mean())
    assert (out.ratio[~rl] == 1).all()


def test_on_policy_is_old_logp_equal_to_logp(monkeypatch):
    inputs = make_inputs()
    kwargs = make_terms(*inputs) | {"is_cap": 1.1}
    out, grads = run("torch", *inputs, monkeypatch, **(kwargs | {"old_logp": None}))
    assert (out.ratio == 1).all()
    assert out.approx_kl == 0
    assert grads[1].any()
    assert_same((out, grads), run("torch", *inputs, monkeypatch, **(kwargs | {"old_logp": out.logp})))


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_zero_weight_targets_give_exactly_nothing(impl, ratio, monkeypatch):
    inputs = make_inputs()
    kwargs = make_terms(*inputs) | {"beta": 0.3, "entropy_coef": 0.2, "is_cap": 1.1, "ratio": ratio}
    off = torch.arange(41) % 2 == 0
    kwargs["rl_weight"] = kwargs["rl_weight"].masked_fill(off, 0)
    kwargs["ce_weight"] = kwargs["ce_weight"].masked_fill(off, 0)
    clean = run(impl, *inputs, monkeypatch, chunk_targets=CHUNK, **kwargs)
    for poison in (math.inf, -math.inf, math.nan):
        dirty = kwargs | {
            k: kwargs[k].masked_fill(off, poison) for k in ("old_logp", "ref_logp", "sampler_logp", "advantage")
        }
        assert_same(run(impl, *inputs, monkeypatch, chunk_targets=CHUNK, **dirty), clean, rtol=0, atol=0)
    nothing = kwargs | {"rl_weight": torch.zeros(41), "ce_weight": torch.zeros(41)}
    out, grads = run(impl, *inputs, monkeypatch, **nothing)
    assert out.loss == 0
    assert out.ratio_max == out.clip_fraction == out.approx_kl == 0
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("clip", ["ppo", "cispo"])
def test_target_loss_keeps_infinite_logp_out(clip):
    logp = torch.tensor([-math.inf, math.nan, -1.0], requires_grad=True)
    entropy = torch.tensor([math.nan, 1.0, 1.0], requires_grad=True)
    zero, one = torch.zeros(3), torch.tensor([0.0, 0.0, 1.0])
    given = {"old_logp": logp, "advantage": torch.ones(3), "rl_weight": one, "ce_weight": one, "ref_logp": zero}
    terms, options = terms_and_options(3, **given, sampler_logp=zero, beta=0.1, entropy_coef=0.1, is_cap=2.0, clip=clip)
    loss, _, _ = target_loss(logp, entropy, Terms(*terms), options)
    assert loss[:2].tolist() == [0, 0]
    loss.sum().backward()
    assert logp.grad[:2].tolist() == entropy.grad[:2].tolist() == [0, 0]
    assert logp.grad[2].isfinite()


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2)])
def test_frozen_parameters_get_no_gradient(frozen, monkeypatch):
    inputs = make_inputs()
    kwargs = make_terms(*inputs) | {"chunk_targets": CHUNK}
    expected, grads = run("torch", *inputs, monkeypatch, **kwargs)
    for i in frozen:
        inputs[0][i].requires_grad_(False)
        grads[i] = None
    out, actual = run("torch", *inputs, monkeypatch, **kwargs)
    torch.testing.assert_close(out.loss, expected.loss)
    for a, b in zip(actual, grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_without_grad_no_gradient_is_computed(monkeypatch):
    (hidden, weight, bias), pred_index, target_id = make_inputs()
    kwargs = make_terms((hidden, weight, bias), pred_index, target_id) | {"bias": bias, "chunk_targets": CHUNK}
    expected = fused_linear_cipo_loss(hidden, weight, pred_index, target_id, **kwargs)
    monkeypatch.setattr(chunked, "d_logits", None)  # a call would raise
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = fused_linear_cipo_loss(hidden, weight, pred_index, target_id, **kwargs)
        assert not out.loss.requires_grad
        torch.testing.assert_close(tuple(out), tuple(x.detach() for x in expected), rtol=0, atol=0)


def test_only_the_loss_is_differentiable_and_only_once():
    (hidden, weight, bias), pred_index, target_id = make_inputs()
    terms = make_terms((hidden, weight, bias), pred_index, target_id)
    out = fused_linear_cipo_loss(hidden, weight, pred_index, target_id, bias=bias, **terms)
    assert [x.requires_grad for x in out] == [True] + [False] * 8
    logp = fused_linear_logprob(hidden, weight, pred_index, target_id, bias=bias)
    for loss in (out.loss, logp.sum()):
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            torch.autograd.grad(loss, weight, create_graph=True)


def test_backward_twice_with_retain_graph():
    (hidden, weight, bias), pred_index, target_id = make_inputs()
    terms = make_terms((hidden, weight, bias), pred_index, target_id)
    out = fused_linear_cipo_loss(hidden, weight, pred_index, target_id, bias=bias, **terms)
    first = torch.autograd.grad(out.loss, weight, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(2 * out.loss, weight)[0], 2 * first, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_gradcheck_of_the_loss(impl, ratio, monkeypatch):
    monkeypatch.setenv("CIPO_KERNELS", impl)
    inputs = make_inputs(n=7, vocab=11, width=4, tokens=5)
    parameters, pred_index, target_id = inputs
    head = {"temperature": 1.3, "softcap": 3.0}
    terms = make_terms(*inputs, **head) | head | {"beta": 0.3, "entropy_coef": 0.2, "is_cap": 1.1, "ratio": ratio}

    def loss(hidden, weight, bias):
        return fused_linear_cipo_loss(hidden, weight, pred_index, target_id, bias=bias, chunk_targets=3, **terms).loss

    assert torch.autograd.gradcheck(loss, parameters)


@pytest.mark.parametrize("head", [{}, {"temperature": 1.3, "softcap": 3.0}])
@pytest.mark.parametrize("return_entropy", [False, True])
def test_gradcheck_of_logprob(return_entropy, head):
    parameters, pred_index, target_id = make_inputs(n=7, vocab=11, width=4, tokens=5)

    def logprob(hidden, weight, bias):
        return fused_linear_logprob(
            hidden, weight, pred_index, target_id, bias=bias, return_entropy=return_entropy, chunk_targets=3, **head
        )

    assert torch.autograd.gradcheck(logprob, parameters)


@pytest.mark.parametrize("n", [0, 1, CHUNK + 1, 41])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_logprob_matches_reference(n, head):
    (hidden, weight, bias), pred_index, target_id = make_inputs(n=n)
    if isinstance(head.get("temperature"), torch.Tensor):
        head = head | {"temperature": head["temperature"][:n]}
    actual = fused_linear_logprob(
        hidden, weight, pred_index, target_id, bias=bias, return_entropy=True, chunk_targets=CHUNK, **head
    )
    expected = fused_linear_logprob_reference(hidden, weight, pred_index, target_id, bias=bias, **head)
    mix = torch.linspace(-1, 2, n, dtype=torch.float64)
    for coefficients in ((mix, mix.flip(0)), (mix, 0 * mix), (0 * mix, mix)):
        grads = [
            torch.autograd.grad(
                sum((c * x).sum() for c, x in zip(coefficients, out, strict=True)),
                (hidden, weight, bias),
                retain_graph=True,
            )
            for out in (actual, expected)
        ]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_logprob_of_entropy_alone_and_without_grad():
    (hidden, weight, _), pred_index, target_id = make_inputs()
    args = (hidden, weight, pred_index, target_id)
    _, entropy = fused_linear_logprob(*args, return_entropy=True, chunk_targets=CHUNK)
    _, expected = fused_linear_logprob_reference(*args)
    grads = [torch.autograd.grad(h.sum(), (hidden, weight)) for h in (entropy, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        logp = fused_linear_logprob(*args, chunk_targets=CHUNK)
    assert not logp.requires_grad
    torch.testing.assert_close(logp, fused_linear_logprob_reference(*args)[0].detach(), rtol=1e-10, atol=1e-12)


def extreme_head(z):
    """hidden and weight whose fp32 logits are exactly z [N, V]: a one-hot hidden row picks a column of z^T."""
    return torch.eye(len(z)), z.T.contiguous()


def test_extreme_logits_in_fp32():
    """All -1e4; a target at -80 nats; a probability within 1e-7 of 1; a target at -1e4: finite and fp32-accurate."""
    vocab = 37
    z = torch.full((4, vocab), -1e4)
    z[1:] = 0
    z[1, 5], z[2, 0], z[3, 5] = 80.0, 20.0, 1e4
    hidden, weight = (x.requires_grad_() for x in extreme_head(z))
    pred_index, target_id = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    logp, entropy = fused_linear_logprob(hidden, weight, pred_index, target_id, return_entropy=True)
    with torch.no_grad():
        expected = fused_linear_logprob_reference(hidden.double(), weight.double(), pred_index, target_id)
    torch.testing.assert_close(logp.double(), expected[0], rtol=2e-7, atol=1e-7)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-6, atol=1e-7)
    assert (logp <= 0).all()
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_bf16_inputs_give_fp32_logp():
    """Products of bf16 are exact in fp32; left is fp32 accumulation over H = 256, about 1e-6 at |z| of 20."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 256, generator=g).bfloat16().requires_grad_()
    weight = (torch.randn(4000, 256, generator=g) * 0.3).bfloat16().requires_grad_()
    pred_index, target_id = torch.arange(64), torch.randint(4000, (64,), generator=g)
    terms = {k: torch.rand(64, generator=g) for k in ("advantage", "rl_weight", "ce_weight")} | {"old_logp": None}
    out = fused_linear_cipo_loss(hidden, weight, pred_index, target_id, chunk_targets=20, **terms)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = fused_linear_cipo_loss(*exact, pred_index, target_id, **terms)
    assert out.logp.dtype == out.loss.dtype == torch.float32
    torch.testing.assert_close(out.logp.double(), expected.logp, rtol=0, atol=1e-5)
    out.loss.backward()
    expected.loss.backward()
    for p, e in zip((hidden, weight), exact, strict=True):
        assert p.grad.dtype == torch.bfloat16  # rounded once, at the end: half a bf16 ulp, 2^-9
        torch.testing.assert_close(p.grad.double(), e.grad, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("op", ["loss", "logprob"])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_autocast_casts_the_operands_as_it_does_those_of_linear(impl, op, monkeypatch):
    monkeypatch.setenv("CIPO_KERNELS", impl)
    (hidden, weight, bias), *index = make_inputs(dtype=torch.float32)
    terms = make_terms((hidden, weight, bias), *index)

    def run(h, w):
        if op == "loss":
            return fused_linear_cipo_loss(h, w, *index, bias=bias, **terms).loss
        return fused_linear_logprob(h, w, *index, bias=bias).sum()

    expected = run(hidden.bfloat16(), weight.bfloat16())
    for given in (weight, weight.bfloat16()):  # the norm before the head returns fp32: two dtypes
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = run(hidden, given)
        assert torch.equal(actual, expected)
    grads = [torch.autograd.grad(loss, (hidden, weight)) for loss in (actual, expected)]
    for d, e in zip(*grads, strict=True):
        assert d.dtype == torch.float32
        assert torch.equal(d, e)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # fp64 stays, as in F.linear
        assert run(hidden.double(), weight.double()).dtype == torch.float64


BAD = {
    "hidden": ({"weight": torch.zeros(5, 3)}, r"expected \[T, H\] and \[V, H\]"),
    "integer hidden": ({"hidden": torch.zeros(30, 24, dtype=torch.int64)}, "must be floating point"),
    "two dtypes": ({"weight": torch.zeros(257, 24)}, "hidden is torch.float64 and weight torch.float32: cast one"),
    "fp16": ({"hidden": torch.zeros(30, 24).half(), "weight": torch.zeros(257, 24).half()}, "expected bfloat16"),
    "pred_index": ({"pred_index": torch.zeros(41, dtype=torch.int32)}, r"pred_index is torch.int32 .*int64 \[N\]"),
    "target_id": ({"target_id": torch.zeros(40, dtype=torch.int64)}, "target_id is"),
    "bias": ({"bias": torch.zeros(3)}, r"bias is \[3\]"),
    "temperature": ({"temperature": 0.0}, "temperature=0.0: must be positive"),
    "temperatures": ({"temperature": torch.ones(3)}, r"temperature is \[3\]"),
    "softcap": ({"softcap": 0.0}, "softcap=0.0: must be positive"),
    "chunk_targets": ({"chunk_targets": 0}, "chunk_targets=0: expected"),
    "advantage": ({"advantage": torch.zeros(3)}, r"advantage is \[3\]"),
    "ratio": ({"ratio": "row"}, "ratio='row': expected"),
    "no row_lengths": ({"ratio": "sequence", "row_lengths": None}, "needs row_lengths"),
    "rows of other targets": ({"ratio": "sequence", "row_lengths": [40]}, r"row_lengths=\[40\]: .* add up to N = 41"),
    "a row of -1": ({"ratio": "sequence", "row_lengths": [42, -1]}, r"row_lengths=\[42, -1\]"),
    "clip": ({"clip": "tight"}, "clip='tight': expected"),
    "dual_clip": ({"dual_clip": 1.0}, "dual_clip=1.0: must be above 1"),
    "cispo of sequences": ({"clip": "cispo", "ratio": "sequence"}, 'defined for ratio="token"'),
    "cispo with a dual clip": ({"clip": "cispo", "dual_clip": 3.0}, "without dual_clip"),
    "no ref_logp": ({"beta": 0.1, "ref_logp": None}, "needs ref_logp"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_a_sentence(name):
    (hidden, weight, bias), pred_index, target_id = make_inputs()
    kwargs = {"hidden": hidden, "weight": weight, "bias": bias, "pred_index": pred_index, "target_id": target_id}
    kwargs |= make_terms((hidden, weight, bias), pred_index, target_id)
    wrong, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        fused_linear_cipo_loss(**(kwargs | wrong))
