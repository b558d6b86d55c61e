"""Compiles every tree attention kernel for sm_80, sm_90 and sm_100, without a GPU, and reads the result.

`python tests/test_offline_attention.py` writes its table to bench/results/offline.md.
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
OWN = {"forward": ["q"], "dq": ["q", "o", "do"], "dkdv": ["k", "v"]}
STREAMED = {"forward": ["k", "v"], "dq": ["k", "v"], "dkdv": ["q", "do"]}
KERNELS = ("forward", "dq", "dkdv")
# sm, kernel, head dim, dtype, query heads a key head.
CASES = [(cc, name, D, "bf16", 4) for cc in (80, 90, 100) for D in (64, 96, 128) for name in KERNELS]
# Not in the table.
OTHER_CASES = [(90, name, D, "bf16", group) for D in (64, 128) for group in (1, 2, 7) for name in KERNELS]
OTHER_CASES += [(90, name, 64, "fp32", 4) for name in KERNELS]


def signature(kernel, name, config, constants, dtype):
    """Triton types by argument, and which arguments are multiples of 16, as a launch on aligned tensors has them."""
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("items", "full", "masked"), "*i32")
    types |= dict.fromkeys(("lse", "delta", "partial"), "*fp32")
    types |= dict.fromkeys(("o", "dq", "dk", "dv"), f"*{dtype}")
    types |= dict.fromkeys(("scale", "scale2"), "fp32")
    types |= {"subtree_end": "*i64"}
    for names, rows in ((OWN[name], config.own), (STREAMED[name], config.step)):
        descriptor = f"tensordesc<{dtype}[1,{rows},{constants['DP']}]>"
        types |= dict.fromkeys(names, descriptor if config.tma else (f"*{dtype}", "i32", "i32"))
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
    import triton
    from cipo_kernels import tree_attention_triton as ops
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    kernel, config = ops.KERNELS[name], ops.config(name, torch_dtype, head_dim, cc)
    constants = ops.constants(config, head_dim, group)
    options = {option: constants.pop(option) for option in ("num_warps", "num_stages", "enable_fp_fusion")}
    types, multiples = signature(kernel, name, config, constants, dtype)
    source = ASTSource(kernel, types, constants, multiples)
    binary = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary.asm["cubin"])
        f.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.check_output([tool, "--dump-resource-usage", f.name], text=True)
    return {
        "sm": cc,
        "kernel": name,
        "head_dim": head_dim,
        "dtype": dtype,
        "group": group,
        "config": list(config),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": binary.metadata.shared,
        "mma": binary.asm["ptx"].count(MMA[cc]),
        "tma": binary.asm["ptx"].count("cp.async.bulk.tensor"),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", binary.asm["ptx"])),
    }


@pytest.fixture(scope="module")
def results():
    """Of a process of its own: here the kernels may be the interpreter's."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    lines = subprocess.check_output([sys.executable, __file__, "--json"], env=env, text=True).splitlines()
    keys = ("sm", "kernel", "head_dim", "dtype", "group")
    return {tuple(case[key] for key in keys): case for case in map(json.loads, lines)}


@pytest.mark.parametrize("case", CASES + OTHER_CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernel_compiles_for_tensor_cores_without_spilling(results, case):
    result, cc, fp32 = results[case], case[0], case[3] == "fp32"
    assert result["stack"] == 0
    assert result["shared"] <= SHARED_LIMIT[cc]
    assert result["atomics"] == 0  # results are reproducible
    assert (result["mma"] > 0) == (not fp32)
    assert (result["tma"] > 0) == (cc >= 90 and not fp32)


def table_row(r):
    own, step, warps, stages, _ = r["config"]
    cells = (r["sm"], r["kernel"], r["dtype"], r["head_dim"], f"{own} x {step}, {warps}, {stages}")
    cells += (r["registers"], r["stack"], r["shared"], f"{r['mma']} {MMA[r['sm']]}", r["tma"])
    return "| " + " | ".join(map(str, cells)) + " |"


def test_results_hold_this_table(results):
    written = table_in_results("Tree attention")
    assert not {table_row(results[case]) for case in CASES} - set(written)


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


if __name__ == "__main__":
    if sys.argv[1:] == ["--json"]:
        for case in CASES + OTHER_CASES:
            print(json.dumps(compile_case(*case)), flush=True)
    else:
        write_results()
