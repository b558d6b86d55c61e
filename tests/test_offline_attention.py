"""Compiles every tree attention kernel for sm_80, sm_90 and sm_100, without a GPU, and reads the result.

`python tests/test_offline_attention.py` writes its tables to bench/results/offline.md.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from test_offline_loss import table_in_results, write_table

# Bytes of shared memory a program may have. The configurations of sm_80 also run on sm_86, sm_89 and sm_120: 99 KiB.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# PTX of the tensor cores.
MMA = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
OWN = {"forward": [], "dq": [], "dkdv": ["k", "v"]}  # by descriptor, where there is TMA
BY_POINTER = {"forward": ["q"], "dq": ["q", "o", "do"], "dkdv": []}
STREAMED = {"forward": ["k", "v"], "dq": ["k", "v"], "dkdv": ["q", "do"]}
KERNELS = ("forward", "dq", "dkdv", "dkdv, few keys")
# sm, kernel, head dim, dtype, query heads a key head.
CASES = [(cc, name, D, "bf16", 4) for cc in (80, 90, 100) for D in (64, 96, 128) for name in KERNELS]
# Not in the table.
GROUPS = (1, 2, 3, 5, 6, 7, 8)
OTHER_CASES = [(cc, name, 128, "bf16", group) for cc in (80, 90, 100) for group in GROUPS for name in ("forward", "dq")]
OTHER_CASES += [(90, name, D, "bf16", group) for D in (64, 128) for group in (1, 7) for name in KERNELS[2:]]
OTHER_CASES += [(cc, name, 128, "bf16", group) for cc in (80, 100) for group in (1, 7) for name in KERNELS[2:]]
OTHER_CASES += [(90, name, 64, "bf16", group) for group in (1, 7) for name in KERNELS[:2]]
OTHER_CASES += [(90, name, 64, "fp32", 4) for name in KERNELS]
# sm, kernel of the merge, head dim, parts, dtype.
MERGE_CASES = [(cc, name, 128, n, "bf16") for cc in (80, 90, 100) for n in (2, 3, 6) for name in ("merge", "add")]
OTHER_MERGE_CASES = [(90, name, D, 3, "bf16") for D in (64, 96, 256) for name in ("merge", "add")]
OTHER_MERGE_CASES += [(90, name, 128, 3, "fp16") for name in ("merge", "add")]

pytestmark = pytest.mark.timeout(900)  # one fixture compiles all


def signature(kernel, name, config, constants, dtype):
    """Triton types by argument, and which arguments are multiples of 16, as a launch on aligned tensors has them."""
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("items", "full", "masked"), "*i32")
    types |= dict.fromkeys(("lse", "delta", "partial"), "*fp32")
    types |= dict.fromkeys(("o", "dq", "dk", "dv"), f"*{dtype}")
    types |= dict.fromkeys(("scale", "scale2"), "fp32")
    types |= {"subtree_end": "*i64"}
    pointer = (f"*{dtype}", "i32", "i32")
    for names, tokens in ((OWN[name], config.own), (STREAMED[name], config.step)):
        descriptor = f"tensordesc<{dtype}[1,{tokens},{constants['DP']}]>"
        types |= dict.fromkeys(names, descriptor if config.tma else pointer)
    types |= dict.fromkeys(BY_POINTER[name], pointer)
    types |= dict.fromkeys(constants, "constexpr")
    types = {argument: types[argument] for argument in kernel.arg_names}
    multiples = {}
    for i, kind in enumerate(types.values()):
        if isinstance(kind, tuple):
            multiples |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        elif kind.startswith("*"):
            multiples[(i,)] = [["tt.divisibility", 16]]
    return types, multiples


def compile_case(cc, name, head_dim, dtype, group):
    """What a launch compiles to."""
    import torch
    from cipo_kernels.tree_attention import launch as ops

    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    kernel_name, few_keys = name.partition(",")[::2]
    kernel, config = ops.KERNELS[kernel_name], ops.config(kernel_name, torch_dtype, head_dim, cc)
    config, own_tile = (ops.few_keys(config), ops.TILE) if few_keys else (config, ops.OWN_TILE)
    constants = ops.constants(config, head_dim, group, own_tile)
    options = {option: constants.pop(option) for option in ("num_warps", "num_stages", "enable_fp_fusion")}
    types, multiples = signature(kernel, kernel_name, config, constants, dtype)
    compiled = compile_kernel(cc, kernel, types, constants, multiples, options)
    return compiled | {"head_dim": head_dim, "kernel": name, "dtype": dtype, "group": group, "config": list(config)}


def compile_merge_case(cc, name, head_dim, parts, dtype):
    """What a launch of `merge_triton` or `add_triton` compiles to."""
    from cipo_kernels.tree_attention import merge_kernels as ops

    kernel = {"merge": ops.merge_kernel, "add": ops.add_kernel}[name]
    constants = ops.constants(parts, head_dim)
    types = {"row": "*i32", "n_rows": "*i32", "T": "i32", "H": "i32", "lse_merged": "*fp32"}
    types |= dict.fromkeys(("o_merged", "out"), f"*{dtype}")
    types |= {"o": (f"*{dtype}",) * parts, "parts": (f"*{dtype}",) * parts, "lse": ("*fp32",) * parts}
    types |= dict.fromkeys(constants, "constexpr")
    types = {argument: types[argument] for argument in kernel.arg_names}
    multiples = {}
    for i, kind in enumerate(types.values()):
        at = [(i, j) for j in range(parts)] if isinstance(kind, tuple) else [(i,)] if kind[0] == "*" else []
        multiples |= {place: [["tt.divisibility", 16]] for place in at}
    compiled = compile_kernel(cc, kernel, types, constants, multiples, {})
    return compiled | {"head_dim": head_dim, "kernel": name, "dtype": dtype, "parts": parts}


def compile_kernel(cc, kernel, types, constants, multiples, options):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, types, constants, multiples)
    binary = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary.asm["cubin"])
        f.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.check_output([tool, "--dump-resource-usage", f.name], text=True)
    ptx = binary.asm["ptx"]
    return {
        "sm": cc,
        "warps": binary.metadata.num_warps,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": binary.metadata.shared,
        "mma": ptx.count(MMA[cc]),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "loads of 16 bytes": len(re.findall(r"ld\.global\S*\.v4", ptx)),
        "stores of 16 bytes": len(re.findall(r"st\.global\S*\.v4", ptx)),
    }


@pytest.fixture(scope="module")
def results():
    """Of a process of its own: here the kernels may be the interpreter's."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    lines = subprocess.check_output([sys.executable, __file__, "--json"], env=env, text=True).splitlines()
    return {case_of(compiled): compiled for compiled in map(json.loads, lines)}


def case_of(compiled):
    """The case that it was compiled from."""
    keys = ("head_dim", "parts", "dtype") if "parts" in compiled else ("head_dim", "dtype", "group")
    return tuple(compiled[key] for key in ("sm", "kernel", *keys))


@pytest.mark.parametrize("case", CASES + OTHER_CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernel_compiles_for_tensor_cores_without_spilling(results, case):
    result, cc, fp32 = results[case], case[0], case[3] == "fp32"
    assert result["stack"] == 0
    assert result["shared"] <= SHARED_LIMIT[cc]
    assert result["atomics"] == 0  # results are reproducible
    assert (result["mma"] > 0) == (not fp32)
    assert (result["tma"] > 0) == (cc >= 90 and not fp32)


@pytest.mark.parametrize("case", MERGE_CASES + OTHER_MERGE_CASES, ids=lambda case: "-".join(map(str, case)))
def test_merge_moves_16_bytes_at_once_without_spilling(results, case):
    result = results[case]
    assert result["stack"] == 0
    assert result["shared"] <= 16 * 1024  # many programs a multiprocessor: bandwidth is all it needs
    assert result["registers"] * 32 * result["warps"] <= 65536 / 4
    assert result["atomics"] == 0
    assert result["loads of 16 bytes"] >= case[3]  # at least one a part
    assert result["stores of 16 bytes"] > 0


def table_row(r):
    own, step, warps, stages, _ = r["config"]
    cells = (r["sm"], r["kernel"], r["dtype"], r["head_dim"], f"{own} x {step}, {warps}, {stages}")
    cells += (r["registers"], r["stack"], r["shared"], f"{r['mma']} {MMA[r['sm']]}", r["tma"])
    return "| " + " | ".join(map(str, cells)) + " |"


MERGE_COLUMNS = ("sm", "kernel", "dtype", "head_dim", "parts", "warps", "registers", "stack", "shared")
MERGE_COLUMNS += ("loads of 16 bytes", "stores of 16 bytes")


def merge_row(r):
    return "| " + " | ".join(str(r[column]) for column in MERGE_COLUMNS) + " |"


def test_results_hold_these_tables(results):
    assert not {table_row(results[case]) for case in CASES} - set(table_in_results("Tree attention"))
    written = table_in_results("Merge of tree attention's calls")
    assert [merge_row(results[case]) for case in MERGE_CASES] == written[2:]


def write_results():
    fp32 = [(80, name, 32, "fp32", 4) for name in KERNELS]
    write_table(
        "Tree attention",
        [
            "| sm | kernel | dtype | head dim | own x step, warps, stages | registers | stack | shared | MMA | TMA |",
            "|---:|---|---|---:|---|---:|---:|---:|---|---:|",
            *(table_row(compile_case(*case)) for case in CASES + fp32),
        ],
    )
    write_table(
        "Merge of tree attention's calls",
        [
            "| " + " | ".join(MERGE_COLUMNS).replace("_", " ") + " |",
            "|---:|---|---|" + "---:|" * (len(MERGE_COLUMNS) - 3),
            *(merge_row(compile_merge_case(*case)) for case in MERGE_CASES),
        ],
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--json"]:
        for case in CASES + OTHER_CASES:
            print(json.dumps(compile_case(*case)), flush=True)
        for case in MERGE_CASES + OTHER_MERGE_CASES:
            print(json.dumps(compile_merge_case(*case)), flush=True)
    else:
        write_results()
