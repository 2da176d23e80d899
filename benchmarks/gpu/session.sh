#!/bin/bash
# One device session: $1 seconds in all, results under $OUT.
start=$SECONDS
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
export PYTHONPATH=.:/tmp/site PYTHONUNBUFFERED=1
timeout 100 python3 -m benchmarks.gpu compile > $OUT/compile.log 2>&1; tail -1 $OUT/compile.log
echo "== tests $((SECONDS-start))"
timeout 170 python3 -m pytest -c /dev/null --rootdir . -p no:cacheprovider -q -n 8 --timeout 100 --timeout-method thread --maxfail 60 tests/gpu > $OUT/tests.log 2>&1
grep -E "^(FAILED|ERROR)|passed|failed" $OUT/tests.log | cut -c1-220 | tail -40
echo "== attention $((SECONDS-start))"
timeout 110 python3 -m benchmarks.gpu sweep-attention --out $OUT/attention.jsonl --budget 75 > $OUT/attention.log 2>&1
grep -v Warn $OUT/attention.log | cut -c1-150 | tail -60
echo "== gemm $((SECONDS-start))"
left=$(($1-SECONDS+start))
timeout $((left)) python3 -m benchmarks.gpu compare-gemm --shortlist .carry/shortlist.json --out $OUT/compare.jsonl --budget $((left-25)) > $OUT/gemm.log 2>&1
tail -14 $OUT/gemm.log
echo "== end $((SECONDS-start))"
