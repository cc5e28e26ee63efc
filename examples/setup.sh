# The Python environment of the README's two commands: sourced by examples/quickstart.sh and tests/run.sh.
#
#   prepare_environment ROOT run|tests     sets PYTHON; makes ROOT/.venv with the pinned versions unless an environment is active
#   describe_environment ROOT              says what prepare_environment would do, does nothing
#
# Your pip settings (pip.conf, PIP_* variables) decide where packages come from. VLM_TORCH_INDEX, if set, is one more
# package index to look in: where your own serves only torch's CUDA build, point it at an index of CPU builds.
# PYTHON chooses the Python that .venv is made with.

ENVIRONMENT_SIZE="400 MB to download, 1.6 GB on disk, with torch's CPU build; several GB with its CUDA build"
ENVIRONMENT_TIME="1 to 5 minutes"

# An environment that the user has activated. Conda's base is active in every shell of a conda user: that one doesn't count.
environment_is_active() {
    [ -n "${VIRTUAL_ENV:-}" ] || { [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; }
}

# Is a Python new enough? Its version is printed.
python_version() {
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Prints the first Python that is new enough; fails with a message where there is none.
find_python() {
    local candidate found="" version
    for candidate in ${PYTHON:-python3 python python3.11 python3.12 python3.13}; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if version="$(python_version "$candidate")"; then
            command -v "$candidate"
            return 0
        fi
        found="$found $candidate ${version:-(does not start)},"
    done
    echo "Python 3.11 or newer is needed; found:${found:- none}. Install one, or name it: PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}

# Changes whenever the pinned versions or the Python do.
environment_stamp() {
    echo "$("$2" -c 'import sys; print(sys.version)' | tr '\n' ' ') $(cksum < "$1/requirements.txt")"
}

environment_is_ready() {
    [ -x "$1/.venv/bin/python" ] && [ -f "$1/.venv/installed" ] &&
        [ "$(cat "$1/.venv/installed")" = "$(environment_stamp "$1" "$1/.venv/bin/python")" ]
}

describe_environment() {
    local root="$1" python
    if environment_is_active; then
        echo "Python environment: the active one, ${VIRTUAL_ENV:-$CONDA_PREFIX}; nothing is installed into it."
        return 0
    fi
    python="$(find_python)" || return 1
    if environment_is_ready "$root"; then
        echo "Python environment: $root/.venv is there already; nothing to download."
    else
        echo "Python environment: $root/.venv, made with $python ($(python_version "$python")), with the $(
            grep -c '^[A-Za-z]' "$root/requirements.txt") pinned packages of requirements.txt."
        echo "  About $ENVIRONMENT_SIZE. Takes $ENVIRONMENT_TIME."
    fi
}

prepare_environment() {
    local root="$1" purpose="$2" python
    if environment_is_active; then
        PYTHON="$(command -v python || command -v python3 || echo python)"
        if ! python_version "$PYTHON" >/dev/null; then
            echo "Python 3.11 or newer is needed; the active environment, ${VIRTUAL_ENV:-$CONDA_PREFIX}, has" \
                "$(python_version "$PYTHON" || true)." >&2
            return 1
        fi
        check_active_environment "$root" "$purpose" || return 1
    elif environment_is_ready "$root"; then
        PYTHON="$root/.venv/bin/python"
    else
        python="$(find_python)" || return 1
        echo "Making $root/.venv: about $ENVIRONMENT_SIZE; $ENVIRONMENT_TIME."
        if ! "$python" -m venv --clear "$root/.venv"; then
            echo "$python could not make a virtual environment. On Debian and Ubuntu: apt install python3-venv." >&2
            return 1
        fi
        PYTHON="$root/.venv/bin/python"
        if ! "$PYTHON" -m pip install --quiet ${VLM_TORCH_INDEX:+--extra-index-url "$VLM_TORCH_INDEX"} \
            --requirement "$root/requirements.txt" ||
            ! "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --editable "$root"; then
            echo "The packages of requirements.txt could not be installed; pip's reason stands above." >&2
            return 1
        fi
        environment_stamp "$root" "$PYTHON" > "$root/.venv/installed"
    fi
    export PYTHON
    # Programs of the environment (torchrun) first; the clone itself is importable also where it is not installed.
    export PATH="$(dirname "$PYTHON"):$PATH"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
}

# Fails, with the command that helps, where the active environment lacks a package that `run` or `tests` needs.
check_active_environment() {
    "$PYTHON" - "$1/requirements.txt" "$2" <<'PYTHON_CODE'
import sys
from importlib.metadata import PackageNotFoundError, version

path, purpose = sys.argv[1:]
missing = []
for line in open(path, encoding="utf-8"):
    if line.startswith("# --- what those bring") or (purpose == "run" and line.startswith("# --- tests")):
        break
    name = line.partition("==")[0].strip()
    if not name or name.startswith("#"):
        continue
    try:
        version(name)
    except PackageNotFoundError:
        missing.append(line.strip())
if missing:
    sys.exit(
        f"The active environment ({sys.prefix}) lacks {', '.join(missing)}. Install them into it (pip install -r "
        "requirements.txt pins all versions), or deactivate it: then .venv is made for you."
    )
PYTHON_CODE
}
