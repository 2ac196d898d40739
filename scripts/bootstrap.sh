# Makes .venv ready to run meristem and its tests; sourced by ./demo, ./check and .ci/run from the root of the repository.
#
# PYTHON=/path/to/python     builds the environment with this interpreter
# MERISTEM_EXTRAS=ci         installs these extras as well
# MERISTEM_TORCH=any         accepts whichever build of torch pip offers, however large

fail() {
    printf '%s\n' "$@" >&2
    exit 3
}

# The first interpreter of version 3.11 or newer that can make an environment; failing that, the first that cannot.
find_python() {
    without_pip=
    for candidate in ${PYTHON:-} python3 python3.11 python3.12 python3.13 python3.14 python; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
        if "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
        without_pip=${without_pip:-$candidate}
    done
    [ -n "$without_pip" ] || fail "No Python 3.11 or newer was found. Install one (sudo apt install python3 python3-venv)," \
        "or name it: PYTHON=/path/to/python $0"
    version=$("$without_pip" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    fail "Python $version is here, but its venv module lacks pip. Install it, then run $0 again:" \
        "    sudo apt install python$version-venv"
}

# What the environment is made from: it is rebuilt when one of these changes.
stamp() {
    .venv/bin/python - <<'PY'
import hashlib, sys
digest = hashlib.sha256(sys.version.encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update(open(name, "rb").read())
print(digest.hexdigest())
PY
}

has_torch() {
    .venv/bin/python - <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version
wanted = next(line.strip() for line in open("constraints.txt") if line.startswith("torch=="))
try:
    sys.exit("torch==" + version("torch").partition("+")[0] != wanted)
except PackageNotFoundError:
    sys.exit(1)
PY
}

# The CUDA packages that pip would fetch beside torch, one per line. Where a registry serves no metadata of its own, a dry run
# downloads every wheel, 2.7 GB, to read them; fast-deps reads their ends instead, 5 MB.
cuda_packages() {
    .venv/bin/python -m pip install $pip_options --use-feature=fast-deps --dry-run --report .venv/torch.json \
        -c constraints.txt torch 2>.venv/torch.log >&2 || return
    .venv/bin/python - <<'PY'
import json
names = [item["metadata"]["name"].lower() for item in json.load(open(".venv/torch.json"))["install"]]
print("\n".join(name for name in sorted(names) if name.startswith(("nvidia", "cuda", "triton"))))
PY
}

install_torch() {
    if [ "${MERISTEM_TORCH:-}" != any ] && ! nvidia-smi -L >/dev/null 2>&1; then
        packages=$(cuda_packages) || fail "$(cat .venv/torch.log)" "pip cannot find torch. Is the network there?"
        [ -z "$packages" ] || fail \
            "This machine has no NVIDIA GPU, but pip offers only the CUDA build of torch: several gigabytes" \
            "($(printf '%s\n' "$packages" | wc -l | tr -d ' ') packages beside it, such as $(printf '%s\n' "$packages" | head -n 1)). Nothing was installed." \
            "Tell pip where the CPU build is, with the address that pytorch.org shows under Get Started (Pip, CPU):" \
            "    PIP_EXTRA_INDEX_URL=ADDRESS $0" \
            "or take the large build: MERISTEM_TORCH=any $0"
    fi
    echo "Installing torch into .venv ..." >&2
    .venv/bin/python -m pip install $pip_options -c constraints.txt torch || fail "pip could not install torch."
}

pip_options="-qq --no-input --disable-pip-version-check"

if ! .venv/bin/python -c '' 2>/dev/null || { ! [ -f .venv/stamp ] && ! .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
    python=$(find_python) || exit $?
    echo "Making .venv with $("$python" --version) ..." >&2
    "$python" -m venv --clear .venv || fail "The environment could not be made; the message stands above."
fi
if [ "$(cat .venv/stamp 2>/dev/null)" != "$(stamp)" ]; then
    rm -f .venv/stamp
    .venv/bin/python -m pip install $pip_options -c constraints.txt --upgrade pip || fail "pip could not be brought up to date."
    has_torch || install_torch
    echo "Installing meristem and what it needs into .venv ..." >&2
    .venv/bin/python -m pip install $pip_options -c constraints.txt -e '.[plot,serve,test,lint]' ||
        fail "pip could not install the requirements; its message stands above. Is the network there?"
    # Compiled here, where somebody waits anyway; without a compiler memories run as tensor code, and this says so.
    [ ! -d native ] || .venv/bin/python -m meristem.native.library
    stamp >.venv/stamp
fi
if [ -n "${MERISTEM_EXTRAS:-}" ] && [ "$(cat .venv/extras 2>/dev/null)" != "$(stamp) $MERISTEM_EXTRAS" ]; then
    echo "Installing the extras $MERISTEM_EXTRAS into .venv ..." >&2
    .venv/bin/python -m pip install $pip_options -c constraints.txt -e ".[$MERISTEM_EXTRAS]" ||
        fail "pip could not install the extras; its message stands above. Is the network there?"
    echo "$(stamp) $MERISTEM_EXTRAS" >.venv/extras
fi
