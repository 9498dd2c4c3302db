#!/usr/bin/env bash
usage='usage: bench/gpu_check.sh FOLDER [--call 1|2|3] [--only PARTS] [--device cuda|cpu] [--set quick|full|smoke] [--seconds N]

What wants a GPU, in commands of at most eight minutes, without a network. Runs from anywhere; the package need not be
installed.

FOLDER    new or empty; gets log.txt, rows.jsonl, summary.json, report.md with three figures, and training.html, none
          of them larger than 16 MB
--call    which parts (default: 1)
            1  does each kernel launch and is it right; what each takes on the device; operators; a training step; the
               tests marked gpu
            2  block sizes, graphs and batches of several tasks; operators again; torch.compile; Transformer-base; and
               the grouped product of PyTorch, whose errors may end its process
            3  all training steps, profiling, fine-tuning of neurons beside LoRA, a short multilingual training, memcheck
               and counters of the hardware
--only    these parts, separated by commas, in their order: any of those in the summary of a call, and `operators` for the
          five that are named as an operator; report is always added. Not with --call
--device  cuda (default); cpu runs the same parts without a GPU, which shows that they run and little more
--set     size of the benchmarks and of the training (default: quick); smoke is tiny, and full takes longer than --seconds
--seconds for all parts together (default: 480). Each has its share, and what the ones before it did not use.

A part that fails or is out of time does not keep the others from running; the exit status is 1 then, and the last line
is the command that runs those parts again. Ctrl-C interrupts the part that runs, and leaves the report of what has been
measured and that command; the exit status is 130. A second one ends at once. PYTHON names the interpreter (default: python3), NSPEC_COMMIT the commit where
there is no git. Compiled kernels are kept for the next call: in TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR, or else in
XDG_CACHE_HOME or ~/.cache.'
set -u -o pipefail

fail() { echo "gpu_check.sh: error: $1" >&2; exit 2; }

folder='' device=cuda set=quick budget=480 call='' only=''
while (($#)); do
  case $1 in
    -h | --help) echo "$usage"; exit 0 ;;
    --device | --set | --seconds | --call | --only)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in --device) device=$2 ;; --set) set=$2 ;; --seconds) budget=$2 ;; --call) call=$2 ;; --only) only=$2 ;; esac
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

[ -z "$only" ] || [ -z "$call" ] || fail "--only $only and --call $call: each says which parts to run; give one of them"

# The parts of each call, and about how many seconds they need on an H100.
operators=(compact_ffn block row_sparse_wgrad linear_relu_count row_sparse_adamw)
case ${call:-1} in
  1) parts=(environment small_calls probe "${operators[@]}" steps gpu_tests) ;;
  2) parts=(environment tuning "${operators[@]}" compiled base grouped) ;;
  3) parts=(environment all_steps profiling finetune training memcheck counters) ;;
  *) fail "--call $call: expected 1, 2 or 3" ;;
esac
declare -A shares=([environment]=15 [small_calls]=45 [probe]=110 [compact_ffn]=35 [block]=25 [row_sparse_wgrad]=30
  [linear_relu_count]=8 [row_sparse_adamw]=15 [steps]=75 [gpu_tests]=110 [tuning]=90 [compiled]=100 [base]=60 [grouped]=60
  [all_steps]=180 [profiling]=40 [finetune]=90 [training]=90 [memcheck]=60 [counters]=60 [report]=10)
if [ -n "$only" ]; then
  parts=()
  for part in ${only//,/ }; do
    if [ "$part" = operators ]; then parts+=("${operators[@]}"); continue; fi
    [ -n "${shares[$part]:-}" ] || fail "--only $part: there is no such part; there are operators ${!shares[*]}"
    [ "$part" = report ] || parts+=("$part")
  done
fi
parts+=(report)
total=0
for part in "${parts[@]}"; do ((total += shares[$part])); done
if [ -e "$folder" ]; then
  [ -d "$folder" ] || fail "$folder is no folder"
  [ -z "$(ls -A "$folder")" ] || fail "$folder is not empty; give a new folder, so that no older result is taken for a new one"
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
command -v "$PYTHON" > /dev/null || fail "no interpreter $PYTHON; set PYTHON to one"
case $PYTHON in */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") ;; esac  # it is run from $root
if [ "$device" = cuda ]; then
  "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
    fail "the PyTorch of $PYTHON sees no GPU; --device cpu runs the parts without one"
fi
mkdir -p "$folder" || fail "cannot make the folder $folder"
folder=$(cd "$folder" && pwd) || fail "cannot enter the folder $folder"
work=$(mktemp -d "${TMPDIR:-/tmp}/nspec-gpu-check.XXXXXX") || fail "cannot make a temporary folder"

child='' interrupted=0
cleanup() { [ -z "$child" ] || kill -KILL -- "-$child" 2> /dev/null; rm -rf "$work"; }
trap cleanup EXIT
# What a part leaves is worth a report. `timeout` passes the signal on.
interrupt() {
  ((!interrupted)) || exit 130
  interrupted=1
  [ -z "$child" ] || kill -INT "$child" 2> /dev/null
}
trap interrupt INT
trap 'exit 143' TERM

NSPEC_COMMIT=${NSPEC_COMMIT:-$(git -c safe.directory="$root" -C "$root" describe --always --dirty --abbrev=12 \
  --exclude='*' 2> /dev/null)}
cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/nspec-gpu-check
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
export root folder work device set PYTHON NSPEC_COMMIT
export TMPDIR=$work  # what libraries leave there goes too, but not what they compile
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MPLBACKEND=Agg
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
cd "$root" || exit 2

exec {terminal}>&1
exec > >(exec tee -i "$folder/log.txt" >&"$terminal") 2>&1
logger=$!

# The parts, each a process of its own.

# A shell starts what runs in the background deaf to SIGINT, on which Python says what it was doing, and pytest what failed.
run_python() { env --default-signal=INT "$PYTHON" "$@"; }

environment() {
  [ "$device" = cpu ] || nvidia-smi --format=csv \
    --query-gpu=name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,power.limit,compute_mode
  run_python -c 'import sys; from bench import machine as m; from nspec import env
print(m.device_name(m.pick_device(sys.argv[1])), "| commit", m.commit() or "unknown")
env.main()' "$device"
}

small_calls() { run_python -m bench.gpu.small_calls --device "$device" --apart; }

probing() { # with the experiments; all but tiny sizes are called full there
  run_python -m bench.gpu.probe --device "$device" --set "${set/quick/full}" --json "$folder/rows.jsonl" --only "$1"
}
probe() { probing E1,E2,E3,E4,E5,E6,E7; }
tuning() { probing E3,E5,E8,E9; }

benchmark() { # one of bench's modules with options for it
  local -a types=(--dtypes bfloat16)
  [ "$set" != smoke ] || types=()
  run_python -m "bench.$1" --set "$set" --device "$device" "${types[@]}" --json "$folder/rows.jsonl" "${@:2}"
}
operators() { # with options
  local seconds=0.6
  [ "$set" != smoke ] || seconds=0.02
  benchmark operators --seconds "$seconds" "$@"
}
kernels() { operators --no-compile --no-memory --no-grouped --operators "$@"; }
compact_ffn() { kernels compact_ffn; }
block() { kernels block --no-ceilings; }
row_sparse_wgrad() { kernels row_sparse_wgrad --no-ceilings; }
linear_relu_count() { kernels linear_relu_count --no-ceilings; }
row_sparse_adamw() { kernels row_sparse_adamw --no-ceilings; }
compiled() {
  operators --batches one --densities 0.5 0.78 --no-grouped --operators linear_relu_count row_sparse_wgrad compact_ffn \
    --no-ceilings
}
base() {
  local -a shape=(--shapes 16384x512x2048)
  [ "$set" != smoke ] || shape=()
  kernels row_sparse_wgrad compact_ffn block --densities 0.3 0.5 0.78 "${shape[@]}" --no-ceilings
}
grouped() {
  operators --batches several --densities 0.5 0.78 --no-compile --operators row_sparse_wgrad compact_ffn --no-ceilings
}

steps() {
  benchmark steps --shapes big --densities 0.5 0.78 --systems forward update --optimizers adamw --batches pure --tasks 0 \
    --no-memory --seconds 25
}
all_steps() { benchmark steps --densities 0.5 0.78; }
profiling() { benchmark profiling; }
finetune() {
  local -a size=()
  [ "$set" != smoke ] || size=(--shape tiny --rounds 3)
  run_python -m bench.finetune --device "$device" --seconds 60 "${size[@]}" --json "$folder/rows.jsonl"
}

gpu_tests() {
  local files workers
  local -a parallel=()
  # Most of the time goes into compiling kernels for odd shapes, on the host.
  workers=$(nproc)
  if [ "$device" = cuda ] && "$PYTHON" -c 'import xdist' 2> /dev/null; then
    parallel=(-n $((workers < 12 ? workers : 12)))
  fi
  mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu\b' tests)
  run_python -m pytest -q -m gpu -p no:cacheprovider --tb=short --durations=5 \
    "${parallel[@]}" "${files[@]}"
}

training() {
  local -a sizes=() options=()
  if [ "$set" = smoke ]; then
    sizes=(--train 200 --valid 12 --test 6)
    options=(--set tokenizer.vocab_size=200 --set model.d_model=32 --set model.d_ff=64 --set model.heads=2
      --set model.encoder_layers=1 --set model.decoder_layers=1 --set train.updates=6 --set train.valid_every=3
      --set specialize.updates=2 --set specialize.valid_every=2 --set score.bootstrap=40 --set decode.max_length_ratio=1.0
      --set decode.beam=1)
  fi
  run_python -m bench.gpu.synthetic_text "$work/text" "${sizes[@]}" &&
    run_python -m nspec.cli run bench/gpu/training.yaml --set run.folder="$work/run" --set corpus.path="$work/text" \
      --set run.device="$device" "${options[@]}" &&
    cp "$work/run/report/index.html" "$folder/training.html"
}

tool() { # prints where a tool of CUDA is, if it is
  command -v "$1" || ls "${CUDA_HOME:-/usr/local/cuda}/bin/$1" 2> /dev/null
}
memcheck() { # API errors are not counted: PyTorch asks for symbols that a driver may not have
  local tool
  [ "$device" = cuda ] || { echo 'compute-sanitizer needs a GPU'; return 77; }
  tool=$(tool compute-sanitizer) || { echo 'compute-sanitizer is neither on PATH nor in CUDA_HOME/bin'; return 77; }
  # Without PyTorch's cache each tensor is an allocation of its own, and a read beyond it is seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool memcheck --report-api-errors no --print-limit 20 --error-exitcode 9 \
    "$PYTHON" -m bench.gpu.small_calls --device cuda
}
counters() {
  local tool
  [ "$device" = cuda ] || { echo 'ncu needs a GPU'; return 77; }
  tool=$(tool ncu) || { echo 'ncu is neither on PATH nor in CUDA_HOME/bin'; return 77; }
  "$tool" --clock-control none --kernel-name 'regex:to_neurons|pack_columns' --launch-count 6 --section SpeedOfLight \
    --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis "$PYTHON" -m bench.gpu.probe --device cuda --only E4
}

report() {
  [ -s "$folder/rows.jsonl" ] || { echo 'no rows: nothing has been measured'; return 77; }
  run_python -m bench.report "$folder/rows.jsonl" --out "$folder"
}

export -f "${!shares[@]}" run_python probing benchmark operators kernels tool

statuses=() times=() lost=()
status=0 stopped=0 shared=0
for number in "${!parts[@]}"; do
  part=${parts[number]}
  # Each ends when the shares up to its own have passed; the report has its share whatever the parts before it took.
  ((shared += shares[$part]))
  limit=$(((shared * budget + total - 1) / total - SECONDS))
  if [ "$part" = report ] && ((limit < 1 + shares[report] * budget / total)); then
    limit=$((1 + shares[report] * budget / total))
  fi
  # Of the limit, a part that is interrupted has these tenths of a second to end in.
  grace=$((limit < 40 ? limit * 10 / 4 : 100)) told=$((limit * 10))
  ((told -= grace))
  ((stopped = interrupted))
  began=${EPOCHREALTIME/[.,]/}
  printf '\n== %s, at most %d s, %d s after the start\n' "$part" "$limit" "$SECONDS"
  if ((stopped)) && [ "$part" != report ]; then
    code=-2
  elif ((limit <= 0)); then
    code=-1
  else
    timeout --signal=INT --kill-after="$((grace / 10)).$((grace % 10))" "$((told / 10)).$((told % 10))" \
      bash -c "$part" < /dev/null &
    child=$!
    ((interrupted == stopped)) || kill -INT "$child" 2> /dev/null
    wait "$child" 2> /dev/null  # the shell would write `Killed` itself
    code=$?
    while ((interrupted > stopped)) && kill -0 "$child" 2> /dev/null; do
      wait "$child" 2> /dev/null
      code=$?
    done
    kill -KILL -- "-$child" 2> /dev/null  # its process group: what is left of a part would hold memory, and pipes
    child=''
    ((interrupted == stopped)) || code=-2
  fi
  elapsed=$(((${EPOCHREALTIME/[.,]/} - began) / 100000)) # tenths of a second
  case $code in
    0) said=ok ;;
    77) said=absent ;;
    -1) said='no time left' ;;
    -2) said=interrupted ;;
    124) said='out of time' ;;
    137) said=$( ((elapsed >= limit * 10)) && echo 'out of time' || echo 'failed (exit 137)') ;;
    *) said="failed (exit $code)" ;;
  esac
  case $said in ok | absent) ;; *) status=1 lost+=("$part") ;; esac
  statuses+=("$said") times+=("$((elapsed / 10)).$((elapsed % 10))")
  printf '== %s: %s, %s s\n' "$part" "$said" "${times[number]}"
done

# A line a part, so that it can be read with the eye too.
{
  printf '{"device": "%s", "set": "%s", "commit": "%s", "seconds": %d, "parts": [' "$device" "$set" "$NSPEC_COMMIT" "$SECONDS"
  for number in "${!parts[@]}"; do
    ((number == 0)) || printf ,
    printf '\n  {"part": "%s", "status": "%s", "seconds": %s}' "${parts[number]}" "${statuses[number]}" "${times[number]}"
  done
  printf '\n]}\n'
} > "$folder/summary.json"

most=$((16 * 1000 * 1000 - 1000))
for file in "$folder"/*; do
  if [ "${file##*/}" != log.txt ] && (($(wc -c < "$file") > most)); then
    rm "$file"
    echo "${file##*/} was larger than 16 MB and is not kept"
    status=1
  fi
done

((!interrupted)) || status=130

printf '\n%-18s%-20s%9s\n' part status seconds
for number in "${!parts[@]}"; do printf '%-18s%-20s%9s\n' "${parts[number]}" "${statuses[number]}" "${times[number]}"; done
printf '%-18s%-20s%9d\n' all "$( ((status)) && echo failed || echo ok)" "$SECONDS"
if ((${#lost[@]})); then
  printf 'run again what was lost: bench/gpu_check.sh NEW_FOLDER --device %s --set %s --only %s\n' "$device" "$set" \
    "$(IFS=,; echo "${lost[*]}")"
fi

# The log is whole when tee has ended; something that a part left behind may still hold its pipe.
exec 1>&"$terminal" 2>&1
for _ in {1..50}; do kill -0 "$logger" 2> /dev/null || break; sleep 0.1; done
if (($(wc -c < "$folder/log.txt") > most)); then
  { head -c 1000000 "$folder/log.txt"; printf '\n[... left out: the log was too large ...]\n'
    tail -c $((most - 1001000)) "$folder/log.txt"; } > "$work/log.txt" && cp "$work/log.txt" "$folder/log.txt"
fi
exit $status
