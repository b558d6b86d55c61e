"""The loss kernels, compiled for sm_80, sm_90 and sm_100 without a GPU, at the configurations they run with.

`python tests/test_offline_loss.py` writes its table to bench/results/offline.md. The compilation runs in a
process of its own: in one that interprets Triton nothing can be compiled.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[1] / "bench/results/offline.md"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
ROW_TERMS = ("bias", "inv_temperature", "softcap", "entropy_coef", "beta", "is_cap", "dual_clip")
TYPES = {"target_id": "*i64", "clipped_out": "*i1", "e": "*bf16", "e_out": "*bf16", "x": "*bf16", "weight": "*bf16"}
TYPES |= dict.fromkeys(("d_logits",), "*bf16")
TYPES |= dict.fromkeys(
    ("first", "vocab", "row_stride", "d_row_stride", "e_stride", "n", "targets", "H", "parts", "column_tiles"), "i32"
)
TYPES |= dict.fromkeys(("rows", "count"), "*i32")
TYPES |= dict.fromkeys(("softcap", "eps_low", "eps_high", "dual_clip", "beta", "entropy_coef", "is_cap"), "fp32")
ALIGNED = ("row_stride", "d_row_stride", "vocab", "e_stride", "H")  # multiples of 16; so are the pointers


def cases(arch: int) -> dict:
    """Name -> (kernel, absent arguments, constexprs, options, types that differ). A size whose type is given there is
    no multiple of 16: odd V are 50,257 or 151,669."""
    from cipo_kernels.lm_head import exp_gemm as e
    from cipo_kernels.lm_head import gemm_tiles as g
    from cipo_kernels.lm_head import logp_gemm
    from cipo_kernels.lm_head import row_kernel as v0

    row, warps = {"BLOCK_V": v0.BLOCK.columns}, {"num_warps": v0.BLOCK.warps}
    block = {"BLOCK": e.BLOCK}
    ppo, cispo = ({"ON_POLICY": False, "CISPO": given} for given in (False, True))
    found = {
        "token_loss_kernel": (v0.token_loss_kernel, ROW_TERMS, row | ppo, warps, {}),
        "token_loss_kernel, every term": (v0.token_loss_kernel, (), row | ppo, warps, {}),
        "token_loss_kernel, every term, CISPO": (v0.token_loss_kernel, ("dual_clip",), row | cispo, warps, {}),
        "logp_kernel, every term": (v0.logp_kernel, (), row, warps, {}),
        "gradient_kernel, every term": (v0.gradient_kernel, (), row, warps, {}),
        "token_loss_kernel, odd V": (v0.token_loss_kernel, ROW_TERMS, row | ppo, warps, {"vocab": "i32"}),
        "logp_kernel, odd V": (v0.logp_kernel, ROW_TERMS, row, warps, {"vocab": "i32"}),
        "gradient_kernel, odd V": (v0.gradient_kernel, ROW_TERMS, row, warps, {"vocab": "i32"}),
        "anchor_kernel": (e.anchor_kernel, (), {"BLOCK_H": e.BLOCK_H}, {}, {}),
        "total_kernel": (e.total_kernel, (), block, {}, {}),
        "bad_rows_kernel": (e.bad_rows_kernel, (), block, {}, {}),
        "reanchor_kernel": (e.reanchor_kernel, (), block, {}, {}),
        "exp_loss_kernel": (e.exp_loss_kernel, ("entropy_coef", "dual_clip"), ppo | block, {}, {}),
        "exp_loss_kernel, dual clip": (e.exp_loss_kernel, ("entropy_coef",), ppo | block, {}, {}),
        "exp_loss_kernel, CISPO": (e.exp_loss_kernel, ("entropy_coef", "dual_clip"), cispo | block, {}, {}),
    }
    tma = arch >= 90
    t = g.TMA_TILES if tma else g.POINTER_TILES
    blocks = {"BLOCK_M": t.m, "BLOCK_N": t.n, "BLOCK_K": t.k, "GROUP_M": t.group, "TMA": tma}
    options = {"num_warps": t.warps, "num_stages": t.stages}
    tiles = {"x": f"tensordesc<bf16[{t.m},{t.k}]>", "weight": f"tensordesc<bf16[{t.n},{t.k}]>"} if tma else {}
    all_rows = ("rows", "count")
    found["exp_gemm_kernel"] = (e.exp_gemm_kernel, (*all_rows, "bias", "inv_temperature"), blocks, options, tiles)
    found["exp_gemm_kernel, every term"] = (e.exp_gemm_kernel, all_rows, blocks, options, tiles)
    found["exp_gemm_kernel, bad rows"] = (e.exp_gemm_kernel, ("bias", "inv_temperature"), blocks, options, tiles)
    found["exp_gemm_kernel, bad rows, every term"] = (e.exp_gemm_kernel, (), blocks, options, tiles)
    found["max_gemm_kernel"] = (e.max_gemm_kernel, ("bias", "inv_temperature"), blocks, options, tiles)
    found["max_gemm_kernel, every term"] = (e.max_gemm_kernel, (), blocks, options, tiles)
    odd = tiles | {"vocab": "i32"}
    found["exp_gemm_kernel, odd V"] = (e.exp_gemm_kernel, (*all_rows, "bias", "inv_temperature"), blocks, options, odd)
    head = ("bias", "inv_temperature", "softcap")
    found["logp_gemm_kernel"] = (logp_gemm.logp_gemm_kernel, head, blocks, options, tiles)
    found["logp_gemm_kernel, odd V"] = (logp_gemm.logp_gemm_kernel, head, blocks, options, odd)
    found["logp_gemm_kernel, every term"] = (logp_gemm.logp_gemm_kernel, (), blocks, options, tiles)
    found["logp_of_parts_kernel"] = (logp_gemm.logp_of_parts_kernel, (), {"BLOCK": 1024}, {}, {})
    return found


def compile_case(kernel, absent, constants, options, types, arch: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = constants | dict.fromkeys((name for name in absent if name in kernel.arg_names), None)
    multiples = [n for n in ALIGNED if n not in types]
    types = TYPES | types
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
    aligned = [i for i, (n, t) in enumerate(signature.items()) if t[0] == "*" or (n in multiples and t == "i32")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    found = re.findall(
        r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|cp\.async\.bulk\.tensor|ld\.global\.v4|\batom\.|\bred\.",
        compiled.asm["ptx"],
    )
    return {
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "instructions": sorted(set(found)),
        "accesses": accesses(compiled.asm["ptx"]),
        "loops": [accesses(loop) for loop in loops(compiled.asm["ptx"])],
    }


def accesses(ptx: str) -> list[str]:
    """Global loads, stores and barriers in their order, repetitions left out."""
    return [m[0] for m in itertools.groupby(re.findall(r"[ls][dt]\.global|bar\.sync", ptx))]


def loops(ptx: str) -> list[str]:
    """From a label to the branch back to it."""
    labels = {m[1]: m.start() for m in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE)}
    branches = re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+);", ptx)
    return [ptx[labels[b[1]] : b.start()] for b in branches if labels[b[1]] < b.start()]


def compile_all() -> list[dict]:
    return [
        {"kernel": name, "arch": arch} | compile_case(*case, arch)
        for arch in SHARED_LIMIT
        for name, case in cases(arch).items()
    ]


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", __file__, "--json"]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_nothing_spills_and_everything_fits(compiled):
    assert {row["arch"] for row in compiled} == set(SHARED_LIMIT)
    for row in compiled:
        assert row["spilled"] == 0, row
        assert row["shared"] <= SHARED_LIMIT[row["arch"]], row
        assert not {"atom.", "red."} & set(row["instructions"]), row  # results are reproducible


def test_row_kernels_leave_room_for_two_programs_and_load_16_bytes_at_once(compiled):
    rows = [row for row in compiled if row["kernel"].startswith(("token_loss", "logp_kernel", "gradient"))]
    assert len(rows) == 8 * len(SHARED_LIMIT)
    for row in rows:
        assert 2 * row["registers"] * 32 * row["warps"] <= 65536, row  # of the multiprocessor's registers
        assert "ld.global.v4" in row["instructions"], row


def test_rows_are_overwritten_only_after_a_barrier(compiled):
    """d(logits) lies over the logits: in the last loop, and in the ragged block behind it, a block is loaded by all
    warps before one stores."""
    rows = [row for row in compiled if row["kernel"].startswith(("token_loss", "gradient"))]
    assert len(rows) == 6 * len(SHARED_LIMIT)
    for row in rows:
        assert row["loops"][-1] == ["ld.global", "bar.sync", "st.global"], row
        assert row["accesses"][-6:] == ["ld.global", "bar.sync", "st.global"] * 2, row


def test_log_probs_are_swept_without_a_barrier(compiled):
    """Its block's columns are folded thread by thread."""
    rows = [row for row in compiled if row["kernel"].startswith(("token_loss", "logp_kernel"))]
    assert len(rows) == 6 * len(SHARED_LIMIT)
    for row in rows:
        assert row["loops"][0] == ["ld.global"], row


def test_the_gemm_uses_tensor_cores_and_tma(compiled):
    rows = [row for row in compiled if "_gemm_kernel" in row["kernel"]]
    assert len(rows) == 10 * len(SHARED_LIMIT)
    for row in rows:
        assert {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[row["arch"]] in row["instructions"], row
        assert (row["arch"] >= 90) == ("cp.async.bulk.tensor" in row["instructions"]), row


def table(rows: list[dict]) -> list[str]:
    columns = ("kernel", "arch", "warps", "registers", "spilled", "shared")
    cells = [[str(row[name]) for name in columns] + [", ".join(row["instructions"])] for row in rows]
    return [
        "| kernel | sm | warps | registers | spilled | shared | instructions |",
        "|---|" + "---:|" * 5 + "---|",
        *("| " + " | ".join(row) + " |" for row in cells),
    ]


def _section(name: str) -> re.Pattern:
    """The section of this Triton in RESULTS: (heading and text) (lines of its table)."""
    import triton

    heading = re.escape(f"## {name}, Triton {triton.__version__}")
    return re.compile(rf"(^{heading}\n(?:(?![#|]).*\n)+)((?:\|.*\n)+)", re.MULTILINE)


def table_in_results(name: str) -> list[str]:
    """Lines of a table in RESULTS. Another Triton than the pinned one compiles other code: without a section of it the
    test is skipped."""
    import triton

    found = _section(name).search(RESULTS.read_text())
    if found is None:
        pinned = f'"triton=={triton.__version__};' in (RESULTS.parents[2] / "pyproject.toml").read_text()
        (pytest.fail if pinned else pytest.skip)(
            f"{RESULTS.name} has no table of {name} for Triton {triton.__version__}"
        )
    return found[2].splitlines()


def write_table(name: str, lines: list[str]) -> None:
    """Replace a table in RESULTS; its heading has to be there."""
    text, replaced = _section(name).subn(lambda found: found[1] + "\n".join(lines) + "\n", RESULTS.read_text())
    if not replaced:
        sys.exit(f"{RESULTS}: write a heading for {name} and this Triton, and a line of its table, first")
    RESULTS.write_text(text)


def test_results_hold_this_table(compiled: list[dict]) -> None:
    assert table_in_results("Fused head and loss") == table(compiled)


if __name__ == "__main__":
    rows = compile_all()
    if "--json" in sys.argv:
        print(json.dumps(rows))
    else:
        write_table("Fused head and loss", table(rows))
