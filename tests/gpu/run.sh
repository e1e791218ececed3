#!/usr/bin/env bash
# Everything here that only a GPU can show, one step after another, each under a limit of its own; a table last.
#   tests/gpu/run.sh [FOLDER] [STEP ...]      logs and JSON go to FOLDER (default: gpu-results); all steps by default
# Uses the python3 in front on PATH, which needs what the project needs and pytest; compute-sanitizer for its checks.
set -u
cd "$(dirname "$0")/../.."
python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || { echo "$0: torch finds no GPU here" >&2; exit 2; }
out=$(realpath -m "${1:-gpu-results}")
mkdir -p "$out"
shift || true
wanted=" $* "
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# No backtraces of the host: to make them the sanitizer keeps frames of Python, and with them the tensors in them.
memcheck="compute-sanitizer --tool memcheck --launch-timeout 0 --report-api-errors no --error-exitcode 9 --show-backtrace device"
racecheck="compute-sanitizer --tool racecheck --launch-timeout 0 --target-processes application-only --show-backtrace device"
kernels=tests/gpu/test_grouped_gemm_on_gpu.py
lines=()

step() {  # step NAME SECONDS COMMAND
  [[ $wanted == "  " || $wanted == *" $1 "* ]] || return 0
  local start=$SECONDS
  timeout -k 5 "$2" bash -c "$3" >"$out/$1.log" 2>&1
  local status=$?
  lines+=("$(printf '%-14s exit %-4s %4ss  %s' "$1" "$status" $((SECONDS - start)) "$(tail -n 1 "$out/$1.log" | cut -c1-100)")")
}

step doctor 40 "python3 -m vmm_dwdp doctor --json >$out/doctor.json && echo ok"
step demo 240 "python3 -m vmm_dwdp demo --device cuda --json >$out/demo.json; s=\$?; python3 -c \"import json; d = json.load(open('$out/demo.json')); print('identical', d['identical'], 'leaked', d['leaked'], d['seconds'], 's')\"; exit \$s"
step tests 240 "python3 -m pytest -q -p no:cacheprovider -m 'gpu and not faults' tests"
step faults 90 "python3 -m pytest -q -p no:cacheprovider -m 'gpu and faults' tests"
# Sanitizers that run at the same time need ports of their own to attach by, so these steps name theirs.
grouped="--ignore tests/gpu/test_group_on_gpu.py --ignore tests/gpu/test_transformers_on_gpu.py --ignore tests/gpu/test_transformers_graphs_on_gpu.py --ignore tests/gpu/test_demo_on_gpu.py"
step memcheck 240 "$memcheck --port 50100 --target-processes application-only python3 -m pytest -q -p no:cacheprovider -m 'gpu and not faults' tests/unit tests/multiprocess/test_memory_between_processes.py tests/gpu $grouped --ignore $kernels"
step memgroup 240 "$memcheck --port 50300 --target-processes all python3 -m pytest -q -p no:cacheprovider -m gpu tests/gpu/test_group_on_gpu.py"
step memmodels 300 "$memcheck --port 50500 --target-processes all python3 -m pytest -q -p no:cacheprovider -m gpu tests/gpu/test_transformers_on_gpu.py"
step memdemo 300 "$memcheck --port 50700 --target-processes all python3 -m vmm_dwdp demo --device cuda --group-size 2 --generate 8 --json"
step memkernels 240 "$memcheck --port 50900 --target-processes application-only python3 -m pytest -q -p no:cacheprovider -m gpu $kernels -k 'cute or triton'"
# Hazards of our CuTe kernels beside those of stock TMA/WGMMA kernels on the same operands: torch's for bf16, DeepGEMM's for fp8.
race() {  # race NAME PORT TESTS
  step "$1" 150 "$racecheck --port $2 python3 -m pytest -q -p no:cacheprovider -rs -m gpu $kernels -k 'same_bits and $3'"
}
race racecheck 51100 "cute and PLAIN"
race racestock 51300 "torch0 and PLAIN"
race racecheck-fp8 51500 "cute and FP8_BLOCK"
race racestock-fp8 51700 "deep-gemm and FP8_BLOCK"
step assembly 60 "python3 benchmarks/assembly.py --json >$out/assembly.json && echo ok"
printf '%s\n' "${lines[@]}"
