#!/usr/bin/env bash
# Every benchmark of this folder on this machine's GPU, one after another. With --sweep the kernels' launch
# configurations are measured first: kernels/launch_configs.json, which the benchmarks then run with.
set -uo pipefail
cd "$(dirname "$0")"
status=0
if [[ "${1:-}" == --sweep ]]; then
    python fused_loss.py --sweep || status=1
    python tree_attention.py --sweep || status=1
fi
python fused_loss.py || status=1
python tree_attention.py || status=1
python vllm_sync.py || status=1
exit $status
