#!/usr/bin/env bash
# The whole suite: tests/run.sh PYTEST. Every part runs even if another fails; 1 when any did.
#
# The tests on SLURM mostly wait, but what they wait for must not starve: the tests that share a machine well run beside them at a
# lower priority (of their own session, because Linux divides the processor among sessions first). Those that start many processes
# come alone afterwards.
set -uo pipefail
pytest=$1
shared=(tests/unit tests/numerics tests/layout tests/aot tests/integration)
log=$(mktemp)
failed=0

setsid bash -c 'echo 5 2>/dev/null >/proc/self/autogroup; exec nice -n 5 "$@"' - \
    "$pytest" -q -n 2 --dist loadfile "${shared[@]}" >"$log" 2>&1 &
beside=$!
trap 'kill -TERM -- "-$beside" 2>/dev/null; rm -f "$log"' EXIT
"$pytest" -q tests/slurm || failed=1
wait "$beside" || failed=1
cat "$log"
others=()
for part in slurm/ "${shared[@]#tests/}"; do others+=(--ignore "tests/${part%/}"); done
"$pytest" -q "${others[@]}" || failed=1
exit "$failed"
