#!/usr/bin/env bash
# Installs this package and its dependencies into a virtual environment. Packages that
# are already installed are not installed again.
#
# Usage: [PYTHON=python3.11] [FAMILY=onedl] [TORCH=torch==2.6.0] bash tools/install.sh [.venv]
#
# FAMILY: which OpenMMLab packages: onedl (maintained), openmmlab (official) or none.
# TORCH: which PyTorch, as a requirement.
#
# By default the packages are those of requirements/ (`make lock` writes onedl.txt), and
# the SHA-256 of each is checked. With another FAMILY, or a TORCH, pip chooses within the
# ranges of pyproject.toml and checks none.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
python=${PYTHON:-python3}
family=${FAMILY:-onedl}
log=$venv/mmcv-build.log

say() { printf '== %s\n' "$*"; }
stop() { printf 'Error: %s\n' "$*" >&2; exit 1; }
run() { "$venv/bin/python" "$@"; }
pip() { run -m pip --disable-pip-version-check "$@"; }
pinned_mmcv() {
    sed -n "/^$family = \[/,/^\]/s/^ *\"\(.*mmcv==[^\"]*\)\",*$/\1/p" pyproject.toml
}
pinned_torch() { sed -n 's/^dependencies = .*"\(torch[^"]*\)".*/\1/p' pyproject.toml; }

# Writes the entries of the lock file whose names match, or do not match, a pattern.
entries() { # 1 or 0, pattern, file
    awk -v wanted="$1" -v names="^($2)==" '/^[a-z]/ { on = ($0 ~ names) == wanted } on' \
        requirements/onedl.txt >"$3"
}
install_hashed() { # file
    pip install -q --no-deps --no-build-isolation --require-hashes -r "$1" ||
        stop "the packages of $1 are not installed. If pip says that hashes do not" \
            'match, the package index offers another file than the tested one.'
}

case $family in
    onedl | openmmlab) extras=$family,clip,demo,export,parquet,docs,test,lint ;;
    none) extras=clip,export,parquet,test,lint ;;
    *) stop "FAMILY is '$family'; onedl, openmmlab or none are accepted." ;;
esac
[ "$family" = onedl ] && [ -z "${TORCH:-}" ] && hashed=yes || hashed=no

"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' ||
    stop "Python 3.10 to 3.12 is required, but $python is $("$python" -V 2>&1);" \
        "set PYTHON to another interpreter."
command -v c++ >/dev/null || command -v g++ >/dev/null ||
    stop 'building the ops of mmcv requires a C++ compiler, but none was found;' \
        'install g++.'
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

if [ $hashed = yes ]; then
    say 'The packages of requirements/, whose SHA-256 is checked'
    torch='torch|torchvision|triton|nvidia-.*|cuda-.*'
    built='onedl-mmcv|onedl-mmdetection|onedl-mmpretrain'
    # opencv-python-headless has the same files, see below.
    entries 0 "$torch|$built|opencv-python" "$venv/packages.txt"
    entries 1 "$torch" "$venv/torch.txt"
    entries 1 onedl-mmcv "$venv/mmcv.txt"
    entries 1 "$built" "$venv/built.txt"
    install_hashed "$venv/packages.txt"
    mmcv=(--no-deps --require-hashes -r "$venv/mmcv.txt")
else
    say "FAMILY=$family, TORCH=${TORCH:-}: pip chooses the versions; no hash is checked"
    pip install -q -r requirements/build.in
    mmcv=("$(pinned_mmcv)")
fi

say 'PyTorch'
has_torch() { pip show -q torchvision 2>/dev/null; }
# Whether the package index has the builds for the CPU.
finds_cpu_builds() {
    pip install -q --no-deps --dry-run \
        -r <(sed -n '/^[a-z]/s/ *\\$//p' requirements/torch-cpu.txt) 2>/dev/null
}
if [ $hashed = no ]; then
    has_torch || pip install "${TORCH:-$(pinned_torch)}" torchvision
else
    has_torch || command -v nvidia-smi >/dev/null || ! finds_cpu_builds ||
        install_hashed requirements/torch-cpu.txt
    has_torch || install_hashed "$venv/torch.txt"
fi

# mmcv is built with CUDA ops if there are a GPU and an nvcc of torch's CUDA version.
cuda=$(run - <<'PY'
import re, shutil, subprocess, torch
if not torch.cuda.is_available():
    print('no')
elif not shutil.which('nvcc'):
    print('no nvcc')
else:
    text = subprocess.run(['nvcc', '--version'], capture_output=True, text=True).stdout
    major = re.search(r'release (\d+)', text)
    same = major and major[1] == torch.version.cuda.split('.')[0]
    print('yes' if same else 'no nvcc')
PY
)
if [ "$cuda" = 'no nvcc' ]; then
    say "This machine has a GPU, but no nvcc of torch's CUDA version. mmcv is built for" \
        'the CPU, and detectors cannot run on the GPU. To change this, install that' \
        'CUDA toolkit, then call: make clean setup'
fi
[ "$cuda" = yes ] || export CUDA_VISIBLE_DEVICES=

mmcv_works() {
    run - "$cuda" <<'PY' 2>/dev/null
import sys
import mmcv._ext
from mmcv.ops import get_compiling_cuda_version
sys.exit(sys.argv[1] == 'yes' and get_compiling_cuda_version() == 'not available')
PY
}

install_mmcv() {
    # Without --no-build-isolation the build does not find torch and leaves out the ops.
    CFLAGS='-g0 -O2' MAX_JOBS=${MAX_JOBS:-$(nproc)} MMCV_WITH_OPS=1 \
        pip install -v --no-build-isolation "$@" "${mmcv[@]}" 2>&1 |
        tee "$log" | awk '
            match($0, /\[[0-9]+\/[0-9]+\]/) {
                split(substr($0, RSTART + 1, RLENGTH - 2), n, "/")
                printf "\r   compiled %d of %d files", n[1], n[2]
                fflush(); shown = 1
            }
            END { if (shown) print "" }' ||
        { tail -n 30 "$log" >&2; stop "mmcv is not installed; see $log"; }
}

[ "$family" = none ] ||
    say 'mmcv with its ops (about 5 minutes on two cores if no wheel is cached)'
if [ "$family" != none ] && ! mmcv_works; then
    install_mmcv
    # A cached wheel may lack the ops, or its ops may be built for another torch.
    mmcv_works || install_mmcv --force-reinstall --no-deps --no-cache-dir
    mmcv_works || stop "mmcv was built, but its ops do not load; see $log"
fi

# If there is a GPU, the build notes why it leaves out the CUDA part of the ops.
[ "$cuda" = no ] || export FORCE_CUDA=1
say "This package with $extras"
if [ $hashed = yes ]; then
    install_hashed "$venv/built.txt"
    pip install -q --no-build-isolation --no-deps -e .
else
    pip install -q --no-build-isolation -e ".[$extras]"
fi

# The dependencies install both opencv-python and opencv-python-headless. The two write
# the same files. opencv-python needs libGL, which many machines do not have, so only the
# headless package is kept.
if pip show -q opencv-python 2>/dev/null; then
    say 'opencv-python-headless in place of opencv-python'
    opencv=$(pip show opencv-python | sed -n 's/^Version: //p')
    pip uninstall -q -y opencv-python opencv-python-headless
    pip install -q --no-deps "opencv-python-headless==$opencv"
fi

# The report fails if something is missing, as mmengine is without a family.
[ "$family" = none ] || run -m dsnet_mm
