#!/usr/bin/env bash
# A real Spark cluster on this machine, from Maven artefacts, with a pool of Python workers for Beam's jobs.
#
#   spark.sh start [N]   fetches the jars on the first run, starts N workers (2) or those that are missing, returns when
#                        they are registered
#   spark.sh stop        ends what `start` began, and no other process
#   spark.sh status      prints what runs; exit 0 if anything does
#   spark.sh jar         fetches the jars and prints the path of Beam's job server
#
# SPARK_PORT (7077) is the master's port, SPARK_PORT + 1 that of its page, WORKER_PORT (50000) that of the Python workers.
# Then: tessera features D.toml --runner spark --endpoint 127.0.0.1:7077
set -euo pipefail
name=spark
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/spark"
job_server=org.apache.beam.runners.spark.SparkJobServerDriver
. "$here/../engine.sh"
port="${SPARK_PORT:-7077}"

start() {
  local count="$1" number
  claim_port master "$port" SPARK_PORT
  # Executors take their class path from $SPARK_HOME/jars.
  ln -sfn lib "$run/jars"
  export SPARK_HOME="$run" SPARK_SCALA_VERSION=2.12 SPARK_LOCAL_IP=127.0.0.1
  start_pool
  launch master java "${java_options[@]}" -Xmx512m -cp "$run/lib/*" org.apache.spark.deploy.master.Master \
    --host 127.0.0.1 --port "$port" --webui-port "$((port + 1))"
  for ((number = 1; number <= count; number++)); do
    launch "worker-$number" java "${java_options[@]}" -Xmx384m -cp "$run/lib/*" org.apache.spark.deploy.worker.Worker \
      --host 127.0.0.1 --cores 1 --memory 1g --webui-port "$((port + 1 + number))" --work-dir "$run/work/$number" \
      "spark://127.0.0.1:$port"
  done
  wait_for_port master "$port"
  wait_for_members "$count" workers "http://127.0.0.1:$((port + 1))/json/" aliveworkers
  echo "spark.sh: running with $count workers; --runner spark --endpoint 127.0.0.1:$port"
}

main "$@"
