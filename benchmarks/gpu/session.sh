#!/bin/bash
# One device session: $1 seconds in all, results under $OUT.
start=$SECONDS
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
export PYTHONPATH=.:/tmp/site PYTHONUNBUFFERED=1
timeout 90 python3 -m benchmarks.gpu sweep-attention --out $OUT/attention.jsonl --budget 45 > $OUT/attention.log 2>&1
grep -E "copy|prefill|cannot|Error" $OUT/attention.log | cut -c1-150 | tail -60
echo "== gemm $((SECONDS-start))"
timeout 60 python3 -m benchmarks.gpu compare-gemm --shortlist .carry/shortlist.json --rows 64,128 --out $OUT/compare.jsonl --budget 50 > $OUT/gemm.log 2>&1
tail -14 $OUT/gemm.log
echo "== probes $((SECONDS-start))"
timeout 60 python3 -c "
from cluster.engine.kernels import get_ops, fingerprint
ops = get_ops('cuda'); print(fingerprint(ops)); print(fingerprint(ops))" 2>&1 | tail -5
echo "== tests $((SECONDS-start))"
timeout 130 python3 -m pytest -c /dev/null --rootdir . -p no:cacheprovider -q -n 8 --timeout 100 --timeout-method thread --maxfail 60 tests/gpu/test_attention.py tests/gpu/test_small_ops.py > $OUT/tests.log 2>&1
grep -E "^(FAILED|ERROR)|passed|failed" $OUT/tests.log | cut -c1-220 | tail -40
echo "== end $((SECONDS-start))"
