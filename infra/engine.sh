# Shared part of flink.sh and spark.sh: jars, processes and their pids. Sourced, with $name, $here (the folder of the
# engine's pom.xml) and $job_server (Beam's main class) set. Everything written lies in .run beside the pom.
run="$here/.run"
python="$(cd "$here/../.." && pwd)/.venv/bin/python"
pool_port="${WORKER_PORT:-50000}"

# Java 17 closes packages that Flink, Spark and Beam reach by reflection.
packages=(java.lang java.lang.invoke java.lang.reflect java.io java.net java.nio java.text java.time java.util
  java.util.concurrent java.util.concurrent.atomic java.util.concurrent.locks jdk.internal.ref sun.nio.ch sun.nio.cs
  sun.security.action sun.util.calendar)
java_options=(-XX:+UseSerialGC -XX:TieredStopAtLevel=1
  --add-exports=java.base/sun.net.util=ALL-UNNAMED --add-exports=java.rmi/sun.rmi.registry=ALL-UNNAMED)
for package in "${packages[@]}"; do java_options+=("--add-opens=java.base/$package=ALL-UNNAMED"); done

die() {
  echo "$name.sh: $*" >&2
  exit 1
}

require() {
  command -v "$1" >/dev/null 2>&1 || die "$1 is not on the PATH; install $2"
}

port_open() {
  (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# Dies if a port is taken, unless by the process of that name: claim_port PROCESS PORT VARIABLE.
claim_port() {
  running_pid "$1" >/dev/null || ! port_open "$2" || die "port $2 is taken by another process; set $3 to a free one"
}

# Starts a process under a name, unless it runs. Its pid, and the time at which it started, are kept beside its log.
launch() {
  local process="$1"
  shift
  running_pid "$process" >/dev/null && return
  nohup "$@" >"$run/$process.log" 2>&1 </dev/null &
  echo "$! $(started $!)" >"$run/$process.pid"
}

# The time at which a process started; nothing for a process that has ended, even if its parent has not noticed.
started() {
  ps -o stat= -o lstart= -p "$1" 2>/dev/null | sed -n 's/^[^Z ][^ ]* *//p' | tr -s ' ' '-'
}

# The pid of a process that runs. The start time is compared, because a pid may have gone to another process.
running_pid() {
  local pid since
  [ -e "$run/$1.pid" ] || return 1
  read -r pid since <"$run/$1.pid"
  [ "$(started "$pid")" = "$since" ] || return 1
  echo "$pid"
}

# Waits until a port takes connections; the process under that name must live meanwhile.
wait_for_port() {
  local process="$1" port="$2" tries
  for ((tries = 0; tries < 600; tries++)); do
    port_open "$port" && return 0
    running_pid "$process" >/dev/null || break
    sleep 0.2
  done
  tail -n 15 "$run/$process.log" >&2
  die "the $process does not answer on port $port; see $run/$process.log"
}

# Waits until the cluster counts its members: wait_for_members COUNT NAME URL KEY. The key is that of the number in the
# JSON at the address.
wait_for_members() {
  local count="$1" members="$2" tries found
  for ((tries = 0; tries < 240; tries++)); do
    found="$("$python" -c 'import json, sys, urllib.request as r; print(json.load(r.urlopen(sys.argv[1], timeout=5))[sys.argv[2]])' \
      "$3" "$4" 2>/dev/null || echo 0)"
    [ "$found" -ge "$count" ] && return
    sleep 0.3
  done
  die "$found of $count $members are registered; see the logs in $run"
}

fetch_jars() {
  if ! cmp -s "$here/pom.xml" "$run/lib/.complete"; then
    require mvn "Maven 3.8 or newer"
    require java "a Java runtime, version 17 or newer"
    echo "$name.sh: fetching the jars (once)"
    rm -rf "$run/lib"
    mkdir -p "$run/lib"
    timeout 900 mvn -q -B -Dstyle.color=never -f "$here/pom.xml" dependency:copy-dependencies \
      -DoutputDirectory="$run/lib" -DincludeScope=runtime \
      || die "Maven could not fetch the jars named in $here/pom.xml in 15 minutes; see the lines above"
    cp "$here/pom.xml" "$run/lib/.complete"
  fi
  write_job_server
}

# Beam expects its job server as one jar of 150 MB or more. A manifest that names the jars stands for it.
write_job_server() {
  [ "$run/job-server.jar" -nt "$run/lib/.complete" ] && return
  "$python" "$here/../job_server_jar.py" "$run/job-server.jar" "$job_server" "$run/lib"
}

# The pool starts its own Python for each worker. NO_POOL=1 uses a pool that runs.
start_pool() {
  [ -z "${NO_POOL:-}" ] || return 0
  "$python" -c 'import apache_beam, features' 2>/dev/null || die "$python cannot import the project; run make setup"
  claim_port workers "$pool_port" WORKER_PORT
  (cd "$here/../.." && OMP_NUM_THREADS=1 launch workers \
    "$python" -m features.jobs.worker_pool --service_port="$pool_port")
  wait_for_port workers "$pool_port"
}

each_process() {
  local file
  for file in "$run"/*.pid; do
    [ -e "$file" ] && basename "$file" .pid
  done
}

stop() {
  local process pid tries found=
  for process in $(each_process); do
    if pid="$(running_pid "$process")"; then
      found=1
      kill "$pid" 2>/dev/null || true
    fi
  done
  for process in $(each_process); do
    for ((tries = 0; tries < 100; tries++)); do
      pid="$(running_pid "$process")" || break
      sleep 0.1
    done
    if pid="$(running_pid "$process")"; then kill -9 "$pid" 2>/dev/null || true; fi
    rm -f "$run/$process.pid"
  done
  if [ -n "$found" ]; then echo "$name.sh: stopped"; else echo "$name.sh: not running"; fi
}

status() {
  local process pid found=1
  for process in $(each_process); do
    if pid="$(running_pid "$process")"; then
      echo "$name.sh: $process runs (pid $pid)"
      found=0
    else
      echo "$name.sh: $process has ended; see $run/$process.log"
    fi
  done
  [ "$found" = 0 ] || echo "$name.sh: not running"
  return "$found"
}

main() {
  case "${1:-}" in
    start)
      [[ "${2:-2}" =~ ^[1-9][0-9]*$ ]] || die "start takes a number of workers, 2 by default; got ${2}"
      require java "a Java runtime, version 17 or newer"
      mkdir -p "$run"
      fetch_jars
      start "${2:-2}"
      ;;
    stop) stop ;;
    status) status ;;
    jar)
      mkdir -p "$run"
      fetch_jars
      echo "$run/job-server.jar"
      ;;
    *)
      echo "usage: $name.sh start [WORKERS]|stop|status|jar" >&2
      exit 2
      ;;
  esac
}
