#!/usr/bin/env bash
# A GPU machine without compiler, network or this repository's environment runs what is built here.
#
#   dev/gpu.sh build              here: extension and CUDA backend for one architecture and one Python, packed into carry/
#   dev/gpu.sh older              here: after build, the backend for compute capability 7.5 and 8.0 as PTX
#   dev/gpu.sh racecheck          here: after build, the backend as racecheck can follow it, for sanitize
#   dev/gpu.sh data BOOKS         here: adds a folder with books.jsonl.zst and its tokenizer to carry/
#   dev/gpu.sh wheel              here: the newest wheel in dist/ for that Python, and what it requires, in carry/wheel
#   dev/gpu.sh run [PART …]       there, with this checkout and carry/: tests, sanitize, bench (all three), or any of these, paths,
#                                 sliding, ops, wheel
#
#   PGOLF_GPU_ARCHITECTURE=90a-real   PGOLF_GPU_PYTHON=python3.12   PGOLF_GPU_OUT=DIR: where `run` leaves its files (carry/out)
set -euo pipefail
cd "$(dirname "$0")/.."
pack=carry
site=$PWD/$pack/site
venv=.venv-gpu

# configure FOLDER ARCHITECTURES [NVCC_FLAGS]
configure() {
  mkdir -p "$1"
  PATH="$PWD/$venv/bin:$PATH" cmake -S . -B "$1" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPGOLF_WERROR=ON -DPGOLF_CUDA=on \
    -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON -DPGOLF_CUDA_ARCHITECTURES="$2" -DCMAKE_CUDA_FLAGS="${3:-}" -DPython_EXECUTABLE="$PWD/$venv/bin/python" \
    -Dpybind11_DIR="$($venv/bin/python -m pybind11 --cmakedir)" >"$1.log" 2>&1 || { cat "$1.log"; exit 1; }
}

build() {
  local python packages
  python=$(sh dev/find_python.sh "${PGOLF_GPU_PYTHON:-python3.12}") || { echo "PGOLF_GPU_PYTHON names another Python."; exit 2; }
  [ -x $venv/bin/python ] || "$python" -m venv $venv
  $venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/build.txt -r requirements/wheel.txt tomli-w zstandard
  configure build/gpu "${PGOLF_GPU_ARCHITECTURE:-90a-real}"
  PATH="$PWD/$venv/bin:$PATH" cmake --build build/gpu
  $venv/bin/python dev/fragments.py build/gpu/libpgolf_cuda.so
  rm -rf "$site" && mkdir -p "$site"
  cp -R python/pgolf "$site/" && find "$site" -name __pycache__ -prune -exec rm -rf {} +
  cp build/gpu/_C.*.so build/gpu/libpgolf_cuda.so "$site/pgolf/"
  packages=$($venv/bin/python -c "import sysconfig; print(sysconfig.get_paths()['platlib'])")
  cp -R "$packages"/zstandard "$packages"/tomli_w "$site/"
  strip "$site"/zstandard/*.so "$site"/pgolf/*.so
  git rev-parse --short HEAD >$pack/commit
  du -sh $pack
}

# The code of older GPUs as PTX, which the driver of whatever GPU there is compiles.
older() {
  local generation
  for generation in 75 80; do
    configure build/gpu$generation $generation-virtual
    PATH="$PWD/$venv/bin:$PATH" cmake --build build/gpu$generation --target pgolf_cuda
    mkdir -p $pack/older
    cp build/gpu$generation/libpgolf_cuda.so $pack/older/libpgolf_cuda_$generation.so
    strip $pack/older/libpgolf_cuda_$generation.so
  done
  du -sh $pack
}

racecheck() {
  configure build/gpu-racecheck "${PGOLF_GPU_ARCHITECTURE:-90a-real}" -DPGOLF_RACECHECK
  PATH="$PWD/$venv/bin:$PATH" cmake --build build/gpu-racecheck --target pgolf_cuda
  mkdir -p $pack/racecheck
  cp build/gpu-racecheck/libpgolf_cuda.so $pack/racecheck/
  strip $pack/racecheck/libpgolf_cuda.so
}

data() {
  mkdir -p $pack/books
  cp "$1"/books.jsonl.zst "$1"/books_1024_bpe.model $pack/books/
}

# As wheels: the machine there has no network, and pip no index.
pack_wheel() {
  local python=$venv/bin/python wheel
  wheel=$($python -c 'import sys; sys.path[0] = "dev"; import try_wheel; print(try_wheel.newest_wheel())')
  rm -rf $pack/wheel && mkdir -p $pack/wheel
  $python -m pip download --quiet --disable-pip-version-check --only-binary :all: --dest $pack/wheel "$wheel"
  git rev-parse --short HEAD >$pack/commit
  du -sh $pack/wheel
}

# A line of the table that ends a run.
rows=()
part() {
  local name=$1 start=$SECONDS status=0
  shift
  echo "== $name"
  "$@" || status=$?
  rows+=("$(printf '%-12s %-6s %5d s' "$name" "$([ $status = 0 ] && echo ok || echo FAILED)" $((SECONDS - start)))")
  return 0
}

tests() {
  python3 -m pytest -q -p no:cacheprovider --durations=8 -k cuda tests/test_places.py tests/test_ttt.py tests/test_cuda.py ${PYTEST_ARGS:-}
}

# Every planned buffer in a block of its own, full of NaN; one small model in each precision, every kernel. racecheck
# cannot follow cuBLASLt's Hopper kernels for 16 bits: there it runs what needs none; nor that one lane arrives at a
# barrier for all, so it gets a library of its own. The tools run side by side: they leave a GPU
# nearly idle. racecheck of float32 alone takes 166 s (H200).
sanitize() {
  [ -f $pack/racecheck/libpgolf_cuda.so ] || { echo "What racecheck runs is not packed: dev/gpu.sh racecheck, where it was built."; return 2; }
  local job jobs=(memcheck initcheck synccheck racecheck.steps.float32 racecheck.own.bfloat16 racecheck.own.float16) pids=() status=0
  for job in "${jobs[@]}"; do
    local tool=${job%%.*} words="" library=$site/pgolf/libpgolf_cuda.so
    [ "$tool" = "$job" ] || words=${job#*.}
    [ "$tool" != racecheck ] || library=$PWD/$pack/racecheck/libpgolf_cuda.so
    # shellcheck disable=SC2086  # each word is an argument
    PGOLF_CUDA_LIBRARY=$library PGOLF_ARENA=separate PGOLF_CUDA_GRAPHS=0 timeout 400 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python3 dev/gpu_small.py ${words//./ } >"$out/$job.log" 2>&1 &
    pids+=($!)
  done
  for job in "${!pids[@]}"; do
    wait "${pids[$job]}" || { echo "${jobs[$job]} ended with status $?"; status=1; }
  done
  for job in "${jobs[@]}"; do echo "$job: $(grep -E "ERROR SUMMARY|RACECHECK SUMMARY" "$out/$job.log" || echo "did not end")"; done
  return $status
}

# What Turing and Ampere run, on this GPU.
paths() {
  local generation status=0
  for generation in 75 80; do
    echo "-- $generation"
    PGOLF_CUDA_LIBRARY=$PWD/$pack/older/libpgolf_cuda_$generation.so PGOLF_CUDA_PATH=$generation \
      python3 -m pytest -q -p no:cacheprovider tests/test_places.py -k cuda || status=1
  done
  return $status
}

bench() {
  python3 benchmarks/train_step.py --out "$out/train_step.json" ${BENCH_ARGS:-}
}

sliding() {
  python3 benchmarks/sliding_eval.py --out "$out/sliding_eval.json" ${BENCH_ARGS:-}
}

ops() {
  python3 benchmarks/ops.py --out "$out/ops.json" ${BENCH_ARGS:-}
}

# In an empty environment, with the cuBLASLt that comes with this machine's PyTorch: the wheel has none, and it is too large
# to carry.
wheel() {
  local cublaslt
  cublaslt=$(python3 -c 'import glob, sys; print(*(f for p in sys.path for f in glob.glob(p + "/nvidia/cu13/lib/libcublasLt.so.13")))')
  env -u PYTHONPATH PGOLF_CUBLASLT="${PGOLF_CUBLASLT:-${cublaslt%% *}}" \
    python3 dev/try_wheel.py $pack/wheel/pgolf-*.whl --packages $pack/wheel --device cuda
}

run() {
  out=${PGOLF_GPU_OUT:-$PWD/$pack/out}
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
  mkdir -p "$out"
  PGOLF_COMMIT=$(cat $pack/commit)
  export PGOLF_COMMIT
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  local what
  for what in "${@:-tests sanitize bench}"; do
    for what in $what; do part "$what" "$what"; done
  done
  printf '%s\n' "" "${rows[@]}"
  ! printf '%s\n' "${rows[@]}" | grep -q FAILED
}

case "${1:-}" in
  build | older | racecheck) "$1" ;;
  wheel) pack_wheel ;;
  data) data "${2:?the folder with books.jsonl.zst}" ;;
  run) shift; run "$@" ;;
  *) sed -n '2,12p' "$0"; exit 2 ;;
esac
