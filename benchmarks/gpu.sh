#!/usr/bin/env bash
# Everything that needs a GPU, in one command, without a network: builds, tests, sanitizes, measures, and writes one JSON
# under benchmarks/results/, named after the GPU, the day and the commit, anew after every part. Needs a Python that has
# a CUDA build of torch (2.11 or newer), numpy, setuptools, pybind11, cmake, ninja and pytest (and scipy, hypothesis,
# scikit-learn for the tests that use them), and nvcc. compute-sanitizer and ncu are used where they are found.
#
#   PYTHON=python3 OPTIONS=--quick benchmarks/gpu.sh [part...]
#
# Parts: tests memcheck racecheck initcheck synccheck ops precision ncu explainers; all of them where none is named. The
# build comes first, always. On a machine that is lent for minutes at a time, name a few: what other runs of the same day
# and commit found stays in the file. OPTIONS go to the benchmarks; ONLY=TEXT leaves the explainers' models with TEXT in
# their name; LIMIT=SECONDS ends a part; LOGS=FOLDER keeps what the parts print; COMMIT=HASH where this is no git clone.
# A part that fails is recorded and the next one runs; the exit status is 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
root=$PWD
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
logs=${LOGS:-$work}
export OMP_WAIT_POLICY=PASSIVE
# A crash shows the line that it came at.
export PYTHONFAULTHANDLER=1
failed=0

for module in torch pybind11 cmake ninja pytest; do
  "$python" -c "import $module" 2>/dev/null || command -v "$module" >/dev/null ||
    { echo "gpu.sh: $python has no $module; install it there first" >&2; exit 2; }
done
# The build looks for cmake and ninja on PATH, where those of a virtual environment that is not activated are missing.
scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
export PATH="$scripts:$PATH"
command -v nvcc >/dev/null || export PATH="/usr/local/cuda/bin:$PATH"
command -v nvcc >/dev/null || { echo "gpu.sh: nvcc was not found" >&2; exit 2; }
"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" ||
  { echo "gpu.sh: torch finds no CUDA device" >&2; exit 2; }

read -r -a options <<<"${OPTIONS:-}"
parts=${*:-tests memcheck racecheck initcheck synccheck ops precision ncu explainers}

record() {  # name, status, seconds: adds a part to the JSON
  RECORDED="$*" "$python" - "$work" "$root" "$logs" <<'PYTHON'
import json, os, re, subprocess, sys
from datetime import date
from pathlib import Path

import torch

work, root, logs = map(Path, sys.argv[1:])
name, status, seconds = os.environ["RECORDED"].split()


def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # containers often come without nvidia-smi


result = {
    "date": date.today().isoformat(),
    "gpu": torch.cuda.get_device_name(),
    "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    "torch": torch.__version__,
    "nvcc": (re.findall(r"release ([\d.]+)", said("nvcc", "--version") or "") or [None])[0],
    "commit": os.environ.get("COMMIT") or said("git", "-C", str(root), "rev-parse", "HEAD"),
    "parts": {},
}
slug = re.sub(r"[^a-z0-9]+", "-", result["gpu"].lower()).strip("-")
target = root / "benchmarks" / "results" / f"{slug}-{result['date']}-{(result['commit'] or 'unknown')[:7]}.json"
if target.exists():
    earlier = json.loads(target.read_text())
    result = {**earlier, **result, "parts": earlier["parts"]}
result["parts"][name] = {"status": status, "seconds": int(seconds)}
log, found = logs / f"{name}.log", work / f"{name}.json"
if found.exists():
    result[name] = json.loads(found.read_text())
elif name == "ncu" and log.exists():
    result[name] = [line for line in log.read_text().splitlines() if line.startswith('"') or "ERR" in line]
elif name != "build" and log.exists():
    # Without the folder that the tests lay in.
    result[name] = [re.sub(r"[^ ]*/(?=tests/)", "", line) for line in log.read_text().strip().splitlines()[-3:]]
target.parent.mkdir(parents=True, exist_ok=True)
target.write_text(json.dumps(result, indent=2) + "\n")
print(f"{name}: {status} in {seconds} s; in {target}")
PYTHON
}

part() {  # name, command...
  local name=$1 status=passed began=$SECONDS
  [[ " build $parts " == *" $name "* ]] || return 0
  shift
  printf '\n--- %s\n' "$name"
  timeout -k 15 "${LIMIT:-0}" "$@" >"$logs/$name.log" 2>&1 || { status=failed; failed=1; }
  tail -n 25 "$logs/$name.log"
  record "$name" "$status" $((SECONDS - began))
}

architecture=$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
part build env MOREAU_CUDA=ON CMAKE_CUDA_ARCHITECTURES="$architecture" CMAKE_ARGS=-DMOREAU_WERROR=ON \
  "$python" -m pip install --no-build-isolation --no-deps --no-index --target "$work/site" .
# The build alone is on the path; the tests and benchmarks come from this tree.
export PYTHONPATH="$work/site"
cd "$work" || exit 2
# Older versions of torch warn of themselves when something is compiled.
tests=("$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root"
  -W 'ignore:`torch.jit:DeprecationWarning')
part tests "${tests[@]}" "$root"/tests/{ops/test_cuda,capture/test_cuda_graphs,ops/test_ops}.py

# The sanitizer slows kernels a hundred times: tests that cover every kernel and type, of small sizes. torch's allocator
# is told to hand out separate pieces, since memcheck cannot see a step from one tensor into the next within one. Only
# our kernels are watched, except by initcheck, which must also see what torch's write.
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    watch=(--tool "$tool" --error-exitcode 9 --target-processes all)
    [[ $tool == initcheck ]] || watch+=(--kernel-regex kns=moreau)
    [[ $tool == memcheck ]] && watch+=(--report-api-errors no)
    part "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer "${watch[@]}" \
      "${tests[@]}" "$root/tests/ops/test_cuda.py" -k "cpu_gives or chunks_do_not or repeat or vector or group_norms"
  done
else
  record sanitizers not-found 0
fi
part ops "$python" "$root/benchmarks/bench_ops.py" --device cuda --json "$work/ops.json" "${options[@]}"
part precision "$python" "$root/benchmarks/bench_precision.py" --device cuda --json "$work/precision.json" "${options[@]}"
# The counters need a permission that containers often lack; then this part fails and says so.
if command -v ncu >/dev/null; then
  metrics=gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__inst_issued.avg.pct_of_peak_sustained_active,sm__warps_active.avg.pct_of_peak_sustained_active
  part ncu env PYTHONPATH="$PYTHONPATH:$root/benchmarks" \
    ncu --csv --clock-control none --kernel-name regex:prox_step --metrics "$metrics" "$python" -c "
import torch
from bench_ops import Buffers, Tiles, fused
for dtype in (torch.float32, torch.bfloat16):
    b = Buffers(16, 32, (3, 224, 224), 'cuda', dtype)
    for noise in (None, b.noise(False), b.noise(True)):
        for structure in (None, Tiles(14)):
            fused(b, noise=noise, structure=structure)()
"
else
  record ncu not-found 0
fi
part explainers "$python" "$root/benchmarks/bench_explainers.py" --device cuda --json "$work/explainers.json" --only "${ONLY:-}" "${options[@]}"
exit $failed
