#!/usr/bin/env bash
# Tests batch jobs on real clusters of Flink and Spark, on Dask, on Prism and on two processes: `make test-engines`.
# SMALL=1 tests the shares and the bytes on Flink alone, as CI does. ENGINES names the engines to start (default:
# "flink spark prism"). Arguments go to pytest, for example `-k flink`.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS=1 REQUIRE_ENGINES=1
engines=${ENGINES-flink spark prism}
if [ -n "${SMALL:-}" ]; then
  engines=flink
  set -- -k "two_processes_share and flink" "$@"
fi

for engine in flink spark; do
  ! "infra/$engine.sh" status >/dev/null || { echo "test-engines.sh: infra/$engine.sh runs; stop it first" >&2; exit 1; }
done
place=$(mktemp -d /tmp/e.XXXXXX)
trap 'for engine in flink spark; do "infra/$engine.sh" stop >/dev/null; done; rm -rf "$place"' EXIT
for engine in $engines; do
  case "$engine" in
    flink)
      infra/flink.sh start 2
      export TESSERA_TEST_FLINK=127.0.0.1:${FLINK_PORT:-8081}
      ;;
    spark)
      # Both pools would be on this machine, so the pool of Flink serves Spark too.
      NO_POOL=${TESSERA_TEST_FLINK:+1} infra/spark.sh start 2
      export TESSERA_TEST_SPARK=127.0.0.1:${SPARK_PORT:-7077}
      ;;
    prism) infra/prism.sh ;;
  esac
done
.venv/bin/python -m pytest -v --basetemp "$place/p" --timeout 1200 --durations 0 tests/engines "$@"
