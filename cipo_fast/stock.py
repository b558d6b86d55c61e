"""Once, before anything is trained: what the policy computes of a tree is what the stock model computes of its rows.

No list of architectures can be whole. This shows, for the model at hand, that siblings do not see each other, that
positions follow the path, that training mode changes nothing, and that the head's formula is the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cipo_fast.config import Config
from cipo_fast.distributed import is_main, raise_together
from cipo_fast.errors import UserError
from cipo_fast.model import one_line
from cipo_fast.packing import build_trees, make_pack
from cipo_fast.policy import ATTENTION, Policy
from cipo_fast.records import Conversation, Segment

PART = 32  # tokens of the prompt, and of either branch
NUDGE = 1e-6  # relative; about eight roundings of fp32
# Differences that count are larger by this factor than those that a nudge to every embedding makes. Two right ways to
# compute stay below 1, in the architectures tried; siblings that are seen, wrong positions or scales are in the
# thousands, in tiny random models too, whose log-probs hardly depend on what came before.
FACTOR = 30.0


def check_on_one_rank(model: PreTrainedModel, config: Config, prompts: Sequence[Sequence[int]]) -> None:
    """`check_against_stock` by the first rank, all of them holding the same; raises on every rank or on none."""
    error = None
    if is_main():
        try:
            check_against_stock(model, config, prompts)
        except UserError as refused:
            error = refused
    raise_together(error)


def check_against_stock(model: PreTrainedModel, config: Config, prompts: Sequence[Sequence[int]]) -> None:
    """UserError unless `model` (fp32, `cipo_tree` attention, not yet sharded) gives a two-branch tree of real tokens
    what stock eager attention gives its rows. `prompts`: token ids of some of the run's prompts, one at least."""
    name = type(model).__name__
    trunk, branches = _tree_of(prompts, model.config.get_text_config().vocab_size)
    try:
        own = _by_policy(model, config, trunk, branches)
        with _stock(model):
            rows = [_row(model, trunk, branch, 0.0) for branch in branches]
            nudged = [_row(model, trunk, branch, NUDGE) for branch in branches]
    except UserError:
        raise
    except Exception as error:  # whatever a model is that does not take trees
        raise UserError(f"model.path: {name} cannot run on trees: {type(error).__name__}: {one_line(error)}") from None
    for place, what in enumerate(("hidden states", "log-probs")):
        stock, other = (torch.cat([row[place] for row in found]) for found in (rows, nudged))
        rounding = max(_typical(other - stock), float(stock.abs().max()) * torch.finfo(torch.float32).eps)
        gap, allowed = _typical(own[place] - stock), FACTOR * rounding
        if not gap <= allowed:  # nan too
            raise UserError(
                f"model.path: {name} is not supported: its {what} on a tree are {gap:.2g} away from those of "
                f"transformers' own model on the rows, where rounding explains {allowed:.2g}"
                + ("; it scales or shapes its logits as the fused loss does not" if what == "log-probs" else "")
            )


def _tree_of(prompts: Sequence[Sequence[int]], vocab: int) -> tuple[list[int], list[list[int]]]:
    """(trunk, two branches that differ from their first token on), each of PART tokens: short prompts are filled up."""
    fill = [i % vocab for i in range(PART)]
    trunk, *tails = [(list(ids) + fill)[:PART] for ids in (prompts[0], *(prompt[-PART:] for prompt in prompts))]
    first = tails[0]
    second = next((tail for tail in tails[1:] if tail[0] != first[0]), first[::-1])
    return trunk, [first, second if second[0] != first[0] else [(first[0] + 1) % vocab, *second[1:]]]


def _by_policy(
    model: PreTrainedModel, config: Config, trunk: list[int], branches: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """([N, H], [N]) hidden states before, and log-probs of, the branches' tokens; in training mode, as they train."""
    prompt = Segment(trunk)
    pack = make_pack(build_trees([Conversation((prompt, Segment(ids)), None, "rollout", 0, 0, 0) for ids in branches]))
    host = config.model_copy(deep=True)
    host.model.attention = "auto"  # the model is still on the host, where not every back-end runs
    policy = Policy(model, host)
    with torch.no_grad(), _last_hidden(model) as seen:
        logp = policy(pack, "logp", 1.0)
    return seen[0][0, pack.pred_index], logp


def _row(model: PreTrainedModel, trunk: list[int], branch: list[int], nudge: float) -> tuple[Tensor, Tensor]:
    """The same of one branch, by the stock model, its embeddings moved by a relative `nudge`."""
    ids = torch.tensor([trunk + branch])
    draw = torch.Generator().manual_seed(0)

    def move(_module: torch.nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output * (1 + nudge * torch.randn(output.shape, generator=draw))

    hook = model.get_input_embeddings().register_forward_hook(move)
    with torch.no_grad(), _last_hidden(model) as seen:
        logits = model(ids, use_cache=False).logits[0, len(trunk) - 1 : -1].float()  # [n, V]
    hook.remove()
    logp = logits.log_softmax(-1).gather(1, ids[0, len(trunk) :, None]).squeeze(1)
    return seen[0][0, len(trunk) - 1 : -1], logp


@contextmanager
def _last_hidden(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects the base model's last hidden states, [1, T, H] a call."""
    seen: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _m, _i, output: seen.append(output.last_hidden_state))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def _stock(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention, the definition (sdpa leaves out soft caps and sinks), in evaluation mode, as engines run it."""
    training = model.training
    model.eval()
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION)
        model.train(training)


def _typical(difference: Tensor) -> float:
    """Of [N] or [N, H]: a token's largest, of the tenth that are worst the least bad. A few tokens may take other
    experts, where two are level; what is wrong with an architecture is wrong with most of a branch."""
    worst = difference.abs().reshape(len(difference), -1).amax(1)
    return float(worst.sort().values[int(0.9 * (len(worst) - 1))])
