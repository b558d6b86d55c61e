#!/usr/bin/env bash
# Nine minutes with a GPU, in the order of what decides most: the tests' cases on production tiles; loss and log-probs;
# attention and a decoder layer. The scripts check what they time. torch, triton, transformers and pytest are all it
# needs. A script's results are in bench/results/ (or $OUT) as soon as they are known: it may be cut anywhere.
# --sweep: launch configurations first (kernels/launch_configs.json), which the rest then runs with; four minutes more.
set -uo pipefail
cd "$(dirname "$0")/../.."
status=0
within() { timeout --kill-after=10 "$@" || status=1; }  # seconds, command

package=$(mktemp -d)  # in a checkout that is not installed, kernels/ is cipo_kernels
trap 'rm -rf "$package"' EXIT
ln -s "$PWD/kernels" "$package/cipo_kernels"
if [[ "${1:-}" == --sweep ]]; then
    within 120 python bench/gpu/fused_loss.py --sweep
    within 120 python bench/gpu/tree_attention.py --sweep
fi
PYTHONPATH=$package:$PWD within 130 python -m pytest -q -o addopts= -p no:cacheprovider \
    tests/test_fused_loss_triton.py tests/test_tree_attention_triton.py
within 200 python bench/gpu/fused_loss.py
within 200 python bench/gpu/tree_attention.py
exit $status
