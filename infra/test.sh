#!/usr/bin/env bash
# Runs pytest, with the servers of `make up` where they answer. REQUIRE_SERVICES=1 turns their absence into failures.
set -euo pipefail
cd "$(dirname "$0")/.."
# Tests start many processes; each would compile what it imports again, which takes longer than what it does.
unset PYTHONDONTWRITEBYTECODE

answers() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

if [ -z "${TESSERA_TEST_KAFKA:-}" ] && answers "${KAFKA_PORT:-9092}"; then
  export TESSERA_TEST_KAFKA=127.0.0.1:${KAFKA_PORT:-9092}
fi
if [ -z "${TESSERA_TEST_REDIS:-}" ] && answers "${REDIS_PORT:-6379}"; then
  export TESSERA_TEST_REDIS=redis://127.0.0.1:${REDIS_PORT:-6379}/0
fi
# Tests wait more than they compute, so there are twice as many workers as processors. TEST_WORKERS=0 is one process.
workers=${TEST_WORKERS:-$((2 * $(getconf _NPROCESSORS_ONLN)))}
# The console's tests need a browser: `make test-browser`. Those of clusters need Flink and Spark: `make test-engines`.
# A short place for temporary files: the path of a Unix socket may have about a hundred characters.
place=$(mktemp -d /tmp/t.XXXXXX)
trap 'rm -rf "$place"' EXIT
.venv/bin/python -m pytest --basetemp "$place/p" --ignore=tests/browser --ignore=tests/engines \
  --numprocesses "$workers" --dist loadscope --no-loadscope-reorder --durations 10 "$@"
