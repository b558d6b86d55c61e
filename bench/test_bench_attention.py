"""Tree attention, forward and backward, on a pack of the embedded task.

`pytest bench/ --benchmark-only -k attention`
"""

import random
import time
from statistics import median

import pytest
import torch
from cipo_kernels.tree_attention import tree_attention, tree_attention_reference
from cipo_kernels.tree_attention.layout import TreeLayout

HQ, HKV, D = 4, 2, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def embedded_pack(n_trees=32):
    """Lengths, parents and conversations (last segments): 8 rollouts a prompt, one or two corrected."""
    rng = random.Random(0)
    lengths, parents, conversations = [], [], []

    def add(length, parent):
        lengths.append(length)
        parents.append(parent)
        return len(lengths) - 1

    for _ in range(n_trees):
        prompt = add(rng.randint(18, 22), -1)
        anchors = rng.sample(range(8), rng.randint(1, 2))
        for i in range(8):
            rollout = add(9, prompt)
            conversations.append(rollout)
            if i in anchors:
                glue = add(9, rollout)
                conversations += [add(9, glue) for _ in range(8)]
    return lengths, parents, conversations


def as_rows(tree, conversations):
    """The layout of one causal row a conversation, and the tree's token for each of the rows' tokens."""
    paths = []
    for segment in conversations:
        path = []
        while segment >= 0:
            path.insert(0, torch.arange(int(tree.start[segment]), int(tree.end[segment])))
            segment = int(tree.parent[segment])
        paths.append(torch.cat(path))
    return TreeLayout.from_parents([len(path) for path in paths], [-1] * len(paths)), torch.cat(paths)


@pytest.fixture(scope="module")
def cases():
    """Name -> (function computing o, dq, dk, dv; layout), checked against the reference."""
    lengths, parents, conversations = embedded_pack()
    tree = TreeLayout.from_parents(lengths, parents)
    rows, token_of_row = as_rows(tree, conversations)
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(tree.num_tokens, h, D, generator=generator).to(DEVICE) for h in (HQ, HKV, HKV)]
    do = torch.randn(tree.num_tokens, HQ, D, generator=generator).to(DEVICE)
    tree, rows, token_of_row = tree.to(DEVICE), rows.to(DEVICE), token_of_row.to(DEVICE)

    def case(attention, layout, qkv, do):
        qkv = [x.clone().requires_grad_() for x in qkv]

        def run():
            o = attention(*qkv, layout)
            return (o, *torch.autograd.grad(o, qkv, do))

        return run, layout

    cases = {
        "reference": case(tree_attention_reference, tree, qkv, do),
        "tree": case(tree_attention, tree, qkv, do),
        "rows": case(tree_attention, rows, [x[token_of_row] for x in qkv], do[token_of_row]),
    }
    expected = cases["reference"][0]()
    for actual, exact in zip(cases["tree"][0](), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cases["rows"][0]()[0], expected[0][token_of_row], rtol=1e-4, atol=1e-4)
    return cases


def seconds(run):
    start = time.perf_counter()
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.mark.parametrize("name", ["reference", "rows", "tree"])
def test_attention(benchmark, cases, name):
    (run, layout), (run_tree, _) = cases[name], cases["tree"]
    rounds = 2 if name == "reference" else 15
    pairs = [(seconds(run), seconds(run_tree)) for _ in range(rounds)]  # interleaved: noise hits both alike
    own, tree = (median(times) for times in zip(*pairs, strict=True))
    benchmark.group = f"tree attention, forward and backward, {DEVICE}"
    benchmark.extra_info["tokens"] = layout.num_tokens
    benchmark.extra_info["visible_pairs"] = layout.visible_pairs()
    benchmark.extra_info["speedup_of_tree"] = own / tree
    benchmark.pedantic(seconds, args=(run,), rounds=rounds)
