#!/usr/bin/env bash
# A real Flink cluster on this machine, from Maven artefacts, with a pool of Python workers for Beam's jobs.
#
#   flink.sh start [N]   fetches the jars on the first run, starts N TaskManagers (2) or those that are missing, returns
#                        when they are registered
#   flink.sh stop        ends what `start` began, and no other process
#   flink.sh status      prints what runs; exit 0 if anything does
#   flink.sh jar         fetches the jars and prints the path of Beam's job server
#
# FLINK_PORT (8081) is the port of the REST address, FLINK_PORT + 1000 that of the JobManager, WORKER_PORT (50000) that of
# the workers. Then: tessera features D.toml --runner flink --endpoint 127.0.0.1:8081
set -euo pipefail
name=flink
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/flink"
job_server=org.apache.beam.runners.flink.FlinkJobServerDriver
. "$here/../engine.sh"
port="${FLINK_PORT:-8081}"

start() {
  local count="$1" number
  claim_port jobmanager "$port" FLINK_PORT
  mkdir -p "$run/conf"
  { cat "$here/config.yaml"
    echo "rest.port: $port"
    echo "jobmanager.rpc.port: $((port + 1000))"
    echo "parallelism.default: $count"; } >"$run/conf/config.yaml"
  start_pool
  launch jobmanager java "${java_options[@]}" -Xmx512m -cp "$run/lib/*" \
    org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint --configDir "$run/conf" --executionMode cluster
  for ((number = 1; number <= count; number++)); do
    launch "taskmanager-$number" java "${java_options[@]}" -Xmx512m -XX:MaxDirectMemorySize=256m -cp "$run/lib/*" \
      org.apache.flink.runtime.taskexecutor.TaskManagerRunner --configDir "$run/conf"
  done
  wait_for_port jobmanager "$port"
  wait_for_members "$count" TaskManagers "http://127.0.0.1:$port/overview" taskmanagers
  echo "flink.sh: running with $count TaskManagers; --runner flink --endpoint 127.0.0.1:$port"
}

main "$@"
