#!/usr/bin/env bash
# All that needs a GPU, in one go: build for it, the kernels against their references, the GPU tests, NVIDIA's checkers,
# the benchmarks. Prints a line for each step; logs and JSON go to a folder.
#
#   evals/gpu.sh [-o FOLDER] [STEP ...]      steps: build check tests memcheck racecheck initcheck bench accuracy speed
#                                            compiled
#
# Runs in the environment as it is (its own torch); nothing is installed. BENCH in the environment: more options of the
# benchmark, such as `--load LIBRARY` for peers' operators.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-build/gpu}
[ "${1:-}" = -o ] && out=$2 && shift 2
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
steps=("$@")
[ ${#steps[@]} = 0 ] && steps=(build check tests memcheck racecheck initcheck bench)
checker() { compute-sanitizer --error-exitcode 1 --print-limit 20 --tool "$@"; }
samples=("$python" tests/gpu/sanitize.py)
# Racecheck reports hazards within cuBLAS's own kernels (nvjet), and crashes if it is told to pass over them.
races() {
  compute-sanitizer --print-limit 1000 --tool racecheck "${samples[@]}" > "$out/races.log" 2>&1
  cat "$out/races.log"
  grep -q "all right$" "$out/races.log" && ! grep "Race reported" "$out/races.log" | grep -qv "at nvjet"
}

command_of() {
  case $1 in
    build) TORCH_PAGEDKV_CUDA_ARCHS=${TORCH_PAGEDKV_CUDA_ARCHS:-native} "$python" torch_pagedkv/build.py ;;
    check) "$python" tests/gpu/sanitize.py ;;
    tests) "$python" -m pytest -q -m gpu -p no:cacheprovider --durations=5 ;;
    memcheck) checker memcheck "${samples[@]}" ;;
    racecheck) races ;;
    initcheck) checker initcheck "${samples[@]}" --no-tma ;; # it takes what TMA writes for memory that nobody wrote
    bench)
      "$python" -m torch_pagedkv.cli bench --device cuda ${BENCH:-} --json "$out/kernels-cuda.json" \
        --plot "$out/kernels-cuda.html"
      ;;
    accuracy) "$python" -m torch_pagedkv.evals.accuracy --device cuda --json "$out/accuracy-cuda.json" ;;
    speed) "$python" -m torch_pagedkv.evals.speed --device cuda --random llama3-8b --json "$out/speed-cuda.json" ;;
    compiled)
      "$python" -m torch_pagedkv.evals.compiled --device cuda --random llama3-8b --mode reduce-overhead \
        --json "$out/compiled-cuda.json"
      ;;
    *) echo "unknown step" && return 2 ;;
  esac
}

failed=0
for step in "${steps[@]}"; do
  began=$SECONDS
  if command_of "$step" > "$out/$step.log" 2>&1; then state=ok; else state=FAILED failed=1; fi
  printf '%-10s %-6s %4d s  %s\n' "$step" "$state" $((SECONDS - began)) "$(tail -n 1 "$out/$step.log" | cut -c1-150)"
done
exit $failed
