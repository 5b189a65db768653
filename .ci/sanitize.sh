#!/usr/bin/env bash
# Builds csrc with a sanitizer (address,undefined or thread), links it to tests/native/sanitize.cpp and runs that for
# each ISA named; what sees addresses also sees the reader and the builtins with torch's objects, and what they leak.
# Usage: .ci/sanitize.sh PYTHON SCRATCH SANITIZERS ISA...
set -euo pipefail
python=$1 scratch=$2 sanitizers=$3
shift 3

mkdir -p "$scratch"
cp -r csrc tests fastclip setup.py pyproject.toml README.md LICENSE "$scratch"
cd "$scratch"
rm -f fastclip/*.so
export CXXFLAGS="-fsanitize=$sanitizers -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
export LDFLAGS="-fsanitize=$sanitizers"
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
[[ $sanitizers = *address* ]] || exit 0

runtime=$(${CXX:-c++} -print-file-name=libasan.so)
[ -e "$runtime" ] || { echo "no libasan.so of ${CXX:-c++}: python has to load it first" >&2; exit 1; }
# With its symbols, which setup.py takes away.
# shellcheck disable=SC2086
${CXX:-c++} -shared $CXXFLAGS $objects -Wl,--no-as-needed build/native/stub/libtorch.so -o fastclip/libfastclip_cpu.so
# Without the children that count or limit memory, of which the sanitizer takes its own, and the profiler, which it makes
# ten times slower; Dynamo, the simulated GPU and the adapters bring other code alone.
left_out='profiled or kept_of or runs_out or dynamo or compile or of_the_gpu or scaling or overflow_flag or type_hints'
# What throws has to be there when the sanitizer looks for it. Python's own allocator would hide what it is given back.
# Python leaks, too: those of ours count, whose stacks have a frame of this library. Leaks alone are no exit code, and
# then nothing that is reported is: all else that a report says is an error, whatever its stack.
status=0
env LD_PRELOAD="$runtime libstdc++.so.6" PYTHONMALLOC=malloc ASAN_OPTIONS="log_path=$PWD/report" LSAN_OPTIONS=exitcode=0 \
  "$python" -m pytest --quiet -k "not ($left_out)" \
  tests/test_reader.py tests/test_ways.py tests/test_front_door.py tests/test_functional.py || status=$?
ours='/ERROR: AddressSanitizer|CHECK failed|libfastclip_cpu|csrc\// { print $0 "\n"; found = 1 } END { exit found }'
for report in report.*; do
  if [ -e "$report" ]; then awk -v RS= "$ours" "$report" || status=1; fi
done
exit $status
