# Sourced by the scripts beside it: makes or refreshes a virtual environment of their own, and
# compiles the kernel.
# usage: ensure_venv DIR EXTRA   ->  exports VENV_PYTHON
ensure_venv() {
    local dir=$1 extra=$2 root stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    # With its own path, which is written into what is installed: a copy elsewhere is made anew.
    stamp=$({ echo "$dir"; cat "$root/setup.py" "$root/launch/constraints.txt"; } | sha256sum | cut -d' ' -f1)
    if [[ ! -x $dir/bin/python || $(cat "$dir/.stamp" 2>/dev/null) != "$stamp" ]]; then
        echo "installing into $dir"
        "${PYTHON:-python3}" -m venv --clear "$dir"
        # The build frontend needs setuptools; torch goes first so that nothing pulls another build.
        "$dir/bin/pip" install --quiet --disable-pip-version-check \
            --constraint "$root/launch/constraints.txt" "setuptools>=68" wheel
        "$dir/bin/pip" install --quiet --disable-pip-version-check \
            --constraint "$root/launch/constraints.txt" torch
        "$dir/bin/pip" install --quiet --disable-pip-version-check --no-build-isolation \
            --constraint "$root/launch/constraints.txt" --editable "$root[$extra]"
        echo "$stamp" >"$dir/.stamp"
    fi
    # The editable package is this tree, so its kernel lies in it, and a tree may be newer than the
    # environment. Without a compiler this says so and goes on: the package does without.
    local kernel=$root/pma_megatron/merging/_kernel
    if ! compgen -G "$kernel*.so" >/dev/null || [[ $(ls -t "$kernel"* | head -1) == *.c ]]; then
        (cd "$root" && "$dir/bin/python" -W ignore setup.py --quiet build_ext --inplace)
    fi
    export VENV_PYTHON=$dir/bin/python
}
