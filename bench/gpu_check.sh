#!/usr/bin/env bash
usage='usage: bench/gpu_check.sh FOLDER [--device cuda|cpu] [--set quick|full|smoke] [--seconds N]

Everything that wants a GPU, in one command, in less than nine minutes, without a network: the tests marked gpu, the
benchmarks in bfloat16, a short multilingual training with profile, selection and specialised continuation, and the
operators under compute-sanitizer where that is installed. Runs from anywhere; the package need not be installed.

FOLDER    new or empty; gets log.txt, rows.jsonl, summary.json, report.md with at most three figures, and training.html,
          none of them larger than 16 MB
--device  cuda (default); cpu runs the same parts without a GPU, which shows that they run and little more
--set     size of the benchmarks and of the training (default: quick); smoke is tiny, and full takes longer than --seconds
--seconds for all parts together (default: 530). Each has its share, and what the ones before it did not use.

A part that fails or is out of time does not keep the others from running; the exit status is 1 then. PYTHON names the
interpreter (default: python3), NSPEC_COMMIT the commit where there is no git.'
set -u -o pipefail

fail() { echo "gpu_check.sh: error: $1" >&2; exit 2; }

folder='' device=cuda set=quick budget=530
while (($#)); do
  case $1 in
    -h | --help) echo "$usage"; exit 0 ;;
    --device | --set | --seconds)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in --device) device=$2 ;; --set) set=$2 ;; --seconds) budget=$2 ;; esac
      shift 2 ;;
    -*) fail "unknown option $1; see --help" ;;
    *) [ -z "$folder" ] || fail "two folders, $folder and $1; expected one"
      folder=$1; shift ;;
  esac
done
[ -n "$folder" ] || { echo "$usage" >&2; exit 2; }
case $device in cuda | cpu) ;; *) fail "--device $device: expected cuda or cpu" ;; esac
case $set in quick | full | smoke) ;; *) fail "--set $set: expected quick, full or smoke" ;; esac
[[ $budget =~ ^[1-9][0-9]*$ ]] || fail "--seconds $budget: expected a whole number of seconds"
mkdir -p "$folder" || fail "cannot make the folder $folder"
folder=$(cd "$folder" && pwd) || fail "cannot enter the folder $folder"
[ -z "$(ls -A "$folder")" ] || fail "$folder is not empty; give a new folder, so that no older result is taken for a new one"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
case $PYTHON in */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") ;; esac  # it is run from $root
command -v "$PYTHON" > /dev/null || fail "no interpreter $PYTHON; set PYTHON"
if [ "$device" = cuda ]; then
  "$PYTHON" -c 'import torch; raise SystemExit(0 if torch.cuda.is_available() else 77)'
  case $? in
    0) ;;
    77) fail "the PyTorch of $PYTHON sees no GPU; --device cpu runs the parts without one" ;;
    *) fail "$PYTHON cannot import torch; set PYTHON to an interpreter that has it" ;;
  esac
fi
work=$(mktemp -d "${TMPDIR:-/tmp}/nspec-gpu-check.XXXXXX") || fail "cannot make a temporary folder"

child=''
cleanup() { [ -z "$child" ] || kill "$child" 2> /dev/null; rm -rf "$work"; }
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

NSPEC_COMMIT=${NSPEC_COMMIT:-$(git -c safe.directory="$root" -C "$root" describe --always --dirty --abbrev=12 \
  --exclude='*' 2> /dev/null)}
export root folder work device set PYTHON NSPEC_COMMIT
export TMPDIR=$work  # what libraries leave there, such as the cache of torch.compile, goes too
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MPLBACKEND=Agg
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
cd "$root" || exit 2

exec {terminal}>&1
exec > >(exec tee "$folder/log.txt" >&"$terminal") 2>&1
logger=$!

# The parts, each a process of its own.

environment() {
  [ "$device" = cpu ] || nvidia-smi --format=csv \
    --query-gpu=name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,power.limit,compute_mode
  "$PYTHON" -m nspec.env || return
  "$PYTHON" -c 'from bench import machine as m; import sys
print(m.device_name(m.pick_device(sys.argv[1])), "| commit", m.commit() or "unknown")' "$device"
}

gpu_tests() {
  local files
  local -a parallel=()
  # Most of the time goes into compiling kernels for odd shapes, on the host.
  "$PYTHON" -c 'import xdist' 2> /dev/null && parallel=(-n 6)
  mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu\b' tests)
  "$PYTHON" -m pytest -q -m gpu -p bench.gpu.pytest_stand_ins -p no:cacheprovider --durations=5 "${parallel[@]}" "${files[@]}"
}

benchmark() { "$PYTHON" -m "bench.$1" --set "$set" --device "$device" --dtypes bfloat16 --json "$folder/rows.jsonl"; }
operators() { benchmark operators; }
steps() { benchmark steps; }
profiling() { benchmark profiling; }

training() {
  local -a sizes=() options=()
  if [ "$set" = smoke ]; then
    sizes=(--train 200 --valid 12 --test 6)
    options=(--set tokenizer.vocab_size=200 --set model.d_model=32 --set model.d_ff=64 --set model.heads=2
      --set model.encoder_layers=1 --set model.decoder_layers=1 --set train.updates=6 --set train.valid_every=3
      --set specialize.updates=2 --set specialize.valid_every=2 --set score.bootstrap=40 --set decode.max_length_ratio=1.0
      --set decode.beam=1)
  fi
  "$PYTHON" -m bench.gpu.synthetic_text "$work/text" "${sizes[@]}" &&
    "$PYTHON" -m nspec.cli run bench/gpu/training.yaml --set run.folder="$work/run" --set corpus.path="$work/text" \
      --set run.device="$device" "${options[@]}" &&
    cp "$work/run/report/index.html" "$folder/training.html"
}

small_calls() { "$PYTHON" -m bench.gpu.small_calls --device "$device"; }

sanitizer() { # prints where compute-sanitizer is, if it is
  command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2> /dev/null
}

sanitized() { # API errors are not counted: PyTorch asks for symbols that a driver may not have
  local tool
  [ "$device" = cuda ] || { echo 'compute-sanitizer needs a GPU'; return 77; }
  tool=$(sanitizer) || { echo 'compute-sanitizer is neither on PATH nor in CUDA_HOME/bin'; return 77; }
  # Without PyTorch's cache each tensor is an allocation of its own, and a read beyond it is seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$1" --report-api-errors no --print-limit 20 --error-exitcode 9 \
    "$PYTHON" -m bench.gpu.small_calls --device cuda
}
memcheck() { sanitized memcheck; }
racecheck() { sanitized racecheck; }

report() {
  local figure count=0
  [ -s "$folder/rows.jsonl" ] || { echo 'no rows: no benchmark has measured anything'; return 1; }
  "$PYTHON" -m bench.report "$folder/rows.jsonl" --out "$work/report" || return
  cp "$work/report/report.md" "$folder/" || return
  for figure in "$work"/report/*.svg; do
    [ ! -f "$figure" ] || ((count++ >= 3)) || cp "$figure" "$folder/" || return
  done
}

# Names and shares of 530 seconds.
parts=(environment gpu_tests operators steps profiling training small_calls memcheck racecheck report)
shares=(20 150 95 80 35 70 15 25 25 15)
export -f "${parts[@]}" benchmark sanitizer sanitized

statuses=() times=()
status=0
for number in "${!parts[@]}"; do
  part=${parts[number]} later=0
  for share in "${shares[@]:number+1}"; do ((later += share)); done
  left=$((budget - SECONDS))
  limit=$((left - later * budget / 530))
  share=$((shares[number] * budget / 530))
  ((limit >= share)) || limit=$((share < left ? share : left))
  printf '\n== %s, at most %d s, %d s after the start\n' "$part" "$limit" "$SECONDS"
  began=${EPOCHREALTIME/[.,]/}
  if ((limit > 0)); then
    timeout --kill-after=5 "$limit" bash -c "$part" < /dev/null &
    child=$!
    wait "$child"
    code=$?
    child=''
  else
    code=-1
  fi
  elapsed=$(((${EPOCHREALTIME/[.,]/} - began) / 100000)) # tenths of a second
  case $code in
    0) said=ok ;;
    77) said=absent ;;
    -1) said='no time left' ;;
    124) said='out of time' ;;
    137) said=$( ((elapsed >= limit * 10)) && echo 'out of time' || echo 'failed (exit 137)') ;;
    *) said="failed (exit $code)" ;;
  esac
  case $said in ok | absent) ;; *) status=1 ;; esac
  statuses+=("$said") times+=("$((elapsed / 10)).$((elapsed % 10))")
  printf '== %s: %s, %s s\n' "$part" "$said" "${times[number]}"
done

# A line a part, so that it can be read with the eye too.
{
  printf '{"device": "%s", "set": "%s", "commit": "%s", "seconds": %d, "parts": [\n' "$device" "$set" "$NSPEC_COMMIT" "$SECONDS"
  for number in "${!parts[@]}"; do
    ((number + 1 < ${#parts[@]})) && comma=, || comma=
    printf '  {"part": "%s", "status": "%s", "seconds": %s}%s\n' "${parts[number]}" "${statuses[number]}" \
      "${times[number]}" "$comma"
  done
  echo ']}'
} > "$folder/summary.json"

most=$((16 * 1000 * 1000 - 1000))
for file in "$folder"/*; do
  if [ "${file##*/}" != log.txt ] && (($(wc -c < "$file") > most)); then
    rm "$file"
    echo "${file##*/} was larger than 16 MB and is not kept"
    status=1
  fi
done

printf '\n%-14s%-20s%9s\n' part status seconds
for number in "${!parts[@]}"; do printf '%-14s%-20s%9s\n' "${parts[number]}" "${statuses[number]}" "${times[number]}"; done
printf '%-14s%-20s%9d\n' all "$( ((status)) && echo failed || echo ok)" "$SECONDS"

# The log is whole when tee has ended; something that a part left behind may still hold its pipe.
exec 1>&"$terminal" 2>&1
for _ in {1..50}; do kill -0 "$logger" 2> /dev/null || break; sleep 0.1; done
if (($(wc -c < "$folder/log.txt") > most)); then
  { head -c 1000000 "$folder/log.txt"; printf '\n[... left out: the log was too large ...]\n'
    tail -c $((most - 1001000)) "$folder/log.txt"; } > "$work/log.txt" && cp "$work/log.txt" "$folder/log.txt"
fi
exit $status
