# Sourced by the scripts beside it: what they all look for before they start.

say() { printf '\n== %s\n' "$*"; }
die() {
    printf 'error: %s\n' "$1" >&2
    if [ $# -gt 1 ]; then printf '  hint: %s\n' "$2" >&2; fi
    exit 1
}

need_rust() {
    if ! command -v cargo >/dev/null && [ -x "$HOME/.cargo/bin/cargo" ]; then
        export PATH="$HOME/.cargo/bin:$PATH"
    fi
    command -v cargo >/dev/null || die "cargo is not here" "install Rust 1.95 or newer: https://rustup.rs"
    local component
    for component in "$@" rustfmt clippy; do
        if ! cargo "${component/rustfmt/fmt}" --version >/dev/null 2>&1; then
            command -v rustup >/dev/null || die "$component is not here" "install it with your Rust toolchain"
            rustup component add "$component"
        fi
    done
}

# ring, zstd and tokenizers' regular expressions have a little C in them.
need_c_compiler() {
    if command -v cc >/dev/null; then return; fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "Installing a C compiler"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq gcc libc6-dev
    else
        die "there is no C compiler" "install one (Debian: sudo apt-get install gcc libc6-dev)"
    fi
}

# The scripts of checkpoints and data sets make a private environment under target/python.
need_python() {
    if command -v python3 >/dev/null && python3 -c 'import venv, ensurepip' 2>/dev/null; then return; fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "Installing Python"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3 python3-venv
    else
        die "Python 3 with venv is not here" "install it (Debian: sudo apt-get install python3 python3-venv)"
    fi
}

# The description of Mesa's software driver, with which the kernels for GPUs run on any machine.
software_vulkan() {
    local description
    for description in /usr/share/vulkan/icd.d/lvp_icd*.json /usr/local/share/vulkan/icd.d/lvp_icd*.json; do
        if [ -f "$description" ]; then
            printf '%s\n' "$description"
            return
        fi
    done
    return 1
}

need_software_vulkan() {
    if software_vulkan >/dev/null; then return; fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "Installing a software Vulkan driver"
        if apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq mesa-vulkan-drivers libvulkan1; then
            return
        fi
    fi
    say "notice: there is no software Vulkan driver, the kernels for GPUs will not be run" \
        "(Debian: sudo apt-get install mesa-vulkan-drivers)"
}
