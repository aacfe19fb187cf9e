#!/usr/bin/env bash
# A real single-node Kafka broker (KRaft, no ZooKeeper) from Maven artefacts, for machines without Docker.
#
#   kafka.sh start    fetches the jars on the first run, starts the broker, returns when it answers
#   kafka.sh stop     ends the broker that `start` began, and no other process
#   kafka.sh status   prints whether it runs; exit 0 when it does, 1 when not
#   kafka.sh wait     returns when it answers; exit 1 when it does not within 60 seconds
#
# KAFKA_PORT (9092) is the client port and KAFKA_PORT + 1 the controller's: two clones with ports of their own
# run side by side. Everything written lies in .run beside this file; delete the folder to start from nothing.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
run="$here/.run"
port="${KAFKA_PORT:-9092}"
controller_port=$((port + 1))
config="$run/server.properties"
pid_file="$run/kafka.pid"
log_file="$run/kafka.log"

die() {
  echo "kafka.sh: $*" >&2
  exit 1
}

require() {
  command -v "$1" >/dev/null 2>&1 || die "$1 is not on the PATH. Install $2, or run Kafka elsewhere and set TESSERA_KAFKA=host:port."
}

# The broker's pid when it runs. The command line is compared too, because a pid may have gone to another process.
running_pid() {
  [ -f "$pid_file" ] || return 1
  local pid
  pid="$(cat "$pid_file")"
  ps -p "$pid" -o args= 2>/dev/null | grep -qF "$config" || return 1
  echo "$pid"
}

port_open() {
  (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

fetch_jars() {
  if [ -f "$run/lib/.complete" ] && [ ! "$here/pom.xml" -nt "$run/lib/.complete" ]; then
    return
  fi
  require mvn "Maven 3.8 or newer"
  echo "kafka.sh: fetching the broker's jars (once)"
  rm -rf "$run/lib"
  mkdir -p "$run/lib"
  mvn -q -B -Dstyle.color=never -f "$here/pom.xml" dependency:copy-dependencies -DoutputDirectory="$run/lib" -DincludeScope=runtime \
    || die "Maven could not fetch the jars named in $here/pom.xml; see the lines above."
  touch "$run/lib/.complete"
}

# Replication factors of 1, because one node cannot meet Kafka's defaults of 3; no initial rebalance delay,
# because a group here is one reader and would wait 3 seconds for others.
write_config() {
  cat >"$config" <<PROPERTIES
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:$controller_port
listeners=PLAINTEXT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$controller_port
advertised.listeners=PLAINTEXT://127.0.0.1:$port
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
controller.listener.names=CONTROLLER
log.dirs=$run/data
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
PROPERTIES
}

format_storage() {
  [ -f "$run/data/meta.properties" ] && return
  local cluster_id
  cluster_id="$(java -cp "$run/lib/*" kafka.tools.StorageTool random-uuid 2>/dev/null)"
  java -cp "$run/lib/*" kafka.tools.StorageTool format -t "$cluster_id" -c "$config" >"$log_file" 2>&1 \
    || die "the data folder could not be formatted; see $log_file"
}

# Answers means both: the broker says that its start is complete, and its port takes connections.
answers() {
  running_pid >/dev/null && grep -q "Kafka Server started" "$log_file" 2>/dev/null \
    && port_open "$(sed -n 's/^advertised.listeners=.*://p' "$config")"
}

wait_for_answer() {
  local tries
  for ((tries = 0; tries < 300; tries++)); do
    answers && return 0
    running_pid >/dev/null || break
    sleep 0.2
  done
  tail -n 15 "$log_file" >&2 2>/dev/null || true
  die "no broker answers on port $port; see $log_file"
}

start() {
  local pid
  if pid="$(running_pid)"; then
    grep -q "^advertised.listeners=.*:$port$" "$config" \
      || die "this clone's broker already runs on another port (pid $pid). Stop it first, or use that port."
    wait_for_answer
    echo "kafka.sh: already running on 127.0.0.1:$port (pid $pid)"
    return
  fi
  require java "a Java runtime, version 17 or newer"
  if port_open "$port" || port_open "$controller_port"; then
    die "port $port or $controller_port is taken by another process. Set KAFKA_PORT to a free pair, such as $((port + 10))."
  fi
  mkdir -p "$run"
  fetch_jars
  write_config
  format_storage
  nohup java -Xms256m -Xmx512m -Dorg.slf4j.simpleLogger.showDateTime=true \
    -cp "$run/lib/*" kafka.Kafka "$config" >"$log_file" 2>&1 </dev/null &
  echo $! >"$pid_file"
  wait_for_answer
  echo "kafka.sh: running on 127.0.0.1:$port (pid $(cat "$pid_file"))"
}

stop() {
  local pid tries
  if ! pid="$(running_pid)"; then
    rm -f "$pid_file"
    echo "kafka.sh: not running"
    return
  fi
  kill "$pid" 2>/dev/null || true
  for ((tries = 0; tries < 150; tries++)); do
    running_pid >/dev/null || break
    sleep 0.2
  done
  # A broker that hangs in its shutdown would hold the port for good; its log recovers on the next start.
  if running_pid >/dev/null; then
    kill -9 "$pid"
  fi
  rm -f "$pid_file"
  echo "kafka.sh: stopped"
}

status() {
  local pid
  if ! pid="$(running_pid)"; then
    echo "kafka.sh: not running"
    return 1
  fi
  echo "kafka.sh: running on 127.0.0.1:$(sed -n 's/^advertised.listeners=.*://p' "$config") (pid $pid)"
}

case "${1:-}" in
  start) start ;;
  stop) stop ;;
  status) status ;;
  wait) wait_for_answer ;;
  *)
    echo "usage: kafka.sh start|stop|status|wait    (KAFKA_PORT=$port)" >&2
    exit 2
    ;;
esac
