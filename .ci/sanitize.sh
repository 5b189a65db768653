#!/usr/bin/env bash
# Builds csrc with a sanitizer (address,undefined or thread), links it to tests/native/sanitize.cpp and runs that for
# each ISA named. Usage: .ci/sanitize.sh PYTHON SCRATCH SANITIZERS ISA...
set -euo pipefail
python=$1 scratch=$2 sanitizers=$3
shift 3

mkdir -p "$scratch/fastclip"
cp -r csrc tests setup.py pyproject.toml README.md LICENSE "$scratch"
cp fastclip/__init__.py "$scratch/fastclip"
cd "$scratch"
export CXXFLAGS="-fsanitize=$sanitizers -fno-sanitize-recover=all -g -O1" LDFLAGS="-fsanitize=$sanitizers"
# setup.py knows the sources and the flags of each; only its objects are of use here.
USE_CUDA=0 "$python" setup.py --quiet build_ext --build-lib out > build.log 2>&1 || { cat build.log; exit 1; }
objects=$(find build/native -name '*.o')
# shellcheck disable=SC2086
${CXX:-c++} -std=c++17 -Wall -Wextra -Werror $CXXFLAGS tests/native/sanitize.cpp $objects -o sanitize
for isa in "$@"; do
  status=0
  FASTCLIP_CPU_ISA=$isa ./sanitize || status=$?
  # 77: this machine lacks the ISA.
  if [ $status = 77 ]; then echo "$isa: skipped"; elif [ $status != 0 ]; then exit $status; fi
done
